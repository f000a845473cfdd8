//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/test/lab"
)

// outerFrame is a VXLAN packet as a peer sends it, from its pod to one of ours,
// before it is put into bytes.
type outerFrame struct {
	eth      layers.Ethernet
	ip       layers.IPv4
	udp      layers.UDP
	vxlan    layers.VXLAN
	innerEth layers.Ethernet
	innerIP  layers.IPv4
	innerUDP layers.UDP
	payload  string

	vlan  []byte                            // a tag, with its protocol
	bytes []func(frame []byte) []byte       // changes of the finished frame
	cut   func(frame []byte) (all [][]byte) // into what is really sent; nil: as it is
}

// Offsets in a finished frame without tag and options.
const (
	atIP      = 14
	atUDP     = atIP + 20
	atVXLAN   = atUDP + 8
	atInner   = atVXLAN + 8
	atInnerIP = atInner + 14
)

// frameTo makes a frame as the peer sends it to the node's first pod.
func frameTo(n, peer *lab.Node, payload string) *outerFrame {
	uplinkMAC := func(n *lab.Node) net.HardwareAddr { return append([]byte{0x0a, 0x58}, n.IP.AsSlice()...) }
	f := &outerFrame{
		eth:      layers.Ethernet{SrcMAC: uplinkMAC(peer), DstMAC: uplinkMAC(n), EthernetType: layers.EthernetTypeIPv4},
		ip:       layers.IPv4{Version: 4, TTL: 64, Id: 1, Protocol: layers.IPProtocolUDP, SrcIP: peer.IP.AsSlice(), DstIP: n.IP.AsSlice()},
		udp:      layers.UDP{SrcPort: 40000, DstPort: 8472},
		vxlan:    layers.VXLAN{ValidIDFlag: true, VNI: 1},
		innerEth: layers.Ethernet{SrcMAC: peer.MAC[:], DstMAC: n.MAC[:], EthernetType: layers.EthernetTypeIPv4},
		innerIP:  layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: peer.Pods[0].IP.AsSlice(), DstIP: n.Pods[0].IP.AsSlice()},
		innerUDP: layers.UDP{SrcPort: 5000, DstPort: framePort},
		payload:  payload,
	}
	return f
}

// framePort is where the pod listens.
const framePort = 7777

// mustBytes puts the frame into bytes; lengths and checksums are right but for
// the changes.
func (f *outerFrame) mustBytes(tb testing.TB) [][]byte {
	tb.Helper()
	if err := errors.Join(f.udp.SetNetworkLayerForChecksum(&f.ip), f.innerUDP.SetNetworkLayerForChecksum(&f.innerIP)); err != nil {
		tb.Fatal(err)
	}
	buffer := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&f.eth, &f.ip, &f.udp, &f.vxlan, &f.innerEth, &f.innerIP, &f.innerUDP, gopacket.Payload(f.payload))
	if err != nil {
		tb.Fatal(err)
	}
	frame := buffer.Bytes()
	for _, change := range f.bytes {
		frame = change(frame)
	}
	if f.vlan != nil {
		frame = append(append(append([]byte{}, frame[:12]...), f.vlan...), frame[12:]...)
	}
	if f.cut != nil {
		return f.cut(frame)
	}
	return [][]byte{frame}
}

