//go:build linux

package ebpf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// outerOf reads what the tests ask of a VXLAN packet.
type outerOf []byte

func (o outerOf) sourcePort() uint16 { return binary.BigEndian.Uint16(o[atUDP:]) }
func (o outerOf) id() uint16         { return binary.BigEndian.Uint16(o[atIP+4:]) }
func (o outerOf) tos() uint8         { return o[atIP+1] }

// mustBeEncapsulated checks a packet of overlay_out byte for byte: behind the
// Ethernet header, which the redirect writes, come the headers that a stock
// peer expects, then the inner frame as it was.
func mustBeEncapsulated(t *testing.T, in, out []byte, to string, outerTOS uint8) {
	t.Helper()
	if len(out) != len(in)+50 {
		t.Fatalf("%d bytes became %d, want %d", len(in), len(out), len(in)+50)
	}
	want := eth(net.HardwareAddr(in[6:12]).String(), net.HardwareAddr(in[:6]).String()).
		ip(ourIP, to, tos(outerTOS), id(outerOf(out).id())).
		udpWithoutChecksum(outerOf(out).sourcePort(), 8472).
		vxlan(1).raw(in).bytes(t)
	if !bytes.Equal(out, want) {
		t.Errorf("encapsulated as\n     %x\nwant %x", out, want)
	}
	if port := outerOf(out).sourcePort(); port < 32768 || port > 60999 {
		t.Errorf("source port %d is outside ip_local_port_range", port)
	}
}

func TestPodPacketsAreEncapsulated(t *testing.T) {
	n := newNode(t)
	for name, c := range map[string]struct {
		packet *packet
		to     string
	}{
		"UDP":                              {toBlue(100), blueIP},
		"a packet without payload":         {toBlue(0), blueIP},
		"to the second prefix of a peer":   {eth(ourMAC, blueMAC).ip(ourPod, "10.244.20.1").udp(1, 2).payload(9), blueIP},
		"to another peer":                  {eth(ourMAC, greenMAC).ip(ourPod, greenPod).udp(40000, 53).payload(100), greenIP},
		"TCP":                              {eth(ourMAC, blueMAC).ip(ourPod, bluePod).tcp(40000, 80, timestamps...).payload(900), blueIP},
		"ICMP":                             {eth(ourMAC, blueMAC).ip(ourPod, bluePod).ping(1).payload(56), blueIP},
		"a protocol nobody knows":          {eth(ourMAC, blueMAC).ip(ourPod, bluePod).protocol(253).payload(33), blueIP},
		"a header and nothing behind it":   {eth(ourMAC, blueMAC).ip(ourPod, bluePod).protocol(253), blueIP},
		"UDP without a checksum":           {eth(ourMAC, blueMAC).ip(ourPod, bluePod).udpWithoutChecksum(5, 6).payload(100), blueIP},
		"a first fragment":                 {eth(ourMAC, blueMAC).ip(ourPod, bluePod, firstFragment).udp(5, 6).payload(800), blueIP},
		"a later fragment":                 {eth(ourMAC, blueMAC).ip(ourPod, bluePod, laterFragment).protocol(17).payload(800), blueIP},
		"with IP options":                  {eth(ourMAC, blueMAC).ip(ourPod, bluePod, recordRoute).udp(5, 6).payload(100), blueIP},
		"with a TTL of 1":                  {eth(ourMAC, blueMAC).ip(ourPod, bluePod, ttl(1)).udp(5, 6).payload(100), blueIP},
		"that must not be fragmented (DF)": {eth(ourMAC, blueMAC).ip(ourPod, bluePod, dontFragment).udp(5, 6).payload(100), blueIP},
		"with DSCP, which stays inside":    {eth(ourMAC, blueMAC).ip(ourPod, bluePod, tos(0xb8)).udp(5, 6).payload(100), blueIP},
		"from the node itself":             {eth(ourMAC, blueMAC).ip("10.244.1.0", bluePod).udp(5, 6).payload(100), blueIP},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			in := c.packet.bytes(t)
			got := n.run(overlayOut, in)
			packetCase{verdict: redirected, counted: sent(c.to, "base", 1, uint64(len(in)-14))}.check(t, in, got)
			if got.verdict == redirected {
				mustBeEncapsulated(t, in, got.packet, c.to, 0)
			}
		})
	}
}

