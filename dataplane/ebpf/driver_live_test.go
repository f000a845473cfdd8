//go:build linux

package ebpf

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// newXDPWired is newWired with programs at node a, that in the driver among them.
func newXDPWired(t *testing.T, check string) *wired {
	t.Helper()
	w := newWired(t)
	w.xdp = true
	w.accelerate(check)
	return w
}

// The driver strips what it understands, and what comes out of the overlay device
// is what the kernel makes of it. It leaves alone what has a checksum that is still
// open, or none that can be verified.
func TestStrippingInTheDriverIsTheKernels(t *testing.T) {
	left := map[string]bool{
		"a protocol nobody knows": true, "SCTP": true, "a bare header": true,
		"a first fragment": true, "a later fragment": true, "IP options": true,
	}
	for name, c := range offloads {
		whole := slices.Contains(c.setUp, "ethtool -K eth0 tx off")
		outer := !slices.Contains(c.setUp, "noudpcsum")
		t.Run(name, func(t *testing.T) {
			w := newWired(t)
			w.xdp = true
			w.offload(c.setUp)
			out, overlay := mustTap(t, w.b, "flannel.1"), mustTap(t, w.NS, "flannel.1")
			all := samples(blueMAC, ourMAC, bluePod, ourPod)
			w.accelerate("enforce")
			for _, name := range slices.Sorted(maps.Keys(all)) {
				t.Run(name, func(t *testing.T) {
					w.reset()
					before := w.stripped()
					mustArrive(t, w, out, overlay, all[name].bytes(t), c.unverified && unprotected[name])
					want := uint64(1)
					if left[name] || outer && (!whole || name == "UDP without a checksum") {
						want = 0
					}
					if stripped := w.stripped() - before; stripped != want {
						t.Errorf("the driver has stripped %d packets, want %d", stripped, want)
					}
				})
			}
		})
	}
}

// Before uplink_in was seen to get what the driver says with a packet, nothing is
// stripped; nor when that is long ago.
func TestDriverStripsOnceItIsHeard(t *testing.T) {
	w := newXDPWired(t, "observe")
	out, overlay := mustTap(t, w.b, "flannel.1"), mustTap(t, w.NS, "flannel.1")
	frame := fromBlue(100).bytes(t)
	send := func() (stripped uint64) {
		t.Helper()
		before := w.stripped()
		out.send(frame)
		if inside := overlay.next(soon, isIPv4); !bytes.Equal(inside, frame) {
			t.Errorf("at our overlay device came\n     %x\nwant %x", inside, frame)
		}
		return w.stripped() - before
	}
	for _, heard := range []uint64{0, ago(2100 * time.Millisecond)} {
		w.reset()
		w.put(w.accel.objects.NotesRead, uint32(0), heard)
		if n := send(); n != 0 {
			t.Errorf("heard at %d: %d packets were stripped at first", heard, n)
		}
		w.setAggregates(w.accel.objects.LeftFlows, 0)
		if n := send(); n != 1 {
			t.Errorf("heard at %d: %d packets were stripped once uplink_in had got a note, want 1", heard, n)
		}
	}
	x, err := w.accel.View().XDP()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range x.Reasons {
		if r.Name == "note_unheard" && r.Passed != 2 {
			t.Errorf("%d packets were left for want of a note, want 2", r.Passed)
		}
	}
}

// Behind a packet that the driver leaves as it is, the flow's next ones are left
// too: they would overtake it.
func TestDriverKeepsOrder(t *testing.T) {
	w := newXDPWired(t, "observe")
	out, overlay := mustTap(t, w.b, "flannel.1"), mustTap(t, w.NS, "flannel.1")
	w.reset()
	send := func(p *packet) uint64 {
		before := w.stripped()
		out.send(p.bytes(t))
		overlay.next(soon, isIPv4)
		return w.stripped() - before
	}
	flow := func() *packet { return eth(blueMAC, ourMAC).ip(bluePod, ourPod).udp(7, 8).payload(100) }
	if n := send(flow()); n != 1 {
		t.Fatalf("%d packets were stripped, want 1", n)
	}
	// It is remembered for 20 ms, and a machine may be busy for longer.
	kept := false
	for range 50 {
		// The options keep the packet from being stripped, not from its flow.
		send(eth(blueMAC, ourMAC).ip(bluePod, ourPod, recordRoute).udp(7, 8).payload(100))
		kept = kept || send(flow()) == 0
	}
	if !kept {
		t.Error("packets were stripped behind those that were left")
	}
	w.setAggregates(w.accel.objects.LeftFlows, ago(100*time.Millisecond))
	if n := send(flow()); n != 1 {
		t.Errorf("%d packets were stripped a while later, want 1", n)
	}
}

