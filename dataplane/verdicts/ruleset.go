package verdicts

import (
	"fmt"
	"slices"
)

// packets is a set of those of established flows, by what conntrack may say of them
// and by protocol.
type packets uint8

// The kinds that matter. An unseen packet is one before conntrack has looked at it,
// which rules call invalid. UDP here is without what is sent to port 53: it goes through
// the host's stack, packet by packet (asks_for_names in bpf/witness.h).
const (
	unseenTCP packets = 1 << iota
	unseenUDP
	establishedTCP
	establishedUDP

	unseen      = unseenTCP | unseenUDP
	established = establishedTCP | establishedUDP
	onlyTCP     = unseenTCP | establishedTCP
	onlyUDP     = unseenUDP | establishedUDP
	anyPacket   = unseen | established
)

// Protocols of IP whose flows express carries, and the port of UDP that it leaves.
const (
	protocolTCP = 6
	protocolUDP = 17
	dnsPort     = 53
)

// ofProtocol are the packets of one protocol, if any of them matter.
func ofProtocol(number uint8) packets {
	switch number {
	case protocolTCP:
		return onlyTCP
	case protocolUDP:
		return onlyUDP
	}
	return 0 // they all go through the kernel
}

// base is a chain that a hook calls.
type base struct {
	chain string
	// packets are those of established flows that may come there.
	packets packets
}

// rule is what matters of a rule.
type rule struct {
	// packets are those that it matches; none if it matches none of an
	// established flow, for whatever reason.
	packets packets
	// conditional says that it has other conditions.
	conditional bool
	// varies names what may treat two packets of one flow differently.
	varies []string
	// acts says that it changes a packet or what becomes of it, apart from
	// verdicts; to log and to count is not to act.
	acts bool
	// verdicts are what may follow: one, or those of a map.
	verdicts []verdict
}

// verdict ends a rule.
type verdict struct {
	kind  verdictKind
	chain string // of a jump, goto
}

type verdictKind uint8

const (
	terminal   verdictKind = iota // accept, drop, and what else ends the hook
	returns                       // to the rule behind the jump
	jumps                         // and comes back
	goesTo                        // and comes back behind the jump before
	fallsAside                    // continue: the next rule
)

// ruleset is a table whose chains are read as they are met.
type ruleset struct {
	name  string // "ip filter"
	bases []base
	rules func(chain string) ([]rule, error)
}

// walk is one traversal of a ruleset, as by a packet of an established flow.
type walk struct {
	*ruleset
	chains map[string][]rule
	ends   map[visit]bool
	acting map[string]bool // whether a chain that is jumped to acts
	found  []string
	err    error
}

// visit is a chain as met by some packets.
type visit struct {
	chain   string
	packets packets
}

// perPacket names the rules that a packet of an established flow can meet and
// that treat the packets of one flow differently from one another.
func (r *ruleset) perPacket() ([]string, error) {
	w := &walk{ruleset: r, chains: map[string][]rule{}, ends: map[visit]bool{}, acting: map[string]bool{}}
	for _, b := range r.bases {
		w.chain(visit(b))
	}
	slices.Sort(w.found)
	return slices.Compact(w.found), w.err
}

// read returns the rules of a chain.
func (w *walk) read(chain string) []rule {
	rules, known := w.chains[chain]
	if !known && w.err == nil {
		rules, w.err = w.rules(chain)
		w.chains[chain] = rules
	}
	return rules
}

// chain meets the rules of a chain, and tells whether no packet comes through.
func (w *walk) chain(v visit) (ends bool) {
	if ends, met := w.ends[v]; met {
		return ends
	}
	w.ends[v] = false // while it is looked at
	left, leaks := v.packets, false
	for _, r := range w.read(v.chain) {
		met := r.packets & left
		if met == 0 {
			continue
		}
		if len(r.varies) > 0 && w.matters(r) {
			for _, what := range r.varies {
				w.found = append(w.found, fmt.Sprintf("%s %s: %s", w.name, v.chain, what))
			}
		}
		over, through := w.follow(r, met)
		leaks = leaks || through
		if over && !r.conditional {
			left &^= met
		}
		if left == 0 {
			w.ends[v] = !leaks
			break
		}
	}
	return w.ends[v]
}

// follow has packets meet the chains that a rule leads to. It tells whether none of
// those it matches goes on to the next rule, and whether some of them go on behind the
// jump to this chain.
func (w *walk) follow(r rule, met packets) (over, through bool) {
	over = len(r.verdicts) > 0
	for _, verdict := range r.verdicts {
		next := visit{verdict.chain, met}
		switch verdict.kind {
		case returns:
			through = true
		case jumps:
			over = w.chain(next) && over
		case goesTo:
			through = !w.chain(next) || through
		case fallsAside:
			over = false
		}
	}
	return over, through
}

// matters tells whether it makes a difference that a rule matches.
func (w *walk) matters(r rule) bool {
	return r.acts || slices.ContainsFunc(r.verdicts, func(v verdict) bool {
		return v.kind == terminal || v.kind == returns || v.kind == goesTo || v.kind == jumps && w.acts(v.chain)
	})
}

// acts tells whether it makes a difference that a chain is jumped to.
func (w *walk) acts(chain string) bool {
	acts, known := w.acting[chain]
	if !known {
		w.acting[chain] = false // while it is looked at
		acts = slices.ContainsFunc(w.read(chain), func(r rule) bool {
			returnsOnly := len(r.verdicts) == 1 && r.verdicts[0].kind == returns // as it would without the jump
			return r.acts || !returnsOnly && w.matters(r)
		})
		w.acting[chain] = acts
	}
	return acts
}
