//go:build linux

package ebpf

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// passage is a program behind netfilter, and a direction of a flow that gets
// there.
type passage struct {
	name  tcProgram
	begun flow
	sent  flow
}

// hop makes a packet one that has come through the host's routing.
func hop(frame []byte) []byte { return setIP(atIP, 8, frame[atIP+8]-1)(frame) }

// frame is a packet of the flow as it comes there, behind NAT.
func (b passage) frame(t *testing.T, size int, broken ...mutation) []byte {
	t.Helper()
	if b.name == podOut {
		return b.sent.after().packet(gatewayMAC, podMAC, size).bytes(t, append([]mutation{hop}, broken...)...)
	}
	return b.sent.after().packet(ourMAC, blueMAC, size).bytes(t, append([]mutation{hop}, broken...)...)
}

// came says where the packet came into the host.
func (b passage) came(n *node) func(*skBuff) {
	return func(s *skBuff) {
		s.IngressIfindex = n.veth
		if b.name == podOut {
			s.IngressIfindex = n.overlay
		}
	}
}

// newcomer is how many packets of a flow come before its witness:
// NEWCOMER_PACKETS of bpf/constants.h.
const newcomer = 8

// behind runs a packet of a flow that has shown enough of them.
func (n *node) behind(prog *ebpf.Program, b passage, in []byte, with ...func(*skBuff)) outcome {
	n.tb.Helper()
	with = append([]func(*skBuff){b.came(n)}, with...)
	for range newcomer {
		n.runProgram(prog, b.name, in, 0, with...)
	}
	return n.runProgram(prog, b.name, in, 0, with...)
}

// twins are the programs behind netfilter, for packets that were untouched on
// the way.
func (n *node) twins() map[tcProgram]*ebpf.Program {
	return map[tcProgram]*ebpf.Program{
		overlayOut: n.tellingTwin(overlayOut, untouched(0, 64)), podOut: n.tellingTwin(podOut, untouched(0, 64)),
	}
}

// passages are flows by what is special, in both directions.
func passages() map[string]passage {
	all := map[string]passage{}
	for name, f := range map[string]flow{
		"our connection": ourTCP, "our UDP": ourUDP, "a service": viaService, "a service by UDP": viaServiceUDP,
		"a masqueraded flow": masqueraded, "masqueraded UDP": masqueradedUDP, "all that NAT can change": bothEnds, "another port": otherPort,
	} {
		all[name+", to the peer"] = passage{overlayOut, f, f}
		all[name+", answers"] = passage{podOut, f, f.answers()}
	}
	for name, f := range map[string]flow{"blue's connection": blueTCP, "blue's UDP": blueUDP, "by a service that is ours": fromOutside} {
		all[name+", to our pod"] = passage{podOut, f, f}
		all[name+", answers"] = passage{overlayOut, f, f.answers()}
	}
	for name, f := range map[string]flow{"to blue": ourMonologue, "to a service": serviceMonologue, "masqueraded": maskedMonologue} {
		all["a monologue "+name] = passage{overlayOut, f, f}
	}
	for name, f := range map[string]flow{"to blue": ourDialogue, "to a service": serviceDialogue} {
		all["a dialogue "+name] = passage{overlayOut, f, f}
		all["a dialogue "+name+", answers"] = passage{podOut, f, f.answers()}
	}
	all["a dialogue of blue's"] = passage{podOut, blueDialogue, blueDialogue}
	all["a dialogue of blue's, answers"] = passage{overlayOut, blueDialogue, blueDialogue.answers()}
	all["a monologue of blue's"] = passage{podOut, blueMonologue, blueMonologue}
	return all
}

func TestFlowsAreWitnessed(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	for name, b := range passages() {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(b.begun)
			started := coarseNow()
			in := b.frame(t, 100)
			got := n.behind(twins[b.name], b, in, marked(0x4001), func(s *skBuff) { s.Priority = 3 })
			w, ok := n.witnessOf(b.sent)
			if !ok || n.witnesses() != 1 {
				t.Fatalf("%d witnesses, of this flow: %v (verdict %d, passed %v)", n.witnesses(), ok, got.verdict, got.passed)
			}
			want := weftWitness{As: b.sent.as(), Epoch: epoch, Device: n.veth, Seen: w.Seen, Status: b.begun.talk.status()}
			if b.name == overlayOut {
				want.Device, want.Mark, want.Priority, want.Hash = n.overlay, 0x4001, 3, w.Hash
				hash := w.Hash ^ w.Hash<<16
				port := uint16(uint64(hash)*uint64(n.runtime.PortMax-n.runtime.PortMin)>>32) + n.runtime.PortMin
				if got.verdict != redirected || outerOf(got.packet).sourcePort() != port {
					t.Errorf("left from port %d (verdict %d), the witness says %d", outerOf(got.packet).sourcePort(), got.verdict, port)
				}
			} else {
				want.Turn = 1 // this packet's
				packetCase{verdict: passed}.check(t, in, got)
			}
			if w != want || w.Seen < started || w.Seen > coarseNow() {
				t.Errorf("witnessed as %+v, want %+v, since %d", w, want, started)
			}
		})
	}
}

