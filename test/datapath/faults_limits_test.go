//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// One weft node whose maps have room for two of its four peers.
func newCrowdedLab(tb testing.TB, flags ...string) (lab.Test, *lab.Lab) {
	tb.Helper()
	return newTrafficLab(tb, lab.Options{
		Nodes: 5, Kinds: []lab.Kind{lab.Weft, lab.Kernel},
		AgentFlags: append([]string{"--max-peers", "2"}, flags...),
	})
}

func TestPeersBeyondMaxPeersRideTheKernelPath(t *testing.T) {
	t.Parallel()
	lt, l := newCrowdedLab(t)
	n := l.Node(1)
	inMap := 0
	for _, peer := range n.Peers() {
		r := between(l.Pod(1, 1), peer.Pods[0])
		if err := r.ask(t.Context(), 5); err != nil {
			t.Errorf("%s is not reached: %v", peer, err)
		}
		if got := tcpBulk(lt, r); got != "intact" {
			t.Errorf("%s: %s", peer, got)
		}
		p := mustPeer(t, n, peer)
		if p.InMap {
			inMap++
			mustRideBase(lt, r)
			continue
		}
		if len(p.Divergence) == 0 || !strings.Contains(mustWeft(t, n, "peers"), p.Divergence[0]) {
			t.Errorf("weft peers has no note about %s: %+v", peer, p)
		}
	}
	if inMap != 2 {
		t.Errorf("%d peers are in the map, not 2", inMap)
	}
	for _, words := range []string{"no room for all peers", "maxPeers=2", "mapMemoryKiB="} {
		if !strings.Contains(n.AgentLog(), words) {
			t.Errorf("the log says nothing of %q", words)
		}
	}
}

// Two peers take the places of two others, all at once.
func TestRoomComesWhenPeersGo(t *testing.T) {
	t.Parallel()
	lt, l := newCrowdedLab(t)
	n := l.Node(1)
	mustRideBase(lt, between(l.Pod(1, 1), l.Pod(2, 1)))
	mustConfigure(t, n, n.IP, entriesOf(l.Node(4), l.Node(5))...)
	for _, peer := range []*lab.Node{l.Node(4), l.Node(5)} {
		lt.Eventually(5*time.Second, func() error {
			if !mustPeer(t, n, peer).InMap {
				return errors.New(peer.String() + " is not in the map")
			}
			return nil
		})
		mustRideBase(lt, between(l.Pod(1, 1), peer.Pods[0]))
	}
}

// A peer that does not fit the maps is a peer all the same: it must not pass
// for a stranger whose packets are dropped.
func TestPeersBeyondMaxPeersPassTheSourceCheck(t *testing.T) {
	t.Parallel()
	for _, check := range []string{"enforce", "observe"} {
		t.Run(check, func(t *testing.T) {
			_, l := newCrowdedLab(t, "--source-check", check)
			n := l.Node(1)
			for _, peer := range n.Peers() {
				if err := between(l.Pod(1, 1), peer.Pods[0]).ask(t.Context(), 5); err != nil {
					t.Errorf("%s is not reached: %v", peer, err)
				}
			}
			if passed, dropped := mustReason(t, n, "source_unknown_peer"); passed+dropped > 0 {
				t.Errorf("%d packets of peers were dropped and %d suspected as a stranger's", dropped, passed)
			}
		})
	}
}

