//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weft-net/weft/dataplane/state"
)

// newHost6 is newHost with an IPv6 overlay device.
func newHost6(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	makeOverlay6(t, h.NS, ourIP6, ourMAC6)
	return h
}

// desired6 is desired with IPv6; on a node that has nothing else, with that alone.
func (h *host) desired6(t *testing.T, alone bool) Desired {
	d := h.desired(t)
	if alone {
		d = Desired{Uplink: d.Uplink, SourceCheck: d.SourceCheck}
	}
	d.Overlay6 = h.index(t, "flannel-v6.1")
	d.Peers = append(d.Peers, peer6("n2", "fd00:10:244:2::/64", blueIP6, blueMAC6))
	return d
}

func (h *host) mustSync(t *testing.T, a *Accelerator, d Desired) (misfits Misfits) {
	t.Helper()
	h.MustDo(t, func() (err error) {
		misfits, err = a.Sync(d)
		return err
	})
	return misfits
}

// places tells what should sit where and does not, and what does.
func (h *host) places(t *testing.T) (there, missing []string) {
	t.Helper()
	for _, hook := range h.hooks(t) {
		if hook.Kind == "" {
			missing = append(missing, hook.Program)
		} else {
			there = append(there, hook.Program)
		}
		if counts := strings.HasPrefix(hook.Program, "overlay6_"); counts != hook.Counts {
			t.Errorf("%s only counts: %v", hook.Program, hook.Counts)
		}
	}
	return there, missing
}

func (h *host) mustHave(t *testing.T, programs ...string) {
	t.Helper()
	if there, missing := h.places(t); !slices.Equal(there, programs) || len(missing) > 0 {
		t.Errorf("at their places are %v, missing %v; want %v", there, missing, programs)
	}
	// What the kernel says, pins or not.
	var out string
	for _, device := range []string{"eth0", "flannel.1", "flannel-v6.1"} {
		for _, direction := range []string{"ingress", "egress"} {
			out += h.Run(t, fmt.Sprintf("tc filter show dev %s %s", device, direction))
		}
	}
	for _, program := range []string{"uplink_in", "overlay_in", "uplink_out", "overlay_out", "overlay6_in", "overlay6_out"} {
		if strings.Contains(out, "weft/"+program+" ") && !slices.Contains(programs, program) {
			t.Errorf("a filter with %s is left:\n%s", program, out)
		}
		_, err := os.Stat(linksDir(h.pins) + "/" + program)
		if err == nil && !slices.Contains(programs, program) {
			t.Errorf("a link with %s is left", program)
		}
	}
}

var (
	programs4 = []string{"uplink_in", "overlay_in", "uplink_out", "overlay_out"}
	programs6 = []string{"overlay6_in", "overlay6_out"}
)

// onEach runs a test with tcx and with clsact.
func onEach(t *testing.T, test func(t *testing.T, attach func(site, *ebpf.Program, string) (attachment, error))) {
	t.Run("tcx", func(t *testing.T) { test(t, attachProgram) })
	t.Run("clsact", func(t *testing.T) { test(t, attachAsOldKernels) })
}

