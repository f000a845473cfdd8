//go:build linux

package ebpf

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// host is a namespace with an uplink and an overlay device, and a bpffs for
// its pins.
type host struct {
	*netns.NS
	pins string
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{NS: netns.New(t), pins: filepath.Join(mustBPFFS(t), "weft")}
	h.Run(t,
		"ip link set lo up",
		"ip link add eth0 type veth peer name wire",
		"ip addr add 192.0.2.11/24 dev eth0",
		"ip link set eth0 up",
		"ip link set wire up",
	)
	h.makeOverlay(t)
	return h
}

func (h *host) makeOverlay(t *testing.T) {
	t.Helper()
	h.Run(t,
		"ip link add flannel.1 address 0a:58:0a:f4:01:00 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning",
		"ip link set flannel.1 up",
	)
}

// mustBPFFS mounts a bpffs of the test's own.
func mustBPFFS(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mounting a bpffs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func (h *host) index(t *testing.T, name string) (index int) {
	t.Helper()
	h.MustDo(t, func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	})
	return index
}

func (h *host) desired(t *testing.T) Desired {
	return Desired{
		Uplink: h.index(t, "eth0"), Overlay: h.index(t, "flannel.1"),
		Local: netip.MustParseAddr("192.0.2.11"), MAC: state.MAC{0x0a, 0x58, 0x0a, 0xf4, 1, 0},
		SourceCheck: "observe",
		Peers: []state.Peer{{
			Node: "n2", Prefix: netip.MustParsePrefix("10.244.2.0/24"),
			PublicIP: netip.MustParseAddr("192.0.2.12"), MAC: state.MAC{0x0a, 0x58, 0x0a, 0xf4, 2, 0},
		}},
	}
}

// open loads an accelerator in the host, closed at the end of the test.
func (h *host) open(t *testing.T, maxPeers int) (a *Accelerator) {
	t.Helper()
	return h.openWith(t, Options{MaxPeers: maxPeers})
}

// openWith is open with what opts says of families.
func (h *host) openWith(t *testing.T, opts Options) (a *Accelerator) {
	t.Helper()
	opts.PinDir, opts.VNI, opts.Port = h.pins, 1, 8472
	h.MustDo(t, func() (err error) {
		a, err = Open(opts)
		return err
	})
	t.Cleanup(func() { a.Close() })
	return a
}

func (h *host) sync(t *testing.T, a *Accelerator) {
	t.Helper()
	if err := h.trySync(t, a); err != nil {
		t.Fatal(err)
	}
}

func (h *host) trySync(t *testing.T, a *Accelerator) error {
	t.Helper()
	d := h.desired(t)
	return h.Do(func() error {
		_, err := a.Sync(d)
		return err
	})
}

// hooks tells what sits where, as "program@device kind".
func (h *host) hooks(t *testing.T) (hooks []Hook) {
	t.Helper()
	h.MustDo(t, func() error {
		v, err := OpenView(h.pins)
		if err != nil {
			return err
		}
		defer v.Close()
		hooks, err = v.Hooks()
		return err
	})
	return hooks
}

func mustAllAttached(t *testing.T, hooks []Hook, kind string) {
	t.Helper()
	if len(hooks) != 4 {
		t.Fatalf("there are %d hooks, want 4", len(hooks))
	}
	for _, h := range hooks {
		if h.Kind != kind || h.ID == 0 {
			t.Errorf("%s is attached as %q (id %d), want %q", h.Program, h.Kind, h.ID, kind)
		}
	}
}

// usualKind is how this kernel attaches programs.
func usualKind(t *testing.T, h *host) string {
	t.Helper()
	if haveTCX(t, h) {
		return "tcx"
	}
	return "clsact"
}

