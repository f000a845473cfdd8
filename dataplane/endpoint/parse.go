//go:build linux

package endpoint

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
	"github.com/weft-net/weft/dataplane/state"
)

// What golang.org/x/sys has no name for.
const (
	extSkipStats    = 1 << 3 // RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h
	stateForwarding = 3      // BR_STATE_FORWARDING of linux/if_bridge.h
	sizeofTcMsg     = 20     // struct tcmsg of linux/rtnetlink.h
	sizeofRtGenMsg  = 4      // struct rtgenmsg, padded
	tcaBPFName      = 7      // TCA_BPF_NAME and
	tcaBPFID        = 11     // TCA_BPF_ID of linux/pkt_cls.h
)

// flag reads an attribute that is a byte.
func flag(value []byte) bool { return len(value) > 0 && value[0] != 0 }

// parseLink reads a link (struct ifinfomsg and attributes). target is the
// number of the namespace that the kernel says it has looked into.
func parseLink(data []byte) (l device, target int, ok bool) {
	if len(data) < unix.SizeofIfInfomsg {
		return l, 0, false
	}
	flags := binary.NativeEndian.Uint32(data[8:])
	l = device{
		index:   int(int32(binary.NativeEndian.Uint32(data[4:]))),
		up:      flags&unix.IFF_UP != 0,
		carrier: flags&unix.IFF_LOWER_UP != 0,
		netns:   noNamespace,
	}
	target = noNamespace
	for attr, value := range rtnl.Attributes(data[unix.SizeofIfInfomsg:]) {
		switch attr {
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(value)
		case unix.IFLA_ADDRESS:
			if len(value) == len(l.mac) {
				l.mac = state.MAC(value)
			}
		case unix.IFLA_MTU:
			l.mtu = int(rtnl.Uint32(value))
		case unix.IFLA_MASTER:
			l.master = int(rtnl.Uint32(value))
		case unix.IFLA_QDISC:
			l.qdisc = unix.ByteSliceToString(value)
		case unix.IFLA_LINK:
			l.peer = int(rtnl.Uint32(value))
		case unix.IFLA_LINK_NETNSID:
			l.netns = int(int32(rtnl.Uint32(value)))
		case unix.IFLA_TARGET_NETNSID:
			target = int(int32(rtnl.Uint32(value)))
		case unix.IFLA_XDP:
			for attr, value := range rtnl.Attributes(value) {
				l.xdp = l.xdp || attr == unix.IFLA_XDP_ATTACHED && flag(value)
			}
		case unix.IFLA_LINKINFO:
			parseLinkInfo(&l, value)
		}
	}
	return l, target, true
}

// parseLinkInfo reads what kind of device it is, and what kind of port.
func parseLinkInfo(l *device, data []byte) {
	var info, slave []byte
	var slaveKind string
	for attr, value := range rtnl.Attributes(data) {
		switch attr {
		case unix.IFLA_INFO_KIND:
			l.kind = unix.ByteSliceToString(value)
		case unix.IFLA_INFO_DATA:
			info = value
		case unix.IFLA_INFO_SLAVE_KIND:
			slaveKind = unix.ByteSliceToString(value)
		case unix.IFLA_INFO_SLAVE_DATA:
			slave = value
		}
	}
	if l.kind == "bridge" {
		for attr, value := range rtnl.Attributes(info) {
			l.vlanFiltering = l.vlanFiltering || attr == unix.IFLA_BR_VLAN_FILTERING && flag(value)
		}
	}
	if slaveKind == "bridge" {
		l.port = parsePort(slave)
	}
}

// parsePort reads the settings of a bridge port.
func parsePort(data []byte) port {
	p := port{is: true, blocked: true, unlearning: true}
	for attr, value := range rtnl.Attributes(data) {
		switch attr {
		case unix.IFLA_BRPORT_STATE:
			p.blocked = len(value) == 0 || value[0] != stateForwarding
		case unix.IFLA_BRPORT_LEARNING:
			p.unlearning = !flag(value)
		case unix.IFLA_BRPORT_LOCKED:
			p.locked = flag(value)
		case unix.IFLA_BRPORT_MODE:
			p.hairpin = flag(value)
		case unix.IFLA_BRPORT_ISOLATED:
			p.isolated = flag(value)
		}
	}
	return p
}