// RFC 6040, section 4.1, as the kernel does it: the outer packet says what the
// inner one says, but only "capable" where it is marked already.
func TestECNOnTheWayOut(t *testing.T) {
	n := newNode(t)
	for inner, outer := range map[uint8]uint8{0: 0, 1: 1, 2: 2, 3: 2, 0xb8 | 1: 1, 0xb8 | 3: 2} {
		t.Run(fmt.Sprintf("inner TOS %#x", inner), func(t *testing.T) {
			n.tb = t
			n.reset()
			in := eth(ourMAC, blueMAC).ip(ourPod, bluePod, tos(inner)).udp(5, 6).payload(100).bytes(t)
			got := n.run(overlayOut, in)
			if got.verdict != redirected {
				t.Fatalf("verdict %d, passed %v", got.verdict, got.passed)
			}
			mustBeEncapsulated(t, in, got.packet, blueIP, outer)
		})
	}
}

// What does not leave by our programs: passed unchanged, for the reason named.
func outCases() []packetCase {
	base := func(c packetCase) packetCase {
		c.program, c.verdict = overlayOut, passed
		if c.packet == nil {
			c.packet = toBlue(100)
		}
		return c
	}
	byKernel := sent(blueIP, "kernel", 1, 128)
	cases := []packetCase{
		{
			name:   "acceleration is switched off on the node",
			given:  func(n *node) { n.inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_BASE) }) },
			reason: weftReasonREASON_SWITCHED_OFF, counted: byKernel,
		}, {
			name:   "acceleration is switched off for the peer",
			given:  func(n *node) { n.peerState(blueIP, func(s *weftPeerState) { s.Off = uint32(weftOffOFF_BASE) }) },
			reason: weftReasonREASON_PEER_SWITCHED_OFF, counted: byKernel,
		}, {
			name:   "the agent holds acceleration back",
			given:  func(n *node) { n.inForce(func(f *weftInForce) { f.Held = 1 }) },
			reason: weftReasonREASON_HELD, counted: byKernel,
		}, {
			name:   "an aggregate",
			packet: eth(ourMAC, blueMAC).ip(ourPod, bluePod).tcp(1, 2).payload(2000), skb: aggregate(2, 1000),
			reason: weftReasonREASON_AGGREGATE, counted: sent(blueIP, "kernel", 2, 2000+2*40),
		}, {
			name:   "no kernel packet to the peer was seen to leave yet",
			given:  func(n *node) { n.peerState(blueIP, func(s *weftPeerState) { s.TxProven = 0 }) },
			reason: weftReasonREASON_HOST_UNPROVEN, counted: byKernel,
		}, {
			name: "the uplink is gone from the device map", given: withoutDevice(weftDeviceDEVICE_UPLINK),
			reason: weftReasonREASON_DEVICE_MISSING, counted: byKernel,
		}, {
			name:   "an IPv6 packet",
			packet: eth(ourMAC, blueMAC).of(layers.EthernetTypeIPv6).payload(60),
			reason: weftReasonREASON_INNER_NOT_IPV4,
		}, {
			name:   "an ARP request",
			packet: eth(ourMAC, "ff:ff:ff:ff:ff:ff").of(layers.EthernetTypeARP).payload(28),
			reason: weftReasonREASON_INNER_NOT_IPV4,
		}, {
			name:   "a VLAN-tagged packet",
			packet: eth(ourMAC, blueMAC).of(layers.EthernetTypeDot1Q).payload(60),
			reason: weftReasonREASON_INNER_NOT_IPV4,
		}, {
			name: "a length field beyond the packet's end", broken: []mutation{setIP(atIP, 2, 0x05, 0x00)},
			reason: weftReasonREASON_INNER_MALFORMED,
		}, {
			name: "a length field one beyond the packet's end", broken: []mutation{setIP(atIP, 2, 0, 129)},
			reason: weftReasonREASON_INNER_MALFORMED,
		}, {
			name: "a length field shorter than the header", broken: []mutation{setIP(atIP, 2, 0, 19)},
			reason: weftReasonREASON_INNER_MALFORMED,
		}, {
			name: "a header length below 5", broken: []mutation{setIP(atIP, 0, 0x44)},
			reason: weftReasonREASON_INNER_MALFORMED,
		}, {
			name: "IP version 6 under IPv4's EtherType", broken: []mutation{setIP(atIP, 0, 0x65)},
			reason: weftReasonREASON_INNER_MALFORMED,
		}, {
			name:   "a destination that no peer has",
			packet: eth(ourMAC, blueMAC).ip(ourPod, "10.244.77.1").udp(1, 2).payload(100),
			reason: weftReasonREASON_DESTINATION_UNKNOWN,
		}, {
			name:   "a peer's public IP as destination, which is in no pod prefix",
			packet: eth(ourMAC, blueMAC).ip(ourPod, blueIP).udp(1, 2).payload(100),
			reason: weftReasonREASON_DESTINATION_UNKNOWN,
		}, {
			name:   "a frame that the neighbour table addressed to another peer",
			packet: eth(ourMAC, greenMAC).ip(ourPod, bluePod).udp(1, 2).payload(100),
			reason: weftReasonREASON_DESTINATION_MAC, counted: byKernel,
		}, {
			name: "a frame whose MAC differs in the first byte", broken: []mutation{set(0, 0x0e)},
			reason: weftReasonREASON_DESTINATION_MAC, counted: byKernel,
		}, {
			name: "a frame whose MAC differs in the last byte", broken: []mutation{set(5, 0x01)},
			reason: weftReasonREASON_DESTINATION_MAC, counted: byKernel,
		}, {
			name:   "a peer that no route leads to",
			packet: eth(ourMAC, farMAC).ip(ourPod, farPod).udp(1, 2).payload(100),
			reason: weftReasonREASON_UNDERLAY_ROUTE, counted: sent(farIP, "kernel", 1, 128),
		}, {
			name:   "a peer that another device leads to",
			packet: eth(ourMAC, sideMAC).ip(ourPod, sidePod).udp(1, 2).payload(100),
			reason: weftReasonREASON_UNDERLAY_ROUTE, counted: sent(sideIP, "kernel", 1, 128),
		}, {
			name:   "one byte more than the uplink's MTU",
			packet: toBlue(1450 - 28 + 1),
			reason: weftReasonREASON_UNDERLAY_MTU, counted: sent(blueIP, "kernel", 1, 1451),
		},
	}
	for i := range cases {
		cases[i] = base(cases[i])
	}
	return cases
}

