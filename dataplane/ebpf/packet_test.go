//go:build linux

package ebpf

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// A packet is said from the outside in, and what each layer doesn't say is as a
// stock peer would have it:
//
//	eth(ourMAC, peerMAC).ip("10.244.1.5", "10.244.2.7").udp(40000, 53).payload(100)
type packet struct{ layers []gopacket.SerializableLayer }

func eth(src, dst string) *packet {
	return &packet{[]gopacket.SerializableLayer{&ethernet{layers.Ethernet{
		SrcMAC: mustMAC(src), DstMAC: mustMAC(dst), EthernetType: layers.EthernetTypeIPv4,
	}}}}
}

// ethernet is a header without the padding to 60 bytes that a wire has: neither
// virtual devices nor tunnels pad.
type ethernet struct{ layers.Ethernet }

func (e *ethernet) SerializeTo(b gopacket.SerializeBuffer, _ gopacket.SerializeOptions) error {
	header, err := b.PrependBytes(14)
	if err != nil {
		return err
	}
	copy(header, e.DstMAC)
	copy(header[6:], e.SrcMAC)
	binary.BigEndian.PutUint16(header[12:], uint16(e.EthernetType))
	return nil
}

// of sets the EtherType.
func (p *packet) of(kind layers.EthernetType) *packet {
	p.layers[len(p.layers)-1].(*ethernet).EthernetType = kind
	return p
}

func (p *packet) add(l gopacket.SerializableLayer) *packet {
	p.layers = append(p.layers, l)
	return p
}

// ip adds an IPv4 header; with changes it before lengths and checksums are
// computed.
func (p *packet) ip(src, dst string, with ...func(*layers.IPv4)) *packet {
	ip := &layers.IPv4{
		Version: 4, TTL: 64, Id: 0x1234,
		SrcIP: net.ParseIP(src).To4(), DstIP: net.ParseIP(dst).To4(),
	}
	for _, change := range with {
		change(ip)
	}
	return p.add(ip)
}

// ip6 adds an IPv6 header; with changes it before lengths are computed.
func (p *packet) ip6(src, dst string, with ...func(*layers.IPv6)) *packet {
	ip := &layers.IPv6{Version: 6, HopLimit: 64, SrcIP: net.ParseIP(src), DstIP: net.ParseIP(dst)}
	for _, change := range with {
		change(ip)
	}
	return p.of(layers.EthernetTypeIPv6).add(ip)
}

// carries sets the protocol of the innermost IP header.
func (p *packet) carries(protocol layers.IPProtocol) gopacket.NetworkLayer {
	for _, l := range slices.Backward(p.layers) {
		switch ip := l.(type) {
		case *layers.IPv4:
			ip.Protocol = protocol
			return ip
		case *layers.IPv6:
			ip.NextHeader = protocol
			return ip
		}
	}
	panic("no IP header")
}

func (p *packet) udp(src, dst uint16) *packet {
	ip := p.carries(layers.IPProtocolUDP)
	udp := &layers.UDP{SrcPort: layers.UDPPort(src), DstPort: layers.UDPPort(dst)}
	mustSum(udp, ip)
	return p.add(udp)
}

// mustSum tells a transport header whose addresses its checksum covers.
func mustSum(l interface {
	SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
}, ip gopacket.NetworkLayer,
) {
	if err := l.SetNetworkLayerForChecksum(ip); err != nil {
		panic(err)
	}
}

// uncheckedUDP is a UDP header with the checksum 0, which means none.
type uncheckedUDP struct{ *layers.UDP }

func (u uncheckedUDP) SerializeTo(b gopacket.SerializeBuffer, o gopacket.SerializeOptions) error {
	o.ComputeChecksums = false
	return u.UDP.SerializeTo(b, o)
}

func (p *packet) udpWithoutChecksum(src, dst uint16) *packet {
	p.carries(layers.IPProtocolUDP)
	return p.add(uncheckedUDP{&layers.UDP{SrcPort: layers.UDPPort(src), DstPort: layers.UDPPort(dst)}})
}

// tcp adds a TCP header of a connection that is established.
func (p *packet) tcp(src, dst uint16, options ...layers.TCPOption) *packet {
	ip := p.carries(layers.IPProtocolTCP)
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(src), DstPort: layers.TCPPort(dst),
		Seq: 1000, Ack: 2000, ACK: true, PSH: true, Window: 500, Options: options,
	}
	mustSum(tcp, ip)
	return p.add(tcp)
}

