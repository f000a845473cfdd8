//go:build linux

package uplink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// host is what the kernel has of interfaces and addresses, read at one moment.
type host struct {
	// links are in the kernel's order.
	links []link
}

// link is a network interface.
type link struct {
	name  string
	index int
	// mtu is in bytes.
	mtu      int
	loopback bool
	// all are the interface's own addresses of both families, usable those that
	// packets can be sent from, the preferred first.
	all    []netip.Addr
	usable []netip.Addr
}

// first is the preferred address of a family, the zero Addr when there is none.
func (l link) first(v6 bool) netip.Addr {
	for _, a := range l.usable {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// String is the interface with its addresses, for people.
func (l link) String() string {
	if len(l.usable) == 0 {
		return l.name
	}
	var texts []string
	for _, a := range l.usable {
		texts = append(texts, a.String())
	}
	return fmt.Sprintf("%s (%s)", l.name, strings.Join(texts, ", "))
}

// String lists the interfaces.
func (h host) String() string {
	var texts []string
	for _, l := range h.links {
		texts = append(texts, l.String())
	}
	return strings.Join(texts, ", ")
}

// holder finds the interface that has an address.
func (h host) holder(a netip.Addr) (link, bool) {
	for _, l := range h.links {
		if slices.Contains(l.all, a) {
			return l, true
		}
	}
	return link{}, false
}

// named finds the interface of a name.
func (h host) named(name string) (link, bool) {
	for _, l := range h.links {
		if l.name == name {
			return l, true
		}
	}
	return link{}, false
}

func (h host) indexed(index int) (link, bool) {
	for _, l := range h.links {
		if l.index == index {
			return l, true
		}
	}
	return link{}, false
}

// read reads interfaces and addresses.
func (f *Finder) read() (host, error) {
	var links []netlink.Link
	var addrs []netlink.Addr
	err := whole(func() (err error) { links, err = f.links.LinkList(); return err })
	if err != nil {
		return host{}, fmt.Errorf("reading interfaces: %w", err)
	}
	err = whole(func() (err error) { addrs, err = f.links.AddrList(nil, netlink.FAMILY_ALL); return err })
	if err != nil {
		return host{}, fmt.Errorf("reading addresses: %w", err)
	}
	slices.SortStableFunc(addrs, comparePreference)
	var h host
	for _, l := range links {
		a := l.Attrs()
		own := link{name: a.Name, index: a.Index, mtu: a.MTU, loopback: a.Flags&net.FlagLoopback != 0}
		for _, addr := range addrs {
			ip, ok := netip.AddrFromSlice(addr.IP) // of a point-to-point link this end's
			if addr.LinkIndex != a.Index || !ok {
				continue
			}
			ip = ip.Unmap()
			own.all = append(own.all, ip)
			if (ip.IsGlobalUnicast() || ip.IsLinkLocalUnicast()) && addr.Flags&unix.IFA_F_DEPRECATED == 0 {
				own.usable = append(own.usable, ip)
			}
		}
		h.links = append(h.links, own)
	}
	return h, nil
}

// comparePreference orders addresses as flannel prefers them.
func comparePreference(a, b netlink.Addr) int {
	rank := func(a netlink.Addr) (rank int) {
		if a.IP.IsLinkLocalUnicast() {
			rank += 4
		}
		if a.Flags&unix.IFA_F_PERMANENT == 0 {
			rank += 2
		}
		if a.Flags&unix.IFA_F_TEMPORARY != 0 { // the same bit as IFA_F_SECONDARY
			rank++
		}
		return rank
	}
	return rank(a) - rank(b)
}

// whole reads a table until it did not change meanwhile.
func whole(read func() error) error {
	return rtnl.UntilWhole(rtnl.DumpTries, func() (interrupted bool, err error) {
		if err = read(); errors.Is(err, netlink.ErrDumpInterrupted) {
			return true, nil
		}
		return false, err
	})
}

// defaultRoute is the index of the interface that the default route of a family
// leads to: the first of the main table.
func (f *Finder) defaultRoute(v6 bool) (int, error) {
	family, word := unix.AF_INET, "IPv4"
	if v6 {
		family, word = unix.AF_INET6, "IPv6"
	}
	var routes []netlink.Route
	err := whole(func() (err error) {
		routes, err = f.links.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("reading routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && !isDefault(*r.Dst) {
			continue
		}
		if r.LinkIndex <= 0 {
			return 0, fmt.Errorf("the %s default route has several next hops; name the interface with --iface", word)
		}
		return r.LinkIndex, nil
	}
	return 0, fmt.Errorf("there is no %s default route; name the interface with --iface", word)
}

func isDefault(dst net.IPNet) bool {
	ones, _ := dst.Mask.Size()
	return ones == 0 && dst.IP.IsUnspecified()
}

// routeTo is where the kernel sends packets to an address, and from which of our
// addresses.
func (f *Finder) routeTo(a netip.Addr) (index int, source netip.Addr, err error) {
	routes, err := f.links.RouteGet(a.AsSlice())
	if err != nil {
		return 0, source, fmt.Errorf("no route leads there: %w", err)
	}
	if len(routes) == 0 {
		return 0, source, errors.New("no route leads there")
	}
	source, _ = netip.AddrFromSlice(routes[0].Src)
	return routes[0].LinkIndex, source.Unmap(), nil
}
