//go:build linux

package datapath_test

import (
	"bytes"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/weft-net/weft/test/lab"
)

// Pods send packets of established flows, whole ones and broken ones, from a seed.
// What comes to the other pod is byte for byte what comes on the kernel path, with
// one exception: conntrack calls packets with a wrong TCP or UDP checksum invalid,
// and kube-proxy's rules drop those; express leaves it to the receiver to refuse
// them.
func TestExpressDeliversWhatTheKernelDelivers(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	seen := map[bool]fuzzed{}
	playEverywhere(t, lab.Options{Pods: 1}, []expressScenario{{"fuzz", func(t lab.Test, w world) {
		seen[w.express] = fuzz(t, w, seed)
	}}})
	express, kernel := seen[true], seen[false]
	if t.Failed() {
		return
	}
	differ := map[string]int{}
	for id, how := range kernel.how {
		e, k := express.came[id], kernel.came[id]
		if e == k {
			continue
		}
		differ[how]++
		if k != "" || refreshedTransport(e) == e {
			t.Errorf("packet %d (%s) came as\n%x\nby express, and on the kernel path as\n%x", id, how, e, k)
		}
	}
	sent, came := map[string]int{}, map[string]int{}
	for id, how := range kernel.how {
		sent[how]++
		if kernel.came[id] != "" {
			came[how]++
		}
	}
	for _, how := range slices.Sorted(maps.Keys(sent)) {
		t.Logf("%-28s %4d sent, %4d came on the kernel path, %4d came otherwise by express", how, sent[how], came[how], differ[how])
	}
}

// fuzzed is what was done to each packet, and what came of it, by the packet's
// number, which is its IP ID and its direction.
type fuzzed struct {
	how  map[uint32]string
	came map[uint32]string
}

// mutation changes a packet: its IPv4 header, then the rest. Checksums are right
// before; refresh makes them right again.
type mutation struct {
	name   string
	change func(r *rand.Rand, p []byte) []byte
}

func ipHeaderOf(p []byte) int { return int(p[0]&0xf) * 4 }

// refreshIP makes an IPv4 header's checksum right.
func refreshIP(p []byte) []byte {
	p[10], p[11] = 0, 0
	h := p[:min(ipHeaderOf(p), len(p))]
	var sum uint32
	for i := 0; i+1 < len(h); i += 2 {
		sum += uint32(h[i])<<8 | uint32(h[i+1])
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum))
	return p
}

