package state

import (
	"net/netip"
	"slices"
)

// NodeAddresses are the addresses in a pod prefix that its node answers on: the
// overlay device's (the first), the bridge's (the next) and the broadcast
// address (the last; IPv6 has none).
func NodeAddresses(prefix netip.Prefix) []netip.Addr {
	base := prefix.Masked().Addr()
	all := []netip.Addr{base}
	if next := base.Next(); prefix.Contains(next) {
		all = append(all, next)
	}
	if last := Last(prefix); base.Is4() && !slices.Contains(all, last) {
		all = append(all, last)
	}
	return all
}

// Last is the last address of a prefix.
func Last(prefix netip.Prefix) netip.Addr {
	bytes := prefix.Masked().Addr().AsSlice()
	for bit := prefix.Bits(); bit < len(bytes)*8; bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(bytes)
	return last
}