// Most flows are short: the first packets of each get no witness.
func TestNewcomersAreNotWitnessed(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	for _, b := range []passage{{overlayOut, ourTCP, ourTCP}, {podOut, blueTCP, blueTCP}, {overlayOut, viaService, viaService}} {
		t.Run(string(b.name)+", "+b.begun.to, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(b.begun)
			in := b.frame(t, 100)
			for i := range newcomer {
				n.runProgram(twins[b.name], b.name, in, 0, b.came(n))
				if n.witnesses() != 0 {
					t.Fatalf("packet %d was witnessed", i+1)
				}
			}
			for range 2 {
				n.runProgram(twins[b.name], b.name, in, 0, b.came(n))
				if _, ok := n.witnessOf(b.sent); !ok {
					t.Error("the next one was not witnessed")
				}
			}
		})
	}
	t.Run("asked for every so many packets, while conntrack is not content", func(t *testing.T) {
		n.tb = t
		n.reset()
		n.tracked(blueTCP)
		n.entry(blueTCP, withTCPState(tcpLastAck))
		b := passage{podOut, blueTCP, blueTCP}
		n.behind(twins[b.name], b, b.frame(t, 100))
		n.entry(blueTCP, withTCPState(tcpEstablished))
		for i := range newcomer {
			n.runProgram(twins[b.name], b.name, b.frame(t, 100), 0, b.came(n))
			if n.witnesses() != 0 {
				t.Fatalf("witnessed %d packets after conntrack was asked", i+1)
			}
		}
		n.runProgram(twins[b.name], b.name, b.frame(t, 100), 0, b.came(n))
		if _, ok := n.witnessOf(blueTCP); !ok {
			t.Error("conntrack was not asked again")
		}
	})
	t.Run("each flow and direction for itself", func(t *testing.T) {
		n.tb = t
		n.reset()
		n.tracked(blueTCP, blueUDP)
		a, b := passage{podOut, blueTCP, blueTCP}, passage{podOut, blueUDP, blueUDP}
		n.behind(twins[a.name], a, a.frame(t, 100))
		n.runProgram(twins[b.name], b.name, b.frame(t, 100), 0, b.came(n))
		if _, ok := n.witnessOf(blueUDP); ok || n.witnesses() != 1 {
			t.Error("a flow was witnessed for another's packets")
		}
		back := passage{overlayOut, blueTCP, blueTCP.answers()}
		n.runProgram(twins[back.name], back.name, back.frame(t, 100), 0, back.came(n))
		if _, ok := n.witnessOf(back.sent); ok {
			t.Error("a direction was witnessed for the other's packets")
		}
	})
}

// A packet by express after its own witness: both ways, and the same bytes that
// the programs behind netfilter would have sent.
func TestWitnessedFlowsGoByExpress(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	for name, b := range passages() {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(b.begun)
			got := n.behind(twins[b.name], b, b.frame(t, 100), marked(0x4001), func(s *skBuff) { s.Priority = 3 })
			w, _ := n.witnessOf(b.sent)
			if b.name == podOut {
				frame := b.sent.packet(blueMAC, ourMAC, 100).bytes(t)
				express := n.run(uplinkIn, carriedFrame(frame).bytes(t))
				packetCase{verdict: redirected, reason: weftReasonREASON_FLOW_ORDER, counted: received(blueIP, "express", 1, uint64(len(frame)-14))}.
					check(t, frame, express)
				mustBeDelivered(t, frame, n.mustLeaveLine(t, express), w.As, 0)
				return
			}
			in := fromPod(b.sent, 100).bytes(t)
			express := n.run(podIn, in)
			packetCase{verdict: redirected, counted: sent(blueIP, "express", 1, uint64(len(in)-14))}.check(t, in, express)
			blank := func(p []byte) string { // but for the ID, and the MACs that the redirect writes
				p = setIP(atIP, 4, 0, 0)(append([]byte{}, p...))
				return string(p[atIP:])
			}
			if blank(express.packet) != blank(got.packet) {
				t.Errorf("by express left\n     %x\nby base %x", express.packet, got.packet)
			}
			if express.skb.Mark != 0x4001 || express.skb.Priority != 3 {
				t.Errorf("left with mark %#x and priority %d", express.skb.Mark, express.skb.Priority)
			}
		})
	}
}

