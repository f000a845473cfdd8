//go:build linux

package ebpf

import (
	"bytes"
	"maps"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// packetCase is a sentence, a packet in, a verdict and what is counted. What it
// doesn't say is as reset leaves the node. A packet that is not redirected must
// come out as it went in.
type packetCase struct {
	name    string
	program tcProgram
	given   func(*node)   // what is special on the node
	packet  *packet       // a good packet ...
	broken  []mutation    // ... and what is wrong with it
	skb     func(*skBuff) // what the kernel says of the packet
	verdict int
	reason  weftReason              // REASON_NONE: none is counted
	counted map[string]PathCounters // "public IP path"
}

func (c packetCase) run(t *testing.T, n *node) {
	n.reset()
	if c.given != nil {
		c.given(n)
	}
	var with []func(*skBuff)
	if c.skb != nil {
		with = append(with, c.skb)
	}
	in := c.packet.bytes(t, c.broken...)
	got := n.run(c.program, in, with...)
	c.check(t, in, got)
}

func (c packetCase) check(t *testing.T, in []byte, got outcome) {
	t.Helper()
	if got.verdict != c.verdict {
		t.Errorf("verdict %d, want %d (counted: passed %v, dropped %v)", got.verdict, c.verdict, got.passed, got.dropped)
	}
	passedFor, droppedFor := map[string]uint64{}, map[string]uint64{}
	if c.reason != weftReasonREASON_NONE {
		if c.verdict == dropped {
			droppedFor[Reasons[c.reason].Name] = 1
		} else {
			passedFor[Reasons[c.reason].Name] = 1
		}
	}
	if !maps.Equal(got.passed, passedFor) || !maps.Equal(got.dropped, droppedFor) {
		t.Errorf("reasons counted: passed %v, dropped %v; want passed %v, dropped %v", got.passed, got.dropped, passedFor, droppedFor)
	}
	if !maps.Equal(got.paths, c.counted) && len(got.paths)+len(c.counted) > 0 {
		t.Errorf("counted %+v, want %+v", got.paths, c.counted)
	}
	if c.verdict != redirected && !bytes.Equal(got.packet, in) {
		t.Errorf("a packet that was not taken was changed:\n in %x\nout %x", in, got.packet)
	}
}

func runCases(t *testing.T, n *node, cases []packetCase) {
	t.Helper()
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			n.tb = t
			c.run(t, n)
		})
	}
	n.tb = t
}

// Counters of one peer and path.

func sent(peer, path string, packets, bytes uint64) map[string]PathCounters {
	return map[string]PathCounters{peer + " " + path: {TxPackets: packets, TxBytes: bytes}}
}

func received(peer, path string, packets, bytes uint64) map[string]PathCounters {
	return map[string]PathCounters{peer + " " + path: {RxPackets: packets, RxBytes: bytes}}
}

// toBlue is a packet of a pod of ours on its way to a pod of the peer blue, as
// the kernel has routed it to flannel.1: 28 bytes of headers and n of payload.
func toBlue(n int) *packet {
	return eth(ourMAC, blueMAC).ip(ourPod, bluePod).udp(40000, 53).payload(n)
}

// fromBlue is the answer, as flannel.1 would have it.
func fromBlue(n int) *packet {
	return eth(blueMAC, ourMAC).ip(bluePod, ourPod).udp(53, 40000).payload(n)
}

// carried is what a stock peer sends: inner in VXLAN from a node to us.
func carried(from string, inner *packet) *packet {
	return eth(wireMAC, uplinkMAC).ip(from, ourIP).udp(50000, 8472).vxlan(1).around(inner)
}

// leaving is a packet that our kernel has encapsulated, as it is at the uplink.
func leaving(to string) *packet {
	return eth(uplinkMAC, wireMAC).ip(ourIP, to).udp(50000, 8472).vxlan(1).around(toBlue(100))
}

// What a node can be given.

func sourceChecked(how weftSourceCheck) func(*node) {
	return func(n *node) { n.inForce(func(f *weftInForce) { f.SourceCheck = uint32(how) }) }
}

func withoutDevice(device weftDevice) func(*node) {
	return func(n *node) {
		n.tb.Helper()
		if err := n.accel.objects.Devices.Delete(uint32(device)); err != nil {
			n.tb.Fatal(err)
		}
	}
}

// What the kernel can say of a packet.

// aggregate is a GSO packet of so many segments of so many bytes each.
func aggregate(segments, size uint32) func(*skBuff) {
	return func(s *skBuff) { s.GSOSegs, s.GSOSize = segments, size }
}

func marked(mark uint32) func(*skBuff) { return func(s *skBuff) { s.Mark = mark } }

// mustRefuse returns a copy of a program, with the node's maps, to which the
// kernel refuses to make or take room in any packet.
func (n *node) mustRefuse(name tcProgram) *ebpf.Program {
	n.tb.Helper()
	return n.twin(name, func(program *ebpf.ProgramSpec) {
		calls := 0
		for i, ins := range program.Instructions {
			if ins.IsBuiltinCall() && ins.Constant == int64(asm.FnSkbAdjustRoom) {
				program.Instructions[i] = asm.Mov.Imm(asm.R0, -12).WithMetadata(ins.Metadata)
				calls++
			}
		}
		if calls != 1 {
			n.tb.Fatalf("%s calls bpf_skb_adjust_room at %d places, want 1", name, calls)
		}
	})
}

// stampedTwin is a copy of a program that first sets skb->tc_index, which
// BPF_PROG_RUN can't.
func (n *node) stampedTwin(name tcProgram, index int32) *ebpf.Program {
	n.tb.Helper()
	const tcIndex = 44 // offset in struct __sk_buff
	return n.twin(name, func(program *ebpf.ProgramSpec) {
		first := program.Instructions[0]
		program.Instructions[0] = first.WithMetadata(asm.Metadata{})
		program.Instructions = append(asm.Instructions{
			asm.Mov.Imm(asm.R2, index).WithMetadata(first.Metadata),
			asm.StoreMem(asm.R1, tcIndex, asm.R2, asm.Word),
		}, program.Instructions...)
	})
}

// kernelTypes are the kernel's, read once for all twins.
var kernelTypes = btf.NewCache()

// twin is a copy of a program with a change, on the same maps.
func (n *node) twin(name tcProgram, change func(*ebpf.ProgramSpec)) *ebpf.Program {
	n.tb.Helper()
	return n.twinWith(name, n.accel.NoExpress() == "", change)
}

// twinWith is a twin with express, or without.
func (n *node) twinWith(name tcProgram, express bool, change func(*ebpf.ProgramSpec)) *ebpf.Program {
	n.tb.Helper()
	spec, err := loadWeft()
	if err != nil {
		n.tb.Fatal(err)
	}
	if err := adjust(spec, n.accel.opts, express); err != nil {
		n.tb.Fatal(err)
	}
	if change != nil {
		change(spec.Programs[string(name)])
	}
	for other := range spec.Programs {
		if other != string(name) {
			delete(spec.Programs, other)
		}
	}
	opts := ebpf.CollectionOptions{MapReplacements: n.accel.namedMaps(), Cache: kernelTypes}
	if opts.Programs.KernelTypes, err = insteadOfNone(kernelTypes); err != nil {
		n.tb.Fatal(err)
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, opts)
	if err != nil {
		n.tb.Fatal(err)
	}
	program := coll.DetachProgram(string(name))
	coll.Close()
	n.tb.Cleanup(func() { program.Close() })
	return program
}

func interfaceIndex(name string) int {
	i, err := net.InterfaceByName(name)
	if err != nil {
		panic(err)
	}
	return i.Index
}
