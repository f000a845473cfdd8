//go:build linux

package ebpf

import (
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// routeMTU is the least MTU that a route on a device says of itself, in whatever
// table, 0 when none does or they can't be read. The VXLAN driver obeys it;
// bpf_fib_lookup() knows only locked ones (ip_mtu_from_fib_result in
// net/ipv4/route.c).
func routeMTU(device int) (least int) {
	socket, err := rtnl.Open()
	if err != nil {
		return 0
	}
	defer socket.Close()
	_ = socket.Dump( // what was read last counts, be it not whole
		rtnl.DumpTries,
		func() *rtnl.Request {
			fixed := make([]byte, unix.SizeofRtMsg)
			fixed[0] = unix.AF_INET
			return rtnl.NewRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP, fixed...).Uint32(unix.RTA_OIF, uint32(device))
		},
		unix.RTM_NEWROUTE,
		func() { least = 0 },
		func(data []byte) {
			if mtu := rtnl.RouteMTU(data); mtu > 0 && (least == 0 || mtu < least) {
				least = mtu
			}
		},
	)
	return least
}
