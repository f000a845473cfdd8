package kernel

import (
	"net/netip"
	"slices"

	"github.com/weft-net/weft/dataplane/state"
)

// joinEntries joins a device's routes, neighbours and FDB entries to what an
// operator calls a peer. Routes without a gateway, neighbours that are not
// permanent and the FDB entries of no or of group MACs are no part of a peer.
func joinEntries(have actual) []Entry {
	neighbours := map[netip.Addr]neighbour{}
	for _, n := range have.neighbours {
		if n.permanent {
			neighbours[n.ip] = n
		}
	}
	fdb := map[state.MAC]fdbEntry{}
	for _, f := range have.fdb {
		if f.dst.IsValid() && !f.mac.IsZero() && f.mac[0]&1 == 0 {
			fdb[f.mac] = f
		}
	}
	var entries []Entry
	gatewayUsed, macUsed := map[netip.Addr]bool{}, map[state.MAC]bool{}
	add := func(e Entry) {
		e.MAC = neighbours[e.Gateway].mac
		e.PublicIP = fdb[e.MAC].dst
		gatewayUsed[e.Gateway], macUsed[e.MAC] = true, true
		entries = append(entries, e)
	}
	for _, r := range have.routes {
		switch {
		case !r.gateway.IsValid() || r.kind != "":
		case have.device != nil && r.device != have.device.name:
			entries = append(entries, Entry{Prefix: r.prefix, Gateway: r.gateway, PublicIP: r.gateway, Direct: true})
		default:
			add(Entry{Prefix: r.prefix, Gateway: r.gateway})
		}
	}
	for gateway := range neighbours {
		if !gatewayUsed[gateway] {
			add(Entry{Gateway: gateway})
		}
	}
	for mac, f := range fdb {
		if !macUsed[mac] {
			entries = append(entries, Entry{MAC: mac, PublicIP: f.dst})
		}
	}
	slices.SortFunc(entries, compareEntries)
	return entries
}

// compareEntries sorts by prefix, with those that have none at the end.
func compareEntries(a, b Entry) int {
	switch {
	case a.Prefix.IsValid() && !b.Prefix.IsValid():
		return -1
	case !a.Prefix.IsValid() && b.Prefix.IsValid():
		return 1
	}
	if c := a.Prefix.Compare(b.Prefix); c != 0 {
		return c
	}
	if c := b.Gateway.Compare(a.Gateway); c != 0 {
		return -c
	}
	return slices.Compare(a.MAC[:], b.MAC[:])
}
