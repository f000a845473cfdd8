//go:build linux && e2e

// Package e2e_test uses weft as its users do, on real Kubernetes clusters
// (test/cluster).
package e2e_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/test/cluster"
	"github.com/weft-net/weft/test/lab"
	"github.com/weft-net/weft/test/netns"
)

// suite is a cluster with a pod on each node.
type suite struct {
	*cluster.Cluster
	pods []pod
	// services are those that underLoad asks.
	services []string
}

// pod is one of the DaemonSet of pods.yaml, on the node of the same index.
type pod struct {
	name, ip string
	node     *cluster.Node
}

// newSuite builds a cluster that lives as long as the test, with a pod on each node.
// CLUSTER in the environment names one that is up already, to try a test on.
func newSuite(t *testing.T, o cluster.Options) *suite {
	t.Helper()
	netns.RequireRoot(t)
	if name := os.Getenv("CLUSTER"); name != "" {
		c, err := cluster.Open(name)
		must(t, err)
		s := &suite{Cluster: c, services: []string{"any"}}
		s.startPods(t)
		return s
	}
	o.Log = t.Output()
	c, err := cluster.New(t.Context(), o)
	must(t, err)
	s := &suite{Cluster: c, services: []string{"any"}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Story(context.Background()))
		}
		if err := c.Close(); err != nil {
			t.Errorf("removing the cluster: %v", err)
		}
		mustLeaveNothing(t, c)
	})
	s.startPods(t)
	return s
}

// mustLeaveNothing looks for a closed cluster on the machine.
func mustLeaveNothing(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	traces, err := c.Traces()
	must(t, err)
	for kind, found := range traces {
		if len(found) > 0 {
			t.Errorf("%s are left of the cluster: %q", kind, found)
		}
	}
}

// startPods starts one on each node, and waits until they run and every node's
// kube-proxy knows the Services before them.
func (s *suite) startPods(t *testing.T) {
	t.Helper()
	must(t, s.Apply(t.Context(), podsManifest))
	s.kubectl(t, "rollout status daemonset/pods --timeout=300s")
	s.pods = nil
	for _, n := range s.Nodes {
		said := strings.Fields(s.kubectl(t, "get pods -l app=pods --field-selector spec.nodeName="+n.String()+
			" -o jsonpath={.items[*]['metadata.name','status.podIP']}"))
		if len(said) != 2 {
			t.Fatalf("pods of node %s: %q, want one, with its address", n, said)
		}
		s.pods = append(s.pods, pod{name: said[0], ip: said[1], node: n})
	}
	s.mustServe(t, "any")
	for _, n := range s.Nodes {
		mustAnswer(t, s.Lab.Underlay, net.JoinHostPort(n.IP.String(), localPort))
	}
}

// mustServe waits until every node's kube-proxy knows a pod behind a Service: up to some
// seconds it refuses connections after the pods are ready.
func (s *suite) mustServe(t *testing.T, service string) {
	t.Helper()
	address := net.JoinHostPort(s.clusterIP(t, service), "80")
	for _, n := range s.Nodes {
		mustAnswer(t, &n.Space, address)
	}
}

// mustAnswer waits until a server answers.
func mustAnswer(t *testing.T, from *lab.Space, server string) {
	t.Helper()
	lab.T(t).Eventually(slow, func() error {
		_, err := get(from, server, "who", nil)
		return err
	})
}

// kubectl runs kubectl, its arguments split at blanks.
func (s *suite) kubectl(t *testing.T, args string) string {
	t.Helper()
	out, err := s.Kubectl(t.Context(), strings.Fields(args)...)
	must(t, err)
	return out
}

// clusterIP is the address of a Service.
func (s *suite) clusterIP(t *testing.T, service string) string {
	t.Helper()
	return s.kubectl(t, "get service "+service+" -o jsonpath={.spec.clusterIP}")
}

// ask has a pod do something (see test/cluster/pod), and returns what came of it. The
// question comes from the pod's own node: host to pod.
func (s *suite) ask(p pod, what, to string, count int) (string, error) {
	return get(&p.node.Space, net.JoinHostPort(p.ip, "8080"), what, url.Values{"to": {to}, "count": {strconv.Itoa(count)}})
}

// get gets a page from somewhere.
func get(from *lab.Space, server, page string, values url.Values) (string, error) {
	client := from.HTTP()
	client.Timeout = 60 * time.Second
	answer, err := client.Get("http://" + server + "/" + page + "?" + values.Encode())
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = &answerError{status: answer.Status, said: string(text)}
	}
	return string(text), err
}

// answerError is an answer that is none.
type answerError struct{ status, said string }

func (e *answerError) Error() string { return e.status + ": " + e.said }

// localPort is the NodePort of the Service "local" of pods.yaml.
const localPort = "30081"

// slow is how long something may take that takes seconds on a machine with nothing else
// to do.
const slow = 3 * time.Minute

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