// A node gets IPv6, loses IPv4, gets it back and loses IPv6, each time by a
// program that was started anew.
func TestFamiliesComeAndGo(t *testing.T) {
	onEach(t, func(t *testing.T, attach func(site, *ebpf.Program, string) (attachment, error)) {
		h := newHost6(t)
		step := func(opts Options, d Desired, programs ...string) *Accelerator {
			t.Helper()
			opts.MaxPeers = 16
			a := h.openWith(t, opts)
			a.attach = attach
			if misfits := h.mustSync(t, a, d); misfits.Len() > 0 {
				t.Errorf("misfits: %+v", misfits)
			}
			h.mustHave(t, programs...)
			h.mustSync(t, a, d)
			h.mustHave(t, programs...)
			var runtime Runtime
			h.MustDo(t, func() (err error) {
				runtime, err = a.View().Runtime()
				return err
			})
			for _, m := range []*ebpf.Map{a.objects.PeerStates, a.objects.PeerCounters, a.objects.Witnesses} {
				if small := m.MaxEntries() == 1; small != opts.NoIPv4 {
					t.Errorf("%v has room for %d entries", m, m.MaxEntries())
				}
			}
			if runtime.IPv4 == opts.NoIPv4 || runtime.IPv6 != opts.IPv6 {
				t.Errorf("there are programs for IPv4: %v, for IPv6: %v", runtime.IPv4, runtime.IPv6)
			}
			return a
		}
		both := slices.Concat(programs4, programs6)
		step(Options{}, h.desired(t), programs4...)
		a := step(Options{IPv6: true}, h.desired6(t, false), both...)
		h.MustDo(t, func() error {
			_, err := a.SyncPods([]Pod{{IP: addr("10.244.1.5"), Veth: interfaceIndex("wire")}}, nil)
			return err
		})
		step(Options{IPv6: true, NoIPv4: true}, h.desired6(t, true), programs6...)
		if pins, err := os.ReadDir(linksDir(h.pins)); err != nil || slices.ContainsFunc(pins, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "pod_") }) {
			t.Errorf("pods' programs are left: %v, %v", pins, err)
		}
		if out := h.Run(t, "tc filter show dev wire ingress"); strings.Contains(out, "weft/") {
			t.Errorf("a filter is left on a pod's veth:\n%s", out)
		}
		step(Options{IPv6: true}, h.desired6(t, false), both...)
		step(Options{}, h.desired(t), programs4...)
		step(Options{IPv6: true, NoIPv4: true}, h.desired6(t, true), programs6...)
		var removed []string
		h.MustDo(t, func() (err error) {
			removed, err = Remove(h.pins)
			return err
		})
		if len(removed) != 3 {
			t.Errorf("removed %q, want two programs and the pins", removed)
		}
	})
}

// While an overlay device is gone, what is known of its family stays; the other
// family goes on.
func TestOneOverlayDeviceIsGone(t *testing.T) {
	onEach(t, func(t *testing.T, attach func(site, *ebpf.Program, string) (attachment, error)) {
		h := newHost6(t)
		a := h.openWith(t, Options{MaxPeers: 16, IPv6: true})
		a.attach = attach
		d := h.desired6(t, false)
		h.mustSync(t, a, d)
		a.mustCount(t, blueIP6, 7)
		slot := a.slots.byIP[addr(blueIP)]

		h.Run(t, "ip link del flannel-v6.1")
		gone := d
		gone.Overlay6, gone.Peers = 0, []state.Peer{d.Peers[0], {
			Node: "n3", Prefix: mustPrefix("10.244.3.0/24"), PublicIP: addr(greenIP), MAC: state.MAC{0x0a, 0x58, 0x0a, 0xf4, 3, 0},
		}}
		h.mustSync(t, a, gone)
		if there, missing := h.places(t); !slices.Equal(there, programs4) || !slices.Equal(missing, programs6) {
			t.Errorf("at their places are %v, missing %v", there, missing)
		}
		if _, ok := a.slots.byIP[addr(greenIP)]; !ok {
			t.Error("the new IPv4 peer was not told")
		}
		makeOverlay6(t, h.NS, ourIP6, ourMAC6)
		d.Overlay6 = h.index(t, "flannel-v6.1")
		h.mustSync(t, a, d)
		h.mustHave(t, slices.Concat(programs4, programs6)...)
		a.mustHaveCounted(t, blueIP6, 7)

		h.Run(t, "ip link del flannel.1")
		gone = d
		gone.Overlay, gone.Local, gone.Peers = 0, netip.Addr{}, []state.Peer{d.Peers[1], peer6("n3", "fd00:10:244:3::/64", greenIP6, "0a:58:0a:f4:03:06")}
		h.mustSync(t, a, gone)
		if there, missing := h.places(t); !slices.Equal(missing, []string{"overlay_in", "overlay_out"}) {
			t.Errorf("at their places are %v, missing %v", there, missing)
		}
		if _, ok := a.slots6.byIP[addr(greenIP6)]; !ok {
			t.Error("the new IPv6 peer was not told")
		}
		if now, ok := a.slots.byIP[addr(blueIP)]; !ok || now != slot {
			t.Errorf("the IPv4 peer has slot %d (%v), had %d", now, ok, slot)
		}
		h.makeOverlay(t)
		d.Overlay = h.index(t, "flannel.1")
		h.mustSync(t, a, d)
		h.mustHave(t, slices.Concat(programs4, programs6)...)
	})
}

