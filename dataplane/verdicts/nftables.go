//go:build linux

package verdicts

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftReader reads nftables. Chains and elements are read by the library; rules
// and sets are not, since it leaves out expressions that it does not know.
type nftReader struct {
	library *nftables.Conn
	conn    *netlink.Conn
}

// nftablesPerPacket names the rules of all tables in the calling thread's
// namespace.
func nftablesPerPacket() (found []string, err error) {
	r := nftReader{library: &nftables.Conn{}}
	if r.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer r.conn.Close()
	tables, err := r.tables()
	if errors.Is(err, unix.EINVAL) {
		return nil, nil // netlink without nftables
	}
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		some, err := t.perPacket()
		if err != nil {
			return nil, fmt.Errorf("table %s: %w", t.name, err)
		}
		found = append(found, some...)
	}
	return found, nil
}

// Hooks of the bridge family beyond those of IP. A packet that is routed comes
// to the machine through its bridge's input, and leaves by its output.
const (
	hookInput  = 1
	hookOutput = 3
)

// priorityConntrack is when conntrack looks at a packet, at its first hook.
const priorityConntrack = -200

// familyNames are nft's words for the families whose chains a forwarded packet
// meets.
var familyNames = map[nftables.TableFamily]string{
	nftables.TableFamilyIPv4:   "ip",
	nftables.TableFamilyIPv6:   "ip6",
	nftables.TableFamilyINet:   "inet",
	nftables.TableFamilyBridge: "bridge",
}

// tables lists the tables that have chains a forwarded packet meets.
func (r *nftReader) tables() ([]*ruleset, error) {
	chains, err := r.library.ListChains()
	if err != nil {
		return nil, err
	}
	tables := map[string]*ruleset{}
	var list []*ruleset
	for _, c := range chains {
		met := forwarded(c)
		if met == 0 {
			continue
		}
		name := familyNames[c.Table.Family] + " " + c.Table.Name
		if tables[name] == nil {
			t := &nftTable{nftReader: r, Table: c.Table}
			tables[name] = &ruleset{name: name, rules: t.rules}
			list = append(list, tables[name])
		}
		tables[name].bases = append(tables[name].bases, base{c.Name, met})
	}
	return list, nil
}

// forwarded are the packets of established flows that meet a chain when they are
// forwarded.
func forwarded(c *nftables.Chain) packets {
	if c.Hooknum == nil || c.Type == nftables.ChainTypeNAT || familyNames[c.Table.Family] == "" {
		return 0
	}
	hook := int(*c.Hooknum)
	if c.Table.Family == nftables.TableFamilyBridge {
		if slices.Contains([]int{hookInput, hookOutput}, hook) || slices.Contains(forwardHooks, hook) {
			return anyPacket // conntrack may look at bridged packets, or not
		}
		return 0
	}
	switch {
	case !slices.Contains(forwardHooks, hook):
		return 0
	case hook == hookPrerouting && c.Priority != nil && *c.Priority < priorityConntrack:
		return unseen
	}
	return established
}

// nftTable is a table whose chains are read as they are met.
type nftTable struct {
	*nftReader
	*nftables.Table
	sets map[string]nftSet // as far as they were asked for
}

// nftSet is what matters of a set.
type nftSet struct {
	varies []string // limits and quotas that its elements, or the objects in it, have
	whole  bool     // its elements have been read, too:
	keys   [][]byte // of the elements, without ends of intervals
	exact  bool     // whether keys are all there is to the elements
	// verdicts are those of a map, one for each key.
	verdicts []verdict
}

// dump asks for a list of what a table has.
func (t *nftTable) dump(kind uint16, attributes ...netlink.Attribute) ([]netlink.Message, error) {
	data, err := netlink.MarshalAttributes(attributes)
	if err != nil {
		return nil, err
	}
	header := []byte{byte(t.Family), unix.NFNETLINK_V0, 0, 0} // struct nfgenmsg
	return t.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: netlink.Request | netlink.Dump},
		Data:   append(header, data...),
	})
}

// sizeofGenMsg is the size of struct nfgenmsg.
const sizeofGenMsg = 4

// name is an attribute that names something.
func name(kind uint16, text string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: append([]byte(text), 0)}
}

// rules reads a chain.
func (t *nftTable) rules(chain string) ([]rule, error) {
	messages, err := t.dump(unix.NFT_MSG_GETRULE, name(unix.NFTA_RULE_TABLE, t.Name), name(unix.NFTA_RULE_CHAIN, chain))
	if err != nil {
		return nil, fmt.Errorf("reading chain %s: %w", chain, err)
	}
	var rules []rule
	for _, m := range messages {
		if len(m.Data) < sizeofGenMsg {
			continue
		}
		r := newNFTRule(t)
		err := eachAttribute(m.Data[sizeofGenMsg:], func(kind uint16, data []byte) error {
			if kind == unix.NFTA_RULE_EXPRESSIONS {
				return eachExpression(data, r.take)
			}
			return nil
		})
		if err = cmp.Or(err, r.err); err != nil {
			return nil, fmt.Errorf("reading chain %s: %w", chain, err)
		}
		rules = append(rules, r.rules()...)
	}
	return rules, nil
}

