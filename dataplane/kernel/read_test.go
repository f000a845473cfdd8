//go:build linux

package kernel

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// FuzzParse: the kernel's own messages, and such with any damage, are read
// without harm.
func FuzzParse(f *testing.F) {
	f.Add(routeRequest(Step{Prefix: netip.MustParsePrefix("10.244.4.0/24"), Addr: netip.MustParseAddr("10.244.4.0")}, 3, unix.RTM_NEWROUTE, 0, 0).Data())
	f.Add(peerRequest(Step{Op: SetFDB, Addr: netip.MustParseAddr("2001:db8::1")}, 3).Data())
	f.Add(peerRequest(Step{Op: SetNeighbour, Addr: netip.MustParseAddr("10.244.4.0")}, 3).Data())
	multipath := rtnl.NewRequest(unix.RTM_NEWROUTE, 0, make([]byte, unix.SizeofRtMsg)...).
		Attr(unix.RTA_MULTIPATH, rtnl.NewRequest(0, 0).Attr(unix.RTA_GATEWAY, []byte{192, 0, 2, 1}).Data())
	f.Add(multipath.Data())
	f.Fuzz(func(_ *testing.T, data []byte) {
		if n, ok := parseNeighbour(data); ok {
			_, _ = n.neighbour(), n.fdbEntry()
		}
		r, _ := parseRoute(data)
		_ = r.String()
		_, _ = parseLink(data)
		_ = rtnl.RouteMTU(data)
		_ = isOnLink(data, 3)
		for range gateways(data) {
			continue
		}
		_ = (&interest{}).isLocal(data)
	})
}
