//go:build linux

package firewall

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
)

// elementsPerMessage bounds a message, whose list of elements has a length of
// 16 bits. A prefix is two of them.
const elementsPerMessage = 500

// manyElements is when a change is worth the trouble of not being heard.
const manyElements = 256

// apply does all steps in one transaction, or none. A large one runs within around.
func (s *socket) apply(p plan) error {
	elements := 0
	for _, step := range p {
		elements += len(step.elements)
		if err := s.addStep(step); err != nil {
			return err
		}
	}
	flush := s.Flush
	if elements >= manyElements && s.around != nil {
		flush = func() error { return s.around(s.Flush) }
	}
	err := flush()
	// Each message has its own answer. The first error is what is wrong, the
	// others mostly follow from it.
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		err = fmt.Errorf("nf_tables refuses the change: %w", errno)
	}
	return explain(err)
}

// addStep adds one step to the transaction.
func (s *socket) addStep(p step) error {
	set := &nftables.Set{
		Table: inet, Name: p.name, KeyType: keyTypes[p.set.key], Interval: p.set.interval,
		KeyByteOrder: binaryutil.BigEndian,
		ID:           uint32(1 + slices.Index(setNames, p.name)), // else the library counts, for all goroutines
	}
	if p.set.key == "ifname" {
		set.KeyByteOrder = binaryutil.NativeEndian // else nft shows no names
	}
	chain := &nftables.Chain{Table: inet, Name: p.name}
	switch p.op {
	case deleteTable:
		s.DelTable(inet)
	case addTable:
		s.AddTable(inet)
	case flushRules:
		s.FlushTable(inet)
	case deleteSet:
		s.DelSet(set)
	case deleteChain:
		s.DelChain(chain)
	case addCounter:
		s.AddObj(&nftables.CounterObj{Table: inet, Name: p.name, Packets: p.packets, Bytes: p.bytes})
	case addSet:
		return s.AddSet(set, nil)
	case flushSet:
		s.FlushSet(set)
	case addElements:
		return inMessages(p, set, s.SetAddElements)
	case deleteElements:
		return inMessages(p, set, s.SetDeleteElements)
	case addChain:
		if p.chain.hook != "" {
			accept := nftables.ChainPolicyAccept
			chain.Type, chain.Policy = nftables.ChainTypeFilter, &accept
			chain.Priority = nftables.ChainPriorityRef(nftables.ChainPriority(p.chain.priority))
			for number, name := range hooks {
				if name == p.chain.hook {
					chain.Hooknum = &number
				}
			}
		}
		s.AddChain(chain)
	case addRule:
		s.AddRule(&nftables.Rule{Table: inet, Chain: chain, Exprs: compile(p.rule)})
	}
	return nil
}

// inMessages hands a step's elements over in portions.
func inMessages(p step, set *nftables.Set, add func(*nftables.Set, []nftables.SetElement) error) error {
	for some := range slices.Chunk(p.elements, elementsPerMessage) {
		if err := add(set, keys(p.set, some)); err != nil {
			return err
		}
	}
	return nil
}
