//go:build linux

package firewall

import (
	"encoding/binary"
	"fmt"
	"reflect"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// compile is a rule in the kernel's words.
func compile(r rule) []expr.Any {
	var exprs []expr.Any
	for _, phrase := range r {
		exprs = append(exprs, compilePhrase(phrase)...)
	}
	return exprs
}

// register is the one register that our rules use. Each phrase loads what it
// looks at.
const register = unix.NFT_REG_1

// compilePhrase is a phrase in the kernel's words: what nft makes of it.
func compilePhrase(phrase string) []expr.Any {
	var port uint16
	if n, _ := fmt.Sscanf(phrase, "udp sport %d", &port); n == 1 {
		return portIs(0, port)
	}
	if n, _ := fmt.Sscanf(phrase, "udp dport %d", &port); n == 1 {
		return portIs(2, port)
	}
	// Where the addresses are: struct iphdr, struct ipv6hdr.
	switch phrase {
	case toNodes4:
		return addressIn("nodes4", unix.NFPROTO_IPV4, 16)
	case toNodes6:
		return addressIn("nodes6", unix.NFPROTO_IPV6, 24)
	case fromNodes4:
		return addressIn("nodes4", unix.NFPROTO_IPV4, 12)
	case fromNodes6:
		return addressIn("nodes6", unix.NFPROTO_IPV6, 8)
	case fromPods4:
		return addressIn("prefixes4", unix.NFPROTO_IPV4, 12)
	case fromPods6:
		return addressIn("prefixes6", unix.NFPROTO_IPV6, 8)
	case fromDevices:
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register},
			&expr.Lookup{SourceRegister: register, SetName: "pod_devices"},
		}
	case fromLoopback:
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register}, equals(nameKey("lo")...)}
	case isReply:
		const reply = 1 // IP_CT_DIR_REPLY of linux/netfilter/nf_conntrack_tuple_common.h
		return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: register}, equals(reply)}
	case sourceIsHere:
		return []expr.Any{
			&expr.Fib{Register: register, ResultADDRTYPE: true, FlagSADDR: true},
			equals(binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)...),
		}
	case otherWayBack:
		return []expr.Any{
			&expr.Fib{Register: register, ResultOIF: true, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true},
			equals(0, 0, 0, 0),
		}
	case count:
		return []expr.Any{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counterName}}
	case drop:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}
	case back:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
	case judgeTo:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "to_node"}}
	case judgeFrom:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "from_node"}}
	case judgeOutput:
		return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: "through_node"}}
	}
	panic("not a phrase of ours: " + phrase)
}

// portIs matches a port of UDP, by its place in struct udphdr.
func portIs(offset uint32, port uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		equals(unix.IPPROTO_UDP),
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		equals(binary.BigEndian.AppendUint16(nil, port)...),
	}
}

// addressIn looks an address up in a set, by its place in the IP header.
func addressIn(set string, family byte, offset uint32) []expr.Any {
	size := uint32(4)
	if family == unix.NFPROTO_IPV6 {
		size = 16
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register},
		equals(family),
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Lookup{SourceRegister: register, SetName: set},
	}
}

// equals compares what a phrase has loaded.
func equals(value ...byte) *expr.Cmp {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: value}
}

// nameKey is a device's name as the kernel compares it.
func nameKey(name string) []byte {
	key := make([]byte, nameSize)
	copy(key, name)
	return key
}

// decompile finds the rule among ours that reads as these words. Any other is
// a rule without phrases.
func decompile(exprs []expr.Any, ours []rule) rule {
	for _, r := range ours {
		if reflect.DeepEqual(compile(r), exprs) {
			return r
		}
	}
	return nil
}

// keyTypes are the set types in the library's words.
var keyTypes = map[string]nftables.SetDatatype{
	"ipv4_addr": nftables.TypeIPAddr,
	"ipv6_addr": nftables.TypeIP6Addr,
	"ifname":    nftables.TypeIFName,
}
