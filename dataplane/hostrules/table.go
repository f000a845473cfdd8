package hostrules

import "slices"

// table is one of flannel's tables in nftables mode.
type table struct {
	family *family
	chains []baseChain
}

// baseChain is a chain in it.
type baseChain struct {
	name, comment string
	// kind, hook (NF_INET_) and priority are what can't be changed of it.
	hookup
	// rules are empty when the chain is not wanted.
	rules []rule
}

// hookup says where packets come to a chain. It is comparable.
type hookup struct {
	kind     string
	hook     uint32
	priority int32
	// drops says that what no rule has judged is dropped.
	drops bool
}

// Where flannel's chains are.
var (
	behindRouting = hookup{kind: "nat", hook: 4, priority: 100}
	onTheWay      = hookup{kind: "filter", hook: 2, priority: 0}
)

// comment is the table's.
func (t table) comment() string { return "rules for " + t.family.table }

// tables are flannel's tables in nftables mode. Both are there even when one
// family is not in use.
func (w wanted) tables() []table {
	var all []table
	for _, f := range families {
		all = append(all, table{f, []baseChain{
			{"postrtg", "chain to manage traffic masquerading by flannel", behindRouting, w.masqueradeRules(f)},
			{"forward", "chain to accept flannel traffic", onTheWay, w.forwardRules(f)},
		}})
	}
	return all
}

// used tells that rules are wanted in it.
func (t table) used() bool {
	return slices.ContainsFunc(t.chains, func(c baseChain) bool { return len(c.rules) > 0 })
}

// held is what a table holds of flannel's.
type held struct {
	exists bool
	// odd says that the table has flags: it was put to sleep, for example.
	odd    bool
	chains map[string]heldChain
}

// heldChain is a chain that is there.
type heldChain struct {
	// odd says that something of it is unlike ours.
	odd   bool
	rules []heldRule
}

// heldRule is a rule that is there. One that is unlike any of flannel's is the
// zero rule.
type heldRule struct {
	handle uint64
	rule   rule
}

// step is one change to a table.
type step struct {
	op     operation
	chain  baseChain
	handle uint64
	rule   rule
}

type operation int

const (
	addTable    operation = iota // wakes it up, too
	deleteTable                  // with all that is in it
	addChain
	flushChain
	deleteChain
	addRule // at the end
	deleteRule
)

// plan is what has to be done, empty when nothing has to be. before are the rules
// that were wanted last, by chain; starting is as flannel starts: foreign rules in
// its chains go.
func (t table) plan(have held, before map[string][]rule, starting bool) []step {
	var p []step
	if !have.exists || have.odd {
		p = append(p, step{op: addTable})
	}
	for _, c := range t.chains {
		found, exists := have.chains[c.name]
		p = append(p, c.plan(found, exists, before[c.name], starting)...)
	}
	return p
}

func (c baseChain) plan(have heldChain, exists bool, before []rule, starting bool) []step {
	var p []step
	add := func(op operation) { p = append(p, step{op: op, chain: c}) }
	wanted := len(c.rules) > 0
	if exists && (have.odd || !wanted) {
		add(flushChain)
		add(deleteChain)
		exists, have = false, heldChain{}
	}
	if !wanted {
		return p
	}
	var all, ours []rule
	var deletions []step
	for _, r := range have.rules {
		all = append(all, r.rule)
		if slices.Contains(c.rules, r.rule) || slices.Contains(before, r.rule) {
			ours = append(ours, r.rule)
			deletions = append(deletions, step{op: deleteRule, chain: c, handle: r.handle})
		}
	}
	switch {
	case exists && slices.Equal(all, c.rules), exists && !starting && slices.Equal(ours, c.rules):
		return p
	case !exists:
		add(addChain)
	case starting:
		add(flushChain)
	default:
		p = append(p, deletions...)
	}
	for _, r := range c.rules {
		p = append(p, step{op: addRule, chain: c, rule: r})
	}
	return p
}