func linkIDs(t *testing.T, h *host) map[string]link.ID {
	t.Helper()
	ids := map[string]link.ID{}
	for _, s := range sites(0, 0) {
		l, err := link.LoadPinnedLink(filepath.Join(linksDir(h.pins), s.program), nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids[s.program] = info.ID
		l.Close()
	}
	return ids
}

func TestUpgradeSwapsProgramsInsideTheirLinks(t *testing.T) {
	h := newHost(t)
	if !haveTCX(t, h) {
		t.Skip("this kernel has no tcx; newer ones run this")
	}
	old := h.open(t, 16)
	h.sync(t, old)
	before, links := h.hooks(t), linkIDs(t, h)
	mustAllAttached(t, before, "tcx")

	h.sync(t, h.open(t, 16))
	after := h.hooks(t)
	mustAllAttached(t, after, "tcx")
	for i := range after {
		if after[i].ID == before[i].ID {
			t.Errorf("%s still runs program %d of the former agent", after[i].Program, after[i].ID)
		}
	}
	for program, id := range linkIDs(t, h) {
		if links[program] != id {
			t.Errorf("the link of %s was replaced (%d, then %d): there was a moment without a program", program, links[program], id)
		}
	}
}

func TestSyncAgainChangesNothing(t *testing.T) {
	h := newHost(t)
	a := h.open(t, 16)
	h.sync(t, a)
	before := h.hooks(t)
	h.sync(t, a)
	for i, after := range h.hooks(t) {
		if after.ID != before[i].ID {
			t.Errorf("%s was replaced: %d, then %d", after.Program, before[i].ID, after.ID)
		}
	}
}

func TestFailedUpgradeLeavesTheOldPrograms(t *testing.T) {
	h := newHost(t)
	h.sync(t, h.open(t, 16))
	before := h.hooks(t)

	broken := h.open(t, 16)
	broken.attach = func(_ site, _ *ebpf.Program, _ string) (attachment, error) {
		return attachment{}, errors.New("injected")
	}
	if err := h.trySync(t, broken); err == nil || !strings.Contains(err.Error(), "uplink_in") {
		t.Fatalf("the error is %v, want one that names the program", err)
	}
	for i, after := range h.hooks(t) {
		if after.ID != before[i].ID || after.Kind != before[i].Kind {
			t.Errorf("%s is now %s %d, was %d", after.Program, after.Kind, after.ID, before[i].ID)
		}
	}
}

func TestDeviceMadeAnewGetsItsProgramsBack(t *testing.T) {
	h := newHost(t)
	a := h.open(t, 16)
	h.sync(t, a)
	h.Run(t, "ip link del flannel.1")
	h.makeOverlay(t)

	for _, hook := range h.hooks(t) {
		if gone := hook.Kind == ""; gone != strings.HasPrefix(hook.Program, "overlay") {
			t.Errorf("%s attached: %v", hook.Program, !gone)
		}
	}
	h.sync(t, a)
	mustAllAttached(t, h.hooks(t), usualKind(t, h))
}

func TestMapsOfAnotherSizeAreReplaced(t *testing.T) {
	h := newHost(t)
	h.sync(t, h.open(t, 16))
	h.sync(t, h.open(t, 32))
	v, err := OpenView(h.pins)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if n := v.maps[weftMapPeerStates].MaxEntries(); n != 32 {
		t.Errorf("the pinned map peer_states has room for %d peers, want 32", n)
	}
	peers, err := v.Peers()
	if err != nil || len(peers) != 1 {
		t.Errorf("the pinned maps hold %d peers (%v), want 1", len(peers), err)
	}
}

func TestSlotsAndCountersOutliveTheAgent(t *testing.T) {
	h := newHost(t)
	a := h.open(t, 16)
	h.sync(t, a)
	slot := a.slots.byIP[netip.MustParseAddr("192.0.2.12")]
	cpus := make([]weftCounters, ebpf.MustPossibleCPU())
	cpus[0].Path[weftPacketPathPATH_BASE].TxPackets = 7
	if err := a.objects.PeerCounters.Put(slot, cpus); err != nil {
		t.Fatal(err)
	}

	b := h.open(t, 16)
	h.sync(t, b)
	peers, err := b.View().Peers()
	if err != nil || len(peers) != 1 {
		t.Fatalf("peers: %v, %v", peers, err)
	}
	if got := peers[0].Paths[weftPacketPathPATH_BASE].TxPackets; got != 7 {
		t.Errorf("the counter is %d after a restart, want 7", got)
	}
}

// attachAsOldKernels attaches as kernels without tcx do.
func attachAsOldKernels(s site, prog *ebpf.Program, _ string) (attachment, error) {
	id, err := programID(prog)
	if err != nil {
		return attachment{}, err
	}
	return attachment{s, "clsact", id}, replaceFilter(s, prog)
}

func TestFiltersWhereTheKernelHasNoTCX(t *testing.T) {
	h := newHost(t)
	a := h.open(t, 16)
	a.attach = attachAsOldKernels
	h.sync(t, a)
	before := h.hooks(t)
	mustAllAttached(t, before, "clsact")

	b := h.open(t, 16)
	b.attach = attachAsOldKernels
	h.sync(t, b)
	for i, after := range h.hooks(t) {
		if after.ID == before[i].ID {
			t.Errorf("%s was not replaced", after.Program)
		}
	}
	if out := h.Run(t, "tc filter show dev eth0 ingress"); strings.Count(out, "weft/uplink_in") != 1 {
		t.Errorf("want one filter after an upgrade, have:\n%s", out)
	}

	t.Run("ANewerKernelClearsThem", func(t *testing.T) {
		if !haveTCX(t, h) {
			t.Skip("this kernel has no tcx; newer ones run this")
		}
		h.sync(t, h.open(t, 16))
		mustAllAttached(t, h.hooks(t), "tcx")
		if out := h.Run(t, "tc qdisc show"); strings.Contains(out, "clsact") {
			t.Errorf("the filters' qdisc is still there:\n%s", out)
		}
	})
}

func haveTCX(t *testing.T, h *host) bool {
	t.Helper()
	index := h.index(t, "eth0")
	err := h.Do(func() error {
		_, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
		return err
	})
	return err == nil
}

func TestUplinkChangesToAnotherDevice(t *testing.T) {
	for name, attach := range map[string]func(site, *ebpf.Program, string) (attachment, error){
		"tcx": attachProgram, "clsact": attachAsOldKernels,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			a := h.open(t, 16)
			a.attach = attach
			h.sync(t, a)
			d := h.desired(t)
			d.Uplink = h.index(t, "wire")
			h.MustDo(t, func() error {
				_, err := a.Sync(d)
				return err
			})
			for _, hook := range h.hooks(t) {
				if hook.Kind == "" || (strings.HasPrefix(hook.Program, "uplink") && hook.Device != d.Uplink) {
					t.Errorf("%s is on interface %d as %q", hook.Program, hook.Device, hook.Kind)
				}
			}
			if out := h.Run(t, "tc filter show dev eth0 ingress"); strings.Contains(out, "weft/") {
				t.Errorf("a filter is left on the former uplink:\n%s", out)
			}
		})
	}
}

