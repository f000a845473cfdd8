//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Our filters have a fixed handle and priority, so that they are replaced in
// place. The kernel gives filters without a priority numbers from 49152 down;
// ours comes behind all of those.
const (
	filterPriority = 50000
	filterHandle   = 1
	filterPrefix   = "weft/"
)

func (s site) filter(fd int) *netlink.BpfFilter {
	parent := uint32(netlink.HANDLE_MIN_EGRESS)
	if s.ingress {
		parent = netlink.HANDLE_MIN_INGRESS
	}
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: s.device,
			Parent:    parent,
			Handle:    filterHandle,
			Priority:  filterPriority,
			Protocol:  unix.ETH_P_ALL,
		},
		Fd:           fd,
		Name:         filterPrefix + s.program,
		DirectAction: true,
	}
}

func clsact(device int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}}
}

// replaceFilter attaches prog as a clsact filter, in one step with the removal
// of the one before it. A filter that runs prog already is left alone. One of a
// program that sits on one device, left on another, is removed.
func replaceFilter(s site, prog *ebpf.Program) error {
	id, err := programID(prog)
	if err != nil {
		return err
	}
	if have, err := ourFilter(s); err == nil && have != nil && have.Id == int(id) {
		return nil
	}
	if err := netlink.QdiscAdd(clsact(s.device)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding qdisc clsact: %w", err)
	}
	if err := netlink.FilterReplace(s.filter(prog.FD())); err != nil {
		return fmt.Errorf("adding filter: %w", err)
	}
	if s.perPod() {
		return nil
	}
	_, err = removeOurFilters(func(other site) bool { return other.program == s.program && other.device != s.device })
	return err
}

// ourFilter finds the filter that we put at s, nil if there is none.
func ourFilter(s site) (*netlink.BpfFilter, error) {
	filters, err := filtersAt(s)
	if err != nil {
		return nil, err
	}
	for _, f := range filters {
		if bpf, ok := f.(*netlink.BpfFilter); ok && isOurs(bpf) {
			return bpf, nil
		}
	}
	return nil, nil
}

func isOurs(f *netlink.BpfFilter) bool { return strings.HasPrefix(f.Name, filterPrefix) }

// filtersAt lists the filters of a direction. A device without a clsact qdisc
// has none.
func filtersAt(s site) ([]netlink.Filter, error) {
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: s.device}}
	filters, err := netlink.FilterList(link, s.filter(0).Parent)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing filters: %w", err)
	}
	return filters, nil
}

// removeFilter takes our filter away, if there is one, and the qdisc with the
// last filter.
func removeFilter(s site) error {
	have, err := ourFilter(s)
	if err != nil || have == nil {
		return err
	}
	if err := netlink.FilterDel(have); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing filter %s: %w", have.Name, err)
	}
	return removeEmptyClsact(s.device)
}

func removeEmptyClsact(device int) error {
	for _, ingress := range []bool{true, false} {
		left, err := filtersAt(site{device: device, ingress: ingress})
		if err != nil || len(left) > 0 {
			return err
		}
	}
	err := netlink.QdiscDel(clsact(device))
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("removing qdisc clsact: %w", err)
	}
	return nil
}

// removeOurFilters takes those of our filters off their devices for which
// unwanted says so.
func removeOurFilters(unwanted func(site) bool) (removed []string, err error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	for _, l := range links {
		for _, ingress := range []bool{false, true} {
			s := site{device: l.Attrs().Index, ingress: ingress}
			have, err := ourFilter(s)
			if err != nil {
				return removed, err
			}
			if have == nil {
				continue
			}
			s.program = strings.TrimPrefix(have.Name, filterPrefix)
			if !unwanted(s) {
				continue
			}
			if err := removeFilter(s); err != nil {
				return removed, err
			}
			removed = append(removed, "filter "+have.Name+" on "+l.Attrs().Name)
		}
	}
	return removed, nil
}
