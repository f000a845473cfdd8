package verdicts

import (
	"errors"
	"strings"
	"testing"
)

func TestChangesAreWords(t *testing.T) {
	for changes, want := range map[Changes]string{
		0:                          "",
		Nftables | Routes:          "nftables, routes",
		Forwarding | Settings:      "forwarding, settings",
		Overrun:                    "overrun",
		1<<kinds - 1:               strings.Join(changeNames[:], ", "),
		Iptables | Rules | XFRM:    "iptables, rules, xfrm",
		Links | Nexthops | Overrun: "nexthops, links, overrun",
	} {
		if changes.String() != want {
			t.Errorf("%b is %q, want %q", changes, changes, want)
		}
	}
}

// Chains are read one by one, and meanwhile somebody may change where they lead.
func TestRulesetThatLoops(t *testing.T) {
	limits := rule{packets: anyPacket, conditional: true, varies: []string{"limit"}}
	r := ruleset{name: "ip t", bases: []base{{"a", established}}, rules: func(chain string) ([]rule, error) {
		to := map[string]string{"a": "b", "b": "a"}[chain]
		jump := limits
		jump.verdicts = []verdict{{jumps, to}}
		return []rule{jump, {packets: anyPacket, verdicts: []verdict{{goesTo, to}}}}, nil
	}}
	found, err := r.perPacket()
	if err != nil || strings.Join(found, ", ") != "ip t a: limit, ip t b: limit" {
		t.Errorf("found %q, error %v", found, err)
	}
}

// What conntrack says of a bridged packet is not known: a rule that lets the
// established ones pass may let none pass.
func TestRuleBehindARuleForSomeStates(t *testing.T) {
	accepts := rule{packets: established, verdicts: []verdict{{kind: terminal}}}
	limits := rule{packets: anyPacket, conditional: true, varies: []string{"limit"}, verdicts: []verdict{{kind: terminal}}}
	for met, want := range map[packets]string{anyPacket: "bridge t a: limit", unseen: "bridge t a: limit", established: ""} {
		r := ruleset{name: "bridge t", bases: []base{{"a", met}}, rules: func(string) ([]rule, error) {
			return []rule{accepts, limits}, nil
		}}
		if found, err := r.perPacket(); strings.Join(found, ", ") != want || err != nil {
			t.Errorf("met by %b found %q, error %v, want %q", met, found, err, want)
		}
	}
}

func TestRulesetThatCantBeRead(t *testing.T) {
	wrong := errors.New("wrong")
	r := ruleset{bases: []base{{"a", established}}, rules: func(string) ([]rule, error) { return nil, wrong }}
	if _, err := r.perPacket(); !errors.Is(err, wrong) {
		t.Errorf("error %v", err)
	}
}
