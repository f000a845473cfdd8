//go:build linux

package ebpf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/gopacket/gopacket/layers"
)

// mustBeStripped checks a packet of uplink_in byte for byte: the inner frame and
// nothing else, but for the congestion mark that the way may have left.
func mustBeStripped(t *testing.T, in, out []byte, innerTOS uint8) {
	t.Helper()
	want := bytes.Clone(in[atInner:])
	if want[15] != innerTOS {
		want = setIP(14, 1, innerTOS)(want)
	}
	if !bytes.Equal(out, want) {
		t.Errorf("stripped to\n     %x\nwant %x", out, want)
	}
}

// mustBeStamped checks that overlay_in will know the packet again by its
// control block, and by nothing else.
func (n *node) mustBeStamped(t *testing.T, got outcome) {
	t.Helper()
	want := [5]uint32{uint32(n.runtime.Nonce), uint32(n.runtime.Nonce >> 32)}
	if got.skb.CB != want || got.skb.Priority != 0 {
		t.Errorf("cb %x, priority %x; want the nonce %x and priority 0", got.skb.CB, got.skb.Priority, want)
	}
}

func TestVXLANPacketsAreStripped(t *testing.T) {
	n := newNode(t)
	for name, c := range map[string]struct {
		packet *packet
		from   string
	}{
		"UDP":                              {carried(blueIP, fromBlue(100)), blueIP},
		"a packet without payload":         {carried(blueIP, fromBlue(0)), blueIP},
		"from the second prefix of a peer": {carried(blueIP, eth(blueMAC, ourMAC).ip("10.244.20.1", ourPod).udp(1, 2).payload(9)), blueIP},
		"from another peer":                {carried(greenIP, eth(greenMAC, ourMAC).ip(greenPod, ourPod).udp(1, 2).payload(9)), greenIP},
		"from the peer node itself":        {carried(blueIP, eth(blueMAC, ourMAC).ip("10.244.2.0", ourPod).udp(1, 2).payload(9)), blueIP},
		"from the peer's public IP":        {carried(blueIP, eth(blueMAC, ourMAC).ip(blueIP, ourPod).udp(1, 2).payload(9)), blueIP},
		"TCP":                              {carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).tcp(80, 40000, timestamps...).payload(900)), blueIP},
		"ICMP":                             {carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).ping(1).payload(56)), blueIP},
		"without an outer UDP checksum":    {eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udpWithoutChecksum(50000, 8472).vxlan(1).around(fromBlue(100)), blueIP},
		"an unknown protocol, without an outer checksum": {
			eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udpWithoutChecksum(50000, 8472).vxlan(1).
				around(eth(blueMAC, ourMAC).ip(bluePod, ourPod).protocol(253).payload(33)), blueIP,
		},
		"a header and nothing behind it": {
			eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udpWithoutChecksum(50000, 8472).vxlan(1).
				around(eth(blueMAC, ourMAC).ip(bluePod, ourPod).protocol(253)), blueIP,
		},
		"UDP without any checksum": {
			eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udpWithoutChecksum(50000, 8472).vxlan(1).
				around(eth(blueMAC, ourMAC).ip(bluePod, ourPod).udpWithoutChecksum(5, 6).payload(33)), blueIP,
		},
		"an inner fragment, without an outer checksum": {
			eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udpWithoutChecksum(50000, 8472).vxlan(1).
				around(eth(blueMAC, ourMAC).ip(bluePod, ourPod, laterFragment).protocol(17).payload(33)), blueIP,
		},
		"inner IP options":       {carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod, recordRoute).udp(5, 6).payload(33)), blueIP},
		"an inner TTL of 1":      {carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod, ttl(1)).udp(5, 6).payload(33)), blueIP},
		"outer DF":               {eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, dontFragment).udp(50000, 8472).vxlan(1).around(fromBlue(100)), blueIP},
		"outer DSCP and any TTL": {eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(0xb8), ttl(3)).udp(50000, 8472).vxlan(1).around(fromBlue(100)), blueIP},
		"any source port":        {eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udp(1, 8472).vxlan(1).around(fromBlue(100)), blueIP},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			in := c.packet.bytes(t)
			got := n.run(uplinkIn, in)
			packetCase{verdict: redirected, counted: received(c.from, "base", 1, uint64(len(in)-atInnerIP))}.check(t, in, got)
			if got.verdict == redirected {
				mustBeStripped(t, in, got.packet, in[atInnerIP+1])
				n.mustBeStamped(t, got)
			}
		})
	}
}