// What proves nothing of a flow.
func TestWhatIsNotWitnessed(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	out, in := passage{overlayOut, ourTCP, ourTCP}, passage{podOut, blueTCP, blueTCP}
	type situation struct {
		given  func(*node)
		broken []mutation
		came   func(*skBuff)
		stamp  int32 // untouched(0, 64) if not given
		reason weftReason
		only   tcProgram
	}
	situations := map[string]situation{
		"conntrack does not know the flow":            {given: untracked},
		"a connection in state LAST_ACK":              {given: func(n *node) { n.entry(ourTCP, withTCPState(tcpLastAck)); n.entry(blueTCP, withTCPState(tcpLastAck)) }},
		"a connection in state SYN_RECV":              {given: func(n *node) { n.entry(ourTCP, withTCPState(tcpSynRecv)); n.entry(blueTCP, withTCPState(tcpSynRecv)) }},
		"express is switched off on the node":         {given: inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_EXPRESS) })},
		"the agent holds express back":                {given: beat(func(p *weftPulse) { p.Held = 1 })},
		"the agent has stopped":                       {given: beat(func(p *weftPulse) { p.Beat = 0 })},
		"a TOS that the host set":                     {broken: []mutation{setIP(atIP, 1, 0xb8)}, reason: weftReasonREASON_FLOW_MANGLED},
		"an ECN mark that the host set":               {broken: []mutation{setIP(atIP, 1, 0x01)}, reason: weftReasonREASON_FLOW_MANGLED},
		"a TTL that the host set":                     {broken: []mutation{setIP(atIP, 8, 64)}, reason: weftReasonREASON_FLOW_MANGLED},
		"a TTL that the host set to the highest":      {broken: []mutation{setIP(atIP, 8, 255)}, reason: weftReasonREASON_FLOW_MANGLED},
		"a TTL that fell by two":                      {broken: []mutation{setIP(atIP, 8, 62)}, reason: weftReasonREASON_FLOW_MANGLED},
		"a stamp that somebody wiped":                 {stamp: -1},
		"a stamp of somebody else's":                  {stamp: 1, reason: weftReasonREASON_FLOW_MANGLED},
		"SYN":                                         {broken: []mutation{set(atIP+20+13, 0x02)}},
		"SYN and ACK":                                 {broken: []mutation{set(atIP+20+13, 0x12)}},
		"FIN":                                         {broken: []mutation{set(atIP+20+13, 0x11)}},
		"RST":                                         {broken: []mutation{set(atIP+20+13, 0x14)}},
		"without ACK":                                 {broken: []mutation{set(atIP+20+13, 0x08)}},
		"a first fragment":                            {broken: []mutation{setIP(atIP, 6, 0x20)}},
		"a later fragment":                            {broken: []mutation{setIP(atIP, 6, 0, 9)}},
		"a wrong header checksum":                     {broken: []mutation{set(atIP+10, 0xde, 0xad)}},
		"a trailer":                                   {broken: []mutation{trailer(3)}},
		"a protocol without ports":                    {broken: []mutation{setIP(atIP, 9, 253)}},
		"of the host itself":                          {came: func(s *skBuff) { s.IngressIfindex = 0 }},
		"come by the uplink":                          {came: func(s *skBuff) { s.IngressIfindex = n.uplink }},
		"from a peer to another":                      {only: overlayOut, came: func(s *skBuff) { s.IngressIfindex = n.overlay }},
		"from another pod of ours":                    {only: podOut, came: func(s *skBuff) { s.IngressIfindex = n.otherVeth }},
		"flooded to the wrong pod":                    {only: podOut, came: func(s *skBuff) { s.IngressIfindex, s.Ifindex = n.overlay, n.otherVeth }},
		"flooded to who routes for others":            {only: podOut, broken: []mutation{set(0, mustMAC(otherPodMAC)...)}},
		"from who is not the gateway":                 {only: podOut, broken: []mutation{set(6, mustMAC(otherPodMAC)...)}},
		"broadcast":                                   {only: podOut, broken: []mutation{set(0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)}},
		"to an address that no pod of ours has":       {only: podOut, given: withoutPod},
		"to a MAC that is not the peer's":             {only: overlayOut, broken: []mutation{set(0, mustMAC(greenMAC)...)}, reason: weftReasonREASON_DESTINATION_MAC},
		"to an address that no peer has":              {only: overlayOut, broken: []mutation{setIP(atIP, 16, 10, 244, 77, 1)}, reason: weftReasonREASON_DESTINATION_UNKNOWN},
		"the first answer, as far as conntrack knows": {given: func(n *node) { untracked(n); n.show(ourUDP.answers(), nil); n.show(blueUDP.answers(), nil) }},
		"an entry that was made by netlink, special":  {given: madeByNetlink(ourTCP, blueTCP)},
	}
	for name, c := range situations {
		for _, b := range []passage{out, in} {
			if c.only != "" && c.only != b.name {
				continue
			}
			if strings.HasPrefix(name, "the first answer") {
				b.begun, b.sent = ourUDP, ourUDP
				if b.name == podOut {
					b.begun, b.sent = blueUDP, blueUDP
				}
			}
			t.Run(name+", "+string(b.name), func(t *testing.T) {
				n.tb = t
				n.reset()
				n.tracked(ourTCP, blueTCP)
				if c.given != nil {
					c.given(n)
				}
				prog := twins[b.name]
				if c.stamp != 0 {
					prog = n.tellingTwin(b.name, max(c.stamp, 0))
				}
				var with []func(*skBuff)
				if c.came != nil {
					with = append(with, c.came)
				}
				in := b.frame(t, 100, c.broken...)
				got := n.behind(prog, b, in, with...)
				if n.witnesses() != 0 {
					t.Error("the flow was witnessed")
				}
				want := map[string]uint64{}
				if c.reason != weftReasonREASON_NONE {
					want = one(c.reason)
				}
				if len(got.dropped) > 0 || fmt.Sprint(got.passed) != fmt.Sprint(want) {
					t.Errorf("passed %v, dropped %v; want %v", got.passed, got.dropped, want)
				}
				if b.name == podOut {
					packetCase{verdict: passed, reason: c.reason}.check(t, in, got)
				}
			})
		}
	}
}

