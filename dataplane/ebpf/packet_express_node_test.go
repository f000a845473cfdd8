//go:build linux

package ebpf

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The node of the packet tests with two pods, and conntrack entries that its own
// kernel made of packets:
//
//	pod 10.244.1.5 ─ cali5 ─┐
//	pod 10.244.1.6 ─ cali6 ─┴ (gateway 10.244.1.1)
//
//	track ─ track0 → routing, netfilter → sink ─ drain    what conntrack is shown
const (
	podMAC      = "0a:58:0a:f4:01:05"
	otherPod    = "10.244.1.6"
	otherPodMAC = "0a:58:0a:f4:01:06"
	gatewayMAC  = "0a:58:0a:f4:01:01"
	trackMAC    = "02:00:00:00:00:77"
	serviceIP   = "10.96.0.10" // one that the node translates
	podMTU      = 1450
)

// express is what a node has beside, for its pods.
type express struct {
	heart           *Heartbeat
	pods            []Pod
	veth, otherVeth uint32
	track, drain    *tap
}

// epoch is the one that is now.
const epoch = 7

// newPodNode is a node with pods, where express is possible.
func newPodNode(t *testing.T) *node {
	t.Helper()
	n := newNode(t)
	n.withPods()
	return n
}

func (n *node) withPods() {
	t := n.tb
	t.Helper()
	n.Run(
		t,
		"ip link add cali5 type veth peer name pod5",
		"ip link add cali6 type veth peer name pod6",
		"ip link add track0 address "+trackMAC+" type veth peer name track",
		"ip link add sink type veth peer name drain",
		"sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.track0.rp_filter=0 net.ipv4.conf.track0.accept_local=1",
		"ip link set cali5 up", "ip link set pod5 up",
		"ip link set cali6 up", "ip link set pod6 up",
		"ip link set track0 up", "ip link set track up",
		"ip link set sink arp off up", "ip link set drain up",
		"ip rule add pref 10 iif track0 lookup 77",
		"ip route add default dev sink table 77",
		"ip rule del pref 0", // what is shown to conntrack goes on, also to addresses of our own
		"ip rule add pref 20 lookup local",
		"nft add table ip track",
		"nft add chain ip track forward { type filter hook forward priority 0 ; }",
		"nft add rule ip track forward ct state new accept",
	)
	n.express = &express{track: mustTap(t, n.NS, "track"), drain: mustTap(t, n.NS, "drain")}
	n.MustDo(t, func() (err error) {
		n.veth, n.otherVeth = uint32(interfaceIndex("cali5")), uint32(interfaceIndex("cali6"))
		n.heart, err = n.accel.Heartbeat()
		return err
	})
	t.Cleanup(func() { n.heart.Close() })
	n.pods = []Pod{
		{IP: addr(ourPod), Veth: int(n.veth), MAC: [6]byte(mustMAC(podMAC)), Gateway: [6]byte(mustMAC(gatewayMAC)), MTU: podMTU},
		{IP: addr(otherPod), Veth: int(n.otherVeth), MAC: [6]byte(mustMAC(otherPodMAC)), Gateway: [6]byte(mustMAC(gatewayMAC)), MTU: podMTU},
	}
	n.desired.OverlayMTU = podMTU
	n.sync()
	n.syncPods()
	if why := n.accel.NoExpress(); why != "" {
		t.Skip("this kernel has no express: " + why)
	}
}

func (n *node) syncPods() {
	n.tb.Helper()
	n.MustDo(n.tb, func() error {
		failed, err := n.accel.SyncPods(n.pods, []netip.Addr{addr(ourIP), addr("10.244.1.0"), addr("10.244.1.1"), addr("198.51.100.11")})
		if err == nil && len(failed) > 0 {
			err = fmt.Errorf("pods are not served: %v", failed)
		}
		return err
	})
}

