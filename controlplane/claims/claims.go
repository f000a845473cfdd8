// Package claims tells who has which addresses, where nodes claim whole prefixes.
package claims

import (
	"net/netip"
	"slices"
)

// Set has prefixes and what is known of who has each. It finds out what a prefix
// overlaps by a few look-ups, however many there are: two prefixes share addresses
// if one contains the other, and the lengths in use are few, mostly one. Its zero
// value is empty.
type Set[V any] struct {
	// exact has the members, wider what contains one of them, of the lengths in use.
	exact, wider map[netip.Prefix]V
	// lengths are those of all prefixes that may come, by family.
	lengths [2][]int
}

// Expect notes the length of a masked prefix that may be added or asked for: of all
// of them, before the first is added.
func (s *Set[V]) Expect(p netip.Prefix) {
	lengths := &s.lengths[family(p)]
	if !slices.Contains(*lengths, p.Bits()) {
		*lengths = append(*lengths, p.Bits())
	}
}

// family is the index of a prefix's in lengths.
func family(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 0
	}
	return 1
}

// Overlapping returns who has a member that shares addresses with p: with the
// member that is p itself, if there is one.
func (s *Set[V]) Overlapping(p netip.Prefix) (who V, overlaps bool) {
	if who, overlaps = s.exact[p]; overlaps {
		return who, true
	}
	if who, overlaps = s.wider[p]; overlaps {
		return who, true
	}
	for above := range s.above(p) {
		if who, overlaps = s.exact[above]; overlaps {
			return who, true
		}
	}
	return who, false
}

// Add notes that p is who's.
func (s *Set[V]) Add(p netip.Prefix, who V) {
	if s.exact == nil {
		s.exact, s.wider = map[netip.Prefix]V{}, map[netip.Prefix]V{}
	}
	s.exact[p] = who
	for above := range s.above(p) {
		s.wider[above] = who
	}
}

// above yields the shorter prefixes that contain p and have one of the lengths.
func (s *Set[V]) above(p netip.Prefix) func(yield func(netip.Prefix) bool) {
	return func(yield func(netip.Prefix) bool) {
		for _, bits := range s.lengths[family(p)] {
			if bits < p.Bits() && !yield(netip.PrefixFrom(p.Addr(), bits).Masked()) {
				return
			}
		}
	}
}
