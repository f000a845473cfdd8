package flannel

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// netConf is net-conf.json as it is written. Package encoding/json finds its
// keys in any case and ignores those it does not know, which is what flannel
// does.
type netConf struct {
	EnableIPv4, EnableIPv6, EnableNFTables   given
	Network, SubnetLen, SubnetMin, SubnetMax given
	IPv6Network, IPv6SubnetLen               given
	IPv6SubnetMin, IPv6SubnetMax             given
	Backend                                  given
}

// given is every value that was given for one key. The last one counts, and
// all of them must make sense.
type given []json.RawMessage

// UnmarshalJSON implements json.Unmarshaler; it is called for each value.
func (g *given) UnmarshalJSON(data []byte) error {
	*g = append(*g, bytes.Clone(data))
	return nil
}

// readNetConf reads the shape of a configuration.
func readNetConf(data []byte) (netConf, faults) {
	var d netConf
	var f faults
	if len(data) > maxConfig {
		f.add("the network's configuration has %d bytes; the limit is %d", len(data), maxConfig)
		return d, f
	}
	if err := json.Unmarshal(data, &d); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			f.add("the network's configuration is not JSON: line %d: %v", 1+bytes.Count(data[:syntax.Offset], []byte("\n")), err)
		} else {
			f.add(`the network's configuration is not a JSON object; write it as {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`)
		}
	}
	return d, f
}

// boolean reads a switch. null is as good as not given.
func (g given) boolean(f *faults, key string, otherwise bool) bool {
	for _, raw := range g {
		if json.Unmarshal(raw, &otherwise) != nil {
			f.add("%s is %s; write true or false, without quotes", key, shown(raw))
		}
	}
	return otherwise
}

// number reads an integer. null is as good as not given.
func (g given) number(f *faults, key string, otherwise, least, most int, hint string) int {
	for _, raw := range g {
		if json.Unmarshal(raw, &otherwise) != nil || otherwise < least || otherwise > most {
			f.add("%s is %s; give a number from %d to %d, without quotes: %s", key, shown(raw), least, most, hint)
		}
	}
	return otherwise
}

// length reads the length of a prefix, which is checked where it is used. null
// is as good as not given.
func (g given) length(f *faults, key string) int {
	var last int
	for _, raw := range g {
		if json.Unmarshal(raw, &last) != nil || last < 0 {
			f.add("%s is %s; give the length of a node's prefix, as in 24, without quotes", key, shown(raw))
		}
	}
	return last
}

// shown is a JSON value in an error.
func shown(raw []byte) string {
	if text, ok := bytes.CutPrefix(raw, []byte(`"`)); ok {
		return quote(bytes.TrimSuffix(text, []byte(`"`)))
	}
	if len(raw) > 80 {
		return quote(raw)
	}
	return string(raw)
}

// text is a JSON value as flannel takes addresses: the bytes between the
// quotes, escapes as they are.
func text(raw []byte) string { return string(bytes.Trim(raw, `"`)) }

// subnets is what a configuration says about one family.
type subnets struct {
	v6 bool
	// keys are what its fields are called: network, length, first, last.
	keys [4]string
	// given tells that there is a network, be it wrong.
	given   bool
	network netip.Prefix
	// length is the length of a node's prefix, first and last are the bases of
	// the first and the last of them. Zero means not given.
	length      int
	first, last netip.Addr
}

// readFamily reads the fields of a family.
func (d netConf) readFamily(f *faults, v6 bool) subnets {
	s := subnets{v6: v6, keys: [4]string{"Network", "SubnetLen", "SubnetMin", "SubnetMax"}}
	values := [4]given{d.Network, d.SubnetLen, d.SubnetMin, d.SubnetMax}
	if v6 {
		s.keys = [4]string{"IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax"}
		values = [4]given{d.IPv6Network, d.IPv6SubnetLen, d.IPv6SubnetMin, d.IPv6SubnetMax}
	}
	s.given = len(values[0]) > 0
	s.network = values[0].prefix(f, s.keys[0], v6)
	s.length = values[1].length(f, s.keys[1])
	s.first = values[2].address(f, s.keys[2], v6)
	s.last = values[3].address(f, s.keys[3], v6)
	return s
}

// prefix reads a network. Host bits are cut off, as flannel does.
func (g given) prefix(f *faults, key string, v6 bool) netip.Prefix {
	var last netip.Prefix
	for _, raw := range g {
		p, ok := parseNet(text(raw))
		if !ok || p.Addr().Is6() != v6 || p.Addr().Is4In6() {
			f.add("%s is %s; write an %s prefix, as in %s", key, shown(raw), family(v6), examplePrefix(v6))
			continue
		}
		last = p
	}
	return last
}

