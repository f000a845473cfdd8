//go:build linux

package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
	"github.com/weft-net/weft/dataplane/state"
)

// readUplink reads the uplink. Its addresses are left out: they come from the
// one dump of all addresses.
func (p *Path) readUplink(name string) (Uplink, error) {
	if name == "" {
		return Uplink{}, errors.New("no uplink is given")
	}
	link, err := p.links.LinkByName(name)
	if err != nil {
		return Uplink{}, fmt.Errorf("uplink %s: %w", name, err)
	}
	a := link.Attrs()
	up := Uplink{
		Name:      a.Name,
		Index:     a.Index,
		MTU:       a.MTU,
		Kind:      link.Type(),
		EncapType: a.EncapType,
		Up:        a.Flags&net.FlagUp != 0,
	}
	if len(a.HardwareAddr) == len(up.MAC) {
		up.MAC = state.MAC(a.HardwareAddr)
	}
	if a.MasterIndex != 0 {
		// The master may have gone in between; the name is for people.
		if master, err := p.links.LinkByIndex(a.MasterIndex); err == nil {
			up.Master = master.Attrs().Name
		}
	}
	return up, nil
}

// readDevice reads the device of that name, nil when there is none.
func (p *Path) readDevice(name string) (*device, error) {
	link, err := p.links.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("overlay device %s: %w", name, err)
	}
	return newDevice(link), nil
}

// newDevice is what vishvananda/netlink knows of a link in our words.
func newDevice(link netlink.Link) *device {
	a := link.Attrs()
	d := &device{
		name:     a.Name,
		index:    a.Index,
		kind:     link.Type(),
		mtu:      a.MTU,
		up:       a.Flags&net.FlagUp != 0,
		acceptRA: -1,
	}
	if len(a.HardwareAddr) == len(d.mac) {
		d.mac = state.MAC(a.HardwareAddr)
	}
	v, ok := link.(*netlink.Vxlan)
	if !ok {
		return d
	}
	d.vxlan = vxlan{
		vni:         uint32(v.VxlanId),
		port:        uint16(v.Port),
		local:       addrOf(v.SrcAddr),
		uplinkIndex: v.VtepDevIndex,
		gbp:         v.GBP,
	}
	d.learning = v.Learning
	switch {
	case v.FlowBased:
		d.odd = "external"
	case len(v.Group) != 0:
		d.odd = "remote " + v.Group.String()
	case v.UDP6ZeroCSumTx && d.local.Is6():
		// Peers refuse such packets (RFC 8200 section 8.1).
		d.odd = "udp6zerocsumtx"
	}
	return d
}

// readAddresses returns the addresses of all devices, by device index.
func (p *Path) readAddresses() (map[int][]netip.Prefix, error) {
	var addrs []netlink.Addr
	err := rtnl.UntilWhole(rtnl.DumpTries, func() (interrupted bool, err error) {
		addrs, err = p.links.AddrList(nil, netlink.FAMILY_ALL)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			return true, nil
		}
		return false, err
	})
	if err != nil {
		return nil, fmt.Errorf("reading addresses: %w", err)
	}
	byIndex := map[int][]netip.Prefix{}
	for _, a := range addrs {
		if a.IPNet == nil {
			continue
		}
		bits, _ := a.Mask.Size()
		if prefix := netip.PrefixFrom(addrOf(a.IP), bits); prefix.IsValid() {
			byIndex[a.LinkIndex] = append(byIndex[a.LinkIndex], prefix)
		}
	}
	return byIndex, nil
}

// readActual reads what the kernel holds of one overlay. addrs are the
// addresses of all devices.
func (p *Path) readActual(o overlay, wanted map[netip.Prefix]bool, addrs map[int][]netip.Prefix) (actual, error) {
	var have actual
	d, err := p.readDevice(o.name)
	if err != nil {
		return have, err
	}
	if d != nil {
		d.uplink = o.uplink
		if d.uplinkIndex != o.uplinkIndex {
			d.uplink = ""
		}
		for _, a := range addrs[d.index] {
			if o.owns(a.Addr()) && !a.Addr().IsLinkLocalUnicast() {
				d.addrs = append(d.addrs, a)
			}
		}
		if d.kind == "vxlan" {
			d.acceptRA = p.readAcceptRA(o.name)
		}
		have.device = d
	}
	if have.routes, have.routers, err = p.readRoutes(o, d, wanted); err != nil {
		return have, err
	}
	if d == nil || d.kind != "vxlan" {
		return have, nil
	}
	if have.neighbours, err = p.readNeighbours(o.v6, d); err != nil {
		return have, err
	}
	have.fdb, err = p.readFDB(d)
	return have, err
}

