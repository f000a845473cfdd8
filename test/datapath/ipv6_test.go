//go:build linux

package datapath_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/test/lab"
)

// IPv6 rides the kernel path, and is counted there: on a node without IPv4 as well,
// with what one node counts as sent being what the other counts as received, over
// restarts and while weft is away.
func TestIPv6IsCounted(t *testing.T) {
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			lt, l := newTrafficLab(t, lab.Options{Families: lab.IPv6, Underlay: underlay})
			n1, n2 := l.Node(1), l.Node(2)
			for _, n := range l.Nodes {
				r := mustStatus(t, n)
				if r.Mode != dataplane.ModeKernel || !strings.Contains(r.Reason, "IPv6 rides the kernel path") {
					t.Errorf("%s: mode %s: %s", n, r.Mode, r.Reason)
				}
				if len(r.Hooks) != 2 || r.Hooks[0].Attached == "" || r.Hooks[1].Attached == "" || r.Hooks[0].Device != n.OverlayV6() {
					t.Errorf("%s: programs are at %+v", n, r.Hooks)
				}
				if r.OverlayV6.Name != n.OverlayV6() || r.Port != 8472 {
					t.Errorf("%s: the overlay is %+v, port %d", n, r.OverlayV6, r.Port)
				}
			}
			r := route{from: place{&l.Pod(1, 1).Space, n1, l.Pod(1, 1).IPv6}, to: place{&l.Pod(2, 1).Space, n2, l.Pod(2, 1).IPv6}}
			conserved6(lt, l, "TCP bulk both ways", 500, func() { startIperf(lt, r, "--bidir -t 1 -b 300M").mustEnd() })
			conserved6(lt, l, "small UDP", 500, func() { startIperf(lt, r, "-u -l 64 -b 4M -t 1").mustEnd() })
			conserved6(lt, l, "UDP in fragments", 500, func() { startIperf(lt, r, "-u -l 8000 -b 50M -t 1").mustEnd() })

			// The programs go on without an agent, and one that starts takes over
			// what they have counted.
			before := mustCounted6(t, n1, n2)
			if err := n1.StopAgent(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			conserved6(lt, l, "without an agent", 5, func() { mustPing6(t, r) })
			if err := n1.RestartAgent(t.Context(), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			conserved6(lt, l, "with a new agent", 5, func() { mustPing6(t, r) })
			if after := mustCounted6(t, n1, n2); after.TxPackets < before.TxPackets+10 {
				t.Errorf("counted %+v before and %+v behind the restart", before, after)
			}
			mustHaveMetrics6(t, n1, n2)

			if err := n1.StopAgent(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if out := mustWeft(t, n1, "remove"); !strings.Contains(out, "overlay6_in") || !strings.Contains(out, "overlay6_out") {
				t.Errorf("weft remove said:\n%s", out)
			}
			mustPing6(t, r)
		})
	}
}

func mustPing6(t *testing.T, r route) {
	t.Helper()
	if err := pings(t, r.from.Space, r.to.ip); err != nil {
		t.Error(err)
	}
}

// mustCounted6 is what a node has counted of an IPv6 peer.
func mustCounted6(tb testing.TB, n, peer *lab.Node) ebpf.PathCounters {
	tb.Helper()
	for _, p := range mustPeers(tb, n) {
		if p.PublicIP != peer.IPv6 {
			continue
		}
		if len(p.Counters) != 3 || byPath(p, "base") != (dataplane.PathCounters{Path: "base"}) ||
			byPath(p, "express") != (dataplane.PathCounters{Path: "express"}) {
			tb.Errorf("%s: counted %+v of %s", n, p.Counters, peer)
		}
		if p.InMap || len(p.Divergence) > 0 {
			tb.Errorf("%s: %s is %+v", n, peer, p)
		}
		c := byPath(p, "kernel")
		return ebpf.PathCounters{TxPackets: c.TxPackets, TxBytes: c.TxBytes, RxPackets: c.RxPackets, RxBytes: c.RxBytes}
	}
	tb.Fatalf("%s: weft peers does not list %s", n, peer.IPv6)
	return ebpf.PathCounters{}
}

// conserved6 compares what the two nodes of a lab count of each other while f runs.
// What devices on the way drop spoils the comparison, so then it is done again.
func conserved6(t lab.Test, l *lab.Lab, what string, least uint64, f func()) {
	t.Helper()
	a, b := l.Node(1), l.Node(2)
	var err error
	for range 5 {
		a1, b1, drops := mustCounted6(t, a, b), mustCounted6(t, b, a), mustDrops(t, l)
		f()
		err = eventually(2*time.Second, func() error {
			a2, b2 := subCounters(mustCounted6(t, a, b), a1), subCounters(mustCounted6(t, b, a), b1)
			if a2.TxPackets < least || b2.TxPackets < min(least, 5) {
				return fmt.Errorf("there was no traffic: %+v %+v", a2, b2)
			}
			return conserved(a2, b2)
		})
		if err == nil || mustDrops(t, l) == drops {
			break
		}
	}
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// mustHaveMetrics6 looks for the series of an IPv6 peer, under its public IP, and
// for what joins them with its name.
func mustHaveMetrics6(t *testing.T, n, peer *lab.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	metrics, err := n.Metrics(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf(`weft_peer_info{node=%q,peer=%q,prefix=%q} 1`, peer.String(), peer.IPv6, peer.PrefixV6),
		fmt.Sprintf(`weft_peer_transmit_packets_total{path="base",peer=%q} 0`, peer.IPv6),
		fmt.Sprintf(`weft_peer_receive_bytes_total{path="express",peer=%q} 0`, peer.IPv6),
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("%s has no metric %s", n, want)
		}
	}
	if value := kernelMetric(metrics, "weft_peer_transmit_packets_total", peer.IPv6); value == "" || value == "0" {
		t.Errorf("%s sent %q packets to %s by the kernel path, says its metric", n, value, peer.IPv6)
	}
}

// kernelMetric is the value of a peer's series of the kernel path.
func kernelMetric(text, name string, peer netip.Addr) string {
	_, rest, _ := strings.Cut(text, fmt.Sprintf(`%s{path="kernel",peer=%q} `, name, peer))
	value, _, _ := strings.Cut(rest, "\n")
	return value
}
