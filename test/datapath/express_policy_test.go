//go:build linux

package datapath_test

import (
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// What a node denies stays denied, and what it denies from now on is denied to
// flows that take express already.
func TestExpressObeysWhatTheHostForbids(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"one direction is denied", oneDirectionDenied},
		{"a running flow is denied", runningFlowDenied},
		{"established flows are allowed until conntrack is flushed", flushedFlowDenied},
		{"members of sets come and go", membersDenied},
		{"agent is killed", deniedWithoutAgent},
	})
}

// cutWithin is how long after a change packets may still get through: the agent
// has 100 ms, the rest is for a machine that has other things to do.
const cutWithin = 250 * time.Millisecond

// denied is a flow of which something is denied from its beginning, by a rule of
// a node in FORWARD.
type denied struct {
	name                string
	node                int
	rule                string // {c} and {s} are client and server, {p} the server's port
	requests, responses bool   // what gets through
}

var deniedFlows = []denied{
	{"requests by the client's node", 1, "ip saddr {c} ip daddr {s} udp dport {p} drop", false, false},
	{"requests by the server's node", 2, "ip saddr {c} ip daddr {s} udp dport {p} drop", false, false},
	{"responses by the client's node", 1, "ip saddr {s} ip daddr {c} udp sport {p} drop", true, false},
	{"responses by the server's node", 2, "ip saddr {s} ip daddr {c} udp sport {p} drop", true, false},
	{"nothing", 1, "ip saddr {s} ip daddr {c} udp sport {p} accept", true, true},
}

// Conntrack calls a flow answered before FORWARD has judged the answer. All the
// flows run at once, until conntrack would call them assured.
func oneDirectionDenied(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	for _, n := range w.Nodes {
		mustRule(t, n, forwardTable)
	}
	type flow struct {
		denied
		conn                net.Conn
		requests, responses atomic.Int64
	}
	flows := make([]*flow, len(deniedFlows))
	for i, d := range deniedFlows {
		f := &flow{denied: d}
		flows[i] = f
		listener := mustListenUDP(t, server)
		port := listener.LocalAddr().(*net.UDPAddr).Port
		mustNft(t, w.Node(d.node), "add rule ip scenario forward "+strings.NewReplacer(
			"{c}", client.ip.String(), "{s}", server.ip.String(), "{p}", fmt.Sprint(port)).Replace(d.rule))
		f.conn = mustDialUDP(t, client, at(server, uint16(port)))
		go countPackets(listener, &f.requests, true)
		go countPackets(f.conn.(*net.UDPConn), &f.responses, false)
	}
	lasts := 300 * time.Millisecond
	if w.express {
		lasts += assuredAfter
	}
	for end := time.Now().Add(lasts); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		for _, f := range flows {
			f.conn.Write([]byte("may I?"))
		}
	}
	time.Sleep(20 * time.Millisecond)
	for _, f := range flows {
		if got := f.requests.Load() > 0; got != f.denied.requests {
			t.Errorf("denied are %s: %d requests got through", f.name, f.requests.Load())
		}
		if got := f.responses.Load() > 0; got != f.denied.responses {
			t.Errorf("denied are %s: %d responses got through", f.name, f.responses.Load())
		}
	}
}

// forwardTable has a place for rules.
const forwardTable = "add table ip scenario; add chain ip scenario forward { type filter hook forward priority filter; }"

// countPackets counts what comes to a socket, and sends it back if it shall.
func countPackets(conn *net.UDPConn, count *atomic.Int64, answer bool) {
	buffer := make([]byte, 1<<11)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return
		}
		count.Add(1)
		if answer {
			conn.WriteToUDPAddrPort(buffer[:n], from)
		}
	}
}

// cut is something that ends a flow, on a node, and what takes it back: {c} and
// {s} are client and server, {cn} and {sn} their nodes' prefixes.
type cut struct {
	name     string
	node     int
	do, undo []string
}

