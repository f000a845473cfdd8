//go:build linux

package ebpf

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket/layers"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// What the node of the packet tests has of IPv6, and who it knows.
//
//	              node 2001:db8::11                     peers
//	flannel-v6.1 ─ fd00:10:244:1::/64   blue   2001:db8::12  fd00:10:244:2::/64, fd00:10:245::/48
//	eth0 ───────── 2001:db8::/64        green  2001:db8::13  fd00:10:244:3::/64
//	                                    slow   2001:db8::14  fd00:10:244:4::/64 (known only)
const (
	ourIP6  = "2001:db8::11"
	ourMAC6 = "0a:58:0a:f4:01:06"
	ourPod6 = "fd00:10:244:1::5"

	blueIP6  = "2001:db8::12"
	blueMAC6 = "0a:58:0a:f4:02:06"
	bluePod6 = "fd00:10:244:2::7"

	greenIP6  = "2001:db8::13"
	greenPod6 = "fd00:10:244:3::7"

	slowIP6  = "2001:db8::14"
	slowPod6 = "fd00:10:244:4::7"

	strangePod6 = "fd00:10:244:99::7" // nobody's
)

func peer6(node, prefix, ip, mac string) state.Peer {
	return state.Peer{Node: node, Prefix: mustPrefix(prefix), PublicIP: addr(ip), MAC: state.MAC(mustMAC(mac))}
}

func knownPeers6() (carried, known []state.Peer) {
	carried = []state.Peer{
		peer6("blue", "fd00:10:244:2::/64", blueIP6, blueMAC6),
		peer6("blue", "fd00:10:245::/48", blueIP6, blueMAC6),
		peer6("green", "fd00:10:244:3::/64", greenIP6, "0a:58:0a:f4:03:06"),
	}
	return carried, []state.Peer{peer6("slow", "fd00:10:244:4::/64", slowIP6, "0a:58:0a:f4:04:06")}
}

// newNode6 is newNode with IPv6.
func newNode6(tb *testing.T) *node {
	tb.Helper()
	n := newNode(tb)
	makeOverlay6(tb, n.NS, ourIP6, ourMAC6)
	attach, opts := n.accel.attach, n.accel.opts
	opts.IPv6 = true
	n.accel.Close()
	n.MustDo(tb, func() (err error) {
		n.overlay6 = uint32(interfaceIndex("flannel-v6.1"))
		n.accel, err = Open(opts)
		return err
	})
	n.accel.attach = attach
	carried, known := knownPeers6()
	n.desired.Overlay6 = int(n.overlay6)
	n.desired.Peers, n.desired.Known = append(n.desired.Peers, carried...), known
	n.desired.Aliases = []state.Alias{{Addr: addr("2001:db8:1::2"), PublicIP: addr(blueIP6)}}
	n.sync()
	return n
}

// makeOverlay6 makes the IPv6 overlay device on eth0.
func makeOverlay6(tb testing.TB, ns *netns.NS, ip, mac string) {
	tb.Helper()
	ns.Run(
		tb,
		"sysctl -qw net.ipv6.conf.default.disable_ipv6=0 net.ipv6.conf.eth0.disable_ipv6=0",
		"ip -6 addr replace "+ip+"/64 dev eth0 nodad",
		"ip link add flannel-v6.1 address "+mac+" type vxlan id 1 local "+ip+" dev eth0 dstport 8472 nolearning",
		"ip link set flannel-v6.1 up",
	)
}

// Packets of the peer blue, as flannel-v6.1 has them in both directions.

func fromBlue6(with ...func(*layers.IPv6)) *packet {
	return eth(blueMAC6, ourMAC6).ip6(bluePod6, ourPod6, with...)
}

func toBlue6(with ...func(*layers.IPv6)) *packet {
	return eth(ourMAC6, blueMAC6).ip6(ourPod6, bluePod6, with...)
}

// extended makes the transport header that is added last follow extension headers:
// raw bytes, of which the first next-header field tells of the second and so on.
func (p *packet) extended(headers ...[]byte) *packet {
	ip := p.layers[1].(*layers.IPv6)
	next := ip.NextHeader
	var chain []byte
	for i, h := range headers {
		h = append([]byte{byte(next)}, h[1:]...)
		if i+1 < len(headers) {
			h[0] = headers[i+1][0]
		}
		chain = append(chain, h...)
	}
	ip.NextHeader = layers.IPProtocol(headers[0][0])
	rest := p.layers[2:]
	p.layers = append(p.layers[:2:2], (&packet{}).raw(chain).layers[0])
	p.layers = append(p.layers, rest...)
	return p
}

