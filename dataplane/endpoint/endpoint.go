// Package endpoint knows which pods live on this node, and where: behind which
// veth, with which MAC.
//
// What it says is used to hand packets to a pod past the host's bridge and
// routing, so it says only what is certain. A pod that it does not know, or
// leaves alone, is served by the kernel path.
package endpoint

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// Endpoint is one address of a pod on this node. The kernel itself would send a
// packet for IP through the device Veth, in a frame to MAC; and a packet that
// the pod routes comes out of Veth in a frame from MAC to Gateway.
type Endpoint struct {
	IP netip.Addr
	// Veth is the interface index of the host's end of the pod's veth, and
	// Name its name. The kernel gives an index again only to who asks for it.
	Veth int
	Name string
	// MAC is the address of the pod's end.
	MAC state.MAC
	// Gateway is the address of the device that the pod sends to: the bridge,
	// or the veth itself where there is none.
	Gateway state.MAC
	// MTU is the smallest on the way: veth, pod's end, bridge.
	MTU int
	// Bridge is the name of the bridge that the veth is a port of, empty where
	// a route leads to the veth.
	Bridge string
}

// LeftAlone is a pod's veth, or one of its addresses, that is no Endpoint.
type LeftAlone struct {
	// IP is the address that is left alone; the zero Addr when it is all of
	// the veth.
	IP   netip.Addr
	Veth int
	Name string
	// Reason says in words what is in the way.
	Reason string
}

// Found is what there is on a node: sorted, and the same for the same node.
type Found struct {
	// Endpoints are sorted by IP, and no IP is there twice.
	Endpoints []Endpoint
	// LeftAlone is sorted by veth, then by IP.
	LeftAlone []LeftAlone
	// Notes are what an operator may want to know besides.
	Notes []string
}

// Program is a tc program on the host's end of a pod's veth.
type Program struct {
	// Name is that of a filter, or that of a tcx program: this one is known
	// only with CAP_SYS_ADMIN, else empty.
	Name string
	// ID is the kernel's number of the program; 0 for a filter that is none.
	ID uint32
	// Filter is true for a clsact filter, false for a tcx program.
	Filter bool
	// Ingress is true for what sees packets from the pod.
	Ingress bool
}
