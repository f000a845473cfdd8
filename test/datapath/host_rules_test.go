//go:build linux

package datapath_test

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/test/lab"
)

// proofLife is PROOF_LIFE of bpf/constants.h: how long the programs may go on
// after the host has stopped to let a peer's packets through. slack is for a
// machine that has other things to do.
const (
	proofLife = 2 * time.Second
	slack     = time.Second
)

// hostChange is something that an operator does on a node about one peer, in
// commands: {peer} is the peer's address, {n} its number and {me} the node's
// address.
type hostChange struct {
	name     string
	prepare  []string // long before
	do, undo []string
	// silent tells that no packet may leave for the peer, too.
	silent bool
}

// commands fills in a peer.
func (c hostChange) commands(lines []string, peer *lab.Node) []string {
	out := make([]string, len(lines))
	for i, line := range lines {
		out[i] = strings.NewReplacer("{peer}", peer.IP.String(), "{me}", "192.0.2.11", "{n}", fmt.Sprint(peer.Index)).Replace(line)
	}
	return out
}

// nftChain is a chain of one's own, as administrators have beside those of
// kube-proxy.
func nftChain(family, hook string) []string {
	table := fmt.Sprintf("%s guard{n}", family)
	return []string{
		"nft add table " + table,
		"nft add chain " + table + " c { type filter hook " + hook + " ; }",
	}
}

// nftRule is a rule that comes and goes in such a chain.
func nftRule(name, family, hook, rule string) hostChange {
	return hostChange{
		name:    name,
		prepare: nftChain(family, hook),
		do:      []string{"nft add rule " + family + " guard{n} c " + rule},
		undo:    []string{"nft flush chain " + family + " guard{n} c"},
	}
}

// iptablesRule is a rule that is inserted and deleted.
func iptablesRule(name, program, table, rule string) hostChange {
	return hostChange{
		name: name,
		do:   []string{program + " -w -t " + table + " -I " + rule},
		undo: []string{program + " -w -t " + table + " -D " + rule},
	}
}

// silently is c with nothing leaving for the peer.
func (c hostChange) silently() hostChange {
	c.silent = true
	return c
}

// ipsetPrefix marks commands for which no program need be installed.
const ipsetPrefix = "ipset "

// refusals are the ways in which a host stops to exchange VXLAN packets with
// one peer and no other.
var refusals = []hostChange{
	nftRule("nft input", "inet", "input priority 0", "ip saddr {peer} udp dport 8472 drop"),
	nftRule("nft prerouting", "ip", "prerouting priority -300", "ip saddr {peer} udp dport 8472 drop"),
	nftRule("nft netdev ingress", "netdev", "ingress device eth0 priority 0", "ip saddr {peer} udp dport 8472 drop"),
	nftRule("nft output", "inet", "output priority 0", "ip daddr {peer} udp dport 8472 drop").silently(),
	nftRule("nft postrouting", "inet", "postrouting priority 300", "ip daddr {peer} udp dport 8472 drop").silently(),
	nftRule("nft netdev egress", "netdev", "egress device eth0 priority 0", "ip daddr {peer} udp dport 8472 drop").silently(),
	iptablesRule("iptables-nft INPUT", "iptables-nft", "filter", "INPUT -s {peer} -p udp --dport 8472 -j DROP"),
	iptablesRule("iptables-nft OUTPUT", "iptables-nft", "filter", "OUTPUT -d {peer} -p udp --dport 8472 -j DROP").silently(),
	iptablesRule("iptables-nft raw PREROUTING", "iptables-nft", "raw", "PREROUTING -s {peer} -p udp --dport 8472 -j DROP"),
	iptablesRule("iptables-legacy INPUT", "iptables-legacy", "filter", "INPUT -s {peer} -p udp --dport 8472 -j DROP"),
	iptablesRule("iptables-legacy raw OUTPUT", "iptables-legacy", "raw", "OUTPUT -d {peer} -p udp --dport 8472 -j DROP").silently(),
	iptablesRule("iptables-legacy mangle POSTROUTING", "iptables-legacy", "mangle", "POSTROUTING -d {peer} -p udp --dport 8472 -j DROP").silently(),
	{
		name: "peer joins an nft set",
		prepare: append(nftChain("inet", "input priority 0"),
			"nft add set inet guard{n} bad { type ipv4_addr ; }",
			"nft add rule inet guard{n} c ip saddr @bad udp dport 8472 drop"),
		do:   []string{"nft add element inet guard{n} bad { {peer} }"},
		undo: []string{"nft delete element inet guard{n} bad { {peer} }"},
	},
	{
		name: "peer joins an ipset",
		prepare: []string{
			ipsetPrefix + "create bad{n}",
			"iptables-nft -w -I INPUT -p udp --dport 8472 -m set --match-set bad{n} src -j DROP",
		},
		do:   []string{ipsetPrefix + "add bad{n} {peer}"},
		undo: []string{ipsetPrefix + "del bad{n} {peer}"},
	},
	{
		name:   "policy of IPsec blocks what goes out",
		do:     []string{"ip xfrm policy add src {me} dst {peer} dir out action block"},
		undo:   []string{"ip xfrm policy delete src {me} dst {peer} dir out"},
		silent: true,
	},
	{
		name:   "policy of IPsec wants ESP for what goes out",
		do:     []string{"ip xfrm policy add src {me} dst {peer} dir out tmpl src {me} dst {peer} proto esp mode transport"},
		undo:   []string{"ip xfrm policy delete src {me} dst {peer} dir out"},
		silent: true,
	},
	{
		name: "policy of IPsec blocks what comes in",
		do:   []string{"ip xfrm policy add src {peer} dst {me} dir in action block"},
		undo: []string{"ip xfrm policy delete src {peer} dst {me} dir in"},
	},
	{
		name: "policy of IPsec wants ESP for what comes in",
		do:   []string{"ip xfrm policy add src {peer} dst {me} dir in tmpl src {peer} dst {me} proto esp mode transport"},
		undo: []string{"ip xfrm policy delete src {peer} dst {me} dir in"},
	},
	{
		name:   "blackhole route",
		do:     []string{"ip route add blackhole {peer}"},
		undo:   []string{"ip route delete blackhole {peer}"},
		silent: true,
	},
	{
		name:   "rule forbids the peer",
		do:     []string{"ip rule add to {peer} prohibit"},
		undo:   []string{"ip rule delete to {peer} prohibit"},
		silent: true,
	},
	{
		name:   "rule by port forbids VXLAN to the peer",
		do:     []string{"ip rule add to {peer} ipproto udp dport 8472 blackhole"},
		undo:   []string{"ip rule delete to {peer} ipproto udp dport 8472 blackhole"},
		silent: true,
	},
	{
		name: "peer has another MAC address by hand",
		do:   []string{"ip neighbour replace {peer} lladdr 0a:58:00:00:00:99 dev eth0 nud permanent"},
		undo: []string{"ip neighbour delete {peer} dev eth0"},
	},
}

