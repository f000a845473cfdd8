//go:build linux

package ebpf

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// Flows of all shapes, with packets of all sizes: what express makes of them is
// what plain Go computes.
func TestRandomPacketsByExpress(t *testing.T) {
	n := newPodNode(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const flows = 150
	var begun []flow
	for i := range flows {
		begun = append(begun, randomFlow(random, i))
	}
	n.reset()
	n.tracked(begun...)
	for i, f := range begun {
		for _, sent := range []flow{f, f.answers()} {
			n.tb = t
			n.nextPacket()
			p, tosByte := randomPacket(random, sent)
			if toBE32(addr(ourPod)) == sent.before().Saddr {
				n.witness(sent, func(w *weftWitness) { w.Mark, w.Priority, w.Hash = random.Uint32(), random.Uint32(), random.Uint32() })
				w, _ := n.witnessOf(sent)
				in := p(podMAC, gatewayMAC)
				got := n.run(podIn, in)
				packetCase{verdict: redirected, counted: sentBy(in)}.check(t, in, got)
				if got.verdict == redirected {
					mustLeaveByExpress(t, n, in, got, blueIP, blueMAC, w)
				}
			} else {
				n.witnessed(sent)
				frame := p(blueMAC, ourMAC)
				outer := uint8(random.IntN(4))
				if outer == 3 && tosByte&3 == 0 {
					outer = 0 // the kernel's to drop
				}
				in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(outer)).udpWithoutChecksum(50000, 8472).vxlan(1).raw(frame).bytes(t)
				got := n.run(uplinkIn, in)
				packetCase{verdict: redirected, counted: received(blueIP, "express", 1, uint64(len(frame)-14))}.check(t, in, got)
				mustBeDelivered(t, frame, got, sent.as(), decapsulated(tosByte, outer))
				got = n.run(overlayIn, frame, n.stampedAs("good"))
				packetCase{verdict: redirected, counted: received(blueIP, "express", 1, uint64(len(frame)-14))}.check(t, frame, got)
				mustBeDelivered(t, frame, got, sent.as(), tosByte)
			}
			if t.Failed() {
				t.Fatalf("flow %d: begun %+v, sent %+v", i, f, sent)
			}
		}
	}
}

// nextPacket is reset for one more packet of flows that are established.
func (n *node) nextPacket() {
	n.tb.Helper()
	n.beat(func(*weftPulse) {})
	n.peerState(blueIP, func(s *weftPeerState) { *s = weftPeerState{RxProven: fresh(), TxProven: fresh()} })
}

func sentBy(in []byte) map[string]PathCounters {
	return sent(blueIP, "express", 1, uint64(len(in)-14))
}

// randomFlow is one between our pod and blue's, begun by either, with any NAT
// that leaves it so. Each index has its own ports.
func randomFlow(random *rand.Rand, i int) flow {
	f := flow{protocol: unix.IPPROTO_TCP}
	if random.IntN(2) == 0 {
		f.protocol = unix.IPPROTO_UDP
	}
	port := func(base int) int { return base + i }
	at := func(ip string, base int) string { return fmt.Sprintf("%s:%d", ip, port(base)) }
	service := fmt.Sprintf("10.96.%d.%d", random.IntN(256), 1+random.IntN(254))
	blues := fmt.Sprintf("10.244.%d.%d", []int{2, 20}[random.IntN(2)], 2+random.IntN(250))
	f.from, f.to = at(ourPod, 10000), at(blues, 1024)
	masqueraded := []string{at("10.244.1.0", 40000), at(ourPod, 40000)}
	if random.IntN(2) == 0 {
		f.from, f.to = at(blues, 10000), at(ourPod, 1024)
		masqueraded = []string{at("10.244.1.1", 40000), at(blues, 40000)}
	}
	if random.IntN(2) == 0 {
		f.asTo = f.to
		f.to = []string{at(service, 30000), at(serviceOf(f.to), 50000)}[random.IntN(2)]
	}
	if random.IntN(2) == 0 {
		f.asFrom = masqueraded[random.IntN(2)]
	}
	return f
}

// serviceOf is the address alone: where NAT changes nothing but the port.
func serviceOf(address string) string {
	for i := range address {
		if address[i] == ':' {
			return address[:i]
		}
	}
	return address
}

// randomPacket is a packet of a flow with any TOS, TTL, size, flags and options.
func randomPacket(random *rand.Rand, f flow) (frame func(src, dst string) []byte, tosByte uint8) {
	size := []int{0, 1, random.IntN(100), random.IntN(1390)}[random.IntN(4)]
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(random.Uint32())
	}
	tosByte = uint8(random.Uint32())
	hops, number := uint8(2+random.IntN(254)), uint16(random.Uint32())
	fragment := random.IntN(2) == 0
	options := [][]layers.TCPOption{nil, timestamps}[random.IntN(2)]
	urgent := random.IntN(8) == 0
	return func(src, dst string) []byte {
		p := f.packet(src, dst, 0)
		ip := p.layers[1].(*layers.IPv4)
		ip.TOS, ip.TTL, ip.Id = tosByte, hops, number
		if fragment {
			ip.Flags |= layers.IPv4DontFragment
		}
		if tcp, ok := p.layers[2].(*layers.TCP); ok {
			tcp.Options, tcp.URG = options, urgent
		}
		p.layers[3] = gopacket.Payload(data)
		return mustFrame(p)
	}, tosByte
}

// decapsulated is RFC 6040, section 4.2, as a table.
func decapsulated(inner, outer uint8) uint8 {
	table := [4][4]uint8{{0, 0, 0, 0}, {1, 1, 1, 3}, {2, 1, 2, 3}, {3, 3, 3, 3}}
	return inner&^3 | table[inner&3][outer]
}

// A UDP checksum that comes out as zero is written as all ones: zero is none.
func TestChecksumThatComesOutAsZero(t *testing.T) {
	n := newPodNode(t)
	n.reset()
	n.tracked(viaServiceUDP)
	n.witnessed(viaServiceUDP, viaServiceUDP.answers())
	zeroed := 0
	for _, sent := range []flow{viaServiceUDP, viaServiceUDP.answers()} {
		src, dst := podMAC, gatewayMAC
		if sent.from != viaServiceUDP.from {
			src, dst = blueMAC, ourMAC
		}
		frame := sent.packet(src, dst, 100).bytes(t)
		// Two bytes of payload make the sum what we want, after NAT.
		frame[len(frame)-2], frame[len(frame)-1] = 0, 0
		after := translated(sumFrame(frame)[14:], sent.as(), 0)
		rest := after[26:28] // the complement of what the others sum to
		frame[len(frame)-2], frame[len(frame)-1] = rest[0], rest[1]
		frame = sumFrame(frame)
		n.nextPacket()
		var got outcome
		if src == podMAC {
			got = n.run(podIn, frame)
			w, _ := n.witnessOf(sent)
			mustLeaveByExpress(t, n, frame, got, blueIP, blueMAC, w)
			got.packet = got.packet[atInner:]
		} else {
			got = n.run(uplinkIn, carriedFrame(frame).bytes(t))
			mustBeDelivered(t, frame, got, sent.as(), 0)
		}
		if got.packet[atUDP+6] == 0xff && got.packet[atUDP+7] == 0xff {
			zeroed++
		}
	}
	if zeroed != 2 {
		t.Errorf("%d of two packets had the checksum in question; the test tests nothing", zeroed)
	}
}

func sumFrame(frame []byte) []byte {
	frame = append([]byte{}, frame...)
	sumTransport(frame[14:])
	return frame
}