func TestPeersHaveTooManyPrefixLengths(t *testing.T) {
	t.Parallel()
	lt, l := newTrafficLab(t, lab.Options{Nodes: 6, Kinds: []lab.Kind{lab.Weft, lab.Kernel}})
	n := l.Node(1)
	entries := entriesOf(n.Peers()...)
	for i := range entries { // the pod has the prefix's address number 2
		entries[i].prefixes = []netip.Prefix{netip.PrefixFrom(entries[i].prefixes[0].Addr(), 24+i)}
	}
	// Four more lengths, and more frequent than those of the five.
	for i, prefix := range []string{"10.244.128.0/20", "10.244.160.0/21", "10.244.176.0/22", "10.244.184.0/23"} {
		p := netip.MustParsePrefix(prefix)
		twin := p.Addr().As4()
		twin[2] += byte(1) << (24 - p.Bits())
		entries = append(entries, peerEntry{
			name: fmt.Sprint("far", i), prefixes: []netip.Prefix{p, netip.PrefixFrom(netip.AddrFrom4(twin), p.Bits())},
			ip: netip.AddrFrom4([4]byte{192, 0, 2, byte(200 + i)}), mac: fmt.Sprintf("02:00:00:00:09:%02x", i),
		})
	}
	mustConfigure(t, n, n.IP, entries...)
	misfits := func() (out []*lab.Node) {
		for _, peer := range n.Peers() {
			if !mustPeer(t, n, peer).InMap {
				out = append(out, peer)
			}
		}
		return out
	}
	lt.Eventually(5*time.Second, func() error {
		if m := misfits(); len(m) != 1 {
			return fmt.Errorf("%d peers do not fit; 8 of 9 lengths have room", len(m))
		}
		return nil
	})
	misfit := misfits()[0]
	for _, peer := range n.Peers() {
		r := between(l.Pod(1, 1), peer.Pods[0])
		if err := r.ask(t.Context(), 5); err != nil {
			t.Errorf("%s is not reached: %v", peer, err)
		}
		if peer != misfit {
			mustRideBase(lt, r)
		}
	}
	if log := n.AgentLog(); !strings.Contains(log, "prefixes of too many lengths") || strings.Contains(log, "raise --max-peers") {
		t.Errorf("the log does not tell that prefix lengths are what is short: --max-peers has room")
	}
}

// Places in the counters are given to others when a peer goes. Two peers must
// never have one.
func TestPeersComeAndGoAfterARestart(t *testing.T) {
	t.Parallel()
	lt, l := newTrafficLab(t, lab.Options{AgentFlags: []string{"--max-peers", "3"}})
	n, real := l.Node(1), entryOf(l.Node(2))
	other := func(i int) peerEntry {
		return peerEntry{
			fmt.Sprintf("x%d", i),
			[]netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(100 + i), 0}), 24)},
			netip.AddrFrom4([4]byte{192, 0, 2, byte(100 + i)}),
			fmt.Sprintf("0a:58:0a:f4:%02x:00", 100+i),
		}
	}
	configure := func(peers ...peerEntry) {
		t.Helper()
		mustConfigure(t, n, n.IP, peers...)
		lt.Eventually(5*time.Second, func() error {
			for _, p := range peers {
				in := false
				for _, have := range mustPeers(t, n) {
					in = in || have.PublicIP == p.ip && have.InMap
				}
				if !in {
					return fmt.Errorf("%s is not in the map", p.name)
				}
			}
			if have := mustPeers(t, n); len(have) != len(peers) {
				return fmt.Errorf("there are %d peers, not %d", len(have), len(peers))
			}
			return nil
		})
	}
	configure(other(1), other(2), other(3))
	// (The lab would write its own config file at a restart.)
	mustStop(lt, n, syscall.SIGTERM)
	agent := lt.Start(n, weft, "agent", "--config", lab.StaticFile, "--max-peers", "3")
	if err := agent.WaitOutput(t.Context(), "the node is ready"); err != nil {
		t.Fatal(err)
	}
	configure(other(1), other(2)) // the third place is free
	configure(other(1), other(2), real)
	mustRideBase(lt, between(l.Pod(1, 1), l.Pod(2, 1)))
	for i := 4; i < 12; i++ {
		configure(other(1), real)
		time.Sleep(1100 * time.Millisecond) // so long a place rests
		configure(other(1), real, other(i))
		for _, p := range mustPeers(t, n) {
			if p.PublicIP != real.ip && byPath(p, "base").TxPackets > 0 {
				t.Fatalf("%v, which nobody sent anything to, counts the packets to %v: they share a place", p.PublicIP, real.ip)
			}
		}
		if mustCarried(t, n, l.Node(2)).base.TxPackets == 0 {
			t.Fatalf("the counters of %v were cleared for another peer: they share a place", real.ip)
		}
	}
}