func TestEncapsulatedAndStrippedIsThePacketItWas(t *testing.T) {
	n := newNode(t)
	n.reset()
	inner := eth(blueMAC, ourMAC).ip(bluePod, ourPod).tcp(1, 2, timestamps...).payload(77).bytes(t)
	// The way back through the same two programs: blue and we change names.
	out := n.run(overlayOut, eth(ourMAC, blueMAC).ip(ourPod, bluePod).tcp(1, 2, timestamps...).payload(77).bytes(t))
	wire := bytes.Clone(out.packet)
	copy(wire, mustMAC(uplinkMAC))
	copy(wire[atInner:], inner)
	wire = setIP(atIP, 12, append(octets(blueIP), octets(ourIP)...)...)(wire)
	if got := n.run(uplinkIn, wire); got.verdict != redirected || !bytes.Equal(got.packet, inner) {
		t.Errorf("verdict %d (passed %v), packet\n     %x\nwant %x", got.verdict, got.passed, got.packet, inner)
	}
}

func octets(text string) []byte { a := addr(text).As4(); return a[:] }

// RFC 6040, section 4.2, as INET_ECN_decapsulate() does it: rows are what the
// inner packet says, columns the outer one.
func TestECNOnTheWayIn(t *testing.T) {
	const drop = 0xff // the kernel's to drop
	table := [4][4]uint8{
		//         outer: not capable, capable (1), capable (0), congested
		/* not capable */ {0, 0, 0, drop},
		/* capable (1) */ {1, 1, 1, 3},
		/* capable (0) */ {2, 1, 2, 3},
		/* congested   */ {3, 3, 3, 3},
	}
	n := newNode(t)
	for inner, row := range table {
		for outer, want := range row {
			t.Run(fmt.Sprintf("inner %d, outer %d", inner, outer), func(t *testing.T) {
				n.tb = t
				n.reset()
				const dscp = 0x28
				in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(uint8(outer))).udp(50000, 8472).vxlan(1).
					around(eth(blueMAC, ourMAC).ip(bluePod, ourPod, tos(dscp|uint8(inner))).udp(1, 2).payload(50)).bytes(t)
				got := n.run(uplinkIn, in)
				if want == drop {
					packetCase{verdict: passed, reason: weftReasonREASON_ECN_CONGESTED}.check(t, in, got)
					return
				}
				packetCase{verdict: redirected, counted: received(blueIP, "base", 1, 78)}.check(t, in, got)
				mustBeStripped(t, in, got.packet, dscp|want)
			})
		}
	}
}

// A checksum that the network card computed over the whole packet has to stay
// true of what is left of it, or the kernel logs "hw csum failure".
func TestStrippingKeepsTheCardsChecksumTrue(t *testing.T) {
	for name, outerTOS := range map[string]uint8{"a packet that met no congestion": 2, "a packet marked on the way": 3} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.mustKnowChecksumComplete()
			n.reset()
			in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(outerTOS)).udp(50000, 8472).vxlan(1).
				around(eth(blueMAC, ourMAC).ip(bluePod, ourPod, tos(2)).udp(1, 2).payload(51)).bytes(t)
			got := n.runProgram(n.accel.objects.UplinkIn, uplinkIn, in, checksumComplete)
			if got.verdict != redirected {
				t.Fatalf("verdict %d, passed %v", got.verdict, got.passed)
			}
			mustBeStripped(t, in, got.packet, outerTOS)
		})
	}
}

