//go:build linux

package ebpf

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// What a node can be given, for express.

// established has flows that conntrack and our programs have seen, as the
// packets that begin them have it, and then something else about the node.
func established(flows []flow, then ...func(*node)) func(*node) {
	return func(n *node) {
		n.tb.Helper()
		n.tracked(flows...)
		for _, f := range flows {
			n.witnessed(f, f.answers())
		}
		for _, change := range then {
			change(n)
		}
	}
}

func these(flows ...flow) []flow { return flows }

func witness(f flow, change func(*weftWitness)) func(*node) {
	return func(n *node) { n.witness(f, change) }
}

func withoutWitness(f flow) func(*node) {
	return func(n *node) {
		n.tb.Helper()
		if err := n.accel.objects.Witnesses.Delete(f.before()); err != nil {
			n.tb.Fatal(err)
		}
	}
}

func beat(change func(*weftPulse)) func(*node) { return func(n *node) { n.beat(change) } }

func peerState(change func(*weftPeerState)) func(*node) {
	return func(n *node) { n.peerState(blueIP, change) }
}

func inForce(change func(*weftInForce)) func(*node) {
	return func(n *node) { n.inForce(change) }
}

// untracked has conntrack forget all flows.
func untracked(n *node) {
	n.tb.Helper()
	n.Run(n.tb, "conntrack -F")
}

// tcpState moves conntrack's idea of a connection.
func tcpState(f flow, state uint8) func(*node) {
	return func(n *node) { n.entry(f, withTCPState(state)) }
}

func withoutVeth(n *node) {
	n.tb.Helper()
	if err := n.accel.objects.Devices.Delete(n.veth); err != nil {
		n.tb.Fatal(err)
	}
}

func withoutPod(n *node) {
	n.tb.Helper()
	if err := n.accel.objects.Endpoints.Delete(toBE32(addr(ourPod))); err != nil {
		n.tb.Fatal(err)
	}
}

// notExpress are reasons that all three programs may have for flows as ours and
// blue's: what is given on top of a node where the flow is established.
type notExpress struct {
	name   string
	reason weftReason // REASON_NONE: none is counted
	// given is told the flow as it began and the direction that is sent.
	given func(begun, sent flow) func(*node)
}

func always(given func(*node)) func(_, _ flow) func(*node) {
	return func(_, _ flow) func(*node) { return given }
}