func TestWhatTheKernelEncapsulates(t *testing.T) { runCases(t, newNode(t), outCases()) }

// What looks like a reason and is none.
func TestWhatIsEncapsulatedNevertheless(t *testing.T) {
	taken := func(c packetCase) packetCase {
		c.program, c.verdict = overlayOut, redirected
		if c.packet == nil {
			c.packet = toBlue(100)
		}
		if c.counted == nil {
			c.counted = sent(blueIP, "base", 1, 128)
		}
		return c
	}
	runCases(t, newNode(t), []packetCase{
		taken(packetCase{name: "a marked packet on a host that does not route by mark", skb: marked(0x4000)}),
		taken(packetCase{
			name:  "a packet without a mark on a host that routes by mark",
			given: func(n *node) { n.inForce(func(f *weftInForce) { f.ByMark = 1 }) },
		}),
		taken(packetCase{
			name:  "acceleration switched off for another peer",
			given: func(n *node) { n.peerState(greenIP, func(s *weftPeerState) { s.Off = 1 }) },
		}),
		taken(packetCase{
			name:  "a peer that lets nothing in, which is no matter on the way out",
			given: func(n *node) { n.peerState(blueIP, func(s *weftPeerState) { s.RxProven = 0 }) },
		}),
		taken(packetCase{
			name:  "the overlay device gone from the device map, which is no matter on the way out",
			given: withoutDevice(weftDeviceDEVICE_OVERLAY),
		}),
		taken(packetCase{
			name: "exactly the uplink's MTU", packet: toBlue(1450 - 28), counted: sent(blueIP, "base", 1, 1450),
		}),
		taken(packetCase{
			name: "a trailer behind the IP packet", broken: []mutation{trailer(4)}, counted: sent(blueIP, "base", 1, 132),
		}),
	})
}

