//go:build linux && peers

package etcd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// The tests run against real etcds on loopback ports that are free. Those that
// need nothing else share one, each below a prefix of its own.

func TestMain(m *testing.M) {
	// They wait most of the time.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	code := m.Run()
	if shared.server != nil {
		shared.server.kill()
		os.RemoveAll(shared.server.dir)
	}
	os.Exit(code)
}

// shared is the etcd of tests that do nothing to it.
var shared struct {
	once   sync.Once
	server *server
	err    error
}

// etcdProgram is where etcd is; `test/peers` builds it if need be.
var etcdProgram = sync.OnceValues(func() (string, error) {
	found, err := lab.Programs("etcd")
	return found["etcd"], err
})

// server is an etcd.
type server struct {
	dir    string
	client string // host:port
	url    string
	args   []string
	cmd    *exec.Cmd
	ended  chan struct{}
}

// sharedEtcd returns the etcd that tests share.
func sharedEtcd(tb testing.TB) *server {
	tb.Helper()
	shared.once.Do(func() {
		var dir string
		//nolint:usetesting // it outlives the test that asks first
		if dir, shared.err = os.MkdirTemp("", "weft-etcd"); shared.err == nil {
			shared.server, shared.err = newServer(dir, "http")
		}
	})
	if shared.err != nil {
		tb.Fatal(shared.err)
	}
	return shared.server
}

// ownEtcd starts an etcd for one test.
func ownEtcd(tb testing.TB, scheme string, args ...string) *server {
	tb.Helper()
	s, err := newServer(tb.TempDir(), scheme, args...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.kill)
	return s
}

func newServer(dir, scheme string, args ...string) (*server, error) {
	client, err := freePort()
	if err != nil {
		return nil, err
	}
	s := &server{dir: dir, client: client, url: scheme + "://" + client, args: args}
	return s, s.start()
}

