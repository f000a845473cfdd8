package firewall

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// plan is what has to be done so that the kernel holds the table. It is done
// as one transaction: packets meet the table as it was or as it shall be.
type plan []step

// String gives the commands for `nft -f`.
func (p plan) String() string {
	var b strings.Builder
	for _, s := range p {
		b.WriteString(s.String() + "\n")
	}
	return b.String()
}

// op is one kind of change.
type op uint8

// The kinds of change.
const (
	deleteTable op = iota
	addTable
	flushRules
	deleteSet
	deleteChain
	addCounter
	addSet
	flushSet
	addElements
	addChain
	addRule
	deleteElements
)

// step is one change. Which fields count depends on op.
type step struct {
	op op
	// name is that of a set or chain.
	name     string
	set      setType
	elements []element
	chain    chain
	rule     rule
	// packets and bytes are what the counter begins with.
	packets, bytes uint64
}

// String gives the command that an operator would type for it.
func (s step) String() string {
	object := tableName + " " + s.name
	switch s.op {
	case deleteTable:
		return "delete table inet " + tableName
	case addTable:
		return "add table inet " + tableName
	case flushRules:
		return "flush table inet " + tableName
	case deleteSet:
		return "delete set inet " + object
	case deleteChain:
		return "delete chain inet " + object
	case addCounter:
		return fmt.Sprintf("add counter inet %s { packets %d bytes %d }", object, s.packets, s.bytes)
	case addSet:
		if s.set.interval {
			return fmt.Sprintf("add set inet %s { type %s; flags interval; }", object, s.set.key)
		}
		return fmt.Sprintf("add set inet %s { type %s; }", object, s.set.key)
	case flushSet:
		return "flush set inet " + object
	case addElements:
		return fmt.Sprintf("add element inet %s { %s }", object, s.elementList())
	case deleteElements:
		return fmt.Sprintf("delete element inet %s { %s }", object, s.elementList())
	case addChain:
		if s.chain.hook == "" {
			return "add chain inet " + object
		}
		return fmt.Sprintf("add chain inet %s { type filter hook %s priority %d; policy accept; }", object, s.chain.hook, s.chain.priority)
	case addRule:
		return fmt.Sprintf("add rule inet %s %s", object, s.rule)
	}
	return fmt.Sprintf("unknown step %d", s.op)
}

func (s step) elementList() string {
	words := make([]string, len(s.elements))
	for i, e := range s.elements {
		words[i] = e.String()
	}
	return strings.Join(words, ", ")
}

// makePlan compares what the table shall hold with what it holds. It looks at
// nothing else, so it can be tested without a kernel.
//
// Nothing that is right is touched. The counter stays in any case, and so do
// sets and chains that only have other elements or rules.
func makePlan(want, have table) plan {
	var p plan
	add := func(s step) { p = append(p, s) }
	if !have.exists || have.odd {
		add(step{op: addTable})
	}

	// Sets and chains that can't be changed into ours go, and so do those that
	// we don't know, from another version of us. Rules hold on to both, so all
	// rules go first and are written again.
	var unfitSets, unfitChains []string
	for _, name := range slices.Sorted(maps.Keys(have.sets)) {
		if s := have.sets[name]; s.odd || s.setType != want.sets[name].setType {
			unfitSets = append(unfitSets, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.chains)) {
		w, known := want.chains[name]
		if c := have.chains[name]; !known || c.odd || c.hook != w.hook || c.priority != w.priority {
			unfitChains = append(unfitChains, name)
		}
	}
	rewrite := !have.exists || len(unfitSets)+len(unfitChains) > 0
	for name, c := range want.chains {
		if !slices.EqualFunc(c.rules, have.chains[name].rules, slices.Equal) {
			rewrite = true
		}
	}
	if rewrite && have.exists {
		add(step{op: flushRules})
	}
	for _, name := range unfitSets {
		add(step{op: deleteSet, name: name})
	}
	for _, name := range unfitChains {
		add(step{op: deleteChain, name: name})
	}

	if !have.counter {
		add(step{op: addCounter, name: counterName})
	}
	var gone plan
	for _, name := range setNames {
		s := have.sets[name]
		if s.setType != want.sets[name].setType || slices.Contains(unfitSets, name) {
			add(step{op: addSet, name: name, set: want.sets[name].setType})
			s = set{}
		}
		more, less := planElements(name, want.sets[name], s.elements)
		p = append(p, more...)
		gone = append(gone, less...)
	}
	for _, name := range chainNames {
		if _, ok := have.chains[name]; !ok || slices.Contains(unfitChains, name) {
			add(step{op: addChain, name: name, chain: want.chains[name]})
		}
	}
	if rewrite {
		for _, name := range chainNames {
			for _, r := range want.chains[name].rules {
				add(step{op: addRule, name: name, rule: r})
			}
		}
	}
	return append(p, gone...)
}

// planElements plans what a set gets and what it loses. An interval set, of
// few elements, is written anew: its elements depend on each other's ends.
func planElements(name string, want set, have map[element]bool) (more, less plan) {
	added, gone := without(want.elements, have), without(have, want.elements)
	if want.interval && len(have) > 0 && len(added)+len(gone) > 0 {
		more = append(more, step{op: flushSet, name: name, set: want.setType})
		added, gone = without(want.elements, nil), nil
	}
	if len(added) > 0 {
		more = append(more, step{op: addElements, name: name, set: want.setType, elements: added})
	}
	if len(gone) > 0 {
		less = append(less, step{op: deleteElements, name: name, set: want.setType, elements: gone})
	}
	return more, less
}

// without are the elements of a that are not in b, sorted.
func without(a, b map[element]bool) []element {
	only := make([]element, 0, max(0, len(a)-len(b)))
	for e := range a {
		if !b[e] {
			only = append(only, e)
		}
	}
	slices.SortFunc(only, element.compare)
	return only
}

// makeRebuild is the plan that makes the table from nothing where there is one
// that can't be read or changed. Only what the counter has counted is kept.
func makeRebuild(want table, packets, bytes uint64) plan {
	p := plan{{op: addTable}, {op: deleteTable}} // deleting what is not there would fail
	for _, s := range makePlan(want, table{}) {
		if s.op == addCounter {
			s.packets, s.bytes = packets, bytes
		}
		p = append(p, s)
	}
	return p
}