// mustHostCommand runs one line of a hostChange.
func mustHostCommand(tb testing.TB, n *lab.Node, line string) {
	tb.Helper()
	ours := false
	err := n.Do(func() (err error) {
		ours, err = hostCommandOfOurs(line)
		return err
	})
	if err != nil {
		tb.Fatalf("%s: %v", line, err)
	}
	if !ours {
		lab.T(tb).Run(n, line)
	}
}

// ipset is the little of ipset(8) that is needed here.
func ipset(verb, set string, member ...string) error {
	if verb == "create" {
		return netlink.IpsetCreate(set, "hash:ip", netlink.IpsetCreateOptions{})
	}
	ip, err := netlink.ParseAddr(member[0] + "/32")
	if err != nil {
		return err
	}
	entry := &netlink.IPSetEntry{IP: ip.IP}
	if verb == "add" {
		return netlink.IpsetAdd(set, entry)
	}
	return netlink.IpsetDel(set, entry)
}

// Every peer is treated in another way by the host's rules, while all send and
// receive; the last is left alone:
//
//	n2 ----.
//	n3 -----\
//	 :       br0 ---- n1: a rule against n2, another against n3, ...
//	n23 ----/
//	n24 ---'              no rule against n24
//
// What a plain kernel node does at once, a weft node does when its proof is too
// old at the latest, with and without an agent. And when the rule is gone, all
// is as before.
func TestHostRefusesVXLANOfOnePeer(t *testing.T) {
	for _, node := range hostNodes {
		t.Run(node.name, func(t *testing.T) {
			t.Parallel()
			lt, l := newLab(t, lab.Options{Nodes: 2 + len(refusals), Kinds: []lab.Kind{node.kind, lab.Bare}})
			n1, peers := l.Node(1), l.Nodes[1:]
			spared := peers[len(peers)-1]
			mustPrepare(t, n1, peers, refusals)
			probes := mustProbeAll(t, n1, peers)
			if node.kind == lab.Weft {
				mustAccelerateAll(t, n1, peers)
			}
			if node.killed {
				if err := n1.StopAgent(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			tap := mustTapWire(t, l, "n1")

			began := time.Now()
			for i, c := range refusals {
				for _, line := range c.commands(c.do, peers[i]) {
					mustHostCommand(t, n1, line)
				}
			}
			done := time.Now()
			grace := slack
			if node.kind == lab.Weft {
				grace += proofLife
			}
			time.Sleep(grace + time.Second)
			refused := time.Now()
			for i, c := range refusals {
				for _, line := range c.commands(c.undo, peers[i]) {
					mustHostCommand(t, n1, line)
				}
			}
			allowed := time.Now()
			if node.kind == lab.Weft && !node.killed {
				lt.Eventually(10*time.Second, func() error { return allAccelerated(t, n1, peers) })
			} else {
				time.Sleep(2 * time.Second)
			}

			results := mustStopAll(t, probes)
			for i, c := range refusals {
				t.Run(c.name, func(t *testing.T) {
					result := results[peers[i].Index]
					when, ok := result.longSilence(began, done.Add(grace), refused)
					if !ok {
						t.Fatalf("the peer was answered while the host forbade it: %s", result.probe)
					}
					t.Logf("silence after %s", when.Sub(began).Round(10*time.Millisecond))
					if last := result.lastLoss(); last.After(allowed.Add(2 * time.Second)) {
						t.Errorf("no answer long after the host allowed it again: %s", result.probe)
					}
					if sent := tap.between(peers[i].IP, done.Add(grace), refused); c.silent && len(sent) > 0 {
						t.Errorf("%d VXLAN packets left for the peer", len(sent))
					}
				})
			}
			t.Run("other peer", func(t *testing.T) {
				if result := results[spared.Index]; result.probe.Lost > 0 {
					t.Errorf("the peer that no rule is about: %s", result.probe)
				}
			})
		})
	}
}

// hostNodes are the nodes that must behave alike.
var hostNodes = []struct {
	name   string
	kind   lab.Kind
	killed bool
}{
	{"plain kernel", lab.Kernel, false},
	{"agent runs", lab.Weft, false},
	{"agent killed", lab.Weft, true},
}

// mustPrepare makes the peers' overlays, and what the host has before anything
// changes.
func mustPrepare(tb testing.TB, n *lab.Node, peers []*lab.Node, changes []hostChange) {
	tb.Helper()
	for i, peer := range peers {
		mustPeerWithOne(tb, peer, n)
		if i < len(changes) {
			for _, line := range changes[i].commands(changes[i].prepare, peer) {
				mustHostCommand(tb, n, line)
			}
		}
	}
}

// peerProbe is a probe from a peer, and when it began.
type peerProbe struct {
	*lab.Probe
	began time.Time
}

// probed is what a peerProbe saw.
type probed struct {
	began time.Time
	probe lab.ProbeResult
}

// mustStopAll ends all probes.
func mustStopAll(tb testing.TB, probes map[int]*peerProbe) map[int]probed {
	tb.Helper()
	var (
		stopping sync.WaitGroup
		mu       sync.Mutex
		results  = map[int]probed{}
	)
	for index, p := range probes {
		stopping.Go(func() {
			result, err := p.Stop()
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				tb.Errorf("probe from n%d: %v", index, err)
			}
			results[index] = probed{p.began, result}
		})
	}
	stopping.Wait()
	return results
}

// longSilence looks for a loss that begins between two moments and lasts until
// a third, and returns when it began.
func (p probed) longSilence(from, to, until time.Time) (time.Time, bool) {
	const interval = 20 * time.Millisecond
	for _, loss := range p.probe.Losses {
		at := p.began.Add(loss.At)
		if !at.Before(from.Add(-interval)) && !at.After(to) && !at.Add(time.Duration(loss.Count+2)*2*interval).Before(until) {
			return at, true
		}
	}
	return time.Time{}, false
}

// lastLoss is when the last request without answer was sent.
func (p probed) lastLoss() (last time.Time) {
	for _, loss := range p.probe.Losses {
		last = p.began.Add(loss.At + time.Duration(loss.Count)*20*time.Millisecond)
	}
	return last
}

// mustProbeAll starts a probe from each peer to a node.
func mustProbeAll(tb testing.TB, n *lab.Node, peers []*lab.Node) map[int]*peerProbe {
	tb.Helper()
	probes := make([]*peerProbe, len(peers))
	errs := make([]error, len(peers))
	var starting sync.WaitGroup
	for i, peer := range peers {
		starting.Go(func() {
			p, err := lab.StartProbe(peer.Pods[0], n.Pods[0], lab.ProbeOptions{Interval: 20 * time.Millisecond})
			probes[i], errs[i] = &peerProbe{p, time.Now()}, err
		})
	}
	starting.Wait()
	byIndex := map[int]*peerProbe{}
	for i, err := range errs {
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _, _ = probes[i].Stop() })
		byIndex[peers[i].Index] = probes[i]
	}
	return byIndex
}

