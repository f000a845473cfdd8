//go:build linux

package hostrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"os"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrUnsupported says that the kernel has no nf_tables, or not what we need of
// it.
var ErrUnsupported = errors.New("this kernel has no nf_tables, or not all of it (NF_TABLES_IPV4, NF_TABLES_IPV6, NFT_MASQ)")

// errChanged says that somebody changed a table after we looked and before we
// wrote. Nothing was written.
var errChanged = errors.New("others change nf_tables all the time")

// What golang.org/x/sys/unix does not name (linux/netfilter/nf_tables.h,
// libnftnl/udata.h).
const (
	attrTableUserData = 6
	attrChainUserData = 12
	dataComment       = 0 // of a table, a chain
)

// nfgenmsgSize is the size of struct nfgenmsg, which begins each message.
const nfgenmsgSize = 4

// readBuffer is for the answers to a transaction, of some twenty messages.
const readBuffer = 1 << 20

// socket is a connection to nf_tables for one reading or change. It is not kept:
// when something has failed, answers may be left unread.
type socket struct{ *netlink.Conn }

// openSocket opens a socket in the network namespace of the calling thread.
func openSocket() (*socket, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("opening a netfilter netlink socket: %w", explain(err))
	}
	_ = conn.SetReadBuffer(readBuffer) // most often the default will do
	return &socket{conn}, nil
}

// explain says what a refusal means for the user.
func explain(err error) error {
	for _, missing := range []error{
		unix.EPROTONOSUPPORT, // no netfilter netlink
		unix.EAFNOSUPPORT,    // no such family
		unix.EOPNOTSUPP,
		unix.EINVAL, // netfilter netlink knows of no nf_tables
	} {
		if errors.Is(err, missing) {
			return fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (nf_tables needs CAP_NET_ADMIN)", err)
	}
	return err
}

// message is one to nf_tables.
func message(kind uint16, flags netlink.HeaderFlags, family byte, attrs ...netlink.Attribute) netlink.Message {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		panic(err) // attributes of ours are short
	}
	return netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind),
			Flags: netlink.Request | flags,
		},
		Data: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, data...),
	}
}

// Attributes.
func text(kind uint16, value string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: append([]byte(value), 0)}
}

func number(kind uint16, value uint32) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: binary.BigEndian.AppendUint32(nil, value)}
}

func nested(kind uint16, attrs ...netlink.Attribute) netlink.Attribute {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		panic(err)
	}
	return netlink.Attribute{Type: unix.NLA_F_NESTED | kind, Data: data}
}

// comment is one as nft shows it: type, length, text.
func comment(kind uint16, value string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: append([]byte{dataComment, byte(len(value) + 1)}, append([]byte(value), 0)...)}
}

// ask asks, and gives the attributes of each answer to read. It finds nothing
// where what was asked for is not there.
func (s *socket) ask(question netlink.Message, read func(*netlink.AttributeDecoder) error) (found bool, err error) {
	answers, err := s.Execute(question)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("asking nf_tables: %w", explain(err))
	}
	for _, a := range answers {
		if len(a.Data) < nfgenmsgSize {
			return false, errors.New("nf_tables answers with half a message")
		}
		attrs, err := netlink.NewAttributeDecoder(a.Data[nfgenmsgSize:])
		if err != nil {
			return false, fmt.Errorf("reading what nf_tables answers: %w", err)
		}
		attrs.ByteOrder = binary.BigEndian
		if err := read(attrs); err != nil {
			return false, err
		}
		if err := attrs.Err(); err != nil {
			return false, fmt.Errorf("reading what nf_tables answers: %w", err)
		}
		found = true
	}
	return found, nil
}

// generation is a number that changes with each transaction of anybody in this
// network namespace, iptables-nft included.
func (s *socket) generation() (generation uint32, err error) {
	_, err = s.ask(message(unix.NFT_MSG_GETGEN, 0, unix.AF_UNSPEC), func(attrs *netlink.AttributeDecoder) error {
		for attrs.Next() {
			if attrs.Type() == unix.NFTA_GEN_ID {
				generation = attrs.Uint32()
			}
		}
		return nil
	})
	return generation, err
}

// table reads whether a table is there, and whether it has flags.
func (s *socket) table(f *family, name string) (found, odd bool, err error) {
	found, err = s.ask(message(unix.NFT_MSG_GETTABLE, 0, f.number, text(unix.NFTA_TABLE_NAME, name)), func(attrs *netlink.AttributeDecoder) error {
		for attrs.Next() {
			if attrs.Type() == unix.NFTA_TABLE_FLAGS {
				odd = attrs.Uint32() != 0
			}
		}
		return nil
	})
	return found, odd, err
}

