//go:build linux

package lab

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// The address plan, the same in each lab.
var (
	// Network and NetworkV6 hold the pods of all nodes.
	Network   = netip.MustParsePrefix("10.244.0.0/16")
	NetworkV6 = netip.MustParsePrefix("fd00:10:244::/48")
	// Gateway and GatewayV6 are the underlay's own addresses, the nodes' default
	// routes.
	Gateway   = netip.MustParseAddr("192.0.2.1")
	GatewayV6 = netip.MustParseAddr("2001:db8::1")
)

// Families are the address families of a lab's underlay and pods.
type Families string

const (
	// IPv4 is the only family of most labs.
	IPv4 Families = "ipv4"
	// DualStack labs have both, and every pod an address of each.
	DualStack Families = "dual-stack"
	// IPv6 labs have no IPv4 address but loopback's.
	IPv6 Families = "ipv6"
)

// Has4 reports whether there is IPv4.
func (f Families) Has4() bool { return f != IPv6 }

// Has6 reports whether there is IPv6.
func (f Families) Has6() bool { return f == DualStack || f == IPv6 }

// underlayBits and underlayBitsV6 are the lengths of the underlay's prefixes.
const (
	underlayBits   = "/24"
	underlayBitsV6 = "/64"
)

// uplinkAddress is a node's address on the underlay: 192.0.2.11 for node 1.
func uplinkAddress(node int) netip.Addr {
	return netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + node)})
}

// uplinkAddressV6 is 2001:db8::11 for node 1.
func uplinkAddressV6(node int) netip.Addr {
	a := GatewayV6.As16()
	a[15] = byte(0x10 + node)
	return netip.AddrFrom16(a)
}

// podPrefix is a node's part of Network: 10.244.1.0/24 for node 1.
func podPrefix(node int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(node), 0}), 24)
}

// podPrefixV6 is a node's part of NetworkV6: fd00:10:244:1::/64 for node 1.
func podPrefixV6(node int) netip.Prefix {
	a := NetworkV6.Addr().As16()
	a[7] = byte(node)
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}

// inPrefix is an address of a node's pod prefix by its last byte: 0 is the
// overlay's, 1 is cni0, 2 is the first pod.
func inPrefix(prefix netip.Prefix, last int) netip.Addr {
	addr := prefix.Addr()
	for range last {
		addr = addr.Next()
	}
	return addr
}

// macOf is the MAC address of the device that has an IPv4 address, or would have
// it in a lab with IPv4.
func macOf(addr netip.Addr) state.MAC {
	a := addr.As4()
	return state.MAC{0x0a, 0x58, a[0], a[1], a[2], a[3]}
}

// v6MAC is the MAC address of the overlay device for IPv6, of that for IPv4.
func v6MAC(mac state.MAC) state.MAC {
	mac[1]++
	return mac
}
