//go:build linux

package uplink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// Finder finds the uplink in the network namespace of the thread that called
// Open. Its methods may be called from any goroutine.
type Finder struct {
	log       *slog.Logger
	namespace *rtnl.Namespace

	// end ends all watches, with life.
	life context.Context
	end  context.CancelFunc
	// reach is the address that was to be reached at the last Find, if one was;
	// Watch goes by it.
	reach atomic.Pointer[netip.Addr]

	mu    sync.Mutex
	links *netlink.Handle
	// told are the notes of the last Find, so that each is logged once.
	told string
}

// Open opens a Finder of the calling thread's network namespace.
func Open(log *slog.Logger) (*Finder, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	namespace, err := rtnl.OpenNamespace()
	if err != nil {
		return nil, err
	}
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		_ = namespace.Close()
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	f := &Finder{log: log, namespace: namespace, links: links}
	f.life, f.end = context.WithCancel(context.Background())
	f.reach.Store(&netip.Addr{})
	return f, nil
}

// Close lets go of the sockets and ends all watches.
func (f *Finder) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.life.Err() != nil {
		return nil
	}
	f.end()
	f.links.Close()
	return f.namespace.Close()
}

// Find finds the uplink. What is doubtful about the choice, as another interface
// that would have fitted, is logged, once while it stays the same. An error names
// what was looked for, why each try failed, and which interfaces there are.
func (f *Finder) Find(o Options) (Uplink, error) {
	want, err := o.parse()
	if err != nil {
		return Uplink{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.life.Err() != nil {
		return Uplink{}, fmt.Errorf("finding the uplink: %w", os.ErrClosed)
	}
	f.reach.Store(&want.canReach)
	s := search{parsed: want, routes: f}
	if s.host, err = f.read(); err != nil {
		return Uplink{}, err
	}
	up, err := s.find()
	if now := strings.Join(s.notes, "; "); err == nil && now != f.told {
		if f.told = now; now != "" {
			f.log.Warn("the uplink was chosen among several", "uplink", up.Name, "note", now)
		}
	}
	if err != nil {
		return Uplink{}, fmt.Errorf("finding the uplink: %w", err)
	}
	return up, nil
}

// routes is what a search asks the kernel about routes.
type routes interface {
	defaultRoute(v6 bool) (index int, err error)
	routeTo(a netip.Addr) (index int, source netip.Addr, err error)
}

// search is one Find.
type search struct {
	parsed
	host   host
	routes routes
	notes  []string
}

// choice is an interface, and the addresses that it was chosen by, if it was.
type choice struct {
	link
	address, addressV6 netip.Addr
}

// try is one rule.
type try struct {
	// what is the option that asks for it, as an operator would type it.
	what string
	do   func() (choice, error)
}

// find tries the rules one after the other.
func (s *search) find() (Uplink, error) {
	var failures []error
	for _, t := range s.tries() {
		c, err := t.do()
		var up Uplink
		if err == nil {
			up, err = s.uplink(c)
		}
		if err == nil {
			for _, failure := range failures {
				s.notes = append(s.notes, failure.Error())
			}
			return up, nil
		}
		if t.what != "" {
			err = fmt.Errorf("%s: %w", t.what, err)
		}
		failures = append(failures, err)
	}
	return Uplink{}, fmt.Errorf("%w; interfaces here are: %s", joinInLine(failures), s.host)
}

// joinInLine joins errors in one line.
func joinInLine(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	var texts []string
	for _, err := range errs {
		texts = append(texts, err.Error())
	}
	return errors.New(strings.Join(texts, "; "))
}

// tries are the rules that the options ask for.
func (s *search) tries() []try {
	var tries []try
	for _, text := range s.Interfaces {
		what := "--iface " + text
		if a, ok := parseAddr(text); ok {
			tries = append(tries, try{what, func() (choice, error) { return s.byAddress(a) }})
		} else if text == "" {
			tries = append(tries, try{"", s.byDefaultRoute})
		} else {
			tries = append(tries, try{what, func() (choice, error) { return s.byName(text) }})
		}
	}
	for _, expr := range s.regexps {
		if expr == nil {
			tries = append(tries, try{"", s.byDefaultRoute})
		} else {
			tries = append(tries, try{"--iface-regex " + expr.String(), func() (choice, error) { return s.byRegexp(expr) }})
		}
	}
	if s.canReach.IsValid() {
		tries = append(tries, try{"--iface-can-reach " + s.CanReach, s.byRoute})
	}
	switch {
	case len(tries) > 0:
	case s.publicIP.IsValid():
		tries = append(tries, try{"--public-ip " + s.PublicIP, func() (choice, error) { return s.byPublicIP(s.publicIP) }})
	case s.publicIPv6.IsValid():
		tries = append(tries, try{"--public-ipv6 " + s.PublicIPv6, func() (choice, error) { return s.byPublicIP(s.publicIPv6) }})
	default:
		tries = append(tries, try{"", s.byDefaultRoute})
	}
	return tries
}

func (s *search) byName(name string) (choice, error) {
	l, ok := s.host.named(name)
	if !ok {
		return choice{}, errors.New("there is no such interface")
	}
	return choice{link: l}, nil
}

// byAddress takes the interface that has the address. With both families the
// public IPv6 address, where one is given, has to be there too, and is taken.
func (s *search) byAddress(a netip.Addr) (choice, error) {
	if !s.wants(a) {
		return choice{}, errors.New("the overlay has no addresses of this family; give one of the other, or a name")
	}
	l, ok := s.host.holder(a)
	if !ok {
		return choice{}, errors.New("no interface has this address")
	}
	c := choice{link: l}
	if a.Is4() {
		c.address = a
	} else {
		c.addressV6 = a
	}
	if s.IPv4 && s.publicIPv6.IsValid() {
		v6, ok := s.host.holder(s.publicIPv6)
		switch {
		case !ok:
			return choice{}, fmt.Errorf("no interface has the address of --public-ipv6 %s; "+
				"if that is not an address of this node, name the interface with --iface NAME", s.publicIPv6)
		case v6.index != l.index:
			return choice{}, fmt.Errorf("the address is on %s, but that of --public-ipv6 %s on %s; both have to be on one interface",
				l.name, s.publicIPv6, v6.name)
		}
		c.addressV6 = s.publicIPv6
	}
	return c, nil
}

// byPublicIP is byAddress for an address that was given for another purpose.
func (s *search) byPublicIP(a netip.Addr) (choice, error) {
	if _, ok := s.host.holder(a); !ok {
		return choice{}, errors.New("no interface has this address; behind NAT, name the interface that leads to the peers with --iface")
	}
	return s.byAddress(a)
}

// byRegexp takes the first interface that has a matching address of each family,
// else the first whose name matches.
func (s *search) byRegexp(expr *regexp.Regexp) (choice, error) {
	match := func(l link, v6 bool) netip.Addr {
		for _, a := range l.usable {
			if a.Is6() == v6 && expr.MatchString(a.String()) {
				return a
			}
		}
		return netip.Addr{}
	}
	var found []choice
	for _, l := range s.host.links {
		c := choice{link: l}
		if s.IPv4 {
			c.address = match(l, false)
		}
		if s.IPv6 {
			c.addressV6 = match(l, true)
		}
		if c.address.IsValid() == s.IPv4 && c.addressV6.IsValid() == s.IPv6 {
			found = append(found, c)
		}
	}
	if len(found) == 0 {
		for _, l := range s.host.links {
			if expr.MatchString(l.name) {
				found = append(found, choice{link: l})
			}
		}
	}
	if len(found) == 0 {
		return choice{}, errors.New("no interface has a name or an address that matches")
	}
	if len(found) > 1 {
		var others []string
		for _, c := range found[1:] {
			others = append(others, c.link.String())
		}
		s.notes = append(s.notes, fmt.Sprintf("--iface-regex %s matches %s, which comes first, and also %s",
			expr, found[0].name, strings.Join(others, ", ")))
	}
	return found[0], nil
}

// byRoute takes the interface that leads to the address that shall be reached.
func (s *search) byRoute() (choice, error) {
	index, source, err := s.routes.routeTo(s.canReach)
	if err != nil {
		return choice{}, err
	}
	l, ok := s.host.indexed(index)
	if !ok {
		return choice{}, fmt.Errorf("its interface, with index %d, is gone", index)
	}
	c := choice{link: l}
	// For IPv6 flannel takes the interface's preferred address nevertheless.
	if s.canReach.Is4() {
		c.address = source
	}
	return c, nil
}

// byDefaultRoute takes the interface of the default routes of all families.
func (s *search) byDefaultRoute() (choice, error) {
	var found choice
	for _, v6 := range []bool{false, true} {
		if v6 && !s.IPv6 || !v6 && !s.IPv4 {
			continue
		}
		index, err := s.routes.defaultRoute(v6)
		if err != nil {
			return choice{}, err
		}
		l, ok := s.host.indexed(index)
		switch {
		case !ok:
			return choice{}, fmt.Errorf("the default route's interface, with index %d, is gone", index)
		case found.index != 0 && found.index != l.index:
			return choice{}, fmt.Errorf("the IPv4 default route leads to %s, the IPv6 one to %s; name one of them with --iface", found.name, l.name)
		}
		found = choice{link: l}
	}
	return found, nil
}

// uplink fills in what a choice leaves open.
func (s *search) uplink(c choice) (Uplink, error) {
	up := Uplink{Name: c.name, Index: c.index, MTU: c.mtu}
	if c.loopback {
		return up, fmt.Errorf("%s is the loopback interface, which leads to no other node", c.name)
	}
	if c.mtu == 0 {
		return up, fmt.Errorf("interface %s has no MTU", c.name)
	}
	var err error
	if s.IPv4 {
		if up.Address, up.PublicIP, err = s.addresses(c, false, c.address, s.publicIP); err != nil {
			return up, err
		}
	}
	if s.IPv6 {
		if up.AddressV6, up.PublicIPv6, err = s.addresses(c, true, c.addressV6, s.publicIPv6); err != nil {
			return up, err
		}
	}
	return up, nil
}

// addresses says from which address packets of a family are sent, and where
// peers shall send theirs.
//
// Flannel sends from the public IP whatever it is. That works where it is this
// node's own; behind NAT the kernel refuses to send from it, so we take the
// interface's there.
func (s *search) addresses(c choice, v6 bool, chosen, given netip.Addr) (address, publicIP netip.Addr, err error) {
	if address = chosen; !address.IsValid() {
		address = c.first(v6)
	}
	switch {
	case !address.IsValid() && v6:
		return address, publicIP, fmt.Errorf("interface %s has no usable IPv6 address", c.name)
	case !address.IsValid():
		return address, publicIP, fmt.Errorf("interface %s has no usable IPv4 address", c.name)
	case !given.IsValid():
		return address, address, nil
	}
	if _, ours := s.host.holder(given); ours {
		address = given
	}
	return address, given, nil
}