// notExpressCases are what ends express in either direction.
func notExpressCases() []notExpress {
	sentWitness := func(change func(*weftWitness)) func(_, sent flow) func(*node) {
		return func(_, sent flow) func(*node) { return witness(sent, change) }
	}
	all := []notExpress{
		{name: "express is switched off on the node", given: always(inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_EXPRESS) }))},
		{name: "express is switched off for the peer", given: always(peerState(func(s *weftPeerState) { s.Off = uint32(weftOffOFF_EXPRESS) }))},
		{name: "the agent holds express back", given: always(beat(func(p *weftPulse) { p.Held = 1 }))},
		{name: "the agent has stopped express", given: always(beat(func(p *weftPulse) { p.Beat = 0 }))},
		{
			name:   "no agent for more than three seconds",
			reason: weftReasonREASON_AGENT_SILENT, given: always(beat(func(p *weftPulse) { p.Beat = ago(3100 * time.Millisecond) })),
		},
		{
			name:   "no agent for an hour",
			reason: weftReasonREASON_AGENT_SILENT, given: always(beat(func(p *weftPulse) { p.Beat = ago(time.Hour) })),
		},
		{
			name: "rules have changed since the flow was seen", reason: weftReasonREASON_WITNESS_STALE,
			given: always(beat(func(p *weftPulse) { p.Epoch = epoch + 1 })),
		},
		{
			name: "a witness of a later epoch than is now", reason: weftReasonREASON_WITNESS_STALE,
			given: sentWitness(func(w *weftWitness) { w.Epoch = epoch + 1 }),
		},
		{
			name: "not seen for more than four seconds", reason: weftReasonREASON_WITNESS_STALE,
			given: sentWitness(func(w *weftWitness) { w.Seen = ago(4100 * time.Millisecond) }),
		},
		{
			name: "not seen for more than four seconds, and a renewal under way", reason: weftReasonREASON_WITNESS_STALE,
			given: sentWitness(func(w *weftWitness) { w.Seen, w.Renewal = ago(4100*time.Millisecond), coarseNow() }),
		},
		{
			name: "seen as another source port", reason: weftReasonREASON_WITNESS_STALE,
			given: sentWitness(func(w *weftWitness) { w.As.Sport++ }),
		},
		{
			name: "seen as another destination port", reason: weftReasonREASON_WITNESS_STALE,
			given: sentWitness(func(w *weftWitness) { w.As.Dport++ }),
		},
		{
			name: "seen from another source", reason: weftReasonREASON_WITNESS_STALE,
			given: sentWitness(func(w *weftWitness) { w.As.Saddr = toBE32(addr("10.244.1.77")) }),
		},
		{
			name: "its witness is to be renewed", reason: weftReasonREASON_WITNESS_RENEWAL,
			given: sentWitness(func(w *weftWitness) { w.Seen = ago(2100 * time.Millisecond) }),
		},
		{
			name: "conntrack has forgotten the flow", reason: weftReasonREASON_FLOW_UNTRACKED, given: always(untracked),
		},
		{
			name: "a timeout that must not be changed", reason: weftReasonREASON_FLOW_SPECIAL,
			given: func(begun, _ flow) func(*node) {
				return func(n *node) {
					n.entry(begun, withStatus(ipsConfirmed|ipsSeenReply|ipsAssured|ipsFixedTimeout))
				}
			},
		},
		{
			name: "an entry that was made by netlink, with room for other sequence numbers", reason: weftReasonREASON_FLOW_SPECIAL,
			given: func(begun, _ flow) func(*node) {
				return func(n *node) {
					untracked(n)
					if err := n.tryEntry(unix.NLM_F_CREATE, begun, withStatus(ipsConfirmed|ipsSeenReply|ipsAssured), withTimeout(60), withTCPState(tcpEstablished)); err != nil {
						n.tb.Fatal(err)
					}
				}
			},
		},
		{
			name: "a helper looks at the flow", reason: weftReasonREASON_FLOW_SPECIAL,
			given: func(begun, _ flow) func(*node) {
				return specially(begun, "ct helper special {\ntype \"ftp\" protocol tcp;\n}", `ct helper set "special"`)
			},
		},
		{
			name: "a policy of its own for timeouts", reason: weftReasonREASON_FLOW_SPECIAL,
			given: func(begun, _ flow) func(*node) {
				return specially(begun, "ct timeout special {\nprotocol tcp;\npolicy = { established: 9999 }\n}", `ct timeout set "special"`)
			},
		},
	}
	for state, name := range map[uint8]string{
		tcpSynSent: "SYN_SENT", tcpSynRecv: "SYN_RECV", tcpFinWait: "FIN_WAIT", tcpCloseWait: "CLOSE_WAIT",
		tcpLastAck: "LAST_ACK", tcpTimeWait: "TIME_WAIT", tcpClose: "CLOSE",
	} {
		all = append(all, notExpress{
			name: "a connection in state " + name, reason: weftReasonREASON_FLOW_UNESTABLISHED,
			given: func(begun, _ flow) func(*node) { return tcpState(begun, state) },
		})
	}
	return all
}

// inZone has conntrack make the entry of a flow anew, in a zone of its own.
func inZone(f flow, rule string) func(*node) {
	return func(n *node) {
		n.tb.Helper()
		untracked(n)
		n.mustNFT("table ip special {\nchain c {\ntype filter hook prerouting priority raw;\n" + rule + "\n}\n}\n")
		n.begin(f)
		n.find(f)
		n.Run(n.tb, "nft delete table ip special")
		n.nextPacket()
	}
}

// specially has conntrack make the entry of a flow anew, with something that a
// rule gives it.
func specially(f flow, object, rule string) func(*node) {
	return func(n *node) {
		n.tb.Helper()
		untracked(n)
		n.mustNFT("table ip special {\n" + object + "\nchain c {\ntype filter hook prerouting priority 0;\n" + rule + "\n}\n}\n")
		n.begin(f)
		n.find(f)
		n.Run(n.tb, "nft delete table ip special")
		n.nextPacket()
	}
}

