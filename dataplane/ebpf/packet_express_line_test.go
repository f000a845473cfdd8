//go:build linux

package ebpf

import (
	"bytes"
	"testing"
)

// lapBit is the lowest bit of a place in line that counts laps: LAPS_SHIFT of
// bpf/line.h.
const lapBit = 1 << 16

// mustStandInLine checks that a packet waits in front of the overlay device, as it
// was, at a place.
func (n *node) mustStandInLine(t *testing.T, frame []byte, got outcome, place uint32) {
	t.Helper()
	want := [5]uint32{uint32(n.runtime.Nonce), uint32(n.runtime.Nonce >> 32), place}
	if got.verdict != redirected || !bytes.Equal(got.packet, frame) || got.skb.CB != want {
		t.Errorf("verdict %d, cb %x; want a redirect with %x (counted: passed %v)\n in %x\nout %x", got.verdict, got.skb.CB, want, got.passed, frame, got.packet)
	}
}

// again runs overlay_in on what came out of a program, as the redirect brings it.
func (n *node) again(from outcome, with ...func(*skBuff)) outcome {
	n.tb.Helper()
	return n.run(overlayIn, from.packet, append([]func(*skBuff){func(s *skBuff) { s.CB = from.skb.CB }}, with...)...)
}

// mustLeaveLine takes a packet that has just got its place in line through it.
func (n *node) mustLeaveLine(t *testing.T, first outcome, with ...func(*skBuff)) outcome {
	t.Helper()
	second := n.again(first, with...)
	n.mustStandInLine(t, first.packet, second, first.skb.CB[2]-lapBit)
	last := n.again(second, with...)
	if len(second.paths)+len(second.passed)+len(last.paths)+len(last.passed) > 0 {
		t.Errorf("counted on the way: %v %v, then %v %v", second.paths, second.passed, last.paths, last.passed)
	}
	return last
}

func (n *node) turn(f flow) uint16 {
	w, _ := n.witnessOf(f)
	return w.Turn
}

func inLine(f flow, turn uint16) func(*node) {
	return witness(f, func(w *weftWitness) { w.Turn = turn })
}

