//go:build linux

package hostrules

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/netns"
)

// Text by text what stock flanneld leaves; testdata/README.md says how that was
// recorded.
func TestRulesAreFlannels(t *testing.T) {
	for _, s := range situations {
		noMasq, noForward, none, ordered := v4(), dual(), dual(), dual()
		noMasq.Masquerade = false
		noForward.Forward = false
		none.Masquerade, none.Forward = false, false
		ordered.OrderedPorts = true
		odd := dual()
		odd.Networks = []netip.Prefix{netip.MustParsePrefix("10.32.0.0/12"), netip.MustParsePrefix("fd00:10:240::/44")}
		odd.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.33.4.0/22"), netip.MustParsePrefix("fd00:10:240:8::/61")}
		for _, c := range []struct {
			name    string
			desired Desired
			before  string
		}{
			{"v4", v4(), ""},
			{"dual", dual(), ""},
			{"v6", v6(), ""},
			{"v4-no-masq", noMasq, ""},
			{"dual-no-forward", noForward, ""},
			{"dual-none", none, ""},
			{"dual-ordered-ports", ordered, ""},
			{"odd-lengths", odd, ""},
			{"among-others", v4(), foreign},
		} {
			t.Run(s.name+"-"+c.name, func(t *testing.T) {
				s.host(t)
				ns := netns.New(t)
				shell(t, ns, c.before+"true")
				r := open(t, ns)
				mustSync(t, r, s.in(c.desired))
				wantRules(t, ns, fixture(t, s.name+"-"+c.name))
				if r.Mode() != string(s.mode) {
					t.Errorf("the mode is %q, want %q", r.Mode(), s.mode)
				}
				wantNoChange(t, ns, r, s.in(c.desired))
				wantNoChange(t, ns, open(t, ns), s.in(c.desired))
			})
		}
	}
}

// What flanneld has left is as wanted, to the last counter.
func TestFlanneldStoppedAndWeftStarted(t *testing.T) {
	for _, s := range situations {
		for name, desired := range map[string]Desired{"v4": v4(), "v6": v6(), "dual": dual(), "among-others": v4()} {
			t.Run(s.name+"-"+name, func(t *testing.T) {
				s.host(t)
				ns := netns.New(t)
				load(t, ns, s.name+"-"+name)
				// nftables mode counts nothing, ip6tables-nft-restore takes no counts.
				has := counted(t, ns)
				if s.mode == inLegacy && !strings.Contains(has, "[7:700]") || s.mode == inNft && name != "v6" && !strings.Contains(has, "packets 7 bytes 700") {
					t.Errorf("nothing was counted, so nothing can be lost:\n%s", has)
				}
				wantNoChange(t, ns, open(t, ns), s.in(desired))
			})
		}
	}
}

// Others were faster to the end of the chains, and in ours.
func TestStartedBehindOthers(t *testing.T) {
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			load(t, ns, s.name+"-v4")
			if s.nftables {
				shell(t, ns, `
					nft add rule ip flannel-ipv4 forward counter drop
					nft insert rule ip flannel-ipv4 postrtg ip saddr 10.9.9.9 accept`)
			} else {
				shell(t, ns, foreign+`
					iptables -t nat -I FLANNEL-POSTRTG -s 10.9.9.9 -j ACCEPT
					iptables -A FLANNEL-FWD -j DROP`)
			}
			r := open(t, ns)
			mustSync(t, r, s.in(v4()))
			// The order of tables is that in which they were made, here by us.
			sorted := func(text string) string {
				return section(text, "iptables-nft-save") + section(text, "iptables-legacy-save")
			}
			if got, want := sortedTables(sorted(rulesets(t, ns))), sortedTables(sorted(fixture(t, s.name+"-restarted-behind-others"))); got != want {
				t.Errorf("the rules are\n%swant\n%s", got, want)
			}
			if s.nftables {
				wantRules(t, ns, fixture(t, s.name+"-restarted-behind-others"))
			}
			wantNoChange(t, ns, r, s.in(v4()))
		})
	}
}

// sortedTables sorts what iptables-save prints by tables.
func sortedTables(saved string) string {
	tables := map[string]string{}
	for part := range strings.SplitSeq(saved, "COMMIT\n") {
		name, _, _ := strings.Cut(part, "\n")
		tables[name] = part
	}
	return tables["*filter"] + tables["*nat"] + tables["*mangle"]
}

