//go:build linux

package kernel

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzParse: the kernel's own messages, and such with any damage, are read
// without harm.
func FuzzParse(f *testing.F) {
	f.Add(routeRequest(Step{Prefix: netip.MustParsePrefix("10.244.4.0/24"), Addr: netip.MustParseAddr("10.244.4.0")}, 3, unix.RTM_NEWROUTE, 0, 0).Data())
	f.Add(peerRequest(Step{Op: SetFDB, Addr: netip.MustParseAddr("2001:db8::1")}, 3).Data())
	f.Add(peerRequest(Step{Op: SetNeighbour, Addr: netip.MustParseAddr("10.244.4.0")}, 3).Data())
	f.Fuzz(func(_ *testing.T, data []byte) {
		if n, ok := parseNeighbour(data); ok {
			_, _ = n.neighbour(), n.fdbEntry()
		}
		r, _, _ := parseRoute(data)
		_ = r.String()
		_, _ = parseLink(data)
		_ = hasMTU(data)
	})
}
