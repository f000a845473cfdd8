//go:build linux

package ebpf

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// toPod is a packet of a flow as blue sends it to a pod of ours. It has no outer
// checksum, so that none is missing inside.
func toPod(f flow, size int) *packet { return carriedRaw(f.packet(blueMAC, ourMAC, size)) }

func carriedRaw(inner *packet) *packet {
	return eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udpWithoutChecksum(50000, 8472).vxlan(1).around(inner)
}

// mustBeDelivered checks a packet for our pod byte for byte: inner is the frame
// as blue's overlay device sent it.
func mustBeDelivered(t *testing.T, inner []byte, got outcome, as weftFlow, tos uint8) {
	t.Helper()
	want := append(append(append([]byte{}, mustMAC(podMAC)...), mustMAC(gatewayMAC)...), 8, 0)
	want = append(want, translated(inner[14:], as, tos)...)
	if !bytes.Equal(got.packet, want) {
		t.Errorf("delivered as\n     %x\nwant %x", got.packet, want)
	}
	if got.skb.Mark != 0 || got.skb.Priority != 0 || got.skb.CB != [5]uint32{} {
		t.Errorf("delivered with mark %#x, priority %#x, cb and tc_index %v; want zeros", got.skb.Mark, got.skb.Priority, got.skb.CB)
	}
}

// arrivals are directions of flows to our pod, by what is special.
func arrivals() map[string]struct{ begun, sent flow } {
	all := map[string]struct{ begun, sent flow }{
		"blue's connection": {blueTCP, blueTCP}, "blue's UDP": {blueUDP, blueUDP},
		"by a service that is ours": {fromOutside, fromOutside},
	}
	for name, begun := range map[string]flow{
		"our connection": ourTCP, "our UDP": ourUDP, "a service": viaService, "a service by UDP": viaServiceUDP,
		"a masqueraded flow": masqueraded, "masqueraded UDP": masqueradedUDP, "all that NAT can change": bothEnds,
		"another port": otherPort,
	} {
		all["answers of "+name] = struct{ begun, sent flow }{begun, begun.answers()}
	}
	return all
}

func TestPacketsAreDeliveredByExpress(t *testing.T) {
	n := newPodNode(t)
	uplink, overlay := n.tellingTwin(uplinkIn, 0x1235), n.tellingTwin(overlayIn, 0)
	for name, c := range arrivals() {
		given := func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(c.begun)
			n.witnessed(c.sent)
		}
		inner := c.sent.packet(blueMAC, ourMAC, 100)
		frame := inner.bytes(t)
		size := uint64(len(frame) - 14)
		t.Run(name+", from the uplink", func(t *testing.T) {
			given(t)
			in := carriedRaw(inner).bytes(t)
			got := n.runProgram(uplink, uplinkIn, in, 0, marked(5), func(s *skBuff) { s.Priority = 6 })
			packetCase{verdict: redirected, counted: received(blueIP, "express", 1, size)}.check(t, in, got)
			mustBeDelivered(t, frame, got, c.sent.as(), 0)
		})
		t.Run(name+", stripped by the kernel", func(t *testing.T) {
			given(t)
			got := n.runProgram(overlay, overlayIn, frame, 0, n.stampedAs("good"))
			packetCase{verdict: redirected, counted: received(blueIP, "express", 1, size)}.check(t, frame, got)
			mustBeDelivered(t, frame, got, c.sent.as(), 0)
		})
		t.Run(name+", merged by the kernel", func(t *testing.T) {
			given(t)
			got := n.runProgram(overlay, overlayIn, frame, 0, n.stampedAs("good"), aggregate(2, 60))
			if c.sent.protocol == ourUDP.protocol {
				packetCase{verdict: passed, reason: weftReasonREASON_AGGREGATE, counted: received(blueIP, "kernel", 2, size+28)}.
					check(t, frame, got)
				return
			}
			packetCase{verdict: redirected, counted: received(blueIP, "express", 2, size+52)}.check(t, frame, got)
			mustBeDelivered(t, frame, got, c.sent.as(), 0)
			if got.skb.GSOSize != 60 || got.skb.GSOSegs != 2 {
				t.Errorf("an aggregate of %d segments of %d bytes came out, want 2 of 60", got.skb.GSOSegs, got.skb.GSOSize)
			}
		})
	}
}

