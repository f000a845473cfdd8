//go:build linux && e2e

package e2e_test

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// ownNode lends itself the identity of each node's agent, and patches nodes with it.
func (s *suite) ownNode(t *testing.T) {
	for _, at := range s.Nodes {
		said := strings.Fields(s.kubectl(t, "-n kube-flannel get pods -l app=flannel --field-selector spec.nodeName="+at.String()+
			" -o jsonpath={.items[*]['metadata.name','metadata.uid']}"))
		if len(said) != 2 {
			t.Fatalf("agents of node %s: %q, want one", at, said)
		}
		token := strings.TrimSpace(s.kubectl(t, "-n kube-flannel create token flannel --bound-object-kind Pod --bound-object-name "+said[0]+" --bound-object-uid "+said[1]))
		for _, n := range s.Nodes {
			err := s.Lab.Kube.AskAs(t.Context(), token, http.MethodPatch, "/api/v1/nodes/"+n.String()+"/status",
				lab.Object{"metadata": lab.Object{"annotations": lab.Object{"example.com/patched-by": at.String()}}}, nil)
			switch {
			case n == at && err != nil:
				t.Errorf("the agent of %s and its own node: %v", at, err)
			case n != at && err == nil:
				t.Errorf("the agent of %s may patch node %s", at, n)
			case n != at && !strings.Contains(err.Error(), "an agent may patch the node that its pod runs on"):
				t.Errorf("the agent of %s and node %s: %v", at, n, err)
			}
		}
	}
}

// overlays has the API server look at what kustomize makes of the base.
func (s *suite) overlays(t *testing.T) {
	root, err := lab.ModuleRoot()
	must(t, err)
	all, err := filepath.Glob(filepath.Join(root, "deploy/kustomize/overlays/*"))
	must(t, err)
	for _, dir := range append(all, filepath.Join(root, "deploy/kustomize/base")) {
		s.mustBeTaken(t, 1, "-k", dir)
	}
}

// mustBeTaken has the API server look at manifests with so many DaemonSets.
func (s *suite) mustBeTaken(t *testing.T, daemonSets int, option, path string) {
	t.Helper()
	out := s.kubectl(t, "apply --dry-run=server --validate=strict "+option+" "+path)
	if strings.Count(out, "(server dry run)") != strings.Count(out, "\n") || strings.Count(out, "daemonset.apps/kube-flannel-ds") != daemonSets {
		t.Errorf("%s, want %d DaemonSets:\n%s", path, daemonSets, out)
	}
}