// mustCount makes it look as if so many packets were sent to an IPv6 peer.
func (a *Accelerator) mustCount(t *testing.T, ip string, packets uint64) {
	t.Helper()
	slot, ok := a.slots6.byIP[addr(ip)]
	if !ok {
		t.Fatalf("%s has no slot", ip)
	}
	cpus := make([]weftPathCounters, ebpf.MustPossibleCPU())
	cpus[len(cpus)-1].TxPackets = packets
	if err := a.objects.Peer6Counters.Put(slot, cpus); err != nil {
		t.Fatal(err)
	}
}

func (a *Accelerator) mustHaveCounted(t *testing.T, ip string, packets uint64) {
	t.Helper()
	peers, err := a.View().Peers()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range peers {
		if p.PublicIP == addr(ip) {
			want := [weftPacketPathPATH_COUNT]PathCounters{weftPacketPathPATH_KERNEL: {TxPackets: packets}}
			if !p.Carried || p.Paths != want {
				t.Errorf("%s: counted %+v, want %d packets sent by the kernel path", ip, p, packets)
			}
			return
		}
	}
	t.Errorf("%s is no peer", ip)
}

// Counters of both families go on after a restart, and those of IPv4 when IPv6
// comes and goes. A slot that changes hands starts at zero.
func TestCountersOfBothFamiliesGoOn(t *testing.T) {
	h := newHost6(t)
	plain := h.open(t, 16)
	h.sync(t, plain)
	cpus := make([]weftCounters, ebpf.MustPossibleCPU())
	cpus[0].Path[weftPacketPathPATH_BASE].RxBytes = 77
	if err := plain.objects.PeerCounters.Put(plain.slots.byIP[addr(blueIP)], cpus); err != nil {
		t.Fatal(err)
	}
	d := h.desired6(t, false)
	first := h.openWith(t, Options{MaxPeers: 16, IPv6: true})
	h.mustSync(t, first, d)
	first.mustCount(t, blueIP6, 7)
	d.Peers = append([]state.Peer{peer6("n0", "fd00:10:244:1:1::/80", "2001:db8::10", "0a:58:0a:f4:09:06")}, d.Peers...)

	second := h.openWith(t, Options{MaxPeers: 16, IPv6: true})
	h.mustSync(t, second, d)
	second.mustHaveCounted(t, blueIP6, 7)
	second.mustHaveCounted(t, "2001:db8::10", 0)
	if second.slots6.byIP[addr(blueIP6)] != first.slots6.byIP[addr(blueIP6)] {
		t.Error("the peer has another slot after the restart")
	}
	peers, err := second.View().Peers()
	if err != nil || peers[0].Paths[weftPacketPathPATH_BASE].RxBytes != 77 {
		t.Errorf("of IPv4 is counted %+v (%v)", peers, err)
	}
	plain = h.open(t, 16)
	h.sync(t, plain)
	if peers, err = plain.View().Peers(); err != nil || len(peers) != 1 || peers[0].Paths[weftPacketPathPATH_BASE].RxBytes != 77 {
		t.Errorf("of IPv4 is counted %+v (%v) without IPv6", peers, err)
	}
}

