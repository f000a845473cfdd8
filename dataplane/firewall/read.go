//go:build linux

package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// inet is our table in the library's words.
var inet = &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}

// readTries is how often the table is read until nobody has changed any table
// meanwhile.
const readTries = 3

// readTable reads our table, and tells of which generation it is. Where others
// change theirs all the time, what was read while they did has to do: if it was
// ours that they changed, the generation tells it to the next Sync.
func (s *socket) readTable(want table) (t table, generation uint32, err error) {
	for range readTries {
		if generation, err = s.generation(); err != nil {
			return table{}, 0, err
		}
		t, err = s.readOnce(want)
		if now, nowErr := s.generation(); nowErr != nil || now == generation {
			return t, generation, errors.Join(err, nowErr)
		}
	}
	return t, generation, err
}

// readOnce reads our table. Rules are compared with those that are wanted.
func (s *socket) readOnce(want table) (table, error) {
	t := table{sets: map[string]set{}, chains: map[string]chain{}}
	tables, err := s.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return t, fmt.Errorf("reading tables: %w", explain(err))
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == tableName })
	if i < 0 {
		return t, nil
	}
	t.exists, t.odd = true, tables[i].Flags != 0
	if t.counter, _, _, err = s.readCounter(); err != nil {
		return t, err
	}
	if err := s.readSets(&t); err != nil {
		return t, err
	}
	return t, s.readChains(&t, want)
}

// readCounter reads what was dropped. Without the counter nothing was.
func (s *socket) readCounter() (found bool, packets, bytes uint64, err error) {
	// Asked for by name, the library would not tell a missing counter from any
	// other failure.
	objects, err := s.GetObj(&nftables.CounterObj{Table: inet})
	if err != nil {
		return false, 0, 0, fmt.Errorf("reading the counter: %w", err)
	}
	for _, o := range objects {
		if c, ok := o.(*nftables.CounterObj); ok && c.Name == counterName {
			return true, c.Packets, c.Bytes, nil
		}
	}
	return false, 0, 0, nil
}

// readSets reads the table's sets, and the elements of ours.
func (s *socket) readSets(t *table) error {
	sets, err := s.GetSets(inet)
	if err != nil {
		return fmt.Errorf("reading sets: %w", err)
	}
	for _, found := range sets {
		got := set{
			setType: setType{key: found.KeyType.Name, interval: found.Interval},
			odd: found.IsMap || found.Anonymous || found.Constant || found.HasTimeout || found.Dynamic ||
				found.Concatenation || found.Size != 0,
		}
		if !got.odd && got.setType == setTypes[found.Name] {
			elements, err := s.GetSetElements(found)
			if err != nil {
				return fmt.Errorf("reading elements of %s: %w", found.Name, err)
			}
			var ok bool
			if got.elements, ok = parseElements(got.setType, elements); !ok {
				got.odd = true
			}
		}
		t.sets[found.Name] = got
	}
	return nil
}

// parseElements understands the elements of a set; false if they are such as
// we never make.
func parseElements(kind setType, elements []nftables.SetElement) (map[element]bool, bool) {
	if kind.interval {
		return parseIntervals(elements)
	}
	parsed := make(map[element]bool, len(elements))
	for _, e := range elements {
		if kind.key == "ifname" {
			parsed[element{name: string(bytes.TrimRight(e.Key, "\x00"))}] = true
			continue
		}
		addr, ok := netip.AddrFromSlice(e.Key)
		if !ok {
			return nil, false
		}
		parsed[element{prefix: netip.PrefixFrom(addr, addr.BitLen())}] = true
	}
	return parsed, true
}

// parseIntervals makes prefixes of the elements of an interval set: each is
// the begin of one or, when it is marked, the first address behind it.
func parseIntervals(elements []nftables.SetElement) (map[element]bool, bool) {
	slices.SortFunc(elements, func(a, b nftables.SetElement) int {
		if c := bytes.Compare(a.Key, b.Key); c != 0 || a.IntervalEnd == b.IntervalEnd {
			return c
		}
		if a.IntervalEnd {
			return -1
		}
		return 1
	})
	parsed := map[element]bool{}
	for i := 0; i < len(elements); i++ {
		begin, ok := netip.AddrFromSlice(elements[i].Key)
		if elements[i].IntervalEnd && begin.IsUnspecified() {
			continue // nft begins its sets with it
		}
		if !ok || elements[i].IntervalEnd {
			return nil, false
		}
		var end netip.Addr // not valid: the end of all addresses
		if i+1 < len(elements) {
			i++
			if end, ok = netip.AddrFromSlice(elements[i].Key); !ok || !elements[i].IntervalEnd {
				return nil, false
			}
		}
		prefix, ok := prefixBetween(begin, end)
		if !ok {
			return nil, false
		}
		parsed[element{prefix: prefix}] = true
	}
	return parsed, true
}

// prefixBetween is the prefix that begins at one address and ends before
// another, if there is one.
func prefixBetween(begin, end netip.Addr) (netip.Prefix, bool) {
	for bits := range begin.BitLen() + 1 {
		p := netip.PrefixFrom(begin, bits)
		if p.Masked() == p && behind(p) == end {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// behind is the first address after a prefix, not valid where there is none.
func behind(p netip.Prefix) netip.Addr {
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	addr, _ := netip.AddrFromSlice(last)
	return addr.Next()
}

// hooks are the hooks of our chains by their number.
var hooks = map[nftables.ChainHook]string{
	*nftables.ChainHookInput:   "input",
	*nftables.ChainHookForward: "forward",
	*nftables.ChainHookOutput:  "output",
}

// readChains reads the table's chains and their rules.
func (s *socket) readChains(t *table, want table) error {
	chains, err := s.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("reading chains: %w", err)
	}
	for _, found := range chains {
		if found.Table == nil || found.Table.Name != tableName {
			continue
		}
		var got chain
		if found.Hooknum != nil {
			if got.hook = hooks[*found.Hooknum]; got.hook == "" {
				got.hook = "another"
			}
			got.priority = int32(*found.Priority)
			got.odd = found.Type != nftables.ChainTypeFilter || found.Policy == nil || *found.Policy != nftables.ChainPolicyAccept
		}
		rules, err := s.GetRules(inet, found)
		if err != nil {
			return fmt.Errorf("reading rules of chain %s: %w", found.Name, err)
		}
		for _, r := range rules {
			got.rules = append(got.rules, decompile(r.Exprs, want.chains[found.Name].rules))
		}
		t.chains[strings.Clone(found.Name)] = got
	}
	return nil
}

// keys are the elements in the library's words.
func keys(kind setType, elements []element) []nftables.SetElement {
	list := make([]nftables.SetElement, 0, len(elements))
	for _, e := range elements {
		switch {
		case kind.key == "ifname":
			list = append(list, nftables.SetElement{Key: nameKey(e.name)})
		default:
			list = append(list, nftables.SetElement{Key: e.prefix.Addr().AsSlice()})
			if end := behind(e.prefix); kind.interval && end.IsValid() {
				list = append(list, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
			}
		}
	}
	return list
}

// unlessMissing makes success of an error that says that what was to be
// removed is not there.
func unlessMissing(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
