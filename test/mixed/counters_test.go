//go:build linux && peers

package mixed_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/test/lab"
)

// In a cluster of both families a node counts every peer twice, by each of its
// public IPs: IPv4 accelerated, IPv6 on the kernel path. What one weft node counts
// as sent another counts as received.
func TestBothFamiliesAreCounted(t *testing.T) {
	_, l := newLab(t, lab.Options{
		Store: lab.StoreKube, Families: lab.DualStack, Nodes: 3, Kinds: []lab.Kind{lab.Weft, lab.Weft, lab.Flanneld},
	})
	a, b, stock := l.Node(1), l.Node(2), l.Node(3)
	var status struct{ Report dataplane.Report }
	mustJSON(t, a, &status, "status")
	if r := status.Report; r.Mode != dataplane.ModeEBPF || r.Reason != "" || len(r.Hooks) != 6 || len(r.Peers) != 4 {
		t.Fatalf("mode %s (%s), hooks %+v, %d peers", r.Mode, r.Reason, r.Hooks, len(r.Peers))
	}
	for range 10 { // the base path waits for its proof
		mustReachAll(t, l)
	}
	for _, addresses := range [][3]netip.Addr{{a.IP, b.IP, stock.IP}, {a.IPv6, b.IPv6, stock.IPv6}} {
		atA, atB := addresses[0], addresses[1]
		var ofB, ofA dataplane.PathCounters
		var err error
		for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			ofB, ofA = mustCounted(t, a, atB), mustCounted(t, b, atA)
			if err = alike(ofB, ofA); err == nil {
				break
			}
		}
		if err != nil {
			t.Errorf("%s and %s: %v", atA, atB, err)
		}
		ofStock := mustCounted(t, a, addresses[2])
		if min(ofB.TxPackets, ofA.TxPackets, ofStock.TxPackets, ofStock.RxPackets) < 500 {
			t.Errorf("%s: counted %+v of %s, %+v of %s", a, ofB, atB, ofStock, addresses[2])
		}
	}
	mustRun(t, a, weft, "accel", "off", "--peer", b.String())
	for _, p := range mustPeers(t, a) {
		if off := !p.Switches.Base && !p.Switches.Express; off != (p.PublicIP == b.IP) {
			t.Errorf("%s is switched off: %v", p.PublicIP, off)
		}
	}
}

// alike compares what two nodes count of each other.
func alike(a, b dataplane.PathCounters) error {
	var errs []error
	for what, n := range map[string][2]uint64{
		"packets there": {a.TxPackets, b.RxPackets}, "bytes there": {a.TxBytes, b.RxBytes},
		"packets back": {b.TxPackets, a.RxPackets}, "bytes back": {b.TxBytes, a.RxBytes},
	} {
		if n[0] != n[1] {
			errs = append(errs, fmt.Errorf("%s: %d sent, %d received", what, n[0], n[1]))
		}
	}
	return errors.Join(errs...)
}

// mustCounted is what a node has counted of a peer over all paths. IPv6 has one.
func mustCounted(tb testing.TB, n *lab.Node, peer netip.Addr) (sum dataplane.PathCounters) {
	tb.Helper()
	for _, p := range mustPeers(tb, n) {
		if p.PublicIP != peer {
			continue
		}
		if p.InMap != peer.Is4() || len(p.Divergence) > 0 || len(p.Counters) != 3 {
			tb.Fatalf("%s: peer %+v", n, p)
		}
		for _, c := range p.Counters {
			if peer.Is6() && c.Path != "kernel" && c != (dataplane.PathCounters{Path: c.Path}) {
				tb.Errorf("%s: IPv6 packets of %s on another path: %+v", n, peer, c)
			}
			sum.TxPackets += c.TxPackets
			sum.TxBytes += c.TxBytes
			sum.RxPackets += c.RxPackets
			sum.RxBytes += c.RxBytes
		}
		return sum
	}
	tb.Fatalf("%s: weft peers does not list %s", n, peer)
	return sum
}

func mustPeers(tb testing.TB, n *lab.Node) []dataplane.PeerReport {
	tb.Helper()
	var answer struct{ Peers []dataplane.PeerReport }
	mustJSON(tb, n, &answer, "peers")
	return answer.Peers
}

// mustJSON decodes what a show command of weft prints.
func mustJSON(tb testing.TB, n *lab.Node, into any, command string) {
	tb.Helper()
	if err := json.Unmarshal([]byte(mustRun(tb, n, weft, command, "-o", "json")), into); err != nil {
		tb.Fatalf("%s: weft %s: %v", n, command, err)
	}
}

func mustRun(tb testing.TB, n *lab.Node, command ...string) string {
	tb.Helper()
	out, err := n.Output(tb.Context(), command...)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}