// A route's own MTU is the operator's word that the path beyond is narrower
// than the uplink. The kernel's device fragments to it, and we must not exceed
// it.
func TestRouteWithAnMTUOfItsOwn(t *testing.T) {
	for _, how := range []string{"mtu lock 1000", "mtu 1000"} {
		t.Run(how, func(t *testing.T) {
			n := newNode(t)
			n.Run(t, "ip route add "+blueIP+" dev eth0 src "+ourIP+" "+how)
			n.sync()
			runCases(t, n, []packetCase{
				{
					name: "exactly the route's MTU", program: overlayOut, packet: toBlue(950 - 28),
					verdict: redirected, counted: sent(blueIP, "base", 1, 950),
				}, {
					name: "one byte more than the route's MTU", program: overlayOut, packet: toBlue(950 - 28 + 1),
					verdict: passed, reason: weftReasonREASON_UNDERLAY_MTU, counted: sent(blueIP, "kernel", 1, 951),
				},
			})
		})
	}
}

// The route to the peer is the one that the kernel's device would take.
func TestRouteLookupAsked(t *testing.T) {
	t.Run("a peer behind a gateway", func(t *testing.T) {
		n := newNode(t)
		n.Run(t, "ip route add "+farIP+" via 192.0.2.1 dev eth0")
		runCases(t, n, []packetCase{{
			name: "is reached through it", program: overlayOut,
			packet:  eth(ourMAC, farMAC).ip(ourPod, farPod).udp(1, 2).payload(100),
			verdict: redirected, counted: sent(farIP, "base", 1, 128),
		}})
	})
	t.Run("a peer that a blackhole route swallows", func(t *testing.T) {
		n := newNode(t)
		n.Run(t, "ip route add blackhole "+blueIP)
		runCases(t, n, []packetCase{{
			name: "is the kernel's", program: overlayOut, packet: toBlue(100),
			verdict: passed, reason: weftReasonREASON_UNDERLAY_ROUTE, counted: sent(blueIP, "kernel", 1, 128),
		}})
	})
	t.Run("a better route by another device than the default", func(t *testing.T) {
		n := newNode(t)
		n.Run(t, "ip route add default via 192.0.2.1 dev eth0", "ip route add 203.0.113.0/24 via 198.51.100.1 dev eth1")
		runCases(t, n, []packetCase{{
			name: "is the kernel's", program: overlayOut,
			packet:  eth(ourMAC, farMAC).ip(ourPod, farPod).udp(1, 2).payload(100),
			verdict: passed, reason: weftReasonREASON_UNDERLAY_ROUTE, counted: sent(farIP, "kernel", 1, 128),
		}})
	})
	t.Run("a peer behind an IPv6 next hop", func(t *testing.T) {
		n := newNode(t)
		n.Run(t, "ip route add "+farIP+" via inet6 fe80::1 dev eth0")
		runCases(t, n, []packetCase{{
			name: "is the kernel's", program: overlayOut,
			packet:  eth(ourMAC, farMAC).ip(ourPod, farPod).udp(1, 2).payload(100),
			verdict: passed, reason: weftReasonREASON_UNDERLAY_ROUTE, counted: sent(farIP, "kernel", 1, 128),
		}})
	})
}

// One flow has one source port, and flows spread over the range.
func TestSourcePortFollowsTheFlow(t *testing.T) {
	n := newNode(t)
	port := func(p *packet) uint16 {
		n.reset()
		got := n.run(overlayOut, p.bytes(t))
		if got.verdict != redirected {
			t.Fatalf("verdict %d, passed %v", got.verdict, got.passed)
		}
		return outerOf(got.packet).sourcePort()
	}
	flow := func(i int, size int) *packet {
		return eth(ourMAC, blueMAC).ip(ourPod, bluePod).udp(uint16(20000+i), 53).payload(size)
	}
	ports := map[uint16]bool{}
	for i := range 32 {
		first := port(flow(i, 10))
		if again := port(flow(i, 500)); again != first {
			t.Errorf("flow %d left from port %d, then from %d", i, first, again)
		}
		ports[first] = true
	}
	if len(ports) < 28 {
		t.Errorf("32 flows left from only %d ports", len(ports))
	}
	t.Run("the local port range is the host's", func(t *testing.T) {
		n.tb = t
		n.setSysctl("net/ipv4/ip_local_port_range", "40000 40010")
		n.sync()
		for i := range 32 {
			if p := port(flow(i, 10)); p < 40000 || p > 40010 {
				t.Errorf("flow %d left from port %d, outside of 40000 to 40010", i, p)
			}
		}
	})
}