func TestForeignProgramsBehindOursAreSeen(t *testing.T) {
	h := newHost(t)
	a := h.open(t, 16)
	h.sync(t, a)
	if !haveTCX(t, h) {
		t.Skip("this kernel has no tcx; newer ones run this")
	}
	var (
		foreign  link.Link
		stranger *ebpf.Program
	)
	index := h.index(t, "eth0")
	h.MustDo(t, func() error {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "stranger", Type: ebpf.SchedCLS, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
		})
		if err != nil {
			return err
		}
		t.Cleanup(func() { prog.Close() })
		stranger = prog
		foreign, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Tail()})
		return err
	})
	if got := h.hooks(t)[0]; len(got.Behind) != 1 || !strings.Contains(got.Behind[0], "stranger") {
		t.Errorf("behind %s: %v, want the stranger", got.Program, got.Behind)
	}
	foreign.Close()
	h.MustDo(t, func() error {
		filter := site{"stranger", index, true}.filter(stranger.FD())
		filter.Name, filter.Priority = "stranger", 7
		return errors.Join(netlink.QdiscAdd(clsact(index)), netlink.FilterAdd(filter))
	})
	if got := h.hooks(t)[0]; len(got.Behind) != 1 || got.Behind[0] != "bpf filter with priority 7" {
		t.Errorf("behind %s: %v, want the filter", got.Program, got.Behind)
	}
	h.Run(t, "tc qdisc del dev eth0 clsact", "tc qdisc add dev flannel.1 root tbf rate 1gbit burst 100k latency 10ms")
	if got := h.hooks(t)[3]; len(got.Behind) != 1 || got.Behind[0] != "qdisc tbf" {
		t.Errorf("behind %s: %v, want qdisc tbf", got.Program, got.Behind)
	}
}

func TestRemoveTakesAllAwayAndAgainNothing(t *testing.T) {
	for name, attach := range map[string]func(site, *ebpf.Program, string) (attachment, error){
		"tcx": attachProgram, "clsact": attachAsOldKernels,
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			a := h.open(t, 16)
			a.attach = attach
			h.sync(t, a)
			if err := SetAccel(h.pins, Base|Express, false, nil); err != nil {
				t.Fatal(err)
			}
			a.Close()
			var removed []string
			remove := func() (err error) {
				removed, err = Remove(h.pins)
				return err
			}
			h.MustDo(t, remove)
			if len(removed) != 5 {
				t.Errorf("removed %q, want four programs and the pins", removed)
			}
			if _, err := os.Stat(h.pins); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the pins are still there: %v", err)
			}
			if out := h.Run(t, "tc filter show dev eth0 ingress"); strings.Contains(out, "weft/") {
				t.Errorf("a filter is left:\n%s", out)
			}
			h.MustDo(t, remove)
			if len(removed) != 0 {
				t.Errorf("removed %q again", removed)
			}
		})
	}
}
