//go:build linux

package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
	"github.com/weft-net/weft/test/netns"
)

var update = flag.Bool("update", false, "write the files in testdata")

// runLine runs a command line in this process.
func runLine(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	status = run(&env{ctx: t.Context(), stdout: &out, stderr: &err}, args)
	return status, out.String(), err.String()
}

func TestEveryCommandsHelp(t *testing.T) {
	for _, c := range commands() {
		t.Run(c.name, func(t *testing.T) {
			status, got, stderr := runLine(t, "help", c.name)
			if status != 0 || stderr != "" {
				t.Fatalf("status %d, stderr %q", status, stderr)
			}
			for line := range strings.Lines(got) {
				if len(line) > 101 && strings.HasPrefix(line, "Usage") {
					t.Errorf("a long line: %s", line)
				}
			}
			path := filepath.Join("testdata", "help-"+c.name+".txt")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant (go test -update writes it)\n%s", got, want)
			}
		})
	}
}

func TestCommandLinesThatCannotBeUnderstood(t *testing.T) {
	for line, want := range map[string]string{
		"":                                     `no command given; "weftlab help" lists them`,
		"upp":                                  `there is no command "upp"; "weftlab help" lists them`,
		"up now":                               `up: there is no use for "now"; "weftlab up -h" shows how to call it`,
		"up --nods 3":                          `up: flag provided but not defined: -nods; "weftlab up -h" lists the flags`,
		"exec":                                 `exec: say where, as in "weftlab exec n1/p1 -- ip address"`,
		"bench --modes host,fast":              `bench: there is no mode "fast"; "weftlab bench -h" lists them`,
		"bench --tests ping":                   `there is no test "ping"; there are TCP_RR, UDP_RR, TCP_CRR, UDP_STREAM, TCP_STREAM, TCP_STREAM8`,
		"bench --modes a --cpus 3":             "bench: there is no mode \"a\"; \"weftlab bench -h\" lists them\nbench: --cpus has \"3\"; give 1, 2 or both, as in 1,2",
		"bench --junk letters":                 `bench: --junk has "letters"; give some of none, vni, source, malformed`,
		"bench --junk vni":                     `bench: --junk needs modes with an overlay; leave out host`,
		"bench --rounds 1,2,3":                 `bench: --rounds is "1,2,3"; give a number, or one for the base and one for the rest, as in 11,5`,
		"bench --baseline plain":               `bench: --baseline has "plain", which is not among the modes`,
		"bench --no-netfilter --to iptables:1": `bench: --no-netfilter leaves no ClusterIP to talk to; --to must be pod`,
		"load client TCP_RR here":              `load: not an ip:port`,
		"load junk xyz 192.0.2.1:8472":         `load: junk "xyz": encoding/hex: invalid byte: U+0078 'x'`,
		"load client TCP_RR":                   `load: "weftlab load -h" shows how to call it`,
	} {
		status, stdout, stderr := runLine(t, strings.Fields(line)...)
		if status != 2 || stdout != "" || strings.TrimSpace(stderr) != "weftlab: "+want {
			t.Errorf("weftlab %s: status %d, stdout %q\ngot  %q\nwant %q", line, status, stdout, stderr, want)
		}
	}
}

func TestDownIsHarmlessWhereNothingIsUp(t *testing.T) {
	if status, stdout, stderr := runLine(t, "down", "--name", "nosuchlab"); status != 0 || stdout != "Lab nosuchlab is not up.\n" {
		t.Errorf("status %d, %q, %q", status, stdout, stderr)
	}
}

// programs returns weftlab, with weft beside it as `make build` has them.
func programs(t *testing.T) (weftlab string) {
	t.Helper()
	netns.RequireRoot(t)
	if err := buildPrograms(); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(programDir, "weftlab")
}

// programDir is where buildPrograms puts programs; TestMain removes it.
var programDir string

// buildPrograms builds them for the first who asks.
var buildPrograms = sync.OnceValue(func() (err error) {
	if programDir, err = os.MkdirTemp("", "weftlab-test"); err != nil {
		return err
	}
	for _, name := range []string{"weft", "weftlab"} {
		if out, err := exec.Command("go", "build", "-o", filepath.Join(programDir, name), "../"+name).CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", name, err, out)
		}
	}
	return nil
})

func TestMain(m *testing.M) {
	status := m.Run()
	_ = os.RemoveAll(programDir)
	os.Exit(status)
}