// The host's own TTL goes on outer packets, as the kernel's device has it.
func TestOuterTTLIsTheHosts(t *testing.T) {
	n := newNode(t)
	n.Run(t, "sysctl -qw net.ipv4.ip_default_ttl=99")
	n.sync()
	n.reset()
	got := n.run(overlayOut, toBlue(100).bytes(t))
	if got.verdict != redirected || got.packet[atIP+8] != 99 {
		t.Errorf("verdict %d, TTL %d; want 99", got.verdict, got.packet[atIP+8])
	}
}

// No two packets in a row have the same IP ID, or fragments would be mixed up.
func TestOuterIDIsFresh(t *testing.T) {
	n := newNode(t)
	n.reset()
	ids := map[uint16]bool{}
	for range 16 {
		ids[outerOf(n.run(overlayOut, toBlue(100).bytes(t)).packet).id()] = true
	}
	if len(ids) < 12 {
		t.Errorf("16 packets had %d IDs", len(ids))
	}
}

// The header checksum is right whatever the IP ID adds to it. For this address
// and length two IDs make the sum carry twice.
func TestOuterChecksumIsAlwaysRight(t *testing.T) {
	n := newNode(t)
	n.reset()
	n.inForce(func(f *weftInForce) { f.Local = toBE32(addr("198.19.255.254")) })
	in := toBlue(255 - 50 - 28).bytes(t)
	n.MustDo(t, func() error {
		opts := &ebpf.RunOptions{Data: in, DataOut: make([]byte, len(in)+50), Context: skBuff{Ifindex: n.overlay}}
		for i := range 200_000 {
			if i%1000 == 0 {
				n.peerState(blueIP, func(s *weftPeerState) { s.TxProven = fresh() })
			}
			verdict, err := n.accel.objects.OverlayOut.Run(opts)
			if err != nil || verdict != redirected {
				return fmt.Errorf("packet %d: verdict %d: %w", i, verdict, err)
			}
			if header := opts.DataOut[atIP:atUDP]; onesSum(header) != 0xffff {
				return fmt.Errorf("packet %d has a wrong checksum: %x", i, header)
			}
		}
		return nil
	})
}

// What encapsulation leaves in the context: no stamp that others could see.
func TestNothingOfOursIsLeftOnTheWayOut(t *testing.T) {
	n := newNode(t)
	n.reset()
	got := n.run(overlayOut, toBlue(100).bytes(t), marked(7), func(s *skBuff) { s.Priority = 3 })
	if got.skb.Mark != 7 || got.skb.Priority != 3 || got.skb.CB != [5]uint32{} {
		t.Errorf("mark %d, priority %d, cb %v; want 7, 3 and zeros", got.skb.Mark, got.skb.Priority, got.skb.CB)
	}
}

// A marked packet goes where the host's rules by mark send it: asked with the
// mark where the kernel can be asked so (6.10), else left to it.
func TestMarkedPacketOnAHostThatRoutesByMark(t *testing.T) {
	n := newNode(t)
	n.Run(t, "ip rule add fwmark 0x4000 blackhole")
	n.desired.RoutesByMark = true
	n.sync()
	reason := weftReasonREASON_UNDERLAY_ROUTE
	if !kernelIsAtLeast(t, 6, 10) {
		reason = weftReasonREASON_MARKED
	}
	runCases(t, n, []packetCase{
		{
			name: "with the mark", program: overlayOut, packet: toBlue(100), skb: marked(0x4000),
			verdict: passed, reason: reason, counted: sent(blueIP, "kernel", 1, 128),
		}, {
			name: "without a mark", program: overlayOut, packet: toBlue(100),
			verdict: redirected, counted: sent(blueIP, "base", 1, 128),
		},
	})
}

func kernelIsAtLeast(t *testing.T, major, minor int) bool {
	t.Helper()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	var a, b int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	return a > major || a == major && b >= minor
}

// Who has to be asked for the next hop's MAC is the kernel, which keeps the
// packet meanwhile.
func TestNextHopIsNotKnownYet(t *testing.T) {
	n := newNode(t)
	n.Run(t, "ip neigh del "+blueIP+" dev eth0")
	runCases(t, n, []packetCase{{
		name: "is the kernel's", program: overlayOut, packet: toBlue(100),
		verdict: passed, reason: weftReasonREASON_UNDERLAY_NEIGHBOUR, counted: sent(blueIP, "kernel", 1, 128),
	}})
}
