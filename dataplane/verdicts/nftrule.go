//go:build linux

package verdicts

import (
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// varyingStateful are expressions that count packets and judge by it, with our
// name for each.
var varyingStateful = map[string][]string{"limit": {"limit"}, "quota": {"quota"}}

// varyingObjects are the same as named objects.
var varyingObjects = map[uint32][]string{unix.NFT_OBJECT_LIMIT: {"limit"}, unix.NFT_OBJECT_QUOTA: {"quota"}}

// source is where a register's value comes from, as far as it matters.
type source uint8

const (
	elsewhere source = iota
	fromState
	fromProtocol
	fromTCPFlags
	fromFragment // the field of IPv4 that has a fragment's offset
	fromDestinationPort
)

// zeros are bits that are not set in the packets that matter.
var zeros = map[source][]byte{
	fromTCPFlags: {tcpFlagsKernel},
	fromFragment: {0x3f, 0xff}, // more fragments, offset
}

// value is what is in a register: (source & mask) ^ xor.
type value struct {
	source    source
	mask, xor []byte // nil: all of it, as it is
}

// nftRule makes a rule of expressions.
type nftRule struct {
	rule
	table     *nftTable
	registers map[uint32]value
	// byState is what a map of states leads to; the rule is then one for each.
	byState map[packets]verdict
	err     error
}

func newNFTRule(t *nftTable) *nftRule {
	return &nftRule{rule: rule{packets: anyPacket}, table: t, registers: map[uint32]value{}}
}

// rules returns what was made.
func (r *nftRule) rules() []rule {
	if r.byState == nil {
		return []rule{r.rule}
	}
	var rules []rule
	for state, verdict := range r.byState {
		each := r.rule
		each.packets &= state
		each.verdicts = append(slices.Clone(each.verdicts), verdict)
		rules = append(rules, each)
	}
	return rules
}

// take takes the next expression.
func (r *nftRule) take(name string, data []byte) {
	if parse, known := expressions[name]; known {
		if err := parse(r, data); err != nil && r.err == nil {
			r.err = fmt.Errorf("expression %s: %w", name, err)
		}
		return
	}
	// One that is not known may do anything.
	clear(r.registers)
	r.conditional, r.acts = true, true
}

// parsed makes a parser of an expression that the library knows.
func parsed[E expr.Any](fresh func() E, take func(*nftRule, E)) func(*nftRule, []byte) error {
	return func(r *nftRule, data []byte) error {
		e := fresh()
		if err := expr.Unmarshal(byte(r.table.Family), data, e); err != nil {
			return err
		}
		take(r, e)
		return nil
	}
}

// does makes a parser of an expression of which it's enough to know that it is
// there.
func does(f func(*nftRule)) func(*nftRule, []byte) error {
	return func(r *nftRule, _ []byte) error {
		f(r)
		return nil
	}
}

var (
	// counts neither matches nor changes anything.
	counts = does(func(*nftRule) {})
	// asks writes into a register what does not differ between the packets of
	// a flow, or with time only.
	asks = does(func(r *nftRule) { clear(r.registers) })
	// filters matches some packets.
	filters = does(func(r *nftRule) { r.conditional = true })
	// changes changes the packet, or what is known of its flow.
	changes = does(func(r *nftRule) { r.acts = true })
	// ends is a verdict.
	ends = does(func(r *nftRule) { r.verdicts = append(r.verdicts, verdict{kind: terminal}) })
)

// expressions are those that are known. It is filled by init because it leads
// back to itself, by the elements of sets.
var expressions map[string]func(*nftRule, []byte) error

func init() {
	expressions = map[string]func(*nftRule, []byte) error{
		"counter": counts, "last": counts, "log": counts, "flow_offload": counts,
		"fib": asks, "hash": asks, "rt": asks, "socket": asks, "xfrm": asks, "tunnel": asks, "byteorder": asks, "osf": asks,
		"connlimit": filters,
		"notrack":   changes, "tproxy": changes,
		"reject": ends, "nat": ends, "masq": ends, "redir": ends, "synproxy": ends,

		"limit": does(func(r *nftRule) { r.vary("limit"); r.conditional = true }),
		"quota": does(func(r *nftRule) { r.vary("quota"); r.conditional = true }),
		"queue": does(func(r *nftRule) { r.vary("queue"); r.verdicts = append(r.verdicts, verdict{kind: terminal}) }),
		"dup":   does(func(r *nftRule) { r.vary("dup"); r.acts = true }),
		"numgen": does(func(r *nftRule) {
			r.vary("numgen")
			clear(r.registers)
		}),

		"meta":      parsed(func() *expr.Meta { return &expr.Meta{} }, (*nftRule).meta),
		"ct":        parsed(func() *expr.Ct { return &expr.Ct{} }, (*nftRule).ct),
		"payload":   parsed(func() *expr.Payload { return &expr.Payload{} }, (*nftRule).payload),
		"exthdr":    parsed(func() *expr.Exthdr { return &expr.Exthdr{} }, (*nftRule).exthdr),
		"bitwise":   parsed(func() *expr.Bitwise { return &expr.Bitwise{} }, (*nftRule).bitwise),
		"cmp":       parsed(func() *expr.Cmp { return &expr.Cmp{} }, (*nftRule).cmp),
		"range":     filters,
		"lookup":    parsed(func() *expr.Lookup { return &expr.Lookup{} }, (*nftRule).lookup),
		"immediate": (*nftRule).immediate,
		"dynset":    (*nftRule).dynset,
		"objref":    (*nftRule).objref,
		"match":     (*nftRule).xtMatch,
		"target":    (*nftRule).xtTarget,
	}
}

// vary takes notice of what treats packets of one flow differently.
func (r *nftRule) vary(what ...string) { r.varies = append(r.varies, what...) }

// varyingMeta are keys of meta that differ between packets.
var varyingMeta = map[expr.MetaKey]string{
	expr.MetaKeyLEN: "meta length", expr.MetaKeyPRANDOM: "meta random", expr.MetaKeyCPU: "meta cpu",
}

func (r *nftRule) meta(e *expr.Meta) {
	if e.SourceRegister {
		r.acts = r.acts || e.Key != expr.MetaKeyNFTRACE
		return
	}
	r.registers[e.Register] = value{}
	if e.Key == expr.MetaKeyL4PROTO {
		r.registers[e.Register] = value{source: fromProtocol}
	}
	if what := varyingMeta[e.Key]; what != "" {
		r.vary(what)
	}
}

// varyingCt are keys of ct that differ between packets.
var varyingCt = map[expr.CtKey]string{
	expr.CtKeyBYTES: "ct bytes", expr.CtKeyPKTS: "ct packets", expr.CtKeyAVGPKT: "ct avgpkt",
}

func (r *nftRule) ct(e *expr.Ct) {
	if e.SourceRegister {
		r.acts = true
		return
	}
	r.registers[e.Register] = value{}
	if e.Key == expr.CtKeySTATE {
		r.registers[e.Register] = value{source: fromState}
	}
	if what := varyingCt[e.Key]; what != "" {
		r.vary(what)
	}
}

// payloadInner is the base of what a transport header is followed by
// (NFT_PAYLOAD_INNER_HEADER).
const payloadInner = 3

func (r *nftRule) payload(e *expr.Payload) {
	if e.OperationType == expr.PayloadWrite {
		r.acts = true
		return
	}
	from := elsewhere
	switch {
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset == tcpFlagsOffset && e.Len == 1:
		from = fromTCPFlags
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset == 2 && e.Len == 2:
		from = fromDestinationPort
	case e.Base == expr.PayloadBaseTransportHeader && e.Offset+e.Len > 4: // behind the ports
		r.vary(fmt.Sprintf("@th,%d,%d", e.Offset*8, e.Len*8))
	case e.Base == payloadInner:
		r.vary(fmt.Sprintf("@ih,%d,%d", e.Offset*8, e.Len*8))
	case e.Base == expr.PayloadBaseNetworkHeader:
		from = r.networkHeader(e.Offset, e.Len)
	}
	r.registers[e.DestRegister] = value{source: from}
}

// networkHeader reads what field of an IPv4 or IPv6 header is loaded.
func (r *nftRule) networkHeader(offset, size uint32) source {
	switch [2]uint32{offset, size} {
	case [2]uint32{9, 1}: // ip protocol
		return fromProtocol
	case [2]uint32{6, 1}: // ip6 nexthdr
		r.conditional = true // others may come before the transport header
		return fromProtocol
	case [2]uint32{6, 2}:
		return fromFragment
	case [2]uint32{2, 2}:
		r.vary("ip length")
	case [2]uint32{4, 2}:
		r.vary("ip id or ip6 length")
	case [2]uint32{10, 2}:
		r.vary("ip checksum")
	}
	return elsewhere
}

// synOptions are TCP options that packets of an established flow do not have:
// maximum segment size, window scale, selective acknowledgements permitted.
var synOptions = []uint8{2, 3, 4}

func (r *nftRule) exthdr(e *expr.Exthdr) {
	if e.SourceRegister != 0 {
		r.acts = true
		return
	}
	r.registers[e.DestRegister] = value{}
	if e.Op == expr.ExthdrOpTcpopt && !slices.Contains(synOptions, e.Type) {
		r.vary("tcp option")
	}
	r.conditional = true
}

func (r *nftRule) bitwise(e *expr.Bitwise) {
	v := r.registers[e.SourceRegister]
	if v.mask != nil || e.Mask == nil || len(e.Mask) != len(e.Xor) {
		v = value{} // a shift, or one upon another
	}
	v.mask, v.xor = e.Mask, e.Xor
	r.registers[e.DestRegister] = v
}

func (r *nftRule) cmp(e *expr.Cmp) {
	v := r.registers[e.Register]
	exact := e.Op == expr.CmpOpEq || e.Op == expr.CmpOpNeq
	equal := e.Op == expr.CmpOpEq
	switch {
	case exact && v.source == fromState && len(e.Data) == 4:
		r.matchState(v, func(b []byte) bool { return slices.Equal(b, e.Data) == equal })
	case exact && v.source == fromProtocol && v.mask == nil && len(e.Data) == 1:
		if same := ofProtocol(e.Data[0]); equal {
			r.packets &= same
		} else {
			r.packets &^= same
		}
	case exact && v.source == fromDestinationPort && v.mask == nil && r.packets&^onlyUDP == 0 &&
		slices.Equal(e.Data, []byte{dnsPort >> 8, dnsPort & 0xff}):
		if equal {
			r.packets = 0
		}
	case exact && len(zeros[v.source]) == len(e.Data):
		r.matchBits(v, e.Data, equal)
		r.conditional = true
	default:
		r.conditional = true
	}
}

// matchState has the rule match those states for which match is true of what is
// in the register.
func (r *nftRule) matchState(v value, match func([]byte) bool) {
	for _, state := range []packets{unseen, established} {
		if !match(v.of(stateBytes(state))) {
			r.packets &^= state
		}
	}
}

// stateBytes is a state in a register: the bits are those of xtables too.
func stateBytes(state packets) []byte {
	bit := uint32(xtInvalid)
	if state == established {
		bit = xtEstablished
	}
	return native.AppendUint32(nil, bit)
}

// of is what the register holds if this is what it was loaded from.
func (v value) of(source []byte) []byte {
	b := slices.Clone(source)
	for i := range min(len(b), len(v.mask)) {
		b[i] = b[i]&v.mask[i] ^ v.xor[i]
	}
	return b
}

// matchBits has the rule match nothing if the bits that are not set decide.
func (r *nftRule) matchBits(v value, want []byte, equal bool) {
	decided, differs := true, false
	for i, zero := range zeros[v.source] {
		mask, xor := byte(0xff), byte(0)
		if len(v.mask) == len(want) {
			mask, xor = v.mask[i], v.xor[i]
		}
		decided = decided && mask&^zero == 0
		differs = differs || (xor^want[i])&(zero|^mask) != 0
	}
	if differs && equal || decided && !differs && !equal {
		r.packets = 0
	}
}

func (r *nftRule) lookup(e *expr.Lookup) {
	v := r.registers[e.SourceRegister]
	verdicts := e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT
	set, err := r.table.set(e.SetName, verdicts || v.source == fromState || v.source == fromProtocol)
	if err != nil && r.err == nil {
		r.err = err
	}
	r.vary(set.varies...)
	if verdicts {
		r.lookupVerdict(set, v)
		return
	}
	switch {
	case e.IsDestRegSet:
		r.registers[e.DestRegister] = value{}
	case set.exact && v.source == fromState:
		r.matchState(v, func(b []byte) bool { return set.index(b) >= 0 != e.Invert })
		return
	case set.exact && v.source == fromProtocol && v.mask == nil && !e.Invert && !slices.ContainsFunc(set.keys, expressKey):
		r.packets = 0
	}
	r.conditional = true
}

// expressKey tells whether an element is a protocol of established flows, or no
// protocol.
func expressKey(key []byte) bool { return len(key) != 1 || ofProtocol(key[0]) != 0 }

// index is the number of an element, or less than zero.
func (s nftSet) index(key []byte) int {
	return slices.IndexFunc(s.keys, func(k []byte) bool { return slices.Equal(k, key) })
}

// lookupVerdict reads a map of verdicts: what it leads to in each state, or what
// it can lead to.
func (r *nftRule) lookupVerdict(set nftSet, v value) {
	if set.exact && v.source == fromState && len(set.keys) > 0 && len(set.keys[0]) == 4 {
		r.byState = map[packets]verdict{}
		for _, state := range []packets{unseen, established} {
			if i := set.index(v.of(stateBytes(state))); i >= 0 {
				r.byState[state] = set.verdicts[i]
			}
		}
		return
	}
	r.conditional = true
	r.verdicts = append(r.verdicts, set.verdicts...)
}

// immediate puts a constant into a register, or is a verdict.
func (r *nftRule) immediate(data []byte) error {
	var e expr.Immediate
	if err := expr.Unmarshal(byte(r.table.Family), data, &e); err != nil {
		return err
	}
	if e.Register != unix.NFT_REG_VERDICT {
		r.registers[e.Register] = value{}
		return nil
	}
	var v expr.Verdict
	if err := expr.Unmarshal(byte(r.table.Family), data, &v); err != nil {
		return err
	}
	r.verdicts = append(r.verdicts, verdict{verdictKindOf(v.Kind), v.Chain})
	return nil
}

// dynset adds to a set, and does what its elements do.
func (r *nftRule) dynset(data []byte) error {
	const attrExpressions = 0xa // NFTA_DYNSET_EXPRESSIONS
	take := func(name string, _ []byte) {
		r.vary(varyingStateful[name]...)
		r.conditional = true
	}
	return eachAttribute(data, func(kind uint16, b []byte) error {
		switch kind {
		case unix.NFTA_DYNSET_EXPR:
			return expression(b, take)
		case attrExpressions:
			return eachExpression(b, take)
		}
		return nil
	})
}

// objref does what a named object does, or those of a map.
func (r *nftRule) objref(data []byte) error {
	return eachAttribute(data, func(kind uint16, b []byte) error {
		switch {
		case kind == unix.NFTA_OBJREF_IMM_TYPE && len(b) >= 4:
			r.object(varyingObjects[bigEndian(b)])
		case kind == unix.NFTA_OBJREF_SET_NAME:
			set, err := r.table.set(fixedString(b), false)
			r.object(set.varies)
			return err
		}
		return nil
	})
}

// object does what an object does that varies so.
func (r *nftRule) object(varies []string) {
	r.vary(varies...)
	r.conditional = r.conditional || len(varies) > 0
}

// xtMatch is a match of xtables, as iptables-nft has them.
func (r *nftRule) xtMatch(data []byte) error {
	var name string
	var revision int
	var info []byte
	err := eachAttribute(data, func(kind uint16, b []byte) error {
		switch {
		case kind == unix.NFTA_MATCH_NAME:
			name = fixedString(b)
		case kind == unix.NFTA_MATCH_REV && len(b) >= 4:
			revision = int(bigEndian(b))
		case kind == unix.NFTA_MATCH_INFO:
			info = b
		}
		return nil
	})
	r.match(name, revision, info)
	return err
}

// xtTarget is a target of xtables.
func (r *nftRule) xtTarget(data []byte) error {
	return eachAttribute(data, func(kind uint16, b []byte) error {
		if kind == unix.NFTA_TARGET_NAME {
			r.target(fixedString(b))
		}
		return nil
	})
}
