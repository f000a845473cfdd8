// Package uplink finds the network interface that carries the underlay, and
// which of its addresses, by the rules of flannel's options --iface,
// --iface-regex, --iface-can-reach, --public-ip and --public-ipv6.
//
// In this order, and the first that fits is taken:
//
//  1. Interfaces: names or addresses of interfaces.
//  2. Regexps: one that matches an address, else one that matches a name.
//  3. CanReach: where `ip route get` leads.
//  4. With none of these given, the interface that has the public IP.
//  5. Without that either, the interface of the default route. With both
//     families it has to be the same for both.
//
// Of an interface that was not chosen by an address the preferred one is taken:
// a global one rather than a link-local one, then a permanent one, then one that
// is neither secondary (IPv4) nor temporary (IPv6), then the kernel's first.
// Deprecated ones never.
//
// Where flannel's rules lead nowhere ours differ: loopback is never taken; an IPv6
// address in Interfaces names its interface with both families too, where flannel
// ends in a panic; a regular expression is never satisfied by one interface's name
// and another's address; CanReach with an IPv6 address says the interface, and not
// the IPv4 address; a public IP of a family that is not wanted is ignored. And
// packets are sent from the public IP only where it is this node's.
package uplink

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
)

// Options say which interface it shall be. The zero Options but for a family are
// those of a flanneld without flags.
type Options struct {
	// Interfaces are names or addresses of interfaces, in the order in which they
	// are tried. An empty one is the default route's.
	Interfaces []string
	// Regexps are regular expressions for addresses or names of interfaces, as
	// for Interfaces.
	Regexps []string
	// CanReach is an address: the interface is the one that packets to it leave
	// by. Empty is none.
	CanReach string
	// PublicIP and PublicIPv6 are the addresses that peers shall send to. Empty
	// is the interface's own. One of a family that is not wanted is ignored.
	PublicIP, PublicIPv6 string
	// IPv4 and IPv6 tell which families the overlay has.
	IPv4, IPv6 bool
}

// Uplink is the interface that was found.
type Uplink struct {
	Name  string
	Index int
	// MTU is in bytes.
	MTU int
	// Address and AddressV6 are the addresses that packets are sent from: the
	// public IP where that is this node's, else the interface's address. A family
	// that is not wanted has the zero Addr, here and in the public IPs.
	Address, AddressV6 netip.Addr
	// PublicIP and PublicIPv6 are the addresses that peers shall send to.
	PublicIP, PublicIPv6 netip.Addr
}

// Validate reports all that is wrong with the options themselves.
func (o Options) Validate() error {
	_, err := o.parse()
	return err
}

// parsed are options as values.
type parsed struct {
	Options
	regexps              []*regexp.Regexp // nil for an empty one
	canReach             netip.Addr
	publicIP, publicIPv6 netip.Addr
}

func (o Options) parse() (parsed, error) {
	p := parsed{Options: o}
	var errs []error
	fault := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !o.IPv4 && !o.IPv6 {
		fault("neither IPv4 nor IPv6 is wanted; turn on at least one of them")
	}
	for _, text := range o.Regexps {
		var expr *regexp.Regexp
		if text != "" {
			var err error
			if expr, err = regexp.Compile(text); err != nil {
				fault("--iface-regex %q is not a regular expression: %w", text, err)
			}
		}
		p.regexps = append(p.regexps, expr)
	}
	var ok bool
	if o.CanReach != "" {
		if p.canReach, ok = parseAddr(o.CanReach); !ok {
			fault("--iface-can-reach %q is not an IP address", o.CanReach)
		}
	}
	if o.PublicIP != "" {
		if p.publicIP, ok = parseAddr(o.PublicIP); !ok || !p.publicIP.Is4() {
			fault("--public-ip %q is not an IPv4 address", o.PublicIP)
		}
	}
	if o.PublicIPv6 != "" {
		if p.publicIPv6, ok = parseAddr(o.PublicIPv6); !ok || !p.publicIPv6.Is6() {
			fault("--public-ipv6 %q is not an IPv6 address", o.PublicIPv6)
		}
	}
	if !o.IPv4 {
		p.publicIP = netip.Addr{}
	}
	if !o.IPv6 {
		p.publicIPv6 = netip.Addr{}
	}
	return p, errors.Join(errs...)
}

// wants reports whether an address is of a family that is wanted.
func (o Options) wants(a netip.Addr) bool { return a.Is4() && o.IPv4 || a.Is6() && o.IPv6 }

// parseAddr reads an address as flannel does: without a zone, and an IPv4 address
// in IPv6 form is an IPv4 address.
func parseAddr(text string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(text)
	return a.Unmap(), err == nil && a.Zone() == ""
}
