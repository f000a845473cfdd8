//go:build linux

package ebpf

import (
	"bytes"
	"errors"
	"maps"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/weft-net/weft/test/netns"
)

// Things that only a kernel at work shows: packets with what no program run can
// put into them, and stamps on their way from one program to the next.

// soon is how long we wait for what must come.
const soon = 3 * time.Second

// never is how long we wait for what must not come.
const never = 200 * time.Millisecond

func mustCount(t *testing.T, got outcome, passedFor, droppedFor map[string]uint64, paths map[string]PathCounters) {
	t.Helper()
	if !maps.Equal(got.passed, passedFor) || !maps.Equal(got.dropped, droppedFor) {
		t.Errorf("reasons counted: passed %v, dropped %v; want passed %v, dropped %v", got.passed, got.dropped, passedFor, droppedFor)
	}
	if !maps.Equal(got.paths, paths) {
		t.Errorf("counted %+v, want %+v", got.paths, paths)
	}
}

func one(reason weftReason) map[string]uint64 { return map[string]uint64{Reasons[reason].Name: 1} }

// A VXLAN tunnel of a pod's own: its packets are encapsulated already, and
// where the inner checksum is still to be computed the kernel refuses to make
// room for more headers.
//
//	pod 10.244.1.5 ─ own0 172.16.0.1 (VXLAN 99 to 10.244.2.7) ─ eth0 ══ cali0 ─ node a ═══ node b
func TestTunnelWithinAPod(t *testing.T) {
	w := newWired(t)
	pod := netns.New(t)
	netns.Connect(t, w.NS, "cali0", pod, "eth0")
	w.Run(t, "ip addr add 10.244.1.1/32 dev cali0", "ip route add 10.244.1.5/32 dev cali0")
	pod.Run(
		t,
		"ip link set lo up",
		"sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
		"ip addr add 10.244.1.5/24 dev eth0",
		"ip route add default via 10.244.1.1",
		"ip link add own0 type vxlan id 99 local 10.244.1.5 remote 10.244.2.7 dstport 4789 noudpcsum",
		"ip addr add 172.16.0.1/24 dev own0",
		"ip link set own0 up",
		"ip neigh add 172.16.0.2 lladdr 02:00:00:00:00:02 dev own0 nud permanent",
		"ping -c1 -W2 -q 10.244.1.1",
	)
	w.accelerate("observe")
	arrived, own := mustTap(t, w.b, "flannel.1"), mustDial(t, pod, "172.16.0.1:7", "172.16.0.2:8")
	data := bytes.Repeat([]byte("weft"), 16)

	var frame []byte
	got := w.during(func() {
		if _, err := own.Write(data); err != nil {
			t.Fatal(err)
		}
		frame = arrived.next(soon, isIPv4)
	})
	const packet = 20 + 8 + 8 + 14 + 20 + 8 + 64
	mustCount(t, got, one(weftReasonREASON_ENCAP_REFUSED), nil, sent(blueIP, "kernel", 1, packet))
	if len(frame) != 14+packet {
		t.Fatalf("arrived as %x", frame)
	}
	if !bytes.Equal(frame[:6], mustMAC(blueMAC)) || onesSum(frame[atIP:atUDP]) != 0xffff || frame[atIP+8] != 63 ||
		!udpChecksumRight(frame[atInnerIP:]) || !bytes.Equal(frame[len(frame)-64:], data) {
		t.Errorf("the packet was spoiled: %x", frame)
	}
}

