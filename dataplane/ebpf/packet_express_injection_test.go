//go:build linux

package ebpf

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// injection is what a pod of ours sends to a node's VXLAN port: a packet that the
// node's kernel would take for a peer's.
func injection(to string, with ...func(*layers.IPv4)) *packet {
	return eth(podMAC, gatewayMAC).ip(ourPod, to, with...).udp(40000, 8472).vxlan(1).around(fromBlue(100))
}

func injectionCases() []packetCase {
	var cases []packetCase
	add := func(c packetCase) {
		c.program, c.verdict, c.reason = podIn, dropped, weftReasonREASON_POD_VXLAN_INJECTION
		if c.packet == nil {
			c.packet = injection(blueIP)
		}
		cases = append(cases, c)
	}
	for _, to := range []struct{ name, address string }{
		{"our public IP", ourIP},
		{"another address of the node", "198.51.100.11"},
		{"our overlay device's address", "10.244.1.0"},
		{"our bridge's address", "10.244.1.1"},
		{"a peer's public IP", blueIP},
		{"a peer's overlay device's address", "10.244.2.0"},
		{"a peer's bridge's address", "10.244.2.1"},
		{"the bridge of a peer's second prefix", "10.244.20.1"},
		{"another peer's public IP", greenIP},
		{"all of a peer's pods", "10.244.2.255"},
	} {
		add(packetCase{name: to.name, packet: injection(to.address)})
		add(packetCase{name: to.name + ", with IP options", packet: injection(to.address, recordRoute)})
		add(packetCase{name: to.name + ", a first fragment", packet: injection(to.address, firstFragment)})
	}
	add(packetCase{name: "from an address that is not the pod's", packet: eth(podMAC, gatewayMAC).ip(blueIP, ourIP).udp(40000, 8472).vxlan(1).around(fromBlue(100))})
	add(packetCase{name: "from a MAC that is not the pod's", broken: []mutation{set(6, 2)}})
	add(packetCase{name: "to the bridge's neighbours", broken: []mutation{set(0, mustMAC(otherPodMAC)...)}})
	// So that what goes back would be an answer.
	add(packetCase{name: "a question in a peer's name", packet: eth(podMAC, gatewayMAC).ip(blueIP, ourPod).udp(8472, 40000).payload(100)})
	add(packetCase{name: "a question in our bridge's name", packet: eth(podMAC, gatewayMAC).ip("10.244.1.1", otherPod).udp(8472, 53).payload(100)})
	add(packetCase{name: "from the VXLAN port as well", packet: eth(podMAC, gatewayMAC).ip(ourPod, blueIP).udp(8472, 8472).vxlan(1).around(fromBlue(100))})
	add(packetCase{name: "with a wrong header checksum", broken: []mutation{set(atIP+10, 0xde, 0xad)}})
	add(packetCase{name: "with a TTL of 1", packet: injection(blueIP, ttl(1))})
	add(packetCase{name: "nothing behind the UDP header", packet: eth(podMAC, gatewayMAC).ip(ourPod, blueIP).udp(40000, 8472)})
	add(packetCase{name: "only half a UDP header", packet: eth(podMAC, gatewayMAC).ip(ourPod, blueIP).protocol(17).raw([]byte{0x9c, 0x40, 0x21, 0x18})})
	add(packetCase{name: "an aggregate", packet: injection(blueIP), skb: aggregate(2, 80)})
	for name, given := range map[string]func(*node){
		"all acceleration is switched off":  inForce(func(f *weftInForce) { f.Off = 3 }),
		"the agent holds acceleration back": inForce(func(f *weftInForce) { f.Held = 1 }),
		"the agent is dead":                 beat(func(p *weftPulse) { p.Beat = ago(3600 * 1e9) }),
		"the agent has stopped":             beat(func(p *weftPulse) { p.Beat = 0 }),
		"the source check is off":           sourceChecked(weftSourceCheckSOURCE_CHECK_OFF),
		"a flow that conntrack knows": func(n *node) {
			n.begin(flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40000", to: blueIP + ":8472"})
		},
		"a flow that conntrack knows, without an answer": func(n *node) {
			n.show(flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40000", to: blueIP + ":8472"}, nil)
		},
		"an answer to somebody else": func(n *node) {
			n.begin(flow{protocol: unix.IPPROTO_UDP, from: blueIP + ":8472", to: otherPod + ":40000"})
		},
		"an answer to another port": func(n *node) {
			n.begin(flow{protocol: unix.IPPROTO_UDP, from: blueIP + ":8472", to: ourPod + ":40001"})
		},
	} {
		add(packetCase{name: name, given: given})
	}
	// Where the port is in a fragment that need not be of the answer's packet.
	add(packetCase{
		name: "a first fragment of an answer", packet: injection(blueIP, firstFragment),
		given: func(n *node) {
			n.begin(flow{protocol: unix.IPPROTO_UDP, from: blueIP + ":8472", to: ourPod + ":40000"})
		},
	})
	return cases
}

func TestInjectionIsDropped(t *testing.T) {
	n := newPodNode(t)
	runCases(t, n, injectionCases())
}

// Without express the programs can't ask conntrack, and drop all the same.
func TestInjectionIsDroppedWithoutExpress(t *testing.T) {
	n := newPodNode(t)
	n.reset()
	prog := n.twinWith(podIn, false, nil)
	in := injection(blueIP).bytes(t)
	packetCase{verdict: dropped, reason: weftReasonREASON_POD_VXLAN_INJECTION}.check(t, in, n.runProgram(prog, podIn, in, 0))
	in = fromPod(ourUDP, 100).bytes(t)
	packetCase{verdict: passed}.check(t, in, n.runProgram(prog, podIn, in, 0))
}

func TestWhatIsNoInjection(t *testing.T) {
	answer := func(f flow) func(*node) { return func(n *node) { n.tracked(f) } }
	from := func(src, dst netip.AddrPort) *packet {
		return eth(podMAC, gatewayMAC).ip(src.Addr().String(), dst.Addr().String()).udp(src.Port(), dst.Port()).payload(100)
	}
	ap := netip.MustParseAddrPort
	n := newPodNode(t)
	var cases []packetCase
	add := func(name string, p *packet, given func(*node), broken ...mutation) {
		cases = append(cases, packetCase{name: name, program: podIn, packet: p, given: given, broken: broken, verdict: passed})
	}
	add("a later fragment", injection(blueIP, laterFragment), nil)
	add("another port", injection(blueIP), nil, set(atUDP+2, 0x21, 0x19))
	add("the port's bytes the wrong way round", injection(blueIP), nil, set(atUDP+2, 0x18, 0x21))
	add("from the VXLAN port", from(ap(ourPod+":8472"), ap(blueIP+":53")), nil)
	add("TCP", eth(podMAC, gatewayMAC).ip(ourPod, blueIP).tcp(40000, 8472).payload(100), nil)
	add("options that look like the port", eth(podMAC, gatewayMAC).ip(ourPod, blueIP, recordRoute).udp(40000, 53).payload(100), nil,
		set(atIP+22, 0x21, 0x18))
	add("to a pod of a peer's", injection(bluePod), nil)
	add("to another pod of ours", injection(otherPod), nil)
	add("to a stranger", injection(strangerIP), nil)
	add("to a service, which the firewall sees behind NAT", injection(serviceIP), nil)
	add("a UDP header that is cut before the port", eth(podMAC, gatewayMAC).ip(ourPod, blueIP).protocol(17).raw([]byte{0x9c, 0x40, 0x21}), nil)
	add("an IPv6 packet", eth(podMAC, gatewayMAC).of(layers.EthernetTypeIPv6).payload(100), nil)
	add("an ARP request", eth(podMAC, "ff:ff:ff:ff:ff:ff").of(layers.EthernetTypeARP).payload(28), nil)
	add("an answer to a peer whose port 8472 is its own affair", from(ap(ourPod+":80"), ap(blueIP+":8472")),
		answer(flow{protocol: unix.IPPROTO_UDP, from: blueIP + ":8472", to: ourPod + ":80"}))
	add("an answer, with IP options", eth(podMAC, gatewayMAC).ip(ourPod, blueIP, recordRoute).udp(80, 8472).payload(100),
		answer(flow{protocol: unix.IPPROTO_UDP, from: blueIP + ":8472", to: ourPod + ":80"}))
	add("an answer to who came by a service", from(ap(ourPod+":5353"), ap(blueIP+":8472")),
		answer(flow{protocol: unix.IPPROTO_UDP, from: blueIP + ":8472", to: ourIP + ":30053", asTo: ourPod + ":5353"}))
	add("an answer to who was masqueraded", from(ap(ourPod+":53"), ap("10.244.1.1:8472")),
		answer(flow{protocol: unix.IPPROTO_UDP, from: strangerIP + ":5000", to: ourPod + ":53", asFrom: "10.244.1.1:8472"}))
	add("an answer, to the first packet", from(ap(ourPod+":80"), ap(blueIP+":8472")),
		func(n *node) {
			n.show(flow{protocol: unix.IPPROTO_UDP, from: blueIP + ":8472", to: ourPod + ":80"}, nil)
		})
	runCases(t, n, cases)
}

// The port is the network's own.
func TestInjectionAtAnotherPort(t *testing.T) {
	n := newNode(t)
	n.accel.opts.Port, n.accel.opts.PinDir = 4789, n.accel.opts.PinDir+"2"
	n.MustDo(t, func() (err error) {
		opts, attach := n.accel.opts, n.accel.attach
		n.accel.Close()
		if n.accel, err = Open(opts); err == nil {
			n.accel.attach = attach
		}
		return err
	})
	n.withPods()
	n.reset()
	in := injection(blueIP).bytes(t)
	packetCase{verdict: passed}.check(t, in, n.run(podIn, in))
	in = set(atUDP+2, 4789>>8, 4789&0xff)(bytes.Clone(in))
	packetCase{verdict: dropped, reason: weftReasonREASON_POD_VXLAN_INJECTION}.check(t, in, n.run(podIn, in))
}