// Extension headers, of which the first byte says what they are.

func hopByHop() []byte { return []byte{0, 0, 5, 2, 0, 0, 1, 0} } // router alert, PadN

func routing() []byte { return append([]byte{43, 2}, make([]byte, 22)...) }

func destination() []byte { return append([]byte{60, 1, 1, 12}, make([]byte, 12)...) } // PadN

func fragmentHeader(offset uint16, more bool) []byte {
	h := make([]byte, 8)
	h[0] = 44
	binary.BigEndian.PutUint16(h[2:], offset<<3)
	if more {
		h[3] |= 1
	}
	return h
}

// jumbo is what the kernel puts before BIG TCP; the packet's own length is 0 then.
func jumbo(length uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{0, 0, 0xc2, 4}, length)
}

func withoutLength() mutation { return set(18, 0, 0) }

// ping6 adds an echo request.
func (p *packet) ping6() *packet {
	ip := p.carries(layers.IPProtocolICMPv6)
	icmp := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeEchoRequest, 0)}
	mustSum(icmp, ip)
	return p.add(icmp).add(&layers.ICMPv6Echo{Identifier: 77, SeqNumber: 1})
}

// Whatever comes in by the IPv6 overlay device, or goes out, is counted and passed
// as it is.
func TestIPv6IsCounted(t *testing.T) {
	n := newNode6(t)
	type load struct {
		name           string
		packet         func(*packet) *packet // behind the IPv6 header
		broken         []mutation
		skb            func(*skBuff)
		packets, bytes uint64 // IPv6 bytes on the wire; 0: not counted
	}
	var cases []packetCase
	for _, l := range []load{
		{name: "UDP", packet: func(p *packet) *packet { return p.udp(53, 40000).payload(100) }, packets: 1, bytes: 148},
		{name: "TCP", packet: func(p *packet) *packet { return p.tcp(80, 40000, timestamps...).payload(900) }, packets: 1, bytes: 972},
		{name: "ICMPv6", packet: func(p *packet) *packet { return p.ping6().payload(56) }, packets: 1, bytes: 104},
		{name: "an unknown protocol", packet: func(p *packet) *packet { return p.protocol(253).payload(33) }, packets: 1, bytes: 73},
		{name: "a header and nothing behind it", packet: func(p *packet) *packet { return p.protocol(59) }, packets: 1, bytes: 40},
		{name: "a first fragment", packet: func(p *packet) *packet {
			return p.udp(53, 40000).payload(1200).extended(fragmentHeader(0, true))
		}, packets: 1, bytes: 1256},
		{name: "a later fragment", packet: func(p *packet) *packet {
			return p.protocol(17).payload(800).extended(fragmentHeader(150, false))
		}, packets: 1, bytes: 848},
		{name: "extension headers", packet: func(p *packet) *packet {
			return p.udp(53, 40000).payload(100).extended(hopByHop(), destination())
		}, packets: 1, bytes: 172},

		// Aggregates are what the wire has of them.
		{
			name: "a TCP aggregate", packet: func(p *packet) *packet { return p.tcp(80, 40000, timestamps...).payload(3000) },
			skb: aggregate(5, 600), packets: 5, bytes: 3000 + 5*72,
		},
		{
			name: "a TCP aggregate without number", packet: func(p *packet) *packet { return p.tcp(80, 40000).payload(3001) },
			skb: aggregate(0, 700), packets: 5, bytes: 3001 + 5*60,
		},
		{
			name: "a UDP aggregate", packet: func(p *packet) *packet { return p.udp(53, 40000).payload(3000) },
			skb: aggregate(3, 1000), packets: 3, bytes: 3000 + 3*48,
		},
		{name: "a TCP aggregate with an extension header", packet: func(p *packet) *packet {
			return p.tcp(80, 40000).payload(3000).extended(destination())
		}, skb: aggregate(3, 1000), packets: 3, bytes: 3000 + 3*76},
		{name: "a TCP aggregate with four", packet: func(p *packet) *packet {
			return p.tcp(80, 40000, timestamps...).payload(3000).extended(hopByHop(), destination(), routing(), destination())
		}, skb: aggregate(3, 1000), packets: 3, bytes: 3000 + 3*(72+8+16+24+16)},
		{name: "BIG TCP", packet: func(p *packet) *packet {
			return p.tcp(80, 40000, timestamps...).payload(3500).extended(jumbo(3532 + 8))
		}, broken: []mutation{withoutLength()}, skb: aggregate(7, 500), packets: 7, bytes: 3500 + 7*72},
		{
			name: "an aggregate whose length says nothing", packet: func(p *packet) *packet { return p.tcp(80, 40000).payload(2000) },
			broken: []mutation{set(18, 0xff, 0xff)}, skb: aggregate(2, 1000), packets: 2, bytes: 2000 + 2*60,
		},
		// A packet socket may call anything an aggregate.
		{
			name: "an aggregate of headers alone", packet: func(p *packet) *packet { return p.tcp(80, 40000) },
			skb: aggregate(3, 1000), packets: 1, bytes: 60,
		},
		{name: "an aggregate that is a fragment", packet: func(p *packet) *packet {
			return p.protocol(6).payload(2000).extended(fragmentHeader(150, false))
		}, skb: aggregate(2, 1000), packets: 1, bytes: 2048},
		{
			name: "an aggregate whose TCP header is cut", packet: func(p *packet) *packet { return p.protocol(6).payload(12) },
			skb: aggregate(2, 1000), packets: 1, bytes: 52,
		},
		{
			name: "an aggregate whose extension headers are cut", packet: func(p *packet) *packet { return p.protocol(60).raw([]byte{60}) },
			skb: aggregate(2, 1000), packets: 1, bytes: 41,
		},
		{
			name: "an aggregate whose extension header goes beyond the end", packet: func(p *packet) *packet { return p.protocol(60).raw([]byte{6, 255, 0, 0, 0, 0, 0, 0}) },
			skb: aggregate(2, 1000), packets: 1, bytes: 48,
		},

		// What is no IPv6 packet is nobody's.
		{name: "a length beyond the end", packet: func(p *packet) *packet { return p.udp(53, 40000).payload(100) }, broken: []mutation{set(18, 0, 109)}},
		{
			name: "a length short of the end", packet: func(p *packet) *packet { return p.udp(53, 40000).payload(100) },
			broken: []mutation{set(18, 0, 107)}, packets: 1, bytes: 148,
		},
		{name: "another version", packet: func(p *packet) *packet { return p.udp(53, 40000).payload(100) }, broken: []mutation{set(14, 0x40)}},
		{name: "another EtherType", packet: func(p *packet) *packet {
			return p.udp(53, 40000).payload(100)
		}, broken: []mutation{set(12, 0x88, 0xb5)}},
		{
			name: "a tag within the frame", packet: func(p *packet) *packet { return p.udp(53, 40000).payload(100) },
			broken: []mutation{func(b []byte) []byte { return append(append(append([]byte{}, b[:12]...), 0x81, 0, 0, 5), b[12:]...) }},
		},
	} {
		in := packetCase{name: l.name + ", in", program: overlay6In, packet: l.packet(fromBlue6()), broken: l.broken, skb: l.skb, verdict: passed}
		out := packetCase{name: l.name + ", out", program: overlay6Out, packet: l.packet(toBlue6()), broken: l.broken, skb: l.skb, verdict: passed}
		if l.packets > 0 {
			in.counted = received(blueIP6, "kernel", l.packets, l.bytes)
			out.counted = sent(blueIP6, "kernel", l.packets, l.bytes)
		}
		cases = append(cases, in, out)
	}
	runCases(t, n, cases)
}