// chain reads a chain. One that has no hook has the zero hookup.
func (s *socket) chain(f *family, table, name string) (h hookup, found bool, err error) {
	question := message(unix.NFT_MSG_GETCHAIN, 0, f.number, text(unix.NFTA_CHAIN_TABLE, table), text(unix.NFTA_CHAIN_NAME, name))
	found, err = s.ask(question, func(attrs *netlink.AttributeDecoder) error {
		for attrs.Next() {
			switch attrs.Type() {
			case unix.NFTA_CHAIN_TYPE:
				h.kind = attrs.String()
			case unix.NFTA_CHAIN_POLICY:
				h.drops = attrs.Uint32() == 0 // NF_DROP
			case unix.NFTA_CHAIN_HOOK:
				attrs.Nested(func(hook *netlink.AttributeDecoder) error {
					for hook.Next() {
						switch hook.Type() {
						case unix.NFTA_HOOK_HOOKNUM:
							h.hook = hook.Uint32()
						case unix.NFTA_HOOK_PRIORITY:
							h.priority = int32(hook.Uint32())
						}
					}
					return nil
				})
			}
		}
		return nil
	})
	return h, found, err
}

// rules reads the rules of a chain that is there.
func (s *socket) rules(f *family, table, chain string) (rules []heldRule, err error) {
	question := message(unix.NFT_MSG_GETRULE, netlink.Dump, f.number, text(unix.NFTA_RULE_TABLE, table), text(unix.NFTA_RULE_CHAIN, chain))
	_, err = s.ask(question, func(attrs *netlink.AttributeDecoder) error {
		var r heldRule
		for attrs.Next() {
			switch attrs.Type() {
			case unix.NFTA_RULE_HANDLE:
				r.handle = attrs.Uint64()
			case unix.NFTA_RULE_EXPRESSIONS:
				if exprs, ok := parseExpressions(f, attrs.Bytes()); ok {
					r.rule = decompile(f, exprs)
				}
			}
		}
		rules = append(rules, r)
		return nil
	})
	return rules, err
}

// sumRules adds the rules of a chain to a hash, but for what they have counted.
func (s *socket) sumRules(h hash.Hash, f *family, table, chain string) error {
	question := message(unix.NFT_MSG_GETRULE, netlink.Dump, f.number, text(unix.NFTA_RULE_TABLE, table), text(unix.NFTA_RULE_CHAIN, chain))
	fmt.Fprintln(h, f.word, table, chain)
	_, err := s.ask(question, func(attrs *netlink.AttributeDecoder) error {
		for attrs.Next() {
			fmt.Fprintln(h, attrs.Type())
			if attrs.Type() != unix.NFTA_RULE_EXPRESSIONS {
				h.Write(attrs.Bytes())
				continue
			}
			attrs.Nested(func(elements *netlink.AttributeDecoder) error {
				for elements.Next() {
					if b := elements.Bytes(); !isCounter(b) {
						h.Write(b)
					}
				}
				return nil
			})
		}
		return nil
	})
	return err
}

// isCounter tells an expression that counts. Its name comes first, behind the
// head of an attribute.
func isCounter(expression []byte) bool {
	const head = 4
	return len(expression) > head && bytes.HasPrefix(expression[head:], []byte("counter\x00"))
}

// countRules counts the rules of a table; none if it is not there.
func (s *socket) countRules(f *family, table string) (n int, err error) {
	question := message(unix.NFT_MSG_GETRULE, netlink.Dump, f.number, text(unix.NFTA_RULE_TABLE, table))
	_, err = s.ask(question, func(*netlink.AttributeDecoder) error { n++; return nil })
	return n, err
}

// parseExpressions reads a rule's expressions; false if one is not of the kinds
// that ours are made of.
func parseExpressions(f *family, b []byte) ([]expr.Any, bool) {
	elements, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return nil, false
	}
	var exprs []expr.Any
	for elements.Next() {
		e := parseExpression(f, elements.Bytes())
		if e == nil {
			return nil, false
		}
		exprs = append(exprs, e)
	}
	return exprs, elements.Err() == nil
}

// parseExpression reads one: its name, then what it says.
func parseExpression(f *family, b []byte) expr.Any {
	attrs, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return nil
	}
	var name string
	var said []byte
	for attrs.Next() {
		switch attrs.Type() {
		case unix.NFTA_EXPR_NAME:
			name = attrs.String()
		case unix.NFTA_EXPR_DATA:
			said = attrs.Bytes()
		}
	}
	var e expr.Any
	switch name {
	case "meta":
		e = &expr.Meta{}
	case "payload":
		e = &expr.Payload{}
	case "bitwise":
		e = &expr.Bitwise{}
	case "cmp":
		e = &expr.Cmp{}
	case "immediate":
		e = &expr.Verdict{}
	case "masq":
		e = &expr.Masq{}
	default:
		return nil
	}
	if attrs.Err() != nil || expr.Unmarshal(f.number, said, e) != nil {
		return nil
	}
	return e
}

