package kernel

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// direct is what DirectRouting goes by: which peers it serves, and which of the
// kernel's routes are its own.
//
// A peer that is on one of the uplink's own networks needs no tunnel. It gets the
// route that flannel gives it,
//
//	ip route add 10.244.25.0/24 via 192.0.2.12 dev eth0
//
// and no neighbour and no FDB entry. Such a route bears no mark: flannel says
// nothing of who made it, and a node of ours has to look like one of flannel's.
// Routes of a peer that is wanted are known by the peer. Of the others, which may
// be what is left of a peer that went while nobody looked, or an operator's,
// those are taken for DirectRouting's, and removed, that
//
//   - this process has made, or found serving a peer: these are certain; or
//   - have exactly that form, while DirectRouting is on: in the main table,
//     through one gateway on the uplink, with no word of who made them, of a
//     metric, a source address, an MTU or onlink; to a prefix inside the
//     overlay's network that is as long as a node's pod prefix and apart from
//     this node's own; through a gateway that no route out of the overlay's
//     network uses, since that is a router rather than a node.
//
// So an operator who leads a part of the overlay's network elsewhere says so in
// the route, as by `proto static`, and it is left alone. Without DirectRouting
// nothing is removed but what this process has made.
type direct struct {
	// on is state.State's DirectRouting.
	on bool
	// onLink are the public IPs that the uplink reaches without a gateway.
	onLink map[netip.Addr]bool
	// made are the routes that this process has made or found serving a peer.
	made map[madeRoute]bool
}

// madeRoute is a route of DirectRouting.
type madeRoute struct {
	prefix  netip.Prefix
	gateway netip.Addr
	device  string
}

// isDirect reports whether a peer is served by DirectRouting.
func (o overlay) isDirect(p state.Peer) bool { return o.direct.on && o.direct.onLink[p.PublicIP] }

// routeTo is the route that a peer shall have.
func (o overlay) routeTo(p state.Peer) route {
	if o.isDirect(p) {
		return route{
			prefix: p.Prefix, gateway: p.PublicIP, device: o.uplink, index: o.uplinkIndex,
			metric: o.metric(), proto: protoBoot,
		}
	}
	return route{
		prefix: p.Prefix, gateway: p.Prefix.Addr(), device: o.name,
		onlink: true, metric: o.metric(), proto: protoBoot,
	}
}

// ownership tells whose a route past the overlay device is.
type ownership struct {
	overlay
	// nodes are all peers' public IPs.
	nodes map[netip.Addr]bool
	// routers are as in actual.
	routers map[netip.Addr]bool
	// gateways are the first addresses of all peers' pod prefixes.
	gateways map[netip.Addr]bool
	// lengths are those of pod prefixes, this node's and the peers'.
	lengths map[int]bool
}

func newOwnership(o overlay, peers []state.Peer, have actual) ownership {
	w := ownership{
		overlay:  o,
		nodes:    make(map[netip.Addr]bool, len(peers)),
		routers:  have.routers,
		gateways: make(map[netip.Addr]bool, len(peers)),
		lengths:  map[int]bool{o.prefix.Bits(): true},
	}
	for _, p := range peers {
		if o.owns(p.Prefix.Addr()) {
			w.nodes[p.PublicIP] = true
			w.gateways[p.Prefix.Addr()] = true
			w.lengths[p.Prefix.Bits()] = true
		}
	}
	return w
}

// removable reports whether a route that leads past the overlay device, to a
// prefix of no peer, is DirectRouting's.
func (w ownership) removable(r route) bool {
	return w.plain(r) && (w.made(r) || w.direct.on && w.looksDirect(r) && !w.routers[r.gateway])
}

// replaceable reports whether a route that leads past the overlay device to a
// peer, but not through the peer's public IP, is DirectRouting's: the peer's
// address, or the node that has the prefix, was another one.
func (w ownership) replaceable(r route) bool {
	return w.removable(r) || w.plain(r) && w.looksDirect(r) && w.nodes[r.gateway]
}

// plain reports whether a route says no more than DirectRouting's do.
func (w ownership) plain(r route) bool {
	return r.kind == "" && r.proto == protoBoot && r.metric == w.metric() && !r.onlink && !r.more && r.gateway.IsValid()
}

func (w ownership) made(r route) bool {
	return w.direct.made[madeRoute{r.prefix, r.gateway, r.device}]
}

// looksDirect reports whether a plain route can be DirectRouting's by where it
// leads.
func (w ownership) looksDirect(r route) bool {
	return r.device == w.uplink && w.network.IsValid() && holds(w.network, r.prefix) &&
		w.lengths[r.prefix.Bits()] && !r.prefix.Overlaps(w.prefix)
}