// Rules may look at each question for a name server, so none of them is witnessed, as
// its port is before or behind NAT. What is no such question is.
func TestQuestionsForNamesAreNotWitnessed(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	udp := func(from, to, asTo string) flow {
		return flow{protocol: unix.IPPROTO_UDP, from: from + ":40030", to: to, asTo: asTo}
	}
	ours, blues := udp(ourPod, bluePod+":53", ""), udp(bluePod, ourPod+":53", "")
	overTCP := flow{protocol: unix.IPPROTO_TCP, from: ourPod + ":40030", to: bluePod + ":53"}
	for name, c := range map[string]struct {
		passage
		witnessed int
	}{
		"ours":                            {passage{overlayOut, ours, ours}, 0},
		"ours by a service":               {passage{overlayOut, udp(ourPod, serviceIP+":53", bluePod+":5353"), udp(ourPod, serviceIP+":53", bluePod+":5353")}, 0},
		"ours by a service on other port": {passage{overlayOut, udp(ourPod, serviceIP+":5300", bluePod+":53"), udp(ourPod, serviceIP+":5300", bluePod+":53")}, 0},
		"blue's":                          {passage{podOut, blues, blues}, 0},
		"answers to ours":                 {passage{podOut, ours, ours.answers()}, 1},
		"answers to blue's":               {passage{overlayOut, blues, blues.answers()}, 1},
		"over TCP":                        {passage{overlayOut, overTCP, overTCP}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(c.begun)
			n.behind(twins[c.name], c.passage, c.frame(t, 100))
			if got := n.witnesses(); got != c.witnessed {
				t.Errorf("%d witnesses, want %d", got, c.witnessed)
			}
		})
	}
}

func madeByNetlink(flows ...flow) func(*node) {
	return func(n *node) {
		n.tb.Helper()
		untracked(n)
		for _, f := range flows {
			if err := n.tryEntry(0x400, f, withStatus(ipsConfirmed|ipsSeenReply|ipsAssured), withTimeout(60), withTCPState(tcpEstablished)); err != nil {
				n.tb.Fatal(err)
			}
		}
	}
}

