//go:build linux && e2e

package e2e_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/weft-net/weft/test/cluster"
	"github.com/weft-net/weft/test/lab"
)

// Weft is upgraded to a build with other programs by a rolling update of its DaemonSet,
// and back, and every agent is killed: no request fails all the while.
func TestUpgrade(t *testing.T) {
	s := newSuite(t, cluster.Options{})
	other, err := lab.BuildOtherWeft(s.Lab.Directory())
	must(t, err)
	const otherImage = "weft.test/weft:other"
	image, err := cluster.WeftImageOf(s.Lab.Directory(), other, otherImage)
	must(t, err)
	must(t, s.Import(t.Context(), image))

	for _, to := range []string{otherImage, cluster.WeftImage} {
		before := s.programs(t)
		s.mustLoseNothing(t, "upgrade to "+to, func() {
			s.kubectl(t, "-n kube-flannel set image daemonset/kube-flannel-ds kube-flannel="+to)
			must(t, s.WaitForNetwork(t.Context()))
		})
		for node, tags := range s.programs(t) {
			if tags == before[node] {
				t.Errorf("node %s still has the programs of the other build: %s", node, tags)
			}
		}
	}
	s.mustLoseNothing(t, "kill -9 of every agent", func() {
		for _, p := range s.pods {
			s.kill(t, p.node)
		}
	})
	s.express(t)
}

// kill kills a node's agent, and waits until its container has been started again and
// is ready.
func (s *suite) kill(t *testing.T, n *cluster.Node) {
	t.Helper()
	agent := "-n kube-flannel get pods -l app=flannel --field-selector spec.nodeName=" + n.String() + " -o jsonpath="
	restarts := func() string {
		return s.kubectl(t, agent+"{.items[0].status.containerStatuses[0]['restartCount','ready']}")
	}
	before := restarts()
	agents, err := n.Processes("weft")
	must(t, err)
	if len(agents) != 1 {
		t.Fatalf("node %s has %d agents, want one", n, len(agents))
	}
	must(t, syscall.Kill(agents[0], syscall.SIGKILL))
	lab.T(t).Eventually(slow, func() error {
		if now := restarts(); now == before || !strings.HasSuffix(now, "true") {
			return fmt.Errorf("node %s: restarts and readiness %q, and %q before", n, now, before)
		}
		return nil
	})
}

// programs are the tags of those that nodes have attached: a hash of their instructions.
func (s *suite) programs(t *testing.T) map[string]string {
	t.Helper()
	tags := map[string]string{}
	for _, n := range s.Nodes {
		pins, err := filepath.Glob(n.Path("/sys/fs/bpf/weft/links/*"))
		must(t, err)
		for _, pin := range pins {
			tags[n.String()] += filepath.Base(pin) + " " + mustTag(t, pin) + "\n"
		}
		if tags[n.String()] == "" {
			t.Fatalf("node %s has no programs", n)
		}
	}
	return tags
}

// mustTag is the tag of the program in a pinned link.
func mustTag(t *testing.T, pin string) string {
	t.Helper()
	l, err := link.LoadPinnedLink(pin, nil)
	must(t, err)
	defer l.Close()
	attached, err := l.Info()
	must(t, err)
	program, err := ebpf.NewProgramFromID(attached.Program)
	must(t, err)
	defer program.Close()
	info, err := program.Info()
	must(t, err)
	return info.Tag
}