// timestamps is the option that nearly every TCP segment has, with the two
// bytes that align it.
var timestamps = []layers.TCPOption{
	{OptionType: layers.TCPOptionKindNop},
	{OptionType: layers.TCPOptionKindNop},
	{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)},
}

func (p *packet) ping(sequence uint16) *packet {
	p.carries(layers.IPProtocolICMPv4)
	return p.add(&layers.ICMPv4{
		TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0), Id: 77, Seq: sequence,
	})
}

// protocol makes the innermost IPv4 packet one that nobody knows.
func (p *packet) protocol(number uint8) *packet {
	p.carries(layers.IPProtocol(number))
	return p
}

func (p *packet) vxlan(vni uint32) *packet {
	return p.add(&layers.VXLAN{ValidIDFlag: true, VNI: vni})
}

// payload adds n bytes that differ from each other.
func (p *packet) payload(n int) *packet {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i*7 + 1)
	}
	return p.add(gopacket.Payload(data))
}

// raw adds bytes as they are.
func (p *packet) raw(data []byte) *packet { return p.add(gopacket.Payload(data)) }

// around puts what p says before inner.
func (p *packet) around(inner *packet) *packet {
	p.layers = append(p.layers, inner.layers...)
	return p
}

// bytes are the packet as it lies on the wire, changed by mutations in order.
func (p *packet) bytes(tb testing.TB, mutations ...mutation) []byte {
	tb.Helper()
	b := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, p.layers...); err != nil {
		tb.Fatalf("building a packet: %v", err)
	}
	out := bytes.Clone(b.Bytes())
	for _, mutate := range mutations {
		out = mutate(out)
	}
	return out
}

// Header changes for ip.

func tos(value uint8) func(*layers.IPv4) { return func(ip *layers.IPv4) { ip.TOS = value } }
func ttl(value uint8) func(*layers.IPv4) { return func(ip *layers.IPv4) { ip.TTL = value } }
func id(value uint16) func(*layers.IPv4) { return func(ip *layers.IPv4) { ip.Id = value } }

func dontFragment(ip *layers.IPv4) { ip.Flags |= layers.IPv4DontFragment }

func firstFragment(ip *layers.IPv4) { ip.Flags |= layers.IPv4MoreFragments }

func laterFragment(ip *layers.IPv4) { ip.FragOffset = 100 }

func recordRoute(ip *layers.IPv4) {
	ip.Options = []layers.IPv4Option{{OptionType: 7, OptionLength: 7, OptionData: []byte{4, 0, 0, 0, 0}}, {OptionType: 0}}
}

// Where headers begin in a VXLAN packet without outer options.
const (
	atIP      = 14
	atUDP     = atIP + 20
	atVXLAN   = atUDP + 8
	atInner   = atVXLAN + 8
	atInnerIP = atInner + 14
)

// mutation makes a well-formed packet a malformed one.
type mutation func([]byte) []byte

// set writes bytes at an offset and leaves all checksums as they were.
func set(at int, value ...byte) mutation {
	return func(p []byte) []byte {
		copy(p[at:at+len(value)], value)
		return p
	}
}

// setIP writes bytes at an offset of the IPv4 header at ip, and makes that
// header's checksum right again.
func setIP(ip, at int, value ...byte) mutation {
	return func(p []byte) []byte {
		copy(p[ip+at:], value)
		header := p[ip:min(len(p), ip+max(20, int(p[ip]&15)*4))]
		copy(header[10:], []byte{0, 0})
		binary.BigEndian.PutUint16(header[10:], ^onesSum(header))
		return p
	}
}

// trailer adds n bytes behind the packet.
func trailer(n int) mutation { return func(p []byte) []byte { return append(p, make([]byte, n)...) } }

// onesSum is the ones' complement sum of RFC 1071, folded to 16 bits.
func onesSum(data []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	if len(data)%2 == 1 {
		sum += uint32(data[len(data)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// udpChecksumRight tells whether the UDP packet that follows a 20-byte IPv4
// header has the checksum it should have.
func udpChecksumRight(ip []byte) bool {
	pseudo := append(bytes.Clone(ip[12:20]), 0, 17, ip[24], ip[25])
	return onesSum(append(pseudo, ip[20:]...)) == 0xffff
}

func mustMAC(text string) net.HardwareAddr {
	mac, err := net.ParseMAC(text)
	if err != nil {
		panic(err)
	}
	return mac
}

func addr(text string) netip.Addr { return netip.MustParseAddr(text) }

func mustPrefix(text string) netip.Prefix { return netip.MustParsePrefix(text) }
