//go:build linux && e2e

package e2e_test

import (
	_ "embed"
	"fmt"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/cluster"
	"github.com/weft-net/weft/test/lab"
)

// webManifest is a Deployment with its Service, whose pods end without haste.
//
//go:embed web.yaml
var webManifest string

// The cluster grows and shrinks: a Deployment under load, and a node.
func TestChanges(t *testing.T) {
	s := newSuite(t, cluster.Options{})
	t.Run("a deployment is scaled", s.scaling)
	t.Run("a node comes back under another address", s.replacing)
}

// scaling scales a Deployment up and down while all pods fetch from its Service.
func (s *suite) scaling(t *testing.T) {
	must(t, s.Apply(t.Context(), webManifest))
	s.kubectl(t, "rollout status deployment/web --timeout=300s")
	s.mustServe(t, "web")
	s.services = append(s.services, "web")
	defer func() { s.services = s.services[:len(s.services)-1] }()
	s.mustLoseNothing(t, "a deployment scaled from 2 to 6 and to 1", func() {
		for _, replicas := range []string{"6", "1"} {
			s.kubectl(t, "scale deployment/web --replicas="+replicas)
			s.kubectl(t, "rollout status deployment/web --timeout=300s")
			s.kubectl(t, "wait --for=jsonpath={.status.replicas}="+replicas+" deployment/web --timeout=300s")
			lab.T(t).Eventually(slow, func() error {
				if pods := strings.Fields(s.kubectl(t, "get pods -l app=web -o name")); fmt.Sprint(len(pods)) != replicas {
					return fmt.Errorf("%d pods are there, want %s", len(pods), replicas)
				}
				return nil
			})
		}
	})
}

// replacing drains a node, deletes it, and adds it with another address.
func (s *suite) replacing(t *testing.T) {
	n := s.Nodes[len(s.Nodes)-1]
	old := n.IP
	s.kubectl(t, "drain "+n.String()+" --ignore-daemonsets --force --delete-emptydir-data --timeout=300s")
	s.kubectl(t, "delete node "+n.String())
	must(t, n.Reinstall(t.Context(), len(s.Nodes)+5))
	if n.IP == old {
		t.Fatalf("node %s has its address still, %s", n, old)
	}
	lab.T(t).Eventually(slow, func() error {
		_, err := s.Kubectl(t.Context(), "wait", "--for=condition=Ready", "node/"+n.String(), "--timeout=10s")
		return err
	})
	must(t, s.WaitForNetwork(t.Context()))
	s.startPods(t)
	s.pairs(t)
	s.service(t)
	s.express(t)
}
