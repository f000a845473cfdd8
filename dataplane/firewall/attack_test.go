//go:build linux

package firewall

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// The tests of this file run in a lab of stock flannel nodes (test/lab has the
// drawing). n1 gets the table, and n1/p1 is the attacker.

// attack is a way to have a forged packet delivered.
type attack struct {
	name string
	// node strips the packet and delivers it to victim.
	node   *lab.Node
	victim *lab.Pod
	send   func(payload []byte) error
	// size is that of the forged packet's text.
	size int
}

// attacks are those that start on n1, and one that comes to it.
func attacks(t *testing.T, l *lab.Lab) []attack {
	n1, n2 := l.Node(1), l.Node(2)
	attacker, neighbour, far := l.Pod(1, 1), l.Pod(1, 2), l.Pod(2, 1)
	unprivileged := func(to netip.Addr, options ...func(int) error) func([]byte) error {
		return func(payload []byte) error {
			return send(attacker, 0, netip.AddrPortFrom(to, 8472), payload, options...)
		}
	}
	through := func(service string) func([]byte) error {
		return func(payload []byte) error { return send(attacker, 0, netip.MustParseAddrPort(service), payload) }
	}
	raw := func(to netip.Addr, first int) func([]byte) error {
		return func(payload []byte) error {
			packet := udpPacket(t, netip.AddrPortFrom(attacker.IP, 4000), netip.AddrPortFrom(to, 8472), payload)
			return sendRaw(attacker, to, fragments(packet, first)...)
		}
	}
	return []attack{
		{name: "OwnNodesPublicIP", node: n1, victim: neighbour, send: unprivileged(n1.IP)},
		{name: "OwnNodesGateway", node: n1, victim: neighbour, send: unprivileged(n1.Gateway)},
		{name: "OwnNodesOverlayAddress", node: n1, victim: neighbour, send: unprivileged(n1.VTEP)},
		{name: "OwnNodesBroadcast", node: n1, victim: neighbour, send: unprivileged(broadcast(n1.Prefix), withBroadcast)},
		{name: "EverybodysBroadcast", node: n1, victim: neighbour, send: unprivileged(netip.MustParseAddr("255.255.255.255"), withBroadcast)},
		{name: "PeersPublicIP", node: n2, victim: far, send: unprivileged(n2.IP)},
		{name: "PeersGateway", node: n2, victim: far, send: unprivileged(n2.Gateway)},
		{name: "PeersOverlayAddress", node: n2, victim: far, send: unprivileged(n2.VTEP)},
		{name: "PeersBroadcast", node: n2, victim: far, send: unprivileged(broadcast(n2.Prefix), withBroadcast)},
		{name: "ServiceOfPeer", node: n2, victim: far, send: through("10.96.0.12:53")},
		{name: "ServiceOfOwnNode", node: n1, victim: neighbour, send: through("10.96.0.11:53")},
		{name: "IPOptionsToOwnNode", node: n1, victim: neighbour, send: unprivileged(n1.IP, withIPOptions)},
		{name: "IPOptionsToPeer", node: n2, victim: far, send: unprivileged(n2.IP, withIPOptions)},
		{name: "FragmentsToOwnNode", node: n1, victim: neighbour, send: unprivileged(n1.IP), size: 2000},
		{name: "FragmentsToPeer", node: n2, victim: far, send: unprivileged(n2.IP), size: 2000},
		{name: "FragmentsToServiceOfPeer", node: n2, victim: far, send: through("10.96.0.12:53"), size: 2000},
		{name: "NothingButTheUDPHeaderInTheFirstFragment", node: n2, victim: far, send: raw(n2.IP, 8)},
		{name: "TwoFragmentsToOwnNode", node: n1, victim: neighbour, send: raw(n1.IP, 16)},
		{
			name: "PodOfAnotherNodeOverTheOverlay", node: n1, victim: neighbour,
			send: func(payload []byte) error { return send(far, 0, netip.AddrPortFrom(n1.VTEP, 8472), payload) },
		},
		{
			name: "PodOfAnotherNodeToTheGateway", node: n1, victim: neighbour,
			send: func(payload []byte) error { return send(far, 0, netip.AddrPortFrom(n1.Gateway, 8472), payload) },
		},
	}
}

// newAttackLab is a lab with services that lead to nodes' VXLAN ports.
func newAttackLab(t *testing.T) *lab.Lab {
	t.Helper()
	l := lab.T(t).New(lab.Options{Nodes: 2, Pods: 2, Kinds: []lab.Kind{lab.Kernel}, Netfilter: true})
	for service, node := range map[string]*lab.Node{"10.96.0.11:53": l.Node(1), "10.96.0.12:53": l.Node(2)} {
		if err := l.Node(1).AddService(t.Context(), "udp", netip.MustParseAddrPort(service), netip.AddrPortFrom(node.IP, 8472)); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// arrived makes the attack and reports whether the victim got the packet.
func (a attack) arrived(t *testing.T, victims map[*lab.Pod]*server, wanted bool) bool {
	t.Helper()
	within := stays
	if wanted {
		within = arrives
	}
	text := strings.Repeat(".", a.size) + newText()
	if err := a.send(forge(t, a.node.MAC.HardwareAddr(), a.victim.IP, text)); err != nil {
		t.Fatal(err)
	}
	return victims[a.victim].received(text, within)
}

func TestInjectionIsStopped(t *testing.T) {
	l := newAttackLab(t)
	victims := map[*lab.Pod]*server{}
	for _, pod := range []*lab.Pod{l.Pod(1, 2), l.Pod(2, 1)} {
		victims[pod] = serve(t, pod, ":5300", nil)
	}
	fw := open(t, l.Node(1))
	for _, a := range attacks(t, l) {
		t.Run(a.name, func(t *testing.T) {
			if !a.arrived(t, victims, true) {
				t.Fatal("the attack does not work even without the table, so it proves nothing")
			}
			mustSync(t, fw, rulesOf(l.Node(1)))
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
			if !a.arrived(t, victims, true) {
				t.Error("it was not the table that stopped the attack")
			}
		})
	}
}
