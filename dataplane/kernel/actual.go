package kernel

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// actual is what the kernel holds that has to do with one overlay.
type actual struct {
	// device is nil when there is none of the overlay's name.
	device *device
	// routes are those on the device, and those of the main table that lead to
	// a wanted prefix by another way; of the overlay's family.
	// With DirectRouting also those inside the overlay's network that may be
	// DirectRouting's.
	routes []route
	// routers are gateways of routes that lead out of the overlay's network;
	// they are read for DirectRouting only.
	routers map[netip.Addr]bool
	// neighbours are those on the device, of the overlay's family.
	neighbours []neighbour
	// fdb are the device's forwarding entries.
	fdb []fdbEntry
}

// device is a network device that has the name of an overlay device.
type device struct {
	name  string
	index int
	// kind is the type of link; all that is below is filled for "vxlan" only.
	kind string
	vxlan
	// odd names a setting that changes the wire format or the delivery and
	// can't be changed in place, such as "external"; empty when there is none.
	odd      string
	learning bool
	mac      state.MAC
	// mtu is in bytes.
	mtu int
	up  bool
	// addrs are the addresses of the overlay's family but link-local ones.
	addrs []netip.Prefix
	// acceptRA is sysctl net.ipv6.conf.<name>.accept_ra; negative when it can't
	// be read, as where the kernel has no IPv6, or was refused to be changed.
	acceptRA int
}

// route is a route of the main table.
type route struct {
	prefix  netip.Prefix
	gateway netip.Addr
	// device is the name of the device it leads to, "" when there is not
	// exactly one.
	device string
	// index is the device's.
	index  int
	onlink bool
	// more is set when the route says something that neither ours nor flannel's
	// do: a source address, an MTU, a realm.
	more   bool
	metric uint32
	// kind is "" for a plain unicast route with one next hop, else a word such
	// as "blackhole" or "multipath".
	kind string
	// proto is who made it, from /etc/iproute2/rt_protos. What is made without
	// saying who, by `ip route` and by flannel, is protoBoot.
	proto uint8
}

// protoBoot is RTPROT_BOOT of linux/rtnetlink.h.
const protoBoot = 3

// neighbour is an entry of the neighbour table (ARP, NDP).
type neighbour struct {
	ip  netip.Addr
	mac state.MAC
	// permanent is NUD_PERMANENT.
	permanent bool
	// foreign is set when the entry has flags that neither we nor flannel set,
	// such as extern_learn of a routing daemon.
	foreign bool
}

// fdbEntry is an entry of a VXLAN device's forwarding database.
type fdbEntry struct {
	mac state.MAC
	dst netip.Addr
	// permanent is NUD_PERMANENT.
	permanent bool
	// foreign is set when the entry has flags or attributes that neither we
	// nor flannel set: extern_learn, a port, a VNI, a device or a next hop.
	foreign bool
}