// family is the kernel's number of an address family.
func family(v6 bool) byte {
	if v6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// readRoutes reads of the main table the routes on the device (which may be
// nil), those that lead to a wanted prefix, and those that DirectRouting may have
// made or that may mislead the kernel; and the gateways of routes out of the
// overlay's network.
func (p *Path) readRoutes(o overlay, d *device, wanted map[netip.Prefix]bool) (routes []route, routers map[netip.Addr]bool, err error) {
	routers = map[netip.Addr]bool{}
	each := func(data []byte) {
		r, ok := parseRoute(data)
		if !ok {
			return
		}
		onDevice := d != nil && r.index == d.index
		inside := o.network.IsValid() && holds(o.network, r.prefix)
		if o.direct.on && !onDevice && !inside {
			for gateway := range gateways(data) {
				routers[gateway] = true
			}
		}
		switch {
		case onDevice:
			r.device = d.name
		case wanted[r.prefix]:
		case o.mayMislead(r):
		case inside && r.kind == "" && r.gateway.IsValid() && (o.direct.on || len(o.direct.made) > 0):
			// DirectRouting's, perhaps.
		default:
			return
		}
		routes = append(routes, r)
	}
	err = p.socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			// struct rtmsg; the table filters where the kernel can (4.20).
			fixed := make([]byte, unix.SizeofRtMsg)
			fixed[0], fixed[4] = family(o.v6), unix.RT_TABLE_MAIN
			return rtnl.NewRequest(unix.RTM_GETROUTE, unix.NLM_F_DUMP, fixed...)
		},
		unix.RTM_NEWROUTE,
		func() { routes, routers = nil, map[netip.Addr]bool{} },
		each,
	)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil, nil // the main table of this family has never been used
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading routes: %w", err)
	}
	names := map[int]string{0: "", o.uplinkIndex: o.uplink}
	for i := range routes {
		if routes[i].device != "" {
			continue
		}
		name, ok := names[routes[i].index]
		if !ok {
			name = fmt.Sprintf("if%d", routes[i].index) // gone in between
			if link, err := p.links.LinkByIndex(routes[i].index); err == nil {
				name = link.Attrs().Name
			}
			names[routes[i].index] = name
		}
		routes[i].device = name
	}
	return routes, routers, nil
}

// gateways are those of a route (struct rtmsg and attributes), of which one with
// several next hops has several.
func gateways(data []byte) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		if len(data) < unix.SizeofRtMsg {
			return
		}
		for attr, value := range rtnl.Attributes(data[unix.SizeofRtMsg:]) {
			switch attr {
			case unix.RTA_GATEWAY:
				if a, ok := netip.AddrFromSlice(value); ok && !yield(a) {
					return
				}
			case unix.RTA_MULTIPATH:
				// struct rtnexthop, each with attributes of its own.
				for len(value) >= unix.SizeofRtNexthop {
					size := int(binary.NativeEndian.Uint16(value))
					if size < unix.SizeofRtNexthop || size > len(value) {
						return
					}
					for attr, value := range rtnl.Attributes(value[unix.SizeofRtNexthop:size]) {
						if a, ok := netip.AddrFromSlice(value); ok && attr == unix.RTA_GATEWAY && !yield(a) {
							return
						}
					}
					value = value[min((size+3)&^3, len(value)):]
				}
			}
		}
	}
}

