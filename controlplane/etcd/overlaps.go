package etcd

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
)

// overlaps is a set of prefixes that tells which of them shares addresses with
// a prefix. Two prefixes do if one contains the other.
type overlaps struct {
	// lengths are those of all prefixes that are added or asked for, ascending.
	// There are few, mostly one.
	lengths []int
	// at has the members, and of the prefixes above them those that have one of
	// the lengths.
	at map[netip.Prefix]mark
}

// mark is a prefix in the set, or what lies above one.
type mark struct {
	member netip.Prefix
	itself bool
}

// newOverlaps makes an empty set for prefixes of these lengths.
func newOverlaps(lengths map[int]bool) *overlaps {
	return &overlaps{
		lengths: slices.SortedFunc(maps.Keys(lengths), cmp.Compare[int]),
		at:      map[netip.Prefix]mark{},
	}
}

// Add takes a masked prefix into the set.
func (o *overlaps) Add(p netip.Prefix) {
	o.at[p] = mark{p, true}
	for _, above := range o.above(p) {
		if _, ok := o.at[above]; !ok {
			o.at[above] = mark{p, false}
		}
	}
}

// With returns a member that shares addresses with p.
func (o *overlaps) With(p netip.Prefix) (netip.Prefix, bool) {
	if m, ok := o.at[p]; ok {
		return m.member, true
	}
	for _, above := range o.above(p) {
		if m := o.at[above]; m.itself {
			return m.member, true
		}
	}
	return netip.Prefix{}, false
}

// above lists the shorter prefixes that contain p and have one of the lengths.
func (o *overlaps) above(p netip.Prefix) []netip.Prefix {
	var list []netip.Prefix
	for _, bits := range o.lengths {
		if bits >= p.Bits() {
			break
		}
		above, _ := p.Addr().Prefix(bits) // shorter than p, so it is possible
		list = append(list, above)
	}
	return list
}
