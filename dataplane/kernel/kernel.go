// Package kernel is the kernel path: what the kernel itself must hold so that
// a packet to a pod on another node finds its way without any help from us.
//
// From the packet's point of view there are three things per peer. The route
// says that the peer's pods are behind a gateway on the overlay device (the
// first address of the peer's pod prefix); the neighbour entry says which MAC
// that gateway has; the FDB entry says to which underlay address a frame for
// that MAC is sent. All three lie on one VXLAN device per family, made exactly
// as flannel makes it, so that the two can take over each other's node.
//
// With DirectRouting a peer on one of the uplink's own networks has none of the
// three, but a plain route through its underlay address: its packets go as they
// are.
//
// The work is always the same: read what the kernel holds, compare it with
// what the state wants (a pure function, whose result can be printed as the
// commands an operator would type), apply the difference.
package kernel

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane/state"
)

// Uplink is the network interface that carries the underlay.
type Uplink struct {
	Name  string
	Index int
	// MTU is in bytes.
	MTU int
	MAC state.MAC
	// Kind is the type of link as the kernel names it: "device" for hardware,
	// else "veth", "bond", "bridge", "vlan", "wireguard", ...
	Kind string
	// EncapType is the link layer: "ether", "none", ...
	EncapType string
	// Master is the name of the bond, bridge or VRF it belongs to, or "".
	Master string
	Up     bool
	// Addrs are the interface's addresses of both families, Others those of the
	// node's other interfaces.
	Addrs, Others []netip.Prefix
}

// Overlay is one overlay device as it is in the kernel.
type Overlay struct {
	Name  string
	Index int
	MAC   state.MAC
	// MTU is in bytes.
	MTU int
	// Address is the device's own address, the base of the node's pod prefix.
	Address netip.Addr
	// Local is the underlay address that outer packets are sent from.
	Local netip.Addr
}

// Result tells what a Sync found and did.
type Result struct {
	Uplink Uplink
	// Overlays has one device per family present, IPv4 first.
	Overlays []Overlay
	// Failed are the peers that could not be served, and why. When two peers
	// claim the same prefix, one may be served while the other stands here.
	Failed map[netip.Prefix]error
	// Skipped are the peers that have not published a MAC yet. That is no
	// error: they are served as soon as they have one.
	Skipped []netip.Prefix
	// Direct are the peers that are served by DirectRouting, past the overlay
	// device.
	Direct []netip.Prefix
	// Steps is how many changes were made.
	Steps int
}

// Entry is one peer as the kernel has it, joined from route, neighbour entry
// (by gateway) and FDB entry (by MAC). What is missing is zero; a neighbour
// without a route, or an FDB entry without a neighbour, is an Entry too.
//
// Of a peer that is served by DirectRouting there is the route only: its gateway
// is the public IP, and there is no MAC.
type Entry struct {
	Prefix   netip.Prefix
	Gateway  netip.Addr
	MAC      state.MAC
	PublicIP netip.Addr
	// Direct tells that the route does not lead to the overlay device.
	Direct bool
}

// DeviceName is the name of the overlay device, the same as flannel's.
func DeviceName(vni uint32, v6 bool) string {
	if v6 {
		return fmt.Sprintf("flannel-v6.%d", vni)
	}
	return fmt.Sprintf("flannel.%d", vni)
}

// isDeviceName reports whether a device of that name could be an overlay
// device, of any VNI.
func isDeviceName(name string) bool {
	return strings.HasPrefix(name, "flannel.") || strings.HasPrefix(name, "flannel-v6.")
}

// peersError is what Sync returns when some peers could not be served. Its
// text is bounded; each error can be had from Result.Failed.
type peersError struct {
	failed map[netip.Prefix]error
	total  int
}

// maxErrorsInText bounds the text of peersError: 5,000 peers can fail for one
// and the same reason.
const maxErrorsInText = 5

func (e *peersError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d peers not served", len(e.failed), e.total)
	sep := ": "
	for i, prefix := range e.prefixes() {
		if i == maxErrorsInText {
			fmt.Fprintf(&b, "; and %d more", len(e.failed)-i)
			break
		}
		b.WriteString(sep)
		b.WriteString(e.failed[prefix].Error())
		sep = "; "
	}
	return b.String()
}

// Unwrap gives errors.Is and errors.As every peer's error.
func (e *peersError) Unwrap() []error {
	errs := make([]error, 0, len(e.failed))
	for _, prefix := range e.prefixes() {
		errs = append(errs, e.failed[prefix])
	}
	return errs
}

func (e *peersError) prefixes() []netip.Prefix {
	prefixes := make([]netip.Prefix, 0, len(e.failed))
	for prefix := range e.failed {
		prefixes = append(prefixes, prefix)
	}
	slices.SortFunc(prefixes, netip.Prefix.Compare)
	return prefixes
}
