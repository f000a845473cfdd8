package flannel

import (
	"bytes"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// PluginEnv is what flannel's CNI plugin takes from subnet.env. Unlike the agent
// it knows more than one network of a family.
type PluginEnv struct {
	// Networks are those that pods have a route to: of IPv4 first, then of IPv6,
	// each in the file's order.
	Networks []netip.Prefix
	// Subnet and IPv6Subnet are the node's prefixes, without host bits. One of
	// them may be zero.
	Subnet, IPv6Subnet netip.Prefix
	MTU                int
	IPMasq             bool
}

// ParsePluginEnv reads a file's content. As flannel's plugin does, it passes over
// lines that are not about flannel, and wants all of the others: a network and a
// subnet of one family at least, the MTU and who masquerades.
func ParsePluginEnv(data []byte) (PluginEnv, error) {
	values, err := ParseEnvFile(linesOfFlannel(data))
	var f faults
	if err != nil {
		f.add("%w", err)
	}
	e := PluginEnv{
		Networks:   slices.Concat(envNetworks(&f, values, keyNetwork, false), envNetworks(&f, values, keyIPv6Network, true)),
		Subnet:     envPrefix(&f, values, keySubnet, false).Masked(),
		IPv6Subnet: envPrefix(&f, values, keyIPv6Subnet, true).Masked(),
	}
	e.MTU = envMTU(&f, values)
	e.IPMasq = envIPMasq(&f, values)
	for _, alternatives := range [][]string{{keyNetwork, keyIPv6Network}, {keySubnet, keyIPv6Subnet}, {keyMTU}, {keyIPMasq}} {
		given := func(key string) bool { _, ok := values[key]; return ok }
		if !slices.ContainsFunc(alternatives, given) {
			f.add("%s is missing", strings.Join(alternatives, " or "))
		}
	}
	if err := f.err(); err != nil {
		return PluginEnv{}, err
	}
	return e, nil
}

// linesOfFlannel empties the other lines, so that those that stay keep their
// numbers.
func linesOfFlannel(data []byte) []byte {
	var b []byte
	for line := range bytes.Lines(data) {
		if !bytes.HasPrefix(bytes.TrimSpace(line), []byte("FLANNEL_")) {
			line = []byte("\n")
		}
		b = append(b, line...)
	}
	return b
}

// envNetworks reads the value of a key that is a list of networks.
func envNetworks(f *faults, values map[string]string, key string, v6 bool) []netip.Prefix {
	list, ok := values[key]
	if !ok {
		return nil
	}
	var networks []netip.Prefix
	for text := range strings.SplitSeq(list, ",") {
		p, ok := parseNet(text)
		if !ok || p.Addr().Is6() != v6 || p.Addr().Is4In6() {
			f.add("%s has %s, which is not an %s prefix", key, quote(text), family(v6))
			continue
		}
		if !slices.Contains(networks, p) {
			networks = append(networks, p)
		}
	}
	return networks
}

// envMTU reads the MTU, 0 if there is none.
func envMTU(f *faults, values map[string]string) int {
	text, ok := values[keyMTU]
	if !ok {
		return 0
	}
	mtu, err := strconv.Atoi(text)
	if err != nil || mtu < 0 || mtu > 65535 {
		f.add("%s=%s is no MTU; give bytes from 0 to 65535", keyMTU, quote(text))
		return 0
	}
	return mtu
}

// envIPMasq reads who masquerades, false if nothing is said.
func envIPMasq(f *faults, values map[string]string) bool {
	text, ok := values[keyIPMasq]
	if ok && text != "true" && text != "false" {
		f.add("%s=%s; give true or false", keyIPMasq, quote(text))
	}
	return text == "true"
}