// nftCut is a rule in a chain of its own.
func nftCut(name string, node int, family, hook, rule string) cut {
	return cut{
		name: name, node: node,
		do: []string{fmt.Sprintf("nft add table %[1]s cut; add chain %[1]s cut c { type filter hook %[2]s priority 0; }; add rule %[1]s cut c %[3]s",
			family, hook, rule)},
		undo: []string{"nft delete table " + family + " cut"},
	}
}

func iptablesCut(program, table, rule string, node int) cut {
	return cut{
		name: program + " " + table, node: node,
		do:   []string{program + " -w -t " + table + " -I " + rule},
		undo: []string{program + " -w -t " + table + " -D " + rule},
	}
}

func commandCut(name string, node int, do, undo string) cut {
	return cut{name: name, node: node, do: []string{do}, undo: []string{undo}}
}

// The client is n1's pod, the server n2's.
var cuts = []cut{
	nftCut("nft: requests, client's node", 1, "inet", "forward", "ip saddr {c} ip daddr {s} drop"),
	nftCut("nft: responses, client's node", 1, "inet", "forward", "ip saddr {s} ip daddr {c} drop"),
	nftCut("nft: requests, server's node", 2, "inet", "forward", "ip saddr {c} ip daddr {s} drop"),
	nftCut("nft: responses, server's node", 2, "inet", "forward", "ip saddr {s} ip daddr {c} drop"),
	nftCut("nft: mangle, prerouting", 1, "ip", "prerouting", "ip saddr {c} drop"),
	nftCut("nft: postrouting", 2, "ip", "postrouting", "ip daddr {s} drop"),
	nftCut("nft: ingress of the pod's veth", 1, "netdev", "ingress device veth1", "ip saddr {c} drop"),
	nftCut("nft: egress of the pod's veth", 2, "netdev", "egress device veth1", "ip daddr {s} drop"),
	nftCut("nft: ingress of the overlay device", 2, "netdev", "ingress device flannel.1", "ip daddr {s} drop"),
	nftCut("nft: egress of the overlay device", 1, "netdev", "egress device flannel.1", "ip daddr {s} drop"),
	nftCut("nft: bridge", 1, "bridge", "prerouting", "ip saddr {c} drop"),
	nftCut("nft: bridge, to the pod", 2, "bridge", "output", "ip daddr {s} drop"),
	iptablesCut("iptables-nft", "filter", "FORWARD -s {c} -d {s} -j DROP", 1),
	iptablesCut("iptables-nft", "filter", "FORWARD -s {s} -d {c} -j DROP", 2),
	iptablesCut("iptables-nft", "raw", "PREROUTING -s {c} -j DROP", 2),
	iptablesCut("iptables-legacy", "filter", "FORWARD -s {c} -d {s} -j DROP", 1),
	iptablesCut("iptables-legacy", "mangle", "POSTROUTING -s {c} -d {s} -j DROP", 2),
	commandCut("forwarding is switched off", 1, "sysctl -qw net.ipv4.ip_forward=0", "sysctl -qw net.ipv4.ip_forward=1"),
	commandCut("forwarding from the overlay device is switched off", 2,
		"sysctl -qw net.ipv4.conf.flannel/1.forwarding=0", "sysctl -qw net.ipv4.conf.flannel/1.forwarding=1"),
	commandCut("blackhole route to the server", 1, "ip route add blackhole {s}", "ip route delete blackhole {s}"),
	commandCut("blackhole route to the server, its node", 2, "ip route add blackhole {s}", "ip route delete blackhole {s}"),
	commandCut("blackhole route to the client", 2, "ip route add blackhole {c}", "ip route delete blackhole {c}"),
	commandCut("rule by source", 1, "ip rule add from {c} blackhole", "ip rule delete from {c} blackhole"),
	commandCut("rule by interface", 2, "ip rule add iif flannel.1 to {s} blackhole", "ip rule delete iif flannel.1 to {s} blackhole"),
	commandCut("IPsec policy, forwarded", 1, "ip xfrm policy add src {c} dst {s} dir fwd action block", "ip xfrm policy delete src {c} dst {s} dir fwd"),
	commandCut("IPsec policy, out", 1, "ip xfrm policy add src {c} dst {s} dir out action block", "ip xfrm policy delete src {c} dst {s} dir out"),
	commandCut("IPsec policy that wants ESP, server's node", 2,
		"ip xfrm policy add src {c} dst {s} dir fwd tmpl proto esp mode transport", "ip xfrm policy delete src {c} dst {s} dir fwd"),
	commandCut("port of the bridge is disabled", 1, "bridge link set dev veth1 state 0", "bridge link set dev veth1 state 3"),
	commandCut("bridge is down", 1, "ip link set cni0 down", "ip link set cni0 up"),
}

