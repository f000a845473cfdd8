package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/weft-net/weft/dataplane"
)

// loopMetrics count what the agent does.
type loopMetrics struct {
	syncs         prometheus.Counter
	syncFailures  prometheus.Counter
	syncDuration  prometheus.Histogram
	lastSuccess   prometheus.Gauge
	storeFailures prometheus.Counter
	storeUp       prometheus.Gauge
}

// newLoopMetrics makes the agent's own metrics.
func newLoopMetrics(r prometheus.Registerer) *loopMetrics {
	m := &loopMetrics{
		syncs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_sync_total",
			Help: "Syncs of the kernel with the desired state, failed ones included.",
		}),
		syncFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_sync_failures_total",
			Help: "Syncs that failed in whole or in part.",
		}),
		syncDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "weft_sync_duration_seconds",
			Help:    "How long a sync took.",
			Buckets: []float64{0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60},
		}),
		lastSuccess: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_sync_last_success_timestamp_seconds",
			Help: "When the last sync succeeded, in Unix time; 0 before the first.",
		}),
		storeFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_store_failures_total",
			Help: "Looks at the source of peers that failed; what it said last stays in force.",
		}),
		storeUp: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "weft_store_up",
			Help: "1 when the last look at the source of peers went well, else 0.",
		}),
	}
	r.MustRegister(m.syncs, m.syncFailures, m.syncDuration, m.lastSuccess, m.storeFailures, m.storeUp)
	return m
}

// Synced counts a sync.
func (m *loopMetrics) Synced(o outcome) {
	m.syncs.Inc()
	m.syncDuration.Observe(o.duration.Seconds())
	if o.err != nil {
		m.syncFailures.Inc()
		return
	}
	m.lastSuccess.Set(float64(o.at.UnixMilli()) / 1000)
}

// Health counts how a look at the store went.
func (m *loopMetrics) Health(err error) {
	if err != nil {
		m.storeFailures.Inc()
		m.storeUp.Set(0)
		return
	}
	m.storeUp.Set(1)
}

// newRegistry makes a registry with what every Go process tells, and weft's
// version.
func newRegistry(b build) *prometheus.Registry {
	r := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "weft_build_info",
		Help:        "The agent's version, always 1.",
		ConstLabels: prometheus.Labels{"version": b.Version, "revision": b.Commit, "goversion": runtime.Version()},
	})
	info.Set(1)
	r.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// reporter reads reports of the dataplane: a whole one, and one with the counters of
// peers alone.
type reporter interface {
	Report(context.Context) (dataplane.Report, error)
	PeerCounters(context.Context) (dataplane.Report, error)
}

// collector publishes a report of the dataplane, read at each scrape.
type collector struct {
	log      *slog.Logger
	reports  reporter
	names    func() names
	maxPeers int
	timeout  time.Duration
	failures prometheus.Counter

	mu      sync.Mutex // one scrape at a time
	started bool
	stopped bool
	totals  totals
	failed  *failures
}

// newCollector makes a collector that reads reports, and names for the peers.
// Above maxPeers peers it publishes totals alone.
func newCollector(log *slog.Logger, reports reporter, names func() names, maxPeers int) *collector {
	return &collector{
		log:      log,
		reports:  reports,
		names:    names,
		maxPeers: maxPeers,
		timeout:  10 * time.Second,
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "weft_scrape_failures_total",
			Help: "Scrapes that could not read the dataplane and lack its metrics.",
		}),
		failed: newFailures(log, "reading the dataplane for metrics"),
	}
}

