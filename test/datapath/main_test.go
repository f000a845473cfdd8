//go:build linux

// Package datapath_test runs the dataplane as an operator meets it: nodes with
// real agents, real traffic, and somebody who changes something meanwhile.
package datapath_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/test/lab"
)

// weft is the program under test, built once for all tests.
var weft string

func TestMain(m *testing.M) { os.Exit(lab.WithWeft(m, func(path string) { weft = path })) }

// newLab makes a lab whose nodes run the program under test; all are Weft
// nodes unless opts says otherwise.
func newLab(tb testing.TB, opts lab.Options) (lab.Test, *lab.Lab) {
	tb.Helper()
	t := lab.T(tb)
	opts.Binary = weft
	if len(opts.Kinds) == 0 {
		opts.Kinds = []lab.Kind{lab.Weft}
	}
	return t, t.New(opts)
}

// mustStatus is what `weft status` says of a node.
func mustStatus(tb testing.TB, n *lab.Node) dataplane.Report {
	tb.Helper()
	var status struct{ Report dataplane.Report }
	mustJSON(tb, n, &status, weft, "status", "-o", "json")
	return status.Report
}

// mustReason is how often a node passed packets to the kernel, and dropped
// them, for a reason.
func mustReason(tb testing.TB, n *lab.Node, name string) (passed, dropped uint64) {
	tb.Helper()
	for _, r := range mustStatus(tb, n).Reasons {
		if r.Name == name {
			return r.Passed, r.Dropped
		}
	}
	tb.Fatalf("%s: weft status knows no reason %s", n, name)
	return 0, 0
}

// mustPeers is what `weft peers` of a node says.
func mustPeers(tb testing.TB, n *lab.Node) []dataplane.PeerReport {
	tb.Helper()
	var answer struct{ Peers []dataplane.PeerReport }
	mustJSON(tb, n, &answer, weft, "peers", "-o", "json")
	return answer.Peers
}

// mustPeer is what `weft peers` of a node says of a peer.
func mustPeer(tb testing.TB, n, peer *lab.Node) dataplane.PeerReport {
	tb.Helper()
	for _, p := range mustPeers(tb, n) {
		if p.PublicIP == peer.IP {
			return p
		}
	}
	tb.Fatalf("%s: weft peers does not list %s", n, peer)
	return dataplane.PeerReport{}
}

// mustPath is what a node has carried to and from a peer by a path: express,
// base or kernel.
func mustPath(tb testing.TB, n, peer *lab.Node, path string) dataplane.PathCounters {
	tb.Helper()
	return byPath(mustPeer(tb, n, peer), path)
}

// byPath picks one path's counters; without programs there are none.
func byPath(p dataplane.PeerReport, path string) dataplane.PathCounters {
	for _, c := range p.Counters {
		if c.Path == path {
			return c
		}
	}
	return dataplane.PathCounters{Path: path}
}

// mustJSON runs a command on a node and decodes what it prints.
func mustJSON(tb testing.TB, n *lab.Node, into any, command ...string) {
	tb.Helper()
	out, err := n.Output(tb.Context(), command...)
	if err != nil {
		tb.Fatal(err)
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		tb.Fatalf("%s: %v: %v\n%s", n, command, err, out)
	}
}

// mustUseBase pings from a pod to a pod of another node until the base path of
// every Weft node among the two carries packets in both directions.
func mustUseBase(tb testing.TB, from, to *lab.Pod) {
	tb.Helper()
	lab.T(tb).Eventually(10*time.Second, func() error { return useBase(tb, from, to) })
}

// useBase pings for a moment and tells who did not use the base path.
func useBase(tb testing.TB, from, to *lab.Pod) error {
	tb.Helper()
	type end struct{ node, peer *lab.Node }
	ends := []end{{from.Node, to.Node}, {to.Node, from.Node}}
	var before [2]dataplane.PathCounters
	for i, e := range ends {
		if e.node.Kind == lab.Weft {
			before[i] = mustPath(tb, e.node, e.peer, "base")
		}
	}
	if err := pings(tb, from, to.IP); err != nil {
		return err
	}
	for i, e := range ends {
		if e.node.Kind != lab.Weft {
			continue
		}
		after := mustPath(tb, e.node, e.peer, "base")
		if after.TxPackets == before[i].TxPackets || after.RxPackets == before[i].RxPackets {
			return fmt.Errorf("the base path of %s carried %d packets to %s and %d from it",
				e.node, after.TxPackets-before[i].TxPackets, e.peer, after.RxPackets-before[i].RxPackets)
		}
	}
	return nil
}

// pings sends some pings within a quarter of a second and returns an error
// unless all are answered.
func pings(tb testing.TB, from lab.Runner, to netip.Addr, flags ...string) error {
	tb.Helper()
	command := append([]string{"ping", "-n", "-q", "-c", "5", "-i", "0.05", "-W", "1"}, flags...)
	out, err := from.Output(tb.Context(), append(command, to.String())...)
	if err == nil && !strings.Contains(out, " 0% packet loss") {
		err = fmt.Errorf("%s to %s: some pings were lost:\n%s", from, to, out)
	}
	return err
}