// RFC 6040, section 4.2, for packets to pods.
func TestECNOnTheWayIntoAPod(t *testing.T) {
	n := newPodNode(t)
	for inner, row := range [4][4]int{{0, 0, 0, -1}, {1, 1, 1, 3}, {2, 1, 2, 3}, {3, 3, 3, 3}} {
		for outer, want := range row {
			t.Run(fmt.Sprintf("inner %d, outer %d", inner, outer), func(t *testing.T) {
				n.tb = t
				n.reset()
				n.tracked(blueTCP)
				n.witnessed(blueTCP)
				const dscp = 0x28
				frame := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t, setIP(14, 1, dscp|byte(inner)))
				in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(0xb8|uint8(outer))).udpWithoutChecksum(50000, 8472).vxlan(1).
					raw(frame).bytes(t)
				got := n.run(uplinkIn, in)
				if want < 0 {
					packetCase{verdict: passed, reason: weftReasonREASON_ECN_CONGESTED}.check(t, in, got)
					return
				}
				packetCase{verdict: redirected, counted: received(blueIP, "express", 1, 152)}.check(t, in, got)
				mustBeDelivered(t, frame, got, blueTCP.as(), dscp|uint8(want))
			})
		}
	}
}

// expressInCases are what uplink_in hands to the overlay device and not to a
// pod. It is counted for the reason, and rides the base path.
func expressInCases() []packetCase {
	var cases []packetCase
	add := func(c packetCase) {
		c.program = uplinkIn
		if c.verdict == 0 {
			c.verdict = redirected
		}
		cases = append(cases, c)
	}
	byBase := func(size uint64) map[string]PathCounters { return received(blueIP, "base", 1, size) }
	for _, c := range notExpressCases() {
		for _, way := range []struct {
			name        string
			begun, sent flow
		}{{"blue's connection", blueTCP, blueTCP}, {"answers to ours", ourTCP, ourTCP.answers()}} {
			add(packetCase{
				name: way.name + ": " + c.name, reason: c.reason, packet: toPod(way.sent, 100), counted: byBase(152),
				given: established(these(way.begun), c.given(way.begun, way.sent)),
			})
		}
	}
	blues := func(c packetCase, then ...func(*node)) {
		c.given = established(these(blueTCP, blueUDP, viaServiceUDP, masqueradedUDP), then...)
		if c.packet == nil {
			c.packet = toPod(blueTCP, 100)
		}
		if c.counted == nil && c.verdict == 0 {
			c.counted = byBase(152)
		}
		add(c)
	}
	blues(packetCase{name: "no witness at all", reason: weftReasonREASON_FLOW_UNWITNESSED}, withoutWitness(blueTCP))
	blues(packetCase{name: "the agent holds all acceleration back", verdict: passed, reason: weftReasonREASON_HELD},
		inForce(func(f *weftInForce) { f.Held = 1 }))
	blues(packetCase{name: "all is switched off on the node", verdict: passed, reason: weftReasonREASON_SWITCHED_OFF},
		inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_EXPRESS | weftOffOFF_BASE) }))
	blues(packetCase{name: "all is switched off for the peer", verdict: passed, reason: weftReasonREASON_PEER_SWITCHED_OFF},
		peerState(func(s *weftPeerState) { s.Off = uint32(weftOffOFF_EXPRESS | weftOffOFF_BASE) }))
	blues(packetCase{name: "express is off on the node and base for the peer", verdict: passed, reason: weftReasonREASON_PEER_SWITCHED_OFF},
		inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_EXPRESS) }),
		peerState(func(s *weftPeerState) { s.Off = uint32(weftOffOFF_BASE) }))
	blues(packetCase{name: "not for a pod of ours", reason: weftReasonREASON_POD_UNKNOWN}, withoutPod)
	blues(packetCase{name: "seen on its way to no pod of ours", reason: weftReasonREASON_POD_UNKNOWN},
		witness(blueTCP, func(w *weftWitness) { w.As.Daddr = toBE32(addr("10.244.1.99")) }))
	blues(packetCase{name: "seen on its way to another pod", reason: weftReasonREASON_WITNESS_STALE},
		witness(blueTCP, func(w *weftWitness) { w.As.Daddr = toBE32(addr(otherPod)) }))
	blues(packetCase{name: "seen at another veth", reason: weftReasonREASON_WITNESS_STALE},
		func(n *node) { n.witness(blueTCP, func(w *weftWitness) { w.Device = n.otherVeth }) })
	blues(packetCase{name: "the pod's veth is gone", reason: weftReasonREASON_DEVICE_MISSING}, withoutVeth)
	blues(packetCase{name: "one byte more than the pod's MTU", reason: weftReasonREASON_POD_MTU}, func(n *node) {
		p := n.pods[0]
		p.MTU = 151
		n.put(n.accel.objects.Endpoints, toBE32(p.IP), toEndpoint(p))
	})
	blues(packetCase{
		name: "UDP without a checksum, from a service", packet: toPodBroken(viaServiceUDP.answers(), set(atIP+26, 0, 0)),
		reason: weftReasonREASON_FLOW_SPECIAL, counted: byBase(128),
	})
	blues(packetCase{
		name: "UDP without a checksum, masqueraded", packet: toPodBroken(masqueradedUDP.answers(), set(atIP+26, 0, 0)),
		reason: weftReasonREASON_FLOW_SPECIAL, counted: byBase(128),
	})
	blues(packetCase{name: "an entry in a zone", reason: weftReasonREASON_FLOW_UNTRACKED}, inZone(blueTCP, "ct zone set 5"))
	blues(packetCase{name: "an entry in a zone for the other direction only", packet: toPod(ourTCP.answers(), 100), reason: weftReasonREASON_FLOW_SPECIAL},
		inZone(ourTCP, "ct original zone set 5"), func(n *node) { n.witnessed(ourTCP.answers()) })
	blues(packetCase{name: "UDP that begins anew, not assured yet", packet: toPod(blueUDP, 100), reason: weftReasonREASON_WITNESS_STALE, counted: byBase(128)},
		func(n *node) { untracked(n); n.begin(blueUDP) })
	blues(packetCase{name: "UDP that begins anew, without an answer", packet: toPod(blueUDP, 100), reason: weftReasonREASON_WITNESS_STALE, counted: byBase(128)},
		func(n *node) { untracked(n); n.show(blueUDP, nil) })
	blues(packetCase{name: "UDP that has been answered since it was witnessed", packet: toPod(blueUDP, 100), reason: weftReasonREASON_WITNESS_STALE, counted: byBase(128)},
		witness(blueUDP, func(w *weftWitness) { w.Status = unanswered.status() }))
	blues(packetCase{name: "UDP that was an aggregate lately", packet: toPod(blueUDP, 100), reason: weftReasonREASON_AGGREGATE_RECENT, counted: byBase(128)},
		witness(blueUDP, func(w *weftWitness) { w.Whole = coarseNow() - 3.9e9 }))
	for _, c := range notFlows() {
		frame := mustFrame(c.of(blueMAC, ourMAC, blueTCP, blueUDP), c.broken...)
		c.packet, c.broken = carriedFrame(frame), nil
		c.counted = byBase(uint64(len(frame) - 14))
		blues(c.packetCase)
	}
	return cases
}

