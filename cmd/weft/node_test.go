package main

import (
	"bytes"
	"context"
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/uplink"
)

// update rewrites the golden files of testdata.
var update = flag.Bool("update", false, "rewrite the golden files")

// fakeNode is a node without a kernel. Its zero value holds nothing.
type fakeNode struct {
	mu      sync.Mutex
	report  dataplane.Report
	survey  dataplane.Survey
	wanted  state.State // of the last survey
	err     error       // of everything
	syncErr error
	// switchErr is of SetAccel.
	switchErr error
	syncs     int
	state     state.State
	opened    dataplane.Options
	closed    bool
	changes   chan struct{}

	inspected string // pin directory and VNI of the last Inspect
	switches  []dataplane.Switch
	removals  []string
	// left is what Remove leaves on purpose.
	left []string

	uplink    uplink.Uplink
	uplinkErr error
	moved     chan struct{} // nudges that the uplink may be another
	bridgeErr error
}

func (n *fakeNode) OpenUplink(*slog.Logger) (uplinkFinder, error) { return fakeUplink{n}, nil }

// fakeUplink finds what the fakeNode says.
type fakeUplink struct{ n *fakeNode }

func (f fakeUplink) Find(uplink.Options) (uplink.Uplink, error) {
	f.n.mu.Lock()
	defer f.n.mu.Unlock()
	return f.n.uplink, f.n.uplinkErr
}

func (f fakeUplink) Watch(context.Context) (<-chan struct{}, error) { return f.n.moved, nil }
func (f fakeUplink) Close() error                                   { return nil }

func (n *fakeNode) Open(_ context.Context, o dataplane.Options) (datapath, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.opened = o
	n.changes = make(chan struct{}, 1)
	if n.err != nil {
		return nil, n.err
	}
	return fakeDatapath{n}, nil
}

func (n *fakeNode) Inspect(_ context.Context, pinDir string, vni uint32, _ []state.Peer) (dataplane.Report, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.inspected = pinDir + " " + vniText(vni)
	return n.report, n.err
}

func (n *fakeNode) Survey(s state.State) (dataplane.Survey, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wanted = s
	return n.survey, n.err
}

func (n *fakeNode) SetAccel(_ string, s dataplane.Switch) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.switchErr != nil {
		return n.switchErr
	}
	n.switches = append(n.switches, s)
	return n.err
}

func (n *fakeNode) Remove(_ context.Context, _ string, vni uint32, all bool, _ []state.Peer) (dataplane.Removal, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := dataplane.Removal{Removed: n.removals}
	if len(r.Removed) > 0 {
		r.Left = n.left
	}
	n.removals = nil
	n.inspected = vniText(vni)
	if all {
		r.Removed = append(r.Removed, "device flannel."+vniText(vni))
	}
	return r, n.err
}

func vniText(vni uint32) string { return strconv.Itoa(int(vni)) }

// fakeDatapath is an open dataplane of a fakeNode.
type fakeDatapath struct{ n *fakeNode }

func (d fakeDatapath) Sync(_ context.Context, s state.State) error {
	d.n.mu.Lock()
	defer d.n.mu.Unlock()
	d.n.syncs++
	d.n.state = s
	return d.n.syncErr
}

func (d fakeDatapath) Changed() <-chan struct{} { return d.n.changes }

func (d fakeDatapath) Report(context.Context) (dataplane.Report, error) {
	d.n.mu.Lock()
	defer d.n.mu.Unlock()
	return d.n.report, d.n.err
}

func (d fakeDatapath) Brief(ctx context.Context) (dataplane.Report, error) {
	r, err := d.Report(ctx)
	r.Peers, r.Reasons, r.Suspects, r.Maps = nil, nil, nil, nil
	return r, err
}

func (d fakeDatapath) PeerCounters(ctx context.Context) (dataplane.Report, error) {
	return d.Report(ctx)
}

func (d fakeDatapath) MACs(uint32) (v4, v6 state.MAC, err error) {
	return state.MAC{2, 0, 0, 0, 0, 4}, state.MAC{2, 0, 0, 0, 0, 6}, nil
}

func (d fakeDatapath) MTU() int { return 1450 }

func (d fakeDatapath) BridgeFault(state.State) error {
	d.n.mu.Lock()
	defer d.n.mu.Unlock()
	return d.n.bridgeErr
}

