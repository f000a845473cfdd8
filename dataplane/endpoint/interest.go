package endpoint

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// interest is what a watch takes notice of, as of the last Find. A nil one
// takes notice of everything.
type interest struct {
	prefixes []netip.Prefix
	// macs are those of the pods' ends by index of the veth, zero where it is
	// not known.
	macs map[int]state.MAC
	// settled are the veths whose pods have an address.
	settled map[int]bool
}

func newInterest(s seen, prefixes []netip.Prefix) *interest {
	in := &interest{prefixes: prefixes, macs: map[int]state.MAC{}, settled: map[int]bool{}}
	for _, c := range candidates(s, prefixes) {
		p := s.pods[c.veth.index]
		in.macs[c.veth.index] = p.end.mac
		in.settled[c.veth.index] = c.veth.carrier && len(p.claims(prefixes)) > 0
	}
	return in
}

// inAddress is the interest in an address, of the host's or a pod's.
func (in *interest) inAddress(a netip.Addr) bool { return in == nil || inside(in.prefixes, a) }

// inRoute is the interest in a route.
func (in *interest) inRoute(p netip.Prefix) bool {
	if in == nil {
		return true
	}
	for _, own := range in.prefixes {
		if own.Overlaps(p) && p.Bits() > 0 {
			return true
		}
	}
	return false
}

// inVeth is the interest in what happens at a device.
func (in *interest) inVeth(index int) bool {
	if in == nil {
		return true
	}
	_, ok := in.macs[index]
	return ok
}

// inStation is the interest in a bridge's finding a MAC at a port: it is a hint
// when the pod there has another.
func (in *interest) inStation(index int, mac state.MAC) bool {
	if in == nil {
		return true
	}
	known, ok := in.macs[index]
	return ok && known != mac
}

// open tells whether a veth's pod may yet get an address.
func (in *interest) open(index int) bool { return in == nil || !in.settled[index] }
