//go:build linux

package lab

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
)

// buildUnderlay makes the namespace that the nodes' uplinks meet in. Its
// bridge carries an address too, so that it can play the world outside.
func (l *Lab) buildUnderlay(ctx context.Context) error {
	l.logf("underlay %s (%s, MTU %d)", l.Underlay.netns, l.Options.Underlay, l.Options.MTU)
	if err := newNamespace(l.Underlay.netns); err != nil {
		return err
	}
	// A cable does not run netfilter over what it carries.
	for _, family := range []string{"ip", "ip6", "arp"} {
		if err := l.Underlay.Sysctl("net/bridge/bridge-nf-call-"+family+"tables", "0"); err != nil {
			l.logf("underlay: %v (no bridge netfilter, none to turn off)", err)
			break
		}
	}
	commands := []string{
		"link set lo up",
		fmt.Sprintf("link add br0 address %s mtu %d type bridge stp_state 0 mcast_snooping 0", macOf(Gateway), l.Options.MTU),
		"link set br0 up",
	}
	if l.Options.Families.Has4() {
		commands = append(commands, fmt.Sprintf("address add %s%s dev br0", Gateway, underlayBits))
	}
	if l.Options.Families.Has6() {
		commands = append(commands, fmt.Sprintf("address add %s%s dev br0 nodad", GatewayV6, underlayBitsV6))
	}
	return l.Underlay.ip(ctx, commands...)
}

// Gateway is the underlay's own address, of the family that all nodes have.
func (l *Lab) Gateway() netip.Addr {
	if l.Options.Families.Has4() {
		return Gateway
	}
	return GatewayV6
}

// plugIn joins a node's eth0 to the underlay. The other end is a port of br0
// that has the node's name.
func (n *Node) plugIn(ctx context.Context) error {
	if n.lab.Options.Underlay == Cards {
		return n.plugInCard(ctx)
	}
	mtu := n.lab.Options.MTU
	if err := n.lab.Underlay.ip(ctx,
		fmt.Sprintf("link add %s mtu %d type veth peer name eth0 mtu %d address %s netns %s", n.name, mtu, mtu, macOf(n.IP), n.netns),
		fmt.Sprintf("link set %s master br0 up", n.name),
	); err != nil {
		return err
	}
	if n.lab.Options.Underlay != Virtual {
		features := wireFeatures
		if n.lab.Options.Underlay == Summed {
			features += " tx off"
		}
		if err := n.Run(ctx, features); err != nil {
			return err
		}
		if err := n.lab.Underlay.Run(ctx, "ethtool -K "+n.name+" tso off"); err != nil {
			return err
		}
	}
	return n.ip(ctx, append([]string{"link set eth0 up"}, n.uplinkAddresses()...)...)
}

// uplinkAddresses are the commands that give eth0 its addresses and the node its
// default routes.
func (n *Node) uplinkAddresses() (commands []string) {
	if n.lab.Options.Families.Has4() {
		commands = append(commands,
			fmt.Sprintf("address add %s%s dev eth0", n.IP, underlayBits),
			fmt.Sprintf("route replace default via %s dev eth0", Gateway))
	}
	if n.lab.Options.Families.Has6() {
		commands = append(commands,
			fmt.Sprintf("address add %s%s dev eth0 nodad", n.IPv6, underlayBitsV6),
			fmt.Sprintf("route replace default via %s dev eth0", GatewayV6))
	}
	return commands
}

// wireFeatures make eth0 cut what it sends into packets of its MTU and merge
// what it receives, like a network card without tunnel offloads. The packets are
// cut before they enter the veth pair; they are merged only if the port of the
// bridge that sends them to eth0 has no TSO (veth_skb_is_eligible_for_gro in
// drivers/net/veth.c), and that port does not merge by itself.
var wireFeatures = strings.Join([]string{
	"ethtool -K eth0",
	"tso off tx-udp-segmentation off",
	"tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off",
	"gro on",
}, " ")