// desc describes a metric of the collector.
func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// The metrics of the collector.
var (
	peerTxPackets = desc("weft_peer_transmit_packets_total", "Packets sent to a peer, as segments on the wire, by path: express, base, kernel.", "peer", "path")
	peerTxBytes   = desc("weft_peer_transmit_bytes_total", "Inner IP bytes sent to a peer, as sent on the wire, by path.", "peer", "path")
	peerRxPackets = desc("weft_peer_receive_packets_total", "Packets received from a peer, as segments on the wire, by path.", "peer", "path")
	peerRxBytes   = desc("weft_peer_receive_bytes_total", "Inner IP bytes received from a peer, as sent on the wire, by path.", "peer", "path")
	peerInfo      = desc("weft_peer_info", "A peer's node name and pod prefixes, always 1.", "peer", "node", "prefix")
	peerCount     = desc("weft_peers", "Peers that the dataplane knows.")
	suppressed    = desc("weft_peer_series_suppressed", "1 when there are more peers than --metrics-max-peers and the weft_peer_ series are left out, else 0.")

	txPackets = desc("weft_transmit_packets_total", "Packets sent to all peers since the agent started, as segments on the wire, by path.", "path")
	txBytes   = desc("weft_transmit_bytes_total", "Inner IP bytes sent to all peers since the agent started, as sent on the wire, by path.", "path")
	rxPackets = desc("weft_receive_packets_total", "Packets received from all peers since the agent started, as segments on the wire, by path.", "path")
	rxBytes   = desc("weft_receive_bytes_total", "Inner IP bytes received from all peers since the agent started, as sent on the wire, by path.", "path")

	dropped         = desc("weft_dropped_packets_total", "Packets dropped, by reason.", "reason")
	passed          = desc("weft_passed_packets_total", "Packets left to the kernel, or by express to the base path, by reason.", "reason")
	firewallDropped = desc("weft_firewall_dropped_packets_total", "Packets of pods to the VXLAN port of a node that the firewall dropped, where no program did.")
	datapathInfo    = desc("weft_datapath_info", "How packets travel and what holds acceleration back, always 1.", "mode", "reason", "accel", "source_check")

	expressPathInfo = desc("weft_express_info", "Whether packets may take the express path, and what is in the way, always 1.", "state", "reason")
	endpointCount   = desc("weft_endpoints", "Addresses of pods on this node that the express path serves.")
	leftAloneCount  = desc("weft_endpoints_left_alone", "Pods on this node, or addresses of them, that the express path does not serve.")
	xdpInfo         = desc("weft_xdp_info", "Whether packets are stripped in the uplink's driver, and what is in the way, always 1.", "state", "reason")
	xdpStripped     = desc("weft_xdp_stripped_packets_total", "Packets stripped in the uplink's driver, before GRO.")
	xdpPassed       = desc("weft_xdp_passed_packets_total", "VXLAN packets that the program in the uplink's driver left as they were, by reason.", "reason")
	xdpDropped      = desc("weft_xdp_dropped_packets_total", "Packets dropped in the uplink's driver, by reason; they are in weft_dropped_packets_total too.", "reason")
	epochMoves      = desc("weft_epoch_moves_total", "Moves of the epoch, after which the host's rules judge every flow anew, by what changed; settled is the second move that follows.", "change")
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		peerTxPackets, peerTxBytes, peerRxPackets, peerRxBytes, peerInfo, peerCount, suppressed,
		txPackets, txBytes, rxPackets, rxBytes, dropped, passed, firewallDropped, datapathInfo,
		expressPathInfo, endpointCount, leftAloneCount, epochMoves,
		xdpInfo, xdpStripped, xdpPassed, xdpDropped,
	} {
		ch <- d
	}
	c.failures.Describe(ch)
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Last, so that a failure of this scrape is in it.
	defer c.failures.Collect(ch)

	report, err := c.read(c.reports.Report)
	if err != nil {
		c.failures.Inc()
		return
	}
	c.node(ch, report)
	c.express(ch, report)
	c.xdp(ch, report.XDP)
	c.reasons(ch, report)
	c.peers(ch, report)
	c.paths(ch)
}

// Start takes the counters as they are now as the zero of the totals, once the
// dataplane has found the counters an earlier agent left.
func (c *collector) Start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.started = true
	// If this fails the first scrape that succeeds is the zero instead.
	_, _ = c.read(c.reports.PeerCounters)
}

// Stop waits for a scrape under way; from then on the dataplane is not read.
func (c *collector) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
}

// errStopped is what a scrape gets that comes too late.
var errStopped = errors.New("the agent is stopping")

