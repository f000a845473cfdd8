//go:build linux

package endpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// readForeign names what others have attached to the pods' veths, but for the
// root qdisc, which is in the link.
func (f *Finder) readForeign(pods []candidate, links []device) (map[int][]string, error) {
	foreign := map[int][]string{}
	qdiscs, err := f.readQdiscs()
	if err != nil {
		return nil, err
	}
	named := map[uint32]string{}
	err = f.namespace.Do(func() error { // where bpf(2) looks for devices
		for _, c := range pods {
			index := c.veth.index
			for _, q := range qdiscs[index] {
				names, err := f.foreignFilters(index, q, links)
				if err != nil {
					return fmt.Errorf("reading the filters of %s: %w", c.veth.name, err)
				}
				foreign[index] = append(foreign[index], names...)
			}
			for _, ingress := range []bool{true, false} {
				foreign[index] = append(foreign[index], f.foreignPrograms(index, ingress, named)...)
			}
		}
		return nil
	})
	f.names = named // those of programs that are gone are forgotten
	return foreign, err
}

// readQdiscs reads the qdiscs that carry filters at the hooks, by device.
func (f *Finder) readQdiscs() (qdiscs map[int][]qdisc, err error) {
	err = f.socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			return rtnl.NewRequest(unix.RTM_GETQDISC, unix.NLM_F_DUMP, make([]byte, sizeofTcMsg)...)
		},
		unix.RTM_NEWQDISC,
		func() { qdiscs = map[int][]qdisc{} },
		func(data []byte) {
			if q, ok := parseQdisc(data); ok && (q.kind == "clsact" || q.kind == "ingress") {
				qdiscs[q.device] = append(qdiscs[q.device], q)
			}
		},
	)
	if err != nil {
		return nil, fmt.Errorf("reading queueing disciplines: %w", err)
	}
	return qdiscs, nil
}

// foreignFilters names the filters of a device that are not ours.
func (f *Finder) foreignFilters(index int, q qdisc, links []device) (names []string, err error) {
	if q.shared {
		return []string{"filters in a block that devices share"}, nil
	}
	for _, ingress := range []bool{true, false} {
		if q.kind == "ingress" && !ingress {
			continue
		}
		filters, err := f.readFilters(index, ingress)
		if err != nil {
			return nil, err
		}
		for _, have := range filters {
			if f.opts.Ours(Program{Name: have.name, ID: have.id, Filter: true, Ingress: ingress}) {
				continue
			}
			name := have.kind + " filter"
			if have.name != "" {
				name += " " + have.name
			}
			name = fmt.Sprintf("%s at %s%s", name, direction(ingress), f.shaper(index, ingress, have, links))
			if !slices.Contains(names, name) { // u32 shows its tables too
				names = append(names, name)
			}
		}
	}
	return names, nil
}

func direction(ingress bool) string {
	if ingress {
		return "ingress"
	}
	return "egress"
}

// parentOf is where the filters of a direction hang.
func parentOf(ingress bool) uint32 {
	if ingress {
		return netlink.HANDLE_MIN_INGRESS
	}
	return netlink.HANDLE_MIN_EGRESS
}

// readFilters reads the filters of a direction.
func (f *Finder) readFilters(index int, ingress bool) (filters []filter, err error) {
	err = f.socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			fixed := make([]byte, sizeofTcMsg) // struct tcmsg
			binary.NativeEndian.PutUint32(fixed[4:], uint32(index))
			binary.NativeEndian.PutUint32(fixed[12:], parentOf(ingress))
			return rtnl.NewRequest(unix.RTM_GETTFILTER, unix.NLM_F_DUMP, fixed...)
		},
		unix.RTM_NEWTFILTER,
		func() { filters = nil },
		func(data []byte) {
			if have, ok := parseFilter(data); ok {
				filters = append(filters, have)
			}
		},
	)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
		return nil, nil // device or qdisc went
	}
	return filters, err
}

// shaper adds to a filter's name that it shapes, as the CNI plugin bandwidth
// does it: packets from the pod take the way through an ifb device.
func (f *Finder) shaper(index int, ingress bool, have filter, links []device) string {
	if have.kind == "bpf" {
		return ""
	}
	filters, err := f.tc.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}, parentOf(ingress))
	if err != nil {
		return ""
	}
	for _, filter := range filters {
		for _, to := range redirects(filter) {
			for _, l := range links {
				if l.index == to && l.kind == "ifb" {
					return fmt.Sprintf(" that redirects to %s (the pod is shaped)", l.name)
				}
			}
		}
	}
	return ""
}

// redirects are the devices that a filter sends packets to.
func redirects(f netlink.Filter) (to []int) {
	var actions []netlink.Action
	switch f := f.(type) {
	case *netlink.U32:
		actions = f.Actions
	case *netlink.MatchAll:
		actions = f.Actions
	}
	for _, a := range actions {
		if m, ok := a.(*netlink.MirredAction); ok {
			to = append(to, m.Ifindex)
		}
	}
	return to
}

// foreignPrograms names the tcx programs of a device that are not ours. Where
// they can't be listed, that is named.
func (f *Finder) foreignPrograms(index int, ingress bool, named map[uint32]string) (names []string) {
	attach := ebpf.AttachTCXEgress
	if ingress {
		attach = ebpf.AttachTCXIngress
	}
	chain, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: attach})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
		return nil // before 6.6 there are none: the kernel does not know the hook
	}
	if err != nil {
		return []string{fmt.Sprintf("tcx programs at %s can't be listed (%v)", direction(ingress), err)}
	}
	for _, p := range chain.Programs {
		id := uint32(p.ID)
		name, ok := named[id]
		if !ok {
			if name, ok = f.names[id]; !ok {
				name = programName(p.ID)
			}
			named[id] = name
		}
		if f.opts.Ours(Program{Name: name, ID: id, Ingress: ingress}) {
			continue
		}
		if name == "" {
			name = fmt.Sprintf("id %d", id)
		}
		names = append(names, fmt.Sprintf("tcx program %s at %s", name, direction(ingress)))
	}
	return names
}

// programName asks for a program's name, which takes CAP_SYS_ADMIN.
func programName(id ebpf.ProgramID) string {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return ""
	}
	return info.Name
}