var mutations = []mutation{
	{"none", func(_ *rand.Rand, p []byte) []byte { return p }},
	{"TOS", func(r *rand.Rand, p []byte) []byte { p[1] = byte(r.Uint32()); return refreshIP(p) }},
	{"TTL", func(r *rand.Rand, p []byte) []byte { p[8] = byte(r.IntN(256)); return refreshIP(p) }},
	{"low TTL", func(r *rand.Rand, p []byte) []byte { p[8] = byte(r.IntN(5)); return refreshIP(p) }},
	{"DF", func(_ *rand.Rand, p []byte) []byte { p[6] ^= 0x40; return refreshIP(p) }},
	{"evil bit", func(_ *rand.Rand, p []byte) []byte { p[6] |= 0x80; return refreshIP(p) }},
	{"wrong IP checksum", func(_ *rand.Rand, p []byte) []byte { p[11]++; return p }},
	{"IP version", func(r *rand.Rand, p []byte) []byte { p[0] = p[0]&0xf | byte(r.IntN(16))<<4; return refreshIP(p) }},
	{"IP header length", func(r *rand.Rand, p []byte) []byte { p[0] = p[0]&0xf0 | byte(r.IntN(16)); return refreshIP(p) }},
	{"IP options", func(_ *rand.Rand, p []byte) []byte {
		p[0]++
		p = slices.Insert(p, 20, 1, 1, 1, 0)
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		return refreshIP(p)
	}},
	{"IP total length", func(r *rand.Rand, p []byte) []byte {
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)-20+r.IntN(40)))
		return refreshIP(p)
	}},
	{"padding", func(r *rand.Rand, p []byte) []byte { return append(p, make([]byte, 1+r.IntN(20))...) }},
	{"cut off", func(r *rand.Rand, p []byte) []byte { return p[:r.IntN(len(p)-20)+20] }},
	{"wrong transport checksum", func(_ *rand.Rand, p []byte) []byte {
		p[20+map[byte]int{6: 17, 17: 7}[p[9]]] ^= 0x5a
		return p
	}},
	{"other source port", func(_ *rand.Rand, p []byte) []byte { p[21]++; return p }},
	{"transport header length", func(r *rand.Rand, p []byte) []byte {
		if p[9] == 6 {
			return fixTCP(p, func(tcp []byte) { tcp[12] = byte(r.IntN(16)) << 4 })
		}
		binary.BigEndian.PutUint16(p[24:], uint16(r.IntN(len(p))))
		return p
	}},
	{"no UDP checksum", func(_ *rand.Rand, p []byte) []byte {
		if p[9] == 17 {
			p[26], p[27] = 0, 0
		}
		return p
	}},
	{"TCP flags", func(r *rand.Rand, p []byte) []byte {
		if p[9] != 6 {
			return p
		}
		// Not SYN, FIN and RST: the flow is to last. ACK, PSH, URG, ECE, CWR.
		return fixTCP(p, func(tcp []byte) { tcp[13] = tcp[13]&^0xe8 | byte(r.Uint32())&0xe8 | 0x10 })
	}},
	{"no TCP flags", func(_ *rand.Rand, p []byte) []byte {
		if p[9] != 6 {
			return p
		}
		return fixTCP(p, func(tcp []byte) { tcp[13] = 0 })
	}},
	{"reserved TCP bits", func(r *rand.Rand, p []byte) []byte {
		if p[9] != 6 {
			return p
		}
		return fixTCP(p, func(tcp []byte) { tcp[12] |= byte(r.IntN(16)) })
	}},
	{"fragment", func(r *rand.Rand, p []byte) []byte {
		binary.BigEndian.PutUint16(p[6:], uint16(r.IntN(2))<<13|uint16(r.IntN(2)*r.IntN(100)))
		return refreshIP(p)
	}},
	{"protocol", func(r *rand.Rand, p []byte) []byte { p[9] = byte(r.IntN(256)); return refreshIP(p) }},
	{"noise", func(r *rand.Rand, p []byte) []byte {
		for range 1 + r.IntN(3) {
			at := 1 + r.IntN(len(p)-1)
			if at != 4 && at != 5 && (at < 12 || at > 19) && at != 33 { // number, addresses, TCP flags
				p[at] = byte(r.Uint32())
			}
		}
		return p
	}},
}

// fixTCP changes a TCP header and makes the checksum right.
func fixTCP(p []byte, change func(tcp []byte)) []byte {
	change(p[20:])
	return refreshTransport(p)
}

