//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
)

// podHost is a host with pods behind veths.
type podHost struct {
	*host
	attach func(site, *ebpf.Program, string) (attachment, error)
}

// attachWays are the two ways to attach: this kernel's, and that of older ones.
var attachWays = map[string]func(site, *ebpf.Program, string) (attachment, error){
	"as this kernel does": attachProgram, "clsact": attachAsOldKernels,
}

// eachWay runs a test with either way to attach.
func eachWay(t *testing.T, test func(*testing.T, *podHost)) {
	for name, attach := range attachWays {
		t.Run(name, func(t *testing.T) {
			h := &podHost{newHost(t), attach}
			for i := range 3 {
				h.addVeth(t, i)
			}
			test(t, h)
		})
	}
}

func (h *podHost) addVeth(t *testing.T, i int) {
	t.Helper()
	h.Run(t, fmt.Sprintf("ip link add cali%d type veth peer name pod%d", i, i), fmt.Sprintf("ip link set cali%d up", i))
}

// agent is an accelerator that has synced once.
func (h *podHost) agent(t *testing.T) *Accelerator {
	t.Helper()
	a := h.open(t, 16)
	a.attach = h.attach
	h.sync(t, a)
	return a
}

// pod is the pod behind veth i.
func (h *podHost) pod(t *testing.T, i int) Pod {
	t.Helper()
	return Pod{
		IP: netip.AddrFrom4([4]byte{10, 244, 1, byte(5 + i)}), Veth: h.index(t, fmt.Sprintf("cali%d", i)),
		MAC: state.MAC{2, 0, 0, 0, 1, byte(i)}, Gateway: state.MAC{2, 0, 0, 0, 1, 255}, MTU: 1450,
	}
}

func (h *podHost) pods(t *testing.T, which ...int) (pods []Pod) {
	t.Helper()
	for _, i := range which {
		pods = append(pods, h.pod(t, i))
	}
	return pods
}

func (h *podHost) trySyncPods(a *Accelerator, pods []Pod) (failed map[netip.Addr]error, err error) {
	doErr := h.Do(func() error {
		failed, err = a.SyncPods(pods, []netip.Addr{netip.MustParseAddr("192.0.2.11")})
		return nil
	})
	return failed, errors.Join(doErr, err)
}

func (h *podHost) syncPods(t *testing.T, a *Accelerator, pods ...Pod) {
	t.Helper()
	if failed, err := h.trySyncPods(a, pods); err != nil || len(failed) > 0 {
		t.Fatalf("failed %v: %v", failed, err)
	}
}

// programsOn tells which program of ours runs where on a device, by its number.
func (h *podHost) programsOn(t *testing.T, device string) map[string]ebpf.ProgramID {
	t.Helper()
	found := map[string]ebpf.ProgramID{}
	index := h.index(t, device)
	h.MustDo(t, func() error {
		for _, s := range podSites(index) {
			if f, err := ourFilter(s); err != nil {
				return err
			} else if f != nil {
				found[s.program] = ebpf.ProgramID(f.Id)
			}
			chain, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: s.attachType()})
			if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
				continue // no tcx
			}
			if err != nil {
				return err
			}
			for _, p := range chain.Programs {
				if name := programName(p.ID); strings.HasPrefix(name, s.program) {
					if found[s.program] != 0 {
						return fmt.Errorf("%s is there twice", s.program)
					}
					found[s.program] = p.ID
				}
			}
		}
		return nil
	})
	return found
}

// mustRun waits until programs are on a device as wanted: the kernel takes those
// of a link that was unpinned off a moment later.
func (h *podHost) mustRun(t *testing.T, device string, wanted map[string]ebpf.ProgramID) {
	t.Helper()
	var on map[string]ebpf.ProgramID
	for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if on = h.programsOn(t, device); maps.Equal(on, wanted) {
			return
		}
	}
	t.Errorf("on %s run %v, want %v", device, on, wanted)
}