// What is left to the kernel on the way in: passed unchanged, for the reason
// named. Only what passed the source check may carry its stamp.
func inCases() []packetCase {
	passedFor := func(reason weftReason, c packetCase) packetCase {
		c.program, c.verdict, c.reason = uplinkIn, passed, reason
		if c.packet == nil {
			c.packet = carried(blueIP, fromBlue(100))
		}
		return c
	}
	outer := func(with ...func(*layers.IPv4)) *packet {
		return eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, with...).udp(50000, 8472).vxlan(1).around(fromBlue(100))
	}
	return []packetCase{
		passedFor(weftReasonREASON_SWITCHED_OFF, packetCase{
			name:  "acceleration is switched off on the node",
			given: func(n *node) { n.inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_BASE) }) },
		}),
		passedFor(weftReasonREASON_PEER_SWITCHED_OFF, packetCase{
			name:  "acceleration is switched off for the peer",
			given: func(n *node) { n.peerState(blueIP, func(s *weftPeerState) { s.Off = uint32(weftOffOFF_BASE) }) },
		}),
		passedFor(weftReasonREASON_HELD, packetCase{
			name:  "the agent holds acceleration back",
			given: func(n *node) { n.inForce(func(f *weftInForce) { f.Held = 1 }) },
		}),
		passedFor(weftReasonREASON_AGGREGATE, packetCase{name: "an aggregate", skb: aggregate(2, 60)}),
		passedFor(weftReasonREASON_HOST_UNPROVEN, packetCase{
			name:  "no kernel packet of the peer was seen to come in yet",
			given: func(n *node) { n.peerState(blueIP, func(s *weftPeerState) { s.RxProven = 0 }) },
		}),
		passedFor(weftReasonREASON_DEVICE_MISSING, packetCase{
			name: "the overlay device is gone from the device map", given: withoutDevice(weftDeviceDEVICE_OVERLAY),
		}),
		passedFor(weftReasonREASON_OUTER_NOT_FOR_HOST, packetCase{
			name: "a frame that is addressed to another host", broken: []mutation{set(0, 0x02, 0, 0, 0, 0, 0x77)},
		}),
		passedFor(weftReasonREASON_OUTER_NOT_FOR_HOST, packetCase{
			name: "a broadcast frame", broken: []mutation{set(0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)},
		}),
		passedFor(weftReasonREASON_OUTER_ADDRESS, packetCase{
			name:   "an outer destination that is not our public IP",
			packet: eth(wireMAC, uplinkMAC).ip(blueIP, "198.51.100.11").udp(50000, 8472).vxlan(1).around(fromBlue(100)),
		}),
		passedFor(weftReasonREASON_OUTER_OPTIONS, packetCase{name: "outer IP options", packet: outer(recordRoute)}),
		passedFor(weftReasonREASON_OUTER_FRAGMENT, packetCase{name: "a first outer fragment", packet: outer(firstFragment)}),
		passedFor(weftReasonREASON_OUTER_FRAGMENT, packetCase{
			name:   "a later outer fragment of a peer's",
			packet: eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, laterFragment).protocol(17).payload(200),
		}),
		passedFor(weftReasonREASON_OUTER_CHECKSUM, packetCase{name: "a wrong outer header checksum", broken: []mutation{set(atIP+10, 0xde, 0xad)}}),
		passedFor(weftReasonREASON_OUTER_CHECKSUM, packetCase{name: "an outer TTL changed without its checksum", broken: []mutation{set(atIP+8, 63)}}),
		passedFor(weftReasonREASON_OUTER_LENGTH, packetCase{name: "an outer length beyond the end", broken: []mutation{setIP(atIP, 2, 0, 179)}}),
		passedFor(weftReasonREASON_OUTER_LENGTH, packetCase{name: "a trailer behind the outer packet", broken: []mutation{trailer(4)}}),
		passedFor(weftReasonREASON_OUTER_LENGTH, packetCase{name: "a UDP length of one less", broken: []mutation{set(atUDP+4, 0, 157)}}),
		passedFor(weftReasonREASON_OUTER_LENGTH, packetCase{name: "a UDP length of one more", broken: []mutation{set(atUDP+4, 0, 159)}}),
		passedFor(weftReasonREASON_VXLAN_FLAGS, packetCase{name: "no I flag", broken: []mutation{set(atVXLAN, 0)}}),
		passedFor(weftReasonREASON_VXLAN_FLAGS, packetCase{name: "a group policy (GBP)", broken: []mutation{set(atVXLAN, 0x88)}}),
		passedFor(weftReasonREASON_VXLAN_FLAGS, packetCase{name: "a reserved bit before the VNI", broken: []mutation{set(atVXLAN+3, 1)}}),
		passedFor(weftReasonREASON_VXLAN_FLAGS, packetCase{name: "a reserved bit behind the VNI", broken: []mutation{set(atVXLAN+7, 1)}}),
		passedFor(weftReasonREASON_VXLAN_VNI, packetCase{name: "another network's VNI", broken: []mutation{set(atVXLAN+6, 2)}}),
		passedFor(weftReasonREASON_VXLAN_VNI, packetCase{name: "a VNI that has our number in its last byte only", broken: []mutation{set(atVXLAN+4, 1)}}),
		passedFor(weftReasonREASON_INNER_MAC, packetCase{name: "an inner frame for another device", broken: []mutation{set(atInner+5, 1)}}),
		passedFor(weftReasonREASON_INNER_MAC, packetCase{name: "an inner broadcast", broken: []mutation{set(atInner, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)}}),
		passedFor(weftReasonREASON_INNER_MAC, packetCase{
			name: "an inner frame that claims to come from our device", broken: []mutation{set(atInner+6, mustMAC(ourMAC)...)},
		}),
		passedFor(weftReasonREASON_INNER_NOT_IPV4, packetCase{
			name: "an inner IPv6 packet", packet: carried(blueIP, eth(blueMAC, ourMAC).of(layers.EthernetTypeIPv6).payload(60)),
		}),
		passedFor(weftReasonREASON_INNER_NOT_IPV4, packetCase{
			name: "an inner ARP request", packet: carried(blueIP, eth(blueMAC, "ff:ff:ff:ff:ff:ff").of(layers.EthernetTypeARP).payload(28)),
		}),
		passedFor(weftReasonREASON_INNER_NOT_IPV4, packetCase{
			name: "an inner VLAN tag", packet: carried(blueIP, eth(blueMAC, ourMAC).of(layers.EthernetTypeDot1Q).payload(60)),
		}),
		passedFor(weftReasonREASON_INNER_MALFORMED, packetCase{
			name: "an inner IP header that is cut", packet: carried(blueIP, eth(blueMAC, ourMAC).payload(19)),
		}),
		passedFor(weftReasonREASON_INNER_MALFORMED, packetCase{
			name: "no inner frame at all", packet: eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udp(50000, 8472).vxlan(1),
		}),
		passedFor(weftReasonREASON_INNER_MALFORMED, packetCase{
			name: "an inner length beyond the end", broken: []mutation{setIP(atInnerIP, 2, 0, 129)},
		}),
		passedFor(weftReasonREASON_INNER_MALFORMED, packetCase{
			name: "an inner header length below 5", broken: []mutation{setIP(atInnerIP, 0, 0x44)},
		}),
		passedFor(weftReasonREASON_INNER_MALFORMED, packetCase{
			name: "inner IP version 6 under IPv4's EtherType", broken: []mutation{setIP(atInnerIP, 0, 0x65)},
		}),
		passedFor(weftReasonREASON_INNER_UNPROTECTED, packetCase{
			name:   "an unknown protocol, with an outer checksum that nobody verified",
			packet: carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).protocol(253).payload(33)),
		}),
		passedFor(weftReasonREASON_INNER_UNPROTECTED, packetCase{
			name:   "inner UDP without a checksum, with an outer one that nobody verified",
			packet: carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).udpWithoutChecksum(5, 6).payload(33)),
		}),
		passedFor(weftReasonREASON_INNER_UNPROTECTED, packetCase{
			name:   "a first inner fragment, with an outer checksum that nobody verified",
			packet: carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod, firstFragment).udp(5, 6).payload(33)),
		}),
		passedFor(weftReasonREASON_INNER_UNPROTECTED, packetCase{
			name:   "a later inner fragment, with an outer checksum that nobody verified",
			packet: carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod, laterFragment).protocol(17).payload(33)),
		}),
		passedFor(weftReasonREASON_INNER_UNPROTECTED, packetCase{
			name:   "an inner UDP header that is cut",
			packet: carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).protocol(17).payload(7)),
		}),
		passedFor(weftReasonREASON_ECN_CONGESTED, packetCase{name: "congestion that the inner packet can't tell", packet: outer(tos(3))}),
		passedFor(weftReasonREASON_SOURCE_UNKNOWN_PEER, packetCase{name: "an outer source that is no peer", packet: carried(strangerIP, fromBlue(100))}),
		passedFor(weftReasonREASON_SOURCE_NOT_ITS_PREFIX, packetCase{name: "a peer that speaks for another's pods", packet: carried(greenIP, fromBlue(100))}),
	}
}

