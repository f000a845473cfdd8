package claims

import (
	"fmt"
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// Judgement decides who is whose when several nodes claim the same.
//
// This node's own prefixes, addresses and MACs are its own, whoever claims
// them. Among the others who is judged first is believed: a store asks for the
// oldest first, so who comes later, by mistake or with intent, can't take from
// those that are there, and all nodes come to the same result.
//
//   - Prefixes must not overlap; the later is left out.
//   - A node is not inside a pod prefix: the way there would lead into the
//     overlay, and a pod's packets would pass for the node's. The later of the
//     two is left out, be it the node or the prefix.
//   - Two nodes with one MAC and different public IPs can't both be reached, as
//     the kernel's FDB has one entry for a MAC. The later is taken for one that
//     has not told its MAC: only DirectRouting reaches it.
//   - One public IP for two nodes harms nobody; so it is when a machine was
//     renamed and what it was before is still there.
type Judgement struct {
	local    state.Local
	prefixes Set[string] // by the node that has it
	nodes    Set[string] // addresses of nodes, as prefixes of full length
	macs     map[device]claimant
}

// device is an overlay device: a MAC says whose, but for that a node may have
// the same on both of its devices.
type device struct {
	mac state.MAC
	ip6 bool
}

// claimant is who has a MAC.
type claimant struct {
	node     string
	publicIP netip.Addr
}

// Lengths are prefixes, of which only the lengths count. Its zero value is empty.
type Lengths struct{ seen map[netip.Prefix]bool }

// Note takes a masked prefix.
func (l *Lengths) Note(p netip.Prefix) {
	if l.seen == nil {
		l.seen = map[netip.Prefix]bool{}
	}
	any := netip.IPv6Unspecified()
	if p.Addr().Is4() {
		any = netip.IPv4Unspecified()
	}
	l.seen[netip.PrefixFrom(any, p.Bits())] = true
}

// NewJudgement makes a judgement of one node, which notes what is its own.
// lengths are those of all pod prefixes that will be judged.
func NewJudgement(local state.Local, lengths Lengths) *Judgement {
	j := &Judgement{local: local, macs: map[device]claimant{}}
	own := []netip.Addr{local.Address, local.AddressV6, local.PublicIP, local.PublicIPv6}
	for _, p := range local.Prefixes {
		lengths.Note(p)
	}
	for _, a := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		lengths.Note(host(a))
	}
	for p := range lengths.seen {
		j.prefixes.Expect(p)
		j.nodes.Expect(p)
	}
	for _, p := range local.Prefixes {
		j.prefixes.Add(p, local.Node)
	}
	for _, a := range own {
		if a.IsValid() {
			j.nodes.Add(host(a), local.Node)
		}
	}
	j.macs[device{local.MAC, false}] = claimant{local.Node, local.PublicIP}
	j.macs[device{local.MACv6, true}] = claimant{local.Node, local.PublicIPv6}
	return j
}

// host is an address as a prefix.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// Peer judges one prefix and returns what is to be used of it: nothing, if its
// prefix is not valid. The text says what is not used, and why.
func (j *Judgement) Peer(p state.Peer) (usable state.Peer, why string) {
	switch p.PublicIP {
	case j.local.Address, j.local.AddressV6, j.local.PublicIP, j.local.PublicIPv6:
		return state.Peer{}, fmt.Sprintf("its public IP %s is this node's own; delete the node if it is one that this machine was before", p.PublicIP)
	}
	if who, overlaps := j.prefixes.Overlapping(p.Prefix); overlaps {
		return state.Peer{}, fmt.Sprintf("its pod prefix %s overlaps that of node %q, which was there before", p.Prefix, who)
	}
	if who, inside := j.prefixes.Overlapping(host(p.PublicIP)); inside {
		return state.Peer{}, fmt.Sprintf("its public IP %s lies in the pod prefix of node %q, which was there before", p.PublicIP, who)
	}
	if who, holds := j.nodes.Overlapping(p.Prefix); holds {
		return state.Peer{}, fmt.Sprintf("its pod prefix %s holds the address of node %q, which was there before", p.Prefix, who)
	}
	j.prefixes.Add(p.Prefix, p.Node)
	j.nodes.Add(host(p.PublicIP), p.Node)
	if p.MAC.IsZero() {
		return p, ""
	}
	d := device{p.MAC, p.PublicIP.Is6()}
	switch who, taken := j.macs[d]; {
	case taken && who.publicIP != p.PublicIP:
		why = fmt.Sprintf("its VtepMAC %s is that of node %q, which was there before; delete flannel's device there and restart its agent, so that it gets another", p.MAC, who.node)
		p.MAC = state.MAC{}
	case !taken:
		j.macs[d] = claimant{p.Node, p.PublicIP}
	}
	return p, why
}