func TestOwnPrefixChanges(t *testing.T) {
	for _, s := range situations {
		moved := s.in(v4())
		moved.Prefixes = []netip.Prefix{other4}
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			r := open(t, ns)
			mustSync(t, r, s.in(v4()))
			mustSync(t, r, moved)
			wantRules(t, ns, fixture(t, s.name+"-moved-subnet"))
			wantNoChange(t, ns, r, moved)
		})
		t.Run(s.name+"-while-away", func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			mustSync(t, open(t, ns), s.in(v4()))
			mustSync(t, open(t, ns), moved)
			wantRules(t, ns, fixture(t, s.name+"-moved-subnet"))
		})
	}
}

// What was switched off, or a family that is gone, leaves nothing behind.
func TestRulesNoLongerWanted(t *testing.T) {
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			r := open(t, ns)
			mustSync(t, r, s.in(dual()))
			noMasq := s.in(v4())
			noMasq.Masquerade = false
			mustSync(t, r, noMasq)
			text := rulesets(t, ns)
			for _, gone := range []string{"POSTRTG", "postrtg", "fd00:"} {
				if strings.Contains(text, gone) {
					t.Errorf("there is %s in\n%s", gone, text)
				}
			}
			if !strings.Contains(text, "FLANNEL-FWD") && !strings.Contains(text, "chain forward") {
				t.Errorf("there is no forwarding in\n%s", text)
			}
			wantNoChange(t, ns, r, noMasq)
			mustSync(t, r, s.in(dual()))
			if got, want := rulesets(t, ns), fixture(t, s.name+"-dual"); len(got) != len(want) { // in another order
				t.Errorf("the rules are\n%swant\n%s", got, want)
			}
		})
	}
}

func TestRepairIPTables(t *testing.T) {
	for name, c := range map[string]struct {
		commands string
		in       []situation
	}{
		"JumpDeleted":    {`iptables -t nat -D POSTROUTING 1`, situations[:1]},
		"JumpDoubled":    {`iptables -I FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD`, situations[:2]},
		"RuleDeleted":    {`iptables -t nat -D FLANNEL-POSTRTG 5`, situations[:1]},
		"LastDeleted":    {`iptables -D FLANNEL-FWD 2`, situations[:1]},
		"RuleMoved":      {`iptables -t nat -D FLANNEL-POSTRTG 1; iptables -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN`, situations[:2]},
		"RuleDoubled":    {`iptables -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT`, situations[:1]},
		"RuleChanged":    {`iptables -t nat -R FLANNEL-POSTRTG 6 -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE`, situations[:1]},
		"StaleRule":      {`iptables -t nat -I FLANNEL-POSTRTG -s 10.244.9.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN`, situations[:1]},
		"ChainsFlushed":  {`iptables -t nat -F FLANNEL-POSTRTG; iptables -F FLANNEL-FWD`, situations[:1]},
		"ChainDeleted":   {`iptables -t nat -F; iptables -t nat -X FLANNEL-POSTRTG`, situations[:1]},
		"TablesWiped":    {`iptables -t nat -F; iptables -F; iptables -X; iptables -t nat -X; ip6tables -t nat -F; ip6tables -t nat -X`, situations[:2]},
		"IPv6JumpDelete": {`ip6tables -t nat -D POSTROUTING 1; ip6tables -D FLANNEL-FWD 1`, situations[:1]},
	} {
		for _, s := range c.in {
			t.Run(s.name+"/"+name, func(t *testing.T) {
				s.host(t)
				ns := netns.New(t)
				r := open(t, ns)
				mustSync(t, r, dual())
				shell(t, ns, c.commands)
				mustSync(t, r, dual())
				wantSaved(t, ns, fixture(t, s.name+"-dual"))
				wantNoChange(t, ns, r, dual())
			})
		}
	}
}

