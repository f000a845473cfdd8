//go:build linux && e2e

package e2e_test

import (
	"encoding/json"
	"net"
	"net/url"
	"slices"
	"testing"
	"time"

	"github.com/weft-net/weft/test/cluster/load"
)

// underLoad does something while every pod has long-lived connections to every other,
// fetches pages from it and from the Services, and sends it datagrams that must
// come back. It prints and returns what became of them.
func (s *suite) underLoad(t *testing.T, what string, do func()) load.Report {
	t.Helper()
	var services []string
	for _, name := range s.services {
		services = append(services, net.JoinHostPort(s.clusterIP(t, name), "80"))
	}
	for _, from := range s.pods {
		targets := url.Values{"http": slices.Clone(services)}
		for _, to := range s.pods {
			if to != from {
				targets.Add("stream", net.JoinHostPort(to.ip, "8082"))
				targets.Add("http", net.JoinHostPort(to.ip, "8080"))
				targets.Add("udp", net.JoinHostPort(to.ip, "8081"))
			}
		}
		_, err := get(&from.node.Space, net.JoinHostPort(from.ip, "8080"), "start", targets)
		must(t, err)
	}
	began := time.Now()
	time.Sleep(3 * time.Second) // after two, conntrack calls a UDP flow assured, which ends express for a moment
	do()
	time.Sleep(5 * time.Second) // who has waited for an answer says so
	took := time.Since(began)

	var all load.Report
	for _, from := range s.pods {
		text, err := get(&from.node.Space, net.JoinHostPort(from.ip, "8080"), "stop", nil)
		must(t, err)
		var report load.Report
		must(t, json.Unmarshal([]byte(text), &report))
		all.Add(report)
	}
	t.Logf("%s, in %s:\n%s", what, took.Round(time.Second), all)
	for _, count := range []load.Count{all.Stream, all.HTTP, all.UDP} {
		if count.Asked < 100 {
			t.Errorf("%s: only %d requests were made", what, count.Asked)
		}
		for _, said := range count.First {
			t.Logf("  %s", said)
		}
	}
	return all
}

// mustLoseNothing is underLoad in which no request may fail.
func (s *suite) mustLoseNothing(t *testing.T, what string, do func()) {
	t.Helper()
	if r := s.underLoad(t, what, do); r.Failed() > 0 {
		t.Errorf("%s: %d requests failed, want none", what, r.Failed())
	}
}