// mustServe checks that the maps have these pods and no others, and that the
// programs sit on their veths alone.
func (h *podHost) mustServe(t *testing.T, a *Accelerator, pods ...Pod) {
	t.Helper()
	want := map[uint32]weftEndpoint{}
	devices := map[uint32]uint32{
		uint32(weftDeviceDEVICE_OVERLAY): uint32(h.index(t, "flannel.1")), uint32(weftDeviceDEVICE_UPLINK): uint32(h.index(t, "eth0")),
	}
	served := map[int]bool{}
	for _, p := range pods {
		want[toBE32(p.IP)] = weftEndpoint{Veth: uint32(p.Veth), Mtu: uint32(p.MTU), Mac: p.MAC, Gateway: p.Gateway}
		devices[uint32(p.Veth)] = uint32(p.Veth)
		served[p.Veth] = true
	}
	have, err := readAll[uint32, weftEndpoint](a.objects.Endpoints)
	if err != nil || !maps.Equal(have, want) {
		t.Errorf("endpoints are %v (%v), want %v", have, err, want)
	}
	targets, err := readAll[uint32, uint32](a.objects.Devices)
	if err != nil || !maps.Equal(targets, devices) {
		t.Errorf("devices are %v (%v), want %v", targets, err, devices)
	}
	for i := range 3 {
		device := fmt.Sprintf("cali%d", i)
		if _, err := h.Try("ip link show " + device); err != nil {
			continue
		}
		wanted := map[string]ebpf.ProgramID{}
		if served[h.index(t, device)] {
			for _, name := range []string{"pod_in", "pod_out"} {
				if wanted[name], err = programID(a.program(name)); err != nil {
					t.Fatal(err)
				}
			}
		}
		h.mustRun(t, device, wanted)
	}
	ours := a.PodPrograms()
	for _, name := range []string{"pod_in", "pod_out"} {
		if id, err := programID(a.program(name)); err != nil || !ours[uint32(id)] {
			t.Errorf("%s (%d) is not among our programs %v", name, id, ours)
		}
	}
}

func TestPodsComeAndGo(t *testing.T) {
	eachWay(t, func(t *testing.T, h *podHost) {
		a := h.agent(t)
		h.mustServe(t, a)
		for _, which := range [][]int{{0}, {0, 1}, {0, 1}, {1, 2}, {2}, {}, {0, 1, 2}} {
			h.syncPods(t, a, h.pods(t, which...)...)
			h.mustServe(t, a, h.pods(t, which...)...)
		}
		own, err := readAll[uint32, uint32](a.objects.NodeAddresses)
		maps.DeleteFunc(own, func(addr, _ uint32) bool { return a.peerAddresses[addr] == 1 })
		if want := map[uint32]uint32{toBE32(netip.MustParseAddr("192.0.2.11")): 1}; err != nil || !maps.Equal(own, want) {
			t.Errorf("own addresses are %v (%v), want %v", own, err, want)
		}
		// A later Sync of peers leaves the pods alone.
		h.sync(t, a)
		h.mustServe(t, a, h.pods(t, 0, 1, 2)...)
	})
}

// The addresses at which pods must not send to the VXLAN port: the peers' come
// with Sync, the node's own with SyncPods, and each stays while the other changes.
func TestNodeAddressesComeAndGo(t *testing.T) {
	h := &podHost{newHost(t), attachProgram}
	a := h.open(t, 16)
	d := h.desired(t)
	peer := func(prefix, ip string) state.Peer {
		return state.Peer{Prefix: netip.MustParsePrefix(prefix), PublicIP: netip.MustParseAddr(ip), MAC: state.MAC{2, 0, 0, 0, 0, 9}}
	}
	blue, green := peer("10.244.2.0/24", "192.0.2.12"), peer("10.244.3.0/25", "192.0.2.13")
	ofBlue := []string{"192.0.2.12", "10.244.2.0", "10.244.2.1", "10.244.2.255"}
	ofGreen := []string{"192.0.2.13", "10.244.3.0", "10.244.3.1", "10.244.3.127"}
	must := func(lists ...[]string) {
		t.Helper()
		want := map[uint32]uint32{}
		for _, ip := range slices.Concat(lists...) {
			want[toBE32(netip.MustParseAddr(ip))] = 1
		}
		if have, err := readAll[uint32, uint32](a.objects.NodeAddresses); err != nil || !maps.Equal(have, want) {
			t.Errorf("there are %v (%v), want %v", have, err, want)
		}
	}
	sync := func(peers, known []state.Peer) {
		t.Helper()
		d.Peers, d.Known = peers, known
		h.MustDo(t, func() error {
			_, err := a.Sync(d)
			return err
		})
	}
	pods := func(own ...string) {
		t.Helper()
		all := []netip.Addr{}
		for _, ip := range own {
			all = append(all, netip.MustParseAddr(ip))
		}
		h.MustDo(t, func() error {
			_, err := a.SyncPods(nil, all)
			return err
		})
	}
	sync([]state.Peer{blue}, nil)
	must(ofBlue)
	pods("192.0.2.11", "10.244.1.1")
	must(ofBlue, []string{"192.0.2.11", "10.244.1.1"})
	sync([]state.Peer{blue}, []state.Peer{green})
	must(ofBlue, ofGreen, []string{"192.0.2.11", "10.244.1.1"})
	pods("192.0.2.11", "10.244.1.0")
	must(ofBlue, ofGreen, []string{"192.0.2.11", "10.244.1.0"})
	sync([]state.Peer{green}, nil)
	must(ofGreen, []string{"192.0.2.11", "10.244.1.0"})

	// After a restart those of the node stay until they are told anew.
	a.Close()
	a = h.open(t, 16)
	sync([]state.Peer{blue}, nil)
	must(ofBlue, ofGreen, []string{"192.0.2.11", "10.244.1.0"})
	pods("192.0.2.11")
	must(ofBlue, []string{"192.0.2.11"})
	pods()
	must(ofBlue)
}

