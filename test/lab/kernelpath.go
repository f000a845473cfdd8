//go:build linux

package lab

import (
	"context"
	"fmt"
)

// buildKernelOverlay makes a stock flannel node's kernel state with nothing
// but iproute2, so that weft has a peer that is not weft.
func (n *Node) buildKernelOverlay(ctx context.Context) error {
	o, dev := n.lab.Options, n.Overlay()
	if err := n.ip(ctx,
		fmt.Sprintf("link add %s address %s mtu %d type vxlan id %d local %s dev eth0 dstport %d nolearning",
			dev, n.MAC, n.lab.overlayMTU(), o.VNI, n.IP, o.Port),
		fmt.Sprintf("address add %s/32 dev %s", n.VTEP, dev),
		fmt.Sprintf("link set %s up", dev),
	); err != nil {
		return err
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
	dev := n.Overlay()
	if err := n.Run(ctx, fmt.Sprintf("bridge fdb replace %s dev %s dst %s self permanent", peer.MAC, dev, peer.IP)); err != nil {
		return err
	}
	return n.ip(ctx,
		fmt.Sprintf("neighbour replace %s lladdr %s dev %s nud permanent", peer.VTEP, peer.MAC, dev),
		fmt.Sprintf("route replace %s via %s dev %s onlink", peer.Prefix, peer.VTEP, dev),
	)
}