// parseNet reads a prefix as package net does, which takes /024 for /24, and
// cuts host bits off.
func parseNet(s string) (netip.Prefix, bool) {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		return netip.Prefix{}, false
	}
	addr, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr, bits), true
}

// address reads an address. null is as good as not given where flannel has it
// so, for IPv6.
func (g given) address(f *faults, key string, v6 bool) netip.Addr {
	var last netip.Addr
	for _, raw := range g {
		if v6 && string(raw) == "null" {
			last = netip.Addr{}
			continue
		}
		a, err := netip.ParseAddr(text(raw))
		if err != nil || a.Zone() != "" || (!v6 && !a.Unmap().Is4()) {
			f.add("%s is %s; write an %s address", key, shown(raw), family(v6))
			continue
		}
		if !v6 {
			a = a.Unmap()
		}
		last = a
		if a.IsUnspecified() {
			last = netip.Addr{}
		}
	}
	return last
}

// network notes when a family that is on has no network that could be used.
func (f *faults) network(key string, s subnets, example string) {
	switch n := s.network; {
	case !s.given:
		f.add("%s is missing; give the network that holds all pods, as in %q", key, example)
	case !n.IsValid(): // noted already
	case n.Bits() == 0:
		f.add("%s is %s, which is everything; give the part that pods use, as in %q", key, n, example)
	case n.Addr().IsMulticast() || n.Addr().IsLoopback():
		f.add("%s is %s, which cannot be routed to pods; give a private prefix, as in %q", key, n, example)
	}
}

// chooseSubnets fills in what was not given and checks what was. After a fault
// the fields are zero.
func (s *subnets) chooseSubnets(f *faults) {
	if !s.network.IsValid() {
		s.length, s.first, s.last = 0, netip.Addr{}, netip.Addr{}
		return // the network's fault is noted already
	}
	before := len(*f)
	s.chooseLength(f)
	if len(*f) == before {
		s.chooseRange(f)
	}
	if len(*f) > before {
		s.length, s.first, s.last = 0, netip.Addr{}, netip.Addr{}
	}
}

// chooseLength decides how long a node's prefix is. It has room for the overlay
// device, a gateway and two pods, and the network for four such prefixes, of
// which the first is not used.
func (s *subnets) chooseLength(f *faults) {
	longest, usual := 30, 24
	if s.v6 {
		longest, usual = 126, 64
	}
	bits := s.network.Bits()
	switch {
	case s.length > longest:
		f.add("%s is %d; a node needs four addresses: give %d or less", s.keys[1], s.length, longest)
	case s.length > 0 && s.length < bits+2:
		f.add("%s is %d, but %s %s must hold four of them; give %d or more, or a larger network", s.keys[1], s.length, s.keys[0], s.network, bits+2)
	case s.length > 0:
	case bits > longest-2:
		f.add("%s is %s; give /%d or shorter, which holds four nodes with four addresses each", s.keys[0], s.network, longest-2)
	case bits <= usual-2:
		s.length = usual
	default:
		s.length = bits + 2
	}
}

// chooseRange decides from which to which prefix nodes choose. The network's
// first one is left out unless it is asked for: its base is the network's own
// address.
func (s *subnets) chooseRange(f *faults) {
	before := len(*f)
	for i, a := range []*netip.Addr{&s.first, &s.last} {
		key := s.keys[2+i]
		switch {
		case !a.IsValid() && i == 0:
			*a = state.Last(netip.PrefixFrom(s.network.Addr(), s.length)).Next()
		case !a.IsValid():
			*a = netip.PrefixFrom(state.Last(s.network), s.length).Masked().Addr()
		case !s.network.Contains(*a):
			f.add("%s is %s, which is outside %s %s; give the base of a /%d inside", key, *a, s.keys[0], s.network, s.length)
		case netip.PrefixFrom(*a, s.length).Masked().Addr() != *a:
			f.add("%s is %s, which is not the base of a /%d; give %s", key, *a, s.length, netip.PrefixFrom(*a, s.length).Masked().Addr())
		}
	}
	if len(*f) == before && s.last.Less(s.first) {
		f.add("%s %s comes after %s %s, which leaves no prefix to choose; swap them", s.keys[2], s.first, s.keys[3], s.last)
	}
}

// family names a family.
func family(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// examplePrefix is a network of the family.
func examplePrefix(v6 bool) string {
	if v6 {
		return "fd00:10:244::/48"
	}
	return "10.244.0.0/16"
}