// parseAddress reads an address (struct ifaddrmsg and attributes). It is
// usable when the device answers for it.
func parseAddress(data []byte) (a address, target int, usable, ok bool) {
	if len(data) < unix.SizeofIfAddrmsg {
		return a, 0, false, false
	}
	bits, flags := int(data[1]), uint32(data[2])
	a.index = int(int32(binary.NativeEndian.Uint32(data[4:])))
	target = noNamespace
	var other, local netip.Addr
	for attr, value := range rtnl.Attributes(data[unix.SizeofIfAddrmsg:]) {
		switch attr {
		case unix.IFA_ADDRESS: // where there is a local one: the other side's
			other, _ = netip.AddrFromSlice(value)
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(value)
		case unix.IFA_FLAGS:
			flags = rtnl.Uint32(value)
		case unix.IFA_TARGET_NETNSID:
			target = int(int32(rtnl.Uint32(value)))
		}
	}
	if !local.IsValid() {
		local = other
	}
	a.prefix = netip.PrefixFrom(local, bits)
	return a, target, flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0, a.prefix.IsValid()
}

// parseRoute reads the kernel's answer to where a packet goes (struct rtmsg
// and attributes).
func parseRoute(data []byte) (r route, dst netip.Prefix, ok bool) {
	if len(data) < unix.SizeofRtMsg {
		return r, dst, false
	}
	r.bits = int(data[1])
	addr := netip.IPv4Unspecified()
	if data[0] == unix.AF_INET6 {
		addr = netip.IPv6Unspecified()
	}
	if kind := data[7]; kind != unix.RTN_UNICAST {
		r.odd = "not one to a device"
	}
	for attr, value := range rtnl.Attributes(data[unix.SizeofRtMsg:]) {
		switch attr {
		case unix.RTA_DST:
			addr, _ = netip.AddrFromSlice(value)
		case unix.RTA_OIF:
			r.device = int(rtnl.Uint32(value))
		case unix.RTA_GATEWAY, unix.RTA_VIA:
			r.odd = "by way of a gateway"
		case unix.RTA_MULTIPATH, rtnl.RTA_NH_ID:
			r.odd = "one of several next hops"
		case unix.RTA_ENCAP_TYPE:
			r.odd = "an encapsulation"
		}
	}
	return r, netip.PrefixFrom(addr, r.bits), true
}

// qdisc is a queueing discipline of a device.
type qdisc struct {
	device int
	kind   string
	// shared is set where filters lie in a block that devices share.
	shared bool
}

// parseQdisc reads struct tcmsg and attributes.
func parseQdisc(data []byte) (q qdisc, ok bool) {
	if len(data) < sizeofTcMsg {
		return q, false
	}
	q.device = int(int32(binary.NativeEndian.Uint32(data[4:])))
	for attr, value := range rtnl.Attributes(data[sizeofTcMsg:]) {
		switch attr {
		case unix.TCA_KIND:
			q.kind = unix.ByteSliceToString(value)
		case unix.TCA_INGRESS_BLOCK, unix.TCA_EGRESS_BLOCK:
			q.shared = q.shared || rtnl.Uint32(value) != 0
		}
	}
	return q, true
}

// filter is a tc filter.
type filter struct {
	kind string
	// name and id are a bpf filter's.
	name string
	id   uint32
}

// parseFilter reads struct tcmsg and attributes. A filter's head, which stands
// for all filters of a priority, has no options and is not ok.
func parseFilter(data []byte) (f filter, ok bool) {
	if len(data) < sizeofTcMsg {
		return f, false
	}
	for attr, value := range rtnl.Attributes(data[sizeofTcMsg:]) {
		switch attr {
		case unix.TCA_KIND:
			f.kind = unix.ByteSliceToString(value)
		case unix.TCA_OPTIONS:
			ok = true
			if f.kind != "bpf" {
				continue
			}
			for attr, value := range rtnl.Attributes(value) {
				switch attr {
				case tcaBPFName:
					f.name = unix.ByteSliceToString(value)
				case tcaBPFID:
					f.id = rtnl.Uint32(value)
				}
			}
		}
	}
	return f, ok
}
