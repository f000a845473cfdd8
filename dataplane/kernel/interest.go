package kernel

import (
	"net/netip"
	"slices"

	"github.com/weft-net/weft/dataplane/state"
)

// interest says which of the kernel's events have to do with a state. On a
// busy host most do not: pods come and go, a routing daemon changes thousands
// of routes, neighbours are asked for all the time.
type interest struct {
	// uplink is a name, since the device may come later, and an index, since
	// it may be renamed.
	uplink      string
	uplinkIndex int
	// networks are the overlay's, own this node's share of them, where pods'
	// own routes come and go.
	networks, own []netip.Prefix
	// gateways are those of all peers, and fdb the entries that peers have by their
	// MACs; the zero entry where two nodes claim one MAC, or with DirectRouting may
	// have none.
	gateways map[netip.Addr]bool
	fdb      map[state.MAC]fdbEntry
	// local are the underlay addresses that packets are sent from. They may be
	// on another device than the uplink.
	local []netip.Addr
	// remotes are the peers' public IPs, sorted: with DirectRouting it matters
	// how the kernel reaches them. Else there are none.
	remotes []netip.Addr
}

// newInterest is the interest in a state's events.
func newInterest(s state.State, uplinkIndex int) *interest {
	in := &interest{
		uplink:      s.Local.Uplink,
		uplinkIndex: uplinkIndex,
		networks:    s.Networks,
		own:         s.Local.Prefixes,
		gateways:    make(map[netip.Addr]bool, len(s.Peers)),
		fdb:         make(map[state.MAC]fdbEntry, len(s.Peers)),
	}
	for _, p := range s.Peers {
		in.gateways[p.Prefix.Addr()] = true
		entry := fdbEntry{mac: p.MAC, dst: p.PublicIP, permanent: true}
		if other, taken := in.fdb[p.MAC]; s.DirectRouting || taken && other != entry {
			entry = fdbEntry{}
		}
		in.fdb[p.MAC] = entry
		if s.DirectRouting {
			in.remotes = append(in.remotes, p.PublicIP)
		}
	}
	slices.SortFunc(in.remotes, netip.Addr.Compare)
	for _, a := range []netip.Addr{s.Local.Address, s.Local.AddressV6, s.Local.PublicIP, s.Local.PublicIPv6} {
		if a.IsValid() {
			in.local = append(in.local, a)
		}
	}
	return in
}

// inUnderlay reports whether a route can decide whether a peer is on one of the
// uplink's own networks.
func (in *interest) inUnderlay(prefix netip.Prefix) bool {
	if !prefix.IsValid() || len(in.remotes) == 0 {
		return false
	}
	i, _ := slices.BinarySearchFunc(in.remotes, prefix.Masked().Addr(), netip.Addr.Compare)
	return i < len(in.remotes) && prefix.Contains(in.remotes[i])
}

// inRoute reports whether a route, whatever device it is on, can lead peers'
// packets elsewhere: its prefix lies in the overlay's
// network and not in this node's part of it. A wider one loses against ours.
func (in *interest) inRoute(prefix netip.Prefix) bool {
	for _, own := range in.own {
		if holds(own, prefix) {
			return false
		}
	}
	for _, network := range in.networks {
		if holds(network, prefix) {
			return true
		}
	}
	return in.gateways[prefix.Addr()]
}

// inNeighbour reports whether an event about a neighbour on an overlay device
// matters: a peer's, or one that looks like a peer's and is none.
func (in *interest) inNeighbour(n neighbour, added bool) bool {
	return in.gateways[n.ip] || added && n.permanent
}

// inFDB is the same for a forwarding entry. One that is as it shall be does not
// matter: most often it was made by ourselves.
func (in *interest) inFDB(f fdbEntry, added bool) bool {
	wanted, peers := in.fdb[f.mac]
	if added && peers {
		return f != wanted
	}
	return peers || added && f.permanent
}