// A witness is written again when something has changed, or after a sixteenth of
// its life.
func TestWitnessIsWrittenAgain(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	for name, c := range map[string]struct {
		change func(*weftWitness)
		age    time.Duration
		kept   bool
	}{
		"just seen":               {age: 0, kept: true},
		"seen lately":             {age: 100 * time.Millisecond, kept: true},
		"seen some time ago":      {age: 300 * time.Millisecond},
		"seen long ago":           {age: time.Hour},
		"seen before an answer":   {change: func(w *weftWitness) { w.Status = 0 }, age: 300 * time.Millisecond},
		"seen in another epoch":   {change: func(w *weftWitness) { w.Epoch-- }},
		"seen at another device":  {change: func(w *weftWitness) { w.Device++ }},
		"seen with another mark":  {change: func(w *weftWitness) { w.Mark++ }},
		"seen with another class": {change: func(w *weftWitness) { w.Priority++ }},
		"seen with another hash":  {change: func(w *weftWitness) { w.Hash++ }},
		"seen from another":       {change: func(w *weftWitness) { w.As.Saddr++ }},
		"seen to another":         {change: func(w *weftWitness) { w.As.Daddr++ }},
		"seen from another port":  {change: func(w *weftWitness) { w.As.Sport++ }},
		"seen to another port":    {change: func(w *weftWitness) { w.As.Dport++ }},
	} {
		for _, b := range []passage{{overlayOut, ourTCP, ourTCP}, {podOut, blueTCP, blueTCP}} {
			t.Run(name+", "+string(b.name), func(t *testing.T) {
				n.tb = t
				n.reset()
				n.tracked(b.begun)
				in := b.frame(t, 100)
				n.behind(twins[b.name], b, in)
				right, ok := n.witnessOf(b.sent)
				if !ok {
					t.Fatal("not witnessed")
				}
				was := right
				was.Seen, was.Renewal = ago(c.age), 12345
				if c.change != nil {
					c.change(&was)
				}
				n.put(n.accel.objects.Witnesses, b.sent.before(), was)
				started := coarseNow()
				n.behind(twins[b.name], b, in)
				is, _ := n.witnessOf(b.sent)
				if c.kept {
					if is != was {
						t.Errorf("it was %+v and is %+v", was, is)
					}
					return
				}
				if is.Seen < started {
					t.Errorf("seen at %d, the packet came at %d", is.Seen, started)
				}
				right.Seen, right.Renewal = is.Seen, is.Renewal
				if is != right {
					t.Errorf("written as %+v, want %+v", is, right)
				}
			})
		}
	}
}

// The stamp between the programs in front of netfilter and those behind it.
func TestStampsThroughTheStack(t *testing.T) {
	n := newPodNode(t)
	pass := func(name tcProgram, index int32, in []byte, with ...func(*skBuff)) (outcome, int32) {
		got := n.runProgram(n.tellingTwin(name, index), name, in, 0, with...)
		return got, int32(got.skb.CB[4])
	}
	in := fromPod(ourTCP, 100).bytes(t, setIP(atIP, 1, 0x2a), setIP(atIP, 8, 77))
	frame := blueTCP.packet(blueMAC, ourMAC, 100).bytes(t, setIP(atIP, 1, 0x2a), setIP(atIP, 8, 77))
	marking := untouched(0x2a, 77)
	for name, c := range map[string]struct {
		program tcProgram
		in      []byte
		with    func(*skBuff)
		before  int32
		after   int32
	}{
		"from a pod":                             {podIn, in, nil, 0, marking},
		"from a pod, with an index of others'":   {podIn, in, nil, 0x77, 0x77},
		"from a pod, neither TCP nor UDP":        {podIn, setIP(atIP, 9, 1)(append([]byte{}, in...)), nil, 0, marking},
		"stripped by us":                         {overlayIn, frame, n.stampedAs("stripped"), 0, marking},
		"stripped by the kernel":                 {overlayIn, frame, n.stampedAs("good"), 0, marking},
		"not seen by uplink_in":                  {overlayIn, frame, nil, 0, marking},
		"a suspect":                              {overlayIn, frame, n.stampedAs("suspect"), 0, 0},
		"to a pod":                               {podOut, hop(append([]byte{}, frame...)), nil, marking, 0},
		"to a pod, with an index of others'":     {podOut, hop(append([]byte{}, frame...)), nil, 0x77, 0},
		"ARP to a pod":                           {podOut, eth(gatewayMAC, podMAC).of(layers.EthernetTypeARP).payload(28).bytes(t), nil, 0x77, 0},
		"to a peer, left to the VXLAN driver":    {overlayOut, toBlue(100).bytes(t), func(s *skBuff) { s.GSOSize, s.GSOSegs = 50, 2 }, marking, 1},
		"to a peer, by base":                     {overlayOut, toBlue(100).bytes(t), nil, marking, 0x8000},
		"to nobody":                              {overlayOut, eth(ourMAC, blueMAC).ip(ourPod, strangerIP).udp(1, 2).bytes(t), nil, marking, marking},
		"from a pod, by express":                 {podIn, fromPod(ourUDP, 100).bytes(t), nil, 0, 0x8000},
		"from a pod, by express, index of other": {podIn, fromPod(ourUDP, 100).bytes(t), nil, 0x77, 0x8000},
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			established(these(ourUDP))(n)
			var with []func(*skBuff)
			if c.with != nil {
				with = append(with, c.with)
			}
			got, after := pass(c.program, c.before, c.in, with...)
			if after != c.after {
				t.Errorf("the index is %#x afterwards, want %#x (verdict %d, passed %v)", after, c.after, got.verdict, got.passed)
			}
		})
	}
	t.Run("without express nothing is stamped", func(t *testing.T) {
		n.tb = t
		n.reset()
		for program, packet := range map[tcProgram][]byte{podIn: in, overlayIn: frame} {
			prog := n.twinWith(program, false, n.telling(0))
			got := n.runProgram(prog, program, packet, 0)
			if got.verdict != passed || got.skb.CB[4] != 0 {
				t.Errorf("%s: verdict %d, index %#x", program, got.verdict, got.skb.CB[4])
			}
		}
	})
}