// Of each family so many peers have room, and none takes that of the other.
func TestRoomForBothFamilies(t *testing.T) {
	h := newHost6(t)
	a := h.openWith(t, Options{MaxPeers: 2, IPv6: true})
	d := h.desired6(t, false)
	d.Peers = nil
	for i := range byte(3) {
		d.Peers = append(d.Peers,
			state.Peer{
				Prefix:   netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, 2 + i, 0}), 24),
				PublicIP: netip.AddrFrom4([4]byte{192, 0, 2, 12 + i}), MAC: state.MAC{2, 0, 0, 0, 4, i},
			},
			peer6("", fmt.Sprintf("fd00:10:244:%d::/64", 2+i), fmt.Sprintf("2001:db8::%d", 12+i), fmt.Sprintf("02:00:00:00:06:%02d", i)))
	}
	misfits := h.mustSync(t, a, d)
	if want := d.Peers[4:]; !slices.Equal(misfits.NoRoom, want) || len(misfits.Unknown) > 0 {
		t.Errorf("misfits are %+v, want %+v", misfits, want)
	}
	if a.HasRoom(misfits) {
		t.Error("there is room for a peer of a family that has none")
	}
	peers, err := a.View().Peers()
	if err != nil || len(peers) != 6 {
		t.Fatalf("there are %d peers (%v), want 6", len(peers), err)
	}
	for i, p := range peers {
		if want := i%3 < 2; p.Carried != want || p.PublicIP.Is4() != (i < 3) {
			t.Errorf("%v is carried or counted: %v", p.PublicIP, p.Carried)
		}
	}
	// One goes, and there is room for another of its family.
	d.Peers = slices.Delete(d.Peers, 1, 2)
	h.mustSync(t, a, d)
	six := Misfits{NoRoom: []state.Peer{d.Peers[4]}}
	four := Misfits{NoRoom: []state.Peer{d.Peers[3]}}
	mustRest := func(m Misfits) {
		t.Helper()
		for deadline := time.Now().Add(5 * slotRest); !a.HasRoom(m); time.Sleep(slotRest / 20) {
			if time.Now().After(deadline) {
				t.Fatal("a freed slot never rested enough")
			}
		}
	}
	mustRest(six)
	if a.HasRoom(four) {
		t.Error("there is room for an IPv4 peer now")
	}
	if misfits = h.mustSync(t, a, d); !slices.Equal(misfits.NoRoom, four.NoRoom) {
		t.Errorf("misfits are %+v, want %+v", misfits, four)
	}
	d.Peers = ofFamily(d.Peers, netip.Addr.Is6)
	h.mustSync(t, a, d)
	mustRest(four)
	if a.HasRoom(six) || a.HasRoom(Misfits{}) {
		t.Error("there is room for a peer that is none or has no room")
	}
}

// IPv6 has no switches: those of its node's IPv4 are moved, and nothing else is
// said to have moved.
func TestSwitchOfANodeWithBothFamilies(t *testing.T) {
	h := newHost6(t)
	a := h.openWith(t, Options{MaxPeers: 16, IPv6: true})
	h.mustSync(t, a, h.desired6(t, false))
	if err := SetAccel(h.pins, Base, false, []netip.Addr{addr(blueIP), addr(blueIP6)}); err != nil {
		t.Fatal(err)
	}
	peers, err := a.View().Peers()
	if err != nil || len(peers) != 2 || peers[0].On || !peers[0].Express || !peers[1].On || !peers[1].Express {
		t.Errorf("peers are %+v (%v)", peers, err)
	}
	if err := SetAccel(h.pins, Base, false, []netip.Addr{addr(blueIP6)}); err == nil || !strings.Contains(err.Error(), blueIP6) {
		t.Errorf("the error is %v, want one that names %s", err, blueIP6)
	}
}

// A failure to attach the IPv6 programs is an error that names them, and leaves
// what carries packets at its place.
func TestIPv6ProgramThatCannotBeAttached(t *testing.T) {
	h := newHost6(t)
	a := h.openWith(t, Options{MaxPeers: 16, IPv6: true})
	a.attach = func(s site, p *ebpf.Program, pin string) (attachment, error) {
		if s.program == "overlay6_out" {
			return attachment{}, errors.New("injected")
		}
		return attachProgram(s, p, pin)
	}
	d := h.desired6(t, false)
	err := h.Do(func() error {
		_, err := a.Sync(d)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "overlay6_out") {
		t.Errorf("the error is %v, want one that names the program", err)
	}
	if there, err := os.ReadDir(linksDir(h.pins)); haveTCX(t, h) && (err != nil || len(there) != 5) {
		t.Errorf("links are %v (%v), want those of IPv4 and overlay6_in", there, err)
	}
}
