package verdicts

import "encoding/binary"

// native is the byte order of what the kernel keeps to itself: netlink's own
// fields, entries of tables.
var native = binary.NativeEndian

// What a match or target of xtables is about, which both interfaces of iptables
// and of ebtables have in their rules.

// varyingMatches treat packets of one flow differently from one another, by
// chance, by rate, by count or by what is in them.
var varyingMatches = map[string]bool{
	"bpf": true, "connbytes": true, "cpu": true, "hashlimit": true, "length": true, "length2": true, "limit": true,
	"quota": true, "quota2": true, "rateest": true, "recent": true, "statistic": true, "string": true, "u32": true,
	"ecn": true, "ipp2p": true, "layer7": true, "ndpi": true, "nth": true, "random": true,
}

// varyingTargets want to see each packet of a flow.
var varyingTargets = map[string]bool{"NFQUEUE": true, "QUEUE": true, "TEE": true}

// idleTargets log and count.
var idleTargets = map[string]bool{
	"AUDIT": true, "IDLETIMER": true, "LED": true, "LOG": true, "NFLOG": true, "RATEEST": true, "TRACE": true, "ULOG": true,
	"log": true, "nflog": true, // of ebtables
}

// endingTargets let nothing through.
var endingTargets = map[string]bool{"NFQUEUE": true, "QUEUE": true, "REJECT": true}

// match has a rule match less.
func (r *rule) match(name string, revision int, info []byte) {
	switch name {
	case "comment":
		return
	case "conntrack":
		r.matchConntrack(revision, info)
		return
	case "state":
		if len(info) >= 4 {
			r.matchStates(uint16(native.Uint32(info)), false)
			return
		}
	case "tcp":
		r.matchTCP(info)
	}
	if varyingMatches[name] {
		r.varies = append(r.varies, name)
	}
	r.conditional = true
}

// Bits of the states of xt_conntrack and xt_state.
const (
	xtInvalid     = 1 << 0
	xtEstablished = 1 << 1
	xtNAT         = 1<<6 | 1<<7 // of a packet in any state
)

// matchConntrack reads struct xt_conntrack_mtinfo1, 2 or 3.
func (r *rule) matchConntrack(revision int, info []byte) {
	const (
		matchFlags, invertFlags, states = 146, 148, 150
		flagState                       = 1
	)
	if revision < 1 || len(info) < states+2 {
		r.conditional = true
		return
	}
	flags := native.Uint16(info[matchFlags:])
	if flags&^flagState != 0 {
		r.conditional = true
	}
	mask := native.Uint16(info[states:])
	if revision == 1 {
		mask = uint16(info[states])
	}
	if flags&flagState != 0 {
		r.matchStates(mask, native.Uint16(info[invertFlags:])&flagState != 0)
	}
}

// matchStates has a rule match packets in some states only, or in all others.
func (r *rule) matchStates(mask uint16, invert bool) {
	var in packets
	if mask&xtInvalid != 0 {
		in |= unseen
	}
	if mask&xtEstablished != 0 {
		in |= established
	}
	switch {
	case mask&xtNAT != 0 && invert:
		r.packets &^= in
		r.conditional = true
	case mask&xtNAT != 0:
		if in&established == 0 {
			r.conditional = true
		}
		r.packets &= in | established
	case invert:
		r.packets &^= in
	default:
		r.packets &= in
	}
}

// Flags of TCP. One with any of these first ones goes through the kernel.
const (
	tcpFlagsOffset = 13
	tcpFlagsKernel = 1<<0 | 1<<1 | 1<<2 // FIN, SYN, RST
)

// matchTCP reads struct xt_tcp.
func (r *rule) matchTCP(info []byte) {
	const mask, flags, invert, invertFlags = 9, 10, 11, 1 << 2
	if len(info) > invert && info[invert]&invertFlags == 0 && info[mask]&info[flags]&tcpFlagsKernel != 0 {
		r.packets = 0
	}
}

// target has a rule do something. A target without a name, or of a jump, is
// none of these.
func (r *rule) target(name string) {
	if varyingTargets[name] {
		r.varies = append(r.varies, name)
	}
	if endingTargets[name] {
		r.verdicts = append(r.verdicts, verdict{kind: terminal})
	}
	r.acts = r.acts || !idleTargets[name]
}
