// Package firewall is the nftables table "inet weft", which keeps pods from
// injecting packets into the VXLAN network.
//
// VXLAN has no authentication: whoever can send UDP to a node's VXLAN port can
// have a packet with any source delivered to that node's pods. A pod must not,
// and no pod has a reason to: nothing but the VXLAN socket can listen there. A
// program on the pods' veths drops the plain cases early; this table stands
// behind NAT and defragmentation and catches the rest: a Service whose backend
// is a node, fragments, pods without our program.
//
// From the packet's point of view:
//
//   - A packet to the VXLAN port that is for this node (hook input, whatever
//     the address: unicast, broadcast, link-local), or is forwarded to another
//     node (hook forward, destination in @nodes4 or @nodes6), is dropped if it
//     comes from a pod.
//   - It comes from a pod if it came through one of @pod_devices, or if its
//     source lies in @prefixes4 or @prefixes6. Each sees what the other doesn't: a pod
//     with CAP_NET_RAW (the default of most runtimes) writes any source it
//     likes, and a pod behind a device that nobody has told us of yet (another
//     bridge, a veth made this moment) has the right source.
//   - The reply direction of a connection passes. A masqueraded client may have
//     got source port 8472, and its answers are sent to that port of a node.
//   - So nobody must begin a connection in the name of a node, to have its
//     "answers" pass: a packet from the VXLAN port that came through one of
//     @pod_devices and has a node's address as its source is dropped, unless that
//     address is routed through that device (as other nodes' overlay addresses
//     are through flannel.1).
//   - What comes through loopback is this node's own.
//   - IPVS sends what it forwards through hook output, without a device. There a
//     pod is told by its source alone. The node's own VXLAN packets pass by here
//     too, so nothing else is dropped.
//
// Nothing is ever accepted: a packet that is not dropped meets all other tables
// as if this one were not there. All chains are behind what decides where a
// packet goes. For forward and output that is prerouting and mangle (-150), so
// priority filter - 10 will do, and the filter tables neither log, queue nor
// count what is dropped anyway. In input IPVS translates addresses as late as at
// 98 and 99, so the chain is at 110.
//
// Matching on "ct direction" makes the kernel track connections and, for that,
// reassemble fragments before they are looked at. Where that is refused to a
// packet (notrack before defragmentation), the first fragment is the one that
// has the port and is dropped, and the others never become a packet again; where
// there is no connection there is no direction, and the packet is dropped.
//
// Who is hit without evil intent? Only a pod that sends UDP to port 8472 of a
// node. On that node the port is the VXLAN socket's, on all addresses, so no
// other program can serve there, and a NodePort or hostPort of this number
// would divert the nodes' own VXLAN packets. The one exception: a node with
// VXLAN over IPv4 only could have a server on that port of its IPv6 addresses.
// Pods among each other may use the port as they like: a cluster within the
// cluster works.
//
// What the table can't see: addresses of other nodes that are not in its sets
// (a second network, an address that a router translates); pods that reach the
// underlay without this node's IP stack (macvlan, ipvlan); with IPVS, a pod that
// forges its source; and two pods on two nodes that keep a connection alive here
// until the other node, in whose name it was masqueraded, has forgotten it. For
// those there is the source check of those who receive.
package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Rules say what the table protects and from whom. The order of the lists does
// not matter.
type Rules struct {
	// Port is VXLAN's UDP port.
	Port uint16
	// Nodes are the addresses that other nodes answer on and that are not local
	// here: their public IPs, and of each of their pod prefixes the base
	// (flannel.1), the next (cni0), and the last: a broadcast that is routed to
	// the node reaches its VXLAN socket too. Local ones among them do no harm.
	Nodes []netip.Addr
	// Prefixes are this node's pod prefixes: what comes from there is a pod's.
	Prefixes []netip.Prefix
	// Devices are the names of the devices that pods are behind: cni0, docker0,
	// veths without a bridge; and the overlay devices themselves, since other
	// nodes' pods reach us through them. They need not exist. The uplink must
	// not be among them: it brings the peers' VXLAN packets.
	Devices []string
}

// ErrUnsupported says that the kernel has no nf_tables, or not what we need of
// it.
var ErrUnsupported = errors.New("this kernel has no nf_tables, or not all of it (NF_TABLES_INET, NFT_CT, NFT_FIB_INET)")

// Names in the kernel, as `nft list table inet weft` shows them.
const (
	tableName   = "weft"
	counterName = "vxlan_injection"
)

// nameSize is the size of a device name in the kernel, with a zero at the end
// (IFNAMSIZ).
const nameSize = 16

// table is the rules as a table: what it shall hold. What can't be put into it
// is left out and told by the error, which does not make the rest less useful.
func (r Rules) table() (table, error) {
	var errs []error
	t := newTable(r.Port)
	if r.Port == 0 {
		return t, errors.New("firewall: VXLAN has no port")
	}
	for _, addr := range r.Nodes {
		addr = addr.Unmap()
		if !addr.IsValid() || addr.Zone() != "" {
			errs = append(errs, fmt.Errorf("firewall: %q is no address of a node", addr))
			continue
		}
		t.sets[inFamily("nodes", addr)].elements[element{prefix: netip.PrefixFrom(addr, addr.BitLen())}] = true
	}
	for _, prefix := range widest(r.Prefixes) {
		if !prefix.IsValid() || prefix.Addr().Is4In6() {
			errs = append(errs, fmt.Errorf("firewall: %q is no pod prefix", prefix))
			continue
		}
		t.sets[inFamily("prefixes", prefix.Addr())].elements[element{prefix: prefix}] = true
	}
	for _, name := range r.Devices {
		if name == "" || len(name) >= nameSize || strings.ContainsAny(name, "/ \t\n\x00") {
			errs = append(errs, fmt.Errorf("firewall: %q is no name of a device", name))
			continue
		}
		t.sets["pod_devices"].elements[element{name: name}] = true
	}
	return t, errors.Join(errs...)
}

// widest masks the prefixes and leaves out those that lie in another: elements
// of an interval set must not overlap.
func widest(prefixes []netip.Prefix) []netip.Prefix {
	masked := make([]netip.Prefix, len(prefixes))
	for i, p := range prefixes {
		masked[i] = p
		if p.IsValid() {
			masked[i] = p.Masked()
		}
	}
	slices.SortFunc(masked, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	var wide []netip.Prefix
	for _, p := range masked {
		if !slices.ContainsFunc(wide, func(w netip.Prefix) bool { return w == p || w.IsValid() && w.Contains(p.Addr()) }) {
			wide = append(wide, p)
		}
	}
	return wide
}

// inFamily is the name of the set that has the addresses of that family.
func inFamily(name string, addr netip.Addr) string {
	if addr.Is4() {
		return name + "4"
	}
	return name + "6"
}
