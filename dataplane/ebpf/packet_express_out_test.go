//go:build linux

package ebpf

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

// mustLeaveByExpress checks a packet of pod_in byte for byte: the headers that
// overlay_out would have put before it, and inside what routing and NAT would
// have made of it. in is the pod's frame.
func mustLeaveByExpress(t *testing.T, n *node, in []byte, got outcome, to string, toMAC string, w weftWitness) {
	t.Helper()
	out := got.packet
	if len(out) != len(in)+50 {
		t.Fatalf("%d bytes became %d, want %d", len(in), len(out), len(in)+50)
	}
	tosByte := in[atIP+1]
	ecn := tosByte & 3
	if ecn == 3 {
		ecn = 2
	}
	hash := w.Hash ^ w.Hash<<16
	port := uint16(uint64(hash)*uint64(n.runtime.PortMax-n.runtime.PortMin)>>32) + n.runtime.PortMin
	inner := append(append(append([]byte{}, mustMAC(toMAC)...), n.runtime.Mac[:]...), 8, 0)
	inner = append(inner, translated(in[atIP:], w.As, tosByte)...)
	want := eth(net.HardwareAddr(in[6:12]).String(), net.HardwareAddr(in[:6]).String()).
		ip(ourIP, to, tos(ecn), ttl(n.runtime.Ttl), id(binary.BigEndian.Uint16(out[atIP+4:]))).
		udpWithoutChecksum(port, 8472).vxlan(1).raw(inner).bytes(t)
	if !bytes.Equal(out, want) {
		t.Errorf("left as\n     %x\nwant %x", out, want)
	}
	if got.skb.Mark != w.Mark || got.skb.Priority != w.Priority {
		t.Errorf("left with mark %#x and priority %#x; its witness has %#x and %#x", got.skb.Mark, got.skb.Priority, w.Mark, w.Priority)
	}
}

func TestPodPacketsLeaveByExpress(t *testing.T) {
	n := newPodNode(t)
	for name, begun := range map[string]flow{
		"our connection": ourTCP, "our UDP": ourUDP,
		"to a service": viaService, "UDP to a service": viaServiceUDP,
		"masqueraded": masqueraded, "masqueraded UDP": masqueradedUDP,
		"all that NAT can change": bothEnds, "another port": otherPort,
	} {
		t.Run(name, func(t *testing.T) { n.tb = t; n.mustDepart(t, begun, begun) })
	}
	for name, begun := range map[string]flow{
		"answers to blue's connection": blueTCP, "answers to blue's UDP": blueUDP,
		"answers to who came by a service": fromOutside,
	} {
		t.Run(name, func(t *testing.T) { n.tb = t; n.mustDepart(t, begun, begun.answers()) })
	}
}

// mustDepart sends a packet of a flow that is established.
func (n *node) mustDepart(t *testing.T, begun, f flow) {
	t.Helper()
	n.reset()
	n.tracked(begun)
	n.witness(f, func(w *weftWitness) { w.Mark, w.Priority, w.Hash = 0x4000, 6, 0xcafef00d })
	w, _ := n.witnessOf(f)
	in := fromPod(f, 100).bytes(t)
	got := n.run(podIn, in)
	packetCase{verdict: redirected, counted: sent(blueIP, "express", 1, uint64(len(in)-14))}.check(t, in, got)
	if got.verdict == redirected {
		mustLeaveByExpress(t, n, in, got, blueIP, blueMAC, w)
	}
}

// Aggregates go out of the overlay device, as the host would have sent them there,
// and the VXLAN driver encapsulates them. Whether their host lets them pass it
// finds out itself, so nothing has to be proven.
func TestAggregatesLeaveByExpress(t *testing.T) {
	n := newPodNode(t)
	const segments, size = 2, podMTU - 52
	for name, flows := range map[string]struct{ begun, sent flow }{
		"our connection":                   {ourTCP, ourTCP},
		"to a service":                     {viaService, viaService},
		"masqueraded":                      {masqueraded, masqueraded},
		"answers to who came by a service": {fromOutside, fromOutside.answers()},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(flows.begun)
			n.peerState(blueIP, func(s *weftPeerState) { s.TxProven = 0 })
			n.witness(flows.sent, func(w *weftWitness) { w.Mark, w.Priority, w.Hash = 0x4000, 6, 0xcafef00d })
			w, _ := n.witnessOf(flows.sent)
			in := fromPod(flows.sent, segments*size-5).bytes(t)
			got := n.runProgram(n.tellingTwin(podIn, 0), podIn, in, 0, aggregate(segments, size))
			load := uint64(segments*podMTU - 5)
			packetCase{verdict: redirected, counted: sent(blueIP, "express", segments, load)}.check(t, in, got)

			want := append(append(append([]byte{}, mustMAC(blueMAC)...), n.runtime.Mac[:]...), 8, 0)
			want = append(want, translated(in[atIP:], w.As, in[atIP+1])...)
			if !bytes.Equal(got.packet, want) {
				t.Errorf("left as\n     %x\nwant %x", got.packet, want)
			}
			if got.skb.Mark != w.Mark || got.skb.Priority != w.Priority || got.skb.GSOSize != size {
				t.Errorf("left with mark %#x, priority %#x and segments of %d bytes", got.skb.Mark, got.skb.Priority, got.skb.GSOSize)
			}
			if got.skb.CB[4] != 0xc000 {
				t.Errorf("left with index %#x: overlay_out will not know it", got.skb.CB[4])
			}
		})
	}
}

