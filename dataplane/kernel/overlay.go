package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane/state"
)

const (
	// overheadV4 is what VXLAN adds to a frame over IPv4, in bytes: inner
	// Ethernet 14, VXLAN 8, UDP 8, IPv4 20 (RFC 7348 section 5).
	overheadV4 = 50
	// overheadV6 is the same over IPv6, whose header has 40 bytes.
	overheadV6 = 70
	// minMTUv6 is the smallest MTU of an IPv6 link, in bytes (RFC 8200
	// section 5). Below it the kernel turns IPv6 off on the device.
	minMTUv6 = 1280
	// maxVNI is the largest VXLAN network identifier: it has 24 bits.
	maxVNI = 1<<24 - 1
	// maxName is the longest name of a device, in bytes (IFNAMSIZ less the
	// final zero).
	maxName = 15
)

// overlay is what one family's overlay device shall be. IPv4 and IPv6 differ
// in these values only.
type overlay struct {
	name string
	v6   bool
	vxlan
	// learning has the device learn from packets where a MAC is.
	learning bool
	// mtu is in bytes.
	mtu int
	// mac is zero while the existing device's is to be kept.
	mac state.MAC
	// prefix is this node's pod prefix; its base is the device's address.
	prefix netip.Prefix
	// network is the whole overlay's network, or the zero Prefix.
	network netip.Prefix
	// publicIP is what peers send to. Behind NAT it is not local.
	publicIP netip.Addr
	// direct is what DirectRouting goes by.
	direct direct
	// peers are those that passed choosePeers, sorted.
	peers []state.Peer
}

// vxlan are the parameters of a VXLAN device that decide where its packets go
// and which it takes. A device that differs in one of them is made anew.
type vxlan struct {
	vni  uint32
	port uint16
	// local is the underlay address that packets are sent from.
	local netip.Addr
	// gbp has packets carry their marks.
	gbp bool
	// uplink is the device that carries the outer packets.
	uplink      string
	uplinkIndex int
}

// address is the overlay device's own address: the first of the node's pod
// prefix, alone (/32 or /128), so that no route to a neighbour comes with it.
func (o overlay) address() netip.Prefix {
	return netip.PrefixFrom(o.prefix.Addr(), o.prefix.Addr().BitLen())
}

// metric is the metric of routes given without one: for IPv6 the kernel puts
// 1024 (IP6_RT_PRIO_USER) in its place.
func (o overlay) metric() uint32 {
	if o.v6 {
		return 1024
	}
	return 0
}

// owns reports whether an address or prefix is of the overlay's family.
func (o overlay) owns(a netip.Addr) bool { return a.Is4() != o.v6 }

// overlays derives from the state what overlay devices the node shall have,
// IPv4 first. A family that cannot be had is left out and stands in the error;
// the other one is returned nevertheless.
func overlays(s state.State, up Uplink) ([]overlay, error) {
	if s.VNI == 0 || s.VNI > maxVNI {
		return nil, fmt.Errorf("VNI %d is not a VXLAN network identifier; give one from 1 to %d", s.VNI, maxVNI)
	}
	if s.Port == 0 {
		return nil, errors.New("UDP port 0 cannot carry VXLAN; flannel's default is 8472")
	}
	var found []overlay
	var errs []error
	for _, v6 := range []bool{false, true} {
		publicIP, local, mac, overhead := s.Local.PublicIP, s.Local.Address, s.Local.MAC, overheadV4
		if v6 {
			publicIP, local, mac, overhead = s.Local.PublicIPv6, s.Local.AddressV6, s.Local.MACv6, overheadV6
		}
		if !publicIP.IsValid() {
			continue // the node has no overlay of this family
		}
		if !local.IsValid() {
			local = publicIP
		}
		o := overlay{
			name:     DeviceName(s.VNI, v6),
			v6:       v6,
			vxlan:    vxlan{vni: s.VNI, port: s.Port, local: local, gbp: s.GBP, uplink: up.Name, uplinkIndex: up.Index},
			learning: s.Learning,
			mtu:      up.MTU - overhead,
			mac:      mac,
			prefix:   prefixOf(s.Local.Prefixes, v6),
			network:  prefixOf(s.Networks, v6),
			publicIP: publicIP,
			direct:   direct{on: s.DirectRouting},
		}
		// More than fits the uplink the kernel refuses an existing device, and
		// gives none to a new one (vxlan_config_apply in
		// drivers/net/vxlan/vxlan_core.c).
		if s.Local.MTU > 0 {
			o.mtu = min(o.mtu, s.Local.MTU)
		}
		if err := o.check(up); err != nil {
			errs = append(errs, fmt.Errorf("overlay device %s: %w", o.name, err))
			continue
		}
		found = append(found, o)
	}
	return found, errors.Join(errs...)
}

// check tells what keeps the device from carrying packets.
func (o overlay) check(up Uplink) error {
	if len(o.name) > maxName {
		return fmt.Errorf("the name is longer than the %d characters a device can have; choose a smaller VNI", maxName)
	}
	if !o.owns(o.local) {
		return fmt.Errorf("underlay address %s is of the wrong family", o.local)
	}
	if !o.prefix.IsValid() {
		return fmt.Errorf("this node has underlay address %s, but no pod prefix of the same family", o.local)
	}
	if o.prefix != o.prefix.Masked() {
		return fmt.Errorf("pod prefix %s has host bits set; it should be %s", o.prefix, o.prefix.Masked())
	}
	if o.v6 && o.mtu < minMTUv6 {
		return fmt.Errorf("MTU %d is less than the %d bytes that IPv6 needs (uplink %s has MTU %d, VXLAN takes %d)",
			o.mtu, minMTUv6, up.Name, up.MTU, overheadV6)
	}
	for _, a := range slices.Concat(up.Addrs, up.Others) {
		if a.Addr() == o.local {
			return nil
		}
	}
	return fmt.Errorf("uplink %s has no address %s; its addresses are %s", up.Name, o.local, listPrefixes(up.Addrs))
}

// prefixOf returns the first prefix of a family, or the zero Prefix.
func prefixOf(prefixes []netip.Prefix, v6 bool) netip.Prefix {
	for _, p := range prefixes {
		if p.Addr().Is4() != v6 {
			return p
		}
	}
	return netip.Prefix{}
}

func listPrefixes(prefixes []netip.Prefix) string {
	if len(prefixes) == 0 {
		return "none"
	}
	var texts []string
	for _, p := range prefixes {
		texts = append(texts, p.String())
	}
	return strings.Join(texts, ", ")
}