func carriedFrame(frame []byte) *packet {
	return eth(wireMAC, uplinkMAC).ip(blueIP, ourIP).udpWithoutChecksum(50000, 8472).vxlan(1).raw(frame)
}

func toPodBroken(f flow, broken ...mutation) *packet {
	return carriedFrame(mustFrame(f.packet(blueMAC, ourMAC, 100), broken...))
}

func mustFrame(p *packet, broken ...mutation) []byte {
	var tb noTB
	return p.bytes(&tb, broken...)
}

// noTB is for packets that are made before any test runs.
type noTB struct{ testing.TB }

func (*noTB) Helper()                        {}
func (*noTB) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }

func TestWhatIsNotDeliveredByExpress(t *testing.T) {
	n := newPodNode(t)
	for _, c := range expressInCases() {
		t.Run(c.name, func(t *testing.T) {
			n.tb = t
			n.reset()
			c.given(n)
			in := c.packet.bytes(t)
			got := n.run(uplinkIn, in)
			c.check(t, in, got)
			if got.verdict == redirected {
				mustBeStripped(t, in, got.packet, in[atInnerIP+1])
				n.mustBeStamped(t, got)
			}
		})
	}
}

// The same behind the VXLAN driver: what is not delivered goes to the stack as
// it came. Why, is counted of aggregates: of others uplink_in has counted it.
func TestWhatOverlayInLeavesToTheStack(t *testing.T) {
	n := newPodNode(t)
	for _, c := range notExpressCases() {
		for _, way := range []struct {
			name        string
			begun, sent flow
		}{{"blue's connection", blueTCP, blueTCP}, {"answers to ours", ourTCP, ourTCP.answers()}} {
			given := established(these(way.begun), c.given(way.begun, way.sent))
			in := way.sent.packet(blueMAC, ourMAC, 100).bytes(t)
			t.Run(way.name+": "+c.name, func(t *testing.T) {
				n.tb = t
				packetCase{verdict: passed, counted: received(blueIP, "kernel", 1, 152)}.check(t, in, n.toOverlay(given, in))
				packetCase{verdict: passed, reason: c.reason, counted: received(blueIP, "kernel", 2, 204)}.
					check(t, in, n.toOverlay(given, in, aggregate(2, 60)))
			})
		}
	}
	for _, c := range notFlows() {
		t.Run(c.name, func(t *testing.T) {
			n.tb = t
			in := c.of(blueMAC, ourMAC, blueTCP, blueUDP).bytes(t, c.broken...)
			got := n.toOverlay(established(these(blueTCP, blueUDP)), in)
			packetCase{verdict: passed, counted: received(blueIP, "kernel", 1, uint64(len(in)-14))}.check(t, in, got)
		})
	}
	in := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t)
	for name, c := range map[string]struct {
		given  func(*node)
		skb    func(*skBuff)
		reason weftReason
	}{
		"no witness at all":                     {given: withoutWitness(blueTCP), reason: weftReasonREASON_FLOW_UNWITNESSED},
		"the agent holds all acceleration back": {given: inForce(func(f *weftInForce) { f.Held = 1 })},
		"not for a pod of ours":                 {given: withoutPod, reason: weftReasonREASON_POD_UNKNOWN},
		"the pod's veth is gone":                {given: withoutVeth, reason: weftReasonREASON_DEVICE_MISSING},
		"marked by rules for outer packets":     {given: func(*node) {}, skb: marked(3), reason: weftReasonREASON_HOST_MANGLES},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			with := []func(*skBuff){aggregate(2, 60)}
			if c.skb != nil {
				with = append(with, c.skb)
			}
			got := n.toOverlay(established(these(blueTCP), c.given), in, with...)
			packetCase{verdict: passed, reason: c.reason, counted: received(blueIP, "kernel", 2, 204)}.check(t, in, got)
		})
	}
	t.Run("not seen by uplink_in", func(t *testing.T) {
		n.tb = t
		n.reset()
		established(these(blueTCP))(n)
		got := n.run(overlayIn, in)
		packetCase{verdict: passed, reason: weftReasonREASON_SOURCE_UNSEEN, counted: received(blueIP, "kernel", 1, 152)}.check(t, in, got)
		packetCase{verdict: passed}.check(t, in, n.run(overlayIn, in, n.stampedAs("suspect")))
		packetCase{verdict: passed}.check(t, in, n.run(overlayIn, in, n.stampedAs("stripped")))
	})
	t.Run("segments of a pod's MTU, and one byte more", func(t *testing.T) {
		n.tb = t
		big := blueTCP.packet(blueMAC, ourMAC, 2600).bytes(t)
		got := n.toOverlay(established(these(blueTCP)), big, aggregate(2, podMTU-52))
		packetCase{verdict: redirected, counted: received(blueIP, "express", 2, 2652+52)}.check(t, big, got)
		mustBeDelivered(t, big, got, blueTCP.as(), 0)
		got = n.toOverlay(established(these(blueTCP)), big, aggregate(2, podMTU-52+1))
		packetCase{verdict: passed, reason: weftReasonREASON_POD_MTU, counted: received(blueIP, "kernel", 2, 2652+52)}.check(t, big, got)
	})
}