func TestPacketsBehindOneInTheStackStandInLine(t *testing.T) {
	n := newPodNode(t)
	waits := packetCase{verdict: redirected, reason: weftReasonREASON_FLOW_ORDER, counted: received(blueIP, "express", 1, 152)}
	for name, c := range arrivals() {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(c.begun)
			n.witness(c.sent, func(w *weftWitness) { w.Turn = 7 })
			inner := c.sent.packet(blueMAC, ourMAC, 100)
			frame, in := inner.bytes(t), carriedRaw(inner).bytes(t)
			size := uint64(len(frame) - 14)
			waits := waits
			waits.counted = received(blueIP, "express", 1, size)
			first := n.run(uplinkIn, in, marked(5))
			waits.check(t, in, first)
			n.mustStandInLine(t, frame, first, lapBit|8)
			second := n.run(uplinkIn, in)
			n.mustStandInLine(t, frame, second, lapBit|9)
			mustBeDelivered(t, frame, n.mustLeaveLine(t, first), c.sent.as(), 0)
			if turn := n.turn(c.sent); turn != 9 {
				t.Errorf("the first left the line, and its last number is %d, want 9", turn)
			}
			mustBeDelivered(t, frame, n.mustLeaveLine(t, second), c.sent.as(), 0)
			if turn := n.turn(c.sent); turn != 0 {
				t.Errorf("the last left the line, and its last number is %d", turn)
			}
			got := n.run(uplinkIn, in)
			packetCase{verdict: redirected, counted: received(blueIP, "express", 1, size)}.check(t, in, got)
			mustBeDelivered(t, frame, got, c.sent.as(), 0)
		})
	}
	t.Run("marked as congested on the way", func(t *testing.T) {
		n.tb = t
		n.reset()
		established(these(blueTCP), inLine(blueTCP, 1))(n)
		frame := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t, setIP(14, 1, 2))
		in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(3)).udpWithoutChecksum(50000, 8472).vxlan(1).raw(frame).bytes(t)
		first := n.run(uplinkIn, in)
		mustBeStripped(t, in, first.packet, 3)
		mustBeDelivered(t, first.packet, n.mustLeaveLine(t, first), blueTCP.as(), 3)
	})
	t.Run("stripped by the kernel", func(t *testing.T) {
		n.tb = t
		frame := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t)
		first := n.toOverlay(established(these(blueTCP), inLine(blueTCP, 7)), frame)
		packetCase{verdict: redirected, counted: received(blueIP, "express", 1, 152)}.check(t, frame, first)
		n.mustStandInLine(t, frame, first, lapBit|8)
		mustBeDelivered(t, frame, n.mustLeaveLine(t, first), blueTCP.as(), 0)
		if turn := n.turn(blueTCP); turn != 0 {
			t.Errorf("it left the line, and its last number is %d", turn)
		}
	})
	t.Run("merged by the kernel", func(t *testing.T) {
		n.tb = t
		frame := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t)
		first := n.toOverlay(established(these(blueTCP), inLine(blueTCP, 7)), frame, aggregate(2, 60))
		packetCase{verdict: redirected, reason: weftReasonREASON_FLOW_ORDER, counted: received(blueIP, "express", 2, 204)}.check(t, frame, first)
		n.mustStandInLine(t, frame, first, lapBit|8)
		got := n.mustLeaveLine(t, first, aggregate(2, 60))
		mustBeDelivered(t, frame, got, blueTCP.as(), 0)
		if got.skb.GSOSize != 60 || got.skb.GSOSegs != 2 {
			t.Errorf("an aggregate of %d segments of %d bytes came out, want 2 of 60", got.skb.GSOSegs, got.skb.GSOSize)
		}
	})
	t.Run("base is switched off", func(t *testing.T) { // then the kernel strips it, see above
		n.tb = t
		n.reset()
		established(these(blueTCP), inLine(blueTCP, 7), inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_BASE) }))(n)
		in := toPod(blueTCP, 100).bytes(t)
		got := n.run(uplinkIn, in)
		if got.verdict != passed || got.passed["flow_order"] != 1 || got.passed["switched_off"] != 1 || !bytes.Equal(got.packet, in) {
			t.Errorf("verdict %d, passed %v", got.verdict, got.passed)
		}
	})
	t.Run("the number behind the highest", func(t *testing.T) {
		n.tb = t
		n.reset()
		established(these(blueTCP), inLine(blueTCP, 0xffff))(n)
		frame := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t)
		first := n.run(uplinkIn, carriedFrame(frame).bytes(t))
		waits.check(t, nil, first)
		n.mustStandInLine(t, frame, first, lapBit|1)
	})
}

// What has its place is delivered, whatever becomes known of the flow meanwhile.
func TestWhoStandsInLineIsNotJudgedAgain(t *testing.T) {
	n := newPodNode(t)
	frame := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t)
	waiting := func(t *testing.T) outcome {
		n.tb = t
		n.reset()
		established(these(blueTCP), inLine(blueTCP, 1))(n)
		return n.again(n.run(uplinkIn, carriedFrame(frame).bytes(t)))
	}
	for name, change := range map[string]func(*node){
		"the epoch moved":       beat(func(p *weftPulse) { p.Epoch++ }),
		"the agent holds back":  beat(func(p *weftPulse) { p.Held = 1 }),
		"express is off":        inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_EXPRESS) }),
		"conntrack forgot it":   untracked,
		"its witness is stale":  witness(blueTCP, func(w *weftWitness) { w.Seen = 1 }),
		"the line is over":      inLine(blueTCP, 0),
		"another line is there": inLine(blueTCP, 99),
	} {
		t.Run(name, func(t *testing.T) {
			got := waiting(t)
			change(n)
			mustBeDelivered(t, frame, n.again(got), blueTCP.as(), 0)
		})
	}
	for name, change := range map[string]func(*node){
		"its witness is gone":    withoutWitness(blueTCP),
		"its pod is gone":        withoutPod,
		"the pod's veth is gone": withoutVeth,
		"the pod's MTU is less": func(n *node) {
			p := n.pods[0]
			p.MTU = 151
			n.put(n.accel.objects.Endpoints, toBE32(p.IP), toEndpoint(p))
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := waiting(t)
			change(n)
			packetCase{verdict: passed}.check(t, frame, n.again(got))
		})
	}
	t.Run("somebody wiped its place", func(t *testing.T) {
		waiting(t)
		packetCase{verdict: passed}.check(t, frame, n.run(overlayIn, frame, n.stampedAs("stripped")))
	})
	t.Run("a place without our nonce", func(t *testing.T) {
		waiting(t)
		forged := func(s *skBuff) { s.CB = [5]uint32{1, 2, 2} }
		packetCase{verdict: passed, reason: weftReasonREASON_SOURCE_UNSEEN, counted: received(blueIP, "kernel", 1, 152)}.
			check(t, frame, n.run(overlayIn, frame, forged))
	})
}

