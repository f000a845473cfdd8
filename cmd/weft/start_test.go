package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/uplink"
)

// fakeStore delivers what a test tells it to.
type fakeStore struct {
	mu      sync.Mutex
	offers  []controlplane.Offer
	deliver chan state.State
}

func (s *fakeStore) Kind() string { return "kube" }

func (s *fakeStore) Announce(o controlplane.Offer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offers = append(s.offers, o)
}

func (s *fakeStore) Run(ctx context.Context, sink controlplane.Sink) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case next := <-s.deliver:
			sink.Health(nil)
			sink.Deliver(next)
		}
	}
}

// last is what was announced last, and how often.
func (s *fakeStore) last() (controlplane.Offer, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.offers) == 0 {
		return controlplane.Offer{}, 0
	}
	return s.offers[len(s.offers)-1], len(s.offers)
}

// clusterAgent is an agent whose peers come from a fakeStore.
type clusterAgent struct {
	*desk
	store  *fakeStore
	agent  *agent
	errs   *syncBuffer
	subnet string
	// away is why the store can't be opened.
	away func() error
	stop func()
}

// newClusterAgent makes one that has not started.
func newClusterAgent(t *testing.T) *clusterAgent {
	t.Helper()
	d := newDesk(t)
	c := &clusterAgent{desk: d, store: &fakeStore{deliver: make(chan state.State)}, errs: &syncBuffer{}, subnet: filepath.Join(t.TempDir(), "flannel", "subnet.env")}
	d.node.moved = make(chan struct{}, 1)
	d.node.uplink = uplink.Uplink{Name: "eth0", Index: 2, MTU: 1500, Address: netip.MustParseAddr("192.0.2.11"), PublicIP: netip.MustParseAddr("192.0.2.11")}
	return c
}

// start starts it; it ends with the test.
func (c *clusterAgent) start(t *testing.T) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	log := slog.New(slog.NewTextHandler(c.errs, nil))
	e := &env{ctx: ctx, stdout: io.Discard, stderr: c.errs, node: c.node, now: time.Now, getenv: c.getenv}
	path, _ := c.node.Open(ctx, c.node.opened)
	timing := defaultTiming()
	timing.RetryMin, timing.MemoryGap, timing.StoreWait = 5*time.Millisecond, 5*time.Millisecond, 50*time.Millisecond
	if err := os.MkdirAll(c.runDir, 0o755); err != nil {
		t.Fatal(err)
	}
	a := &agent{
		log: log, timing: timing, path: path, health: newFailures(log, "reading the peers"),
		record: newRecord(c.runDir, runInfo{}, log),
		memory: newMemory(c.runDir, "kube", log, time.Now),
		subnet: subnetFile{path: c.subnet, ipMasq: true, log: log},
		source: source{
			kind: "kube", flannel: true,
			open: func(context.Context) (controlplane.Store, error) {
				if c.away != nil {
					return nil, c.away()
				}
				return c.store, nil
			},
			prepare: func(context.Context, controlplane.Store) (preparation, error) { return preparation{vni: 1}, nil },
		},
	}
	a.loop = newLoop(timing, log, a.sync, path.Changed(), a.synced)
	a.publish(e, nil, build{}, 0)
	c.agent = a
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = a.run(e)
	}()
	c.stop = func() { stop(); <-done }
	t.Cleanup(c.stop)
}

// cluster is a state as the Kubernetes store delivers it.
func cluster(prefix string) state.State {
	return state.State{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, VNI: 1, Port: 8472,
		Local: state.Local{
			Node: "n1", Prefixes: []netip.Prefix{netip.MustParsePrefix(prefix)}, Uplink: "eth0",
			PublicIP: netip.MustParseAddr("192.0.2.11"), MAC: state.MAC{2, 1, 1, 1, 1, 1},
		},
		Peers: []state.Peer{{Node: "n2", Prefix: netip.MustParsePrefix("10.244.2.0/24"), PublicIP: netip.MustParseAddr("192.0.2.12"), MAC: state.MAC{2, 2, 2, 2, 2, 2}}},
	}
}