// toOverlay runs a packet of blue's that the kernel has stripped.
func (n *node) toOverlay(given func(*node), frame []byte, with ...func(*skBuff)) outcome {
	n.tb.Helper()
	n.reset()
	given(n)
	return n.run(overlayIn, frame, append([]func(*skBuff){n.stampedAs("good")}, with...)...)
}

// What looks like a reason and is none.
func TestWhatIsDeliveredByExpressNevertheless(t *testing.T) {
	n := newPodNode(t)
	for name, c := range map[string]struct {
		given func(*node)
		in    []byte
		size  uint64
	}{
		"base is switched off on the node":               {given: inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_BASE) })},
		"base is switched off for the peer":              {given: peerState(func(s *weftPeerState) { s.Off = uint32(weftOffOFF_BASE) })},
		"the overlay device is gone from the device map": {given: withoutDevice(weftDeviceDEVICE_OVERLAY)},
		"the uplink is gone from the device map":         {given: withoutDevice(weftDeviceDEVICE_UPLINK)},
		"nothing to the peer was seen to leave":          {given: peerState(func(s *weftPeerState) { s.TxProven = 0 })},
		"the other direction was never seen":             {given: withoutWitness(blueTCP.answers())},
		"exactly the pod's MTU": {given: func(n *node) {
			p := n.pods[0]
			p.MTU = 152
			n.put(n.accel.objects.Endpoints, toBE32(p.IP), toEndpoint(p))
		}},
		"UDP without any checksum, and no NAT":        {in: toPodBroken(blueUDP, set(atIP+26, 0, 0)).bytes(t), size: 128},
		"an outer checksum that nobody has looked at": {in: carried(blueIP, blueTCP.packet(blueMAC, ourMAC, 100)).bytes(t)},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			established(these(blueTCP, blueUDP))(n)
			if c.given != nil {
				c.given(n)
			}
			if c.in == nil {
				c.in = toPod(blueTCP, 100).bytes(t)
			}
			if c.size == 0 {
				c.size = 152
			}
			got := n.run(uplinkIn, c.in)
			packetCase{verdict: redirected, counted: received(blueIP, "express", 1, c.size)}.check(t, c.in, got)
			mustBeDelivered(t, c.in[atInner:], got, flowOf(c.in[atInnerIP:]), 0)
		})
	}
}