// stampedGood are the reasons for which a packet that passed the source check
// is left to the kernel.
var stampedGood = map[weftReason]bool{
	weftReasonREASON_SWITCHED_OFF: true, weftReasonREASON_PEER_SWITCHED_OFF: true, weftReasonREASON_HELD: true,
	weftReasonREASON_AGGREGATE: true, weftReasonREASON_HOST_UNPROVEN: true, weftReasonREASON_DEVICE_MISSING: true,
	weftReasonREASON_INNER_UNPROTECTED: true, weftReasonREASON_ECN_CONGESTED: true,
}

func TestWhatTheKernelStrips(t *testing.T) {
	n := newNode(t)
	for _, c := range inCases() {
		t.Run(c.name, func(t *testing.T) {
			n.tb = t
			c.run(t, n)
		})
		t.Run(c.name+", its stamp", func(t *testing.T) {
			n.tb = t
			n.reset()
			if c.given != nil {
				c.given(n)
			}
			var with []func(*skBuff)
			if c.skb != nil {
				with = append(with, c.skb)
			}
			got := n.run(uplinkIn, c.packet.bytes(t, c.broken...), with...)
			want := uint32(0)
			switch {
			case stampedGood[c.reason]:
				want = n.runtime.Stamp
			case c.reason == weftReasonREASON_SOURCE_UNKNOWN_PEER || c.reason == weftReasonREASON_SOURCE_NOT_ITS_PREFIX:
				want = n.runtime.Stamp - 1
			}
			if got.skb.Priority != want || got.skb.CB != [5]uint32{} {
				t.Errorf("priority %#x, cb %v; want %#x and zeros", got.skb.Priority, got.skb.CB, want)
			}
		})
	}
}