// refreshTransport makes the checksum of TCP or UDP right.
func refreshTransport(p []byte) []byte {
	check := p[20+map[byte]int{6: 16, 17: 6}[p[9]]:][:2]
	check[0], check[1] = 0, 0
	sum := uint32(p[9]) + uint32(len(p)-20)
	for i := 12; i < len(p); i += 2 {
		sum += uint32(p[i]) << 8
		if i+1 < len(p) {
			sum += uint32(p[i+1])
		}
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(check, ^uint16(sum))
	return p
}

// refreshedTransport is what a packet would be with a right checksum.
func refreshedTransport(p string) string {
	if p[9] == 6 && len(p) < 40 || p[9] == 17 && len(p) < 28 || p[9] != 6 && p[9] != 17 {
		return p
	}
	return string(refreshTransport([]byte(p)))
}

const fuzzTCPPort, fuzzUDPPort = 1000, 2000

// fuzzPacket is a whole packet of one of the two flows.
func fuzzPacket(from, to netip.Addr, id uint16, payload []byte, tcp *layers.TCP) []byte {
	ip := &layers.IPv4{Version: 4, TTL: 64, Id: id, SrcIP: from.AsSlice(), DstIP: to.AsSlice(), Protocol: layers.IPProtocolTCP}
	if tcp != nil {
		tcp.SrcPort, tcp.DstPort, tcp.Window = fuzzTCPPort, fuzzTCPPort, 65000
		_ = tcp.SetNetworkLayerForChecksum(ip) // it is one
		return serialized(ip, tcp, gopacket.Payload(payload))
	}
	ip.Protocol = layers.IPProtocolUDP
	udp := &layers.UDP{SrcPort: fuzzUDPPort, DstPort: fuzzUDPPort}
	_ = udp.SetNetworkLayerForChecksum(ip) // it is one
	return serialized(ip, udp, gopacket.Payload(payload))
}

// fuzz lets two pods, whose kernels are kept out of it, send each other packets.
func fuzz(t lab.Test, w world, seed uint64) fuzzed {
	const packets = 3000 // in each direction
	pods := []*lab.Pod{w.Pod(1, 1), w.Pod(2, 1)}
	f := fuzzed{map[uint32]string{}, map[uint32]string{}}
	var mu sync.Mutex
	senders := make([]func(...[]byte) error, len(pods))
	for i, p := range pods {
		sender, end, err := frameSender(p)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(end)
		senders[i] = sender
		mustNft(t, p, "add table ip quiet; add chain ip quiet c { type filter hook prerouting priority -400; }; add rule ip quiet c ip saddr 10.244.0.0/16 drop")
		tapped(t, p, func(ip []byte) {
			mu.Lock()
			defer mu.Unlock()
			id := uint32(1-i)<<16 | uint32(binary.BigEndian.Uint16(ip[4:]))
			if bytes.Equal(ip[12:16], pods[1-i].IP.AsSlice()) && f.how[id] != "" {
				f.came[id] += string(ip)
			}
		})
	}
	send := func(i int, packets ...[]byte) {
		t.Helper()
		gateway := pods[i].Node.Gateway.As4()
		var frames [][]byte
		for _, p := range packets {
			frame := append(append([]byte{0x0a, 0x58}, gateway[:]...), pods[i].MAC[:]...)
			frames = append(frames, append(append(frame, 8, 0), p...))
		}
		if err := senders[i](frames...); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Microsecond)
	}
	next := [2]uint32{1000, 5000} // sequence numbers
	segment := func(i int, id uint16, payload []byte, change func(*layers.TCP)) []byte {
		tcp := &layers.TCP{Seq: next[i], Ack: next[1-i], ACK: true, PSH: true}
		if change != nil {
			change(tcp)
		}
		return fuzzPacket(pods[i].IP, pods[1-i].IP, id, payload, tcp)
	}
	send(0, segment(0, 0, nil, func(tcp *layers.TCP) { tcp.SYN, tcp.ACK, tcp.PSH, tcp.Ack = true, false, false, 0 }))
	time.Sleep(20 * time.Millisecond)
	next[0]++
	send(1, segment(1, 0, nil, func(tcp *layers.TCP) { tcp.SYN, tcp.PSH = true, false }))
	time.Sleep(20 * time.Millisecond)
	next[1]++
	warm := func() {
		for i := range pods {
			send(i, segment(i, 0, nil, nil), fuzzPacket(pods[i].IP, pods[1-i].IP, 0, []byte("warm"), nil))
		}
	}
	for end := time.Now().Add(assuredAfter); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		warm()
	}
	w.mustComeToTake(t, everyEnd, func() {
		for range 20 {
			warm()
		}
	})

	r := rand.New(rand.NewPCG(seed, 0))
	w.mustSome(t, func() {
		for i := range pods {
			var batch [][]byte
			for id := range packets {
				payload := make([]byte, r.IntN(1300))
				for j := range payload {
					payload[j] = byte(r.Uint32())
				}
				var p []byte
				if r.IntN(2) == 0 {
					p = segment(i, uint16(id+1), payload, nil)
				} else {
					p = fuzzPacket(pods[i].IP, pods[1-i].IP, uint16(id+1), payload, nil)
				}
				m := mutations[r.IntN(len(mutations))]
				what := "UDP"
				if p[9] == 6 {
					what = "TCP"
				}
				mu.Lock()
				f.how[uint32(i)<<16|uint32(id+1)] = what + ": " + m.name
				mu.Unlock()
				if batch = append(batch, m.change(r, p)); len(batch) == 20 {
					send(i, batch...)
					warm()
					batch = nil
				}
			}
			send(i, batch...)
		}
	})
	time.Sleep(200 * time.Millisecond)
	mu.Lock()
	defer mu.Unlock()
	if len(f.came) < packets {
		t.Errorf("only %d packets came", len(f.came))
	}
	came := maps.Clone(f.came)
	return fuzzed{f.how, came}
}
