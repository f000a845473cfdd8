package etcd

import (
	"fmt"
	"net/netip"

	"github.com/weft-net/weft/controlplane/claims"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// window is among how many free prefixes a node chooses, as flannel does. It
// doubles with every race that is lost, so that however many nodes start at
// once they soon stop getting in each other's way.
const window = 100

// span is where a node's prefix of one family lies: between two base addresses,
// both included.
type span struct {
	first, last netip.Addr
	bits        int
}

// spans returns those of the families in use, IPv4 first.
func spans(c flannel.Config) []span {
	var list []span
	if c.EnableIPv4 {
		list = append(list, span{c.SubnetMin, c.SubnetMax, c.SubnetLen})
	}
	if c.EnableIPv6 {
		list = append(list, span{c.IPv6SubnetMin, c.IPv6SubnetMax, c.IPv6SubnetLen})
	}
	return list
}

// Allows tells whether a node may have p.
func (s span) Allows(p netip.Prefix) bool {
	return p.IsValid() && p.Bits() == s.bits && p == p.Masked() && p.Addr().Is4() == s.first.Is4() &&
		!p.Addr().Less(s.first) && !s.last.Less(p.Addr())
}

// Free lists the first free prefixes, at most as many as said.
func (s span) Free(taken *claims.Set[netip.Prefix], most int) []netip.Prefix {
	var list []netip.Prefix
	for addr := s.first; addr.IsValid() && !s.last.Less(addr) && len(list) < most; {
		p := netip.PrefixFrom(addr, s.bits)
		if other, ok := taken.Overlapping(p); !ok {
			list = append(list, p)
		} else if other.Bits() < s.bits {
			p = other // all of it is taken
		}
		addr = state.Last(p).Next() // the zero Addr after the very last
	}
	return list
}

// choose finds the node a prefix in every span: one that it had before if that
// is free, else one of the first free ones, which pick chooses by its index.
func choose(spans []span, taken, before []netip.Prefix, most int, pick func(n int) int) ([]netip.Prefix, error) {
	var set claims.Set[netip.Prefix]
	for _, s := range spans {
		set.Expect(netip.PrefixFrom(s.first, s.bits))
	}
	for _, p := range taken {
		set.Expect(p)
	}
	for _, p := range taken {
		set.Add(p, p)
	}
	var chosen []netip.Prefix
	for _, s := range spans {
		if p, ok := s.again(&set, before); ok {
			chosen = append(chosen, p)
			continue
		}
		free := s.Free(&set, most)
		if len(free) == 0 {
			return nil, fmt.Errorf("no /%d from %s to %s is free for this node, with %d prefixes leased; "+
				"delete the leases of nodes that are gone, or configure a greater network", s.bits, s.first, s.last, len(taken))
		}
		chosen = append(chosen, free[pick(len(free))])
	}
	return chosen, nil
}

// again returns the first of the prefixes of before that fits and is free.
func (s span) again(taken *claims.Set[netip.Prefix], before []netip.Prefix) (netip.Prefix, bool) {
	for _, p := range before {
		if !s.Allows(p) {
			continue
		}
		if _, other := taken.Overlapping(p); !other {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