// A tag takes a packet to another network, whoever it is addressed to.
func TestVLANTaggedPacketOnTheUplink(t *testing.T) {
	w := newWired(t)
	w.accelerate("observe")
	wire, arrived := mustTap(t, w.b, "eth0"), mustTap(t, w.NS, "flannel.1")
	plain := carried(blueIP, fromBlue(100)).bytes(t)
	tagged := append(append(bytes.Clone(plain[:12]), 0x81, 0x00, 0x00, 0x05), plain[12:]...)

	got := w.during(func() {
		wire.send(tagged)
		if frame := arrived.next(never, isIPv4); frame != nil {
			t.Errorf("a packet of VLAN 5 came out of the overlay: %x", frame)
		}
	})
	mustCount(t, got, one(weftReasonREASON_OUTER_VLAN), nil, nil)
	got = w.during(func() {
		wire.send(plain)
		if arrived.next(soon, isIPv4) == nil {
			t.Error("the same packet without a tag did not come")
		}
	})
	mustCount(t, got, nil, nil, received(blueIP, "base", 1, 128))
}

// What reaches the VXLAN socket without uplink_in: another interface, outer
// fragments, outer options. In enforce none of it comes out of the overlay.
func TestPacketsThatTheUplinkDidNotSee(t *testing.T) {
	whole := carried(blueIP, fromBlue(100)).bytes(t)
	cut := func(from, to int, flags byte) []byte { // payload bytes of the outer packet
		p := append(bytes.Clone(whole[:atUDP]), whole[atUDP+from:atUDP+to]...)
		return setIP(atIP, 6, flags, byte(from/8))(setIP(atIP, 2, 0, byte(20+to-from))(p))
	}
	options := eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, recordRoute).udp(50000, 8472).vxlan(1).around(fromBlue(100)).bytes(t)
	for name, c := range map[string]struct {
		device string
		frames [][]byte
		seen   map[string]uint64 // what uplink_in counts
	}{
		"by another interface": {device: "eth1", frames: [][]byte{whole}},
		"as outer fragments": {
			device: "eth0", frames: [][]byte{cut(0, 80, 0x20), cut(80, len(whole)-atUDP, 0)},
			seen: map[string]uint64{"outer_fragment": 2},
		},
		"with outer options": {device: "eth0", frames: [][]byte{options}, seen: map[string]uint64{"outer_options": 1}},
	} {
		for _, check := range SourceChecks {
			t.Run(name+", "+check, func(t *testing.T) {
				w := newWired(t)
				w.accelerate(check)
				w.peerState(blueIP, func(s *weftPeerState) { s.RxProven = 0 })
				var side [6]byte
				w.MustDo(t, func() error { side = macOf("eth1"); return nil })
				wire, arrived := mustTap(t, w.b, c.device), mustTap(t, w.NS, "flannel.1")
				var frame []byte
				got := w.during(func() {
					for _, f := range c.frames {
						if c.device == "eth1" {
							f = set(0, side[:]...)(bytes.Clone(f))
						}
						wire.send(f)
					}
					// A tap sees the frame before the program of the device does.
					frame = arrived.next(soon, isIPv4)
					time.Sleep(20 * time.Millisecond)
				})
				if !bytes.Equal(frame, whole[atInner:]) {
					t.Errorf("at the overlay device came %x, want %x", frame, whole[atInner:])
				}
				passedFor, droppedFor := maps.Clone(c.seen), map[string]uint64{}
				if passedFor == nil {
					passedFor = map[string]uint64{}
				}
				paths := received(blueIP, "kernel", 1, 128)
				switch check {
				case "observe":
					passedFor["source_unseen"] = 1
				case "enforce":
					droppedFor["source_unseen"], paths = 1, nil
				}
				mustCount(t, got, passedFor, droppedFor, paths)
				if w.peerState(blueIP, nil).RxProven != 0 {
					t.Error("it proved that the uplink lets the peer in")
				}
			})
		}
	}
}