// What is not VXLAN on our port is not ours: not counted, not stamped.
func TestWhatIsNoneOfOurBusiness(t *testing.T) {
	n := newNode(t)
	for name, p := range map[string]*packet{
		"UDP to another port":              eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udp(50000, 4789).vxlan(1).around(fromBlue(100)),
		"TCP to the VXLAN port":            eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).tcp(50000, 8472).payload(100),
		"a ping":                           eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).ping(1).payload(56),
		"an ARP request":                   eth(wireMAC, "ff:ff:ff:ff:ff:ff").of(layers.EthernetTypeARP).payload(46),
		"IPv6":                             eth(wireMAC, uplinkMAC).of(layers.EthernetTypeIPv6).payload(100),
		"a packet shorter than VXLAN":      eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udp(50000, 8472).payload(7),
		"a later fragment of a stranger's": eth(wireMAC, uplinkMAC).ip(strangerIP, ourIP, laterFragment).protocol(17).payload(200),
		"options before another port":      eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, recordRoute).udp(50000, 53).payload(100),
		"an answer from the VXLAN port":    eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udp(8472, 50000).payload(100),
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			in := p.bytes(t)
			got := n.run(uplinkIn, in)
			packetCase{verdict: passed}.check(t, in, got)
			if got.skb.Priority != 0 || got.skb.CB != [5]uint32{} {
				t.Errorf("priority %#x, cb %v, want zeros", got.skb.Priority, got.skb.CB)
			}
		})
	}
}