func TestNodeOffersItsUplinkAndThenThatItCarries(t *testing.T) {
	c := newClusterAgent(t)
	c.start(t)
	eventually(t, "an offer", func() bool { _, n := c.store.last(); return n == 1 })
	first, _ := c.store.last()
	want := controlplane.Offer{
		Uplink: "eth0", UplinkMTU: 1500, Address: c.node.uplink.Address, PublicIP: c.node.uplink.PublicIP,
		MAC: state.MAC{2, 0, 0, 0, 0, 4}, MACv6: state.MAC{2, 0, 0, 0, 0, 6},
	}
	if first != want {
		t.Errorf("offered %+v, want %+v", first, want)
	}
	if _, err := os.Stat(c.subnet); err == nil {
		t.Error("the subnet file was written before the node carries anything")
	}
	c.store.deliver <- cluster("10.244.1.0/24")
	eventually(t, "the offer of a node that carries", func() bool { o, _ := c.store.last(); return o.Carrying })
	if o, _ := c.store.last(); o.MAC != (state.MAC{2, 1, 1, 1, 1, 1}) {
		t.Errorf("the device's MAC is offered as %v", o.MAC)
	}
	c.node.moved <- struct{}{}
	var before int
	c.node.locked(func() { before = c.node.syncs })
	c.node.changes <- struct{}{}
	eventually(t, "another sync", func() bool { var n int; c.node.locked(func() { n = c.node.syncs }); return n > before })
	if _, n := c.store.last(); n != 2 {
		t.Errorf("%d offers were made, want those of a node and of a node that carries", n)
	}
	text, err := os.ReadFile(c.subnet)
	if want := "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"; err != nil || string(text) != want {
		t.Errorf("subnet file %q, %v; want %q", text, err, want)
	}
}

func TestUplinkGetsAnotherAddress(t *testing.T) {
	c := newClusterAgent(t)
	c.start(t)
	eventually(t, "an offer", func() bool { _, n := c.store.last(); return n == 1 })
	c.node.locked(func() { c.node.uplinkErr = errors.New("eth0 is down") })
	c.node.moved <- struct{}{}
	eventually(t, "a word about the uplink", func() bool { return strings.Contains(c.errs.String(), "eth0 is down") })
	other := netip.MustParseAddr("192.0.2.99")
	c.node.locked(func() { c.node.uplinkErr, c.node.uplink.Address, c.node.uplink.PublicIP = nil, other, other })
	c.node.moved <- struct{}{}
	eventually(t, "the new address", func() bool { o, _ := c.store.last(); return o.PublicIP == other && o.Address == other })
	if _, n := c.store.last(); n != 2 {
		t.Errorf("%d offers, want one for each address", n)
	}
}

func TestSubnetFileFollowsThePrefix(t *testing.T) {
	c := newClusterAgent(t)
	c.start(t)
	c.store.deliver <- cluster("10.244.1.0/24")
	holds := func(text string) func() bool {
		return func() bool { got, _ := os.ReadFile(c.subnet); return strings.Contains(string(got), text) }
	}
	eventually(t, "the subnet file", holds("10.244.1.1/24"))
	c.store.deliver <- cluster("10.244.7.0/24")
	eventually(t, "the other prefix", holds("10.244.7.1/24"))
	if err := os.Remove(c.subnet); err != nil {
		t.Fatal(err)
	}
	c.node.changes <- struct{}{}
	eventually(t, "the file again", holds("10.244.7.1/24"))
}

func TestSubnetFileWaitsForASync(t *testing.T) {
	c := newClusterAgent(t)
	c.node.syncErr = errors.New("no")
	c.start(t)
	c.store.deliver <- cluster("10.244.1.0/24")
	eventually(t, "some tries", func() bool { var n int; c.node.locked(func() { n = c.node.syncs }); return n > 2 })
	if _, err := os.Stat(c.subnet); err == nil {
		t.Error("the subnet file was written although nothing is in force")
	}
	if o, _ := c.store.last(); o.Carrying {
		t.Error("the node says that it carries traffic")
	}
	c.node.locked(func() { c.node.syncErr = nil })
	eventually(t, "the file", func() bool { _, err := os.Stat(c.subnet); return err == nil })
}