// expressOutCases are what does not leave by pod_in, with what is special about
// the way out.
func expressOutCases() []packetCase {
	var cases []packetCase
	add := func(c packetCase) {
		c.program = podIn
		if c.verdict == 0 {
			c.verdict = passed
		}
		cases = append(cases, c)
	}
	for _, c := range notExpressCases() {
		for _, way := range []struct {
			name        string
			begun, sent flow
		}{{"our connection", ourTCP, ourTCP}, {"answers to blue's", blueTCP, blueTCP.answers()}} {
			add(packetCase{
				name: way.name + ": " + c.name, reason: c.reason, packet: fromPod(way.sent, 100),
				given: established(these(way.begun), c.given(way.begun, way.sent)),
			})
		}
	}
	ours := func(c packetCase, then ...func(*node)) {
		c.given = established(these(ourTCP, ourUDP, viaServiceUDP, masqueradedUDP), then...)
		if c.packet == nil {
			c.packet = fromPod(ourTCP, 100)
		}
		add(c)
	}
	ours(packetCase{name: "the agent holds all acceleration back"}, inForce(func(f *weftInForce) { f.Held = 1 }))
	ours(packetCase{name: "all acceleration is switched off on the node"},
		inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_EXPRESS | weftOffOFF_BASE) }))
	ours(packetCase{name: "all acceleration is switched off for the peer"},
		peerState(func(s *weftPeerState) { s.Off = uint32(weftOffOFF_EXPRESS | weftOffOFF_BASE) }))
	ours(packetCase{name: "no witness at all"}, withoutWitness(ourTCP))
	ours(packetCase{name: "a witness of the other direction only", packet: fromPod(ourTCP, 100)}, withoutWitness(ourTCP), witness(ourTCP.answers(), func(*weftWitness) {}))
	ours(packetCase{name: "witnessed on its way to another device"}, witness(ourTCP, func(w *weftWitness) { w.Device = 999 }))
	ours(packetCase{name: "an entry in a zone", reason: weftReasonREASON_FLOW_UNTRACKED}, inZone(ourTCP, "ct zone set 5"))
	ours(packetCase{name: "an entry in a zone for the other direction only", packet: fromPod(blueTCP.answers(), 100), reason: weftReasonREASON_FLOW_SPECIAL},
		inZone(blueTCP, "ct original zone set 5"), func(n *node) { n.witnessed(blueTCP.answers()) })
	// What overlay_out finds as well, and counts.
	ours(packetCase{name: "a peer that has gone"},
		witness(ourTCP, func(w *weftWitness) { w.As.Daddr = toBE32(addr("10.244.77.1")) }))
	ours(packetCase{name: "UDP right behind an aggregate", packet: fromPod(ourUDP, 100)},
		func(n *node) { n.setAggregates(n.accel.objects.TxAggregates, ago(-time.Second)) })
	ours(packetCase{name: "an aggregate of UDP", packet: fromPod(ourUDP, 100), skb: aggregate(2, 50)})
	ours(packetCase{
		name: "an aggregate with segments of one byte more than the overlay's MTU", packet: fromPod(ourTCP, 2000),
		skb: aggregate(2, podMTU-52+1), reason: weftReasonREASON_POD_MTU,
	})
	ours(packetCase{name: "an aggregate, and the overlay is gone from the device map", skb: aggregate(2, 60)},
		withoutDevice(weftDeviceDEVICE_OVERLAY))
	ours(packetCase{name: "an aggregate of a flow that waits to be judged anew", skb: aggregate(2, 60), reason: weftReasonREASON_WITNESS_STALE},
		beat(func(p *weftPulse) { p.Epoch = epoch + 1 }))
	ours(packetCase{name: "an aggregate sent by a pod that routes for others", packet: ourTCP.packet(otherPodMAC, gatewayMAC, 100), skb: aggregate(2, 60), reason: weftReasonREASON_POD_SENDER})
	ours(packetCase{name: "no kernel packet to the peer was seen to leave yet"},
		peerState(func(s *weftPeerState) { s.TxProven = 0 }))
	ours(packetCase{name: "none for more than two seconds"},
		peerState(func(s *weftPeerState) { s.TxProven = ago(2100 * time.Millisecond) }))
	ours(packetCase{name: "never, and a renewal under way"},
		peerState(func(s *weftPeerState) { s.TxProven, s.TxRenewal = 0, coarseNow() }))
	ours(packetCase{name: "none for more than two seconds, and a renewal under way"},
		peerState(func(s *weftPeerState) { s.TxProven, s.TxRenewal = ago(2100*time.Millisecond), coarseNow() }))
	ours(packetCase{name: "the host's proof is to be renewed"},
		peerState(func(s *weftPeerState) { s.TxProven = ago(1100 * time.Millisecond) }))
	ours(packetCase{
		name: "sent by a pod that routes for others", reason: weftReasonREASON_POD_SENDER,
		packet: ourTCP.packet(otherPodMAC, gatewayMAC, 100),
	})
	ours(packetCase{
		name: "a source MAC that differs in the first byte", reason: weftReasonREASON_POD_SENDER, broken: []mutation{set(6, 0x0e)},
	})
	ours(packetCase{
		name: "a source MAC that differs in the last byte", reason: weftReasonREASON_POD_SENDER, broken: []mutation{set(11, 0x07)},
	})
	ours(packetCase{
		name: "to a pod that routes for others", reason: weftReasonREASON_POD_SENDER,
		packet: ourTCP.packet(podMAC, otherPodMAC, 100),
	})
	ours(packetCase{name: "to a gateway whose MAC differs in the last byte", reason: weftReasonREASON_POD_SENDER, broken: []mutation{set(5, 0x02)}})
	ours(packetCase{name: "a sender that is no pod we know", reason: weftReasonREASON_POD_SENDER}, withoutPod)
	ours(packetCase{name: "by another pod's veth", reason: weftReasonREASON_POD_SENDER},
		func(n *node) {
			n.put(n.accel.objects.Endpoints, toBE32(addr(ourPod)), weftEndpoint{Veth: n.otherVeth, Mtu: podMTU, Mac: [6]byte(mustMAC(podMAC)), Gateway: [6]byte(mustMAC(gatewayMAC))})
		})
	ours(packetCase{name: "one byte more than the overlay's MTU", packet: fromPod(ourTCP, podMTU-52+1), reason: weftReasonREASON_POD_MTU})
	ours(packetCase{name: "the uplink is gone from the device map"}, withoutDevice(weftDeviceDEVICE_UPLINK))
	ours(packetCase{
		name: "UDP without a checksum, to a service", packet: fromPod(viaServiceUDP, 100), broken: []mutation{set(atIP+26, 0, 0)},
		reason: weftReasonREASON_FLOW_SPECIAL,
	})
	ours(packetCase{
		name: "UDP without a checksum, masqueraded", packet: fromPod(masqueradedUDP, 100), broken: []mutation{set(atIP+26, 0, 0)},
		reason: weftReasonREASON_FLOW_SPECIAL,
	})
	ours(packetCase{name: "UDP that begins anew, not assured yet", packet: fromPod(ourUDP, 100), reason: weftReasonREASON_WITNESS_STALE},
		func(n *node) { untracked(n); n.begin(ourUDP) })
	ours(packetCase{name: "UDP that begins anew, without an answer", packet: fromPod(ourUDP, 100), reason: weftReasonREASON_WITNESS_STALE},
		func(n *node) { untracked(n); n.show(ourUDP, nil) })
	ours(packetCase{name: "UDP that has been answered since it was witnessed", packet: fromPod(ourUDP, 100), reason: weftReasonREASON_WITNESS_STALE},
		witness(ourUDP, func(w *weftWitness) { w.Status = unanswered.status() }))
	ours(packetCase{name: "UDP that has been answered a moment ago", packet: fromPod(ourUDP, 100), reason: weftReasonREASON_WITNESS_STALE},
		func(n *node) { untracked(n); n.begin(ourUDP) }, witness(ourUDP, func(w *weftWitness) { w.Status = unanswered.status() }))
	ours(packetCase{name: "UDP that is assured since it was witnessed", packet: fromPod(ourUDP, 100), reason: weftReasonREASON_WITNESS_STALE},
		witness(ourUDP, func(w *weftWitness) { w.Status = answered.status() }))
	ours(packetCase{name: "the first answer to what begins anew", packet: fromPod(blueUDP.answers(), 100), reason: weftReasonREASON_FLOW_UNESTABLISHED},
		func(n *node) { untracked(n); n.show(blueUDP, nil) }, witness(blueUDP.answers(), func(w *weftWitness) { w.Status = unanswered.status() }))
	ours(packetCase{name: "no flag at all", broken: []mutation{set(atIP+20+13, 0)}})
	// What carries no flow is none of pod_in's business, and not counted.
	for _, c := range notFlows() {
		c.packet = c.of(podMAC, gatewayMAC, ourTCP, ourUDP)
		c.reason = weftReasonREASON_NONE
		ours(c.packetCase)
	}
	return cases
}

