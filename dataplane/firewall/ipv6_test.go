//go:build linux

package firewall

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// node6 is the IPv6 side that a lab's node is given: 2001:db8::11 on eth0,
// fd00:10:244:1::/64 for the pods of node 1, and flannel-v6.1.
type node6 struct {
	*lab.Node
	publicIP, vtep, gateway netip.Addr
	prefix                  netip.Prefix
}

func newNode6(n *lab.Node) node6 {
	prefix := netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", n.Index))
	return node6{
		Node:     n,
		publicIP: netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", 10+n.Index)),
		vtep:     prefix.Addr(),
		gateway:  prefix.Addr().Next(),
		prefix:   prefix,
	}
}

// pod is the address of a pod, counted from 1.
func (n node6) pod(i int) netip.Addr {
	addr := n.gateway
	for range i {
		addr = addr.Next()
	}
	return addr
}

// rules are the rules that the node should have.
func (n node6) rules(peers ...node6) Rules {
	r := Rules{Port: 8472, Prefixes: []netip.Prefix{n.prefix}, Devices: []string{"cni0", "flannel-v6.1"}}
	for _, p := range peers {
		r.Nodes = append(r.Nodes, p.publicIP, p.vtep, p.gateway)
	}
	return r
}

// newLab6 is a lab whose nodes and pods have IPv6 as flannel sets it up.
func newLab6(t *testing.T) (*lab.Lab, []node6) {
	t.Helper()
	lt := lab.T(t)
	l := lt.New(lab.Options{Nodes: 2, Pods: 2, Kinds: []lab.Kind{lab.Kernel}, Netfilter: true})
	nodes := []node6{newNode6(l.Node(1)), newNode6(l.Node(2))}
	for i, n := range nodes {
		peer := nodes[1-i]
		commands := []string{
			"ip -6 addr add " + n.publicIP.String() + "/64 dev eth0 nodad",
			"ip -6 addr add " + n.gateway.String() + "/64 dev cni0 nodad",
			fmt.Sprintf("ip link add flannel-v6.1 address %s mtu 1430 type vxlan id 1 local %s dev eth0 dstport 8472 nolearning udp6zerocsumrx", n.MAC, n.publicIP),
			"ip -6 addr add " + n.vtep.String() + "/128 dev flannel-v6.1 nodad",
			"ip link set flannel-v6.1 up",
			fmt.Sprintf("bridge fdb add %s dev flannel-v6.1 dst %s self permanent", peer.MAC, peer.publicIP),
			fmt.Sprintf("ip neigh add %s lladdr %s dev flannel-v6.1 nud permanent", peer.vtep, peer.MAC),
			fmt.Sprintf("ip route add %s via %s dev flannel-v6.1 onlink", peer.prefix, peer.vtep),
		}
		if err := n.Sysctl("net/ipv6/conf/all/forwarding", "1"); err != nil {
			t.Fatal(err)
		}
		for _, c := range commands {
			lt.Run(n, c)
		}
		for j, p := range n.Pods {
			lt.Run(p, fmt.Sprintf("ip -6 addr add %s/64 dev eth0 nodad", n.pod(j+1)))
			lt.Run(p, fmt.Sprintf("ip -6 route replace default via %s", n.gateway))
		}
	}
	for i, n := range nodes {
		lt.Eventually(10*time.Second, func() error {
			_, err := n.Pods[0].Output(t.Context(), fmt.Sprintf("ping -6 -c 1 -W 1 %s", nodes[1-i].pod(1)))
			return err
		})
	}
	return l, nodes
}

// linkLocal is the link-local address of a device of a node.
func linkLocal(t *testing.T, n node6, device string) netip.Addr {
	t.Helper()
	out := lab.T(t).Run(n, "ip -6 -o addr show dev "+device+" scope link")
	prefix, err := netip.ParsePrefix(strings.Fields(out)[3])
	if err != nil {
		t.Fatal(err)
	}
	return prefix.Addr()
}