// read reads a report and adds it to the totals.
func (c *collector) read(from func(context.Context) (dataplane.Report, error)) (dataplane.Report, error) {
	if c.stopped {
		return dataplane.Report{}, errStopped
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	report, err := from(ctx)
	c.failed.Note(err)
	if err == nil && c.started {
		c.totals.Add(report)
	}
	return report, err
}

// node publishes what is true of the whole node.
func (c *collector) node(ch chan<- prometheus.Metric, r dataplane.Report) {
	gauge(ch, datapathInfo, 1, r.Mode, r.Reason, switchWords(r.Switches), r.SourceCheck)
	gauge(ch, peerCount, float64(len(r.Peers)))
	tooMany := 0.0
	if len(r.Peers) > c.maxPeers {
		tooMany = 1
	}
	gauge(ch, suppressed, tooMany)
}

// express publishes how the express path stands.
func (c *collector) express(ch chan<- prometheus.Metric, r dataplane.Report) {
	gauge(ch, expressPathInfo, 1, onOff(r.Express.On), strings.Join(whyNoExpress(r), "; "))
	counter(ch, firewallDropped, r.Firewall.DroppedPackets)
	gauge(ch, endpointCount, float64(r.Express.Pods))
	gauge(ch, leftAloneCount, float64(len(r.Express.LeftAlone)))
	for change, n := range r.Express.Moves {
		counter(ch, epochMoves, n, change)
	}
}

// xdp publishes how packets fare in the uplink's driver. Without a program there
// it has no reasons to tell.
func (c *collector) xdp(ch chan<- prometheus.Metric, x dataplane.XDP) {
	gauge(ch, xdpInfo, 1, onOff(x.Attached && x.Heard), x.Reason)
	counter(ch, xdpStripped, x.Stripped)
	if !x.Attached {
		return
	}
	for _, reason := range x.Reasons {
		counter(ch, xdpPassed, reason.Passed, reason.Name)
		counter(ch, xdpDropped, reason.Dropped, reason.Name)
	}
}

// reasons publishes every reason, those that never happened included.
func (c *collector) reasons(ch chan<- prometheus.Metric, r dataplane.Report) {
	for _, reason := range r.Reasons {
		counter(ch, dropped, reason.Dropped, reason.Name)
		counter(ch, passed, reason.Passed, reason.Name)
	}
}

// peers publishes the series of each peer: 5,000 peers on 5,000 nodes would be
// 100 million of them, so there is a limit.
func (c *collector) peers(ch chan<- prometheus.Metric, r dataplane.Report) {
	if len(r.Peers) > c.maxPeers {
		return
	}
	names := c.names()
	for _, p := range r.Peers {
		peer := p.PublicIP.String()
		for _, prefix := range p.Prefixes {
			gauge(ch, peerInfo, 1, peer, names[p.PublicIP], prefix.String())
		}
		for _, n := range p.Counters {
			counter(ch, peerTxPackets, n.TxPackets, peer, n.Path)
			counter(ch, peerTxBytes, n.TxBytes, peer, n.Path)
			counter(ch, peerRxPackets, n.RxPackets, peer, n.Path)
			counter(ch, peerRxBytes, n.RxBytes, peer, n.Path)
		}
	}
}

// paths publishes the totals.
func (c *collector) paths(ch chan<- prometheus.Metric) {
	for _, n := range c.totals.Paths() {
		counter(ch, txPackets, n.TxPackets, n.Path)
		counter(ch, txBytes, n.TxBytes, n.Path)
		counter(ch, rxPackets, n.RxPackets, n.Path)
		counter(ch, rxBytes, n.RxBytes, n.Path)
	}
}

// gauge publishes one value.
func gauge(ch chan<- prometheus.Metric, d *prometheus.Desc, value float64, labels ...string) {
	constMetric(ch, d, prometheus.GaugeValue, value, labels)
}

// counter publishes one count.
func counter(ch chan<- prometheus.Metric, d *prometheus.Desc, value uint64, labels ...string) {
	constMetric(ch, d, prometheus.CounterValue, float64(value), labels)
}

// constMetric publishes a value that was read elsewhere.
func constMetric(ch chan<- prometheus.Metric, d *prometheus.Desc, t prometheus.ValueType, value float64, labels []string) {
	for i := range labels {
		labels[i] = strings.ToValidUTF8(labels[i], "·")
	}
	m, err := prometheus.NewConstMetric(d, t, value, labels...)
	if err != nil {
		m = prometheus.NewInvalidMetric(d, err)
	}
	ch <- m
}

// onOff is a switch in words.
func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// totals sum the peers' counters over time.
//
// The sum over the peers of the moment would fall when a peer leaves, and a
// counter that falls is taken for one that restarted at zero: its whole value
// would count again. So totals add what each peer's counters grew by; what a
// peer's last packets were, between the last look and its end, is not seen.
type totals struct {
	paths []dataplane.PathCounters
	last  map[peerPath]dataplane.PathCounters
}

// peerPath is whose counters are meant, and of which path.
type peerPath struct {
	peer netip.Addr
	path string
}

// Add adds what the counters grew by since the report before. The first report
// only sets the zero: the programs and their counters outlive agents.
func (t *totals) Add(r dataplane.Report) {
	first := t.last == nil
	now := make(map[peerPath]dataplane.PathCounters, 3*len(r.Peers)) // as many paths
	for _, p := range r.Peers {
		for _, n := range p.Counters {
			key := peerPath{p.PublicIP, n.Path}
			now[key] = n
			grown := growth(t.last[key], n)
			if first {
				grown = dataplane.PathCounters{}
			}
			sum := t.path(n.Path)
			sum.TxPackets += grown.TxPackets
			sum.TxBytes += grown.TxBytes
			sum.RxPackets += grown.RxPackets
			sum.RxBytes += grown.RxBytes
		}
	}
	if r.Mode == "ebpf" {
		// Zero is a fact when programs count and there is nobody to count.
		for _, path := range []string{"express", "base", "kernel"} {
			t.path(path)
		}
	}
	t.last = now
}

// Paths returns the totals: none until programs have counted.
func (t *totals) Paths() []dataplane.PathCounters { return t.paths }

// path finds the total of a path.
func (t *totals) path(name string) *dataplane.PathCounters {
	for i := range t.paths {
		if t.paths[i].Path == name {
			return &t.paths[i]
		}
	}
	t.paths = append(t.paths, dataplane.PathCounters{Path: name})
	return &t.paths[len(t.paths)-1]
}

// growth is what counters grew by. A counter that fell belongs to a peer that
// came back and counts from zero.
func growth(before, after dataplane.PathCounters) dataplane.PathCounters {
	grown := func(before, after uint64) uint64 {
		if after < before {
			return after
		}
		return after - before
	}
	return dataplane.PathCounters{
		TxPackets: grown(before.TxPackets, after.TxPackets),
		TxBytes:   grown(before.TxBytes, after.TxBytes),
		RxPackets: grown(before.RxPackets, after.RxPackets),
		RxBytes:   grown(before.RxBytes, after.RxBytes),
	}
}
