//go:build linux && e2e

package e2e_test

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"strings"
	"testing"

	"github.com/weft-net/weft/deploy"
	"github.com/weft-net/weft/test/cluster"
	"github.com/weft-net/weft/test/lab"
)

// A cluster of stock flannel becomes one of weft, and then one of flannel again, by
// applying one's manifest after the other's, while connections live and requests run.
// What flannel's own DaemonSet costs when it is restarted is measured first: a change
// may cost no more, and no connection may be reset.
func TestMigration(t *testing.T) {
	flannelManifest, err := cluster.FlannelManifest()
	must(t, err)
	s := newSuite(t, cluster.Options{Manifest: flannelManifest, Flannel: true})
	before := s.identities(t)
	s.check(t)

	flannel := s.underLoad(t, "flannel's own DaemonSet is restarted", func() { s.restart(t) })
	changes := []struct {
		what string
		do   func()
		with string
	}{
		{"flannel to weft", func() { s.change(t, deploy.Manifest) }, "weft"},
		{"weft's DaemonSet is restarted", func() { s.restart(t) }, "weft"},
		{"weft to flannel", func() { s.change(t, flannelManifest) }, "flanneld"},
	}
	for _, c := range changes {
		r := s.underLoad(t, c.what, c.do)
		if r.Stream.Resets > 0 {
			t.Errorf("%s: %d connections were reset, want none", c.what, r.Stream.Resets)
		}
		if r.Failed() > flannel.Failed() {
			t.Errorf("%s: %d requests failed, more than the %d when flannel was restarted", c.what, r.Failed(), flannel.Failed())
		}
		s.mustBeSame(t, c.what, before)
		s.mustRun(t, c.with)
		if c.with == "weft" {
			s.express(t)
		}
	}
	s.remove(t)
	s.pairs(t)
}

// check has `weft migrate check` look at the nodes, which must be as weft wants them.
func (s *suite) check(t *testing.T) {
	t.Helper()
	s.onEveryNode(t, "weft-migrate-check", "check", deploy.MigrateCheck, func(said string) {
		t.Logf("weft migrate check:\n%s", said)
		for _, found := range []string{"they are taken over", "the kernel takes the programs", "nothing is in its way"} {
			if n := strings.Count(said, found); n != len(s.Nodes) {
				t.Errorf("%d nodes say %q, want %d", n, found, len(s.Nodes))
			}
		}
	})
}

// remove has `weft remove` run on the nodes, and looks for what it has left.
func (s *suite) remove(t *testing.T) {
	t.Helper()
	s.onEveryNode(t, "weft-remove", "remove", deploy.Remove, func(said string) {
		if n := strings.Count(said, "removed "); n < len(s.Nodes) {
			t.Errorf("weft remove has said:\n%s", said)
		}
	})
	for _, n := range s.Nodes {
		if _, err := os.Stat(n.Path("/sys/fs/bpf/weft")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("node %s still has the pins of weft: %v", n, err)
		}
		if out, err := n.Output(t.Context(), "nft", "list", "tables"); err != nil || strings.Contains(out, "weft") {
			t.Errorf("node %s has the tables %s, %v", n, out, err)
		}
	}
}

// onEveryNode applies a DaemonSet one of whose containers runs once on every node, waits
// until it has, and deletes it when its words were heard.
func (s *suite) onEveryNode(t *testing.T, name, container, manifest string, hear func(said string)) {
	t.Helper()
	must(t, s.Apply(t.Context(), manifest))
	s.kubectl(t, "-n kube-flannel rollout status daemonset/"+name+" --timeout=300s")
	hear(s.kubectl(t, "-n kube-flannel logs -l app="+name+" -c "+container+" --tail=-1"))
	s.kubectl(t, "-n kube-flannel delete daemonset "+name)
}

// change applies the manifest of a network, and waits until all nodes have it.
func (s *suite) change(t *testing.T, manifest string) {
	t.Helper()
	must(t, s.Apply(t.Context(), manifest))
	must(t, s.WaitForNetwork(t.Context()))
}

// mustRun wants each node to have one process of this name in a container.
func (s *suite) mustRun(t *testing.T, program string) {
	t.Helper()
	for _, n := range s.Nodes {
		pids, err := n.Processes(program)
		must(t, err)
		if len(pids) != 1 {
			t.Errorf("node %s runs %d times %s, want once", n, len(pids), program)
		}
	}
}

// restart restarts the network's DaemonSet as kubectl does, node by node.
func (s *suite) restart(t *testing.T) {
	t.Helper()
	s.kubectl(t, "-n kube-flannel rollout restart daemonset/kube-flannel-ds")
	must(t, s.WaitForNetwork(t.Context()))
}

// identities are what a node's network is known by, and what its pods are.
func (s *suite) identities(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, p := range s.pods {
		name := p.node.String()
		all["node "+name] = s.kubectl(t, "get node "+name+` -o jsonpath={.spec.podCIDR}{.metadata.annotations.flannel\.alpha\.coreos\.com/backend-data}{.metadata.annotations.flannel\.alpha\.coreos\.com/public-ip}`)
		all["MAC of "+name] = strings.Fields(lab.T(t).Run(p.node, "ip -br link show flannel.1"))[2]
		all["pod on "+name] = s.kubectl(t, "get pod "+p.name+" -o jsonpath={.status.podIP}{.status.containerStatuses[0].restartCount}")
	}
	return all
}

// mustBeSame wants identities to be what they were.
func (s *suite) mustBeSame(t *testing.T, when string, before map[string]string) {
	t.Helper()
	if now := s.identities(t); !maps.Equal(now, before) {
		t.Errorf("%s: nodes and pods are %v, want %v as before", when, now, before)
	}
}