// Who is counted is said by the address of the peer's side.
func TestIPv6IsCountedForItsPeer(t *testing.T) {
	n := newNode6(t)
	in := func(name, from, peer string) packetCase {
		c := packetCase{
			name: name + ", in", program: overlay6In, verdict: passed,
			packet: eth(blueMAC6, ourMAC6).ip6(from, ourPod6).udp(53, 40000).payload(52),
		}
		if peer != "" {
			c.counted = received(peer, "kernel", 1, 100)
		}
		return c
	}
	out := func(name, to, peer string) packetCase {
		c := packetCase{
			name: name + ", out", program: overlay6Out, verdict: passed,
			packet: eth(ourMAC6, blueMAC6).ip6(ourPod6, to).udp(40000, 53).payload(52),
		}
		if peer != "" {
			c.counted = sent(peer, "kernel", 1, 100)
		}
		return c
	}
	without := func(c packetCase, given func(*node)) packetCase {
		c.name += ", otherwise"
		c.given, c.counted = given, nil
		return c
	}
	runCases(t, n, []packetCase{
		in("a pod", bluePod6, blueIP6), out("a pod", bluePod6, blueIP6),
		in("a pod in the second prefix", "fd00:10:245:77::1", blueIP6), out("a pod in the second prefix", "fd00:10:245:77::1", blueIP6),
		in("a pod of another peer", greenPod6, greenIP6), out("a pod of another peer", greenPod6, greenIP6),
		in("the last address of a prefix", "fd00:10:244:2:ffff:ffff:ffff:ffff", blueIP6),
		out("the last address of a prefix", "fd00:10:244:2:ffff:ffff:ffff:ffff", blueIP6),
		in("the first behind it", "fd00:10:244:5::", ""), out("the first behind it", "fd00:10:244:5::", ""),
		in("the overlay device", "fd00:10:244:2::", blueIP6), out("the overlay device", "fd00:10:244:2::", blueIP6),
		// A node sends from any of its addresses; what is sent to them does not
		// come by here.
		in("the node", blueIP6, blueIP6), out("the node", blueIP6, ""),
		in("another address of the node", "2001:db8:1::2", blueIP6), out("another address of the node", "2001:db8:1::2", ""),
		in("nobody", strangePod6, ""), out("nobody", strangePod6, ""),
		in("nobody, link-local", "fe80::1", ""), out("everybody", "ff02::1", ""),
		in("a peer that is not served yet", slowPod6, ""), out("a peer that is not served yet", slowPod6, ""),
		in("a node that is not served yet", slowIP6, ""),
		without(in("a pod", bluePod6, ""), func(n *node) { n.inForce(func(f *weftInForce) { f.Prefix6Lengths = 0 }) }),
		without(out("a pod", bluePod6, ""), func(n *node) { n.inForce(func(f *weftInForce) { f.Prefix6Lengths = 0 }) }),
	})
	// IPv4 frames and whatever else are none of its business.
	runCases(t, n, []packetCase{
		{name: "IPv4, in", program: overlay6In, packet: fromBlue(10), verdict: passed},
		{name: "IPv4, out", program: overlay6Out, packet: toBlue(10), verdict: passed},
		{name: "IPv6 on the IPv4 overlay, out", program: overlayOut, packet: toBlue6().udp(1, 2), verdict: passed, reason: weftReasonREASON_INNER_NOT_IPV4},
	})
}

