package ebpf

import (
	"encoding/binary"
	"net/netip"
)

// The conversions between Go's addresses and the __be32 of the maps, which
// bpf2go shows as a uint32 with the bytes in memory order.

func toBE32(addr netip.Addr) uint32 {
	b := addr.As4()
	return binary.NativeEndian.Uint32(b[:])
}

func fromBE32(be uint32) netip.Addr {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], be)
	return netip.AddrFrom4(b)
}

func toPrefix(p netip.Prefix) weftPrefix {
	return weftPrefix{Bits: uint32(p.Bits()), Addr: toBE32(p.Addr())}
}

func fromPrefix(p weftPrefix) netip.Prefix {
	return netip.PrefixFrom(fromBE32(p.Addr), int(p.Bits))
}

func toPeer(p member) weftPeer {
	return weftPeer{Remote: toBE32(p.remote), Slot: p.slot, Mac: p.mac}
}

func fromPeer(p weftPeer) member {
	return member{remote: fromBE32(p.Remote), slot: p.Slot, mac: p.Mac}
}

func toNode(n member) weftNode {
	return weftNode{Remote: toBE32(n.remote), Slot: n.slot}
}

func fromNode(n weftNode) member {
	return member{remote: fromBE32(n.Remote), slot: n.Slot}
}

// The same for IPv6.

func toAddress6(addr netip.Addr) (a weftAddress6) {
	b := addr.As16()
	for i := range a.Words {
		a.Words[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return a
}

func fromAddress6(a weftAddress6) netip.Addr {
	var b [16]byte
	for i, word := range a.Words {
		binary.NativeEndian.PutUint32(b[4*i:], word)
	}
	return netip.AddrFrom16(b)
}

func toPrefix6(p netip.Prefix) weftPrefix6 {
	return weftPrefix6{Bits: uint32(p.Bits()), Addr: toAddress6(p.Addr())}
}

func fromPrefix6(p weftPrefix6) netip.Prefix {
	return netip.PrefixFrom(fromAddress6(p.Addr), int(p.Bits))
}

func toPeer6(p member) weftPeer6 {
	return weftPeer6{Remote: toAddress6(p.remote), Slot: p.slot, Mac: p.mac}
}

func fromPeer6(p weftPeer6) member {
	return member{remote: fromAddress6(p.Remote), slot: p.Slot, mac: p.Mac}
}

func toNode6(n member) weftNode6 {
	return weftNode6{Remote: toAddress6(n.remote), Slot: n.slot}
}

func fromNode6(n weftNode6) member {
	return member{remote: fromAddress6(n.Remote), slot: n.Slot}
}
