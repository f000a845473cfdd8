//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// behind names what runs after our program at its place and would not see the
// packets that it takes: foreign tcx programs and clsact filters further down,
// and on the way out a queueing discipline.
func behind(at attachment) ([]string, error) {
	names, err := programsBehind(at)
	if err != nil {
		return nil, err
	}
	filters, err := filtersBehind(at)
	if err != nil {
		return nil, err
	}
	names = append(names, filters...)
	if !at.ingress {
		qdiscs, err := qdiscsAt(at.device)
		if err != nil {
			return nil, err
		}
		names = append(names, qdiscs...)
	}
	return names, nil
}

// Others names all that others have at the tc hooks of a device, before or behind
// our programs, and its queueing disciplines.
func (v *View) Others(device int) ([]string, error) {
	ours := map[ebpf.ProgramID]bool{}
	for _, s := range sites(v.device(weftDeviceDEVICE_UPLINK), v.device(weftDeviceDEVICE_OVERLAY)) {
		if s.device != device {
			continue
		}
		at, err := v.find(s)
		if err != nil {
			return nil, err
		}
		ours[at.id] = true
	}
	names, err := qdiscsAt(device)
	if err != nil {
		return nil, err
	}
	for _, ingress := range []bool{true, false} {
		s := site{device: device, ingress: ingress}
		programs, err := programsAt(s, ours)
		if err != nil {
			return nil, err
		}
		filters, err := filtersBehind(attachment{site: s})
		if err != nil {
			return nil, err
		}
		names = slices.Concat(names, programs, filters)
	}
	return names, nil
}

// programsAt names the tcx programs that are not ours. Before 6.6 there are
// none: the kernel does not know the hook.
func programsAt(s site, ours map[ebpf.ProgramID]bool) ([]string, error) {
	chain, err := link.QueryPrograms(link.QueryOptions{Target: s.device, Attach: s.attachType()})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing tcx programs: %w", err)
	}
	var names []string
	for _, p := range chain.Programs {
		if !ours[p.ID] {
			names = append(names, "tcx program "+programName(p.ID))
		}
	}
	return names, nil
}

// programsBehind lists the tcx programs behind ours. clsact filters run behind
// all of them.
func programsBehind(at attachment) ([]string, error) {
	if at.kind != "tcx" {
		return nil, nil
	}
	chain, err := link.QueryPrograms(link.QueryOptions{Target: at.device, Attach: at.attachType()})
	if err != nil {
		return nil, fmt.Errorf("listing tcx programs: %w", err)
	}
	var names []string
	passed := false
	for _, p := range chain.Programs {
		if passed {
			names = append(names, "tcx program "+programName(p.ID))
		}
		passed = passed || p.ID == at.id
	}
	return names, nil
}

// programsInFront lists the tcx programs before ours.
func programsInFront(at attachment) ([]string, error) {
	chain, err := link.QueryPrograms(link.QueryOptions{Target: at.device, Attach: at.attachType()})
	if err != nil {
		return nil, fmt.Errorf("listing tcx programs: %w", err)
	}
	var names []string
	for _, p := range chain.Programs {
		if p.ID == at.id {
			break
		}
		names = append(names, "tcx program "+programName(p.ID))
	}
	return names, nil
}

func programName(id ebpf.ProgramID) string {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Sprintf("id %d", id)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil || info.Name == "" {
		return fmt.Sprintf("id %d", id)
	}
	return fmt.Sprintf("%s (id %d)", info.Name, id)
}

// filtersBehind lists the clsact filters behind ours.
func filtersBehind(at attachment) ([]string, error) {
	filters, err := filtersAt(at.site)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range filters {
		attrs := f.Attrs()
		bpf, isBPF := f.(*netlink.BpfFilter)
		if isBPF && isOurs(bpf) {
			continue
		}
		if at.kind == "clsact" && attrs.Priority < filterPriority {
			continue
		}
		names = append(names, fmt.Sprintf("%s filter with priority %d", f.Type(), attrs.Priority))
	}
	return names, nil
}

// qdiscsAt lists the queueing disciplines of a device that is not meant to
// have one: packets that we redirect don't queue there.
func qdiscsAt(device int) ([]string, error) {
	qdiscs, err := netlink.QdiscList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: device}})
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		err = nil // what was read will do until the next look
	}
	if err != nil {
		return nil, fmt.Errorf("listing queueing disciplines: %w", err)
	}
	var names []string
	for _, q := range qdiscs {
		switch q.Type() {
		case "noqueue", "clsact", "ingress":
		default:
			names = append(names, "qdisc "+q.Type())
		}
	}
	return names, nil
}