// Right behind an aggregate a small packet of its connection takes express too:
// from pod_in on both roads have one queue.
func TestSmallPacketBehindAnAggregateLeavesByExpress(t *testing.T) {
	n := newPodNode(t)
	established(these(ourTCP), func(n *node) { n.setAggregates(n.accel.objects.TxAggregates, ago(-time.Second)) })(n)
	in := fromPod(ourTCP, 100).bytes(t)
	packetCase{verdict: redirected, counted: sent(blueIP, "express", 1, uint64(len(in)-14))}.check(t, in, n.run(podIn, in))
}

// overlay_out lets an aggregate of express pass, which is counted, and which is no
// witness: it has not come through the host's rules.
func TestDepartedAggregateIsNoWitness(t *testing.T) {
	n := newPodNode(t)
	for name, c := range map[string]struct {
		index     int32
		counted   map[string]PathCounters
		reason    weftReason
		witnessed bool
	}{
		"by express":         {index: 0xc000},
		"by the stack":       {index: untouched(0, 64), counted: sent(blueIP, "kernel", 2, 204), reason: weftReasonREASON_AGGREGATE, witnessed: true},
		"its index is wiped": {index: 0, counted: sent(blueIP, "kernel", 2, 204), reason: weftReasonREASON_AGGREGATE},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(ourTCP)
			way := passage{overlayOut, ourTCP, ourTCP}
			in := way.frame(t, 100)
			got := n.behind(n.tellingTwin(overlayOut, c.index), way, in, aggregate(2, 60))
			packetCase{verdict: passed, reason: c.reason, counted: c.counted}.check(t, in, got)
			if _, ok := n.witnessOf(ourTCP); ok != c.witnessed {
				t.Errorf("the flow is witnessed: %v, want %v", ok, c.witnessed)
			}
			if left := int32(got.skb.CB[4]); left == 0 || left == c.index {
				t.Errorf("the index is %#x afterwards: uplink_out can't tell that the host has left it alone", left)
			}
		})
	}
}

// A flow's next hop is asked for once a tick of the clock; what was asked for
// another flow, peer or mark, for shorter packets or a tick ago says nothing.
func TestNextHopIsRememberedForATick(t *testing.T) {
	n := newPodNode(t)
	n.Run(t, "ip route add blackhole "+blueIP) // asked now there is no way
	const hash, mark = 0x12345678, 5
	remembered := weftRoute{Hash: hash, Remote: toBE32(addr(blueIP)), Mark: mark, Hop: toBE32(addr(blueIP)), Mtu: 202}
	for name, c := range map[string]struct {
		change func(*weftRoute)
		asked  uint64 // so much earlier
		taken  bool
	}{
		"for this flow":          {taken: true},
		"a tick ago":             {asked: uint64(time.Second) / uint64(hz())},
		"for another flow":       {change: func(r *weftRoute) { r.Hash++ }},
		"for another peer":       {change: func(r *weftRoute) { r.Remote++ }},
		"for another mark":       {change: func(r *weftRoute) { r.Mark = 0 }},
		"for shorter packets":    {change: func(r *weftRoute) { r.Mtu = 201 }},
		"for packets this long":  {change: func(r *weftRoute) { r.Mtu = 202 }, taken: true},
		"for much longer ones":   {change: func(r *weftRoute) { r.Mtu = 9000 }, taken: true},
		"when nothing was asked": {change: func(r *weftRoute) { *r = weftRoute{} }},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(ourTCP)
			in := fromPod(ourTCP, 100).bytes(t)
			taken := 0
			for range 20 {
				n.nextPacket()
				n.witness(ourTCP, func(w *weftWitness) { w.Hash, w.Mark = hash, mark })
				route := remembered
				if c.change != nil {
					c.change(&route)
				}
				n.MustDo(t, func() error {
					route.Asked = coarseNow() - c.asked
					all := make([]weftRoute, ebpf.MustPossibleCPU())
					for i := range all {
						all[i] = route
					}
					if err := n.accel.objects.Routes.Put(hash&(n.accel.objects.Routes.MaxEntries()-1), all); err != nil {
						return err
					}
					verdict, err := n.accel.objects.PodIn.Run(&ebpf.RunOptions{
						Data: in, DataOut: make([]byte, len(in)+256), Context: skBuff{Ifindex: n.veth},
					})
					if int32(verdict) == redirected {
						taken++
					}
					return err
				})
			}
			// Now and then the clock ticks in between.
			if c.taken && taken < 5 || !c.taken && taken > 0 {
				t.Errorf("%d of 20 packets went by what was remembered, want any: %v", taken, c.taken)
			}
		})
	}
}