// command runs a line of a cut, nft's as one argument.
func (c cut) command(t lab.Test, n *lab.Node, line string, client, server place) {
	t.Helper()
	line = strings.NewReplacer("{c}", client.ip.String(), "{s}", server.ip.String()).Replace(line)
	if rules, isNft := strings.CutPrefix(line, "nft "); isNft {
		mustNft(t, n, rules)
		return
	}
	t.Run(n, line)
}

// A UDP flow takes express. From shortly after each change on nothing may come
// through, in either direction counted by the answers; when it is taken back, all
// is as before.
func runningFlowDenied(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	s := mustConnectUDP(t, w, client, at(server, mustEchoUDP(t, server))).stream()
	defer s.cancel()
	for _, c := range cuts {
		t.TB.(*testing.T).Run(c.name, func(tt *testing.T) {
			t := lab.T(tt)
			n := w.Node(c.node)
			t.Cleanup(func() { s.mustLive(t, 3*time.Second) })
			w.mustComeToTake(t, everyEnd, func() { time.Sleep(60 * time.Millisecond) })
			began := time.Now()
			for _, line := range c.do {
				c.command(t, n, line, client, server)
			}
			done := time.Now()
			if time.Sleep(50 * time.Millisecond); w.express {
				time.Sleep(cutWithin)
			}
			last := s.lastAnswer()
			for _, line := range c.undo {
				c.command(t, n, line, client, server)
			}
			t.Logf("the last packet got through %s after the command began, %s after it ended",
				last.Sub(began).Round(time.Millisecond), last.Sub(done).Round(time.Millisecond))
			if last.After(done.Add(cutWithin)) {
				t.Errorf("packets got through %s after the change", last.Sub(done))
			}
		})
	}
}

// Policies most often let established flows go on; who wants to end them deletes
// conntrack's entries.
func flushedFlowDenied(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	udp := mustConnectUDP(t, w, client, at(server, mustEchoUDP(t, server))).stream()
	defer udp.cancel()
	tcp := mustConnect(t, client, l, at(server, port)).stream()
	defer tcp.cancel()
	for _, n := range w.Nodes {
		mustRule(t, n, fmt.Sprintf(forwardTable+`; add rule ip scenario forward ct state established,related accept
			add rule ip scenario forward ip saddr %s ip daddr %s drop
			add rule ip scenario forward ip saddr %s ip daddr %s drop`, client.ip, server.ip, server.ip, client.ip))
	}
	time.Sleep(300 * time.Millisecond)
	udp.mustLive(t, time.Second)
	tcp.mustLive(t, time.Second)
	w.mustTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	for _, n := range w.Nodes {
		t.Run(n, fmt.Sprintf("conntrack -D -s %s -d %s", client.ip, server.ip))
	}
	done := time.Now()
	time.Sleep(200 * time.Millisecond)
	for name, s := range map[string]*stream{"UDP": udp, "TCP": tcp} {
		last := s.lastAnswer()
		t.Logf("%s: the last packet got through %s after conntrack was flushed", name, last.Sub(done).Round(time.Millisecond))
		if last.After(done.Add(50 * time.Millisecond)) {
			t.Errorf("%s: a packet got through %s after conntrack was flushed", name, last.Sub(done))
		}
	}
}

// witnessLife is WITNESS_LIFE of bpf/constants.h.
const witnessLife = 4 * time.Second