// A rule that changes either TOS or TTL, of whatever packet, is always seen.
func TestChangedTOSOrTTLIsAlwaysSeen(t *testing.T) {
	for tos := range 256 {
		seen := map[int32]int{}
		for ttl := range 256 {
			index := untouched(uint8(tos), uint8(ttl))
			if index <= 0 || index >= 0x8000 {
				t.Fatalf("TOS %d, TTL %d: index %#x", tos, ttl, index)
			}
			if other, ok := seen[index]; ok {
				t.Fatalf("with TOS %d the TTLs %d and %d look alike", tos, other, ttl)
			}
			seen[index] = ttl
		}
	}
	for ttl := range 256 {
		seen := map[int32]int{}
		for tos := range 256 {
			index := untouched(uint8(tos), uint8(ttl))
			if other, ok := seen[index]; ok {
				t.Fatalf("with TTL %d the TOS %d and %d look alike", ttl, other, tos)
			}
			seen[index] = tos
		}
	}
}

// More flows than there is room for: those not seen for long make room, and
// come again.
func TestMoreFlowsThanWitnesses(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	n.reset()
	b := passage{podOut, blueTCP, blueTCP}
	n.tracked(blueTCP)
	n.witnessed(blueTCP)
	room := int(n.accel.objects.Witnesses.MaxEntries())
	for range 20 { // which ones go the kernel knows about
		if _, ok := n.witnessOf(blueTCP); !ok {
			break
		}
		flows, all := make([]weftFlow, room), make([]weftWitness, room)
		for i := range flows {
			flows[i] = weftFlow{Saddr: rand.Uint32(), Daddr: rand.Uint32(), Sport: uint16(rand.Uint32()), Dport: 1, Protocol: 6}
			all[i] = weftWitness{Seen: fresh(), Epoch: epoch, Device: n.veth, Status: assured.status()}
		}
		if _, err := n.accel.objects.Witnesses.BatchUpdate(flows, all, nil); err != nil {
			t.Fatal(err)
		}
		if have := n.witnesses(); have > room || have < room/2 {
			t.Errorf("%d witnesses in a map for %d", have, room)
		}
	}
	in := toPod(blueTCP, 100).bytes(t)
	n.beat(func(*weftPulse) {})
	n.peerState(blueIP, func(s *weftPeerState) { s.RxProven = fresh() })
	if _, ok := n.witnessOf(blueTCP); ok {
		t.Fatal("the flow's witness did not have to go")
	}
	n.nextPacket()
	packetCase{verdict: redirected, reason: weftReasonREASON_FLOW_UNWITNESSED, counted: received(blueIP, "base", 1, 152)}.check(t, in, n.run(uplinkIn, in))
	n.behind(twins[podOut], b, b.frame(t, 100))
	packetCase{verdict: redirected, reason: weftReasonREASON_FLOW_ORDER, counted: received(blueIP, "express", 1, 152)}.
		check(t, in, n.run(uplinkIn, in))
}

