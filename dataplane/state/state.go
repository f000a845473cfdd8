// Package state says what one node's kernel should hold: its own part of the
// overlay network and the peers it can reach.
//
// The values are plain, comparable and family-neutral. A control plane makes
// them, a dataplane makes them true; neither knows more of the other than this.
package state

import (
	"cmp"
	"net/netip"
	"slices"
)

// State is the whole of what a node should hold. Handing over the same State
// twice is harmless, and a State says everything: a peer that is not in it is
// not wanted.
type State struct {
	// Networks are the overlay's networks, at most one per family. Every pod
	// prefix lies inside one of them.
	Networks []netip.Prefix
	// VNI is the VXLAN network identifier, 1 to 2^24-1. Flannel's default is 1.
	VNI uint32
	// Port is the UDP destination port of the outer packet. Flannel's default
	// on Linux is 8472.
	Port uint16
	// DirectRouting has packets to a peer on one of the uplink's own networks
	// routed there as they are, without a tunnel.
	DirectRouting bool
	// Learning has the overlay devices learn from packets where a MAC is.
	Learning bool
	// GBP has the overlay devices carry packets' marks (VXLAN group policy,
	// draft-smith-vxlan-group-policy).
	GBP bool
	// NFTables has the host's masquerading and forwarding rules written by
	// nftables rather than iptables.
	NFTables bool
	// Local is this node's own part.
	Local Local
	// Peers are the other nodes' pod prefixes, one Peer per prefix, sorted by
	// Sort.
	Peers []Peer
	// Aliases are further addresses of peer nodes, from which packets may come
	// too. They give a packet's inner source a home and nothing else.
	Aliases []Alias
}

// Alias is one more address of a peer node.
type Alias struct {
	Addr netip.Addr
	// PublicIP says which node's.
	PublicIP netip.Addr
}

// Local is this node's own part of the overlay.
type Local struct {
	// Node is this node's name, as its peers know it.
	Node string
	// Prefixes are this node's pod prefixes, masked, at most one per family.
	Prefixes []netip.Prefix
	// Uplink is the name of the network interface that carries the underlay.
	Uplink string
	// Address is the uplink's address that IPv4 pods' packets are sent from.
	// The zero Addr means PublicIP.
	Address netip.Addr
	// AddressV6 is the same for IPv6.
	AddressV6 netip.Addr
	// PublicIP is the underlay address that peers send IPv4 pods' packets to.
	// It is the zero Addr when the node has no IPv4 overlay. Behind NAT it is not
	// an address of this node.
	PublicIP netip.Addr
	// PublicIPv6 is the same for IPv6.
	PublicIPv6 netip.Addr
	// MAC is the address of the overlay device flannel.<VNI>. Zero means that
	// the dataplane chooses: the existing device's, else the one it
	// remembered, else a new one.
	MAC MAC
	// MACv6 is the same for flannel-v6.<VNI>.
	MACv6 MAC
	// MTU is the overlay device's MTU in bytes. Zero means the uplink's less
	// the encapsulation overhead.
	MTU int
}

// Peer is one pod prefix on another node.
type Peer struct {
	// Node is the other node's name.
	Node string
	// Prefix is one of its pod prefixes, masked.
	Prefix netip.Prefix
	// PublicIP is its underlay address, of the family of Prefix.
	PublicIP netip.Addr
	// MAC is the address of its overlay device, to which inner frames are
	// sent (flannel's VtepMAC). It is zero while the peer has not told it: then
	// the peer can't be reached yet, unless by DirectRouting.
	MAC MAC
}

// Sort brings the peers into the order in which states are compared and
// printed: by prefix address, then prefix length, then node.
func (s *State) Sort() {
	slices.SortFunc(s.Peers, func(a, b Peer) int {
		return cmp.Or(
			a.Prefix.Addr().Compare(b.Prefix.Addr()),
			cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()),
			cmp.Compare(a.Node, b.Node),
		)
	})
}
