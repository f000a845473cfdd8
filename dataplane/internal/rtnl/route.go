//go:build linux

package rtnl

import "golang.org/x/sys/unix"

// RouteMTU is the MTU that a route (struct rtmsg and attributes) says of itself, 0
// when it says none.
func RouteMTU(data []byte) int {
	if len(data) < unix.SizeofRtMsg {
		return 0
	}
	for kind, metrics := range Attributes(data[unix.SizeofRtMsg:]) {
		if kind != unix.RTA_METRICS {
			continue
		}
		for metric, value := range Attributes(metrics) {
			if metric == unix.RTAX_MTU {
				return int(Uint32(value))
			}
		}
	}
	return 0
}