// An entry of conntrack's lives as long as if conntrack had seen the packets.
func TestConntrackEntriesAreKeptAlive(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	ticks := uint32(hz())
	// Another time is written than is looked for, so that writing shows.
	times := func(f *weftInForce) {
		f.UdpStream = weftTimeout{Ms: 77_000, Jiffies: 120 * ticks, Slack: ticks}
		f.Udp = weftTimeout{Ms: 11_000, Jiffies: 30 * ticks, Slack: ticks}
		f.TcpUnacknowledged = weftTimeout{Ms: 222_000, Jiffies: 300 * ticks, Slack: ticks}
		f.TcpEstablished = weftTimeout{Ms: 3333_000, Jiffies: 5000 * ticks, Slack: ticks}
	}
	flag := func(f flow, size int) (in, out, frame []byte) {
		return toPod(f, size).bytes(t), fromPod(f.answers(), size).bytes(t), f.packet(blueMAC, ourMAC, size).bytes(t)
	}
	for name, c := range map[string]struct {
		f         flow
		size      int
		was, want uint32 // seconds
	}{
		"UDP, low":                                {blueUDP, 100, 5, 77},
		"UDP, at its time":                        {blueUDP, 100, 120, 120},
		"UDP, two seconds off":                    {blueUDP, 100, 118, 77},
		"UDP, two seconds above":                  {blueUDP, 100, 122, 77},
		"UDP, far above":                          {blueUDP, 100, 9999, 77},
		"UDP that nobody answers, low":            {blueMonologue, 100, 5, 11},
		"UDP that nobody answers, at its time":    {blueMonologue, 100, 30, 30},
		"UDP that nobody answers, as assured":     {blueMonologue, 100, 120, 11},
		"UDP answered lately, low":                {blueDialogue, 100, 5, 11},
		"UDP answered lately, at its time":        {blueDialogue, 100, 30, 30},
		"TCP with data, low":                      {blueTCP, 100, 5, 222},
		"TCP with data, at its time":              {blueTCP, 100, 300, 300},
		"TCP with data, two seconds off":          {blueTCP, 100, 298, 222},
		"TCP with data, as long as established":   {blueTCP, 100, 5000, 222},
		"TCP with a byte of data, as established": {blueTCP, 1, 5000, 222},
		"TCP without data, low":                   {blueTCP, 0, 5, 3333},
		"TCP without data, unacknowledged so far": {blueTCP, 0, 300, 3333},
		"TCP without data, at its time":           {blueTCP, 0, 5000, 5000},
		"TCP without data, two seconds off":       {blueTCP, 0, 4998, 3333},
	} {
		in, out, frame := flag(c.f, c.size)
		answers, to := passage{overlayOut, c.f, c.f.answers()}, passage{podOut, c.f, c.f}
		for _, way := range []struct {
			name tcProgram
			run  func() outcome
		}{
			{uplinkIn, func() outcome { return n.run(uplinkIn, in) }},
			{overlayIn, func() outcome { return n.run(overlayIn, frame, n.stampedAs("good")) }},
			{podIn, func() outcome { return n.run(podIn, out) }},
			{overlayOut, func() outcome {
				return n.behind(twins[overlayOut], answers, answers.frame(t, c.size))
			}},
			{podOut, func() outcome { return n.behind(twins[podOut], to, to.frame(t, c.size)) }},
		} {
			if c.f.talk == unanswered && (way.name == podIn || way.name == overlayOut) {
				continue // the way of the answers
			}
			t.Run(name+", "+string(way.name), func(t *testing.T) {
				n.tb = t
				n.reset()
				n.tracked(c.f)
				if way.name != overlayOut && way.name != podOut {
					n.witnessed(c.f, c.f.answers())
				}
				n.inForce(times)
				n.entry(c.f, withTimeout(c.was))
				got := way.run()
				if way.name != podOut && got.verdict != redirected {
					t.Fatalf("verdict %d, passed %v", got.verdict, got.passed)
				}
				if is := n.find(c.f).TimeOut; is > c.want || is+2 < c.want {
					t.Errorf("the entry lives for %d seconds more, want %d", is, c.want)
				}
			})
		}
	}
	t.Run("not of a connection that is closing", func(t *testing.T) {
		n.tb = t
		n.reset()
		established(these(blueTCP), inForce(times))(n)
		n.entry(blueTCP, withTCPState(tcpLastAck), withTimeout(30))
		in, out, frame := flag(blueTCP, 0)
		n.run(uplinkIn, in)
		n.run(podIn, out)
		n.run(overlayIn, frame, n.stampedAs("good"))
		if is := n.find(blueTCP).TimeOut; is > 30 {
			t.Errorf("the entry lives for %d seconds more, want 30", is)
		}
	})
}