func TestNodeWithoutBridgeNetfilterIsNotReady(t *testing.T) {
	c := newClusterAgent(t)
	c.node.bridgeErr = errors.New("load the module br_netfilter")
	c.start(t)
	c.store.deliver <- cluster("10.244.1.0/24")
	eventually(t, "a word about it", func() bool { return strings.Contains(c.errs.String(), "br_netfilter") })
	if err := c.agent.isReady(); err == nil {
		t.Error("the node is ready")
	}
	var synced int
	c.node.locked(func() { synced = len(c.node.state.Peers) })
	if synced != 1 {
		t.Errorf("%d peers in the kernel: what can be carried was to be carried", synced)
	}
	// With nftables flannel does not ask for it.
	s := cluster("10.244.1.0/24")
	s.NFTables = true
	c.store.deliver <- s
	eventually(t, "a ready node", func() bool { return c.agent.isReady() == nil })
}

func TestStartWhileTheStoreIsAway(t *testing.T) {
	c := newClusterAgent(t)
	c.start(t)
	c.store.deliver <- cluster("10.244.1.0/24")
	eventually(t, "the memory", func() bool { _, _, err := c.agent.memory.Recall(); return err == nil })
	c.stop()

	again := newClusterAgent(t)
	again.runDir = c.runDir
	again.away = func() error { return errors.New("the API is away") }
	again.start(t)
	eventually(t, "a node that carries by memory", func() bool { return again.agent.isReady() == nil })
	var got state.State
	again.node.locked(func() { got = again.node.state })
	if len(got.Peers) != 1 || got.Local.MAC != (state.MAC{2, 1, 1, 1, 1, 1}) {
		t.Errorf("from memory: %+v", got)
	}
	if info := again.agent.record.Info(); !strings.Contains(info.Store.Error, "the API is away") {
		t.Errorf("the store's error is %q", info.Store.Error)
	}
	if _, err := os.Stat(again.subnet); err != nil {
		t.Error("pods can't start: no subnet file")
	}
}

func TestMemoryStepsBackForTheStore(t *testing.T) {
	c := newClusterAgent(t)
	c.start(t)
	c.store.deliver <- cluster("10.244.1.0/24")
	eventually(t, "the memory", func() bool { _, _, err := c.agent.memory.Recall(); return err == nil })
	c.stop()
	again := newClusterAgent(t)
	again.runDir = c.runDir
	again.start(t)
	again.store.deliver <- cluster("10.244.7.0/24")
	time.Sleep(100 * time.Millisecond) // past StoreWait
	var got state.State
	again.node.locked(func() { got = again.node.state })
	if got.Local.Prefixes[0].String() != "10.244.7.0/24" {
		t.Errorf("in force is %v", got.Local.Prefixes)
	}
}