// drive runs uplink_xdp alone on a packet, and returns what becomes of it, note and
// all, and the reasons that were counted.
func (w *wired) drive(in []byte) (verdict uint32, out []byte, reasons map[string]uint64) {
	w.tb.Helper()
	count := func() map[string]uint64 {
		x, err := w.accel.View().XDP()
		if err != nil {
			w.tb.Fatal(err)
		}
		counts := map[string]uint64{"stripped": x.Stripped}
		for _, r := range x.Reasons {
			counts[r.Name] = r.Passed + r.Dropped
		}
		return counts
	}
	before := count()
	options := ebpf.RunOptions{Data: in, DataOut: make([]byte, len(in)+256)}
	w.MustDo(w.tb, func() (err error) {
		verdict, err = w.accel.objects.UplinkXdp.Run(&options)
		return err
	})
	return verdict, options.DataOut, difference(count(), before)
}

// What uplink_in does not understand, or must not take, the driver leaves as it came,
// for the same reason or one of its own.
func TestDriverLeavesWhatUplinkInLeaves(t *testing.T) {
	const xdpPass = 2
	own := map[string]map[string]uint64{
		// The headers are not where those of a packet are that could be stripped.
		"outer IP options": nil, "a later outer fragment of a peer's": nil,
		"an inner IP header that is cut": nil, "no inner frame at all": nil,
		// Its own sum decides, whoever has verified another one.
		"an unknown protocol, with an outer checksum that nobody verified":    one(weftReasonREASON_FLOW_PROTOCOL),
		"a first inner fragment, with an outer checksum that nobody verified": one(weftReasonREASON_FLOW_FRAGMENT),
		"a later inner fragment, with an outer checksum that nobody verified": one(weftReasonREASON_FLOW_FRAGMENT),
		"an inner UDP header that is cut":                                     one(weftReasonREASON_FLOW_MALFORMED),
	}
	w := newXDPWired(t, "observe")
	for _, c := range inCases() {
		if c.skb != nil || c.verdict != passed {
			continue // there is no skb yet that the kernel could say something of
		}
		t.Run(c.name, func(t *testing.T) {
			w.reset()
			if c.given != nil {
				c.given(w.node)
			}
			in := c.packet.bytes(t, c.broken...)
			verdict, out, reasons := w.drive(in)
			if verdict != xdpPass || !bytes.Equal(out, in) {
				t.Errorf("verdict %d, left as\n     %x\nwant %x", verdict, out, in)
			}
			want, known := own[c.name]
			if !known {
				want = one(c.reason)
			}
			if !maps.Equal(reasons, want) {
				t.Errorf("counted %v, want %v", reasons, want)
			}
		})
	}
	w.reset()
	in := carried(blueIP, fromBlue(100)).bytes(t)
	if verdict, out, reasons := w.drive(in); verdict != xdpPass || !bytes.HasSuffix(out, in[atInner:]) || len(out) != len(in)-50+16 || reasons["stripped"] != 1 {
		t.Errorf("a good packet: verdict %d, %d bytes, counted %v", verdict, len(out), reasons)
	}
}

// A frame that the wire floods to us and that is addressed to another machine is not
// for us, whatever is in it.
func TestDriverLeavesFramesOfOthers(t *testing.T) {
	w := newXDPWired(t, "observe")
	wire, overlay := mustTap(t, w.b, "eth0"), mustTap(t, w.NS, "flannel.1")
	for to, stripped := range map[string]uint64{uplinkMAC: 1, "02:00:00:00:00:99": 0} {
		w.reset()
		before := w.stripped()
		wire.send(eth(wireMAC, to).ip(blueIP, ourIP).udp(50000, 8472).vxlan(1).
			around(fromBlue(100)).bytes(t))
		if came := overlay.next(never, isIPv4); (came != nil) != (stripped == 1) {
			t.Errorf("to %s: at our overlay device came %x", to, came)
		}
		if n := w.stripped() - before; n != stripped {
			t.Errorf("to %s: the driver has stripped %d packets, want %d", to, n, stripped)
		}
	}
}

// In enforce what must not come in does not become an skb.
func TestDriverRefuses(t *testing.T) {
	for check, refused := range map[string]uint64{"enforce": 1, "observe": 0} {
		t.Run(check, func(t *testing.T) {
			w := newXDPWired(t, check)
			wire, uplink := mustTap(t, w.b, "eth0"), mustTap(t, w.NS, "eth0")
			for name, c := range map[string]struct {
				packet *packet
				reason weftReason
			}{
				"of no peer":      {carried("192.0.2.77", eth(blueMAC, ourMAC).ip(bluePod, ourPod).udp(7, 8).payload(9)), weftReasonREASON_SOURCE_UNKNOWN_PEER},
				"of another peer": {carried(greenIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).udp(7, 8).payload(9)), weftReasonREASON_SOURCE_NOT_ITS_PREFIX},
			} {
				t.Run(name, func(t *testing.T) {
					w.reset()
					var seen []byte
					got := w.during(func() {
						wire.send(c.packet.bytes(t))
						seen = uplink.next(never, isVXLAN)
					})
					if dropped := got.dropped[Reasons[c.reason].Name]; dropped != refused {
						t.Errorf("%d packets were dropped, want %d", dropped, refused)
					}
					if (seen == nil) != (refused == 1) {
						t.Errorf("behind the driver came %x", seen)
					}
				})
			}
			if x, err := w.accel.View().XDP(); err != nil || x.Stripped != 0 {
				t.Errorf("%d packets were stripped (%v)", x.Stripped, err)
			}
		})
	}
}

