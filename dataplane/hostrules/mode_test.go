//go:build linux

package hostrules

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// From each mode to each other, in one process and over a restart: what flannel
// has is in one place only.
func TestModeChanges(t *testing.T) {
	for _, from := range situations {
		for _, to := range situations {
			if from.mode == to.mode {
				continue
			}
			t.Run(from.name+"-to-"+to.name, func(t *testing.T) {
				from.host(t)
				ns := netns.New(t)
				r := open(t, ns)
				mustSync(t, r, from.in(dual()))
				to.host(t)
				if from.mode != inNFTables && to.mode != inNFTables {
					// While we run, the flavour stays: a host does not change its mind.
					wantNoChange(t, ns, r, to.in(dual()))
				}
				if to.mode != inNFTables { // the host's own rules tell
					shell(t, ns, "iptables -t mangle -N KUBE-IPTABLES-HINT")
				}
				if from.mode != inNFTables {
					r = open(t, ns)
				}
				mustSync(t, r, to.in(dual()))
				shell(t, ns, "iptables -t mangle -X")
				got := rulesets(t, ns)
				if strings.Count(got, "fully-random")+strings.Count(got, "random-fully") != strings.Count(fixture(t, to.name+"-dual"), "fully-random")+
					strings.Count(fixture(t, to.name+"-dual"), "random-fully") || got == "" {
					t.Errorf("the rules are\n%s", got)
				}
				for _, part := range flannelLines(fixture(t, to.name+"-dual")) {
					if !strings.Contains(got, part) {
						t.Errorf("there is no %q in\n%s", part, got)
					}
				}
				if n, want := len(flannelLines(got)), len(flannelLines(fixture(t, to.name+"-dual"))); n != want {
					t.Errorf("%d lines are flannel's, want %d:\n%s", n, want, got)
				}
				wantNoChange(t, ns, r, to.in(dual()))
			})
		}
	}
}

// flannelLines are the lines of rulesets that have something of flannel's.
func flannelLines(text string) []string {
	var found []string
	for line := range strings.Lines(text) {
		if strings.Contains(line, "FLANNEL") || strings.Contains(line, "flannel") || strings.Contains(line, "10.244.") {
			found = append(found, line)
		}
	}
	return found
}

// What stock flanneld leaves when EnableNFTables is changed is flannel's too.
func TestLeftoversOfFlannelAreCleaned(t *testing.T) {
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			load(t, ns, "nft-to-nftables")
			load(t, ns, "legacy-dual")
			if s.mode == inLegacy {
				shell(t, ns, "iptables -t mangle -N KUBE-IPTABLES-HINT")
			}
			if s.mode == inNft {
				shell(t, ns, "iptables -t mangle -N KUBE-IPTABLES-HINT")
			}
			mustSync(t, open(t, ns), s.in(v4()))
			got, want := flannelLines(rulesets(t, ns)), flannelLines(fixture(t, s.name+"-v4"))
			if len(got) != len(want) {
				t.Errorf("flannel's lines are\n%swant\n%s", strings.Join(got, ""), strings.Join(want, ""))
			}
		})
	}
}

// Only what is flannel's goes.
func TestRemove(t *testing.T) {
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			shell(t, ns, foreign+"nft add table ip6 mine; iptables -A FORWARD -j ACCEPT; ip6tables -A FORWARD -j ACCEPT; ip6tables -t nat -A POSTROUTING -j ACCEPT")
			before := rulesets(t, ns)
			if removed, err := open(t, ns).Remove(t.Context()); removed || err != nil {
				t.Errorf("removing what is not there: %v, %v", removed, err)
			}
			if after := rulesets(t, ns); after != before {
				t.Errorf("removing what is not there has changed\n%sto\n%s", before, after)
			}
			for range 2 {
				r := open(t, ns)
				mustSync(t, r, s.in(dual()))
				if !s.nftables { // a jump of others goes with what it leads to
					shell(t, ns, "iptables -t nat -A POSTROUTING -o eth0 -g FLANNEL-POSTRTG; iptables -I FORWARD -o eth0 -j FLANNEL-FWD")
				}
				if rulesets(t, ns) == before {
					t.Error("nothing was made")
				}
				if removed, err := r.Remove(t.Context()); !removed || err != nil {
					t.Errorf("removing what is there: %v, %v", removed, err)
				}
				if after := rulesets(t, ns); after != before {
					t.Errorf("the rules were\n%sare\n%s", before, after)
				}
			}
		})
	}
}