// resetExpress brings the node to where the agent has just followed its rulesets,
// and no flow was ever seen.
func (n *node) resetExpress() {
	n.tb.Helper()
	n.beat(func(*weftPulse) {})
	for _, p := range n.pods {
		n.put(n.accel.objects.Devices, uint32(p.Veth), uint32(p.Veth))
		n.put(n.accel.objects.Endpoints, toBE32(p.IP), toEndpoint(p))
	}
	all, err := readAll[weftFlow, weftWitness](n.accel.objects.Witnesses)
	if err == nil {
		err = remove(n.accel.objects.Witnesses, slices.Collect(maps.Keys(all)))
	}
	if err != nil {
		n.tb.Fatal(err)
	}
	newcomers := n.accel.objects.Newcomers
	places, none := make([]uint32, newcomers.MaxEntries()), make([]weftNewcomer, newcomers.MaxEntries())
	for i := range places {
		places[i] = uint32(i)
	}
	if _, err := newcomers.BatchUpdate(places, none, nil); err != nil {
		n.tb.Fatal(err)
	}
	n.MustDo(n.tb, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
}

// beat writes a heartbeat of now, with a change.
func (n *node) beat(change func(*weftPulse)) {
	n.tb.Helper()
	p := weftPulse{Beat: fresh(), Epoch: epoch}
	change(&p)
	n.put(n.accel.objects.Heartbeat, uint32(0), p)
}

// talk is how far a UDP flow has come: conntrack calls it assured after two
// seconds with answers.
type talk int

const (
	assured talk = iota
	answered
	unanswered
)

// status is what a witness of the flow says.
func (t talk) status() uint8 {
	return [...]uint8{assured: ipsSeenReply | ipsAssured, answered: ipsSeenReply, unanswered: 0}[t]
}

// flow is one direction of a flow, as packets have it in front of NAT, and
// behind it.
type flow struct {
	protocol uint8
	from, to string // address:port
	// Behind NAT; empty where NAT changes nothing.
	asFrom, asTo string
	// Of UDP: what conntrack knows of it.
	talk talk
}

func (f flow) natted() bool { return f.asFrom != "" || f.asTo != "" }

// after is the flow behind NAT.
func (f flow) after() flow {
	a := flow{protocol: f.protocol, from: f.from, to: f.to}
	if f.asFrom != "" {
		a.from = f.asFrom
	}
	if f.asTo != "" {
		a.to = f.asTo
	}
	return a
}

// answers is the other direction.
func (f flow) answers() flow {
	a := f.after()
	return flow{protocol: f.protocol, from: a.to, to: a.from, asFrom: f.to, asTo: f.from, talk: f.talk}
}

func be16(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

// before and as are the two sides as the maps have them.
func (f flow) before() weftFlow {
	from, to := netip.MustParseAddrPort(f.from), netip.MustParseAddrPort(f.to)
	return weftFlow{
		Saddr: toBE32(from.Addr()), Daddr: toBE32(to.Addr()),
		Sport: be16(from.Port()), Dport: be16(to.Port()), Protocol: f.protocol,
	}
}

func (f flow) as() weftFlow { return f.after().before() }

// packet is a packet of the flow in front of NAT, in a frame from one MAC to
// another.
func (f flow) packet(src, dst string, n int) *packet {
	from, to := netip.MustParseAddrPort(f.from), netip.MustParseAddrPort(f.to)
	p := eth(src, dst).ip(from.Addr().String(), to.Addr().String())
	if f.protocol == unix.IPPROTO_UDP {
		return p.udp(from.Port(), to.Port()).payload(n)
	}
	return p.tcp(from.Port(), to.Port(), timestamps...).payload(n)
}

// Flows that the tests speak of, as the packets that begin them have it.
var (
	// ourTCP is a connection of our pod's to blue's, blueTCP one of blue's pod to
	// ours.
	ourTCP  = flow{protocol: unix.IPPROTO_TCP, from: ourPod + ":40000", to: bluePod + ":80"}
	blueTCP = flow{protocol: unix.IPPROTO_TCP, from: bluePod + ":41000", to: ourPod + ":80"}
	ourUDP  = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40000", to: bluePod + ":443"}
	blueUDP = flow{protocol: unix.IPPROTO_UDP, from: bluePod + ":41000", to: ourPod + ":443"}
	// viaService is our pod's to a Service that leads to blue's pod.
	viaService = flow{protocol: unix.IPPROTO_TCP, from: ourPod + ":40001", to: serviceIP + ":80", asTo: bluePod + ":8080"}
	// masqueraded leaves with an address of the node.
	masqueraded    = flow{protocol: unix.IPPROTO_TCP, from: ourPod + ":40002", to: bluePod + ":80", asFrom: "10.244.1.0:31000"}
	viaServiceUDP  = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40001", to: serviceIP + ":443", asTo: bluePod + ":4433"}
	masqueradedUDP = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40002", to: bluePod + ":443", asFrom: "10.244.1.0:31000"}
	// These have been answered lately.
	ourDialogue     = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40020", to: bluePod + ":443", talk: answered}
	blueDialogue    = flow{protocol: unix.IPPROTO_UDP, from: bluePod + ":41020", to: ourPod + ":443", talk: answered}
	serviceDialogue = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40021", to: serviceIP + ":443", asTo: bluePod + ":4433", talk: answered}
	// Nobody answers these.
	ourMonologue     = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40010", to: bluePod + ":514", talk: unanswered}
	blueMonologue    = flow{protocol: unix.IPPROTO_UDP, from: bluePod + ":41010", to: ourPod + ":514", talk: unanswered}
	serviceMonologue = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40011", to: serviceIP + ":514", asTo: bluePod + ":5140", talk: unanswered}
	maskedMonologue  = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40012", to: bluePod + ":514", asFrom: "10.244.1.0:31002", talk: unanswered}
	// bothEnds changes all that NAT can change, otherPort only a port.
	bothEnds  = flow{protocol: unix.IPPROTO_TCP, from: ourPod + ":40003", to: serviceIP + ":80", asFrom: "10.244.1.0:31001", asTo: bluePod + ":8080"}
	otherPort = flow{protocol: unix.IPPROTO_UDP, from: ourPod + ":40004", to: bluePod + ":443", asTo: bluePod + ":4433"}
	// fromOutside is blue's pod to a Service that leads to our pod.
	fromOutside = flow{protocol: unix.IPPROTO_TCP, from: bluePod + ":41001", to: "10.96.0.11:80", asTo: ourPod + ":8080"}
)

// Bits of an entry's status: enum ip_conntrack_status.
const (
	ipsSeenReply    = 1 << 1
	ipsAssured      = 1 << 2
	ipsConfirmed    = 1 << 3
	ipsFixedTimeout = 1 << 10
)

// States of TCP: enum tcp_conntrack.
const (
	tcpSynSent     = 1
	tcpSynRecv     = 2
	tcpEstablished = 3
	tcpFinWait     = 4
	tcpCloseWait   = 5
	tcpLastAck     = 6
	tcpTimeWait    = 7
	tcpClose       = 8
)

// tracked shows conntrack the beginning of flows, which are established then:
// each as the packets that begin it have it.
func (n *node) tracked(flows ...flow) {
	n.tb.Helper()
	if slices.ContainsFunc(flows, flow.natted) {
		n.translate(flows...)
	}
	for _, f := range flows {
		if f.talk == unanswered {
			n.show(f, nil)
			continue
		}
		n.begin(f)
		if f.protocol == unix.IPPROTO_UDP && f.talk == assured {
			// The kernel calls it assured after two seconds.
			n.entry(f, withStatus(ipsConfirmed|ipsSeenReply|ipsAssured))
		}
	}
	all := n.entries()
	for _, f := range flows {
		if e := all[f.before()]; e == nil || e.Reverse.SrcPort != netip.MustParseAddrPort(f.after().to).Port() ||
			e.Reverse.DstPort != netip.MustParseAddrPort(f.after().from).Port() {
			n.tb.Fatalf("%+v is tracked as %v", f, e)
		}
	}
	n.nextPacket() // a slow machine may have taken a while
}

// begin shows conntrack the first packets of a flow, both ways.
func (n *node) begin(f flow) {
	n.tb.Helper()
	f.begin(n.show)
}

// begin hands the first packets of a flow, both ways, to show; tcp is as in first.
func (f flow) begin(show func(f flow, tcp []byte)) {
	if f.protocol == unix.IPPROTO_UDP {
		show(f, nil)
		show(f.answers(), nil)
		return
	}
	const syn, ack = 2, 0x10
	show(f, []byte{syn, 0, 0, 0x03, 0xe7, 0, 0, 0, 0})
	show(f.answers(), []byte{syn | ack, 0, 0, 0x07, 0xcf, 0, 0, 0x03, 0xe8})
	show(f, []byte{ack, 0, 0, 0x03, 0xe8, 0, 0, 0x07, 0xd0})
}

// first is a packet that a flow begins with; tcp is its flags, then sequence and
// acknowledgement.
func (f flow) first(src, dst string, tcp []byte) []byte {
	if tcp == nil {
		return mustFrame(f.packet(src, dst, 10))
	}
	frame := mustFrame(f.packet(src, dst, 0))
	copy(frame[atIP+20+13:], tcp[:1])
	copy(frame[atIP+20+4:], tcp[1:])
	sumTransport(frame[atIP:])
	return frame
}

// show hands a packet of a flow to the node's netfilter; tcp is as in first.
func (n *node) show(f flow, tcp []byte) {
	n.tb.Helper()
	n.track.send(f.first("02:00:00:00:00:78", trackMAC, tcp))
	if n.drain.next(soon, isIPv4) == nil {
		n.tb.Fatalf("a packet of %+v did not come through netfilter", f)
	}
}

// translate sets up the NAT of flows, and no other.
func (n *node) translate(flows ...flow) {
	n.tb.Helper()
	var rules strings.Builder
	rules.WriteString("table ip nat\ndelete table ip nat\ntable ip nat {\n")
	for _, chain := range []struct {
		hook, priority, verdict string
		to                      func(flow) string
	}{
		{"prerouting", "dstnat", "dnat", func(f flow) string { return f.asTo }},
		{"postrouting", "srcnat", "snat", func(f flow) string { return f.asFrom }},
	} {
		fmt.Fprintf(&rules, "chain %s {\ntype nat hook %s priority %s;\n", chain.hook, chain.hook, chain.priority)
		for _, f := range flows {
			if chain.to(f) == "" {
				continue
			}
			from, to := netip.MustParseAddrPort(f.from), netip.MustParseAddrPort(f.to)
			fmt.Fprintf(&rules, "meta l4proto %d ct original ip saddr %v ct original ip daddr %v ct original proto-src %d ct original proto-dst %d %s to %s\n",
				f.protocol, from.Addr(), to.Addr(), from.Port(), to.Port(), chain.verdict, chain.to(f))
		}
		rules.WriteString("}\n")
	}
	rules.WriteString("}\n")
	n.mustNFT(rules.String())
}

func (n *node) tryNFT(script string) error {
	n.tb.Helper()
	file := filepath.Join(n.tb.TempDir(), "script.nft")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		return err
	}
	_, err := n.Try("nft -f " + file)
	return err
}

// mustNFT hands a script to nft.
func (n *node) mustNFT(script string) {
	n.tb.Helper()
	if err := n.tryNFT(script); err != nil {
		n.tb.Fatal(err)
	}
}

// entries are conntrack's, by the direction that began them.
func (n *node) entries() map[weftFlow]*netlink.ConntrackFlow {
	n.tb.Helper()
	entries := map[weftFlow]*netlink.ConntrackFlow{}
	n.MustDo(n.tb, func() error {
		all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		for _, e := range all {
			from, _ := netip.AddrFromSlice(e.Forward.SrcIP.To4())
			to, _ := netip.AddrFromSlice(e.Forward.DstIP.To4())
			entries[weftFlow{
				Saddr: toBE32(from), Daddr: toBE32(to),
				Sport: be16(e.Forward.SrcPort), Dport: be16(e.Forward.DstPort), Protocol: e.Forward.Protocol,
			}] = e
		}
		return err
	})
	return entries
}

// find returns the entry of a flow.
func (n *node) find(f flow) *netlink.ConntrackFlow {
	n.tb.Helper()
	e := n.entries()[f.before()]
	if e == nil {
		n.tb.Fatalf("conntrack does not know %+v", f)
	}
	return e
}

// entry changes the entry of a flow by netlink, or makes one.
func (n *node) entry(f flow, attributes ...*nl.RtAttr) {
	n.tb.Helper()
	if err := n.tryEntry(unix.NLM_F_REPLACE, f, attributes...); err != nil {
		n.tb.Fatalf("changing the entry of %+v: %v", f, err)
	}
}

func (n *node) tryEntry(flags int, f flow, attributes ...*nl.RtAttr) error {
	return n.Do(func() error {
		req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_ACK|flags)
		req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
		req.AddData(tupleAttribute(nl.CTA_TUPLE_ORIG, f))
		if flags&unix.NLM_F_CREATE != 0 {
			answers := f.answers()
			req.AddData(tupleAttribute(nl.CTA_TUPLE_REPLY, flow{protocol: f.protocol, from: answers.from, to: answers.to}))
		}
		for _, a := range attributes {
			req.AddData(a)
		}
		_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
		return err
	})
}

