// Package hostrules is the host's masquerading and forwarding of the overlay:
// the rules that flannel makes with --ip-masq and --iptables-forward-rules, text
// for text, so that whoever reads iptables-save or nft list can't tell the two
// apart, and either may take over from the other without a packet noticing.
//
// There are two modes. In iptables mode each family has
//
//   - in table nat, chain FLANNEL-POSTRTG and a jump to it in POSTROUTING: pods
//     keep their address among each other, and get the node's towards the world;
//   - in table filter, chain FLANNEL-FWD and a jump to it in FORWARD: what comes
//     from or goes to the overlay is accepted, whatever Docker's policy says.
//
// In nftables mode (EnableNFTables) tables "ip flannel-ipv4" and "ip6
// flannel-ipv6" hold the same as base chains postrtg and forward.
//
// iptables comes in two flavours that don't see each other, nft and legacy.
// Rules belong where the host's other rules are; flavour.go says how that is
// found out. Its programs are run with arguments, never by a shell; nftables is
// spoken to by netlink, without a program.
//
// What a Sync does is what flannel does when it starts and then every
// --iptables-resync seconds, but for this:
//
//   - Each change is one transaction per table: no packet meets a chain half
//     done, or empty. Where nothing differs nothing is written.
//   - The order of the rules is checked too, not only that each exists.
//   - nftables mode is repaired as well; flannel writes it once.
//   - Rules that are not wanted any more go: those of a flag that was switched
//     off, of a family that is gone, of a former subnet.
//   - When the mode or the flavour changes, the old rules go completely, and only
//     after the new ones are in force. Flannel leaves an empty FLANNEL-POSTRTG and
//     all of FLANNEL-FWD, and looks at the other iptables flavour never.
//
// As flannel does: the jumps are appended, so they come after what kube-proxy and
// Docker insert; at the first Sync a jump that has something behind it is moved
// to the end, and flannel's chains are cleared of what others have put in. Later,
// the rules of others in them are left alone, also when ours are repaired: ours
// then stand behind them. So is the place of a jump that is there.
package hostrules

import (
	"errors"
	"fmt"
	"net/netip"
)

// Desired says what rules the host shall have.
type Desired struct {
	// Networks are the overlay's networks, at most one a family. A family
	// without one gets no rules.
	Networks []netip.Prefix
	// Prefixes are this node's pod prefixes, at most one a family. A family
	// without one has no pods here, and nothing to masquerade.
	Prefixes []netip.Prefix
	// Masquerade is --ip-masq.
	Masquerade bool
	// OrderedPorts is --ip-masq-fully-random-disable: masqueraded connections
	// get source ports in the kernel's usual order, not random ones.
	OrderedPorts bool
	// Forward is --iptables-forward-rules.
	Forward bool
	// NFTables is EnableNFTables of net-conf.json: tables of our own rather
	// than chains in those of iptables.
	NFTables bool
	// Blackhole is --ip-blackhole-route: what is for a pod that is not there
	// ends here, where no bridge has a route for the node's prefix.
	Blackhole bool
}

// family is what differs between IPv4 and IPv6.
type family struct {
	ipv6      bool
	number    byte   // NFPROTO_
	word      string // in nftables
	table     string // of flannel in nftables mode
	program   string // of iptables
	multicast netip.Prefix
	// legacyTables lists the tables that iptables-legacy has in the calling
	// thread's network namespace.
	legacyTables string
	// Where the addresses are in a header, and how long it makes them.
	sourceOffset, destinationOffset, addressSize uint32
}

// The families, in the order in which flannel goes through them.
var (
	ipv4 = &family{
		number: 2, word: "ip", table: "flannel-ipv4", program: "iptables",
		multicast: netip.MustParsePrefix("224.0.0.0/4"), legacyTables: "/proc/thread-self/net/ip_tables_names",
		sourceOffset: 12, destinationOffset: 16, addressSize: 4,
	}
	ipv6 = &family{
		ipv6: true, number: 10, word: "ip6", table: "flannel-ipv6", program: "ip6tables",
		multicast: netip.MustParsePrefix("ff00::/8"), legacyTables: "/proc/thread-self/net/ip6_tables_names",
		sourceOffset: 8, destinationOffset: 24, addressSize: 16,
	}
	families = []*family{ipv4, ipv6}
)

// wanted is Desired checked, with each family's prefixes in their place. It is
// comparable.
type wanted struct {
	v4, v6                            prefixes
	masquerade, orderedPorts, forward bool
	nftables, blackhole               bool
}

// prefixes are a family's. The zero Prefix stands for none.
type prefixes struct{ network, own netip.Prefix }

// of gives a family's prefixes.
func (w wanted) of(f *family) prefixes {
	if f.ipv6 {
		return w.v6
	}
	return w.v4
}

// check makes wanted of Desired, or says all that is wrong with it.
func (d Desired) check() (wanted, error) {
	w := wanted{
		masquerade: d.Masquerade, orderedPorts: d.OrderedPorts, forward: d.Forward,
		nftables: d.NFTables, blackhole: d.Blackhole,
	}
	var errs []error
	place := func(what string, list []netip.Prefix, at func(*prefixes) *netip.Prefix) {
		for _, p := range list {
			if !p.IsValid() || p.Addr().Is4In6() || p.Bits() == 0 {
				errs = append(errs, fmt.Errorf("%s %q is no prefix to make rules for", what, p))
				continue
			}
			slot := at(&w.v4)
			if p.Addr().Is6() {
				slot = at(&w.v6)
			}
			if p = p.Masked(); slot.IsValid() && *slot != p {
				errs = append(errs, fmt.Errorf("%s %s beside %s: give one a family", what, p, *slot))
				continue
			}
			*slot = p
		}
	}
	place("network", d.Networks, func(p *prefixes) *netip.Prefix { return &p.network })
	place("pod prefix", d.Prefixes, func(p *prefixes) *netip.Prefix { return &p.own })
	if len(d.Networks) == 0 {
		errs = append(errs, errors.New("no network is known, so neither are the rules for it"))
	}
	return w, errors.Join(errs...)
}