// Somebody's own chain leads to flannel's, which then can't be deleted: it is
// emptied, and told.
func TestChainInUseByOthers(t *testing.T) {
	for _, s := range situations[:2] {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			r := open(t, ns)
			mustSync(t, r, v4())
			shell(t, ns, "iptables -N MINE; iptables -A MINE -j FLANNEL-FWD; iptables -A FORWARD -j MINE")
			if _, err := r.Remove(t.Context()); err == nil || !strings.Contains(err.Error(), "FLANNEL-FWD") {
				t.Errorf("the error is %v", err)
			}
			text := rulesets(t, ns)
			if strings.Contains(text, "10.244.") || strings.Contains(text, "-A FORWARD -m comment") || strings.Contains(text, "POSTRTG") {
				t.Errorf("rules are left:\n%s", text)
			}
		})
	}
}

// What could not be cleaned is tried again, and the new rules are in force
// meanwhile.
func TestCleaningIsTriedAgain(t *testing.T) {
	hostOf(t, nft)
	ns := netns.New(t)
	load(t, ns, "nft-v4")
	shell(t, ns, "iptables -N MINE; iptables -A MINE -j FLANNEL-FWD")
	r := open(t, ns)
	d := v4()
	d.NFTables = true
	for range 3 {
		if err := r.Sync(t.Context(), d); err == nil || !strings.Contains(err.Error(), "FLANNEL-FWD") {
			t.Errorf("the error is %v", err)
		}
	}
	want := section(fixture(t, "nftables-v4"), "nft list ruleset")
	if got := rulesets(t, ns); !strings.Contains(got, want) {
		t.Errorf("the rules are\n%swant\n%s", got, want)
	}
	shell(t, ns, "iptables -F MINE")
	mustSync(t, r, d)
	if got := rulesets(t, ns); strings.Contains(got, "FLANNEL") {
		t.Errorf("flannel's chains are left:\n%s", got)
	}
}

// What was read is no longer so when it is to be changed: nothing is.
func TestOthersWriteBetweenLookAndWrite(t *testing.T) {
	ns := netns.New(t)
	w, err := v4().check()
	if err != nil {
		t.Fatal(err)
	}
	was := generation(t, ns)
	shell(t, ns, "nft add table ip mine")
	before := rulesets(t, ns)
	ns.MustDo(t, func() error {
		s, err := openSocket()
		if err != nil {
			return err
		}
		defer s.Close()
		table := w.tables()[0]
		if err := s.write(table, table.plan(held{}, nil, true), was); !errors.Is(err, errChanged) {
			t.Errorf("the error is %v", err)
		}
		return nil
	})
	if after := rulesets(t, ns); after != before {
		t.Errorf("written was\n%s", after)
	}
}