func tupleAttribute(kind int, f flow) *nl.RtAttr {
	from, to := netip.MustParseAddrPort(f.from), netip.MustParseAddrPort(f.to)
	tuple := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	ip := tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil)
	ip.AddRtAttr(nl.CTA_IP_V4_SRC, from.Addr().AsSlice())
	ip.AddRtAttr(nl.CTA_IP_V4_DST, to.Addr().AsSlice())
	proto := tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
	proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{f.protocol})
	proto.AddRtAttr(nl.CTA_PROTO_SRC_PORT, nl.BEUint16Attr(from.Port()))
	proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(to.Port()))
	return tuple
}

func withStatus(bits uint32) *nl.RtAttr {
	return nl.NewRtAttr(nl.CTA_STATUS, nl.BEUint32Attr(bits))
}

func withTimeout(seconds uint32) *nl.RtAttr {
	return nl.NewRtAttr(nl.CTA_TIMEOUT, nl.BEUint32Attr(seconds))
}

func withTCPState(state uint8) *nl.RtAttr {
	info := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_PROTOINFO, nil)
	info.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_PROTOINFO_TCP, nil).AddRtAttr(nl.CTA_PROTOINFO_TCP_STATE, []byte{state})
	return info
}

// witnessed writes a fresh witness of flows, as the programs behind netfilter
// would: of packets to peers if they come from a pod of ours, else of packets to
// our pods.
func (n *node) witnessed(flows ...flow) {
	n.tb.Helper()
	for _, f := range flows {
		n.witness(f, func(*weftWitness) {})
	}
}