// With iptables-nft, what others do elsewhere, and packets that are counted, make
// no program run. What is done to our chains does.
func TestOthersChangesElsewhereCostNothing(t *testing.T) {
	hostOf(t, nft)
	ns := netns.New(t)
	shell(t, ns, "ip link set lo up")
	r := open(t, ns)
	d := dual()
	mustSync(t, r, d)
	mustSync(t, r, d)
	path := os.Getenv("PATH")
	without := func() error {
		t.Setenv("PATH", t.TempDir())
		defer t.Setenv("PATH", path)
		return r.Sync(t.Context(), d)
	}
	const others = "iptables -A INPUT -j ACCEPT; iptables -t nat -A PREROUTING -j ACCEPT; nft add table ip mine; ping -c 1 127.0.0.1"
	shell(t, ns, others)
	if !strings.Contains(shell(t, ns, "nft list table ip nat"), "packets 1") {
		t.Error("no packet was counted")
	}
	if err := without(); err != nil {
		t.Errorf("a program was run: %v", err)
	}
	for _, ours := range []string{
		"iptables -D FLANNEL-FWD 1",
		"iptables -I POSTROUTING -t nat -j ACCEPT", // may have to do with the jump
		"ip6tables -t nat -F FLANNEL-POSTRTG",
	} {
		shell(t, ns, ours)
		if err := without(); !errors.Is(err, ErrNoProgram) {
			t.Errorf("%s: not noticed (%v)", ours, err)
		}
		mustSync(t, r, d)
		mustSync(t, r, d)
	}
}

// wantSaved compares what the programs of iptables save. When tables or base
// chains were made says nothing.
func wantSaved(t *testing.T, ns *netns.NS, want string) {
	t.Helper()
	got := rulesets(t, ns)
	for _, tool := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		if got, want := sortedTables(section(got, tool)), sortedTables(section(want, tool)); got != want {
			t.Errorf("%s prints\n%swant\n%s", tool, got, want)
		}
	}
}

// As flanneld repairs: behind what others have put in.
func TestRepairAmongOthers(t *testing.T) {
	for _, s := range situations[:2] {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			r := open(t, ns)
			mustSync(t, r, v4())
			shell(t, ns, `
				iptables -t nat -D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
				iptables -t nat -A POSTROUTING -s 10.9.9.9 -j ACCEPT
				iptables -D FLANNEL-FWD 1
				iptables -I FLANNEL-FWD -s 10.9.9.9 -j ACCEPT`)
			mustSync(t, r, v4())
			wantRules(t, ns, fixture(t, s.name+"-repaired"))
			wantNoChange(t, ns, r, v4())
		})
	}
}

// Rules of others, and the place of the jump, are theirs while we run.
func TestOthersRulesAreLeft(t *testing.T) {
	for _, s := range situations[:2] {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			r := open(t, ns)
			mustSync(t, r, v4())
			shell(t, ns, foreign+`
				iptables -t nat -I FLANNEL-POSTRTG 3 -s 10.9.9.9 -m comment --comment "say \"no\" to it" -j ACCEPT
				iptables -A FLANNEL-FWD -j DROP
				iptables -t nat -A POSTROUTING -o eth0 -g FLANNEL-POSTRTG`)
			wantNoChange(t, ns, r, v4())
			moved := v4()
			moved.Prefixes = []netip.Prefix{other4}
			mustSync(t, r, moved)
			wantNoChange(t, ns, r, moved)
			text := rulesets(t, ns)
			for _, line := range []string{
				`-A FLANNEL-POSTRTG -s 10.9.9.9/32 -m comment --comment "say \"no\" to it" -j ACCEPT`,
				"-A FLANNEL-FWD -j DROP",
				"-A POSTROUTING -o eth0 -g FLANNEL-POSTRTG",
				"-A FORWARD -i docker0 -j ACCEPT",
				":FORWARD DROP",
			} {
				if !strings.Contains(text, line+"\n") {
					t.Errorf("there is no %q in\n%s", line, text)
				}
			}
			if strings.Contains(text, own4.String()) || !strings.Contains(text, other4.String()) {
				t.Errorf("the prefix was not changed:\n%s", text)
			}
		})
	}
}