// setIPChecksum makes the outer IP header's checksum right.
func setIPChecksum(frame []byte) []byte {
	header := frame[atIP : atIP+20]
	header[10], header[11] = 0, 0
	var sum uint32
	for i := 0; i < len(header); i += 2 {
		sum += uint32(header[i])<<8 | uint32(header[i+1])
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	header[10], header[11] = byte(^sum>>8), byte(^sum)
	return frame
}

// fragments cuts the outer packet in two, behind the VXLAN header.
func fragments(frame []byte) [][]byte {
	const at = atIP + 20 + 40
	first := append([]byte{}, frame[:at]...)
	second := append(append([]byte{}, frame[:atIP+20]...), frame[at:]...)
	first[atIP+6] = 0x20 // more fragments
	second[atIP+7] = 40 / 8
	for _, f := range [][]byte{first, second} {
		length := len(f) - atIP
		f[atIP+2], f[atIP+3] = byte(length>>8), byte(length)
		setIPChecksum(f)
	}
	return [][]byte{first, second}
}

// set changes a byte of the finished frame.
func set(at int, value byte) func([]byte) []byte {
	return func(frame []byte) []byte { frame[at] = value; return frame }
}

// noOuterSum takes the outer UDP checksum away.
func noOuterSum(frame []byte) []byte {
	frame[atUDP+6], frame[atUDP+7] = 0, 0
	return frame
}

// frameCase is a well-formed frame and one change.
type frameCase struct {
	name   string
	change func(f *outerFrame)
	// reason is counted by a weft node: passed in observe, and in enforce also
	// dropped if refused is set.
	reason  string
	refused bool
	// trusted tells that weft delivers it although a plain node does not; the
	// comment at the case says why that is right.
	trusted bool
}

func ip4(s string) net.IP { return netip.MustParseAddr(s).AsSlice() }

var frameCases = []frameCase{
	{name: "well-formed", change: func(*outerFrame) {}},
	{name: "without outer checksum", change: func(f *outerFrame) { f.bytes = append(f.bytes, noOuterSum) }},
	{name: "from an unknown address", change: func(f *outerFrame) { f.ip.SrcIP = ip4("192.0.2.99") }, reason: "source_unknown_peer", refused: true},
	{name: "from beyond the gateway", change: func(f *outerFrame) { f.ip.SrcIP = ip4("203.0.113.7") }, reason: "source_unknown_peer", refused: true},
	{name: "with a third node's pod as inner source", change: func(f *outerFrame) { f.innerIP.SrcIP = ip4("10.244.3.2") }, reason: "source_not_its_prefix", refused: true},
	{name: "with a client of the Internet as inner source", change: func(f *outerFrame) { f.innerIP.SrcIP = ip4("203.0.113.7") }, reason: "source_not_its_prefix", refused: true},
	{name: "with our own pod as inner source", change: func(f *outerFrame) { f.innerIP.SrcIP = ip4("10.244.1.3") }, reason: "source_not_its_prefix", refused: true},
	{name: "with the peer's own address as inner source", change: func(f *outerFrame) { f.innerIP.SrcIP = ip4("192.0.2.12") }},
	{name: "with the peer's overlay address as inner source", change: func(f *outerFrame) { f.innerIP.SrcIP = ip4("10.244.2.0") }},
	{name: "in fragments", change: func(f *outerFrame) { f.cut = fragments }, reason: "source_unseen", refused: true},
	{name: "in fragments from an unknown address", change: func(f *outerFrame) { f.ip.SrcIP = ip4("192.0.2.99"); f.cut = fragments }, reason: "source_unseen", refused: true},
	{name: "with outer IP options", change: func(f *outerFrame) {
		f.ip.Options = []layers.IPv4Option{{OptionType: 1}, {OptionType: 1}, {OptionType: 1}, {OptionType: 0}}
	}, reason: "source_unseen", refused: true},
	{name: "tagged with VLAN 5", change: func(f *outerFrame) { f.vlan = []byte{0x81, 0, 0, 5} }, reason: "outer_vlan"},
	{name: "tagged with a priority only", change: func(f *outerFrame) { f.vlan = []byte{0x81, 0, 0x60, 0} }, reason: "outer_vlan", refused: true},
	{name: "of another network", change: func(f *outerFrame) { f.vxlan.VNI = 2 }, reason: "vxlan_vni"},
	{name: "to another port", change: func(f *outerFrame) { f.udp.DstPort = 8473 }},
	{name: "with a wrong outer IP checksum", change: func(f *outerFrame) {
		f.bytes = append(f.bytes, func(b []byte) []byte { b[atIP+10] ^= 0x55; return b })
	}, reason: "outer_checksum"},
	// The inner packet's own checksum is right, and the pod verifies it.
	{name: "with a wrong outer UDP checksum", trusted: true, change: func(f *outerFrame) {
		f.bytes = append(f.bytes, func(b []byte) []byte { b[atUDP+6] ^= 0x55; return b })
	}},
	{name: "with a wrong outer UDP checksum and no inner one", reason: "inner_unprotected", change: func(f *outerFrame) {
		f.bytes = append(f.bytes, func(b []byte) []byte {
			b[atUDP+6] ^= 0x55
			b[atInnerIP+26], b[atInnerIP+27] = 0, 0
			return b
		})
	}},
	{name: "damaged on the way", change: func(f *outerFrame) {
		f.bytes = append(f.bytes, func(b []byte) []byte { b[len(b)-1] ^= 0x55; return b })
	}},
	{name: "with an unknown VXLAN flag", change: func(f *outerFrame) { f.bytes = append(f.bytes, noOuterSum, set(atVXLAN, 0x0c)) }, reason: "vxlan_flags"},
	{name: "without a VNI", change: func(f *outerFrame) { f.bytes = append(f.bytes, noOuterSum, set(atVXLAN, 0)) }, reason: "vxlan_flags"},
	{name: "with a reserved bit behind the VNI", change: func(f *outerFrame) { f.bytes = append(f.bytes, noOuterSum, set(atVXLAN+7, 1)) }, reason: "vxlan_flags"},
	{name: "with padding behind it", change: func(f *outerFrame) {
		f.bytes = append(f.bytes, func(b []byte) []byte { return append(b, 0, 0, 0, 0) })
	}, reason: "outer_length", refused: true},
	{name: "cut short", change: func(f *outerFrame) {
		f.bytes = append(f.bytes, func(b []byte) []byte { return b[:len(b)-4] })
	}, reason: "outer_length"},
	{name: "to another machine's MAC", change: func(f *outerFrame) { f.eth.DstMAC[2]++ }, reason: "outer_not_for_host"},
	{name: "to a second address of the node", change: func(f *outerFrame) { f.ip.DstIP = ip4("192.0.2.211") }, reason: "outer_address", refused: true},
	{name: "to the underlay's broadcast address", change: func(f *outerFrame) { f.ip.DstIP = ip4("192.0.2.255") }, reason: "outer_address", refused: true},
	{name: "with another inner MAC", change: func(f *outerFrame) { f.innerEth.DstMAC = net.HardwareAddr{2, 0, 0, 0, 0, 9} }, reason: "inner_mac"},
	{name: "with a broadcast inner MAC", change: func(f *outerFrame) { f.innerEth.DstMAC = layers.EthernetBroadcast }, reason: "inner_mac"},
	{name: "as if we had sent it", change: func(f *outerFrame) { f.innerEth.SrcMAC = f.innerEth.DstMAC }, reason: "inner_mac"},
	{name: "congested, and the inner packet can carry the mark", change: func(f *outerFrame) { f.ip.TOS = 3; f.innerIP.TOS = 2 }},
	{name: "congested, but the inner packet can't carry the mark", change: func(f *outerFrame) { f.ip.TOS = 3 }, reason: "ecn_congested"},
	{name: "with one hop left within", change: func(f *outerFrame) { f.innerIP.TTL = 1 }},
	{name: "with one hop left outside", change: func(f *outerFrame) { f.ip.TTL = 1 }},
	{name: "with a wrong inner IP checksum", change: func(f *outerFrame) {
		f.bytes = append(f.bytes, noOuterSum, func(b []byte) []byte { b[atInnerIP+10] ^= 0x55; return b })
	}},
	{name: "with an inner length beyond its end", change: func(f *outerFrame) { f.bytes = append(f.bytes, noOuterSum, set(atInnerIP+2, 2)) }, reason: "inner_malformed"},
}

// copies is how often each frame is sent: single packets of a base flow take
// the kernel path to renew the proof, and say nothing of the base path.
const copies = 4

// Frames that no stock peer sends, or that come from where they should not,
// arrive as they do at a plain kernel node, or are refused and counted:
//
//	underlay br0 --- raw frames "from n2" ---> n1 --> pod n1/p1 listens
func TestStrangeOuterPackets(t *testing.T) {
	t.Parallel()
	var plain map[string]int
	for _, node := range []struct {
		name  string
		kind  lab.Kind
		flags []string
	}{
		{"plain kernel", lab.Kernel, nil},
		{"observe", lab.Weft, []string{"--source-check", "observe"}},
		{"enforce", lab.Weft, []string{"--source-check", "enforce"}},
		{"off", lab.Weft, []string{"--source-check", "off"}},
	} {
		t.Run(node.name, func(t *testing.T) {
			arrived, counted := mustSendFrames(t, node.kind, node.flags)
			if node.kind == lab.Kernel {
				plain = arrived
				t.Log(arrived)
				return
			}
			for _, c := range frameCases {
				t.Run(c.name, func(t *testing.T) {
					enforced := node.name == "enforce" && c.refused
					want := plain[c.name]
					if enforced {
						want = 0
					}
					if got := arrived[c.name]; got != want && (!c.trusted || got != copies) {
						t.Errorf("%d of %d arrived, want %d (%d with a plain kernel node); counted: %v", got, copies, want, plain[c.name], counted[c.name])
					}
					isSource := strings.HasPrefix(c.reason, "source_")
					if c.reason == "" || node.name == "off" && isSource {
						return
					}
					n, of := counted[c.name][c.reason].Passed, "passed"
					switch {
					case enforced && isSource:
						n, of = counted[c.name][c.reason].Dropped, "dropped"
					case enforced: // passed by uplink_in, refused behind the VXLAN device
						n, of = counted[c.name]["source_unseen"].Dropped, "dropped (source_unseen)"
					}
					if n < copies-2 {
						t.Errorf("%d %s for %s, want %d; counted: %v", n, of, c.reason, copies, counted[c.name])
					}
				})
			}
		})
	}
}

// mustSendFrames sends all frames to a node and returns how many of each have
// arrived in its pod, and what was counted for each.
func mustSendFrames(t *testing.T, kind lab.Kind, flags []string) (arrived map[string]int, counted map[string]map[string]dataplane.ReasonCount) {
	t.Helper()
	lt, l := newLab(t, lab.Options{Nodes: 3, Pods: 2, Kinds: []lab.Kind{kind, lab.Bare}, AgentFlags: flags})
	n1, n2 := l.Node(1), l.Node(2)
	mustPeerWithOne(t, n2, n1)
	lt.Run(n1, "ip address add 192.0.2.211/24 dev eth0")
	if kind == lab.Weft {
		mustUseBase(t, l.Pod(2, 1), l.Pod(1, 1))
	}
	probe, err := lab.StartProbe(l.Pod(2, 1), l.Pod(1, 1), lab.ProbeOptions{Interval: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = probe.Stop() }()
	received := mustListen(t, l.Pod(1, 1))
	fd := mustPacketSocket(t, l.Underlay, "br0")
	defer unix.Close(fd)

	counted = map[string]map[string]dataplane.ReasonCount{}
	var before dataplane.Report
	base := func() uint64 { return mustPath(t, n1, n2, "base").RxPackets }
	if kind == lab.Weft {
		before = mustStatus(t, n1)
	}
	first := uint64(0)
	if kind == lab.Weft {
		first = base()
	}
	for _, c := range frameCases {
		for i := range copies {
			f := frameTo(n1, n2, fmt.Sprintf("%s #%d", c.name, i))
			f.ip.Id = uint16(i + 1)
			c.change(f)
			for _, frame := range f.mustBytes(t) {
				if _, err := unix.Write(fd, frame); err != nil {
					t.Fatalf("%s: %v", c.name, err)
				}
			}
		}
		if kind == lab.Weft {
			time.Sleep(20 * time.Millisecond)
			after := mustStatus(t, n1)
			counted[c.name] = grown(before, after)
			before = after
		}
	}
	if kind == lab.Weft && base() == first {
		t.Error("the base path of n1 carried nothing")
	}
	time.Sleep(200 * time.Millisecond)
	return received(), counted
}

// grown are the reasons counted between two reports.
func grown(before, after dataplane.Report) map[string]dataplane.ReasonCount {
	changes := map[string]dataplane.ReasonCount{}
	for i, r := range after.Reasons {
		r.Help = ""
		r.Passed -= before.Reasons[i].Passed
		r.Dropped -= before.Reasons[i].Dropped
		if r.Passed > 0 || r.Dropped > 0 {
			changes[r.Name] = r
		}
	}
	return changes
}

// mustListen listens in a pod and returns a function that tells how many frames
// of each name have come.
func mustListen(tb testing.TB, p *lab.Pod) (received func() map[string]int) {
	tb.Helper()
	var conn *net.UDPConn
	err := p.Do(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: framePort})
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	var (
		mu      sync.Mutex
		names   = map[string]int{}
		reading sync.WaitGroup
	)
	reading.Go(func() {
		buffer := make([]byte, 2048)
		for {
			n, _, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			name, _, _ := strings.Cut(string(buffer[:n]), " #")
			mu.Lock()
			names[name]++
			mu.Unlock()
		}
	})
	tb.Cleanup(func() { conn.Close(); reading.Wait() })
	return func() map[string]int {
		mu.Lock()
		defer mu.Unlock()
		out := map[string]int{}
		for name, n := range names {
			out[name] = n
		}
		return out
	}
}
