package static

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/weft-net/weft/dataplane/state"
)

// Bounds of a file. At 150 bytes a peer the most peers make half the most bytes.
const (
	MaxSize  = 32 << 20
	MaxPeers = 100_000
)

// What the file may leave out.
const (
	defaultVNI  = 1    // flannel's
	defaultPort = 8472 // flannel's on Linux
	defaultMTU  = 0    // follow the uplink
)

// Parse reads a file's content. Faults come back together as one *Error, whose
// lines name the file as path.
func Parse(path string, data []byte) (state.State, error) {
	var f faults
	if len(data) > MaxSize {
		f.add(1, "the file has %d bytes; the limit is %d", len(data), MaxSize)
		return state.State{}, f.err(path)
	}
	d := readDocument(data, &f)
	if d.line == 0 {
		return state.State{}, f.err(path)
	}
	c := checker{faults: &f}
	s := c.state(d)
	if err := f.err(path); err != nil {
		return state.State{}, err
	}
	s.Sort()
	return s, nil
}

// checker turns the texts of a document into a state and notes what is wrong
// with them. What was wrong in shape is not reported again.
type checker struct {
	faults *faults
	// publicIP is this node's address; it decides the family of everything.
	publicIP netip.Addr
	networks []netip.Prefix
	// What was seen so far, to find it given twice.
	names     map[string]place
	publicIPs map[netip.Addr]place
	macs      map[state.MAC]place
	prefixes  []claim
}

// place is a thing in the file: what it is called there, and its line.
type place struct {
	what string
	line int
}

// claim is a pod prefix and who has it.
type claim struct {
	prefix netip.Prefix
	place  place
}

// state checks d from top to bottom.
func (c *checker) state(d document) state.State {
	c.names = map[string]place{}
	c.publicIPs = map[netip.Addr]place{}
	c.macs = map[state.MAC]place{}

	var s state.State
	s.Local.Uplink = c.uplink(d)
	c.publicIP = c.address(d.publicIP, d.line, "publicIP", "give this node's address on the underlay")
	s.VNI = uint32(c.number(d.vni, "vni", defaultVNI, 1, 1<<24-1, "flannel's default is 1"))
	s.Port = uint16(c.number(d.port, "port", defaultPort, 1, 65535, "flannel's default is 8472"))
	s.Local.MTU = c.mtu(d.mtu)
	s.Networks = c.network(d)
	if !d.nodeGiven {
		c.faults.add(d.line, "node is missing; give this node's name and prefixes")
	} else if d.node.usable {
		c.node(d.node, &s.Local)
	}
	for i, e := range d.peers {
		if e.usable {
			s.Peers = append(s.Peers, c.peer(e, i)...)
		}
	}
	c.overlaps()
	return s
}

// linkName is what the kernel takes as an interface name, less what nobody means.
var linkName = regexp.MustCompile(`^[A-Za-z0-9_.@-]{1,15}$`)

// uplink checks the interface.
func (c *checker) uplink(d document) string {
	text, ok := c.required(d.uplink, d.line, "interface", "name the interface that carries the underlay, as in eth0")
	if ok && (!linkName.MatchString(text) || text == "." || text == "..") {
		c.faults.add(d.uplink.line, "interface: %s is no interface name; `ip link` lists them", quote(text))
	}
	return text
}

// mtu checks the MTU: no less than the family's smallest.
func (c *checker) mtu(s scalar) int {
	smallest, family := 68, "IPv4"
	if c.publicIP.Is6() {
		smallest, family = 1280, "IPv6"
	}
	if s.text == "0" {
		return 0
	}
	hint := fmt.Sprintf("or 0 to follow the uplink; %d is the least that %s allows", smallest, family)
	return c.number(s, "mtu", defaultMTU, smallest, 65535, hint)
}

// network checks the overlay's networks.
func (c *checker) network(d document) []netip.Prefix {
	if !d.networks.given {
		c.faults.add(d.line, "network is missing; give the overlay's network, as in [10.244.0.0/16]")
		return nil
	}
	var networks []netip.Prefix
	for i, s := range d.networks.values {
		what := fmt.Sprintf("network[%d]", i)
		if p, ok := c.prefix(s, what); ok {
			networks = append(networks, p)
		}
	}
	switch {
	case d.networks.usable && len(d.networks.values) == 0:
		c.faults.add(d.networks.line, "network is an empty list; give the overlay's network, as in [10.244.0.0/16]")
	case len(networks) > 1:
		c.faults.add(d.networks.line, "network has %d entries; give one that holds all pod prefixes", len(networks))
	}
	for _, n := range networks {
		if c.publicIP.IsValid() && n.Contains(c.publicIP) {
			c.faults.add(d.publicIP.line, "publicIP: %s lies inside the overlay's network %s; give the address on the underlay", c.publicIP, n)
		}
	}
	if len(networks) == len(d.networks.values) {
		c.networks = networks
	}
	return networks
}

