//go:build linux

package main

import (
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

func mustFactors(t *testing.T) factors {
	t.Helper()
	f, err := parseFactors("virtual,wire", "1,2", "1,1000,5000", "pod,iptables:1,nftables:1000", "none,source")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestSettingsDifferFromTheBaseInOnePart(t *testing.T) {
	f := mustFactors(t)
	var got []string
	for _, s := range f.oneByOne() {
		got = append(got, s.String())
	}
	want := []string{
		"virtual underlay, pod to pod, client and server on one CPU",
		"virtual underlay, pod to pod, client and server on a CPU each",
		"virtual underlay, pod to pod, client and server on one CPU, beside datagrams from an unknown source",
		"wire underlay, pod to pod, client and server on one CPU",
		"virtual underlay, pod to pod, 1000 peers, client and server on one CPU",
		"virtual underlay, pod to pod, 5000 peers, client and server on one CPU",
		"virtual underlay, pod to ClusterIP (kube-proxy with iptables), client and server on one CPU",
		"virtual underlay, pod to ClusterIP, one of 1000 (kube-proxy with nftables), client and server on one CPU",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAllCombinationsBeginWithTheBaseAndAreDifferent(t *testing.T) {
	f := mustFactors(t)
	all := f.combinations()
	if len(all) != 2*2*3*3*2 || all[0] != f.base() {
		t.Errorf("%d settings, the first %s", len(all), all[0])
	}
	seen := map[setting]bool{}
	builds := 0
	for i, s := range all {
		if seen[s] {
			t.Errorf("twice: %s", s)
		}
		seen[s] = true
		if i == 0 || s.world() != all[i-1].world() {
			builds++
		}
	}
	if builds != 2*3*3 {
		t.Errorf("labs are built %d times, want once for each world", builds)
	}
}

func TestListsThatCannotBeUnderstood(t *testing.T) {
	for _, lists := range [][5]string{
		{"both", "1", "1", "pod", "none"},
		{"virtual", "0", "1", "pod", "none"},
		{"virtual", "1", "0", "pod", "none"},
		{"virtual", "1", "20001", "pod", "none"},
		{"virtual", "1,1", "1", "pod", "none"},
		{"virtual", "1", "1", "", "none"},
		{"virtual", "1", "1", "iptables", "none"},
		{"virtual", "1", "1", "ipvs:1", "none"},
		{"virtual", "1", "1", "iptables:0", "none"},
		{"virtual", "1", "1", "pod", "letters"},
	} {
		if f, err := parseFactors(lists[0], lists[1], lists[2], lists[3], lists[4]); err == nil {
			t.Errorf("%q was understood as %+v", lists, f)
		}
	}
}

func TestCardsFitOrAreRefused(t *testing.T) {
	for args, want := range map[string]string{
		"--cards eth1,eth2":                          "",
		"--cards eth1,eth2 --cpus 1,2 --peers 1,100": "",
		"--cards eth1":                               `--cards has "eth1"; give two`,
		"--cards eth1,eth2 --to iptables:1":          "only pods are talked to",
		"--cards eth1,eth2 --junk none,vni":          "nobody sends junk",
	} {
		args = "--modes plain " + args
		o, err := parseBench(&env{ctx: t.Context(), stdout: io.Discard, stderr: io.Discard}, strings.Fields(args))
		switch {
		case want == "" && (err != nil || o.settings[0].underlay != lab.Cards):
			t.Errorf("%s: %v, %v", args, o.settings, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: the error is %v, want %q", args, err, want)
		}
	}
}

func TestTargetsAreReadAsTheyAreWritten(t *testing.T) {
	for _, word := range []string{"pod", "iptables:1", "nftables:1000"} {
		if got, err := parseTarget(word); err != nil || got.String() != word {
			t.Errorf("%q became %q, %v", word, got, err)
		}
	}
}

func TestRoundsOfTheBaseAndTheRest(t *testing.T) {
	for list, want := range map[string][2]int{"5": {5, 5}, "11,5": {11, 5}} {
		rounds, err := parseRounds(list)
		o := benchOptions{rounds: rounds}
		if err != nil || o.roundsOf(0) != want[0] || o.roundsOf(3) != want[1] {
			t.Errorf("%q: %v, %v", list, rounds, err)
		}
	}
	for _, list := range []string{"", "0", "5,", "5,x", "1,2,3"} {
		if rounds, err := parseRounds(list); err == nil {
			t.Errorf("%q was understood as %v", list, rounds)
		}
	}
}

func TestBaselines(t *testing.T) {
	for _, c := range []struct{ modes, list, want string }{
		{"host,flanneld,kernel,base", "", "flanneld host"},
		{"host,kernel,base", "", "kernel host"},
		{"plain,base", "", "plain"},
		{"host,kernel,base", "base,host", "base host"},
	} {
		chosen, err := parseModes(c.modes)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := (benchOptions{modes: chosen}).findBaselines(c.list); err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("modes %s, list %q: %v, %v, want %s", c.modes, c.list, got, err, c.want)
		}
	}
}

func TestProgramsAreAskedForWhereTheyAreNeeded(t *testing.T) {
	of := func(modes string, to target) string {
		chosen, err := parseModes(modes)
		if err != nil {
			t.Fatal(err)
		}
		o := benchOptions{modes: chosen, settings: []setting{{to: to}}}
		return strings.Join(o.neededPrograms(), " ")
	}
	for _, c := range []struct{ got, want string }{
		{of("host,kernel", target{}), ""},
		{of("host,flanneld", target{}), "flanneld etcd"},
		{of("host,kernel", target{proxyIptables, 1}), "etcd kube-apiserver kube-proxy"},
		{of("flanneld", target{proxyIptables, 1}), "flanneld etcd kube-apiserver kube-proxy"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

func TestModesShareNodesThatAreAlike(t *testing.T) {
	off, on := mode{kind: lab.Weft}, mode{kind: lab.Weft}
	other := mode{kind: lab.Weft, agent: []string{"--accel", "off"}}
	if off.nodes() != on.nodes() || off.nodes() == other.nodes() || off.nodes() == (mode{kind: lab.Kernel}).nodes() {
		t.Errorf("nodes %q, %q, %q", off.nodes(), on.nodes(), other.nodes())
	}
}

// What `make bench` measures has to end within an hour.
func TestTheUsualMatrixTakesLessThanAnHour(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?s)\nBENCH := (.*?[^\\])\n`).FindSubmatch(makefile)
	if found == nil {
		t.Fatal("the Makefile does not say what is measured (BENCH)")
	}
	args := strings.Fields(strings.ReplaceAll(string(found[1]), "\\\n", " "))
	var paths []string
	for _, name := range []string{"flanneld", "etcd", "kube-apiserver", "kube-proxy"} {
		paths = append(paths, mustProgram(t, name, ""))
	}
	args = append(args, "--weft", paths[0], "--programs", strings.Join(paths, ","))
	o, err := parseBench(&env{ctx: t.Context(), stdout: io.Discard, stderr: io.Discard}, args)
	if err != nil {
		t.Fatalf("weftlab bench %v: %v", args, err)
	}
	if len(o.settings) != 9 {
		t.Errorf("%d settings: %v", len(o.settings), o.settings)
	}
	if took := o.estimate(); took > time.Hour || took < 10*time.Minute {
		t.Errorf("it would take %s", took)
	}
	t.Logf("%v takes about %s", args, o.estimate())
}
