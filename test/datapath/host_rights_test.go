//go:build linux

package datapath_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// An agent that may not load programs, or has no place to pin them, runs the
// kernel path, and says everywhere what is missing and what that costs.
func TestAgentWithoutWhatProgramsNeed(t *testing.T) {
	for _, c := range []struct {
		name    string
		wrapper string // runs "$@"
		missing string
	}{
		{
			"the capabilities of flannel's manifest",
			withoutBPF,
			"BPF",
		},
		{
			"no PERFMON",
			`exec capsh --drop=cap_perfmon,cap_sys_admin -- -c 'exec "$0" "$@"' "$@"`,
			"PERFMON",
		},
		{
			"a container without the host's bpffs",
			`KUBERNETES_SERVICE_HOST=10.96.0.1 exec unshare -m sh -c 'umount /sys/fs/bpf; exec "$0" "$@"' "$@"`,
			"bpffs",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			lt, l := newLab(t, lab.Options{Kinds: []lab.Kind{lab.Bare, lab.Weft}})
			n1 := l.Node(1)
			if err := n1.StartAgent(t.Context(), mustWrap(t, c.wrapper)); err != nil {
				t.Fatal(err)
			}
			lt.MustLoseNothing(l.Pod(1, 1), l.Pod(2, 1), lab.ProbeOptions{Interval: 10 * time.Millisecond}, func() { time.Sleep(300 * time.Millisecond) })
			mustSay := func(where, text string) {
				t.Helper()
				for _, want := range []string{c.missing, "kernel"} {
					if !strings.Contains(text, want) {
						t.Errorf("%s does not say %q:\n%s", where, want, text)
					}
				}
			}
			mustSay("the log", lines(n1.AgentLog(), "reason="))
			mustSay("weft status", lt.Run(n1, weft, "status"))
			metrics, err := n1.Metrics(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			mustSay("the metric", lines(metrics, "weft_datapath_info{"))
		})
	}
}

// withoutBPF runs "$@" with what flannel's manifest grants, NET_ADMIN among it.
const withoutBPF = `exec capsh --drop=cap_bpf,cap_perfmon,cap_sys_admin,cap_sys_module,cap_sys_ptrace -- -c 'exec "$0" "$@"' "$@"`

// mustWrap makes a program that runs weft in another way: script runs "$@".
func mustWrap(tb testing.TB, script string) (path string) {
	tb.Helper()
	path = filepath.Join(tb.TempDir(), "weft")
	text := fmt.Sprintf("#!/bin/sh\nset -- %s \"$@\"\n%s\n", weft, script)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		tb.Fatal(err)
	}
	return path
}

// An agent comes back with fewer rights than the one before it, as after a
// rollout of flannel's own manifest. What the programs of the former agent know
// is then out of date, and they must not stand in the way of a new peer.
func TestAgentComesBackWithoutItsRights(t *testing.T) {
	for _, check := range []string{"observe", "enforce"} {
		t.Run(check, func(t *testing.T) {
			t.Parallel()
			lt, l := newLab(t, lab.Options{Nodes: 3, Kinds: []lab.Kind{lab.Weft, lab.Kernel}, AgentFlags: []string{"--source-check", check}})
			n1, n2, n3 := l.Node(1), l.Node(2), l.Node(3)
			mustUseBase(t, l.Pod(1, 1), l.Pod(2, 1))
			if _, err := n1.WriteConfig(n2); err != nil {
				t.Fatal(err)
			}
			lt.Eventually(5*time.Second, func() error {
				if peers := mustPeers(t, n1); len(peers) != 1 {
					return fmt.Errorf("%s has %d peers, want %s alone", n1, len(peers), n2)
				}
				return nil
			})
			if err := n1.StopAgent(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := n1.StartAgent(t.Context(), mustWrap(t, withoutBPF), "--source-check", check); err != nil {
				t.Fatal(err)
			}
			for _, p := range []*lab.Pod{l.Pod(2, 1), l.Pod(3, 1)} {
				if err := pings(t, l.Pod(1, 1), p.IP); err != nil {
					t.Errorf("%s: %v", p.Node, err)
				}
			}
			if passed, dropped := mustReason(t, n1, "source_unknown_peer"); dropped > 0 {
				t.Errorf("packets of %s were passed %d times and dropped %d times", n3, passed, dropped)
			}
			if says, is := lines(n1.AgentLog(), "the kernel path carries everything") != "", baseCarries(t, l.Pod(1, 1), l.Pod(2, 1)); says && is {
				t.Error("the agent says that the kernel path carries everything, but the base path carries packets")
			}
		})
	}
}

// baseCarries tells whether pings between two pods ride the base path.
func baseCarries(tb testing.TB, from, to *lab.Pod) bool {
	tb.Helper()
	report := mustStatus(tb, from.Node)
	return report.Mode == "ebpf" && useBase(tb, from, to) == nil
}

// lines are those that contain a text.
func lines(text, with string) string {
	var out []string
	for _, line := range strings.Split(text, "\n") {
		if strings.Contains(line, with) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}