// However many prefixes are known, the addresses of their nodes fit.
func TestNodeAddressesFit(t *testing.T) {
	spec, err := loadWeft()
	if err != nil {
		t.Fatal(err)
	}
	each := len(state.NodeAddresses(mustPrefix("10.244.2.0/24"))) + 1
	if want := uint32(each) * spec.Maps[weftMapPeers].MaxEntries; spec.Maps[weftMapNodeAddresses].MaxEntries <= want {
		t.Errorf("the map node_addresses has room for %d addresses, want %d and our own", spec.Maps[weftMapNodeAddresses].MaxEntries, want)
	}
}

func TestPodsAddressPassesToAnother(t *testing.T) {
	eachWay(t, func(t *testing.T, h *podHost) {
		a := h.agent(t)
		h.syncPods(t, a, h.pods(t, 0, 1)...)
		heir := h.pod(t, 1)
		heir.IP = h.pod(t, 0).IP
		h.syncPods(t, a, heir)
		h.mustServe(t, a, heir)
	})
}

func TestPodsHaveSeveralAddresses(t *testing.T) {
	eachWay(t, func(t *testing.T, h *podHost) {
		a := h.agent(t)
		second := h.pod(t, 0)
		second.IP = netip.MustParseAddr("10.244.1.99")
		h.syncPods(t, a, h.pod(t, 0), second)
		h.mustServe(t, a, h.pod(t, 0), second)
		h.syncPods(t, a, second)
		h.mustServe(t, a, second)
	})
}

// A veth that goes between the look at it and SyncPods is no failure, and no
// matter to the others.
func TestVethVanishesInBetween(t *testing.T) {
	eachWay(t, func(t *testing.T, h *podHost) {
		a := h.agent(t)
		pods := h.pods(t, 0, 1, 2)
		h.Run(t, "ip link del cali1")
		h.syncPods(t, a, pods...)
		h.mustServe(t, a, pods[0], pods[2])
		h.Run(t, "ip link del cali0") // one that was served
		h.syncPods(t, a, pods...)
		var target uint32
		if err := a.objects.Devices.Lookup(uint32(pods[0].Veth), &target); !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Errorf("the device that is gone is still a redirect target: %d, %v", target, err)
		}
		h.syncPods(t, a, pods[2])
		h.mustServe(t, a, pods[2])
		if pins := h.podPins(t); len(pins) > 2 {
			t.Errorf("pins of veths that are gone are left: %v", pins)
		}
	})
}

// podPins are the names of pinned links on veths.
func (h *podHost) podPins(t *testing.T) (names []string) {
	t.Helper()
	pins, err := os.ReadDir(linksDir(h.pins))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pins {
		if _, ok := podSite(p.Name()); ok {
			names = append(names, p.Name())
		}
	}
	return names
}