func TestFlavourOfTheHost(t *testing.T) {
	for _, c := range []struct {
		name     string
		programs flavour // of iptables in PATH
		rules    string
		want     mode
	}{
		{"NothingButTheProgramNft", nft, "", inNft},
		{"NothingButTheProgramLegacy", legacy, "", inLegacy},
		{"KubeletsHintInNft", legacy, "iptables-nft -t mangle -N KUBE-IPTABLES-HINT; iptables-legacy -A FORWARD -j ACCEPT", inNft},
		{"KubeletsCanaryInLegacy", nft, "iptables-legacy -t mangle -N KUBE-KUBELET-CANARY; iptables-nft -A FORWARD -j ACCEPT", inLegacy},
		{"KubeletsHintInBoth", legacy, "iptables-legacy -t mangle -N KUBE-IPTABLES-HINT; iptables-nft -t mangle -N KUBE-IPTABLES-HINT", inNft},
		{"KubeletsHintInIPv6Only", legacy, "ip6tables-nft -t mangle -N KUBE-IPTABLES-HINT", inNft},
		{"KubeletsHintInLegacyIPv6Only", nft, "ip6tables-legacy -t mangle -N KUBE-IPTABLES-HINT", inLegacy},
		{"HintInAnotherTable", nft, "iptables-legacy -N KUBE-IPTABLES-HINT", inNft},
		{"MoreRulesInLegacy", nft, "iptables-legacy -A FORWARD -j ACCEPT; ip6tables-legacy -t raw -A OUTPUT -j ACCEPT; iptables-nft -A FORWARD -j ACCEPT", inLegacy},
		{"MoreRulesInNft", legacy, "iptables-nft -A FORWARD -j ACCEPT; ip6tables-nft -t raw -A OUTPUT -j ACCEPT; iptables-legacy -A FORWARD -j ACCEPT", inNft},
		{"AsManyRulesInBoth", legacy, "iptables-nft -A FORWARD -j ACCEPT; iptables-legacy -A FORWARD -j ACCEPT", inLegacy},
		{"NftablesOfOthersDontCount", legacy, "nft add table ip mine; nft add chain ip mine c; nft add rule ip mine c accept", inLegacy},
	} {
		t.Run(c.name, func(t *testing.T) {
			hostOf(t, c.programs)
			ns := netns.New(t)
			shell(t, ns, c.rules+"\ntrue")
			r := open(t, ns)
			mustSync(t, r, v4())
			if r.Mode() != string(c.want) {
				t.Errorf("the mode is %s, want %s", r.Mode(), c.want)
			}
		})
	}
}

// Another flavour is looked at without making its tables.
func TestTablesOfLegacyAreNotMade(t *testing.T) {
	for _, s := range []situation{situations[0], situations[2]} {
		s.host(t)
		ns := netns.New(t)
		r := open(t, ns)
		mustSync(t, r, s.in(dual()))
		if _, err := r.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		for _, f := range families {
			if tables := shell(t, ns, "cat "+strings.Replace(f.legacyTables, "thread-self", "self", 1)); tables != "" {
				t.Errorf("%s: legacy has tables %q", s.name, tables)
			}
		}
	}
}

func TestOnlyShortNamesOfPrograms(t *testing.T) {
	for _, s := range situations[:2] {
		t.Run(s.name, func(t *testing.T) {
			ns := netns.New(t)
			path := os.Getenv("PATH")
			f := flavour(s.name)
			onlyPrograms(t, f, "iptables", "iptables-restore", "ip6tables", "ip6tables-restore")
			mustSync(t, open(t, ns), dual())
			t.Setenv("PATH", path)
			wantRules(t, ns, fixture(t, s.name+"-dual"))
		})
	}
}

func TestNoProgram(t *testing.T) {
	ns := netns.New(t)
	path := os.Getenv("PATH")
	r := open(t, ns)
	t.Setenv("PATH", t.TempDir())
	err := r.Sync(t.Context(), v4())
	if !errors.Is(err, ErrNoProgram) || !strings.Contains(err.Error(), "EnableNFTables") || !strings.Contains(err.Error(), "install") {
		t.Errorf("the error is %v", err)
	}
	none := v4()
	none.Masquerade, none.Forward = false, false
	mustSync(t, r, none) // needs no program
	nftables := v4()
	nftables.NFTables = true
	mustSync(t, r, nftables) // neither does this
	if _, err := r.Remove(t.Context()); err != nil {
		t.Errorf("removing what needs no program: %v", err)
	}
	mustSync(t, r, nftables)
	t.Setenv("PATH", path)
	wantRules(t, ns, fixture(t, "nftables-v4"))
	mustSync(t, r, v4()) // it was installed
	if r.Mode() != string(inNft) {
		t.Errorf("the mode is %s", r.Mode())
	}
}

// A program that is missing is named, and the rest is done without.
func TestOneProgramMissing(t *testing.T) {
	ns := netns.New(t)
	path := os.Getenv("PATH")
	r := open(t, ns)
	onlyPrograms(t, nft, "iptables-nft", "iptables-nft-restore")
	mustSync(t, r, v4())
	err := r.Sync(t.Context(), dual())
	if !errors.Is(err, ErrNoProgram) || !strings.Contains(err.Error(), "there is no ip6tables-nft:") {
		t.Errorf("the error is %v", err)
	}
	t.Setenv("PATH", path)
	wantRules(t, ns, fixture(t, "nft-v4"))
}

