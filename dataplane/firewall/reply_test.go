//go:build linux

package firewall

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// newFirewalledLab is a lab in which every node has the table.
func newFirewalledLab(t *testing.T) (*lab.Lab, map[*lab.Node]*Firewall) {
	t.Helper()
	l := newAttackLab(t)
	all := map[*lab.Node]*Firewall{}
	for _, n := range l.Nodes {
		all[n] = open(t, n)
		mustSync(t, all[n], rulesOf(n))
	}
	return l, all
}

// translate adds a rule to a node's address translation, before all others.
func translate(t *testing.T, n *lab.Node, hook, rule string) {
	t.Helper()
	priority := map[string]int{"prerouting": -110, "postrouting": 90}[hook]
	lab.T(t).Run(n, "nft", fmt.Sprintf(`
		add table ip extra
		add chain ip extra %[1]s { type nat hook %[1]s priority %[2]d; }
		add rule ip extra %[1]s %[3]s`, hook, priority, rule))
}

// wantAnswer wants a server to see a client as an address, and the answer to
// come to the client. The client's source port is VXLAN's.
func wantAnswer(t *testing.T, client, host place, at string, to netip.AddrPort, seenAs netip.Addr) {
	t.Helper()
	answer := newText()
	s := serve(t, host, at, func(string) []byte { return []byte(answer) })
	c := serve(t, client, ":8472", nil)
	question := newText()
	if _, err := c.conn.WriteToUDPAddrPort([]byte(question), to); err != nil {
		t.Fatal(err)
	}
	if !s.received(question, arrives) {
		t.Fatal("the question was not received")
	}
	if !s.received(seenAs.String()+" "+question, 0) {
		t.Errorf("the question did not come from %s: %v", seenAs, s.got)
	}
	if !c.received(answer, arrives) {
		t.Error("the answer was not received")
	}
}

// wantNothingDropped wants that no table of a lab has dropped anything.
func wantNothingDropped(t *testing.T, all map[*lab.Node]*Firewall) {
	t.Helper()
	for n, fw := range all {
		if d := dropped(t, fw); d != 0 {
			t.Errorf("%s has dropped %d packets", n, d)
		}
	}
}

func TestAnswersToSourcePort8472Pass(t *testing.T) {
	l, all := newFirewalledLab(t)
	n1, n2 := l.Node(1), l.Node(2)
	backend := l.Pod(1, 2)

	// Its node gives the client that port: to n1 it is n2's VXLAN port.
	t.Run("NodePortClientBehindMasquerade", func(t *testing.T) {
		translate(t, n2, "postrouting", fmt.Sprintf("udp dport 30053 snat to %s:8472", n2.IP))
		translate(t, n1, "prerouting", fmt.Sprintf("udp dport 30053 dnat to %s:5353", backend.IP))
		wantAnswer(t, l.Pod(2, 1), backend, ":5353", netip.AddrPortFrom(n1.IP, 30053), n2.IP)
	})
	// The same over the overlay: a NodePort of n2 with a backend on n1. Here a
	// packet of source port 8472 rightly has a node's address as its source.
	t.Run("NodePortWithABackendBehindTheOverlay", func(t *testing.T) {
		translate(t, n2, "prerouting", fmt.Sprintf("udp dport 30054 dnat to %s:5354", backend.IP))
		translate(t, n2, "postrouting", fmt.Sprintf("udp dport 5354 snat to %s:8472", n2.VTEP))
		wantAnswer(t, l.Pod(2, 1), backend, ":5354", netip.AddrPortFrom(n2.IP, 30054), n2.VTEP)
	})
	t.Run("PodBehindMasqueradeToAPeer", func(t *testing.T) {
		translate(t, n1, "postrouting", fmt.Sprintf("udp dport 5355 snat to %s:8472", n1.IP))
		wantAnswer(t, l.Pod(1, 1), n2, ":5355", netip.AddrPortFrom(n2.IP, 5355), n1.IP)
	})
	t.Run("PodToItsOwnNode", func(t *testing.T) {
		wantAnswer(t, l.Pod(1, 1), n1, ":5356", netip.AddrPortFrom(n1.Gateway, 5356), l.Pod(1, 1).IP)
	})
	wantNothingDropped(t, all)
}

func TestPodsAmongEachOtherMayUsePort8472(t *testing.T) {
	l, all := newFirewalledLab(t)
	for _, host := range []*lab.Pod{l.Pod(1, 2), l.Pod(2, 1)} {
		t.Run(host.String(), func(t *testing.T) {
			wantAnswer(t, l.Pod(1, 1), host, ":8472", netip.AddrPortFrom(host.IP, 8472), l.Pod(1, 1).IP)
		})
	}
	wantNothingDropped(t, all)
}

