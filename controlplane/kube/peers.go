package kube

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weft-net/weft/controlplane/claims"
	"github.com/weft-net/weft/dataplane/state"
)

// members is what the other nodes come to.
type members struct {
	peers   []state.Peer
	aliases []state.Alias
	// faults say, by a node's name, what of its Node is not used and why.
	faults map[string]string
}

// judge decides who is whose when several nodes claim the same.
//
// This node's own prefixes, addresses and MACs are its own, whoever claims
// them. Among the others the older Node is believed (by creation time, then by
// name): who comes later, by mistake or with intent, can't take from those that
// are there. All nodes judge by the same rule, and so come to the same result.
//
//   - Prefixes must not overlap; the later is left out.
//   - Two nodes with one MAC and different public IPs can't both be reached, as
//     the kernel's FDB has one entry for a MAC. The later is taken for one that
//     has not told its MAC: only DirectRouting reaches it.
//   - One public IP for two Nodes harms nobody; so it is when a machine was
//     renamed and its old Node is still there.
//   - A status address is its node's unless it is some node's public IP.
func judge(local state.Local, others []neighbor) members {
	slices.SortFunc(others, func(a, b neighbor) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.name, b.name))
	})
	j := newJudgement(local, others)
	for i := range others {
		j.node(&others[i])
	}
	for _, a := range j.applicants {
		j.addresses(a)
	}
	slices.SortFunc(j.aliases, func(a, b state.Alias) int { return a.Addr.Compare(b.Addr) })
	return j.members
}

// judgement is what was claimed so far.
type judgement struct {
	members
	local    state.Local
	prefixes claims.Set[string] // by the node that has it
	macs     map[device]claimant
	// nodes are the addresses that are taken: all public IPs and what became an
	// alias.
	nodes map[netip.Addr]bool
	// applicants are those whose status addresses are still to be judged.
	applicants []applicant
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

// applicant is a node and the peers that it has become.
type applicant struct {
	addresses []netip.Addr
	peers     []state.Peer
}

// newJudgement notes what is this node's own.
func newJudgement(local state.Local, others []neighbor) *judgement {
	j := &judgement{
		members: members{peers: make([]state.Peer, 0, len(others)), faults: map[string]string{}},
		local:   local,
		macs:    make(map[device]claimant, len(others)),
		nodes:   make(map[netip.Addr]bool, len(others)),
	}
	for i := range others {
		for _, p := range others[i].peers {
			j.prefixes.Expect(p.Prefix)
		}
	}
	for _, p := range local.Prefixes {
		j.prefixes.Expect(p)
	}
	for _, p := range local.Prefixes {
		j.prefixes.Add(p, local.Node)
	}
	j.macs[device{local.MAC, false}] = claimant{local.Node, local.PublicIP}
	j.macs[device{local.MACv6, true}] = claimant{local.Node, local.PublicIPv6}
	for _, a := range []netip.Addr{local.Address, local.AddressV6, local.PublicIP, local.PublicIPv6} {
		j.nodes[a] = true
	}
	return j
}

// node judges one node's peers.
func (j *judgement) node(n *neighbor) {
	fault := n.fault
	first := len(j.peers)
	for _, p := range n.peers {
		p, why := j.peer(p)
		if p.Prefix.IsValid() {
			j.peers = append(j.peers, p)
			j.nodes[p.PublicIP] = true
		}
		fault = cmp.Or(fault, why)
	}
	if fault != "" {
		j.faults[n.name] = fault
	}
	if len(n.addresses) > 0 && len(j.peers) > first {
		j.applicants = append(j.applicants, applicant{n.addresses, slices.Clone(j.peers[first:])})
	}
}

// peer judges one prefix and returns what is to be used of it.
func (j *judgement) peer(p state.Peer) (usable state.Peer, why string) {
	switch p.PublicIP {
	case j.local.Address, j.local.AddressV6, j.local.PublicIP, j.local.PublicIPv6:
		return state.Peer{}, fmt.Sprintf("its public IP %s is this node's own; delete the Node if it is one that this machine had before", p.PublicIP)
	}
	if who, overlaps := j.prefixes.Overlapping(p.Prefix); overlaps {
		return state.Peer{}, fmt.Sprintf("its podCIDR %s overlaps that of node %q, which was there before", p.Prefix, who)
	}
	j.prefixes.Add(p.Prefix, p.Node)
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

// addresses takes those of a node that are nobody's yet.
func (j *judgement) addresses(a applicant) {
	for _, addr := range a.addresses {
		i := slices.IndexFunc(a.peers, func(p state.Peer) bool { return p.PublicIP.Is4() == addr.Is4() })
		if i < 0 || j.nodes[addr] {
			continue
		}
		j.nodes[addr] = true
		j.aliases = append(j.aliases, state.Alias{Addr: addr, PublicIP: a.peers[i].PublicIP})
	}
}