// read reads what a table holds of flannel's.
func (s *socket) read(t table) (h held, err error) {
	h.chains = map[string]heldChain{}
	if h.exists, h.odd, err = s.table(t.family, t.family.table); err != nil || !h.exists {
		return h, err
	}
	for _, c := range t.chains {
		at, found, err := s.chain(t.family, t.family.table, c.name)
		if err != nil {
			return h, err
		}
		if !found {
			continue
		}
		rules, err := s.rules(t.family, t.family.table, c.name)
		if err != nil {
			return h, err
		}
		h.chains[c.name] = heldChain{odd: at != c.hookup, rules: rules}
	}
	return h, nil
}

// write does all steps in one transaction, or none: with errChanged when the
// generation is another.
func (s *socket) write(t table, steps []step, generation uint32) error {
	begin := message(0, 0, unix.AF_UNSPEC, number(unix.NFNL_BATCH_GENID, generation))
	begin.Header.Type = unix.NFNL_MSG_BATCH_BEGIN
	end := message(0, 0, unix.AF_UNSPEC)
	end.Header.Type = unix.NFNL_MSG_BATCH_END
	for _, m := range []netlink.Message{begin, end} {
		binary.BigEndian.PutUint16(m.Data[2:], unix.NFNL_SUBSYS_NFTABLES)
	}
	batch := []netlink.Message{begin}
	for _, step := range steps {
		m, err := t.message(step)
		if err != nil {
			return err
		}
		batch = append(batch, m)
	}
	if _, err := s.SendMessages(append(batch, end)); err != nil {
		return fmt.Errorf("changing table %s %s: %w", t.family.word, t.family.table, explain(err))
	}
	for answers := 0; answers < len(steps); { // each has its own
		got, err := s.Receive()
		if errors.Is(err, unix.ERESTART) || errors.Is(err, unix.EAGAIN) {
			return errChanged
		}
		if err != nil { // the first is what is wrong, others mostly follow from it
			return fmt.Errorf("changing table %s %s: %w", t.family.word, t.family.table, explain(err))
		}
		answers += len(got)
	}
	return nil
}

// message is a step in the kernel's words.
func (t table) message(s step) (netlink.Message, error) {
	name, chain := t.family.table, s.chain.name
	make, change := netlink.Acknowledge|netlink.Create, netlink.Acknowledge
	switch s.op {
	case addTable:
		return message(unix.NFT_MSG_NEWTABLE, make, t.family.number,
			text(unix.NFTA_TABLE_NAME, name), number(unix.NFTA_TABLE_FLAGS, 0), comment(attrTableUserData, t.comment())), nil
	case deleteTable:
		return message(unix.NFT_MSG_DELTABLE, change, t.family.number, text(unix.NFTA_TABLE_NAME, name)), nil
	case addChain:
		return message(unix.NFT_MSG_NEWCHAIN, make, t.family.number,
			text(unix.NFTA_CHAIN_TABLE, name), text(unix.NFTA_CHAIN_NAME, chain),
			nested(unix.NFTA_CHAIN_HOOK,
				number(unix.NFTA_HOOK_HOOKNUM, s.chain.hook), number(unix.NFTA_HOOK_PRIORITY, uint32(s.chain.priority))),
			text(unix.NFTA_CHAIN_TYPE, s.chain.kind), comment(attrChainUserData, s.chain.comment)), nil
	case flushChain:
		return message(unix.NFT_MSG_DELRULE, change, t.family.number,
			text(unix.NFTA_RULE_TABLE, name), text(unix.NFTA_RULE_CHAIN, chain)), nil
	case deleteChain:
		return message(unix.NFT_MSG_DELCHAIN, change, t.family.number,
			text(unix.NFTA_CHAIN_TABLE, name), text(unix.NFTA_CHAIN_NAME, chain)), nil
	case deleteRule:
		return message(unix.NFT_MSG_DELRULE, change, t.family.number,
			text(unix.NFTA_RULE_TABLE, name), text(unix.NFTA_RULE_CHAIN, chain),
			netlink.Attribute{Type: unix.NFTA_RULE_HANDLE, Data: binary.BigEndian.AppendUint64(nil, s.handle)}), nil
	case addRule:
		var exprs []netlink.Attribute
		for _, e := range s.rule.compile(t.family) {
			data, err := expr.Marshal(t.family.number, e)
			if err != nil {
				return netlink.Message{}, fmt.Errorf("writing a rule: %w", err)
			}
			exprs = append(exprs, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: data})
		}
		return message(unix.NFT_MSG_NEWRULE, make|netlink.Append, t.family.number,
			text(unix.NFTA_RULE_TABLE, name), text(unix.NFTA_RULE_CHAIN, chain), nested(unix.NFTA_RULE_EXPRESSIONS, exprs...)), nil
	}
	return netlink.Message{}, fmt.Errorf("%d is no step", s.op)
}
