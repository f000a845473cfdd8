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
	// Veth is the name of the node's end of the pod's eth0.
	Veth string
}

// newPod makes the Go side of a pod.
func newPod(n *Node, index int) *Pod {
	addr := inPrefix(n.Index, 1+index)
	p := &Pod{Index: index, Node: n, IP: addr, MAC: macOf(addr), Veth: "veth" + strconv.Itoa(index)}
	name := "p" + strconv.Itoa(index)
	p.Space = Space{lab: n.lab, name: n.name + "/" + name, netns: n.netns + "-" + name, holder: n.holder}
	return p
}

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
	return p.ip(ctx,
		"link set lo up",
		fmt.Sprintf("address add %s/%d dev eth0", p.IP, p.Node.Prefix.Bits()),
		"link set eth0 up",
		fmt.Sprintf("route add default via %s dev eth0", p.Node.Gateway),
	)
}

// Destroy deletes the pod: its namespace and, with it, both ends of its veth.
// Rebuild makes it again, with the same address.
func (p *Pod) Destroy() error {
	return removeNamespace(netnsDir + "/" + p.netns)
}

// Rebuild makes the pod that Destroy has deleted.
func (p *Pod) Rebuild(ctx context.Context) error { return p.build(ctx) }
