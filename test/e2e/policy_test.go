//go:build linux && e2e

package e2e_test

import (
	_ "embed"
	"errors"
	"fmt"
	"net"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

//go:embed policies.yaml
var policiesManifest string

// policies has kube-network-policies enforce NetworkPolicy, and wants what is denied to
// be denied and what is allowed to take express.
func (s *suite) policies(t *testing.T) {
	must(t, s.StartNetworkPolicies(t.Context()))
	guarded, friend, other := s.pods[0], s.pods[1], s.pods[2]
	s.kubectl(t, "label pod --overwrite "+guarded.name+" role=guarded")
	s.kubectl(t, "label pod --overwrite "+friend.name+" role=friend")
	s.mustTakeExpress(t, friend, guarded)

	must(t, s.Apply(t.Context(), policiesManifest))
	service := s.clusterIP(t, "guarded")
	s.mustBeDenied(t, other, guarded.ip, "8080", "8081")
	s.mustBeDenied(t, other, service, "80", "81")
	s.mustBeAllowed(t, friend, guarded.ip, "8080", "8081")
	s.mustBeAllowed(t, friend, service, "80", "81")
	s.mustBeAllowed(t, guarded, other.ip, "8080", "8081")
	s.mustTakeExpress(t, friend, guarded)
	s.mustTakeExpress(t, guarded, other)

	// Who was a stranger becomes a friend, and no friend any more.
	s.kubectl(t, "label pod --overwrite "+other.name+" role=friend")
	s.mustBeAllowed(t, other, guarded.ip, "8080", "8081")
	s.mustTakeExpress(t, other, guarded)
	s.kubectl(t, "label pod --overwrite "+other.name+" role=muted")
	s.mustBeDenied(t, other, guarded.ip, "8080", "8081")
	s.mustBeDenied(t, other, friend.ip, "8080", "8081")
	s.mustBeAllowed(t, friend, other.ip, "8080", "8081")
	s.mustTakeExpress(t, friend, other)
}

// mustBeAllowed wants a pod's new connections and datagrams to be answered, from when
// all nodes have heard of it.
func (s *suite) mustBeAllowed(t *testing.T, from pod, to, tcp, udp string) {
	t.Helper()
	lab.T(t).Eventually(slow, func() error { return s.reach(from, to, tcp, udp) })
	for range 5 {
		if err := s.reach(from, to, tcp, udp); err != nil {
			t.Errorf("%s to %s: %v, after it was allowed", from.name, to, err)
		}
	}
}

// mustBeDenied wants neither a new connection nor a datagram of a pod's to be answered,
// from when all nodes have heard of it.
func (s *suite) mustBeDenied(t *testing.T, from pod, to, tcp, udp string) {
	t.Helper()
	lab.T(t).Eventually(slow, func() error {
		if s.reachTCP(from, to, tcp) == nil || s.reachUDP(from, to, udp) == nil {
			return fmt.Errorf("%s reaches %s, which it must not", from.name, to)
		}
		return nil
	})
	for range 3 {
		for _, try := range []error{s.reachTCP(from, to, tcp), s.reachUDP(from, to, udp)} {
			if answer := (*answerError)(nil); !errors.As(try, &answer) {
				t.Errorf("%s to %s: %v, want the pod to say that it was in vain", from.name, to, try)
			}
		}
	}
}

// reach is nil if a new connection and a datagram are both answered.
func (s *suite) reach(from pod, to, tcp, udp string) error {
	return errors.Join(s.reachTCP(from, to, tcp), s.reachUDP(from, to, udp))
}

func (s *suite) reachTCP(from pod, to, port string) error {
	_, err := s.ask(from, "fetch", net.JoinHostPort(to, port), 0)
	return err
}

func (s *suite) reachUDP(from pod, to, port string) error {
	_, err := s.ask(from, "udp", net.JoinHostPort(to, port), 64)
	return err
}