// The source check: rows are who sends what, columns the modes.
func TestSourceCheck(t *testing.T) {
	const (
		taken   = weftReasonREASON_NONE
		unknown = weftReasonREASON_SOURCE_UNKNOWN_PEER
		notIts  = weftReasonREASON_SOURCE_NOT_ITS_PREFIX
	)
	inner := func(source string) *packet { return eth(blueMAC, ourMAC).ip(source, ourPod).udp(1, 2).payload(20) }
	n := newNode(t)
	for name, c := range map[string]struct {
		from, source string
		reason       weftReason // in observe and enforce
		off          weftReason // with the check off
		counted      string     // the peer counted with the check off
	}{
		"a peer for its own pod":            {blueIP, bluePod, taken, taken, blueIP},
		"a peer for its second prefix":      {blueIP, "10.244.20.9", taken, taken, blueIP},
		"a peer for its own public IP":      {blueIP, blueIP, taken, taken, blueIP},
		"a peer for another peer's pod":     {blueIP, greenPod, notIts, taken, blueIP},
		"a peer for another's public IP":    {blueIP, greenIP, notIts, taken, blueIP},
		"a peer for a pod of ours":          {blueIP, ourPod, notIts, taken, blueIP},
		"a peer for our public IP":          {blueIP, ourIP, notIts, taken, blueIP},
		"a peer for an outside address":     {blueIP, "203.0.113.200", notIts, taken, blueIP},
		"a stranger for a peer's pod":       {strangerIP, bluePod, unknown, unknown, ""},
		"a stranger for its own address":    {strangerIP, strangerIP, unknown, unknown, ""},
		"a stranger for an outside address": {strangerIP, "203.0.113.200", unknown, unknown, ""},
	} {
		for mode, check := range SourceChecks {
			t.Run(name+", "+check, func(t *testing.T) {
				n.tb = t
				n.reset()
				n.inForce(func(f *weftInForce) { f.SourceCheck = uint32(mode) })
				in := carried(c.from, inner(c.source)).bytes(t)
				want := packetCase{verdict: passed, reason: c.reason}
				if mode == int(weftSourceCheckSOURCE_CHECK_OFF) {
					want.reason = c.off
				} else if mode == int(weftSourceCheckSOURCE_CHECK_ENFORCE) {
					want.verdict = dropped
				}
				if want.reason == taken {
					want.verdict, want.counted = redirected, received(c.counted, "base", 1, 48)
				}
				suspects := n.suspects()
				got := n.run(uplinkIn, in)
				want.check(t, in, got)
				if want.verdict == redirected {
					mustBeStripped(t, in, got.packet, 0)
				}
				key := Suspect{Outer: addr(c.from), Inner: addr(c.source), Reason: Reasons[c.reason].Name}
				noted := c.reason != taken && mode != int(weftSourceCheckSOURCE_CHECK_OFF)
				if more := n.suspects()[key] - suspects[key]; more == 1 != noted || more > 1 {
					t.Errorf("%d suspects like %+v more, want one: %v", more, key, noted)
				}
			})
		}
	}
}

// suspects are the packets of each sender that failed the source check.
func (n *node) suspects() map[Suspect]uint64 {
	n.tb.Helper()
	all, err := n.accel.View().Suspects()
	if err != nil {
		n.tb.Fatal(err)
	}
	packets := map[Suspect]uint64{}
	for _, s := range all {
		key := s
		key.Packets = 0
		packets[key] = s.Packets
	}
	return packets
}

