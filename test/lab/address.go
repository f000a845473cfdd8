//go:build linux

package lab

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// The address plan, the same in each lab.
var (
	// Network holds the pods of all nodes.
	Network = netip.MustParsePrefix("10.244.0.0/16")
	// Gateway is the underlay's own address, the nodes' default route.
	Gateway = netip.MustParseAddr("192.0.2.1")
)

// underlayBits is the length of the underlay's prefix.
const underlayBits = "/24"

// uplinkAddress is a node's address on the underlay: 192.0.2.11 for node 1.
func uplinkAddress(node int) netip.Addr {
	return netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + node)})
}

// podPrefix is a node's part of Network: 10.244.1.0/24 for node 1.
func podPrefix(node int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(node), 0}), 24)
}

// inPrefix is an address of a node's part of Network by its last byte: 0 is
// flannel.1, 1 is cni0, 2 is the first pod.
func inPrefix(node, last int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 244, byte(node), byte(last)})
}

// macOf is the MAC address of the device that has an IPv4 address.
func macOf(addr netip.Addr) state.MAC {
	a := addr.As4()
	return state.MAC{0x0a, 0x58, a[0], a[1], a[2], a[3]}
}