// node checks this node.
func (c *checker) node(e entry, local *state.Local) {
	local.Node = c.name(e, "node")
	local.Prefixes = c.podPrefixes(e, "node")
	if len(local.Prefixes) > 1 {
		c.faults.add(e.prefixes.line, "node.prefixes has %d entries; a node has one pod prefix per family, and this file carries one family", len(local.Prefixes))
	}
	mac := c.mac(e.mac, "node.mac")
	if c.publicIP.Is6() {
		local.PublicIPv6, local.MACv6 = c.publicIP, mac
	} else {
		local.PublicIP, local.MAC = c.publicIP, mac
	}
}

// peer checks one peer, which becomes one state.Peer per prefix.
func (c *checker) peer(e entry, index int) []state.Peer {
	what := fmt.Sprintf("peers[%d]", index)
	if e.name.usable {
		what += fmt.Sprintf(" (%s)", quote(e.name.text))
	}
	name := c.name(e, what)
	publicIP := c.peerAddress(e, what)
	if !e.mac.given {
		c.faults.add(e.line, "%s: mac is missing; nothing discovers it here: give the address of the peer's overlay device (`ip link show flannel.1` there)", what)
	}
	mac := c.mac(e.mac, what+" mac")

	var peers []state.Peer
	for _, p := range c.podPrefixes(e, what) {
		peers = append(peers, state.Peer{Node: name, Prefix: p, PublicIP: publicIP, MAC: mac})
	}
	return peers
}

// peerAddress checks a peer's publicIP: of our family, not ours, nobody else's.
func (c *checker) peerAddress(e entry, what string) netip.Addr {
	ip := c.address(e.publicIP, e.line, what+" publicIP", "give the peer's address on the underlay")
	if !ip.IsValid() {
		return ip
	}
	switch earlier, twice := c.publicIPs[ip]; {
	case ip == c.publicIP:
		c.faults.add(e.publicIP.line, "%s publicIP: %s is this node's own; leave this node out of peers", what, ip)
	case c.publicIP.IsValid() && ip.Is4() != c.publicIP.Is4():
		c.faults.add(e.publicIP.line, "%s publicIP: %s is %s, but this node's publicIP %s is %s; one file carries one family", what, ip, family(ip), c.publicIP, family(c.publicIP))
	case twice:
		c.faults.add(e.publicIP.line, "%s publicIP: %s belongs to %s (line %d) already; put all prefixes of a node under one entry", what, ip, earlier.what, earlier.line)
	}
	for _, n := range c.networks {
		if n.Contains(ip) {
			c.faults.add(e.publicIP.line, "%s publicIP: %s lies inside the overlay's network %s; give the address on the underlay", what, ip, n)
		}
	}
	c.publicIPs[ip] = place{what, e.publicIP.line}
	return ip
}

