//go:build linux

package dataplane

import (
	"net/netip"
	"slices"

	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
)

const (
	// maxAliasesOfANode bounds what one node can claim. Nodes have few further
	// addresses.
	maxAliasesOfANode = 16
	// maxAliases bounds all of them.
	maxAliases = 16384
)

// aliases are those further addresses of peers that can be: addresses of one
// host outside of the overlay's networks, none of this node's, and of no node too
// many. What a node says of itself comes from a hostile world; an address that is
// left out is nobody's.
func aliases(s state.State, uplink kernel.Uplink) []state.Alias {
	own := map[netip.Addr]bool{
		s.Local.Address: true, s.Local.AddressV6: true, s.Local.PublicIP: true, s.Local.PublicIPv6: true,
	}
	for _, a := range slices.Concat(uplink.Addrs, uplink.Others) {
		own[a.Addr()] = true
	}
	inside := func(a netip.Addr) bool {
		return slices.ContainsFunc(slices.Concat(s.Networks, s.Local.Prefixes), func(p netip.Prefix) bool { return p.Contains(a) })
	}
	count := map[netip.Addr]int{}
	var kept []state.Alias
	for _, a := range s.Aliases {
		if !a.Addr.IsGlobalUnicast() || a.Addr.Is4In6() || a.Addr.Zone() != "" || own[a.Addr] || inside(a.Addr) {
			continue
		}
		if count[a.PublicIP]++; count[a.PublicIP] > maxAliasesOfANode {
			continue
		}
		if len(kept) == maxAliases {
			break
		}
		kept = append(kept, a)
	}
	return kept
}