// notFlow is a packet that no flow is known by.
type notFlow struct {
	packetCase
	of func(src, dst string, tcp, udp flow) *packet
}

// notFlows are packets that express does not carry, with the mutations of the
// packet that follows an Ethernet header at offset 0.
func notFlows() []notFlow {
	tcp := func(change ...func(*layers.IPv4)) func(string, string, flow, flow) *packet {
		return func(src, dst string, f, _ flow) *packet {
			p := f.packet(src, dst, 100)
			for _, c := range change {
				c(p.layers[1].(*layers.IPv4))
			}
			return p
		}
	}
	udp := func(src, dst string, _, f flow) *packet { return f.packet(src, dst, 100) }
	const at = atIP
	of := func(reason weftReason, name string, packet func(string, string, flow, flow) *packet, broken ...mutation) notFlow {
		return notFlow{packetCase{name: name, reason: reason, broken: broken}, packet}
	}
	return []notFlow{
		of(weftReasonREASON_FLOW_PROTOCOL, "neither TCP nor UDP", tcp(), setIP(at, 9, 132)),
		of(weftReasonREASON_FLOW_PROTOCOL, "a ping", tcp(), setIP(at, 9, 1)),
		of(weftReasonREASON_FLOW_OPTIONS, "IP options", tcp(recordRoute)),
		of(weftReasonREASON_FLOW_FRAGMENT, "a first fragment", tcp(firstFragment)),
		of(weftReasonREASON_FLOW_FRAGMENT, "a later fragment", tcp(laterFragment)),
		of(weftReasonREASON_FLOW_FRAGMENT, "a later fragment at the smallest offset", tcp(func(ip *layers.IPv4) { ip.FragOffset = 1 })),
		of(weftReasonREASON_FLOW_TTL, "a TTL of 1", tcp(ttl(1))),
		of(weftReasonREASON_FLOW_TTL, "a TTL of 0", tcp(ttl(0))),
		of(weftReasonREASON_FLOW_MALFORMED, "a wrong header checksum", tcp(), set(at+10, 0xde, 0xad)),
		of(weftReasonREASON_FLOW_MALFORMED, "a data offset of less than 5", tcp(), set(at+20+12, 0x40)),
		of(weftReasonREASON_FLOW_MALFORMED, "a data offset beyond the end", tcp(), func(p []byte) []byte {
			p = setIP(at, 2, 0, 72)(p)
			p[at+20+12] = 0xf0
			return p[:at+72]
		}),
		of(weftReasonREASON_FLOW_MALFORMED, "a TCP header that is cut", tcp(), func(p []byte) []byte { return setIP(at, 2, 0, 36)(p)[:at+36] }),
		of(weftReasonREASON_FLOW_MALFORMED, "a UDP length of one less", udp, set(at+24, 0, 107)),
		of(weftReasonREASON_FLOW_MALFORMED, "a UDP length of one more", udp, set(at+24, 0, 109)),
		of(weftReasonREASON_FLOW_MALFORMED, "a UDP header that is cut", udp, func(p []byte) []byte { return setIP(at, 2, 0, 27)(p)[:at+27] }),
		of(weftReasonREASON_FLOW_CONTROL, "SYN", tcp(), set(at+20+13, 0x0a)),
		of(weftReasonREASON_FLOW_CONTROL, "SYN and ACK", tcp(), set(at+20+13, 0x1a)),
		of(weftReasonREASON_FLOW_CONTROL, "FIN and ACK", tcp(), set(at+20+13, 0x19)),
		of(weftReasonREASON_FLOW_CONTROL, "RST", tcp(), set(at+20+13, 0x0c)),
		of(weftReasonREASON_FLOW_CONTROL, "RST and ACK", tcp(), set(at+20+13, 0x1c)),
		of(weftReasonREASON_FLOW_CONTROL, "no ACK, which conntrack calls invalid", tcp(), set(at+20+13, 0x08)),
	}
}

