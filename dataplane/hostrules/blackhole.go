//go:build linux

package hostrules

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// syncBlackholes adds the blackhole routes that are wanted, and deletes those
// that we have added for prefixes that the node no longer has.
func (r *Rules) syncBlackholes(w wanted) error {
	want := map[netip.Prefix]bool{}
	for _, f := range families {
		if p := w.of(f).own; w.blackhole && p.IsValid() {
			want[p] = true
		}
	}
	if len(want)+len(r.blackholes) == 0 {
		return nil
	}
	return withRoutes(func(h *netlink.Handle) error {
		var errs []error
		for p := range want {
			added, err := addBlackhole(h, p)
			if added {
				r.blackholes[p] = true
				r.log.Info("blackhole route added", "prefix", p)
			}
			errs = append(errs, err)
		}
		for p := range maps.Clone(r.blackholes) {
			if want[p] {
				continue
			}
			if _, err := deleteBlackhole(h, p); err != nil {
				errs = append(errs, err)
				continue
			}
			delete(r.blackholes, p)
		}
		return errors.Join(errs...)
	})
}

// withRoutes gives a rtnetlink socket of the calling thread's network namespace.
func withRoutes(f func(*netlink.Handle) error) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening a rtnetlink socket: %w", err)
	}
	defer h.Close()
	return f(h)
}

// blackholeTo is flannel's route for a node's own prefix: what no longer one
// leads to ends here. Without it, and without a bridge's route for the prefix,
// packets for pods that are gone go out by the default route and may come back.
func blackholeTo(p netip.Prefix) *netlink.Route {
	number := unix.AF_INET
	if p.Addr().Is6() {
		number = unix.AF_INET6
	}
	dst := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	return &netlink.Route{Dst: dst, Type: unix.RTN_BLACKHOLE, Family: number, Table: unix.RT_TABLE_MAIN}
}

// addBlackhole adds it, unless it is there. A bridge's IPv4 route for the same
// prefix keeps it out, and does what it is for.
func addBlackhole(h *netlink.Handle, p netip.Prefix) (added bool, err error) {
	route := blackholeTo(p)
	have, err := h.RouteListFiltered(route.Family, route, netlink.RT_FILTER_DST|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_TABLE)
	if err == nil && len(have) > 0 {
		return false, nil
	}
	if err == nil {
		err = h.RouteAdd(route)
	}
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("adding blackhole route %s: %w", p, err)
	}
	return true, nil
}

// deleteBlackhole deletes it, if it is there.
func deleteBlackhole(h *netlink.Handle, p netip.Prefix) (deleted bool, err error) {
	route := blackholeTo(p)
	have, err := h.RouteListFiltered(route.Family, route, netlink.RT_FILTER_DST|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_TABLE)
	if err == nil && len(have) == 0 {
		return false, nil
	}
	if err == nil {
		err = h.RouteDel(route)
	}
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("deleting blackhole route %s: %w", p, err)
	}
	return true, nil
}