// start starts it with the data that it has.
func (s *server) start() error {
	program, err := etcdProgram()
	if err != nil {
		return err
	}
	peer, err := freePort()
	if err != nil {
		return err
	}
	s.cmd = exec.Command(program, append([]string{
		"--data-dir", filepath.Join(s.dir, "data"), "--log-level", "error",
		"--listen-client-urls", s.url, "--advertise-client-urls", s.url,
		"--listen-peer-urls", "http://" + peer, "--initial-advertise-peer-urls", "http://" + peer, "--initial-cluster", "default=http://" + peer,
		"--unsafe-no-fsync", "--heartbeat-interval", "50", "--election-timeout", "500",
	}, s.args...)...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.ended = make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // its death is etcd's
		defer runtime.UnlockOSThread()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			s.cmd.Wait()
		}
		close(s.ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	for range 1000 {
		if conn, err := net.Dial("tcp", s.client); err == nil {
			return conn.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("etcd does not listen")
}

// kill ends it at once; its data stay.
func (s *server) kill() {
	s.cmd.Process.Kill()
	<-s.ended
}

// restart starts it again with the data that it has.
func (s *server) restart(tb testing.TB) {
	tb.Helper()
	must(tb, s.start())
}

// forget deletes its data.
func (s *server) forget(tb testing.TB) {
	tb.Helper()
	must(tb, os.RemoveAll(filepath.Join(s.dir, "data")))
}

// lastPort is the last port that a test has got.
var lastPort atomic.Int32

// freePort returns an address on loopback that nobody listens on. It is the
// caller's for good: not one that the kernel hands out, which another test might
// get while an etcd is being restarted.
func freePort() (string, error) {
	const first, number = 10000, 20000 // below net.ipv4.ip_local_port_range
	for range number {
		port := first + (os.Getpid()*100+int(lastPort.Add(1)))%number
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return "", err
		}
		defer l.Close()
		return l.Addr().String(), nil
	}
	return "", errors.New("all ports are in use")
}

// hand is a client with which a test does what people and other nodes do.
type hand struct {
	*clientv3.Client
	tb     testing.TB
	prefix string
}

// network is the configuration of most tests.
const network = `{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`

// dualNetwork is one of both families.
const dualNetwork = `{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Backend": {"Type": "vxlan"}}`

// mustHand connects to etcd and writes the configuration below a prefix for
// this test, unless it is empty.
func mustHand(tb testing.TB, s *server, config string, change ...func(*clientv3.Config)) *hand {
	tb.Helper()
	c := clientv3.Config{Endpoints: []string{s.url}, Logger: zap.NewNop(), DialTimeout: 10 * time.Second}
	for _, f := range change {
		f(&c)
	}
	client, err := clientv3.New(c)
	must(tb, err)
	tb.Cleanup(func() { client.Close() })
	h := &hand{client, tb, "/" + tb.Name()}
	if config != "" {
		h.put("config", config)
	}
	return h
}

func (h *hand) put(key, value string, options ...clientv3.OpOption) {
	h.tb.Helper()
	ctx, cancel := context.WithTimeout(h.tb.Context(), 20*time.Second)
	defer cancel()
	_, err := h.Put(ctx, h.prefix+"/"+key, value, options...)
	must(h.tb, err)
}

func (h *hand) delete(key string) {
	h.tb.Helper()
	_, err := h.Delete(h.tb.Context(), h.prefix+"/"+key)
	must(h.tb, err)
}

// compact forgets everything but what is now.
func (h *hand) compact() {
	h.tb.Helper()
	answer, err := h.Get(h.tb.Context(), "any")
	must(h.tb, err)
	_, err = h.Compact(h.tb.Context(), answer.Header.Revision, clientv3.WithCompactPhysical())
	must(h.tb, err)
}

// leases returns what is below subnets/, by the last part of the key.
func (h *hand) leases() map[string]kv {
	h.tb.Helper()
	ctx, cancel := context.WithTimeout(h.tb.Context(), 20*time.Second)
	defer cancel()
	answer, err := h.Get(ctx, h.prefix+"/subnets/", clientv3.WithPrefix())
	must(h.tb, err)
	all := map[string]kv{}
	for _, e := range answer.Kvs {
		all[strings.TrimPrefix(string(e.Key), h.prefix+"/subnets/")] = kv{string(e.Value), e.ModRevision, clientv3.LeaseID(e.Lease)}
	}
	return all
}

// lease returns a key and its value, which is the only one.
func (h *hand) lease() (string, kv) {
	h.tb.Helper()
	all := h.leases()
	if len(all) != 1 {
		h.tb.Fatalf("%d leases, want one: %v", len(all), all)
	}
	for key, value := range all {
		return key, value
	}
	panic("unreachable")
}

// ttl is how long an etcd lease lives.
func (h *hand) ttl(id clientv3.LeaseID) time.Duration {
	h.tb.Helper()
	answer, err := h.TimeToLive(h.tb.Context(), id)
	must(h.tb, err)
	return time.Duration(answer.TTL) * time.Second
}

// bound makes an etcd lease.
func (h *hand) bound(ttl time.Duration) clientv3.LeaseID {
	h.tb.Helper()
	answer, err := h.Grant(h.tb.Context(), int64(ttl/time.Second))
	must(h.tb, err)
	return answer.ID
}

type kv struct {
	value    string
	modified int64
	bound    clientv3.LeaseID
}

// value is what node number i writes, its MAC ending in i too.
func value(i int) string {
	return fmt.Sprintf(`{"PublicIP":"192.0.2.%d","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"}}`, i, i)
}

// node is a store that runs.
type node struct {
	*sink
	store *Store
	log   *record
	stop  func()
}

// offer is that of node number i.
func offer(i int) controlplane.Offer {
	return controlplane.Offer{
		Uplink: "eth0", UplinkMTU: 1500,
		Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), PublicIP: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}),
	}
}

// dualOffer is that of node number i with IPv6.
func dualOffer(i int) controlplane.Offer {
	o := offer(i)
	o.AddressV6 = netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", i))
	o.PublicIPv6 = o.AddressV6
	return o
}

// impatient is timing for tests.
func impatient() timing {
	t := defaultTiming()
	t.RetryMin, t.RetryMax, t.Config = 100*time.Millisecond, 300*time.Millisecond, 100*time.Millisecond
	return t
}

// mustOpen opens a store with what a test needs.
func mustOpen(tb testing.TB, s *server, change ...func(*Options)) (*Store, *record) {
	tb.Helper()
	log := &record{}
	o := Options{Endpoints: []string{s.url}, Prefix: "/" + tb.Name(), Log: slog.New(slog.NewTextHandler(log, nil))}
	for _, f := range change {
		f(&o)
	}
	store, err := Open(o)
	must(tb, err)
	store.timing = impatient()
	return store, log
}

// begin runs a store.
func begin(tb testing.TB, store *Store, log *record, o controlplane.Offer) *node {
	tb.Helper()
	store.Announce(o)
	ctx, cancel := context.WithCancel(context.Background())
	n := &node{sink: &sink{}, store: store, log: log}
	var running sync.WaitGroup
	running.Go(func() {
		if err := store.Run(ctx, n.sink); err != nil {
			tb.Errorf("Run: %v", err)
		}
	})
	n.stop = func() {
		cancel()
		running.Wait()
	}
	tb.Cleanup(n.stop)
	return n
}

// start opens and runs a store, and waits for its first state.
func start(tb testing.TB, s *server, o controlplane.Offer, change ...func(*Options)) *node {
	tb.Helper()
	store, log := mustOpen(tb, s, change...)
	n := begin(tb, store, log, o)
	n.ready(tb)
	return n
}

