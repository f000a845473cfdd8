//go:build linux

package datapath_test

import (
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// mangles are the ways in which a host changes the VXLAN packets it exchanges
// with one peer. A peer's packets still arrive after each of them, or fail to,
// as they do on a plain kernel node.
var mangles = []hostChange{
	iptablesRule("DSCP set in OUTPUT", "iptables-nft", "mangle", "OUTPUT -d {peer} -p udp --dport 8472 -j DSCP --set-dscp 34"),
	iptablesRule("DSCP set in POSTROUTING", "iptables-nft", "mangle", "POSTROUTING -d {peer} -p udp --dport 8472 -j DSCP --set-dscp 12"),
	nftRule("DSCP set by nft on the device's egress", "netdev", "egress device eth0 priority 0", "ip daddr {peer} udp dport 8472 ip dscp set af21"),
	iptablesRule("TTL set", "iptables-legacy", "mangle", "POSTROUTING -d {peer} -p udp --dport 8472 -j TTL --ttl-set 9"),
	nftRule("DF set", "inet", "postrouting priority 0", "ip daddr {peer} udp dport 8472 ip frag-off set 0x4000"),
	{
		name: "source address translated",
		do: []string{
			"nft add table ip guard{n}", "nft add chain ip guard{n} c { type nat hook postrouting priority 90 ; }", "nft add rule ip guard{n} c ip daddr {peer} udp dport 8472 snat to 192.0.2.250",
			"conntrack -F",
		}, // flows that are known already would go on as they are
	},
	{
		name:    "marked in OUTPUT and dropped by mark behind it",
		prepare: nftChain("inet", "postrouting priority 300"),
		do: []string{
			"iptables-nft -w -t mangle -A OUTPUT -d {peer} -p udp --dport 8472 -j MARK --set-mark 0x70{n}",
			"nft add rule inet guard{n} c meta mark 0x70{n} drop",
		},
	},
	{
		name:    "what comes in is marked, and dropped by mark when forwarded",
		prepare: nftChain("inet", "forward priority 0"),
		do: []string{
			"iptables-nft -w -t mangle -A PREROUTING -s {peer} -p udp --dport 8472 -j MARK --set-mark 0x70{n}",
			"nft add rule inet guard{n} c iifname flannel.1 meta mark 0x70{n} drop",
		},
	},
	{
		name:    "what comes in is marked, and only marked packets are forwarded",
		prepare: nftChain("inet", "forward priority 0"),
		do: []string{
			"iptables-nft -w -t mangle -A INPUT -s {peer} -p udp --dport 8472 -j MARK --set-mark 0x70{n}",
			"nft add rule inet guard{n} c iifname flannel.1 ip saddr 10.244.{n}.0/24 meta mark != 0x70{n} drop",
		},
	},
	{
		name: "what goes out is marked, and a tc program drops by mark",
		do: []string{
			dropByMark + "eth0 0x70{n}",
			"iptables-nft -w -t mangle -A OUTPUT -d {peer} -p udp --dport 8472 -j MARK --set-mark 0x70{n}",
		},
	},
	{
		name: "what goes out is given a class",
		do: []string{
			dropByPriority + "eth0 0x70{n}",
			"iptables-nft -w -t mangle -A POSTROUTING -d {peer} -p udp --dport 8472 -j CLASSIFY --set-class 0:70{n}",
		},
	},
}

// The host changes packets, and whoever sits behind goes by that: what is on
// the wire and who gets answers has to be the same as on a plain kernel node.
// The topology is that of TestHostRefusesVXLANOfOnePeer.
func TestHostChangesVXLANOfOnePeer(t *testing.T) {
	t.Parallel()
	outcomes := map[string][]string{}
	for _, node := range hostNodes {
		t.Run(node.name, func(t *testing.T) {
			outcomes[node.name] = mangled(t, node.kind, node.killed)
		})
	}
	plain := outcomes["plain kernel"]
	for i, c := range mangles {
		for _, node := range hostNodes[1:] {
			t.Run(node.name+"/"+c.name, func(t *testing.T) {
				if len(plain) == 0 || len(outcomes[node.name]) == 0 {
					t.Skip("no outcome to compare with")
				}
				if got := outcomes[node.name][i]; got != plain[i] {
					t.Errorf("a plain kernel node:\n%s\nthis node:\n%s", plain[i], got)
				} else {
					t.Log(got)
				}
			})
		}
	}
}

// mangled lets a host change packets and says in words what became of them,
// for each change.
func mangled(t *testing.T, kind lab.Kind, killed bool) []string {
	_, l := newLab(t, lab.Options{Nodes: 2 + len(mangles), Kinds: []lab.Kind{kind, lab.Bare}})
	n1, peers := l.Node(1), l.Nodes[1:]
	mustPrepare(t, n1, peers, mangles)
	probes := mustProbeAll(t, n1, peers)
	if kind == lab.Weft {
		mustAccelerateAll(t, n1, peers)
	}
	if killed {
		if err := n1.StopAgent(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	tap := mustTapWire(t, l, "n1")
	for i, c := range mangles {
		for _, line := range c.commands(c.do, peers[i]) {
			mustHostCommand(t, n1, line)
		}
	}
	time.Sleep(proofLife + slack)
	from := time.Now()
	time.Sleep(time.Second)
	until := time.Now()
	var outcomes []string
	results := mustStopAll(t, probes)
	for i := range mangles {
		answered := "answered"
		if _, silent := results[peers[i].Index].longSilence(time.Time{}, from, until); silent {
			answered = "not answered"
		}
		outcomes = append(outcomes, answered+"; on the wire: "+kinds(tap.between(peers[i].IP, from, until)))
	}
	if kind == lab.Weft {
		passed, _ := mustReason(t, n1, "host_mangles")
		if passed == 0 {
			t.Error("no packet is counted as mangled by the host")
		}
		// A plain kernel node, too, loses one packet of every twentieth such flow while
		// these rules are made.
		if spared := results[peers[len(peers)-1].Index].probe; spared.Lost > 1 {
			t.Errorf("the peer that nothing is done about: %s", spared)
			for _, question := range []string{"weft status", "conntrack -S", "nstat -as", "ip -s link show"} {
				answer, err := n1.Output(t.Context(), question)
				t.Logf("%s: %v\n%s", question, err, answer)
			}
		}
	}
	return outcomes
}
