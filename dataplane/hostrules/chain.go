package hostrules

import (
	"net/netip"
	"slices"
	"strings"
)

// chain is one of flannel's chains in iptables, and the jump to it.
type chain struct {
	family *family
	table  string
	// hook is the chain that the jump is in.
	hook string
	name string
	// comment is on all of its rules and on the jump: what tells ours.
	comment string
	// rules are empty when neither chain nor jump is wanted.
	rules []rule
}

// chains are flannel's chains in iptables, in the order in which it makes them.
func (w wanted) chains() []chain {
	var all []chain
	for _, f := range families {
		all = append(all, chain{f, "nat", "POSTROUTING", "FLANNEL-POSTRTG", "flanneld masq", w.masqueradeRules(f)})
	}
	for _, f := range families {
		all = append(all, chain{f, "filter", "FORWARD", "FLANNEL-FWD", "flanneld forward", w.forwardRules(f)})
	}
	return all
}

// jump are the arguments of the jump to it.
func (c chain) jump() []string {
	return []string{"-m", "comment", "--comment", c.comment, "-j", c.name}
}

// listed is a rule as iptables lists it.
type listed struct {
	text  string // behind "-A CHAIN "
	words []string
}

// listing is what a chain holds. The chain of a hook always exists.
type listing struct {
	exists bool
	rules  []listed
}

// parseListing reads what `iptables -S CHAIN` prints: "-N CHAIN" or "-P CHAIN
// POLICY", then "-A CHAIN ..." for each rule. Other lines are ignored.
func parseListing(text, name string) listing {
	l := listing{}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch command, rest, _ := strings.Cut(line, " "); command {
		case "-N", "-P":
			is, _, _ := strings.Cut(rest, " ")
			l.exists = l.exists || is == name
		case "-A":
			if is, rule, _ := strings.Cut(rest, " "); is == name {
				l.rules = append(l.rules, listed{rule, split(rule)})
			}
		}
	}
	return l
}

// split splits a line into words as iptables-restore does: at blanks, but not in
// quotes, where a backslash takes the next character as it is. Prefixes are given
// their usual form.
func split(line string) []string {
	var words []string
	var word strings.Builder
	inWord, inQuotes, escaped := false, false, false
	end := func() {
		if inWord {
			words = append(words, word.String())
			word.Reset()
			inWord = false
		}
	}
	for _, c := range []byte(line) {
		switch {
		case escaped:
			word.WriteByte(c)
			escaped = false
		case inQuotes && c == '\\':
			escaped = true
		case c == '"':
			inWord, inQuotes = true, !inQuotes
		case !inQuotes && (c == ' ' || c == '\t'):
			end()
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	end()
	for i := 1; i < len(words); i++ {
		if p, err := netip.ParsePrefix(words[i]); err == nil && (words[i-1] == "-s" || words[i-1] == "-d") {
			words[i] = p.Masked().String()
		}
	}
	return words
}

// hasComment tells a rule of ours by its comment.
func (l listed) hasComment(comment string) bool {
	i := slices.Index(l.words, "--comment")
	return i >= 0 && i+1 < len(l.words) && l.words[i+1] == comment
}

// jumpsTo tells a rule that leads to a chain.
func (l listed) jumpsTo(name string) bool {
	for i, w := range l.words[:max(len(l.words)-1, 0)] {
		if (w == "-j" || w == "-g") && l.words[i+1] == name {
			return true
		}
	}
	return false
}

// plan is what iptables-restore has to do in a chain's table: lines between
// "*table" and "COMMIT". It is empty when nothing has to be done. starting is as
// flannel starts: foreign rules in the chain go, and the jump goes to the end.
func (c chain) plan(own, hook listing, starting bool) []string {
	if len(c.rules) == 0 {
		return c.planRemoval(own, hook)
	}
	return append(c.planRules(own, starting), c.planJump(hook, starting)...)
}

// planRules makes the chain's rules what they shall be.
func (c chain) planRules(own listing, starting bool) []string {
	var want [][]string
	var lines []string
	for _, r := range c.rules {
		words := r.words(c.comment)
		want = append(want, words)
		lines = append(lines, "-A "+c.name+" "+quote(words))
	}
	var all, ours [][]string
	var deletions []string
	for _, r := range own.rules {
		all = append(all, r.words)
		if r.hasComment(c.comment) {
			ours = append(ours, r.words)
			deletions = append(deletions, "-D "+c.name+" "+r.text)
		}
	}
	switch {
	case own.exists && equal(all, want), own.exists && !starting && equal(ours, want):
		return nil
	case !own.exists || starting:
		return append([]string{c.empty()}, lines...)
	}
	return append(deletions, lines...)
}

// empty is the line that makes the chain, or empties it.
func (c chain) empty() string { return ":" + c.name + " - [0:0]" }

// planJump makes that there is one jump.
func (c chain) planJump(hook listing, starting bool) []string {
	jump := c.jump()
	var lines []string
	last := false
	for i, r := range hook.rules {
		if slices.Equal(r.words, jump) {
			lines = append(lines, "-D "+c.hook+" "+r.text)
			last = i == len(hook.rules)-1
		}
	}
	if len(lines) == 1 && (last || !starting) {
		return nil
	}
	return append(lines, "-A "+c.hook+" "+quote(jump))
}

// planRemoval takes away each jump to the chain in the hook's chain, and its
// rules. What is left can be deleted, unless others use it.
func (c chain) planRemoval(own, hook listing) []string {
	var lines []string
	if !own.exists {
		return nil // so nothing can jump to it
	}
	for _, r := range hook.rules {
		if r.jumpsTo(c.name) {
			lines = append(lines, "-D "+c.hook+" "+r.text)
		}
	}
	if len(own.rules) > 0 {
		lines = append(lines, c.empty())
	}
	return lines
}

// equal compares rules, word by word.
func equal(a, b [][]string) bool { return slices.EqualFunc(a, b, slices.Equal) }