func TestUpExecListDown(t *testing.T) {
	weftlab := programs(t)
	must := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(weftlab, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("weftlab %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	t.Cleanup(func() { _ = lab.Remove("cli") }) // if the test ends before `down`
	up := must("up", "--name", "cli", "--nodes", "2", "--kinds", "weft,kernel", "--underlay", "wire")
	for _, tip := range []string{"weftlab exec --name cli n1/p1 -- ping", "ip -n cli-n1 address", "weftlab down --name cli"} {
		if !strings.Contains(up, tip) {
			t.Errorf("`up` does not mention %q:\n%s", tip, up)
		}
	}
	if list := must("list"); !regexp.MustCompile(`(?m)^cli +2 +4 +wire, MTU 1500`).MatchString(list) {
		t.Errorf("list:\n%s", list)
	}
	if ping := must("exec", "--name", "cli", "n1/p2", "--", "ping", "-c", "1", "10.244.2.2"); !strings.Contains(ping, "ttl=62") {
		t.Errorf("ping from weft to plain kernel:\n%s", ping)
	}
	if status := must("exec", "--name", "cli", "n1", "weft", "status"); !strings.Contains(status, "n1") {
		t.Errorf("weft status inside the node:\n%s", status)
	}
	if down := must("down", "--name", "cli"); down != "Lab cli is removed.\n" {
		t.Errorf("down: %q", down)
	}
}

func TestDemoShowsWhatItClaims(t *testing.T) {
	weftlab := programs(t)
	out, err := exec.Command(weftlab, "demo", "--name", "demotest").CombinedOutput()
	if err != nil {
		t.Fatalf("weftlab demo: %v\n%s", err, out)
	}
	for _, claim := range []string{"ttl=62", " 0 lost", "Nothing was lost", "All gone"} {
		if !strings.Contains(string(out), claim) {
			t.Errorf("the demo does not show %q:\n%s", claim, out)
		}
	}
	assertDown(t, "demotest")
}

func TestInterruptedDemoLeavesNothing(t *testing.T) {
	weftlab := programs(t)
	cmd := exec.Command(weftlab, "demo", "--name", "demoint")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second) // in the middle of something
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 130 {
		t.Errorf("the interrupted demo: %v, want exit status 130", err)
	}
	assertDown(t, "demoint")
}

func assertDown(t *testing.T, name string) {
	t.Helper()
	left, err := filepath.Glob("/run/netns/" + name + "-*")
	if _, openErr := lab.Open(name); err != nil || openErr == nil || len(left) > 0 {
		t.Errorf("lab %s is still there: %v", name, left)
	}
}

func TestBenchMeasuresEachTestInEachMode(t *testing.T) {
	weftlab := programs(t)
	file := filepath.Join(t.TempDir(), "bench.csv")
	out, err := exec.Command(weftlab, "bench", "--name", "bt", "--rounds", "1", "--time", "400ms", "--warm", "100ms",
		"--modes", "host,plain,kernel,base", "--underlay", "wire", "--csv", file).CombinedOutput()
	if err != nil {
		t.Fatalf("weftlab bench: %v\n%s", err, out)
	}
	csv, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if rows := strings.Count(string(csv), "\n"); rows != 1+6*4 {
		t.Errorf("%d lines, want a head and a round of six tests in four modes:\n%s", rows, csv)
	}
	t.Logf("%s", out)
}

// Cards are veths here, of a machine of its own. They are in one lab after the other.
func TestBenchByCards(t *testing.T) {
	weftlab, machine := programs(t), netns.New(t)
	machine.Run(t, "ip link add card1 type veth peer name card2")
	file := filepath.Join(t.TempDir(), "bench.csv")
	out := machine.Run(t, weftlab+" bench --name bc --rounds 1 --time 200ms --warm 100ms --modes host,base,xdp --tests TCP_RR --cards card1,card2 --csv "+file)
	if !strings.Contains(out, "\ncards underlay, pod to pod, ") {
		t.Errorf("the table's title does not say by what:\n%s", out)
	}
	csv, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if rows := strings.Count(string(csv), "\n"); rows != 1+3 {
		t.Errorf("%d lines, want a head and a test in three modes:\n%s", rows, csv)
	}
	machine.Run(t, "ip link show card1", "ip link show card2")
}
