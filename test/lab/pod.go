//go:build linux

package lab

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/weft-net/weft/dataplane/state"
)

// Pod is a network namespace on a node's bridge.
type Pod struct {
	Space
	// Index counts from 1.
	Index int
	Node  *Node
	IP    netip.Addr
	MAC   state.MAC
	// IPv6 is the plan's, as of nodes.
	IPv6 netip.Addr
	// Veth is the name of the node's end of the pod's eth0.
	Veth string
}

// newPod makes the Go side of a pod.
func newPod(n *Node, index int) *Pod {
	p := &Pod{Index: index, Node: n, Veth: "veth" + strconv.Itoa(index)}
	p.useAddresses()
	name := "p" + strconv.Itoa(index)
	p.Space = Space{lab: n.lab, name: n.name + "/" + name, netns: n.netns + "-" + name, holder: n.holder}
	return p
}

// useAddresses gives the pod its addresses of the node's prefixes.
func (p *Pod) useAddresses() {
	p.IP, p.IPv6 = inPrefix(p.Node.Prefix, 1+p.Index), inPrefix(p.Node.PrefixV6, 1+p.Index)
	p.MAC = macOf(p.IP)
}

// Addresses are those of the pod's eth0, IPv4 first.
func (p *Pod) Addresses() []netip.Addr { return choose(p.lab.Options.Families, p.IP, p.IPv6) }

// build makes the pod's namespace and connects it, as flannel's CNI plugin
// does (hairpin mode included).
func (p *Pod) build(ctx context.Context) error {
	if err := newNamespace(p.netns); err != nil {
		return err
	}
	mtu := p.lab.overlayMTU()
	// The commands run outside of the node's mounts, where the names of the
	// pods' namespaces are.
	node := Space{lab: p.lab, name: p.Node.name, netns: p.Node.netns}
	if err := node.ip(ctx,
		fmt.Sprintf("link add %s mtu %d type veth peer name eth0 mtu %d address %s netns %s", p.Veth, mtu, mtu, p.MAC, p.netns),
		fmt.Sprintf("link set %s master cni0 up", p.Veth),
		fmt.Sprintf("link set %s type bridge_slave hairpin on", p.Veth),
	); err != nil {
		return err
	}
	commands := []string{"link set lo up", "link set eth0 up"}
	if p.lab.Options.Families.Has4() {
		commands = append(commands,
			fmt.Sprintf("address add %s/%d dev eth0", p.IP, p.Node.Prefix.Bits()),
			fmt.Sprintf("route add default via %s dev eth0", p.Node.Gateway))
	}
	if p.lab.Options.Families.Has6() {
		commands = append(commands,
			fmt.Sprintf("address add %s/%d dev eth0 nodad", p.IPv6, p.Node.PrefixV6.Bits()),
			fmt.Sprintf("route add default via %s dev eth0", p.Node.GatewayV6))
	}
	return p.ip(ctx, commands...)
}

// Destroy deletes the pod: its namespace and, with it, both ends of its veth.
// Rebuild makes it again, with the same address.
func (p *Pod) Destroy() error {
	return removeNamespace(netnsDir + "/" + p.netns)
}

// Rebuild makes the pod that Destroy has deleted.
func (p *Pod) Rebuild(ctx context.Context) error { return p.build(ctx) }