// The kernel tells nobody of an ipset's members, nor of what time takes out of a
// set: such changes are obeyed when the witness is too old.
func membersDenied(t lab.Test, w world) {
	n := w.Node(1)
	clients := []place{w.pod(1, 1), w.pod(1, 2)}
	allowed := time.Second
	if w.express {
		allowed = 4 * time.Second // until both flows have come to take it
	}
	mustHostCommand(t, n, "ipset create denied")
	const rule = " FORWARD -m set --match-set denied src -j DROP"
	t.Run(n, "iptables-nft -w -I"+rule)
	atEnd(t, n, "iptables-nft -w -D"+rule)
	// (On the other node: such an element's end is told as an event.)
	mustRule(t, w.Node(2), fmt.Sprintf(forwardTable+`; add set ip scenario allowed { type ipv4_addr; flags timeout; }
		add element ip scenario allowed { %[1]s timeout %[2]ds }
		add rule ip scenario forward ip saddr %[1]s ip saddr != @allowed drop`, clients[1].ip, allowed/time.Second))
	expires := time.Now().Add(allowed)
	flows := make([]*talk, len(clients))
	for i, client := range clients {
		server := w.pod(2, 1+i)
		flows[i] = &talk{Conn: mustDialUDP(t, client, at(server, mustEchoUDP(t, server)))}
	}
	mustAssure(t, w, flows...)
	var streams []*stream
	for _, c := range flows {
		s := c.stream()
		defer s.cancel()
		streams = append(streams, s)
	}
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	mustHostCommand(t, n, fmt.Sprintf("ipset add denied %s", clients[0].ip))
	added := time.Now()
	limit := cutWithin
	if w.express {
		limit += witnessLife
	}
	time.Sleep(time.Until(expires) + limit)
	for i, s := range streams {
		since := []time.Time{added, expires}[i]
		last := s.lastAnswer()
		what := []string{"ipset's new member", "nft set's member that ended"}[i]
		t.Logf("%s: the last packet got through after %s", what, last.Sub(since).Round(time.Millisecond))
		if last.After(since.Add(limit)) {
			t.Errorf("%s: a packet got through after %s", what, last.Sub(since))
		}
	}
	mustHostCommand(t, n, fmt.Sprintf("ipset del denied %s", clients[0].ip))
	streams[0].mustLive(t, time.Second)
}

// pulseLife is PULSE_LIFE of bpf/constants.h.
const pulseLife = 3 * time.Second

// A rule that comes right after the agent was killed is obeyed when its last sign
// of life is too old; the base path carries what is allowed.
func deniedWithoutAgent(t lab.Test, w world) {
	n := w.Node(1)
	var streams []*stream
	for i := range 2 {
		client, server := w.pod(1, 1+i), w.pod(2, 1+i)
		l, port := mustListenTCP(t, server)
		s := mustConnect(t, client, l, at(server, port)).stream()
		defer s.cancel()
		streams = append(streams, s)
	}
	w.mustTake(t, everyEnd, func() { time.Sleep(200 * time.Millisecond) })
	limit := cutWithin
	if w.express {
		limit += pulseLife
		if err := n.StopAgent(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	mustRule(t, n, fmt.Sprintf(forwardTable+"; add rule ip scenario forward ip saddr %s drop", w.pod(1, 1).ip))
	denied := time.Now()
	time.Sleep(limit + 100*time.Millisecond)
	last := streams[0].lastAnswer()
	t.Logf("the last packet got through %s after the rule came", last.Sub(denied).Round(time.Millisecond))
	if last.After(denied.Add(limit)) {
		t.Errorf("a packet got through %s after the rule came", last.Sub(denied))
	}
	streams[1].mustLive(t, time.Second)
	if !w.express {
		return
	}
	before := w.ledger(t)
	time.Sleep(200 * time.Millisecond)
	now := w.ledger(t).sub(before)
	if tx, rx := now["n1 tx"], now["n1 rx"]; tx.base < 50 || rx.base < 50 || tx.express+rx.express > 0 {
		t.Errorf("without its agent n1 carried %s", now)
	}
	mustStart(t, n, weft)
	t.Eventually(10*time.Second, func() error { return expressReady(t, w.Lab) })
	w.mustTake(t, everyEnd, func() { time.Sleep(300 * time.Millisecond) })
}