// The stamp of the source check goes through the VXLAN driver and, where the
// device has it, through GRO: in enforce the peer's packets get through by
// either path, and only by their own peer's doing.
func TestStampsSurviveTheKernel(t *testing.T) {
	for _, gro := range []string{"gro off", "gro on"} {
		t.Run(gro, func(t *testing.T) {
			w := newWired(t)
			w.Run(t, "ip addr add 10.244.1.5/32 dev lo", "ethtool -K eth0 "+gro)
			w.accelerate("enforce")
			wire := mustTap(t, w.b, "eth0")
			receive := mustListen(t, w.NS, "10.244.1.5:40000")
			packet := carried(blueIP, fromBlue(100)).bytes(t)

			for _, c := range []struct {
				name string
				off  uint32
				want outcome
			}{
				{"by the base path", 0, outcome{paths: received(blueIP, "base", 1, 128)}},
				{"by the kernel path", 1, outcome{passed: one(weftReasonREASON_SWITCHED_OFF), paths: received(blueIP, "kernel", 1, 128)}},
			} {
				w.inForce(func(f *weftInForce) { f.Off = c.off })
				got := w.during(func() {
					wire.send(packet)
					if data := receive(soon); !bytes.Equal(data, packet[len(packet)-100:]) {
						t.Errorf("%s: received %x", c.name, data)
					}
				})
				mustCount(t, got, c.want.passed, nil, c.want.paths)
			}
			got := w.during(func() {
				wire.send(carried(strangerIP, fromBlue(100)).bytes(t))
				if data := receive(never); data != nil {
					t.Errorf("a stranger's packet was delivered: %x", data)
				}
			})
			mustCount(t, got, nil, one(weftReasonREASON_SOURCE_UNKNOWN_PEER), nil)
		})
	}
}

// A suspect in observe reaches its receiver, is counted once and booked on
// nobody.
func TestSuspectInObserve(t *testing.T) {
	w := newWired(t)
	w.Run(t, "ip addr add 10.244.1.5/32 dev lo")
	w.accelerate("observe")
	w.peerState(blueIP, func(s *weftPeerState) { s.RxProven = 0 })
	wire, receive := mustTap(t, w.b, "eth0"), mustListen(t, w.NS, "10.244.1.5:40000")
	got := w.during(func() {
		wire.send(carried(strangerIP, fromBlue(100)).bytes(t))
		if receive(soon) == nil {
			t.Error("not delivered")
		}
	})
	mustCount(t, got, one(weftReasonREASON_SOURCE_UNKNOWN_PEER), nil, nil)
	if w.peerState(blueIP, nil).RxProven != 0 {
		t.Error("a suspect proved that the host lets the peer in")
	}
}

// Packets of ours prove nothing about the kernel's: uplink_out tells them apart
// by a stamp that goes from the overlay device to the uplink.
func TestOwnPacketsProveNothing(t *testing.T) {
	w := newWired(t)
	w.accelerate("observe")
	out, wire := mustTap(t, w.NS, "flannel.1"), mustTap(t, w.b, "eth0")
	for _, c := range []struct {
		name  string
		off   uint32
		path  string
		moves bool
	}{{"by the base path", 0, "base", false}, {"by the kernel path", 1, "kernel", true}} {
		t.Run(c.name, func(t *testing.T) {
			proven := ago(500 * time.Millisecond)
			w.peerState(blueIP, func(s *weftPeerState) { s.TxProven = proven })
			w.inForce(func(f *weftInForce) { f.Off = c.off })
			got := w.during(func() {
				out.send(toBlue(100).bytes(t))
				if wire.next(soon, isVXLAN) == nil {
					t.Error("nothing arrived")
				}
			})
			if got.paths[blueIP+" "+c.path].TxPackets != 1 {
				t.Errorf("counted %+v", got.paths)
			}
			if s := w.peerState(blueIP, nil); s.TxProven != proven != c.moves {
				t.Errorf("proven at %d, before at %d; want a new proof: %v", s.TxProven, proven, c.moves)
			}
		})
	}
}

