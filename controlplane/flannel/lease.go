package flannel

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// BackendType is the only backend that is spoken here.
const BackendType = "vxlan"

// maxBackendData is the size of a backend's data in bytes. Flannel writes 48.
const maxBackendData = 4096

// Lease is what one node publishes about itself. A family that it does not use,
// or has told nothing sound about, has zero values.
type Lease struct {
	// Prefix and PrefixV6 are its pods', masked.
	Prefix, PrefixV6 netip.Prefix
	// PublicIP and PublicIPv6 are the underlay addresses that peers send to.
	PublicIP, PublicIPv6 netip.Addr
	// MAC and MACv6 are those of its overlay devices (VtepMAC); zero when it has
	// not told them yet.
	MAC, MACv6 state.MAC
	// VNI and VNIv6 are zero when the node has not told them: old flannels do
	// not.
	VNI, VNIv6 uint32
	// BackendType is vxlan unless the node runs something else.
	BackendType string
	// Broken and BrokenV6 tell that what the node says about a family can't be
	// understood.
	Broken, BrokenV6 bool
}

// half is one family's part of a lease.
type half struct {
	prefix   netip.Prefix
	publicIP netip.Addr
	mac      state.MAC
	vni      uint32
	broken   bool
}

// half returns the part of a family.
func (l Lease) half(v6 bool) half {
	if v6 {
		return half{l.PrefixV6, l.PublicIPv6, l.MACv6, l.VNIv6, l.BrokenV6}
	}
	return half{l.Prefix, l.PublicIP, l.MAC, l.VNI, l.Broken}
}

// tell fills in what the node publishes about a family.
func (l *Lease) tell(v6 bool, h half) {
	if v6 {
		l.PublicIPv6, l.MACv6, l.VNIv6, l.BrokenV6 = h.publicIP, h.mac, h.vni, h.broken
	} else {
		l.PublicIP, l.MAC, l.VNI, l.Broken = h.publicIP, h.mac, h.vni, h.broken
	}
}

// complete tells whether all is there that peers need of a family.
func (h half) complete() bool { return h.publicIP.IsValid() && !h.mac.IsZero() && h.vni != 0 }

// Peers returns the peers that the given node's lease makes in the network c,
// one per family that both have and the node has told the public IP of. What is
// wrong with one family does not harm the other: usable peers are returned
// beside the error.
//
// A node that has told another VNI is a peer all the same, as it is with
// flannel, and stands in the error: it drops what is sent to it, but the way
// there must not lead elsewhere in the meantime.
//
// A node that has told a public IP and broken data is a peer without a MAC: it
// can't be reached, but it may send. With DirectRouting it could be reached
// without a MAC, where flannel does not: there it is no peer.
func (l Lease) Peers(node string, c Config) ([]state.Peer, error) {
	var peers []state.Peer
	var f faults
	for _, v6 := range []bool{false, true} {
		h, network := l.half(v6), c.Network
		if v6 {
			network = c.IPv6Network
		}
		if !network.IsValid() || !h.prefix.IsValid() || !h.publicIP.IsValid() {
			continue
		}
		if l.BackendType != BackendType {
			f.add("node %s runs the backend %s, not vxlan, and can't be reached", quote(node), quote(l.BackendType))
			break
		}
		if err := h.check(v6, network); err != nil {
			f.add("node %s: %w", quote(node), err)
			continue
		}
		if h.broken && c.DirectRouting {
			continue // which Parse has complained of
		}
		if h.vni != 0 && h.vni != c.VNI {
			f.add("node %s has the VNI %d, and this network %d: it drops what is sent to %s; start its flanneld or weft again", quote(node), h.vni, c.VNI, h.prefix)
		}
		peers = append(peers, state.Peer{Node: node, Prefix: h.prefix, PublicIP: h.publicIP, MAC: h.mac})
	}
	return peers, f.err()
}