// With base switched off, what express does not take is the kernel's, unchanged.
func TestExpressAlone(t *testing.T) {
	n := newPodNode(t)
	n.reset()
	established(these(blueTCP), withoutWitness(blueTCP), inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_BASE) }))(n)
	in := toPod(blueTCP, 100).bytes(t)
	got := n.run(uplinkIn, in)
	if got.verdict != passed || !bytes.Equal(got.packet, in) || len(got.paths) != 0 ||
		got.passed["flow_unwitnessed"] != 1 || got.passed["switched_off"] != 1 || len(got.passed) != 2 {
		t.Errorf("verdict %d, passed %v, paths %v, packet %x", got.verdict, got.passed, got.paths, got.packet)
	}
	if got.skb.Priority != n.runtime.Stamp {
		t.Errorf("priority %#x, want the stamp %#x: the packet passed the source check", got.skb.Priority, n.runtime.Stamp)
	}
}

// A checksum that the network card computed over the whole packet has to stay
// true of what the pod gets.
func TestDeliveryKeepsTheCardsChecksumTrue(t *testing.T) {
	n := newPodNode(t)
	n.mustKnowChecksumComplete()
	for name, c := range arrivals() {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(c.begun)
			n.witnessed(c.sent)
			for _, outer := range []uint8{2, 3} {
				frame := c.sent.packet(blueMAC, ourMAC, 101).bytes(t, setIP(14, 1, 2))
				in := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(outer)).udp(50000, 8472).vxlan(1).raw(frame).bytes(t)
				got := n.runProgram(n.accel.objects.UplinkIn, uplinkIn, in, checksumComplete)
				if got.verdict != redirected || got.paths[blueIP+" express"].RxPackets != 1 {
					t.Fatalf("verdict %d, passed %v", got.verdict, got.passed)
				}
				mustBeDelivered(t, frame, got, c.sent.as(), outer)
			}
			frame := c.sent.packet(blueMAC, ourMAC, 101).bytes(t)
			got := n.runProgram(n.accel.objects.OverlayIn, overlayIn, frame, checksumComplete, n.stampedAs("good"))
			if got.verdict != redirected {
				t.Fatalf("verdict %d, passed %v", got.verdict, got.passed)
			}
			mustBeDelivered(t, frame, got, c.sent.as(), 0)
		})
	}
}

