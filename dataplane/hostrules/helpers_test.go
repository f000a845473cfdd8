//go:build linux

package hostrules

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/netns"
)

// open opens the rules of a namespace.
func open(tb testing.TB, ns *netns.NS) *Rules {
	tb.Helper()
	var r *Rules
	ns.MustDo(tb, func() (err error) {
		r, err = Open(Options{Log: slog.New(slog.NewTextHandler(tb.Output(), nil))})
		return err
	})
	tb.Cleanup(func() {
		if err := r.Close(); err != nil {
			tb.Error(err)
		}
	})
	return r
}

// mustSync syncs and wants no error.
func mustSync(tb testing.TB, r *Rules, d Desired) {
	tb.Helper()
	if err := r.Sync(tb.Context(), d); err != nil {
		tb.Fatalf("sync: %v", err)
	}
}

// hostOf makes the host's iptables that of a flavour, as alternatives do, when
// nothing else tells. Other programs are where they are.
func hostOf(tb testing.TB, f flavour) {
	tb.Helper()
	dir := tb.TempDir()
	link(tb, dir, f, "iptables", "iptables-restore", "ip6tables", "ip6tables-restore")
	tb.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// onlyPrograms makes a PATH with these programs of iptables and no other.
func onlyPrograms(tb testing.TB, f flavour, names ...string) {
	tb.Helper()
	dir := tb.TempDir()
	link(tb, dir, f, names...)
	tb.Setenv("PATH", dir)
}

// link makes programs of a flavour in a directory.
func link(tb testing.TB, dir string, f flavour, names ...string) {
	tb.Helper()
	multi, err := exec.LookPath("xtables-" + string(f) + "-multi")
	if err != nil {
		tb.Fatal(err)
	}
	for _, name := range names {
		if err := os.Symlink(multi, filepath.Join(dir, name)); err != nil {
			tb.Fatal(err)
		}
	}
}

// shell runs a script in a namespace and returns what it prints.
func shell(tb testing.TB, ns *netns.NS, script string) string {
	tb.Helper()
	out, err := tryShell(ns, script)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

func tryShell(ns *netns.NS, script string) (string, error) {
	var out []byte
	err := ns.Do(func() error {
		cmd := exec.Command("/bin/sh", "-ec", script)
		var err error
		if out, err = cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", script, err, out)
		}
		return nil
	})
	return string(out), err
}

// Counters, as iptables-save and nft list print them.
var (
	savedCounters  = regexp.MustCompile(`(?m) \[\d+:\d+\]$`)
	listedCounters = regexp.MustCompile(`packets \d+ bytes \d+`)
)

// rulesets is all of netfilter in a namespace, in the form in which
// testdata/record keeps it.
func rulesets(tb testing.TB, ns *netns.NS) string {
	tb.Helper()
	text := shell(tb, ns, `
		for tool in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
			echo "### $tool-save"
			$tool-save 2>&1 | sed '/^#/d'
		done
		echo "### nft list ruleset"
		nft list ruleset 2>&1`)
	text = savedCounters.ReplaceAllString(text, "")
	return listedCounters.ReplaceAllString(text, "packets 0 bytes 0")
}

// fixture is what stock flanneld has left.
func fixture(tb testing.TB, name string) string {
	tb.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".txt"))
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}

// section is one part of a fixture.
func section(text, name string) string {
	_, rest, _ := strings.Cut(text, "### "+name+"\n")
	part, _, _ := strings.Cut(rest, "### ")
	return part
}

// load makes a namespace's rules those of a fixture, with what the rules have
// counted.
func load(tb testing.TB, ns *netns.NS, name string) {
	tb.Helper()
	text := fixture(tb, name)
	for _, program := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		saved := section(text, program+"-save")
		if saved == "" {
			continue
		}
		counted := regexp.MustCompile(`(?m)^-A`).ReplaceAllString(saved, "[7:700] -A")
		counted = regexp.MustCompile(`(?m)^(:.*)$`).ReplaceAllString(counted, "$1 [0:0]")
		shell(tb, ns, program+"-restore --counters <<'END'\n"+counted+"END\n")
	}
	if flannel := section(text, "nft list ruleset"); strings.Contains(flannel, "table ip flannel-ipv4") {
		_, flannel, _ = strings.Cut(flannel, "table ip flannel-ipv4")
		shell(tb, ns, "nft -f - <<'END'\ntable ip flannel-ipv4"+flannel+"END\n")
	}
}