// ready waits for the first state.
func (n *node) ready(tb testing.TB) {
	tb.Helper()
	eventually(tb, func() string {
		if n.count() == 0 {
			return "no state was delivered; health: " + n.broken() + "\n" + n.log.String()
		}
		return ""
	})
}

// hasPeers waits until the peers' prefixes are these, separated by blanks.
func (n *node) hasPeers(tb testing.TB, want string) {
	tb.Helper()
	eventually(tb, func() string {
		if got := prefixes(n.state()); got != want {
			return fmt.Sprintf("peers %q, want %q; health: %s", clip(got), want, n.broken())
		}
		return ""
	})
}

// watches waits until what happens in etcd is told to the node. Its first state
// comes a moment before that.
func (n *node) watches(tb testing.TB, h *hand) {
	tb.Helper()
	before := prefixes(n.state())
	h.put("subnets/10.244.254.0-24", value(254))
	n.hasPeers(tb, strings.TrimSpace(before+" 10.244.254.0/24"))
	h.delete("subnets/10.244.254.0-24")
	n.hasPeers(tb, before)
}

// isWell waits until the health is good.
func (n *node) isWell(tb testing.TB) {
	tb.Helper()
	eventually(tb, func() string { return n.broken() })
}

// says waits until the health says all of these.
func (n *node) says(tb testing.TB, want ...string) {
	tb.Helper()
	eventually(tb, func() string {
		for _, w := range want {
			if !strings.Contains(n.broken(), w) {
				return fmt.Sprintf("health is %q, want %q in it", n.broken(), w)
			}
		}
		return ""
	})
}

// own is the node's prefixes in the state delivered last.
func (n *node) own() string { return fmt.Sprint(n.state().Local.Prefixes) }

func prefixes(s state.State) string {
	var list []string
	for _, p := range s.Peers {
		list = append(list, p.Prefix.String())
	}
	return strings.Join(list, " ")
}

// sink remembers what a store hands over.
type sink struct {
	mu     sync.Mutex
	states []state.State
	health []error
	at     []time.Time
}

func (s *sink) Deliver(st state.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states = append(s.states, st)
	s.at = append(s.at, time.Now())
}

func (s *sink) Health(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.health = append(s.health, err)
}

// state is the last one.
func (s *sink) state() state.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.states) == 0 {
		return state.State{}
	}
	return s.states[len(s.states)-1]
}

func (s *sink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.states)
}

// broken is the health told last; "" when it is good.
func (s *sink) broken() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.health) == 0 {
		return "(none)"
	}
	if err := s.health[len(s.health)-1]; err != nil {
		return err.Error()
	}
	return ""
}

// everBroken lists what the health has said, each text once.
func (s *sink) everBroken() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []string
	seen := map[string]bool{}
	for _, err := range s.health {
		if err != nil && !seen[err.Error()] {
			seen[err.Error()] = true
			list = append(list, err.Error())
		}
	}
	return list
}

// record is a log.
type record struct {
	mu   sync.Mutex
	text strings.Builder
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

// relay stands between a store and etcd, and can be cut.
type relay struct {
	address string
	mu      sync.Mutex
	cut     bool
	conns   []net.Conn
}

// mustRelay starts a relay to an etcd.
func mustRelay(tb testing.TB, s *server) *relay {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(tb, err)
	tb.Cleanup(func() { l.Close() })
	r := &relay{address: l.Addr().String()}
	go r.serve(l, s.client)
	tb.Cleanup(r.sever)
	return r
}

// serve joins connections to etcd until l is closed.
func (r *relay) serve(l net.Listener, etcd string) {
	for {
		near, err := l.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", etcd)
		if err != nil {
			near.Close()
			continue
		}
		r.mu.Lock()
		if r.cut {
			near.Close()
			far.Close()
		}
		r.conns = append(r.conns, near, far)
		r.mu.Unlock()
		for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
			go func() {
				io.Copy(way[0], way[1])
				way[0].Close()
				way[1].Close()
			}()
		}
	}
}

// sever cuts all connections, and those to come.
func (r *relay) sever() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = true
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

// mend lets new connections through.
func (r *relay) mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = false
}

// through has a store use the relay.
func (r *relay) through(o *Options) { o.Endpoints = []string{"http://" + r.address} }

// eventually waits until check has nothing to complain of.
func eventually(tb testing.TB, check func() string) {
	tb.Helper()
	var last string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if last = check(); last == "" {
			return
		}
	}
	tb.Fatal("not within twenty seconds: " + last)
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// parsed reads a lease as its node's peers do.
func parsed(tb testing.TB, key string, value string) flannel.Lease {
	tb.Helper()
	l, err := flannel.ParseLease(key, []byte(value))
	must(tb, err)
	return l
}