// A packet that was begun and can't be finished is dropped: nobody could make
// sense of it.
func TestRewriteThatFails(t *testing.T) {
	n := newPodNode(t)
	for _, c := range []struct {
		name tcProgram
		in   *packet
		skb  func(*skBuff)
	}{
		{podIn, fromPod(viaService, 100), func(*skBuff) {}},
		{uplinkIn, toPod(viaService.answers(), 100), func(*skBuff) {}},
		{overlayIn, viaService.answers().packet(blueMAC, ourMAC, 100), n.stampedAs("good")},
	} {
		t.Run(string(c.name), func(t *testing.T) {
			n.tb = t
			prog := n.twin(c.name, func(program *ebpf.ProgramSpec) {
				for i, ins := range program.Instructions {
					if ins.IsBuiltinCall() && ins.Constant == int64(asm.FnL4CsumReplace) {
						program.Instructions[i] = asm.Mov.Imm(asm.R0, -12).WithMetadata(ins.Metadata)
					}
				}
			})
			n.reset()
			established(these(viaService))(n)
			in := c.in.bytes(t)
			got := n.runProgram(prog, c.name, in, 0, c.skb)
			packetCase{verdict: dropped, reason: weftReasonREASON_REWRITE_FAILED}.check(t, got.packet, got)
		})
	}
}

// What the kernel refuses at the last step must still be the packet it was.
func TestRefusedRoomLeavesExpressPacketsUntouched(t *testing.T) {
	n := newPodNode(t)
	t.Run("on the way out", func(t *testing.T) {
		n.tb = t
		prog := n.mustRefuse(podIn)
		n.reset()
		established(these(viaService))(n)
		in := fromPod(viaService, 100).bytes(t)
		got := n.runProgram(prog, podIn, in, 0)
		packetCase{verdict: passed}.check(t, in, got)
		if got.skb.Mark != 0 || got.skb.Priority != 0 {
			t.Errorf("mark %#x, priority %#x; want zeros", got.skb.Mark, got.skb.Priority)
		}
	})
	t.Run("on the way in", func(t *testing.T) {
		n.tb = t
		prog := n.mustRefuse(uplinkIn)
		n.reset()
		established(these(viaService))(n)
		in := toPod(viaService.answers(), 100).bytes(t)
		got := n.runProgram(prog, uplinkIn, in, 0, marked(5))
		packetCase{verdict: passed, reason: weftReasonREASON_STRIP_REFUSED}.check(t, in, got)
		if got.skb.Priority != n.runtime.Stamp || got.skb.Mark != 5 {
			t.Errorf("priority %#x, mark %#x; want the stamp %#x and 5", got.skb.Priority, got.skb.Mark, n.runtime.Stamp)
		}
	})
}