func (d fakeDatapath) Close() error {
	d.n.mu.Lock()
	defer d.n.mu.Unlock()
	d.n.closed = true
	return nil
}

// locked runs f while nothing else touches the node.
func (n *fakeNode) locked(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

// noon is when the tests' screens are taken.
var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// desk is where a test calls weft: directories and a node of its own.
type desk struct {
	tb     testing.TB
	node   *fakeNode
	runDir string
	env    map[string]string
}

func (d *desk) getenv(name string) string { return d.env[name] }

func newDesk(tb testing.TB) *desk {
	tb.Helper()
	return &desk{tb: tb, node: &fakeNode{}, runDir: filepath.Join(tb.TempDir(), "run")}
}

// call runs weft and returns its exit status and what it printed. The run
// directory is given to every command that takes one, and called RUN.
func (d *desk) call(args ...string) (status int, stdout, stderr string) {
	d.tb.Helper()
	return d.callUntil(d.tb.Context(), args...)
}

// callUntil is call with a context that stands for signals.
func (d *desk) callUntil(ctx context.Context, args ...string) (status int, stdout, stderr string) {
	d.tb.Helper()
	if len(args) > 0 && strings.Contains("agent status peers accel remove", args[0]) {
		args = append(args, "--run-dir", d.runDir)
	}
	var out, errs syncBuffer
	status = run(&env{ctx: ctx, stdout: &out, stderr: &errs, node: d.node, now: func() time.Time { return noon }, getenv: d.getenv}, args)
	tidy := func(s string) string { return strings.ReplaceAll(s, d.runDir, "RUN") }
	return status, tidy(out.String()), tidy(errs.String())
}

// must runs weft, which must succeed, and returns what it printed.
func (d *desk) must(args ...string) string {
	d.tb.Helper()
	status, stdout, stderr := d.call(args...)
	if status != 0 || stderr != "" {
		d.tb.Fatalf("weft %s: status %d\n%s%s", strings.Join(args, " "), status, stdout, stderr)
	}
	return stdout
}

// ran leaves the run file of an agent that ran here.
func (d *desk) ran(change func(*runInfo)) {
	d.tb.Helper()
	info := runInfo{
		SchemaVersion: runSchema, Version: "v0.1.0", PID: 4242, StartedAt: noon.Add(-26 * time.Hour),
		Store: storeInfo{Kind: "static", Config: "/etc/weft/weft.yaml"},
		Node:  "node-a", VNI: 1, Ready: true, Mode: "ebpf", Peers: 2,
		Sync:    syncInfo{LastSuccess: noon.Add(-12 * time.Second)},
		Express: expressInfo{LeftAlone: someLeftAlone},
		Names: names{
			netip.MustParseAddr("192.0.2.2"): "node-b",
			netip.MustParseAddr("192.0.2.3"): "node-c",
		},
	}
	if change != nil {
		change(&info)
	}
	if err := os.MkdirAll(d.runDir, 0o755); err != nil {
		d.tb.Fatal(err)
	}
	if err := writeRunInfo(d.runDir, info); err != nil {
		d.tb.Fatal(err)
	}
}

// runs makes it look as if the agent runs.
func (d *desk) runs() {
	d.tb.Helper()
	l, err := takeLock(d.runDir)
	if err != nil {
		d.tb.Fatal(err)
	}
	if err := l.file.Truncate(0); err != nil {
		d.tb.Fatal(err)
	}
	if _, err := l.file.WriteAt([]byte("4242\n"), 0); err != nil {
		d.tb.Fatal(err)
	}
	d.tb.Cleanup(l.Release)
}

// syncBuffer is a buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// golden compares got with a file of testdata.
func golden(tb testing.TB, name, got string) {
	tb.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			tb.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	if got != string(want) {
		tb.Errorf("%s has changed (go test ./cmd/weft -update accepts it):\n%s", path, got)
	}
}

func mustMAC(s string) state.MAC {
	mac, err := state.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return mac
}

// The switches of a node or peer.
var (
	allOn       = dataplane.Switches{Express: true, Base: true}
	baseOnly    = dataplane.Switches{Base: true}
	expressOnly = dataplane.Switches{Express: true}
	allOff      = dataplane.Switches{}
)

// someLeftAlone are a pod and an address that express does not serve.
var someLeftAlone = []dataplane.LeftAlone{
	{Veth: "veth3c5e", Reason: "the pod is shaped (qdisc tbf)"},
	{Veth: "veth9a10", IP: netip.MustParseAddr("10.244.1.9"), Reason: "the host has no route to it"},
}

// agentReport is ebpfReport with what only the agent knows.
func agentReport() dataplane.Report {
	r := ebpfReport()
	r.Express.LeftAlone = someLeftAlone
	r.Express.Moves = map[string]uint64{"nftables": 3, "routes": 1, "settled": 4}
	return r
}

// ebpfReport is a node with two peers, one of which diverges and is switched
// off.
func ebpfReport() dataplane.Report {
	counters := func(n uint64) []dataplane.PathCounters {
		return []dataplane.PathCounters{
			{Path: "express", TxPackets: 81234 * n, TxBytes: 81234 * n * 100, RxPackets: 70000 * n, RxBytes: 70000 * n * 1400},
			{Path: "base", TxPackets: 120 * n, TxBytes: 9000 * n, RxPackets: 1000 * n, RxBytes: 64000 * n},
			{Path: "kernel", TxPackets: 7 * n, TxBytes: 420 * n, RxPackets: 0, RxBytes: 0},
		}
	}
	return dataplane.Report{
		Mode: "ebpf", Switches: allOn, SourceCheck: "observe",
		Express: dataplane.Express{On: true, Pods: 3, Epoch: 7},
		Uplink:  dataplane.Device{Name: "eth0", Index: 2, MTU: 1500, MAC: mustMAC("02:00:00:00:00:01"), Address: netip.MustParseAddr("192.0.2.1")},
		Overlay: dataplane.Device{Name: "flannel.1", Index: 7, MTU: 1450, MAC: mustMAC("0a:58:0a:f4:01:00"), Address: netip.MustParseAddr("10.244.1.0")},
		VNI:     1, Port: 8472,
		Hooks: []dataplane.Hook{
			{Program: "uplink_in", Device: "eth0", Direction: "ingress", Attached: "tcx", ID: 41},
			{Program: "overlay_out", Device: "flannel.1", Direction: "egress", Attached: "clsact", ID: 42, Behind: []string{"tcpdumper"}},
			{Program: "overlay_in", Device: "flannel.1", Direction: "ingress"},
		},
		Peers: []dataplane.PeerReport{
			{
				PublicIP: netip.MustParseAddr("192.0.2.2"), Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")},
				MAC: mustMAC("0a:58:0a:f4:02:00"), Switches: allOn, InMap: true, Counters: counters(1),
			},
			{
				PublicIP: netip.MustParseAddr("192.0.2.3"),
				Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.3.0/24"), netip.MustParsePrefix("10.244.4.0/24")},
				MAC:      mustMAC("0a:58:0a:f4:03:00"), InMap: true, Counters: counters(1000),
				Divergence: []string{"the route to 10.244.4.0/24 is missing"},
			},
		},
		Reasons: []dataplane.ReasonCount{
			{Name: "not_vxlan", Help: "The packet is not VXLAN.", Passed: 123456},
			{Name: "pod_vxlan_injection", Help: "A pod sent VXLAN itself.", Dropped: 3},
			{Name: "fragment", Help: "The packet is a fragment."},
		},
		Suspects: []dataplane.Suspect{
			{OuterSource: netip.MustParseAddr("192.0.2.66"), InnerSource: netip.MustParseAddr("10.244.2.9"), Reason: "unknown_peer", Packets: 12},
		},
		Maps: []dataplane.MapInfo{
			{Name: "peers", Type: "Hash", Entries: 3, MaxEntries: 5120, Bytes: 409600},
			{Name: "witness", Type: "LRUHash", Entries: 900, MaxEntries: 65536, Bytes: 7340032},
		},
	}
}

// kernelReport is a node without programs.
func kernelReport() dataplane.Report {
	r := ebpfReport()
	r.Mode, r.Reason, r.SourceCheck = "kernel", "kernel 5.4.0 has no TCX and no clsact", ""
	r.Express = dataplane.Express{}
	r.Hooks, r.Reasons, r.Suspects, r.Maps = nil, nil, nil, nil
	for i := range r.Peers {
		r.Peers[i].InMap, r.Peers[i].Switches, r.Peers[i].Counters, r.Peers[i].Divergence = false, allOn, nil, nil
	}
	return r
}
