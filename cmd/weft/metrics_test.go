package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"

	"github.com/weft-net/weft/dataplane"
)

// scraped is a registry with everything of weft's own, and what it reads.
type scraped struct {
	*prometheus.Registry
	report  dataplane.Report
	err     error
	metrics *loopMetrics
	reads   int
	*collector
}

func newScraped(maxPeers int) *scraped {
	s := &scraped{Registry: prometheus.NewRegistry(), report: agentReport()}
	s.metrics = newLoopMetrics(s.Registry)
	s.collector = newCollector(
		slog.New(slog.DiscardHandler),
		s,
		func() names {
			return names{netip.MustParseAddr("192.0.2.2"): "node-b", netip.MustParseAddr("192.0.2.3"): "node-c"}
		},
		maxPeers,
	)
	s.MustRegister(s.collector)
	return s
}

// Report implements reporter.
func (s *scraped) Report(context.Context) (dataplane.Report, error) {
	s.reads++
	return s.report, s.err
}

// PeerCounters implements reporter.
func (s *scraped) PeerCounters(ctx context.Context) (dataplane.Report, error) {
	all, err := s.Report(ctx)
	return dataplane.Report{Mode: all.Mode, Peers: all.Peers}, err
}

// text is a whole scrape.
func (s *scraped) text(tb testing.TB) string {
	tb.Helper()
	families, err := s.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	var b bytes.Buffer
	encoder := expfmt.NewEncoder(&b, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := encoder.Encode(f); err != nil {
			tb.Fatal(err)
		}
	}
	return b.String()
}

func TestWholeScrape(t *testing.T) {
	s := newScraped(500)
	s.Start()
	s.report.Peers[0].Counters[0].TxPackets += 5 // since the agent started
	s.metrics.Synced(outcome{at: noon, duration: 30 * time.Millisecond})
	s.metrics.Synced(outcome{at: noon, duration: time.Second, err: errors.New("x")})
	s.metrics.Health(nil)
	golden(t, "metrics.txt", s.text(t))
}

func TestScrapeWithoutPrograms(t *testing.T) {
	s := newScraped(500)
	s.report = kernelReport()
	got := s.text(t)
	golden(t, "metrics-kernel.txt", got)
	for _, absent := range []string{"weft_peer_transmit", "weft_peer_receive", "weft_transmit", "weft_receive"} {
		if strings.Contains(got, absent) {
			t.Errorf("%s is there although nothing counts", absent)
		}
	}
}

func TestScrapeAboveTheLimitOfPeers(t *testing.T) {
	s := newScraped(1)
	s.Start()
	s.report.Peers[0].Counters[0].TxPackets += 5
	got := s.text(t)
	for _, want := range []string{"weft_peer_series_suppressed 1\n", "weft_peers 2\n", `weft_transmit_packets_total{path="express"} 5` + "\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in:\n%s", want, got)
		}
	}
	if strings.Contains(got, "weft_peer_info") || strings.Contains(got, "weft_peer_transmit") {
		t.Error("series of single peers are there")
	}
}

func TestScrapeOfAnUnreadableDataplane(t *testing.T) {
	s := newScraped(500)
	s.err = errors.New("permission denied")
	s.text(t)
	got := s.text(t)
	if !strings.Contains(got, "weft_scrape_failures_total 2\n") || strings.Contains(got, "weft_peers ") {
		t.Error(got)
	}
	s.err = nil
	if got := s.text(t); !strings.Contains(got, "weft_peers 2\n") || !strings.Contains(got, "weft_scrape_failures_total 2\n") {
		t.Error(got)
	}
}

func TestScrapeAfterTheDataplaneIsClosed(t *testing.T) {
	s := newScraped(500)
	s.Stop()
	if got := s.text(t); !strings.Contains(got, "weft_scrape_failures_total 1\n") || s.reads != 0 {
		t.Errorf("the dataplane was read %d times\n%s", s.reads, got)
	}
}