// A route that sets a hop limit makes the kernel's packets differ from ours, so
// the peer behind it is never proven.
func TestRouteWithAHopLimitIsTheKernels(t *testing.T) {
	w := newWired(t)
	w.Run(t, "ip route add "+blueIP+"/32 dev eth0 src "+ourIP+" hoplimit 20")
	w.accelerate("observe")
	w.peerState(blueIP, func(s *weftPeerState) { s.TxProven = 0 })
	out, wire := mustTap(t, w.NS, "flannel.1"), mustTap(t, w.b, "eth0")
	for range 3 {
		got := w.during(func() {
			out.send(toBlue(100).bytes(t))
			if frame := wire.next(soon, isVXLAN); frame == nil || frame[atIP+8] != 20 {
				t.Errorf("left as %x, want a TTL of 20", frame)
			}
		})
		mustCount(t, got, map[string]uint64{"host_unproven": 1, "host_mangles": 1}, nil, sent(blueIP, "kernel", 1, 128))
	}
}

// A host rule that drops a peer's VXLAN packets ends the base path within the
// life of a proof, and lifting it brings the base path back.
func TestHostRuleEndsTheBasePath(t *testing.T) {
	w := newWired(t)
	w.Run(t, "ip addr add 10.244.1.5/32 dev lo")
	w.accelerate("observe")
	wire, receive := mustTap(t, w.b, "eth0"), mustListen(t, w.NS, "10.244.1.5:40000")
	packet := carried(blueIP, fromBlue(100)).bytes(t)
	w.peerState(blueIP, func(s *weftPeerState) { s.RxProven = coarseNow() })
	w.Run(t, "nft add table ip host", "nft add chain ip host input { type filter hook input priority 0 ; }",
		"nft add rule ip host input udp dport 8472 drop")
	stopped := false
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end) && !stopped; time.Sleep(20 * time.Millisecond) {
		got := w.during(func() {
			wire.send(packet)
			receive(20 * time.Millisecond)
		})
		stopped = got.passed["host_unproven"] == 1
	}
	if !stopped {
		t.Fatal("four seconds later packets still pass by the host's rule")
	}
	if data := func() []byte { wire.send(packet); return receive(never) }(); data != nil {
		t.Error("a packet was delivered past the host's rule")
	}
	w.Run(t, "nft delete table ip host")
	wire.send(packet)
	if receive(soon) == nil {
		t.Error("the kernel path does not deliver")
	}
	time.Sleep(50 * time.Millisecond) // until the flow may change its road
	got := w.during(func() {
		wire.send(packet)
		receive(soon)
	})
	mustCount(t, got, nil, nil, received(blueIP, "base", 1, 128))
}

// A host that tags what leaves its uplink changes outer packets, which ours
// would not share.
func TestHostTagsWhatLeavesTheUplink(t *testing.T) {
	w := newWired(t)
	mustTagAll(w, "eth0")
	w.accelerate("observe")
	w.peerState(blueIP, func(s *weftPeerState) { s.TxProven = 0 })
	out := mustTap(t, w.NS, "flannel.1")
	got := w.during(func() { out.send(toBlue(100).bytes(t)) })
	mustCount(t, got, map[string]uint64{"host_unproven": 1, "host_mangles": 1}, nil, sent(blueIP, "kernel", 1, 128))
	if w.peerState(blueIP, nil).TxProven != 0 {
		t.Error("a tagged packet proved that packets leave as they were built")
	}
}

// mustTagAll gives every packet that leaves a device of node a the VLAN tag 5,
// before any program of ours.
func mustTagAll(w *wired, device string) {
	t := w.tb
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "tag", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, 0x0081), // ETH_P_8021Q as the wire has it
			asm.Mov.Imm(asm.R3, 5),
			asm.FnSkbVlanPush.Call(),
			asm.Mov.Imm(asm.R0, passed),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	var l link.Link
	err = w.Do(func() (err error) {
		l, err = link.AttachTCX(link.TCXOptions{
			Interface: interfaceIndex(device), Program: prog, Attach: ebpf.AttachTCXEgress, Anchor: link.Head(),
		})
		return err
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("needs tcx (Linux 6.6) to run before our programs")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}
