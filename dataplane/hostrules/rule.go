package hostrules

import (
	"net/netip"
	"slices"
	"strings"
)

// rule is one of flannel's rules. It is comparable.
type rule struct {
	// kubeMark matches packets that kube-proxy masquerades itself.
	kubeMark bool
	from, to match
	verdict  verdict
}

// match is a condition on an address; the zero match is none.
type match struct {
	not    bool
	prefix netip.Prefix
}

// verdict is what becomes of a packet, as nftables says it.
type verdict string

const (
	leave            verdict = "return"
	accept           verdict = "accept"
	masquerade       verdict = "masquerade"
	masqueradeRandom verdict = "masquerade fully-random"
)

// inIPTables is a verdict in iptables' words.
var inIPTables = map[verdict][]string{
	leave:            {"RETURN"},
	accept:           {"ACCEPT"},
	masquerade:       {"MASQUERADE"},
	masqueradeRandom: {"MASQUERADE", "--random-fully"},
}

// kubeMark is the bit that kube-proxy sets on packets that it masquerades.
const kubeMark = 0x4000

// in matches addresses in a prefix, and notIn the others.
func in(p netip.Prefix) match    { return match{prefix: p} }
func notIn(p netip.Prefix) match { return match{not: true, prefix: p} }

// masqueradeRules are those behind routing. A family without pods here has
// none.
func (w wanted) masqueradeRules(f *family) []rule {
	p := w.of(f)
	if !w.masquerade || !p.network.IsValid() || !p.own.IsValid() {
		return nil
	}
	change := masqueradeRandom
	if w.orderedPorts {
		change = masquerade
	}
	// From outside to a pod of this node, without masquerading at the gate. In
	// nftables mode flannel says it otherwise, so that its last rule is never
	// reached.
	fromOutside := rule{from: notIn(p.network), to: in(p.own), verdict: leave}
	if w.nftables {
		fromOutside = rule{from: notIn(p.own), to: in(p.network), verdict: leave}
	}
	return []rule{
		{kubeMark: true, verdict: leave},
		// Among pods.
		{from: in(p.own), to: in(p.network), verdict: leave},
		{from: in(p.network), to: in(p.own), verdict: leave},
		fromOutside,
		// From pods to the world.
		{from: in(p.network), to: notIn(f.multicast), verdict: change},
		// From the host to other nodes' pods.
		{from: notIn(p.network), to: in(p.network), verdict: change},
	}
}

// forwardRules are those of packets on their way through.
func (w wanted) forwardRules(f *family) []rule {
	network := w.of(f).network
	if !w.forward || !network.IsValid() {
		return nil
	}
	return []rule{
		{from: in(network), verdict: accept},
		{to: in(network), verdict: accept},
	}
}

// words are a rule's arguments to iptables, in the order in which it lists them.
func (r rule) words(comment string) []string {
	var w []string
	for _, m := range []struct {
		match
		flag string
	}{{r.from, "-s"}, {r.to, "-d"}} {
		if m.not {
			w = append(w, "!")
		}
		if m.prefix.IsValid() {
			w = append(w, m.flag, m.prefix.String())
		}
	}
	if r.kubeMark {
		w = append(w, "-m", "mark", "--mark", "0x4000/0x4000")
	}
	w = append(w, "-m", "comment", "--comment", comment, "-j")
	return append(w, inIPTables[r.verdict]...)
}

// quote is a line of arguments as iptables-restore reads it.
func quote(words []string) string {
	quoted := slices.Clone(words)
	for i, w := range quoted {
		if strings.Contains(w, " ") { // only in our comments, which have nothing worse
			quoted[i] = `"` + w + `"`
		}
	}
	return strings.Join(quoted, " ")
}
