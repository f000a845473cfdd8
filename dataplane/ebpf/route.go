//go:build linux

package ebpf

import (
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeMTU is the least MTU that a route on a device says of itself, 0 when
// none does. The VXLAN driver obeys it; bpf_fib_lookup() knows only locked ones
// (ip_mtu_from_fib_result in net/ipv4/route.c).
func routeMTU(device int) int {
	routes, err := netlink.RouteListFiltered(unix.AF_INET,
		&netlink.Route{LinkIndex: device, Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil && len(routes) == 0 {
		return 0
	}
	least := 0
	for _, r := range routes {
		if r.MTU > 0 && (least == 0 || r.MTU < least) {
			least = r.MTU
		}
	}
	return least
}