// counted is all of netfilter with counters and handles: what a rule that was
// written anew has lost.
func counted(tb testing.TB, ns *netns.NS) string {
	tb.Helper()
	return shell(tb, ns, `
		{ iptables-legacy-save --counters; ip6tables-legacy-save --counters; } 2>&1 | sed '/^#/d'
		nft --handle list ruleset 2>&1`)
}

// generation is that of nf_tables in a namespace.
func generation(tb testing.TB, ns *netns.NS) (n uint32) {
	tb.Helper()
	ns.MustDo(tb, func() error {
		s, err := openSocket()
		if err != nil {
			return err
		}
		defer s.Close()
		n, err = s.generation()
		return err
	})
	return n
}

// wantNoChange syncs and wants that nothing is written.
func wantNoChange(tb testing.TB, ns *netns.NS, r *Rules, d Desired) {
	tb.Helper()
	before, was := counted(tb, ns), generation(tb, ns)
	mustSync(tb, r, d)
	if now := generation(tb, ns); now != was {
		tb.Errorf("nf_tables was written: generation %d, then %d", was, now)
	}
	if after := counted(tb, ns); after != before {
		tb.Errorf("the rules were\n%sare\n%s", before, after)
	}
}

// wantRules compares all of netfilter with a text.
func wantRules(tb testing.TB, ns *netns.NS, want string) {
	tb.Helper()
	if got := rulesets(tb, ns); got != want {
		tb.Errorf("the rules are\n%s\nwant\n%s\nfirst difference: %s", got, want, firstDifference(got, want))
	}
}

func firstDifference(got, want string) string {
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf("line %d: %q, want %q", i+1, a[i], b[i])
		}
	}
	return fmt.Sprintf("%d lines, want %d", len(a), len(b))
}

// The prefixes of the fixtures.
var (
	network4, own4 = netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.244.1.0/24")
	network6, own6 = netip.MustParsePrefix("fd00:10:244::/48"), netip.MustParsePrefix("fd00:10:244:1::/64")
	other4         = netip.MustParsePrefix("10.244.7.0/24")
)

// v4, dual and v6 are nodes with all rules.
func v4() Desired {
	return Desired{Networks: []netip.Prefix{network4}, Prefixes: []netip.Prefix{own4}, Masquerade: true, Forward: true}
}

func v6() Desired {
	return Desired{Networks: []netip.Prefix{network6}, Prefixes: []netip.Prefix{own6}, Masquerade: true, Forward: true}
}

func dual() Desired {
	d := v4()
	d.Networks, d.Prefixes = append(d.Networks, network6), append(d.Prefixes, own6)
	return d
}

// situation is a host in one of the three modes.
type situation struct {
	name     string // of its fixtures
	mode     mode
	nftables bool
}

var situations = []situation{
	{"nft", inNft, false},
	{"legacy", inLegacy, false},
	{"nftables", inNFTables, true},
}

// in makes a Desired one for the situation.
func (s situation) in(d Desired) Desired {
	d.NFTables = s.nftables
	return d
}

// host makes the host's iptables what it is in the situation.
func (s situation) host(tb testing.TB) {
	f := nft
	if s.mode == inLegacy {
		f = legacy
	}
	hostOf(tb, f)
}

// foreign are rules such as kube-proxy, Docker and an operator make.
const foreign = `
iptables -t nat -N KUBE-POSTROUTING
iptables -t nat -A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
iptables -P FORWARD DROP
iptables -A FORWARD -i docker0 -j ACCEPT
iptables -t mangle -N KUBE-KUBELET-CANARY
`