func (n *node) witness(f flow, change func(*weftWitness)) {
	n.tb.Helper()
	w := weftWitness{Seen: fresh(), As: f.as(), Epoch: epoch, Device: n.overlay, Hash: 0x12345678, Status: f.talk.status()}
	for _, p := range n.pods {
		if toBE32(p.IP) == w.As.Daddr {
			w.Device, w.Hash = uint32(p.Veth), 0
		}
	}
	change(&w)
	n.put(n.accel.objects.Witnesses, f.before(), w)
}

// witnessOf returns what is witnessed of a flow.
func (n *node) witnessOf(f flow) (w weftWitness, ok bool) {
	n.tb.Helper()
	err := n.accel.objects.Witnesses.Lookup(f.before(), &w)
	return w, err == nil
}

// witnesses is how many there are.
func (n *node) witnesses() int {
	n.tb.Helper()
	all, err := readAll[weftFlow, weftWitness](n.accel.objects.Witnesses)
	if err != nil {
		n.tb.Fatal(err)
	}
	return len(all)
}

// fromPod is a packet of a flow as our pod sends it.
func fromPod(f flow, size int) *packet { return f.packet(podMAC, gatewayMAC, size) }

// tellingTwin is a copy of a program that begins with this skb->tc_index, and
// tells in cb[4] what it is in the end.
func (n *node) tellingTwin(name tcProgram, index int32) *ebpf.Program {
	n.tb.Helper()
	return n.twin(name, n.telling(index))
}

