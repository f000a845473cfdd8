package ebpf

import (
	"encoding/binary"
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
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

func toPeer(p state.Peer, slot uint32) weftPeer {
	return weftPeer{Remote: toBE32(p.PublicIP), Slot: slot, Mac: p.MAC}
}

func fromPeer(key weftPrefix, value weftPeer) state.Peer {
	return state.Peer{Prefix: fromPrefix(key), PublicIP: fromBE32(value.Remote), MAC: value.Mac}
}