// The longest prefix decides, as a route would have it, on the way out and in
// the source check.
func TestLongestPrefixDecides(t *testing.T) {
	n := newNode(t)
	peers := knownPeers()[:1] // blue has 10.244.2.0/24
	for _, more := range []struct{ prefix, ip, mac string }{
		{"10.244.2.128/25", greenIP, greenMAC},
		{"10.244.2.130/32", blueIP, blueMAC},
		{"10.240.0.0/12", "192.0.2.14", "0a:58:0a:f4:04:00"},
	} {
		p := knownPeers()[0]
		p.Prefix, p.PublicIP, p.MAC = mustPrefix(more.prefix), addr(more.ip), [6]byte(mustMAC(more.mac))
		peers = append(peers, p)
	}
	n.desired.Peers = peers
	if misfits := n.sync(); misfits.Len() != 0 {
		t.Fatalf("misfits %v", misfits)
	}
	for pod, owner := range map[string]struct{ ip, mac string }{
		"10.244.2.0":    {blueIP, blueMAC},
		"10.244.2.127":  {blueIP, blueMAC},
		"10.244.2.128":  {greenIP, greenMAC},
		"10.244.2.129":  {greenIP, greenMAC},
		"10.244.2.130":  {blueIP, blueMAC},
		"10.244.2.131":  {greenIP, greenMAC},
		"10.244.2.255":  {greenIP, greenMAC},
		"10.244.3.0":    {"192.0.2.14", "0a:58:0a:f4:04:00"},
		"10.255.255.9":  {"192.0.2.14", "0a:58:0a:f4:04:00"},
		"10.240.0.0":    {"192.0.2.14", "0a:58:0a:f4:04:00"},
		"10.239.255.99": {},
	} {
		t.Run(pod, func(t *testing.T) {
			n.tb = t
			n.inForce(func(*weftInForce) {})
			for _, ip := range []string{blueIP, greenIP, "192.0.2.14"} {
				n.peerState(ip, func(s *weftPeerState) { s.TxProven, s.RxProven = fresh(), fresh() })
			}
			if owner.ip == "" {
				in := eth(ourMAC, blueMAC).ip(ourPod, pod).udp(1, 2).payload(10).bytes(t)
				packetCase{verdict: passed, reason: weftReasonREASON_DESTINATION_UNKNOWN}.check(t, in, n.run(overlayOut, in))
				return
			}
			in := eth(ourMAC, owner.mac).ip(ourPod, pod).udp(1, 2).payload(10).bytes(t)
			got := n.run(overlayOut, in)
			packetCase{verdict: redirected, counted: sent(owner.ip, "base", 1, 38)}.check(t, in, got)
			in = carried(owner.ip, eth(owner.mac, ourMAC).ip(pod, ourPod).udp(2, 1).payload(10)).bytes(t)
			got = n.run(uplinkIn, in)
			packetCase{verdict: redirected, counted: received(owner.ip, "base", 1, 38)}.check(t, in, got)
			// The owner of the wider prefix does not speak for it.
			other := blueIP
			if owner.ip == blueIP {
				other = greenIP
			}
			in = carried(other, eth(owner.mac, ourMAC).ip(pod, ourPod).udp(2, 1).payload(10)).bytes(t)
			packetCase{verdict: passed, reason: weftReasonREASON_SOURCE_NOT_ITS_PREFIX}.check(t, in, n.run(uplinkIn, in))
		})
	}
}

// What the kernel refuses at the last step must still be the packet it was.
func TestRefusedRoomLeavesThePacketUntouched(t *testing.T) {
	n := newNode(t)
	t.Run("on the way out", func(t *testing.T) {
		n.tb = t
		prog := n.mustRefuse(overlayOut)
		n.reset()
		in := toBlue(100).bytes(t)
		packetCase{verdict: passed, reason: weftReasonREASON_ENCAP_REFUSED, counted: sent(blueIP, "kernel", 1, 128)}.
			check(t, in, n.runProgram(prog, overlayOut, in, 0))
	})
	t.Run("on the way in", func(t *testing.T) {
		n.tb = t
		prog := n.mustRefuse(uplinkIn)
		n.reset()
		in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(3)).udp(50000, 8472).vxlan(1).
			around(eth(blueMAC, ourMAC).ip(bluePod, ourPod, tos(1)).udp(1, 2).payload(50)).bytes(t)
		got := n.runProgram(prog, uplinkIn, in, 0)
		packetCase{verdict: passed, reason: weftReasonREASON_STRIP_REFUSED}.check(t, in, got)
		if got.skb.Priority != n.runtime.Stamp {
			t.Errorf("priority %#x, want the stamp %#x: the packet passed the source check", got.skb.Priority, n.runtime.Stamp)
		}
	})
}