func (n *node) telling(index int32) func(*ebpf.ProgramSpec) {
	const tcIndex, cb4 = 44, 64 // offsets in struct __sk_buff
	return func(program *ebpf.ProgramSpec) {
		all := program.Instructions
		first := all[0]
		all[0] = first.WithMetadata(asm.Metadata{})
		exits := 0
		for i, ins := range all {
			if ins.OpCode != asm.Return().OpCode {
				continue
			}
			exits++
			gap := 0 // jumps are counted in the instructions of the kernel, of which ours may be two
			for _, between := range all[i+1:] {
				gap += int(between.Size() / asm.InstructionSize)
			}
			all[i] = asm.Instruction{OpCode: asm.Ja.Op(asm.ImmSource), Offset: int16(gap)}.WithMetadata(ins.Metadata)
		}
		if exits == 0 {
			n.tb.Fatalf("%s has no end", program.Name)
		}
		program.Instructions = append(append(asm.Instructions{
			asm.StoreMem(asm.RFP, -512, asm.R1, asm.DWord).WithMetadata(first.Metadata),
			asm.Mov.Imm(asm.R2, index),
			asm.StoreMem(asm.R1, tcIndex, asm.R2, asm.Word),
		}, all...),
			asm.LoadMem(asm.R1, asm.RFP, -512, asm.DWord),
			asm.LoadMem(asm.R2, asm.R1, tcIndex, asm.Word),
			asm.StoreMem(asm.R1, cb4, asm.R2, asm.Word),
			asm.Return(),
		)
	}
}

