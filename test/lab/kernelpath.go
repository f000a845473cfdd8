//go:build linux

package lab

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// buildKernelOverlay makes a stock flannel node's kernel state with nothing
// but iproute2, so that weft has a peer that is not weft.
func (n *Node) buildKernelOverlay(ctx context.Context) error {
	o := n.lab.Options
	for _, f := range n.overlays() {
		if err := n.ip(ctx,
			fmt.Sprintf("link add %s address %s mtu %d type vxlan id %d local %s dev eth0 dstport %d nolearning",
				f.device, f.mac, f.mtu, o.VNI, f.ip, o.Port),
			fmt.Sprintf("address add %s/%d dev %s", f.vtep, f.vtep.BitLen(), f.device),
			fmt.Sprintf("link set %s up", f.device),
		); err != nil {
			return err
		}
	}
	for _, peer := range n.Peers() {
		if err := n.AddKernelPeer(ctx, peer); err != nil {
			return err
		}
	}
	if err := n.addStrangers(ctx); err != nil {
		return err
	}
	if o.Netfilter {
		return n.LoadFlannelRules(ctx)
	}
	return nil
}

// AddKernelPeer makes a peer reachable: neighbour, forwarding entry, route. It
// replaces what is there.
func (n *Node) AddKernelPeer(ctx context.Context, peer *Node) error {
	for _, f := range peer.overlays() {
		if err := n.Run(ctx, fmt.Sprintf("bridge fdb replace %s dev %s dst %s self permanent", f.mac, f.device, f.ip)); err != nil {
			return err
		}
		if err := n.ip(ctx,
			fmt.Sprintf("neighbour replace %s lladdr %s dev %s nud permanent", f.vtep, f.mac, f.device),
			fmt.Sprintf("route replace %s via %s dev %s onlink", f.prefix, f.vtep, f.device),
		); err != nil {
			return err
		}
	}
	return nil
}

// overlay is what a node brings into the overlay of one family.
type overlay struct {
	device   string
	mac      state.MAC
	mtu      int
	ip, vtep netip.Addr
	prefix   netip.Prefix
}

// overlays are those of the lab's families. An outer IPv6 header is 20 bytes
// longer.
func (n *Node) overlays() []overlay {
	return choose(n.lab.Options.Families,
		overlay{n.Overlay(), n.MAC, n.lab.overlayMTU(), n.IP, n.VTEP, n.Prefix},
		overlay{n.OverlayV6(), n.MACv6, n.lab.overlayMTU() - 20, n.IPv6, n.VTEPv6, n.PrefixV6})
}