// A reset that leaves the entry established, since conntrack can't verify it,
// must not have it go in seconds.
func TestEntrySurvivesAResetThatNobodyVerified(t *testing.T) {
	n := newPodNode(t)
	twins := n.twins()
	rst := func(frame []byte) []byte { return set(atIP+20+13, 0x04)(frame) }
	firstEight := func(p []byte) []byte { return setIP(atIP, 2, 0, 28)(setIP(atIP, 6, 0x20)(p[:atIP+28])) }
	for name, broken := range map[string]mutation{
		"with a TTL that ends here": func(p []byte) []byte { return setIP(atIP, 8, 1)(rst(p)) },
		"with IP options": func(p []byte) []byte {
			p = append(append(append([]byte{}, p[:atIP+20]...), 1, 1, 1, 1), rst(p)[atIP+20:]...)
			return setIP(atIP, 2, 0, byte(len(p)-atIP))(setIP(atIP, 0, 0x46)(p))
		},
		"with a trailer":                func(p []byte) []byte { return trailer(4)(rst(p)) },
		"in fragments":                  func(p []byte) []byte { return setIP(atIP, 6, 0x20)(rst(p)) },
		"in fragments of eight bytes":   func(p []byte) []byte { return firstEight(rst(p)) },
		"with a TOS that the host sets": func(p []byte) []byte { return setIP(atIP, 1, 0x28)(rst(p)) },
	} {
		t.Run(name, func(t *testing.T) {
			n.tb = t
			n.reset()
			n.tracked(blueTCP)
			n.entry(blueTCP, withTimeout(10))
			b := passage{podOut, blueTCP, blueTCP}
			n.runProgram(twins[b.name], b.name, b.frame(t, 0, broken), 0, b.came(n))
			if is := n.find(blueTCP).TimeOut; is+2 < 300 {
				t.Errorf("the entry lives for %d seconds more, want 300", is)
			}
		})
	}
	t.Run("a later fragment is no reset", func(t *testing.T) {
		n.tb = t
		n.reset()
		n.tracked(blueTCP)
		n.entry(blueTCP, withTimeout(10))
		b := passage{podOut, blueTCP, blueTCP}
		n.runProgram(twins[b.name], b.name, b.frame(t, 0, rst, setIP(atIP, 6, 0, 9)), 0, b.came(n))
		if is := n.find(blueTCP).TimeOut; is > 10 {
			t.Errorf("the entry lives for %d seconds more, want 10", is)
		}
	})
	for _, b := range []passage{{overlayOut, ourTCP, ourTCP}, {podOut, blueTCP, blueTCP}, {podOut, viaService, viaService.answers()}} {
		for name, c := range map[string]struct {
			given func(*node)
			want  uint32
		}{
			"established": {func(*node) {}, 300},
			"closed":      {func(n *node) { n.entry(b.begun, withTCPState(tcpClose)) }, 10},
		} {
			t.Run(name+", "+string(b.name)+", "+b.sent.from, func(t *testing.T) {
				n.tb = t
				n.reset()
				n.tracked(b.begun)
				c.given(n)
				n.entry(b.begun, withTimeout(10))
				n.runProgram(twins[b.name], b.name, b.frame(t, 0, rst), 0, b.came(n))
				if is := n.find(b.begun).TimeOut; is > c.want || is+2 < c.want {
					t.Errorf("the entry lives for %d seconds more, want %d", is, c.want)
				}
				if n.witnesses() != 0 {
					t.Error("the flow was witnessed")
				}
			})
		}
	}
}

// The times are the host's.
func TestTimeoutsAreTheHosts(t *testing.T) {
	n := newPodNode(t)
	check := func(what string, got weftTimeout, seconds uint32) {
		t.Helper()
		ticks := uint32(hz())
		if want := (weftTimeout{Ms: seconds * 1000, Jiffies: seconds * ticks, Slack: min(ticks, seconds*ticks/4)}); got != want {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
	}
	check("established", n.runtime.TcpEstablished, 432000)
	check("unacknowledged", n.runtime.TcpUnacknowledged, 300)
	check("udp that is assured", n.runtime.UdpStream, 120)
	check("udp that is not assured", n.runtime.Udp, 30)
	n.setSysctl("net/netfilter/nf_conntrack_tcp_timeout_established", "7200")
	n.setSysctl("net/netfilter/nf_conntrack_tcp_timeout_unacknowledged", "2")
	n.setSysctl("net/netfilter/nf_conntrack_udp_timeout_stream", "33")
	n.setSysctl("net/netfilter/nf_conntrack_udp_timeout", "8")
	n.sync()
	check("established", n.runtime.TcpEstablished, 7200)
	check("unacknowledged", n.runtime.TcpUnacknowledged, 2)
	check("udp that is assured", n.runtime.UdpStream, 33)
	check("udp that is not assured", n.runtime.Udp, 8)
	// More than milliseconds in 31 bits can say: what is looked for must be what
	// is written, or every packet writes.
	n.setSysctl("net/netfilter/nf_conntrack_tcp_timeout_established", "5000000")
	n.sync()
	if got := n.runtime.TcpEstablished; uint64(got.Jiffies)*1000 != uint64(got.Ms)*uint64(hz()) {
		t.Errorf("%d ms are written, and %d jiffies looked for", got.Ms, got.Jiffies)
	}
}