func TestRepairNFTables(t *testing.T) {
	for name, commands := range map[string]string{
		"TablesDeleted":      "delete table ip flannel-ipv4; delete table ip6 flannel-ipv6",
		"UnusedTableDeleted": "delete table ip6 flannel-ipv6",
		"ChainDeleted":       "flush chain ip flannel-ipv4 postrtg; delete chain ip flannel-ipv4 postrtg; flush chain ip flannel-ipv4 forward; delete chain ip flannel-ipv4 forward",
		"ChainFlushed":       "flush chain ip flannel-ipv4 postrtg",
		"RuleAdded":          "insert rule ip flannel-ipv4 postrtg ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
		"OldNftsForm":        "flush chain ip flannel-ipv4 forward; add rule ip flannel-ipv4 forward @nh,96,32 & 0xffff0000 == 0x0af40000 accept; add rule ip flannel-ipv4 forward ip daddr 10.244.0.0/16 accept",
		"PolicyDrop":         "chain ip flannel-ipv4 forward { policy drop; }",
		"AnotherPriority":    "flush chain ip flannel-ipv4 forward; delete chain ip flannel-ipv4 forward; add chain ip flannel-ipv4 forward { type filter hook forward priority 7; }",
		"NoHook":             "flush chain ip flannel-ipv4 forward; delete chain ip flannel-ipv4 forward; add chain ip flannel-ipv4 forward",
		"Asleep":             "add table ip flannel-ipv4 { flags dormant; }",
		"TwoSwapped":         "flush chain ip flannel-ipv4 forward; add rule ip flannel-ipv4 forward ip daddr 10.244.0.0/16 accept; add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 accept",
		"OneDoubled":         "add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 accept",
	} {
		t.Run(name, func(t *testing.T) {
			ns := netns.New(t)
			r := open(t, ns)
			d := v4()
			d.NFTables = true
			mustSync(t, r, d)
			shell(t, ns, "nft -f - <<'END'\n"+strings.ReplaceAll(strings.ReplaceAll(commands, "; add ", "\nadd "), "; delete", "\ndelete")+"\nEND\n")
			mustSync(t, r, d)
			// When a table or chain was made says nothing.
			got, want := section(rulesets(t, ns), "nft list ruleset"), section(fixture(t, "nftables-v4"), "nft list ruleset")
			if name == "OldNftsForm" { // the same to the kernel
				got = strings.ReplaceAll(got, "@nh,96,32 & 0xffff0000 == 0xaf40000", "ip saddr 10.244.0.0/16")
			}
			if sortedParts(got) != sortedParts(want) {
				t.Errorf("the rules are\n%swant\n%s", got, want)
			}
			wantNoChange(t, ns, r, d)
			wantNoChange(t, ns, open(t, ns), d)
		})
	}
}

// sortedParts are tables and chains in one order.
func sortedParts(text string) string {
	parts := map[string]string{}
	key := ""
	for line := range strings.Lines(text) {
		word := strings.TrimSpace(line)
		if strings.HasPrefix(word, "table") || strings.HasPrefix(word, "chain") {
			key = word
		}
		if word != "" && word != "}" {
			parts[key] += line
		}
	}
	return parts["table ip flannel-ipv4 {"] + parts["chain postrtg {"] + parts["chain forward {"] + parts["table ip6 flannel-ipv6 {"]
}

// Rules of others in flannel's tables are left while we run.
func TestOthersRulesAreLeftInNFTables(t *testing.T) {
	ns := netns.New(t)
	r := open(t, ns)
	d := v4()
	d.NFTables = true
	mustSync(t, r, d)
	shell(t, ns, `nft -f - <<'END'
insert rule ip flannel-ipv4 postrtg ip saddr 10.9.9.9 accept
add rule ip flannel-ipv4 forward ip saddr 10.244.0.0/16 counter accept
add rule ip flannel-ipv4 forward fib daddr type local drop
add chain ip flannel-ipv4 mine
add table ip mine
END`)
	wantNoChange(t, ns, r, d)
	d.Prefixes = []netip.Prefix{other4}
	mustSync(t, r, d)
	wantNoChange(t, ns, r, d)
	text := rulesets(t, ns)
	for _, part := range []string{"ip saddr 10.9.9.9 accept", "counter packets 0 bytes 0 accept", "fib daddr type local drop", "chain mine", "table ip mine"} {
		if !strings.Contains(text, part) {
			t.Errorf("there is no %q in\n%s", part, text)
		}
	}
	if strings.Contains(text, own4.String()) || strings.Count(text, other4.String()) != 3 {
		t.Errorf("the prefix was not changed:\n%s", text)
	}
}