func TestInjectionIsStoppedOverIPv6(t *testing.T) {
	l, nodes := newLab6(t)
	n1, n2 := nodes[0], nodes[1]
	victims := map[netip.Addr]*server{
		n1.pod(2): serve(t, l.Pod(1, 2), ":5300", nil),
		n2.pod(1): serve(t, l.Pod(2, 1), ":5300", nil),
	}
	attacker := l.Pod(1, 1)
	plain := func(to netip.Addr) func([]byte) error {
		return func(payload []byte) error { return send(attacker, 0, netip.AddrPortFrom(to, 8472), payload) }
	}
	// By number: Go remembers what it knows of names beyond a namespace.
	eth0, _, _ := strings.Cut(lab.T(t).Run(attacker, "ip -o link show eth0"), ":")
	// Options in an extension header, for which a pod needs CAP_NET_RAW.
	options := func(to netip.Addr) func([]byte) error {
		return func(payload []byte) error { return sendWithHeader6(attacker, to, payload) }
	}
	fw := open(t, n1)
	for _, a := range []struct {
		name    string
		node    node6
		victim  netip.Addr
		send    func([]byte) error
		padding int
	}{
		{name: "OwnNodesPublicIP", node: n1, victim: n1.pod(2), send: plain(n1.publicIP)},
		{name: "OwnNodesGateway", node: n1, victim: n1.pod(2), send: plain(n1.gateway)},
		{name: "OwnNodesOverlayAddress", node: n1, victim: n1.pod(2), send: plain(n1.vtep)},
		{name: "OwnNodesLinkLocalAddress", node: n1, victim: n1.pod(2), send: plain(linkLocal(t, n1, "cni0").WithZone(eth0))},
		{name: "AllNodesMulticast", node: n1, victim: n1.pod(2), send: plain(netip.MustParseAddr("ff02::1").WithZone(eth0))},
		{name: "PeersPublicIP", node: n2, victim: n2.pod(1), send: plain(n2.publicIP)},
		{name: "PeersGateway", node: n2, victim: n2.pod(1), send: plain(n2.gateway)},
		{name: "PeersOverlayAddress", node: n2, victim: n2.pod(1), send: plain(n2.vtep)},
		{name: "FragmentsToOwnNode", node: n1, victim: n1.pod(2), send: plain(n1.publicIP), padding: 3000},
		{name: "FragmentsToPeer", node: n2, victim: n2.pod(1), send: plain(n2.publicIP), padding: 3000},
		{name: "ExtensionHeaderToOwnNode", node: n1, victim: n1.pod(2), send: options(n1.publicIP)},
		{name: "ExtensionHeaderToPeer", node: n2, victim: n2.pod(1), send: options(n2.publicIP)},
	} {
		t.Run(a.name, func(t *testing.T) {
			arrived := func(within time.Duration) bool {
				text := newText()
				// What stands behind the inner packet is ignored. The packet itself
				// must be small: nobody fragments it on its way to the victim.
				payload := append(forge(t, a.node.MAC.HardwareAddr(), a.victim, text), make([]byte, a.padding)...)
				if err := a.send(payload); err != nil {
					t.Fatal(err)
				}
				return victims[a.victim].received(text, within)
			}
			if !arrived(arrives) {
				t.Fatal("the attack does not work even without the table, so it proves nothing")
			}
			mustSync(t, fw, n1.rules(n2))
			before := dropped(t, fw)
			if arrived(stays) {
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

// sendWithHeader6 sends with a destination options header that holds padding.
func sendWithHeader6(from place, to netip.Addr, payload []byte) error {
	return from.Do(func() error {
		conn, err := net.DialUDP("udp6", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 8472)))
		if err != nil {
			return err
		}
		defer conn.Close()
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		var optionErr error
		if err := raw.Control(func(fd uintptr) {
			optionErr = unix.SetsockoptString(int(fd), unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, "\x00\x00\x01\x04\x00\x00\x00\x00")
		}); err != nil {
			return err
		}
		if optionErr != nil {
			return optionErr
		}
		_, err = conn.Write(payload)
		return err
	})
}

// Unlike IPv4, the kernel accepts packets from pods that claim to come from an
// address of the node itself.
func TestAnswerToAForgedQuestionIsNoAnswerOverIPv6(t *testing.T) {
	l, nodes := newLab6(t)
	n1, n2 := nodes[0], nodes[1]
	for _, claimed := range []struct {
		name         string
		node         node6
		addr, victim netip.Addr
		victimPod    *lab.Pod
	}{
		{"OwnNode", n1, n1.publicIP, n1.pod(2), l.Pod(1, 2)},
		{"Peer", n2, n2.publicIP, n2.pod(1), l.Pod(2, 1)},
	} {
		t.Run(claimed.name, func(t *testing.T) {
			victim := serve(t, claimed.victimPod, ":5300", nil)
			fw := open(t, n1)
			// The attacker may use the claimed address like its own.
			lab.T(t).Run(l.Pod(1, 1), "ip -6 addr add "+claimed.addr.String()+"/128 dev eth0 nodad")
			lab.T(t).Run(l.Pod(1, 1), fmt.Sprintf("ip -6 route replace %s via %s", n1.pod(2), n1.gateway))
			forged := func() string {
				text := newText()
				payload := forge(t, claimed.node.MAC.HardwareAddr(), claimed.victim, text)
				accomplice := serve(t, l.Pod(1, 2), ":0", func(string) []byte { return payload })
				port := netip.MustParseAddrPort(accomplice.conn.LocalAddr().String()).Port()
				if err := l.Pod(1, 1).Do(func() error {
					conn, err := net.DialUDP("udp6",
						net.UDPAddrFromAddrPort(netip.AddrPortFrom(claimed.addr, 8472)),
						net.UDPAddrFromAddrPort(netip.AddrPortFrom(n1.pod(2), port)))
					if err != nil {
						return err
					}
					defer conn.Close()
					_, err = conn.Write([]byte("now"))
					return err
				}); err != nil {
					t.Fatal(err)
				}
				return text
			}
			if !victim.received(forged(), arrives) {
				t.Fatal("the attack does not work even without the table, so it proves nothing")
			}
			mustSync(t, fw, n1.rules(n2))
			if victim.received(forged(), stays) {
				t.Error("a forged packet was delivered")
			}
			if dropped(t, fw) != 1 {
				t.Error("the forged question was not counted")
			}
			if _, err := fw.Remove(); err != nil {
				t.Fatal(err)
			}
		})
	}
}