func TestNodesReachEachOthersPods(t *testing.T) {
	l, all := newFirewalledLab(t)
	for _, to := range []*lab.Pod{l.Pod(1, 1), l.Pod(2, 1)} {
		for _, from := range []lab.Runner{l.Node(1), l.Pod(1, 2)} {
			lab.T(t).Run(from, "ping -c 1 -W 2 "+to.IP.String())
		}
	}
	wantNothingDropped(t, all)
}

// A pod that may write any source begins a connection in the name of a peer's
// VXLAN port, and another answers it: for conntrack that is a reply.
func TestAnswerToAForgedQuestionIsNoAnswer(t *testing.T) {
	l := newAttackLab(t)
	n1, n2 := l.Node(1), l.Node(2)
	victim := serve(t, l.Pod(2, 1), ":5300", nil)
	fw := open(t, n1)
	forged := func() string {
		text := newText()
		payload := forge(t, n2.MAC.HardwareAddr(), l.Pod(2, 1).IP, text)
		accomplice := serve(t, l.Pod(1, 2), ":0", func(string) []byte { return payload })
		port := netip.MustParseAddrPort(accomplice.conn.LocalAddr().String()).Port()
		question := udpPacket(t, netip.AddrPortFrom(n2.IP, 8472), netip.AddrPortFrom(l.Pod(1, 2).IP, port), []byte("now"))
		// Through the gateway: what the bridge passes on by itself makes no
		// connection.
		lab.T(t).Run(l.Pod(1, 1), fmt.Sprintf("ip route replace %s via %s", l.Pod(1, 2).IP, n1.Gateway))
		if err := sendRaw(l.Pod(1, 1), l.Pod(1, 2).IP, question); err != nil {
			t.Fatal(err)
		}
		return text
	}
	if !victim.received(forged(), arrives) {
		t.Fatal("the attack does not work even without the table, so it proves nothing")
	}
	mustSync(t, fw, rulesOf(n1))
	if victim.received(forged(), stays) {
		t.Error("a forged packet was delivered")
	}
	if dropped(t, fw) != 1 {
		t.Error("the forged question was not counted")
	}
}

// Without a connection there is no direction, and without reassembly only the
// first fragment has a port.
func TestUntrackedPacketsAreDroppedToo(t *testing.T) {
	l := newAttackLab(t)
	n1, n2 := l.Node(1), l.Node(2)
	victims := map[*lab.Pod]*server{l.Pod(2, 1): serve(t, l.Pod(2, 1), ":5300", nil)}
	lab.T(t).Run(n1, "nft", `
		add table ip untracked
		add chain ip untracked prerouting { type filter hook prerouting priority -450; }
		add rule ip untracked prerouting ip protocol udp notrack`)
	fw := open(t, n1)
	for _, a := range attacks(t, l) {
		if a.node != n2 || strings.Contains(a.name, "Service") {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			if !a.arrived(t, victims, true) {
				t.Fatal("the attack does not work even without the table, so it proves nothing")
			}
			mustSync(t, fw, rulesOf(n1))
			before := dropped(t, fw)
			if a.arrived(t, victims, false) {
				t.Error("a forged packet was delivered")
			}
			if n := dropped(t, fw) - before; n != 1 {
				t.Errorf("%d packets were counted as dropped, want 1", n)
			}
			if _, err := fw.Remove(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Nothing but our table asks for connections, and so for defragmentation.
func TestTableBringsItsOwnDefragmentation(t *testing.T) {
	l := lab.T(t).New(lab.Options{Nodes: 2, Pods: 1, Kinds: []lab.Kind{lab.Kernel}})
	n1, n2 := l.Node(1), l.Node(2)
	victim := serve(t, l.Pod(2, 1), ":5300", nil)
	fw := open(t, n1)
	fragmented := func() string {
		text := strings.Repeat(".", 4000) + newText()
		payload := forge(t, n2.MAC.HardwareAddr(), l.Pod(2, 1).IP, text)
		if err := send(l.Pod(1, 1), 0, netip.AddrPortFrom(n2.IP, 8472), payload); err != nil {
			t.Fatal(err)
		}
		return text
	}
	if !victim.received(fragmented(), arrives) {
		t.Fatal("the attack does not work even without the table, so it proves nothing")
	}
	mustSync(t, fw, rulesOf(n1))
	if victim.received(fragmented(), stays) {
		t.Error("a forged packet was delivered")
	}
	packets, bytes, err := fw.Dropped()
	if packets != 1 || bytes < 4000 {
		t.Errorf("dropped %d packets of %d bytes (%v), want the whole of one", packets, bytes, err)
	}
}
