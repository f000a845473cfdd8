//go:build linux && e2e

package e2e_test

import (
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// metricsPort is the agents'.
const metricsPort = "9273"

// prometheus has Debian's Prometheus scrape all agents while iperf3 runs between two
// pods, and compares what it has with what iperf3 says.
func (s *suite) prometheus(t *testing.T) {
	p := s.startPrometheus(t)
	lab.T(t).Eventually(slow, func() error {
		if up := p.value(t, "sum(up)"); int(up) != len(s.Nodes) {
			return fmt.Errorf("Prometheus reaches %v agents of %d", up, len(s.Nodes))
		}
		return nil
	})
	for _, n := range s.Nodes {
		text, err := get(s.Lab.Underlay, net.JoinHostPort(n.IP.String(), metricsPort), "metrics", nil)
		must(t, err)
		check := exec.CommandContext(t.Context(), "promtool", "check", "metrics")
		check.Stdin = strings.NewReader(text)
		if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics of node %s: %v\n%s", n, err, out)
		}
	}

	from, to := s.pods[0], s.pods[1]
	sent := fmt.Sprintf(`sum(weft_peer_transmit_bytes_total{instance="%s:%s",peer="%s"})`, from.node.IP, metricsPort, to.node.IP)
	got := fmt.Sprintf(`sum(weft_peer_receive_bytes_total{instance="%s:%s",peer="%s"})`, to.node.IP, metricsPort, from.node.IP)
	var sentBefore, gotBefore float64
	lab.T(t).Eventually(20*time.Second, func() error {
		if sentBefore, gotBefore = p.value(t, sent), p.value(t, got); sentBefore == 0 || gotBefore == 0 {
			return fmt.Errorf("%s is %v and %s is %v, although these nodes have talked", sent, sentBefore, got, gotBefore)
		}
		return nil
	})
	payload, seconds := s.iperf3(t, from, to)
	// The median, as iperf3 may have ended some seconds ago.
	rate := p.value(t, "quantile_over_time(0.5, sum(rate("+strings.TrimPrefix(strings.TrimSuffix(sent, ")"), "sum(")+"[5s]))[20s:1s])")
	lab.T(t).Eventually(20*time.Second, func() error { // until the next scrapes
		sentNow, gotNow := p.value(t, sent)-sentBefore, p.value(t, got)-gotBefore
		for what, bytes := range map[string]float64{"sent": sentNow, "received": gotNow} {
			if times := bytes / payload; times < 1 || times > 1.1 {
				return fmt.Errorf("by Prometheus %.0f bytes were %s, %.3f times the %.0f that iperf3 has carried; want 1 to 1.1 times, for the headers", bytes, what, times, payload)
			}
		}
		t.Logf("iperf3 carried %.0f bytes; by Prometheus %.3f times as many were sent and %.3f times received", payload, sentNow/payload, gotNow/payload)
		return nil
	})
	t.Logf("iperf3: %.0f bytes/s; rate() by Prometheus: %.0f", payload/seconds, rate)
	if times := rate / (payload / seconds); times < 0.6 || times > 1.5 {
		t.Errorf("rate() is %.2f times what iperf3 says", times)
	}
}

// iperf3 runs it between two pods, and returns the bytes that have arrived and the
// seconds that it took.
func (s *suite) iperf3(t *testing.T, from, to pod) (payload, seconds float64) {
	t.Helper()
	server, err := to.node.EnterPod(t.Context(), to.ip, "iperf3", "--server", "--one-off", "--bind", to.ip)
	must(t, err)
	listening := exec.CommandContext(t.Context(), server[0], server[1:]...)
	must(t, listening.Start())
	defer func() { _ = listening.Wait() }() // it has served one
	client, err := from.node.EnterPod(t.Context(), from.ip, "iperf3", "--client", to.ip, "--json", "--time", "20", "--bitrate", "20M")
	must(t, err)
	var out []byte
	lab.T(t).Eventually(10*time.Second, func() (err error) { // until it listens
		out, err = exec.CommandContext(t.Context(), client[0], client[1:]...).Output()
		return err
	})
	var said struct {
		End struct {
			Sum struct {
				Bytes, Seconds float64
			} `json:"sum_received"`
		} `json:"end"`
	}
	must(t, json.Unmarshal(out, &said))
	if said.End.Sum.Bytes == 0 {
		t.Fatalf("iperf3 has carried nothing:\n%s", out)
	}
	return said.End.Sum.Bytes, said.End.Sum.Seconds
}

// prometheusServer is one that runs in the underlay.
type prometheusServer struct{ s *suite }

const prometheusAddress = "127.0.0.1:9090"

// startPrometheus starts it, told of the agents by a file.
func (s *suite) startPrometheus(t *testing.T) prometheusServer {
	t.Helper()
	dir := filepath.Join(s.Lab.Directory(), "prometheus")
	must(t, os.MkdirAll(dir, 0o755))
	var targets []string
	for _, n := range s.Nodes {
		targets = append(targets, net.JoinHostPort(n.IP.String(), metricsPort))
	}
	list, err := json.Marshal([]map[string]any{{"targets": targets}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "agents.json"), list, 0o644))
	config := filepath.Join(dir, "prometheus.yml")
	must(t, os.WriteFile(config, []byte(`global: {scrape_interval: 1s}
scrape_configs:
- job_name: weft
  file_sd_configs: [{files: [agents.json]}]
`), 0o644))
	process, err := s.Lab.Underlay.Start("prometheus", "--config.file", config, "--storage.tsdb.path", filepath.Join(dir, "data"), "--web.listen-address", prometheusAddress)
	must(t, err)
	t.Cleanup(func() {
		if err := process.Stop(syscall.SIGTERM); err != nil {
			t.Errorf("stopping Prometheus: %v", err)
		}
	})
	return prometheusServer{s}
}

// value asks for a number. What is not there, as long as Prometheus starts, is 0.
func (p prometheusServer) value(t *testing.T, query string) float64 {
	t.Helper()
	text, err := get(p.s.Lab.Underlay, prometheusAddress, "api/v1/query", url.Values{"query": {query}})
	if err != nil {
		return 0
	}
	var said struct {
		Data struct {
			Result []struct {
				Value [2]any
			}
		}
	}
	must(t, json.Unmarshal([]byte(text), &said))
	if len(said.Data.Result) == 0 {
		return 0
	}
	v, err := strconv.ParseFloat(fmt.Sprint(said.Data.Result[0].Value[1]), 64)
	must(t, err)
	return v
}
