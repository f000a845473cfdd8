package kube

import (
	"cmp"
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

// judge decides who is whose when several nodes claim the same (see
// claims.Judgement): among the others the older Node is believed, by creation
// time, then by name. A status address is its node's unless it is some node's
// public IP.
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
	claims *claims.Judgement
	// nodes are the addresses that are taken: all public IPs and what became an
	// alias.
	nodes map[netip.Addr]bool
	// applicants are those whose status addresses are still to be judged.
	applicants []applicant
}

// applicant is a node and the peers that it has become.
type applicant struct {
	addresses []netip.Addr
	peers     []state.Peer
}

// newJudgement notes what is this node's own.
func newJudgement(local state.Local, others []neighbor) *judgement {
	var prefixes claims.Lengths
	for i := range others {
		for _, p := range others[i].peers {
			prefixes.Note(p.Prefix)
		}
	}
	j := &judgement{
		members: members{peers: make([]state.Peer, 0, len(others)), faults: map[string]string{}},
		claims:  claims.NewJudgement(local, prefixes),
		nodes:   make(map[netip.Addr]bool, len(others)),
	}
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
		p, why := j.claims.Peer(p)
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