func TestWhatPodInLeavesToTheStack(t *testing.T) { runCases(t, newPodNode(t), expressOutCases()) }

// What looks like a reason and is none.
func TestWhatLeavesByExpressNevertheless(t *testing.T) {
	n := newPodNode(t)
	var cases []packetCase
	taken := func(name string, c packetCase, then ...func(*node)) {
		c.name, c.program, c.verdict = name, podIn, redirected
		c.given = established(these(ourTCP, ourUDP), then...)
		if c.packet == nil {
			c.packet = fromPod(ourTCP, 100)
		}
		size := uint64(len(c.packet.bytes(t)) - 14)
		c.counted = sent(blueIP, "express", 1, size)
		cases = append(cases, c)
	}
	taken("no agent for nearly three seconds", packetCase{}, beat(func(p *weftPulse) { p.Beat = ago(2500 * time.Millisecond) }))
	taken("a heartbeat of another CPU's later clock", packetCase{}, beat(func(p *weftPulse) { p.Beat = ago(-200 * time.Millisecond) }))
	taken("a witness of another CPU's later clock", packetCase{}, witness(ourTCP, func(w *weftWitness) { w.Seen = ago(-200 * time.Millisecond) }))
	taken("base is switched off on the node", packetCase{}, inForce(func(f *weftInForce) { f.Off = uint32(weftOffOFF_BASE) }))
	taken("base is switched off for the peer", packetCase{}, peerState(func(s *weftPeerState) { s.Off = uint32(weftOffOFF_BASE) }))
	taken("express is switched off for another peer", packetCase{}, func(n *node) {
		n.peerState(greenIP, func(s *weftPeerState) { s.Off = uint32(weftOffOFF_EXPRESS) })
	})
	taken("nothing of the peer's is let in, which is no matter on the way out", packetCase{}, peerState(func(s *weftPeerState) { s.RxProven = 0 }))
	taken("seen in the first half of a witness's life", packetCase{}, witness(ourTCP, func(w *weftWitness) { w.Seen = ago(1700 * time.Millisecond) }))
	taken("in the second half, and a renewal under way", packetCase{}, witness(ourTCP, func(w *weftWitness) { w.Seen, w.Renewal = ago(3*time.Second), ago(100*time.Millisecond) }))
	taken("the other direction was never seen", packetCase{}, withoutWitness(ourTCP.answers()))
	taken("exactly the overlay's MTU", packetCase{packet: fromPod(ourTCP, podMTU-52)})
	taken("UDP without a checksum, and no NAT", packetCase{packet: fromPod(ourUDP, 100), broken: []mutation{set(atIP+26, 0, 0)}})
	taken("without payload", packetCase{packet: fromPod(ourTCP, 0)})
	taken("with the URG flag", packetCase{broken: []mutation{set(atIP+20+13, 0x30)}})
	taken("a TTL of 2", packetCase{broken: []mutation{setIP(atIP, 8, 2)}})
	taken("the overlay device gone from the device map, which is no matter on the way out", packetCase{}, withoutDevice(weftDeviceDEVICE_OVERLAY))
	runCases(t, n, cases)
}

// A packet whose addresses were changed by something else than conntrack's NAT
// (IPVS) is the stack's.
func TestChangedByOthersThanConntrack(t *testing.T) {
	n := newPodNode(t)
	for _, name := range []tcProgram{podIn, uplinkIn} {
		t.Run(string(name), func(t *testing.T) {
			n.tb = t
			changes := 0
			prog := n.twin(name, func(program *ebpf.ProgramSpec) {
				for i, ins := range program.Instructions {
					if ins.OpCode == asm.And.Op(asm.ImmSource) && ins.Constant == 0x30 { // IPS_SRC_NAT | IPS_DST_NAT
						program.Instructions[i].Constant = 0
						changes++
					}
				}
			})
			if changes == 0 {
				t.Fatal("the NAT bits are looked at nowhere")
			}
			n.reset()
			established(these(viaService))(n)
			want := packetCase{verdict: passed, reason: weftReasonREASON_FLOW_SPECIAL}
			in := fromPod(viaService, 100).bytes(t)
			if name == uplinkIn {
				in = toPod(viaService.answers(), 100).bytes(t)
				want.verdict, want.counted = redirected, received(blueIP, "base", 1, 152)
			}
			want.check(t, in, n.runProgram(prog, name, in, 0))
		})
	}
}
