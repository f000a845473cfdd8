//go:build linux

package hostrules

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Our rules, as iptables lists them, are read as ours.
func TestListingOfFlannelsRules(t *testing.T) {
	w, err := dual().check()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range w.chains() {
		tool := c.family.program + "-nft-save"
		text := section(fixture(t, "nft-dual"), tool)
		own := parseListing("-N "+c.name+"\n"+text, c.name)
		hook := parseListing(text, c.hook)
		if lines := c.plan(own, hook, true); len(lines) > 0 || !own.exists || len(own.rules) != len(c.rules) {
			t.Errorf("%s: of %d rules these would be changed: %q", c.name, len(own.rules), lines)
		}
	}
}

func TestSplit(t *testing.T) {
	for line, want := range map[string][]string{
		`-s 10.244.0.0/16 -j ACCEPT`:                    {"-s", "10.244.0.0/16", "-j", "ACCEPT"},
		`! -d fd00:0010:0244::0/48`:                     {"!", "-d", "fd00:10:244::/48"},
		`-m comment --comment "flanneld masq"`:          {"-m", "comment", "--comment", "flanneld masq"},
		`-m comment --comment "a \"b\" \\ c"`:           {"-m", "comment", "--comment", `a "b" \ c`},
		`--comment ""`:                                  {"--comment", ""},
		`-m comment --comment 10.0.0.1/8 -s 10.0.0.1/8`: {"-m", "comment", "--comment", "10.0.0.1/8", "-s", "10.0.0.0/8"},
		``: nil,
	} {
		if got := split(line); !slices.Equal(got, want) {
			t.Errorf("%s is split into %q, want %q", line, got, want)
		}
	}
}

// Whatever a program lists, the plan is lines that are about our chain and its
// jump, each listed rule of which is deleted at most once; and another look at
// what it makes finds nothing to do.
func FuzzListing(f *testing.F) {
	for name, tool := range map[string]string{
		"nft-repaired": "iptables-nft-save", "legacy-restarted-behind-others": "iptables-legacy-save", "nft-v6": "ip6tables-nft-save",
	} {
		text := section(fixture(f, name), tool)
		f.Add("-N FLANNEL-POSTRTG\n"+text, true)
		f.Add(text, false)
	}
	f.Add("-N FLANNEL-POSTRTG\n-A FLANNEL-POSTRTG -m comment --comment \"a \\\"b\\\"\" -j ACCEPT\n", false)
	w, err := dual().check()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string, starting bool) {
		for _, c := range append(w.chains(), wanted{}.chains()...) {
			own, hook := parseListing(text, c.name), parseListing(text, c.hook)
			lines := c.plan(own, hook, starting)
			for _, line := range lines {
				command, rest, _ := strings.Cut(line, " ")
				chain, _, _ := strings.Cut(rest, " ")
				switch {
				case line == ":"+c.name+" - [0:0]":
				case (command == "-A" || command == "-D") && (chain == c.name || chain == c.hook):
				default:
					t.Fatalf("line %q in %q", line, lines)
				}
				if strings.Contains(line, "\n") {
					t.Fatalf("one line is several: %q", line)
				}
			}
			own, hook = after(c.name, own, lines), after(c.hook, hook, lines)
			if again := c.plan(own, hook, starting); len(again) > 0 {
				t.Fatalf("after %q\nthere is still to do %q", lines, again)
			}
		}
	})
}

// after is what a chain holds when iptables-restore has done lines.
func after(name string, l listing, lines []string) listing {
	l.rules = slices.Clone(l.rules)
	for _, line := range lines {
		if line == ":"+name+" - [0:0]" {
			l = listing{exists: true}
		}
		if rule, ok := strings.CutPrefix(line, "-A "+name+" "); ok {
			l.rules = append(l.rules, listed{rule, split(rule)})
		}
		if rule, ok := strings.CutPrefix(line, "-D "+name+" "); ok {
			i := slices.IndexFunc(l.rules, func(r listed) bool { return r.text == rule })
			l.rules = slices.Delete(l.rules, i, i+1)
		}
	}
	return l
}

// expressions are a rule's, as the kernel tells them.
func expressions(tb testing.TB, f *family, r rule) []byte {
	var elements []netlink.Attribute
	for _, e := range r.compile(f) {
		data, err := expr.Marshal(f.number, e)
		if err != nil {
			tb.Fatal(err)
		}
		elements = append(elements, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: data})
	}
	data, err := netlink.MarshalAttributes(elements)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// compiled are all rules of some nodes.
func compiled(tb testing.TB) (families []*family, rules []rule) {
	for _, d := range []Desired{dual(), {
		Networks: []netip.Prefix{netip.MustParsePrefix("10.32.0.0/12"), netip.MustParsePrefix("8000::/1")},
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.33.4.1/32"), netip.MustParsePrefix("fd00::1/127")},
	}} {
		for _, ordered := range []bool{true, false} {
			d.Masquerade, d.Forward, d.OrderedPorts = true, true, ordered
			w, err := d.check()
			if err != nil {
				tb.Fatal(err)
			}
			for _, t := range w.tables() {
				for _, c := range t.chains {
					for _, r := range c.rules {
						families, rules = append(families, t.family), append(rules, r)
					}
				}
			}
		}
	}
	return families, rules
}

func TestCompiledRulesAreReadBack(t *testing.T) {
	families, rules := compiled(t)
	for i, r := range rules {
		exprs, ok := parseExpressions(families[i], expressions(t, families[i], r))
		if got := decompile(families[i], exprs); !ok || got != r {
			t.Errorf("%+v is read as %+v", r, got)
		}
	}
	if len(rules) < 32 {
		t.Errorf("only %d rules", len(rules))
	}
}

// Whatever a rule is made of, it is read as one of ours only if ours does the
// same.
func FuzzExpressions(f *testing.F) {
	families, rules := compiled(f)
	for i, r := range rules {
		f.Add(expressions(f, families[i], r), families[i].ipv6)
	}
	f.Fuzz(func(t *testing.T, data []byte, isIPv6 bool) {
		fam := ipv4
		if isIPv6 {
			fam = ipv6
		}
		exprs, ok := parseExpressions(fam, data)
		if !ok {
			return
		}
		r := decompile(fam, exprs)
		if r == (rule{}) {
			return
		}
		again, ok := parseExpressions(fam, expressions(t, fam, r))
		if got := decompile(fam, again); !ok || got != r {
			t.Fatalf("%+v is read back as %+v", r, got)
		}
	})
}