// bigEndian reads a number; those of nftables are in network byte order.
func bigEndian(b []byte) uint32 { return binary.BigEndian.Uint32(b) }

// eachAttribute calls f with each attribute of a message.
func eachAttribute(b []byte, f func(kind uint16, data []byte) error) error {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return err
	}
	for ad.Next() {
		if err := f(ad.Type(), ad.Bytes()); err != nil {
			return err
		}
	}
	return ad.Err()
}

// eachExpression calls f with the name and the data of each expression of a
// list.
func eachExpression(b []byte, f func(name string, data []byte)) error {
	return eachAttribute(b, func(_ uint16, b []byte) error { return expression(b, f) })
}

// expression calls f with the name and the data of an expression.
func expression(b []byte, f func(name string, data []byte)) error {
	var name string
	var data []byte
	err := eachAttribute(b, func(kind uint16, b []byte) error {
		switch kind {
		case unix.NFTA_EXPR_NAME:
			name = fixedString(b)
		case unix.NFTA_EXPR_DATA:
			data = b
		}
		return nil
	})
	if err == nil {
		f(name, data)
	}
	return err
}

// Attributes that x/sys lacks (linux/netfilter/nf_tables.h).
const (
	attrSetExpression  = 0x11 // NFTA_SET_EXPR
	attrSetExpressions = 0x12 // NFTA_SET_EXPRESSIONS
)

// set reads a set, with its elements only where they are asked for: there may be
// thousands.
func (t *nftTable) set(setName string, elements bool) (nftSet, error) {
	s, known := t.sets[setName]
	var err error
	if !known {
		s, err = t.readSet(setName)
	}
	if err == nil && elements && !s.whole {
		err = t.readElements(setName, &s)
	}
	if err != nil {
		return s, fmt.Errorf("set %s: %w", setName, err)
	}
	if t.sets == nil {
		t.sets = map[string]nftSet{}
	}
	t.sets[setName] = s
	return s, nil
}

func (t *nftTable) readSet(setName string) (s nftSet, err error) {
	sets, err := t.dump(unix.NFT_MSG_GETSET, name(unix.NFTA_SET_TABLE, t.Name))
	if err != nil {
		return s, err
	}
	for _, m := range sets {
		if len(m.Data) < sizeofGenMsg {
			continue
		}
		if err := s.readHead(m.Data[sizeofGenMsg:], setName); err != nil {
			return s, err
		}
	}
	return s, nil
}

func (t *nftTable) readElements(setName string, s *nftSet) error {
	elements, err := t.library.GetSetElements(&nftables.Set{Table: t.Table, Name: setName})
	if errors.Is(err, unix.ENOENT) {
		return nil // it went with its rule
	}
	s.whole, s.exact = true, true
	for _, e := range elements {
		if e.IntervalEnd || e.KeyEnd != nil {
			s.exact = false
		}
		s.keys = append(s.keys, e.Key)
		s.verdicts = append(s.verdicts, parseVerdict(e.Val))
	}
	return err
}

// readHead reads of a set's description, if it is that of the named one, what
// its elements do.
func (s *nftSet) readHead(b []byte, setName string) error {
	var varies []string
	is := false
	take := func(name string, _ []byte) { varies = append(varies, varyingStateful[name]...) }
	err := eachAttribute(b, func(kind uint16, b []byte) error {
		switch kind {
		case unix.NFTA_SET_NAME:
			is = fixedString(b) == setName
		case attrSetExpression:
			return expression(b, take)
		case attrSetExpressions:
			return eachExpression(b, take)
		case unix.NFTA_SET_OBJ_TYPE:
			if len(b) >= 4 {
				varies = append(varies, varyingObjects[bigEndian(b)]...)
			}
		}
		return nil
	})
	if is {
		s.varies = varies
	}
	return err
}

// parseVerdict reads the value of a map's element.
func parseVerdict(b []byte) (v verdict) {
	var code expr.VerdictKind
	_ = eachAttribute(b, func(kind uint16, b []byte) error { // of a map of other values: no matter what
		switch {
		case kind == unix.NFTA_VERDICT_CODE && len(b) >= 4:
			code = expr.VerdictKind(int32(bigEndian(b)))
		case kind == unix.NFTA_VERDICT_CHAIN:
			v.chain = fixedString(b)
		}
		return nil
	})
	v.kind = verdictKindOf(code)
	return v
}

// verdictKindOf is a verdict of nftables in our words.
func verdictKindOf(code expr.VerdictKind) verdictKind {
	switch code {
	case expr.VerdictReturn:
		return returns
	case expr.VerdictJump:
		return jumps
	case expr.VerdictGoto:
		return goesTo
	case expr.VerdictBreak, expr.VerdictContinue:
		return fallsAside
	}
	return terminal
}