func TestMetricsLint(t *testing.T) {
	registry := newRegistry(thisBuild())
	s := newScraped(500)
	for _, g := range []prometheus.Gatherer{registry, s.Registry} {
		problems, err := testutil.GatherAndLint(g)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

func TestExpressInAScrape(t *testing.T) {
	for name, test := range map[string]struct {
		set  func(*dataplane.Report)
		want string
	}{
		"On":          {func(*dataplane.Report) {}, `{reason="",state="on"}`},
		"SwitchedOff": {func(r *dataplane.Report) { r.Express.On, r.Switches = false, baseOnly }, `{reason="switched off (weft accel on express)",state="off"}`},
		"Held": {
			func(r *dataplane.Report) { r.Express.On, r.Express.Reasons = false, []string{"one thing", "another"} },
			`{reason="one thing; another",state="off"}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScraped(500)
			test.set(&s.report)
			got := s.text(t)
			for _, want := range []string{
				"weft_express_info" + test.want + " 1\n",
				"weft_endpoints 3\n",
				"weft_endpoints_left_alone 2\n",
				`weft_epoch_moves_total{change="nftables"} 3` + "\n",
				`weft_epoch_moves_total{change="settled"} 4` + "\n",
			} {
				if !strings.Contains(got, "\n"+want) {
					t.Errorf("%s is missing in:\n%s", want, got)
				}
			}
		})
	}
}

// A path that is off for all is told apart from one that is on.
func TestSwitchesInAScrape(t *testing.T) {
	for words, switches := range map[string]dataplane.Switches{
		"on": allOn, "base only": baseOnly, "express only": expressOnly, "off": allOff,
	} {
		s := newScraped(500)
		s.report.Switches = switches
		if got := s.text(t); !strings.Contains(got, `weft_datapath_info{accel="`+words+`",`) {
			t.Errorf("%+v: %q is missing in:\n%s", switches, words, got)
		}
	}
}

func TestTextThatIsNotUTF8DoesNotBreakAScrape(t *testing.T) {
	s := newScraped(500)
	s.report.Reason = "program \xff\xfe in the way"
	if got := s.text(t); !strings.Contains(got, `reason="program · in the way"`) {
		t.Error(got)
	}
}

// A total never falls, whatever becomes of the peers it sums.
func TestTotalsOnlyGrow(t *testing.T) {
	report := func(mode string, tx map[string]uint64) dataplane.Report {
		r := dataplane.Report{Mode: mode}
		for ip, n := range tx {
			r.Peers = append(r.Peers, dataplane.PeerReport{
				PublicIP: netip.MustParseAddr(ip),
				Counters: []dataplane.PathCounters{{Path: "express", TxPackets: n}},
			})
		}
		return r
	}
	var sum totals
	for _, step := range []struct {
		what string
		tx   map[string]uint64
		want uint64
	}{
		{"what was counted before the agent started", map[string]uint64{"192.0.2.2": 1000}, 0},
		{"traffic", map[string]uint64{"192.0.2.2": 1010}, 10},
		{"a second peer", map[string]uint64{"192.0.2.2": 1010, "192.0.2.3": 5}, 15},
		{"the first peer gone", map[string]uint64{"192.0.2.3": 6}, 16},
		{"and back, counting from zero", map[string]uint64{"192.0.2.2": 3, "192.0.2.3": 6}, 19},
		{"a peer that came back unnoticed", map[string]uint64{"192.0.2.2": 1, "192.0.2.3": 6}, 20},
		{"nobody left", nil, 20},
	} {
		sum.Add(report("ebpf", step.tx))
		if got := sum.Paths()[0]; got.Path != "express" || got.TxPackets != step.want {
			t.Errorf("%s: %s %d, want %d", step.what, got.Path, got.TxPackets, step.want)
		}
	}
	var none totals
	none.Add(report("kernel", nil))
	if len(none.Paths()) > 0 {
		t.Error("totals without programs")
	}
	none.Add(report("ebpf", nil))
	if len(none.Paths()) != 3 {
		t.Error("no zeros although programs count")
	}
}

func TestHandler(t *testing.T) {
	var healthy, ready error
	ready = errors.New("the first sync is not done yet")
	h := handler(newScraped(500), checks{
		healthy: func() error { return healthy },
		ready:   func() error { return ready },
	})
	get := func(method, path string) (int, string) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w.Code, w.Body.String()
	}
	expect := func(method, path string, wantCode int, want string) {
		t.Helper()
		if code, body := get(method, path); code != wantCode || !strings.Contains(body, want) {
			t.Errorf("%s %s: %d %s", method, path, code, body)
		}
	}
	expect("GET", "/healthz", 200, "ok\n")
	expect("GET", "/readyz", 503, "the first sync is not done yet\n")
	expect("GET", "/metrics", 200, "weft_peers 2\n")
	expect("POST", "/metrics", 405, "")
	expect("GET", "/", 404, "")
	healthy, ready = errors.New("the sync loop is stuck"), nil
	expect("GET", "/healthz", 503, "stuck")
	expect("GET", "/readyz", 200, "ok\n")
}

func TestAddressInUse(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, err = listen(taken.Addr().String(), slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "address already in use; choose another with --metrics-addr") {
		t.Error(err)
	}
}

func TestServerStops(t *testing.T) {
	s, err := listen("127.0.0.1:0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.Serve(newScraped(500), checks{healthy: func() error { return nil }})
	url := "http://" + s.Address() + "/healthz"
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	response.Body.Close()
	if string(body) != "ok\n" {
		t.Errorf("%q", body)
	}
	s.Close()
	if response, err := http.Get(url); err == nil {
		response.Body.Close()
		t.Error("still answers")
	}
	s.Close() // again is harmless
}