// A witness is renewed by exactly one packet in a sixteenth of its life, in the
// second half.
func TestWitnessLife(t *testing.T) {
	n := newPodNode(t)
	ms := time.Millisecond
	for name, c := range map[string]struct {
		seen, renewal time.Duration // ago; a renewal of 0 is never
		reason        weftReason
	}{
		"seen just now":                           {0, 0, weftReasonREASON_NONE},
		"in the first half":                       {1700 * ms, 0, weftReasonREASON_NONE},
		"in the second half, not renewed yet":     {2100 * ms, 0, weftReasonREASON_WITNESS_RENEWAL},
		"in the second half, renewal under way":   {2100 * ms, 50 * ms, weftReasonREASON_NONE},
		"in the second half, renewal got lost":    {2100 * ms, 300 * ms, weftReasonREASON_WITNESS_RENEWAL},
		"near the end, renewal under way":         {3600 * ms, 50 * ms, weftReasonREASON_NONE},
		"at its end, though renewal is under way": {4100 * ms, 100 * ms, weftReasonREASON_WITNESS_STALE},
		"long ago": {time.Hour, 0, weftReasonREASON_WITNESS_STALE},
	} {
		for _, way := range []struct {
			name   tcProgram
			f      flow
			in     []byte
			taken  packetCase
			passed packetCase
			with   func(*skBuff)
		}{
			{
				podIn, ourTCP, fromPod(ourTCP, 100).bytes(t),
				packetCase{verdict: redirected, counted: sent(blueIP, "express", 1, 152)},
				packetCase{verdict: passed},
				func(*skBuff) {},
			}, {
				uplinkIn, blueTCP, toPod(blueTCP, 100).bytes(t),
				packetCase{verdict: redirected, counted: received(blueIP, "express", 1, 152)},
				packetCase{verdict: redirected, counted: received(blueIP, "base", 1, 152)},
				func(*skBuff) {},
			}, {
				overlayIn, blueTCP, blueTCP.packet(blueMAC, ourMAC, 100).bytes(t),
				packetCase{verdict: redirected, counted: received(blueIP, "express", 2, 204)},
				packetCase{verdict: passed, counted: received(blueIP, "kernel", 2, 204)},
				func(s *skBuff) { n.stampedAs("good")(s); aggregate(2, 60)(s) },
			},
		} {
			t.Run(name+", "+string(way.name), func(t *testing.T) {
				n.tb = t
				n.reset()
				established(these(way.f))(n)
				n.witness(way.f, func(w *weftWitness) {
					w.Seen = ago(c.seen)
					if c.renewal != 0 {
						w.Renewal = ago(c.renewal)
					}
				})
				was, _ := n.witnessOf(way.f)
				want := way.taken
				if c.reason != weftReasonREASON_NONE {
					want = way.passed
					want.reason = c.reason
				}
				want.check(t, way.in, n.run(way.name, way.in, way.with))
				is, _ := n.witnessOf(way.f)
				if is.Seen != was.Seen || is.Epoch != was.Epoch || is.As != was.As || (is.Renewal != was.Renewal) != (c.reason == weftReasonREASON_WITNESS_RENEWAL) {
					t.Errorf("the witness was %+v and is %+v", was, is)
				}
				if c.reason == weftReasonREASON_WITNESS_RENEWAL {
					if way.name != podIn { // in line
						way.taken.reason = weftReasonREASON_FLOW_ORDER
					}
					for range 3 { // the others go on by express
						way.taken.check(t, way.in, n.run(way.name, way.in, way.with))
					}
				}
			})
		}
	}
}