func TestVethThatCantBeServed(t *testing.T) {
	h := &podHost{newHost(t), attachProgram}
	for i := range 2 {
		h.addVeth(t, i)
	}
	a := h.agent(t)
	pods := h.pods(t, 0, 1)
	injected := errors.New("injected")
	a.attach = func(s site, p *ebpf.Program, pin string) (attachment, error) {
		if s.device == pods[0].Veth {
			return attachment{}, injected
		}
		return attachProgram(s, p, pin)
	}
	failed, err := h.trySyncPods(a, pods)
	if err != nil || len(failed) != 1 || !errors.Is(failed[pods[0].IP], injected) || !strings.Contains(failed[pods[0].IP].Error(), "pod_out") {
		t.Errorf("failed %v (%v), want %v for the program on the first", failed, err, injected)
	}
	have, err := readAll[uint32, weftEndpoint](a.objects.Endpoints)
	if _, ok := have[toBE32(pods[1].IP)]; err != nil || !ok || len(have) != 1 {
		t.Errorf("endpoints are %v (%v), want the second pod's", have, err)
	}
}

// pod_out, which only looks, is there before pod_in, and addresses come after
// both.
func TestOrderOfServingAPod(t *testing.T) {
	h := &podHost{newHost(t), attachProgram}
	for i := range 2 {
		h.addVeth(t, i)
	}
	a := h.agent(t)
	var order []string
	pods := h.pods(t, 0, 1)
	a.attach = func(s site, p *ebpf.Program, pin string) (attachment, error) {
		order = append(order, s.program)
		var e weftEndpoint
		if s.device == pods[1].Veth && a.objects.Endpoints.Lookup(toBE32(pods[1].IP), &e) == nil {
			t.Errorf("the address is known before %s is there", s.program)
		}
		var target uint32
		if a.objects.Devices.Lookup(uint32(s.device), &target) != nil {
			t.Errorf("the device is no redirect target before %s is there", s.program)
		}
		return attachProgram(s, p, pin)
	}
	h.syncPods(t, a, pods[:1]...)
	h.syncPods(t, a, pods...)
	if want := []string{"pod_out", "pod_in", "pod_out", "pod_in"}; !slices.Equal(order, want) {
		t.Errorf("attached in the order %v, want %v", order, want)
	}
}

// What others take away of a pod's is put back, and what is there is left alone.
func TestWhatPodsNeedIsPutBack(t *testing.T) {
	h := &podHost{newHost(t), attachProgram}
	h.addVeth(t, 0)
	a := h.agent(t)
	pod := h.pods(t, 0)[0]
	attached := 0
	a.attach = func(s site, p *ebpf.Program, pin string) (attachment, error) {
		attached++
		return attachProgram(s, p, pin)
	}
	takeAway := func(sites ...site) (err error) {
		for _, s := range sites {
			if a.placed[s].kind == "tcx" {
				err = errors.Join(err, os.Remove(filepath.Join(linksDir(h.pins), s.pin())))
			} else {
				h.MustDo(t, func() error { return removeFilter(s) })
			}
		}
		return err
	}
	there := podSites(pod.Veth)
	for _, damage := range []struct {
		what string
		do   func() error
		want int // programs to attach
	}{
		{"nothing is there", func() error { return nil }, 2},
		{"all is there", func() error { return nil }, 0},
		{"a program is gone", func() error { return takeAway(there[0]) }, 1},
		{"both programs are gone", func() error { return takeAway(there...) }, 2},
		{"the address is gone", func() error { return a.objects.Endpoints.Delete(toBE32(pod.IP)) }, 0},
		{"the address is another's", func() error {
			return a.objects.Endpoints.Put(toBE32(pod.IP), weftEndpoint{Veth: uint32(pod.Veth), Mtu: 1})
		}, 0},
		{"the redirect target is gone", func() error { return a.objects.Devices.Delete(uint32(pod.Veth)) }, 0},
	} {
		if err := damage.do(); err != nil {
			t.Fatalf("%s: %v", damage.what, err)
		}
		attached = 0
		h.syncPods(t, a, pod)
		if a.placed[there[0]].kind != "tcx" {
			damage.want = 2 // where attaching is what finds out
		}
		if attached != damage.want {
			t.Errorf("%s: %d programs were attached, want %d", damage.what, attached, damage.want)
		}
		h.mustServe(t, a, pod)
	}
}