// What is in the way is said, and everything else goes on without XDP.
func TestDriverThatIsLeftAlone(t *testing.T) {
	drop := &ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	}
	for name, c := range map[string]struct {
		given func(*testing.T, *wired)
		why   string
		seen  bool // without a Sync
	}{
		"another XDP program": {func(t *testing.T, w *wired) {
			if _, err := unpinXDP(w.accel.opts.PinDir); err != nil {
				t.Fatal(err)
			}
			prog, err := ebpf.NewProgram(drop)
			if err != nil {
				t.Fatal(err)
			}
			l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: int(w.uplink), Flags: link.XDPDriverMode})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close(); prog.Close() })
		}, "another XDP program is there", true},
		"a device whose driver knows no XDP": {func(t *testing.T, w *wired) {
			w.Run(t, "ip link add nodriver type bridge", "ip link set nodriver up")
			w.desired.Uplink = interfaceIndex("nodriver")
		}, "the uplink's driver takes no XDP program", false},
		"a program in front of uplink_in": {func(t *testing.T, w *wired) {
			spec := drop.Copy()
			spec.Type = ebpf.SchedCLS
			spec.Instructions[0] = asm.Mov.Imm(asm.R0, -1)
			prog, err := ebpf.NewProgram(spec)
			if err != nil {
				t.Fatal(err)
			}
			l, err := link.AttachTCX(link.TCXOptions{Program: prog, Interface: int(w.uplink), Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close(); prog.Close() })
		}, "would see stripped packets before uplink_in does", true},
		"a clsact filter for uplink_in": {func(_ *testing.T, w *wired) {
			w.accel.attach = func(s site, _ *ebpf.Program, _ string) (attachment, error) {
				return attachment{site: s, kind: "clsact"}, nil
			}
			clear(w.accel.placed)
		}, "needs Linux 6.6", false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newXDPWired(t, "observe")
			w.MustDo(t, func() error {
				if w.accel.XDPChanged() {
					t.Error("something has changed, and nothing did")
				}
				c.given(t, w)
				if c.seen && !w.accel.XDPChanged() {
					t.Error("nothing has changed, it seems")
				}
				return nil
			})
			w.sync()
			if why := w.accel.NoXDP(); !strings.Contains(why, c.why) {
				t.Errorf("in the way is %q, want %q", why, c.why)
			}
			if x, err := w.accel.View().XDP(); err != nil || x.Attached {
				t.Errorf("a program is in the driver (%v)", err)
			}
		})
	}
}

// A card takes tags off, and the program in its driver would not see which packets had
// one: it goes when a VLAN comes.
func TestDriverWithAVLANOnTheUplink(t *testing.T) {
	w := newXDPWired(t, "observe")
	mustBe := func(why string, attached bool) {
		t.Helper()
		w.sync()
		if got := w.accel.NoXDP(); got != "" && why == "" || !strings.Contains(got, why) {
			t.Errorf("in the way is %q, want %q", got, why)
		}
		if x, err := w.accel.View().XDP(); err != nil || x.Attached != attached {
			t.Errorf("a program is in the driver: %v (%v), want %v", x.Attached, err, attached)
		}
	}
	if _, err := w.Try("ip link add link eth0 name eth0.7 type vlan id 7"); err != nil && strings.Contains(err.Error(), "Unknown device type") {
		t.Skip("this kernel has no VLANs")
	} else if err != nil {
		t.Fatal(err)
	}
	mustBe("the uplink has the VLAN device eth0.7", false)
	w.Run(t, "ip link delete eth0.7")
	mustBe("", true)
}

// The program stays in the driver while an agent takes over from another, unless
// the new one does not want it; with the programs behind it, it goes.
func TestDriverIsHandedOver(t *testing.T) {
	w := newXDPWired(t, "observe")
	attached := func() (uint32, bool) {
		l, err := link.LoadPinnedLink(w.accel.xdpPin(), nil)
		if err != nil {
			return 0, false
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		return uint32(info.ID), true
	}
	next := func(xdp bool) {
		t.Helper()
		opts := w.accel.opts
		opts.XDP = xdp
		w.MustDo(t, func() error {
			accel, err := Open(opts)
			if err != nil {
				return err
			}
			w.accel.Close()
			w.accel = accel
			return nil
		})
		w.sync()
	}
	first, ok := attached()
	if !ok {
		t.Fatal("nothing is attached")
	}
	next(true)
	if second, ok := attached(); !ok || second != first {
		t.Errorf("link %d became link %d", first, second)
	}
	next(false)
	if _, ok := attached(); ok {
		t.Error("it is there though nobody wants it")
	}
	next(true)
	w.MustDo(t, func() error {
		removed, err := Detach(w.accel.opts.PinDir)
		if len(removed) == 0 || removed[0] != "program uplink_xdp" {
			t.Errorf("removed first was %v, want uplink_xdp", removed)
		}
		return err
	})
	if _, ok := attached(); ok {
		t.Error("it is there without uplink_in")
	}
}
