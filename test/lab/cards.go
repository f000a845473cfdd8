//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/test/netns"
)

// Cards are devices of the machine that are cabled to each other, through a switch
// or not, and that nobody uses. While a lab is up they are in its nodes, as eth0; then
// they are back, down and under their names, with the MTU that the lab had. They keep
// their MAC addresses.
//
// Stores, and the world outside, are in the underlay all the same, which each node
// reaches by a device of its own, store0.

// carrierTimeout is how long cards may take until they see each other.
const carrierTimeout = 15 * time.Second

// OnCards are the options of a lab whose wire brings whole checksums: over the cards
// that the environment names, one for each of two nodes (netns.Cards), or else Summed.
func (o Options) OnCards() Options {
	o.Underlay = Summed
	if cards := netns.Cards(); len(cards) > 1 {
		o.Underlay, o.Cards = Cards, cards[:2]
	}
	return o
}

// cardFaults are what is wrong with the cards of a lab's options.
func (o Options) cardFaults() (errs []error) {
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if (o.Underlay == Cards) != (len(o.Cards) > 0) {
		wrong("underlay %s and cards %q: cards are named for that underlay, and for no other", o.Underlay, o.Cards)
	}
	if len(o.Cards) == 0 {
		return errs
	}
	if len(o.Cards) != o.Nodes {
		wrong("%d cards for %d nodes: give one for each", len(o.Cards), o.Nodes)
	}
	seen := map[string]bool{}
	for _, card := range o.Cards {
		if seen[card] {
			wrong("card %s is there twice: nodes can't share it", card)
		}
		seen[card] = true
		if err := unused(card); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// unused makes sure that a device is there and in nobody's use: it has no address but
// those that IPv6 gives by itself, is no part of another device, and none is on it.
func unused(card string) error {
	link, err := netlink.LinkByName(card)
	if err != nil {
		return fmt.Errorf("card %s: %w", card, err)
	}
	if link.Attrs().MasterIndex != 0 {
		return fmt.Errorf("card %s is in use: it is part of device %d", card, link.Attrs().MasterIndex)
	}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("addresses of card %s: %w", card, err)
	}
	for _, a := range addresses {
		if !a.IP.IsLinkLocalUnicast() {
			return fmt.Errorf("card %s is in use: it has the address %s; choose another, or take the address away", card, a.IPNet)
		}
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("what is on card %s: %w", card, err)
	}
	for _, l := range links {
		// The parent of a veth is its other end.
		if l.Type() != "veth" && l.Attrs().ParentIndex == link.Attrs().Index {
			return fmt.Errorf("card %s is in use: device %s (%s) is on it", card, l.Attrs().Name, l.Type())
		}
	}
	return nil
}

// plugInCard makes a card the node's eth0, and leads store0 to the underlay.
func (n *Node) plugInCard(ctx context.Context) error {
	if err := n.lab.Underlay.ip(ctx,
		fmt.Sprintf("link add %s type veth peer name store0 netns %s", n.name, n.netns),
		fmt.Sprintf("link set %s master br0 up", n.name),
	); err != nil {
		return err
	}
	if err := netns.MoveCard("", n.lab.Options.Cards[n.Index-1], filepath.Join(netnsDir, n.netns), "eth0"); err != nil {
		return err
	}
	commands := []string{
		fmt.Sprintf("link set eth0 mtu %d up", n.lab.Options.MTU),
		"link set store0 up",
	}
	if n.lab.Options.Families.Has4() {
		commands = append(commands,
			fmt.Sprintf("address add %s%s dev eth0", n.IP, underlayBits),
			fmt.Sprintf("route add %s/32 dev store0 src %s", Gateway, n.IP),
			fmt.Sprintf("route add default via %s dev store0 src %s", Gateway, n.IP))
	}
	if n.lab.Options.Families.Has6() {
		commands = append(commands,
			fmt.Sprintf("address add %s%s dev eth0 nodad", n.IPv6, underlayBitsV6),
			fmt.Sprintf("route add %s/128 dev store0 src %s", GatewayV6, n.IPv6),
			fmt.Sprintf("route add default via %s dev store0 src %s", GatewayV6, n.IPv6))
	}
	return n.ip(ctx, commands...)
}

// waitForCards waits until all cards have a carrier, which a real one takes seconds
// for, and the nodes see each other.
func (l *Lab) waitForCards(ctx context.Context) error {
	if l.Options.Underlay != Cards {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, Patient(carrierTimeout), errors.New("no answer"))
	defer cancel()
	for _, n := range l.Nodes {
		for _, peer := range n.Peers() {
			for n.Run(ctx, "ping -c 1 -W 1 -q "+peer.Addresses()[0].String()) != nil {
				if err := sleep(ctx, 200*time.Millisecond); err != nil {
					return fmt.Errorf("%s does not reach %s: are cards %s cabled to each other? %w",
						n, peer, strings.Join(l.Options.Cards, " and "), context.Cause(ctx))
				}
			}
		}
	}
	return nil
}

// releaseCards gives cards back to the machine. What is not there any more is no
// error: the kernel gives back by itself what was in a namespace that ends.
func (o Options) releaseCards() error {
	var errs []error
	for i, card := range o.Cards {
		ns := fmt.Sprintf("%s-n%d", o.Name, i+1)
		if exec.Command("ip", "-n", ns, "link", "show", "eth0").Run() == nil {
			errs = append(errs, netns.MoveCard(filepath.Join(netnsDir, ns), "eth0", netns.Here(), card))
		}
	}
	return errors.Join(errs...)
}
