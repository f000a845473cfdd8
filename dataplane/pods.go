//go:build linux

package dataplane

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/endpoint"
	"github.com/weft-net/weft/dataplane/state"
)

// podsRetry is the pause after looking for pods failed.
const podsRetry = time.Second

// followPods serves the pods of this node, from the first Sync on, until ctx is
// done.
func (d *Dataplane) followPods(ctx context.Context, nudges <-chan struct{}) {
	for {
		err := d.syncPods()
		if err != nil {
			d.opts.Log.Warn("serving pods", "err", err)
			d.obstacles.set(findsPods, "the pods of this node can't be found: "+err.Error())
		} else {
			d.obstacles.set(findsPods)
		}
		var retry <-chan time.Time
		if err != nil {
			retry = time.After(podsRetry)
		}
		select {
		case <-ctx.Done():
			return
		case _, open := <-nudges:
			if !open {
				return
			}
		case <-d.prefixesChanged:
		case <-retry:
		}
	}
}

// syncPods finds the pods of this node and makes the programs and the firewall
// know them.
func (d *Dataplane) syncPods() error {
	d.mu.Lock()
	prefixes, accel := d.prefixes, d.accel
	if accel != nil {
		d.ours = accel.PodPrograms()
	}
	d.mu.Unlock()
	if len(prefixes) == 0 {
		return nil
	}
	found, err := d.finder.Find(prefixes)
	if err != nil {
		return err
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	d.found = found
	d.injection.syncPods(found)
	if d.accel == nil || d.loaded.NoIPv4 {
		return nil
	}
	own, err := ownAddresses()
	if err != nil {
		return err
	}
	pods := servedPods(found)
	failed, err := d.accel.SyncPods(pods, own)
	for ip, why := range failed {
		d.found.LeftAlone = append(d.found.LeftAlone, endpoint.LeftAlone{IP: ip, Reason: why.Error()})
	}
	d.tellPods()
	d.checkForeign()
	return err
}

// isOurs tells the finder which programs on pods' veths are weft's.
func (d *Dataplane) isOurs(p endpoint.Program) bool {
	if p.Filter {
		return endpoint.OursByName(p)
	}
	return d.ours[p.ID]
}

// servedPods are the endpoints as the programs want them.
func servedPods(found endpoint.Found) []ebpf.Pod {
	var pods []ebpf.Pod
	for _, e := range found.Endpoints {
		if e.IP.Is4() {
			pods = append(pods, ebpf.Pod{IP: e.IP, Veth: e.Veth, MAC: e.MAC, Gateway: e.Gateway, MTU: e.MTU})
		}
	}
	return pods
}

// tellPods logs when what is left alone changes.
func (d *Dataplane) tellPods() {
	var alone []string
	for _, l := range d.found.LeftAlone {
		where := l.Name
		if l.IP.IsValid() {
			where = strings.TrimSpace(where + " " + l.IP.String())
		}
		alone = append(alone, fmt.Sprintf("%s: %s", where, l.Reason))
	}
	slices.Sort(alone)
	now := strings.Join(slices.Compact(alone), "; ")
	if now != d.toldAlone && now != "" {
		d.opts.Log.Info("some pods are left to the base and kernel path", "why", now)
	}
	d.toldAlone = now
}

// checkForeign looks for what express packets would bypass: all that sits on
// the overlay device, before or behind our programs, and on the pods' bridges.
func (d *Dataplane) checkForeign() {
	view := d.accel.View()
	var found []string
	devices := map[string]int{}
	if r, err := view.Runtime(); err == nil && r.Overlay != 0 {
		devices[deviceName(r.Overlay)] = r.Overlay
	}
	for _, e := range d.found.Endpoints {
		if _, looked := devices[e.Bridge]; e.Bridge != "" && !looked {
			devices[e.Bridge] = deviceIndex(e.Bridge)
		}
	}
	for name, index := range devices {
		if index == 0 {
			continue
		}
		others, err := view.Others(index)
		if err != nil {
			found = append(found, fmt.Sprintf("what sits on %s can't be listed (%v)", name, err))
		}
		for _, other := range others {
			found = append(found, fmt.Sprintf("express packets would bypass %s on %s", other, name))
		}
	}
	slices.Sort(found)
	d.obstacles.set(findsForeign, found...)
}

// deviceIndex is 0 when there is no such device.
func deviceIndex(name string) int {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0
	}
	return link.Attrs().Index
}

// ownAddresses are all addresses that this node answers on, broadcasts included.
func ownAddresses() ([]netip.Addr, error) {
	list, err := netlink.AddrList(nil, unix.AF_INET)
	if err != nil {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	own := []netip.Addr{netip.AddrFrom4([4]byte{255, 255, 255, 255})}
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP.To4())
		if !ok || ip.IsLoopback() {
			continue
		}
		ones, _ := a.Mask.Size()
		own = append(own, ip, state.Last(netip.PrefixFrom(ip, ones)))
	}
	slices.SortFunc(own, netip.Addr.Compare)
	return slices.Compact(own), nil
}