// parseRoute reads a route (struct rtmsg and attributes) but for its device's
// name. It is not ok for what does not decide where a peer's packets go: other
// tables, cached routes, routes for a source or a TOS.
func parseRoute(data []byte) (r route, ok bool) {
	if len(data) < unix.SizeofRtMsg {
		return r, false
	}
	bits, sourceBits, tos := int(data[1]), data[2], data[3]
	table := uint32(data[4])
	r.proto = data[5]
	kind, flags := data[7], binary.NativeEndian.Uint32(data[8:])
	if sourceBits != 0 || tos != 0 || flags&unix.RTM_F_CLONED != 0 {
		return r, false
	}
	dst := netip.IPv4Unspecified()
	if data[0] == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	if kind != unix.RTN_UNICAST {
		r.kind = routeKind(kind)
	}
	r.onlink = flags&unix.RTNH_F_ONLINK != 0
	for attr, value := range rtnl.Attributes(data[unix.SizeofRtMsg:]) {
		switch attr {
		case unix.RTA_TABLE:
			table = rtnl.Uint32(value)
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(value)
		case unix.RTA_GATEWAY:
			r.gateway, _ = netip.AddrFromSlice(value)
		case unix.RTA_OIF:
			r.index = int(rtnl.Uint32(value))
		case unix.RTA_PREFSRC, unix.RTA_METRICS, unix.RTA_FLOW:
			r.more = true
		case unix.RTA_PREF:
			r.more = r.more || len(value) > 0 && value[0] != 0 // not medium
		case unix.RTA_PRIORITY:
			r.metric = rtnl.Uint32(value)
		case unix.RTA_MULTIPATH:
			r.kind = "multipath"
		case rtnl.RTA_NH_ID:
			r.kind = "nexthop"
		case unix.RTA_ENCAP_TYPE:
			r.kind = "encap"
		case unix.RTA_VIA:
			r.kind = "via"
		}
	}
	r.prefix = netip.PrefixFrom(dst, bits)
	return r, table == unix.RT_TABLE_MAIN && r.prefix.IsValid()
}

// readOnLink asks the kernel which addresses it reaches on a device without a
// gateway, as `ip route get` does: rules and all tables count.
func (p *Path) readOnLink(addrs []netip.Addr, device int) (map[netip.Addr]bool, error) {
	requests := make([]*rtnl.Request, len(addrs))
	for i, a := range addrs {
		fixed := make([]byte, unix.SizeofRtMsg)
		fixed[0], fixed[1] = family(a.Is6()), byte(a.BitLen())
		requests[i] = rtnl.NewRequest(unix.RTM_GETROUTE, 0, fixed...).Attr(unix.RTA_DST, a.AsSlice())
	}
	onLink := map[netip.Addr]bool{}
	err := p.socket.Ask(requests, func(i int, data []byte, refusal error) {
		if refusal == nil && isOnLink(data, device) { // refused: nothing leads there
			onLink[addrs[i]] = true
		}
	})
	if err != nil {
		return nil, fmt.Errorf("asking for the routes to peers: %w", err)
	}
	return onLink, nil
}

// isOnLink reads the kernel's answer where an address is (struct rtmsg and
// attributes).
func isOnLink(data []byte, device int) bool {
	if len(data) < unix.SizeofRtMsg || data[7] != unix.RTN_UNICAST {
		return false
	}
	found := false
	for attr, value := range rtnl.Attributes(data[unix.SizeofRtMsg:]) {
		switch attr {
		case unix.RTA_OIF:
			found = int(rtnl.Uint32(value)) == device
		case unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_MULTIPATH, unix.RTA_ENCAP:
			return false
		}
	}
	return found
}

func routeKind(kind byte) string {
	switch kind {
	case unix.RTN_LOCAL:
		return "local"
	case unix.RTN_BROADCAST:
		return "broadcast"
	case unix.RTN_MULTICAST:
		return "multicast"
	case unix.RTN_BLACKHOLE:
		return "blackhole"
	case unix.RTN_UNREACHABLE:
		return "unreachable"
	case unix.RTN_PROHIBIT:
		return "prohibit"
	case unix.RTN_THROW:
		return "throw"
	}
	return fmt.Sprintf("type%d", kind)
}

// readNeighbours reads the neighbours on the device.
func (p *Path) readNeighbours(v6 bool, d *device) ([]neighbour, error) {
	var neighbours []neighbour
	err := p.socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			return rtnl.NewRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, ndmsg(family(v6), 0, 0, 0)...).
				Uint32(unix.NDA_IFINDEX, uint32(d.index))
		},
		unix.RTM_NEWNEIGH,
		func() { neighbours = nil },
		func(data []byte) {
			if n, ok := parseNeighbour(data); ok && n.index == d.index {
				neighbours = append(neighbours, n.neighbour())
			}
		},
	)
	if err != nil {
		return nil, fmt.Errorf("reading neighbours of %s: %w", d.name, err)
	}
	return neighbours, nil
}