// On a host with nothing but the other flavour's program, that has to do.
func TestProgramOfTheOtherFlavourOnly(t *testing.T) {
	ns := netns.New(t)
	shell(t, ns, "iptables-nft -t mangle -N KUBE-IPTABLES-HINT")
	onlyPrograms(t, legacy, "iptables", "iptables-restore")
	r := open(t, ns)
	mustSync(t, r, v4())
	if r.Mode() != string(inLegacy) {
		t.Errorf("the mode is %s", r.Mode())
	}
}

// hold holds the lock of iptables.
func hold(t *testing.T) (release func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lock")
	t.Setenv("XTABLES_LOCKFILE", path)
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { file.Close() }
}

func TestLockHeldForLong(t *testing.T) {
	hostOf(t, legacy)
	ns := netns.New(t)
	r := open(t, ns)
	was := lockWait
	lockWait = "1"
	t.Cleanup(func() { lockWait = was })
	release := hold(t)
	defer release()
	began := time.Now()
	err := r.Sync(t.Context(), dual())
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "/run/xtables.lock") {
		t.Errorf("the error is %v", err)
	}
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("it took %v: each chain waited for itself", took)
	}
	release()
	mustSync(t, r, dual())
	wantRules(t, ns, fixture(t, "legacy-dual"))
}

func TestLockHeldForAWhile(t *testing.T) {
	hostOf(t, legacy)
	ns := netns.New(t)
	r := open(t, ns)
	mustSync(t, r, v4())
	shell(t, ns, "iptables -F FLANNEL-FWD")
	release := hold(t)
	time.AfterFunc(500*time.Millisecond, release)
	mustSync(t, r, v4())
	wantRules(t, ns, fixture(t, "legacy-v4"))
}

func TestStoppedWhileWaitingForTheLock(t *testing.T) {
	hostOf(t, legacy)
	r := open(t, netns.New(t))
	mustSync(t, r, v4())
	defer hold(t)()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := r.Sync(ctx, v4()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the error is %v", err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestDesiredThatMakesNoSense(t *testing.T) {
	ns := netns.New(t)
	r := open(t, ns)
	mustSync(t, r, v4())
	before := rulesets(t, ns)
	for name, c := range map[string]struct {
		networks, prefixes []netip.Prefix
		says               []string
	}{
		"Nothing":    {nil, nil, []string{"no network"}},
		"TwoOfOne":   {[]netip.Prefix{network4, other4}, nil, []string{"10.244.7.0/24 beside 10.244.0.0/16"}},
		"Everything": {[]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, nil, []string{"0.0.0.0/0"}},
		"Invalid":    {[]netip.Prefix{network4, {}}, []netip.Prefix{{}, netip.MustParsePrefix("::ffff:10.0.0.0/100")}, []string{"network", "pod prefix", "::ffff:10.0.0.0/100"}},
	} {
		err := r.Sync(t.Context(), Desired{Networks: c.networks, Prefixes: c.prefixes, Masquerade: true, Forward: true})
		for _, part := range c.says {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: the error is %v, and says nothing of %q", name, err, part)
			}
		}
	}
	if after := rulesets(t, ns); after != before {
		t.Errorf("the rules were\n%sare\n%s", before, after)
	}
	// Host bits are none of anybody's business.
	d := v4()
	d.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.244.1.1/24")}
	wantNoChange(t, ns, r, d)
	// Without pods of its own in a family, a node has nothing to masquerade there.
	d = dual()
	d.Prefixes = d.Prefixes[:1]
	mustSync(t, r, d)
	if text := section(rulesets(t, ns), "ip6tables-nft-save"); strings.Contains(text, "POSTRTG") || !strings.Contains(text, "FLANNEL-FWD") {
		t.Errorf("IPv6 rules are\n%s", text)
	}
}