// untouched is the tc_index of a packet in front of the host's stack, as
// untouched_index() of bpf/stamp.h has it.
func untouched(tos, ttl uint8) int32 {
	return int32((uint32(tos)<<8|uint32(ttl))*0x9e3779b1>>17 | 1)
}

// sumTransport makes the checksum of the TCP or UDP packet behind a 20-byte IPv4
// header right.
func sumTransport(ip []byte) {
	at, segment := 20+6, ip[20:]
	if ip[9] == unix.IPPROTO_TCP {
		at = 20 + 16
	}
	copy(ip[at:], []byte{0, 0})
	pseudo := append(append([]byte{}, ip[12:20]...), 0, ip[9], byte(len(segment)>>8), byte(len(segment)))
	sum := ^onesSum(append(pseudo, segment...))
	if sum == 0 && ip[9] == unix.IPPROTO_UDP {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(ip[at:], sum)
}

// translated is what NAT and one hop make of an IPv4 packet: computed from the
// start, not from the differences.
func translated(ip []byte, as weftFlow, tos uint8) []byte {
	out := append([]byte{}, ip...)
	changed := as != flowOf(ip)
	out[1] = tos
	out[8]--
	binary.NativeEndian.PutUint32(out[12:], as.Saddr)
	binary.NativeEndian.PutUint32(out[16:], as.Daddr)
	binary.NativeEndian.PutUint16(out[20:], as.Sport)
	binary.NativeEndian.PutUint16(out[22:], as.Dport)
	out = setIP(0, 9, out[9])(out)
	if changed {
		sumTransport(out)
	}
	return out
}

func flowOf(ip []byte) weftFlow {
	return weftFlow{
		Saddr: binary.NativeEndian.Uint32(ip[12:]), Daddr: binary.NativeEndian.Uint32(ip[16:]),
		Sport: binary.NativeEndian.Uint16(ip[20:]), Dport: binary.NativeEndian.Uint16(ip[22:]), Protocol: ip[9],
	}
}
