//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
)

// Pod is an address of a pod on this node, and where the pod is.
type Pod struct {
	IP netip.Addr
	// Veth is the interface index of the host's end of the pod's veth.
	Veth int
	// MAC is the pod's end's address, and Gateway that of what it sends to.
	MAC, Gateway state.MAC
	// MTU is the smallest on the way into the pod.
	MTU int
}

// SyncPods makes the programs know these pods and no others, and sit on their
// veths; own are the IPv4 addresses of this node. Pods that could not be served
// are returned with the reason; they ride the other paths. With an error the
// programs may know pods that are gone.
//
// What is old goes out before what is new comes in: an address may have passed
// to another pod.
func (a *Accelerator) SyncPods(pods []Pod, own []netip.Addr) (failed map[netip.Addr]error, err error) {
	unlock, err := lock(a.opts.PinDir)
	if err != nil {
		return nil, err
	}
	defer unlock()

	a.own = own
	if err := a.syncNodeAddresses(); err != nil {
		return nil, err
	}
	known, targets, err := a.forgetPods(pods)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(linksDir(a.opts.PinDir), 0o700); err != nil {
		return nil, fmt.Errorf("making directory for links: %w", err)
	}
	failed = map[netip.Addr]error{}
	ready := map[int]error{}
	for _, p := range pods {
		err, looked := ready[p.Veth]
		if !looked {
			err = a.readyVeth(p.Veth, targets)
			ready[p.Veth] = err
		}
		if ip, pod := toBE32(p.IP), toEndpoint(p); err == nil && known[ip] != pod {
			err = a.objects.Endpoints.Put(ip, pod)
		}
		if err != nil && !errors.Is(err, unix.ENODEV) { // one that has just gone is no matter
			failed[p.IP] = err
		}
	}
	return failed, nil
}

// forgetPods takes out what is not as wanted: addresses first, then devices and
// programs. It returns what is left of the former two.
func (a *Accelerator) forgetPods(pods []Pod) (known map[uint32]weftEndpoint, targets map[uint32]uint32, err error) {
	want := map[uint32]weftEndpoint{}
	veths := map[int]bool{}
	for _, p := range pods {
		want[toBE32(p.IP)] = toEndpoint(p)
		veths[p.Veth] = true
	}
	known, err = removeUnless(a.objects.Endpoints, func(ip uint32, pod weftEndpoint) bool {
		now, wanted := want[ip]
		return wanted && now == pod
	})
	if err != nil {
		return nil, nil, fmt.Errorf("removing pods that are gone: %w", err)
	}
	targets, err = removeUnless(a.objects.Devices, func(key, _ uint32) bool {
		return key <= uint32(weftDeviceDEVICE_UPLINK) || veths[int(key)]
	})
	if err != nil {
		return nil, nil, fmt.Errorf("removing devices of pods that are gone: %w", err)
	}
	unwanted := func(s site) bool { return !veths[s.device] }
	maps.DeleteFunc(a.placed, func(s site, _ attachment) bool { return s.perPod() && unwanted(s) })
	if _, err := detachPods(a.opts.PinDir, unwanted); err != nil {
		return nil, nil, err
	}
	return known, targets, a.removePodFilters(veths)
}

// removePodFilters takes our filters off veths that are left alone now. All
// devices are looked at when the set of veths has changed.
func (a *Accelerator) removePodFilters(veths map[int]bool) error {
	changed := len(veths) != len(a.veths)
	for veth := range veths {
		changed = changed || !a.veths[veth]
	}
	if !changed && a.veths != nil {
		return nil
	}
	_, err := removeOurFilters(func(s site) bool { return s.perPod() && !veths[s.device] })
	if err == nil {
		a.veths = veths
	}
	return err
}

// readyVeth makes a veth a redirect target, unless it is among those that there are,
// and puts the programs on it.
func (a *Accelerator) readyVeth(veth int, targets map[uint32]uint32) error {
	if key := uint32(veth); targets[key] != key {
		err := a.syncDevice(key, veth)
		if errors.Is(err, unix.EINVAL) { // a device map's word for a device that is gone
			return unix.ENODEV
		}
		if err != nil {
			return err
		}
	}
	for _, s := range podSites(veth) {
		if err := a.attachAt(s); err != nil {
			return explain(err)
		}
	}
	return nil
}

// detachPods takes the programs off the veths where unwanted says so.
func detachPods(dir string, unwanted func(site) bool) (removed []string, err error) {
	pins, err := os.ReadDir(linksDir(dir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("reading pinned links: %w", err)
	}
	for _, pin := range pins {
		s, ok := podSite(pin.Name())
		if !ok || !unwanted(s) {
			continue
		}
		gone, err := unpin(dir, s)
		if err != nil {
			return removed, err
		}
		if gone {
			removed = append(removed, fmt.Sprintf("program %s on interface %d", s.program, s.device))
		}
	}
	return removed, nil
}

// podSite is what the name of a pin says.
func podSite(pin string) (site, bool) {
	program, number, ok := strings.Cut(pin, "-")
	s := site{program: program, ingress: program == "pod_in"}
	if !ok || !s.perPod() {
		return s, false
	}
	var err error
	s.device, err = strconv.Atoi(number)
	return s, err == nil
}

// PodPrograms are the numbers of our programs on pods' veths: those that are
// loaded, and those of an agent before us that are still in their places.
func (a *Accelerator) PodPrograms() map[uint32]bool {
	ours := map[uint32]bool{}
	for _, name := range []string{"pod_in", "pod_out"} {
		if id, err := programID(a.program(name)); err == nil {
			ours[uint32(id)] = true
		}
	}
	pins, err := os.ReadDir(linksDir(a.opts.PinDir))
	if err != nil {
		return ours
	}
	for _, pin := range pins {
		s, ok := podSite(pin.Name())
		if _, placed := a.placed[s]; !ok || placed {
			continue
		}
		l, err := link.LoadPinnedLink(filepath.Join(linksDir(a.opts.PinDir), pin.Name()), nil)
		if err != nil {
			continue
		}
		if info, err := l.Info(); err == nil {
			ours[uint32(info.Program)] = true
		}
		l.Close()
	}
	return ours
}

func toEndpoint(p Pod) weftEndpoint {
	return weftEndpoint{Veth: uint32(p.Veth), Mtu: uint32(p.MTU), Mac: p.MAC, Gateway: p.Gateway}
}

// syncDevice writes one redirect target. The kernel takes an entry out when its
// device goes, so a device that came back is written again.
func (a *Accelerator) syncDevice(key uint32, index int) error {
	var have uint32
	err := a.objects.Devices.Lookup(key, &have)
	if err == nil && int(have) == index {
		return nil
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("reading map devices: %w", err)
	}
	if err := a.objects.Devices.Put(key, uint32(index)); err != nil {
		return fmt.Errorf("writing interface %d to map devices: %w", index, err)
	}
	return nil
}