// readFDB reads the device's forwarding database.
func (p *Path) readFDB(d *device) ([]fdbEntry, error) {
	var fdb []fdbEntry
	err := p.socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			// The index in the fixed part is what the kernel filters by here.
			return rtnl.NewRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP, ndmsg(unix.AF_BRIDGE, d.index, 0, 0)...)
		},
		unix.RTM_NEWNEIGH,
		func() { fdb = nil },
		func(data []byte) {
			if n, ok := parseNeighbour(data); ok && n.index == d.index {
				fdb = append(fdb, n.fdbEntry())
			}
		},
	)
	if err != nil {
		return nil, fmt.Errorf("reading forwarding entries of %s: %w", d.name, err)
	}
	return fdb, nil
}

// ndmsg is struct ndmsg of linux/neighbour.h.
func ndmsg(family byte, index int, nud uint16, flags byte) []byte {
	b := []byte{family, 0, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = binary.NativeEndian.AppendUint16(b, nud)
	return append(b, flags, 0)
}

// rawNeighbour is an entry of a neighbour table or an FDB, as in a message.
type rawNeighbour struct {
	family byte
	index  int
	nud    uint16
	flags  byte
	dst    netip.Addr
	mac    state.MAC
	// more is set when there are attributes that neither we nor flannel set.
	more bool
	// used tells that it is said when the entry was used: whoever keeps entries says so.
	used bool
}

// parseNeighbour reads struct ndmsg and its attributes.
func parseNeighbour(data []byte) (n rawNeighbour, ok bool) {
	if len(data) < unix.SizeofNdMsg {
		return n, false
	}
	n.family, n.index = data[0], int(int32(binary.NativeEndian.Uint32(data[4:])))
	n.nud, n.flags = binary.NativeEndian.Uint16(data[8:]), data[10]
	for attr, value := range rtnl.Attributes(data[unix.SizeofNdMsg:]) {
		switch attr {
		case unix.NDA_DST:
			n.dst, _ = netip.AddrFromSlice(value)
		case unix.NDA_LLADDR:
			if len(value) == len(n.mac) {
				n.mac = state.MAC(value)
			}
		case unix.NDA_CACHEINFO:
			n.used = true
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX, netlink.NDA_NH_ID, unix.NDA_SRC_VNI, netlink.NDA_FLAGS_EXT:
			n.more = true
		}
	}
	return n, true
}

func (n rawNeighbour) neighbour() neighbour {
	return neighbour{
		ip:        n.dst,
		mac:       n.mac,
		permanent: n.nud&unix.NUD_PERMANENT != 0,
		// A router says of itself that it is one (NTF_ROUTER); all else is
		// somebody's wish.
		foreign: n.more || n.flags&^unix.NTF_ROUTER != 0,
	}
}

func (n rawNeighbour) fdbEntry() fdbEntry {
	return fdbEntry{
		mac:       n.mac,
		dst:       n.dst,
		permanent: n.nud&unix.NUD_PERMANENT != 0,
		foreign:   n.more || n.flags&^unix.NTF_SELF != 0,
	}
}

// acceptRAPath is the sysctl's file. The name of a device can't lead out of
// the folder: the kernel allows no slash in it, nor "." and "..".
func (p *Path) acceptRAPath(device string) string {
	return p.setting("net/ipv6/conf/" + device + "/accept_ra")
}

// readAcceptRA reads whether the device takes routes from router
// advertisements; negative when that can't be read, or not be changed.
func (p *Path) readAcceptRA(device string) int {
	value := -1
	if p.raRefused[device] {
		return value
	}
	_ = p.namespace.Do(func() error {
		text, err := os.ReadFile(p.acceptRAPath(device))
		if err != nil {
			return err
		}
		value, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err
	})
	return value
}

// addrOf is a net.IP in the shortest form, the zero Addr when there is none.
func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
