//go:build linux

package hostrules

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// register is the one register that our rules use. Each match loads what it
// looks at.
const register = unix.NFT_REG_1

// compile is a rule in the kernel's words: what nft makes of it.
func (r rule) compile(f *family) []expr.Any {
	var exprs []expr.Any
	if r.kubeMark {
		exprs = append(exprs,
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: binary.NativeEndian.AppendUint32(nil, kubeMark)})
	}
	exprs = append(exprs, r.from.compile(f, f.sourceOffset)...)
	exprs = append(exprs, r.to.compile(f, f.destinationOffset)...)
	switch r.verdict {
	case leave:
		return append(exprs, &expr.Verdict{Kind: expr.VerdictReturn})
	case accept:
		return append(exprs, &expr.Verdict{Kind: expr.VerdictAccept})
	case masquerade, masqueradeRandom:
		return append(exprs, &expr.Masq{FullyRandom: r.verdict == masqueradeRandom})
	}
	panic("not a verdict of ours: " + r.verdict)
}

// compile loads the bytes of an address that the prefix has bits of, masks the
// last where it must, and compares.
func (m match) compile(f *family, offset uint32) []expr.Any {
	if !m.prefix.IsValid() {
		return nil
	}
	size, value := f.addressSize, m.prefix.Addr().AsSlice()
	var mask []expr.Any
	if length := m.prefix.Bits(); length%8 == 0 {
		size = uint32(length / 8)
	} else {
		ones := make([]byte, size)
		for i := range length {
			ones[i/8] |= 0x80 >> (i % 8)
		}
		mask = append(mask, &expr.Bitwise{
			SourceRegister: register, DestRegister: register, Len: size, Mask: ones, Xor: make([]byte, size),
		})
	}
	op := expr.CmpOpEq
	if m.not {
		op = expr.CmpOpNeq
	}
	exprs := []expr.Any{&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}}
	exprs = append(exprs, mask...)
	return append(exprs, &expr.Cmp{Op: op, Register: register, Data: value[:size]})
}

// decompile reads a rule that is like ours, whoever compiled it. Any other is
// the zero rule.
func decompile(f *family, exprs []expr.Any) rule {
	var r rule
	for len(exprs) > 0 {
		n := r.readMark(exprs)
		if n == 0 {
			n = r.readMatch(f, exprs)
		}
		if n == 0 {
			break
		}
		exprs = exprs[n:]
	}
	if len(exprs) != 1 {
		return rule{}
	}
	switch e := exprs[0].(type) {
	case *expr.Verdict:
		switch e.Kind {
		case expr.VerdictReturn:
			r.verdict = leave
		case expr.VerdictAccept:
			r.verdict = accept
		}
	case *expr.Masq:
		switch *e {
		case expr.Masq{}:
			r.verdict = masquerade
		case expr.Masq{FullyRandom: true}:
			r.verdict = masqueradeRandom
		}
	}
	if r.verdict == "" {
		return rule{}
	}
	return r
}

// readMark reads the match on kube-proxy's mark, and tells how many expressions
// that took: none when there is no such match.
func (r *rule) readMark(exprs []expr.Any) int {
	if len(exprs) < 2 || r.kubeMark || r.from.prefix.IsValid() || r.to.prefix.IsValid() {
		return 0
	}
	meta, isMeta := exprs[0].(*expr.Meta)
	cmp, isCmp := exprs[1].(*expr.Cmp)
	if !isMeta || !isCmp || meta.SourceRegister || meta.Key != expr.MetaKeyMARK || cmp.Op != expr.CmpOpEq ||
		cmp.Register != meta.Register || !bytes.Equal(cmp.Data, binary.NativeEndian.AppendUint32(nil, kubeMark)) {
		return 0
	}
	r.kubeMark = true
	return 2
}

// readMatch reads a match on an address, the source's first.
func (r *rule) readMatch(f *family, exprs []expr.Any) int {
	payload, ok := exprs[0].(*expr.Payload)
	if !ok || payload.OperationType != expr.PayloadLoad || payload.Base != expr.PayloadBaseNetworkHeader ||
		payload.Len == 0 || payload.Len > f.addressSize {
		return 0
	}
	size, n := int(payload.Len), 1
	length := 8 * size
	if len(exprs) > n {
		if bitwise, ok := exprs[n].(*expr.Bitwise); ok {
			if bitwise.SourceRegister != payload.DestRegister || bitwise.DestRegister != payload.DestRegister ||
				len(bitwise.Mask) != size || !bytes.Equal(bitwise.Xor, make([]byte, size)) {
				return 0
			}
			if length = leadingOnes(bitwise.Mask); length < 0 {
				return 0
			}
			n++
		}
	}
	if len(exprs) <= n {
		return 0
	}
	cmp, ok := exprs[n].(*expr.Cmp)
	if !ok || cmp.Register != payload.DestRegister || len(cmp.Data) != size || cmp.Op != expr.CmpOpEq && cmp.Op != expr.CmpOpNeq {
		return 0
	}
	addr, _ := netip.AddrFromSlice(append(bytes.Clone(cmp.Data), make([]byte, int(f.addressSize)-size)...))
	m := match{not: cmp.Op == expr.CmpOpNeq, prefix: netip.PrefixFrom(addr, length)}
	switch {
	case payload.Offset == f.sourceOffset && !r.from.prefix.IsValid() && !r.to.prefix.IsValid():
		r.from = m
	case payload.Offset == f.destinationOffset && !r.to.prefix.IsValid():
		r.to = m
	default:
		return 0
	}
	return n + 1
}

// leadingOnes is the length of a netmask, negative for what is none.
func leadingOnes(mask []byte) int {
	n := 0
	for i, b := range mask {
		ones := bits.LeadingZeros8(^b)
		n += ones
		if ones == 8 {
			continue
		}
		if b<<ones != 0 || len(bytes.Trim(mask[i+1:], "\x00")) > 0 {
			return -1
		}
		break
	}
	return n
}
