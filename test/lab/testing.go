//go:build linux

package lab

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/test/netns"
)

// Test runs labs for one test: what fails there fails the test and shows what
// was printed, and all is taken away when the test ends.
//
//	t := lab.T(tb)
//	l := t.New(lab.Options{Kinds: []lab.Kind{lab.Kernel}})
//	t.Run(l.Pod(1, 1), "ping -c 1 "+l.Pod(2, 1).IP.String())
type Test struct {
	testing.TB
}

// Runner is a Space, a Node or a Pod.
type Runner interface {
	String() string
	Output(ctx context.Context, command ...string) (string, error)
	Start(command ...string) (*Process, error)
}

// T makes a Test. Without root the test is skipped.
func T(tb testing.TB) Test {
	tb.Helper()
	netns.RequireRoot(tb)
	return Test{tb}
}

// New builds a lab that lives as long as the test. When the test has failed,
// the logs of the nodes' agents are shown before they go.
func (t Test) New(opts Options) *Lab {
	t.Helper()
	if opts.Binary != "" {
		if _, err := os.Stat(opts.Binary); err != nil {
			t.Fatalf("the weft program is missing (make build): %v", err)
		}
	}
	l, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		t.Helper()
		if t.Failed() {
			t.showAgents(l)
		}
		if err := l.Close(); err != nil {
			t.Errorf("removing lab %s: %v", l.Name(), err)
		}
	})
	return l
}

// showAgents logs the end of each agent's log.
func (t Test) showAgents(l *Lab) {
	t.Helper()
	for _, n := range l.Nodes {
		if log := n.AgentLog(); log != "" {
			lines := strings.Split(log, "\n")
			t.Logf("agent of %s:\n%s", n, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
}

// Run runs a command and returns what it printed.
func (t Test) Run(where Runner, command ...string) string {
	t.Helper()
	out, err := where.Output(t.Context(), command...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Start starts a command in the background.
func (t Test) Start(where Runner, command ...string) *Process {
	t.Helper()
	p, err := where.Start(command...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Probe measures loss between two pods while f runs.
func (t Test) Probe(from, to *Pod, o ProbeOptions, f func()) ProbeResult {
	t.Helper()
	p, err := StartProbe(from, to, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = p.Stop() }() // if f ends the test
	f()
	result, err := p.Stop()
	if err != nil {
		t.Fatalf("probe %s to %s: %v", from, to, err)
	}
	return result
}

// MustLoseNothing is Probe that fails the test when a packet was lost.
func (t Test) MustLoseNothing(from, to *Pod, o ProbeOptions, f func()) {
	t.Helper()
	if r := t.Probe(from, to, o, f); r.Lost > 0 || r.Sent == 0 {
		t.Errorf("probe %s to %s: %s", from, to, r)
	}
}

// Patient is how long something may take that takes so long on a machine with
// nothing else to do: three times as long, and in an emulated machine, which sets
// WEFT_PATIENCE, as many times as that says.
func Patient(d time.Duration) time.Duration {
	times, err := strconv.Atoi(os.Getenv("WEFT_PATIENCE"))
	if err != nil || times < 3 {
		times = 3
	}
	return time.Duration(times) * d
}

// Eventually waits until f returns nil, and fails the test after a while: what is
// given is for a machine with nothing else to do.
func (t Test) Eventually(within time.Duration, f func() error) {
	t.Helper()
	within = Patient(within)
	for deadline := time.Now().Add(within); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", within, err)
		}
	}
}