// Unread lists the prefixes, one per family that both the node and the network c
// have, of which the node says nothing that can be used, though it says something:
// broken values, or another backend. Who knows what the node said about them
// before goes by that, as flannel does.
func (l Lease) Unread(c Config) []netip.Prefix {
	var unread []netip.Prefix
	for _, v6 := range []bool{false, true} {
		h, network := l.half(v6), c.Network
		if v6 {
			network = c.IPv6Network
		}
		if network.IsValid() && h.prefix.IsValid() && (h.broken || h.publicIP.IsValid() && l.BackendType != BackendType) {
			unread = append(unread, h.prefix)
		}
	}
	return unread
}

// check tells why a family's part can't be a peer.
func (h half) check(v6 bool, network netip.Prefix) error {
	switch p := h.prefix; {
	case p.Addr().Is6() != v6 || p != p.Masked():
		return fmt.Errorf("%s is no masked %s prefix", p, family(v6))
	case p.Bits() < network.Bits() || !network.Contains(p.Addr()):
		return fmt.Errorf("pod prefix %s lies outside the network %s", p, network)
	case p.Contains(h.publicIP):
		return fmt.Errorf("public IP %s lies in the node's own pod prefix %s: packets would never get there", h.publicIP, p)
	}
	return checkPublicIP(h.publicIP, v6)
}

// checkPublicIP tells why packets can't be sent to an address.
func checkPublicIP(a netip.Addr, v6 bool) error {
	switch {
	case a.Is6() != v6 || a.Is4In6() || a.Zone() != "":
		return fmt.Errorf("public IP %s is no plain %s address", a, family(v6))
	case a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}),
		a.Is4() && a.As4()[0] == 0:
		return fmt.Errorf("public IP %s is not the address of one host", a)
	case v6 && a.IsLinkLocalUnicast():
		return fmt.Errorf("public IP %s is link-local and means nothing on other nodes", a)
	}
	return nil
}

// parsePublicIP reads an address that packets are sent to.
func parsePublicIP(text string, v6 bool) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%s is no %s address", quote(text), family(v6))
	}
	if err := checkPublicIP(a, v6); err != nil {
		return netip.Addr{}, err
	}
	return a, nil
}

// vtep is the backend's data of a lease: flannel's vxlan device.
type vtep struct {
	VNI     uint32
	VtepMAC string
}

// marshalVTEP returns a family's backend data: {"VNI":1,"VtepMAC":"0a:58:…"}.
// Others parse it by position.
func (h half) marshalVTEP() string {
	return fmt.Sprintf(`{"VNI":%d,"VtepMAC":"%s"}`, h.vni, h.mac)
}

// parseVTEP reads a family's backend data. Nothing, null, no VNI and no MAC are
// a node that has not told them yet, and so is what is broken.
func (h *half) parseVTEP(data []byte) error {
	if len(data) > maxBackendData {
		return fmt.Errorf("backend data of %d bytes; the limit is %d", len(data), maxBackendData)
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	var v vtep
	if err := json.Unmarshal(data, &v); err != nil {
		return fmt.Errorf(`backend data is %s, not of the form {"VNI":1,"VtepMAC":"0a:58:0a:f4:01:00"}`, quote(data))
	}
	if v.VNI > maxVNI {
		return fmt.Errorf("VNI %d is larger than %d", v.VNI, maxVNI)
	}
	var mac state.MAC
	if v.VtepMAC != "" {
		var err error
		if mac, err = state.ParseMAC(v.VtepMAC); err != nil {
			return fmt.Errorf("VtepMAC: %s is not the MAC address of one device", quote(v.VtepMAC))
		}
	}
	h.vni, h.mac = v.VNI, mac
	return nil
}

// errNothingToTell is a lease that peers could do nothing with.
var errNothingToTell = errors.New("a lease needs a public IP, a MAC and a VNI of one family at least, and all three or none of each")
