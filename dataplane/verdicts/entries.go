//go:build linux

package verdicts

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Hooks, numbered alike for IPv4, IPv6 and inet.
const (
	hookPrerouting  = 0
	hookForward     = 2
	hookPostrouting = 4
)

// forwardHooks are those that a forwarded packet meets.
var forwardHooks = []int{hookPrerouting, hookForward, hookPostrouting}

// legacyPerPacket names the rules of the tables of iptables-legacy in the
// calling thread's namespace.
func legacyPerPacket() (found []string, err error) {
	for _, f := range legacyFamilies {
		rules, err := f.perPacket()
		if err != nil {
			return nil, fmt.Errorf("%stables-legacy: %w", f.name, err)
		}
		found = append(found, rules...)
	}
	return found, nil
}

func (f *legacyFamily) perPacket() (found []string, err error) {
	file := f.namesFile()
	file.open()
	defer file.close()
	names, err := tableNames(&file)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	fd, err := f.socket()
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for _, name := range names {
		if name == "nat" {
			continue // only the first packet of a flow meets it
		}
		info, entries, err := f.readTable(fd, name)
		if err != nil {
			return nil, err
		}
		states := established
		if name == "raw" {
			states = unseen // it comes before conntrack
		}
		rules, err := f.entry.ruleset(info, entries, states)
		if err != nil {
			return nil, fmt.Errorf("table %s: %w", name, err)
		}
		rules.name = f.name + " " + name + " (legacy)"
		some, err := rules.perPacket()
		if err != nil {
			return nil, err
		}
		found = append(found, some...)
	}
	return found, nil
}

// readTable reads a table, again if it was replaced meanwhile.
func (f *legacyFamily) readTable(fd int, name string) (info tableInfo, entries []byte, err error) {
	const tries = 10
	for range tries {
		if info, err = f.info(fd, name); err != nil {
			return info, nil, err
		}
		if _, entries, err = f.entries(fd, name, info.size, nil); !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	return info, entries, err
}

// errEntries says that a table is not made as it should be.
var errEntries = errors.New("entries that make no sense")

// entry is one entry of a table: a description of packets, matches, a target.
type entry struct {
	offset, size int
	description  []byte
	matches      []byte
	target       []byte
}

// split splits a table into its entries.
func (l entryLayout) split(b []byte) (entries []entry, err error) {
	for offset := 0; offset < len(b); {
		rest := b[offset:]
		if len(rest) < l.elems {
			return nil, errEntries
		}
		target, next := int(native.Uint16(rest[l.targetOffset:])), int(native.Uint16(rest[l.nextOffset:]))
		if target < l.elems || next < target+sizeofTarget || next > len(rest) {
			return nil, errEntries
		}
		entries = append(entries, entry{offset, next, rest[:l.size], rest[l.elems:target], rest[target:next]})
		offset += next
	}
	return entries, nil
}

// Matches and targets begin alike (struct xt_entry_match, xt_entry_target).
const (
	sizeofTarget   = 32
	extensionName  = 2
	extensionRev   = 31
	errorTarget    = "ERROR"
	verdictReturns = -5 // XT_RETURN; other negative ones end
	verdictQueues  = -4 // -1 - NF_QUEUE
)

func extension(b []byte) string { return fixedString(b[extensionName:extensionRev]) }

// ruleset finds the chains in a table. A chain of a hook begins where the table
// says so, one of a user behind an ERROR target that has its name; its verdicts
// lead to entries by their offsets. met are the packets that meet it.
func (l entryLayout) ruleset(info tableInfo, b []byte, met packets) (*ruleset, error) {
	entries, err := l.split(b)
	if err != nil {
		return nil, err
	}
	begins := map[int]string{} // offset -> chain
	var bases []base
	for hook, name := range []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"} {
		if info.validHooks&(1<<hook) == 0 {
			continue
		}
		begins[int(info.hookEntry[hook])] = name
		if slices.Contains(forwardHooks, hook) {
			bases = append(bases, base{name, met})
		}
	}
	for _, e := range entries {
		if extension(e.target) == errorTarget {
			begins[e.offset+e.size] = fixedString(e.target[sizeofTarget:])
		}
	}
	chains := map[string][]rule{}
	chain := ""
	for _, e := range entries {
		if name, ok := begins[e.offset]; ok {
			chain = name
		}
		chains[chain] = append(chains[chain], l.rule(e, begins))
	}
	return &ruleset{bases: bases, rules: func(chain string) ([]rule, error) { return chains[chain], nil }}, nil
}

// Flags of an entry's description, alike in both families.
const (
	flagFragment   = 1 << 0 // of IPv4
	flagGoto       = 1 << 1
	flagGoto6      = 1 << 2
	invertProtocol = 1 << 6
)

// rule reads an entry.
func (l entryLayout) rule(e entry, begins map[int]string) rule {
	r := rule{packets: anyPacket}
	l.describe(&r, e.description)
	for b := e.matches; len(b) >= sizeofTarget; {
		size := int(native.Uint16(b))
		if size < sizeofTarget || size > len(b) {
			break
		}
		r.match(extension(b), int(b[extensionRev]), b[sizeofTarget:size])
		b = b[size:]
	}
	name := extension(e.target)
	switch {
	case name == errorTarget:
		r.verdicts = []verdict{{kind: returns}}
	case name != "":
		r.target(name)
	case len(e.target) >= sizeofTarget+4:
		l.verdict(&r, e, int(int32(native.Uint32(e.target[sizeofTarget:]))), begins)
	}
	return r
}

// describe reads what packets an entry is for.
func (l entryLayout) describe(r *rule, b []byte) {
	flags, inverted := b[l.flags], b[l.invflags]
	if l.isIPv4() && flags&flagFragment != 0 && inverted == 0 {
		r.packets = 0 // fragments go through the kernel
	}
	if protocol := native.Uint16(b[l.proto:]); protocol != 0 && inverted&invertProtocol == 0 {
		r.packets &= ofProtocol(uint8(protocol))
	}
	for i, c := range b {
		if i == l.flags {
			c &^= l.gotoFlag()
		}
		if c != 0 {
			r.conditional = true
		}
	}
}

func (l entryLayout) isIPv4() bool { return l.proto == legacyFamilies[0].entry.proto }

// verdict reads a standard target.
func (l entryLayout) verdict(r *rule, e entry, value int, begins map[int]string) {
	goes := e.description[l.flags]&l.gotoFlag() != 0
	switch {
	case value == verdictReturns:
		r.verdicts = []verdict{{kind: returns}}
	case value == verdictQueues:
		r.target("QUEUE")
	case value < 0:
		r.verdicts = []verdict{{kind: terminal}}
	case value == e.offset+e.size: // no target
	case goes:
		r.verdicts = []verdict{{goesTo, begins[value]}}
	default:
		r.verdicts = []verdict{{jumps, begins[value]}}
	}
}

func (l entryLayout) gotoFlag() byte {
	if l.isIPv4() {
		return flagGoto
	}
	return flagGoto6
}