// Conntrack is asked once a tick of the clock for a flow, but for what may be its
// last packet; and again when the flow closes.
func TestConntrackIsAskedOnceATick(t *testing.T) {
	n := newPodNode(t)
	tick := uint64(time.Second) / uint64(hz())
	for name, c := range map[string]struct {
		f     flow
		size  int
		asked uint64 // so much earlier
		taken bool
	}{
		"TCP with data, in this tick":     {f: blueTCP, size: 100, taken: true},
		"TCP with data, a tick ago":       {f: blueTCP, size: 100, asked: tick},
		"TCP without data, in this tick":  {f: blueTCP},
		"UDP, in this tick":               {f: blueUDP, size: 100, taken: true},
		"UDP without data, in this tick":  {f: blueUDP, taken: true},
		"UDP, a tick ago":                 {f: blueUDP, size: 100, asked: tick},
		"UDP, when conntrack never spoke": {f: blueUDP, size: 100, asked: coarseNow()},
	} {
		for _, way := range []struct {
			name tcProgram
			f    flow
			in   []byte
			prog *ebpf.Program
		}{
			{uplinkIn, c.f, toPod(c.f, c.size).bytes(t), n.accel.objects.UplinkIn},
			{podIn, c.f.answers(), fromPod(c.f.answers(), c.size).bytes(t), n.accel.objects.PodIn},
		} {
			t.Run(name+", "+string(way.name), func(t *testing.T) {
				n.tb = t
				n.reset() // conntrack knows no flow
				express := 0
				for range 20 {
					n.nextPacket()
					n.witnessed(way.f)
					w, _ := n.witnessOf(way.f)
					before := n.count()
					n.MustDo(t, func() error {
						w.Tracked = coarseNow() - c.asked
						if c.asked > tick {
							w.Tracked = 0
						}
						if err := n.accel.objects.Witnesses.Put(way.f.before(), w); err != nil {
							return err
						}
						device := n.uplink
						if way.name == podIn {
							device = n.veth
						}
						_, err := way.prog.Run(&ebpf.RunOptions{Data: way.in, DataOut: make([]byte, len(way.in)+256), Context: skBuff{Ifindex: device}})
						return err
					})
					was, is := before.paths[blueIP+" express"], n.count().paths[blueIP+" express"]
					express += int(is.TxPackets + is.RxPackets - was.TxPackets - was.RxPackets)
				}
				// Now and then the clock ticks in between.
				if c.taken && express < 5 || !c.taken && express > 0 {
					t.Errorf("%d of 20 packets went by express without asking conntrack, want any: %v", express, c.taken)
				}
			})
		}
	}
	for _, size := range []int{0, 100} {
		t.Run(fmt.Sprintf("when is written down, with %d bytes of data", size), func(t *testing.T) {
			n.tb = t
			n.reset()
			established(these(blueTCP))(n)
			for _, way := range []struct {
				name tcProgram
				f    flow
				in   []byte
			}{{uplinkIn, blueTCP, toPod(blueTCP, size).bytes(t)}, {podIn, blueTCP.answers(), fromPod(blueTCP.answers(), size).bytes(t)}} {
				started := coarseNow()
				got := n.run(way.name, way.in)
				if w, _ := n.witnessOf(way.f); got.verdict != redirected || w.Tracked < started || w.Tracked > coarseNow() {
					t.Errorf("%s: verdict %d, asked at %d, run at %d", way.name, got.verdict, w.Tracked, started)
				}
			}
		})
	}
	for name, flags := range map[string]byte{"SYN": 0x0a, "FIN": 0x19, "RST": 0x0c, "ACK": 0x18} {
		for _, way := range []struct {
			name tcProgram
			f    flow
			in   []byte
			with func(*skBuff)
		}{
			{uplinkIn, viaService.answers(), toPodBroken(viaService.answers(), set(atIP+20+13, flags)).bytes(t), func(*skBuff) {}},
			{overlayIn, viaService.answers(), mustFrame(viaService.answers().packet(blueMAC, ourMAC, 100), set(atIP+20+13, flags)), n.stampedAs("good")},
			{podIn, viaService, fromPod(viaService, 100).bytes(t, set(atIP+20+13, flags)), func(*skBuff) {}},
		} {
			t.Run(name+", "+string(way.name), func(t *testing.T) {
				n.tb = t
				n.reset()
				n.tracked(viaService)
				for _, f := range []flow{viaService, viaService.answers()} {
					n.witness(f, func(w *weftWitness) { w.Tracked = 1 })
				}
				n.run(way.name, way.in, way.with)
				for _, f := range []flow{viaService, viaService.answers()} {
					if w, _ := n.witnessOf(f); (w.Tracked == 0) != (flags != 0x18) {
						t.Errorf("conntrack was last asked about %v at %d", f, w.Tracked)
					}
				}
			})
		}
	}
}