func TestMemoryOfAnotherStoreOrBrokenIsNotUsed(t *testing.T) {
	for name, text := range map[string]string{
		"another store":   `{"schemaVersion": 1, "store": "etcd", "state": {"VNI": 1}}`,
		"another version": `{"schemaVersion": 2, "store": "kube", "state": {"VNI": 1}}`,
		"broken":          `{"schemaVersion": 1,`,
		"empty":           ``,
	} {
		t.Run(name, func(t *testing.T) {
			c := newClusterAgent(t)
			if err := os.MkdirAll(c.runDir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(c.runDir, "state.json"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			c.away = func() error { return errors.New("the API is away") }
			c.start(t)
			time.Sleep(150 * time.Millisecond)
			var syncs int
			c.node.locked(func() { syncs = c.node.syncs })
			if syncs != 0 {
				t.Error("the dataplane was synced")
			}
		})
	}
}

// Flannel's checks and their words.
func TestHealthzAnswersAsFlannel(t *testing.T) {
	var mu sync.Mutex
	notReady := errors.New("not yet")
	s, err := listenHealthz("127.0.0.1", 0, func() error { mu.Lock(); defer mu.Unlock(); return notReady }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	get := func(path string) (int, string) {
		r, err := http.Get("http://" + s.Address() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(body)
	}
	check := func(path string, status int, want string) {
		t.Helper()
		if code, body := get(path); code != status || body != want {
			t.Errorf("%s: %d %q, want %d %q", path, code, body, status, want)
		}
	}
	check("/healthz", 200, "flanneld is running")
	check("/readyz", 503, "flanneld is not ready yet")
	mu.Lock()
	notReady = nil
	mu.Unlock()
	check("/readyz", 200, "flanneld is ready")
}

func TestFlagsFromTheEnvironment(t *testing.T) {
	var o agentOptions
	e := &env{stdout: io.Discard, stderr: io.Discard}
	fs := newFlags(e, "agent", "", "")
	o.register(fs.FlagSet)
	if _, err := parseFlags(fs, []string{"--iface", "eth1", "-ip-masq=false"}); err != nil {
		t.Fatal(err)
	}
	environment := map[string]string{
		"FLANNELD_IP_MASQ": "true", "FLANNELD_IFACE": "eth9", "FLANNELD_KUBE_SUBNET_MGR": "true",
		"FLANNELD_PUBLIC_IP": "192.0.2.1", "FLANNELD_V": "5", "FLANNELD_ETCD_PREFIX": "", "FLANNELD_HEALTHZ_PORT": "http",
		"FLANNELD_VERSION": "v0.28.10", // as images have it
	}
	faults := fromEnvironment(fs.FlagSet, func(name string) string { return environment[name] })
	want := `the environment's FLANNELD_HEALTHZ_PORT is "http", which --healthz-port does not take: parse error`
	if len(faults) != 1 || faults[0] != want {
		t.Errorf("faults %q, want %q", faults, want)
	}
	if o.Version || o.IPMasq || o.Iface.String() != "eth1" || !o.KubeSubnetMgr || o.PublicIP != "192.0.2.1" || o.Verbosity != 5 || o.EtcdPrefix != "/coreos.com/network" {
		t.Errorf("options %+v", o.flannelOptions)
	}
}

func TestVerbosityOfFlannelMeansDebug(t *testing.T) {
	for v, want := range map[int]bool{0: false, 1: true, 10: true} {
		o := agentOptions{LogLevel: "info"}
		o.Verbosity = v
		log := o.logger(&env{stderr: io.Discard})
		if got := log.Enabled(t.Context(), slog.LevelDebug); got != want {
			t.Errorf("--v=%d: debug messages are logged: %v", v, got)
		}
	}
}

// A unit of Type=notify has started when its node carries traffic, and no sooner.
func TestSystemdIsToldOnceTheNodeCarries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	heard := func(within time.Duration) string {
		t.Helper()
		if err := systemd.SetReadDeadline(time.Now().Add(within)); err != nil {
			t.Fatal(err)
		}
		message := make([]byte, 100)
		n, err := systemd.Read(message)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		return string(message[:n])
	}
	c := newClusterAgent(t)
	c.node.syncErr = errors.New("no")
	c.start(t)
	c.store.deliver <- cluster("10.244.1.0/24")
	eventually(t, "a failed sync", func() bool { var n int; c.node.locked(func() { n = c.node.syncs }); return n > 0 })
	if got := heard(50 * time.Millisecond); got != "" {
		t.Errorf("systemd hears %q before anything is in force", got)
	}
	c.node.locked(func() { c.node.syncErr = nil })
	if got := heard(5 * time.Second); got != "READY=1" {
		t.Errorf("systemd hears %q", got)
	}
	c.store.deliver <- cluster("10.244.2.0/24")
	if got := heard(50 * time.Millisecond); got != "" {
		t.Errorf("systemd hears %q again", got)
	}
}