// mustAccelerateAll waits until a node's programs carry the probes of all peers.
func mustAccelerateAll(tb testing.TB, n *lab.Node, peers []*lab.Node) {
	tb.Helper()
	lab.T(tb).Eventually(10*time.Second, func() error { return allAccelerated(tb, n, peers) })
}

// allAccelerated looks for a moment whether a node's programs carry packets of all
// peers, in both directions.
func allAccelerated(tb testing.TB, n *lab.Node, peers []*lab.Node) error {
	tb.Helper()
	look := func() map[netip.Addr]dataplane.PathCounters {
		counts := map[netip.Addr]dataplane.PathCounters{}
		for _, p := range mustPeers(tb, n) {
			express, base := byPath(p, "express"), byPath(p, "base")
			counts[p.PublicIP] = dataplane.PathCounters{
				TxPackets: express.TxPackets + base.TxPackets, RxPackets: express.RxPackets + base.RxPackets,
			}
		}
		return counts
	}
	before := look()
	time.Sleep(200 * time.Millisecond)
	after := look()
	for _, peer := range peers {
		a, b := after[peer.IP], before[peer.IP]
		if a.TxPackets == b.TxPackets || a.RxPackets == b.RxPackets {
			return fmt.Errorf("%s takes neither express nor base with %s", n, peer)
		}
	}
	return nil
}