// Prefixes of all lengths are found as a route would be: the longest first, and no
// bit more or less.
func TestIPv6PrefixesOfAnyLength(t *testing.T) {
	n := newNode6(t)
	random := rand.New(rand.NewPCG(1, 2))
	for _, lengths := range [][]int{{0, 1, 2, 3, 31, 32, 33, 34}, {62, 63, 64, 65, 66, 95, 96, 97}, {48, 56, 64, 72, 80, 88, 112, 128}, {125, 126, 127, 128}} {
		target := netip.AddrFrom16([16]byte{0: 0xfd, 1: byte(random.Uint32()), 5: byte(random.Uint32()), 8: 0x80, 11: byte(random.Uint32()), 15: 5})
		n.desired.Peers, n.desired.Known, n.desired.Aliases = nil, nil, nil
		for i, bits := range lengths {
			n.desired.Peers = append(n.desired.Peers, state.Peer{
				Prefix:   netip.PrefixFrom(target, bits).Masked(),
				PublicIP: netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(100 + i)}), MAC: state.MAC{2, 0, 0, 0, 0, byte(i)},
			})
		}
		if misfits := n.sync(); misfits.Len() > 0 {
			t.Fatalf("misfits: %+v", misfits)
		}
		for bit := range 129 { // 128: none
			to := target.As16()
			if bit < 128 {
				to[bit/8] ^= 0x80 >> (bit % 8)
			}
			var want netip.Addr
			longest := -1
			for _, p := range n.desired.Peers {
				if p.Prefix.Contains(netip.AddrFrom16(to)) && p.Prefix.Bits() > longest {
					want, longest = p.PublicIP, p.Prefix.Bits()
				}
			}
			c := packetCase{verdict: passed}
			if longest >= 0 {
				c.counted = sent(want.String(), "kernel", 1, 40)
			}
			in := eth(ourMAC6, blueMAC6).ip6(ourPod6, netip.AddrFrom16(to).String()).protocol(59).bytes(t)
			c.check(t, in, n.run(overlay6Out, in))
			if t.Failed() {
				t.Fatalf("lengths %v, address %v differs from %v at bit %d", lengths, netip.AddrFrom16(to), target, bit)
			}
		}
	}
}