// nodeName is a host name: it is shown on terminals and in metrics.
var nodeName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$`)

// name checks the name of a node, which nobody else may have.
func (c *checker) name(e entry, what string) string {
	name, ok := c.required(e.name, e.line, what+" name", "name the node")
	if !ok {
		return ""
	}
	if !nodeName.MatchString(name) {
		c.faults.add(e.name.line, "%s name: %s is no host name; use up to 253 letters, digits, dots and dashes", what, quote(name))
		return ""
	}
	if earlier, twice := c.names[name]; twice {
		c.faults.add(e.name.line, "%s name: %q is the name of %s (line %d) already; names must differ", what, name, earlier.what, earlier.line)
	}
	c.names[name] = place{what, e.name.line}
	return name
}

// mac checks a MAC address, which nobody else may have. It may be left out.
func (c *checker) mac(s scalar, what string) state.MAC {
	if !s.usable {
		return state.MAC{}
	}
	mac, err := state.ParseMAC(s.text)
	if err != nil {
		c.faults.add(s.line, "%s: %s is no MAC address of one device; write it as 0a:58:0a:f4:01:00", what, quote(s.text))
		return state.MAC{}
	}
	if earlier, twice := c.macs[mac]; twice {
		c.faults.add(s.line, "%s: %s is the %s (line %d) already; every overlay device needs its own", what, mac, earlier.what, earlier.line)
	}
	c.macs[mac] = place{what, s.line}
	return mac
}

// podPrefixes checks the pod prefixes of a node.
func (c *checker) podPrefixes(e entry, what string) []netip.Prefix {
	if !e.prefixes.given {
		c.faults.add(e.line, "%s: prefixes is missing; give the node's pod prefix, as in [10.244.1.0/24]", what)
		return nil
	}
	if e.prefixes.usable && len(e.prefixes.values) == 0 {
		c.faults.add(e.prefixes.line, "%s: prefixes is an empty list; give the node's pod prefix, as in [10.244.1.0/24]", what)
	}
	var prefixes []netip.Prefix
	for i, s := range e.prefixes.values {
		where := fmt.Sprintf("%s prefixes[%d]", what, i)
		p, ok := c.prefix(s, where)
		if !ok || !c.podPrefix(p, s.line, where) {
			continue
		}
		prefixes = append(prefixes, p)
		c.prefixes = append(c.prefixes, claim{p, place{what, s.line}})
	}
	return prefixes
}

// podPrefix checks that a prefix can be a node's: it lies inside the network
// and has room for the overlay device, the gateway and a pod.
func (c *checker) podPrefix(p netip.Prefix, line int, what string) bool {
	longest := 30
	if p.Addr().Is6() {
		longest = 126
	}
	if p.Bits() > longest {
		c.faults.add(line, "%s: %s has no room for a gateway and pods; give /%d or shorter", what, p, longest)
		return false
	}
	if len(c.networks) == 0 {
		return true // its fault is noted already
	}
	for _, n := range c.networks {
		if n.Bits() <= p.Bits() && n.Contains(p.Addr()) {
			return true
		}
	}
	c.faults.add(line, "%s: %s lies outside network %s; give a part of it, or widen network", what, p, c.networks[0])
	return false
}

// prefix checks that s is a prefix of this node's family without host bits.
func (c *checker) prefix(s scalar, what string) (netip.Prefix, bool) {
	if !s.usable {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s.text)
	switch {
	case err != nil:
		c.faults.add(s.line, "%s: %s is no prefix; write it as 10.244.1.0/24 or fd00:10:244:1::/64", what, quote(s.text))
	case p.Addr().Is4In6():
		c.faults.add(s.line, "%s: %s is an IPv4 prefix in IPv6 form; write it as IPv4", what, p)
	case p.Bits() == 0:
		c.faults.add(s.line, "%s: %s is everything; give the part that pods use", what, p)
	case p != p.Masked():
		c.faults.add(s.line, "%s: %s has host bits set; write %s", what, p, p.Masked())
	case p.Addr().IsMulticast() || p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast():
		c.faults.add(s.line, "%s: %s cannot be routed to pods; give a private prefix", what, p)
	case c.publicIP.IsValid() && p.Addr().Is4() != c.publicIP.Is4():
		c.faults.add(s.line, "%s: %s is %s, but publicIP %s is %s; one file carries one family", what, p, family(p.Addr()), c.publicIP, family(c.publicIP))
	default:
		return p, true
	}
	return netip.Prefix{}, false
}

// address checks that s is an address that packets can be sent to.
func (c *checker) address(s scalar, line int, what, todo string) netip.Addr {
	text, ok := c.required(s, line, what, todo)
	if !ok {
		return netip.Addr{}
	}
	ip, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		c.faults.add(s.line, "%s: %s is no IP address; %s", what, quote(text), todo)
	case ip.Is4In6():
		c.faults.add(s.line, "%s: %s is an IPv4 address in IPv6 form; write %s", what, ip, ip.Unmap())
	case ip.Zone() != "" || ip.IsLinkLocalUnicast():
		c.faults.add(s.line, "%s: %s is link-local; give an address that can be routed", what, ip)
	case ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		c.faults.add(s.line, "%s: %s is not the address of one host; %s", what, ip, todo)
	default:
		return ip
	}
	return netip.Addr{}
}

// number checks a decimal number between least and most.
func (c *checker) number(s scalar, what string, otherwise, least, most int, hint string) int {
	if !s.usable {
		return otherwise
	}
	n, err := strconv.Atoi(s.text)
	// YAML 1.1 reads 010 as eight and YAML 1.2 as ten.
	ambiguous := len(s.text) > 1 && strings.HasPrefix(s.text, "0")
	if err != nil || ambiguous || s.text[0] == '+' || n < least || n > most {
		c.faults.add(s.line, "%s: %s is no number from %d to %d; %s", what, quote(s.text), least, most, hint)
		return otherwise
	}
	return n
}

// required returns the text of s, and notes when it is not there.
func (c *checker) required(s scalar, line int, what, todo string) (string, bool) {
	if !s.given {
		c.faults.add(line, "%s is missing; %s", what, todo)
	}
	return s.text, s.usable
}

// overlaps finds pod prefixes that lie inside one another. Sorted by address
// and length, a prefix comes right after those that contain it.
func (c *checker) overlaps() {
	slices.SortStableFunc(c.prefixes, func(a, b claim) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()))
	})
	var around []claim
	for _, p := range c.prefixes {
		for len(around) > 0 && !around[len(around)-1].prefix.Contains(p.prefix.Addr()) {
			around = around[:len(around)-1]
		}
		if len(around) > 0 {
			outer := around[len(around)-1]
			verb := "overlaps"
			if outer.prefix == p.prefix {
				verb = "is the same as"
			}
			c.faults.add(p.place.line, "%s: prefix %s %s %s of %s (line %d); a pod address must lead to one node", p.place.what, p.prefix, verb, outer.prefix, outer.place.what, outer.place.line)
		}
		around = append(around, p)
	}
}

// family names the family of an address.
func family(ip netip.Addr) string {
	if ip.Is4() {
		return "IPv4"
	}
	return "IPv6"
}