// Each packet of a witnessed flow that takes the stack makes the next ones stand
// in line.
func TestPacketsForTheStackDrawNumbers(t *testing.T) {
	n := newPodNode(t)
	in, frame := toPod(blueTCP, 100).bytes(t), blueTCP.packet(blueMAC, ourMAC, 100).bytes(t)
	for name, given := range map[string]func(*node){
		"the epoch moved":          beat(func(p *weftPulse) { p.Epoch++ }),
		"its witness is renewed":   witness(blueTCP, func(w *weftWitness) { w.Seen = coarseNow() - 3e9 }),
		"its witness is stale":     witness(blueTCP, func(w *weftWitness) { w.Seen = coarseNow() - 5e9 }),
		"conntrack has to be seen": untracked,
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			established(these(blueTCP), given)(n)
			got := n.run(uplinkIn, in)
			if turn := n.turn(blueTCP); turn != 1 || got.paths[blueIP+" base"].RxPackets != 1 {
				t.Errorf("the last number is %d, want 1; counted %v, passed %v", turn, got.paths, got.passed)
			}
			n.mustBeStamped(t, got) // without a place
			got = n.toOverlay(func(n *node) { established(these(blueTCP), given)(n) }, frame)
			if turn := n.turn(blueTCP); turn != 1 || got.verdict != passed {
				t.Errorf("stripped by the kernel: the last number is %d, want 1; verdict %d", turn, got.verdict)
			}
		})
	}
	t.Run("an aggregate of UDP", func(t *testing.T) {
		n.tb = t
		n.toOverlay(established(these(blueUDP)), blueUDP.packet(blueMAC, ourMAC, 100).bytes(t), aggregate(2, 50))
		if turn := n.turn(blueUDP); turn != 1 {
			t.Errorf("the last number is %d, want 1", turn)
		}
		n.nextPacket()
		got := n.run(uplinkIn, toPod(blueUDP, 100).bytes(t))
		if got.passed["aggregate_recent"] != 1 || got.paths[blueIP+" base"].RxPackets != 1 || n.turn(blueUDP) != 2 {
			t.Errorf("a small one behind it: passed %v, counted %v, the last number is %d", got.passed, got.paths, n.turn(blueUDP))
		}
	})
	t.Run("too long for the pod", func(t *testing.T) {
		n.tb = t
		n.toOverlay(established(these(blueUDP)), blueUDP.packet(blueMAC, ourMAC, podMTU).bytes(t))
		if turn := n.turn(blueUDP); turn != 1 {
			t.Errorf("the last number is %d, want 1", turn)
		}
	})
	t.Run("the line outlives a new look at the flow", func(t *testing.T) {
		n.tb = t
		n.reset()
		established(these(blueTCP), witness(blueTCP, func(w *weftWitness) { w.Epoch, w.Turn = epoch-1, 5 }))(n)
		b := passage{podOut, blueTCP, blueTCP}
		n.behind(n.twins()[podOut], b, b.frame(t, 100))
		if w, _ := n.witnessOf(blueTCP); w.Turn != 5 || w.Epoch != epoch {
			t.Errorf("the witness is %+v, want the last number 5 and epoch %d", w, epoch)
		}
	})
}