func TestRestartedAgentTakesOverPods(t *testing.T) {
	eachWay(t, func(t *testing.T, h *podHost) {
		old := h.agent(t)
		h.syncPods(t, old, h.pods(t, 0, 1)...)
		before := h.podLinks(t)
		old.Close()

		// Loaded, and not yet synced: the old programs go on, and are known as ours.
		fresh := h.open(t, 16)
		fresh.attach = h.attach
		h.sync(t, fresh)
		if kept := h.podLinks(t); !maps.Equal(kept, before) {
			t.Errorf("links %v became %v before the pods were synced", before, kept)
		}
		if len(before) > 0 {
			ours := fresh.PodPrograms()
			for program, id := range h.programsOn(t, "cali0") {
				if !ours[uint32(id)] {
					t.Errorf("%s (%d) of the former agent is not among our programs %v", program, id, ours)
				}
			}
		}
		h.syncPods(t, fresh, h.pods(t, 1, 2)...)
		h.mustServe(t, fresh, h.pods(t, 1, 2)...)
		for name, id := range h.podLinks(t) {
			if was, ok := before[name]; ok && was != id {
				t.Errorf("the link %s was replaced (%d, then %d): there was a moment without a program", name, was, id)
			}
		}
	})
}

// podLinks are the numbers of the pinned links on veths.
func (h *podHost) podLinks(t *testing.T) map[string]link.ID {
	t.Helper()
	ids := map[string]link.ID{}
	for _, name := range h.podPins(t) {
		l, err := link.LoadPinnedLink(filepath.Join(linksDir(h.pins), name), nil)
		if err != nil {
			t.Fatal(err)
		}
		info, err := l.Info()
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = info.ID
		l.Close()
	}
	return ids
}

// What a former agent served and this one leaves alone loses its programs, also
// when this one never served any.
func TestRestartedAgentLeavesPodsAlone(t *testing.T) {
	eachWay(t, func(t *testing.T, h *podHost) {
		old := h.agent(t)
		h.syncPods(t, old, h.pods(t, 0, 1)...)
		old.Close()
		fresh := h.agent(t)
		h.syncPods(t, fresh)
		h.mustServe(t, fresh)
	})
}

func TestDetachAndRemoveTakeProgramsOffPods(t *testing.T) {
	eachWay(t, func(t *testing.T, h *podHost) {
		a := h.agent(t)
		h.syncPods(t, a, h.pods(t, 0, 1)...)
		var removed []string
		h.MustDo(t, func() (err error) {
			removed, err = Detach(h.pins)
			return err
		})
		if len(removed) != 8 {
			t.Errorf("removed %q, want four programs of the node and four of pods", removed)
		}
		h.mustRun(t, "cali0", nil)
		h.mustRun(t, "cali1", nil)
		h.sync(t, a)
		h.syncPods(t, a, h.pods(t, 0, 1)...)
		h.mustServe(t, a, h.pods(t, 0, 1)...)
		a.Close()
		h.MustDo(t, func() (err error) {
			removed, err = Remove(h.pins)
			return err
		})
		if len(removed) != 9 {
			t.Errorf("removed %q, want eight programs and the pins", removed)
		}
		h.mustRun(t, "cali0", nil)
	})
}

// A kernel with tcx clears what was attached without.
func TestNewerKernelClearsFiltersOfPods(t *testing.T) {
	h := &podHost{newHost(t), attachAsOldKernels}
	if !haveTCX(t, h.host) {
		t.Skip("this kernel has no tcx; newer ones run this")
	}
	for i := range 2 {
		h.addVeth(t, i)
	}
	a := h.agent(t)
	h.syncPods(t, a, h.pods(t, 0, 1)...)
	a.Close()
	h.attach = attachProgram
	fresh := h.agent(t)
	h.syncPods(t, fresh, h.pods(t, 0)...)
	h.mustServe(t, fresh, h.pods(t, 0)...)
	if out := h.Run(t, "tc qdisc show"); strings.Contains(out, "clsact") {
		t.Errorf("the filters' qdisc is still there:\n%s", out)
	}
}

func TestNamesOfPins(t *testing.T) {
	for _, s := range append(podSites(17), sites(3, 4)...) {
		got, ok := podSite(s.pin())
		if ok != s.perPod() || ok && got != s {
			t.Errorf("%+v is pinned as %q, which is read as %+v (%v)", s, s.pin(), got, ok)
		}
	}
	for _, pin := range []string{"", "pod_in", "pod_in-", "pod_in-x", "pod_in-3-new", "uplink_in-3", "-3"} {
		if s, ok := podSite(pin); ok {
			t.Errorf("%q is read as %+v", pin, s)
		}
	}
}