// A VNI and a port other than flannel's defaults are those of the programs.
func TestAnotherVNIAndPort(t *testing.T) {
	n := newNode(t)
	n.accel.opts.VNI, n.accel.opts.Port, n.accel.opts.PinDir = 0x123456, 4789, n.accel.opts.PinDir+"2"
	n.MustDo(t, func() (err error) {
		opts, attach := n.accel.opts, n.accel.attach
		n.accel.Close()
		if n.accel, err = Open(opts); err == nil {
			n.accel.attach = attach
		}
		return err
	})
	n.sync()
	n.reset()
	got := n.run(overlayOut, toBlue(100).bytes(t))
	if got.verdict != redirected {
		t.Fatalf("verdict %d, passed %v", got.verdict, got.passed)
	}
	if port := binary.BigEndian.Uint16(got.packet[atUDP+2:]); port != 4789 {
		t.Errorf("sent to port %d, want 4789", port)
	}
	if vni := binary.BigEndian.Uint32(got.packet[atVXLAN+4:]); vni != 0x12345600 {
		t.Errorf("sent with VNI word %#x, want 0x12345600", vni)
	}
	in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udp(50000, 4789).vxlan(0x123456).around(fromBlue(100)).bytes(t)
	packetCase{verdict: redirected, counted: received(blueIP, "base", 1, 128)}.check(t, in, n.run(uplinkIn, in))
	in = carried(blueIP, fromBlue(100)).bytes(t)
	packetCase{verdict: passed}.check(t, in, n.run(uplinkIn, in))
}

// A segment that has more of the same write behind it is the kernel's, which
// merges such trains, and for a moment so is the rest of the flow.
func TestTrainsOfSegmentsAreTheKernels(t *testing.T) {
	n := newNode(t)
	segment := func(payload int, flags byte) []byte {
		const atFlags = atInnerIP + 20 + 13
		return carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).tcp(1, 2).payload(payload)).
			bytes(t, set(atFlags, flags))
	}
	const ack, push = 0x10, 0x08
	steps := []struct {
		name   string
		packet []byte
		taken  bool
		reason weftReason
		bytes  uint64
	}{
		{"a bare acknowledgement", segment(0, ack), true, 0, 40},
		{"the end of a write", segment(1000, ack|push), true, 0, 1040},
		{"a write with more behind it", segment(1000, ack), false, weftReasonREASON_SEGMENT_TRAIN, 0},
	}
	n.reset()
	started := coarseNow()
	for _, step := range steps {
		got := n.run(uplinkIn, step.packet)
		want := packetCase{verdict: passed, reason: step.reason}
		if step.taken {
			want = packetCase{verdict: redirected, counted: received(blueIP, "base", 1, step.bytes)}
		}
		t.Log(step.name)
		want.check(t, step.packet, got)
	}
	// The end of that write is to follow it, and will for 20 ms.
	var flow uint32
	var when, latest uint64
	for it := n.accel.objects.RxAggregates.Iterate(); it.Next(&flow, &when); {
		latest = max(latest, when)
	}
	if latest < started {
		t.Error("the rest of the flow is not kept on the same road")
	}
}

// A peer for which the maps have no room passes the source check, and rides the
// kernel path both ways.
func TestPeerWithoutRoom(t *testing.T) {
	n := newNode(t)
	n.desired.SourceCheck = "enforce"
	n.desired.Known, n.desired.Peers = n.desired.Peers, nil
	n.sync()
	for program, packet := range map[tcProgram]*packet{overlayOut: toBlue(100), uplinkIn: carried(blueIP, fromBlue(100))} {
		in := packet.bytes(t)
		packetCase{verdict: passed, reason: weftReasonREASON_PEER_NO_ROOM}.check(t, in, n.run(program, in))
	}
	in := carried(strangerIP, fromBlue(100)).bytes(t)
	packetCase{verdict: dropped, reason: weftReasonREASON_SOURCE_UNKNOWN_PEER}.check(t, in, n.run(uplinkIn, in))
}
