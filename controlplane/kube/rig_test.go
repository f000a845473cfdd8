//go:build linux && peers

package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// rig is a store that runs against the shared cluster, and all that it says and
// asks.
type rig struct {
	t     *testing.T
	store *Store
	sink  *sink
	gate  *gate
	log   *logs
	stop  func()
}

// Where the tests' nodes are.
const (
	me       = "node-1"
	singleV4 = `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`
	dual     = `{"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","EnableIPv6":true,"Backend":{"Type":"vxlan"}}`
	prefix   = "flannel.alpha.coreos.com/"
)

// ourOffer is what the node under test offers.
func ourOffer() controlplane.Offer {
	return controlplane.Offer{
		Uplink: "eth0", UplinkMTU: 1500,
		Address: netip.MustParseAddr("192.0.2.11"), PublicIP: netip.MustParseAddr("192.0.2.11"),
		AddressV6: netip.MustParseAddr("2001:db8::11"), PublicIPv6: netip.MustParseAddr("2001:db8::11"),
	}
}

// empty removes all Nodes.
func empty(t *testing.T) {
	t.Helper()
	shared.must(t, http.MethodDelete, "/api/v1/nodes", nil, nil)
}

// configOf reads a net-conf.json.
func configOf(t *testing.T, text string) flannel.Config {
	t.Helper()
	c, err := flannel.ParseConfig([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// optionsFor are those of a node that shows a service account's token.
func optionsFor(t *testing.T, netconf, token string) (o Options, tokenFile string) {
	t.Helper()
	tokenFile = filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	return Options{
		Node: me, Kubeconfig: shared.kubeconfig(t, tokenFile), Config: configOf(t, netconf),
		SetNodeNetworkUnavailable: true, Version: "test", Log: slog.New(slog.DiscardHandler),
	}, tokenFile
}

// newRig opens a store, which does not run yet.
func newRig(t *testing.T, netconf string) *rig {
	t.Helper()
	o, _ := optionsFor(t, netconf, shared.token(t, "weft"))
	return newRigOf(t, o)
}

// newRigOf does so with other options.
func newRigOf(t *testing.T, o Options) *rig {
	t.Helper()
	l := &logs{}
	o.Log = slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelInfo}))
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	s.timing.Backoff.Cap, s.timing.Gap = time.Second, 50*time.Millisecond // tests don't wait for minutes
	r := &rig{t: t, store: s, sink: newSink(), gate: &gate{next: s.client.rest.Client.Transport}, log: l}
	s.client.rest.Client.Transport = r.gate
	return r
}

// run announces the offer and runs the store until stop or the test's end.
func (r *rig) run(o controlplane.Offer) *rig {
	r.t.Helper()
	r.store.Announce(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.store.Run(ctx, r.sink) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				r.t.Errorf("Run: %v", err)
			}
		case <-time.After(10 * time.Second):
			r.t.Error("Run does not end within ten seconds")
		}
	})
	r.t.Cleanup(func() {
		r.stop()
		if r.t.Failed() {
			asked := r.gate.asked()
			r.t.Logf("log:\n%sthe last of %d requests:\n%s", r.log, len(asked), strings.Join(asked[max(0, len(asked)-20):], "\n"))
		}
	})
	return r
}

// start makes a store and runs it.
func start(t *testing.T, netconf string) *rig {
	t.Helper()
	return newRig(t, netconf).run(ourOffer())
}

// waitState waits for a state that is as wanted, and returns it.
func (r *rig) waitState(what string, as func(state.State) bool) state.State {
	r.t.Helper()
	var got state.State
	r.wait(what, func() bool {
		s, ok := r.sink.last()
		got = s
		return ok && as(s)
	})
	return got
}

// waitPeers waits until the peers are these, as text.
func (r *rig) waitPeers(want ...string) {
	r.t.Helper()
	text := strings.Join(want, "\n")
	r.waitState("peers:\n"+text, func(s state.State) bool { return peersText(s) == text })
}

// waitHealth waits until Health has all the words, or is well without any.
func (r *rig) waitHealth(words ...string) {
	r.t.Helper()
	r.wait(fmt.Sprintf("health %q", words), func() bool {
		err, ok := r.sink.healthNow()
		if !ok || (err == nil) != (len(words) == 0) {
			return false
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				return false
			}
		}
		return true
	})
}

// wait waits for something to become true.
func (r *rig) wait(what string, is func() bool) {
	r.t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			s, _ := r.sink.last()
			health, _ := r.sink.healthNow()
			r.t.Fatalf("waited in vain for %s\nlast state of %d: %+v\nwith %d peers: %.2000s\nhealth: %v",
				what, r.sink.delivered(), s.Local, len(s.Peers), peersText(s), health)
		}
	}
}

// remains checks for a while that something stays true.
func (r *rig) remains(what string, is func() bool) {
	r.t.Helper()
	for end := time.Now().Add(400 * time.Millisecond); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if !is() {
			r.t.Fatalf("%s: not any more", what)
		}
	}
}

// waitNode waits until a Node is as wanted.
func (r *rig) waitNode(name, what string, as func(nodeJSON) bool) nodeJSON {
	r.t.Helper()
	var n nodeJSON
	r.wait(what, func() bool { n = getNode(r.t, name); return as(n) })
	return n
}

// peersText writes peers one a line.
func peersText(s state.State) string {
	var lines []string
	for _, p := range s.Peers {
		lines = append(lines, fmt.Sprintf("%s %s %s %s", p.Node, p.Prefix, p.PublicIP, p.MAC))
	}
	return strings.Join(lines, "\n")
}

// sink keeps what a store says.
type sink struct {
	mu     sync.Mutex
	state  *state.State
	number int
	at     time.Time // of the last
	health []error
}

func newSink() *sink { return &sink{} }

func (s *sink) Deliver(x state.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state, s.at = &x, time.Now()
	s.number++
}

func (s *sink) Health(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.health = append(s.health, err)
}

// last is the state delivered last.
func (s *sink) last() (state.State, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == nil {
		return state.State{}, false
	}
	return *s.state, true
}

// healthNow is the health told last.
func (s *sink) healthNow() (error, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.health) == 0 {
		return nil, false
	}
	return s.health[len(s.health)-1], true
}

// delivered counts the deliveries.
func (s *sink) delivered() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.number
}

// gate stands between a store and the API: it notes requests, and may refuse
// them.
type gate struct {
	next http.RoundTripper

	mu       sync.Mutex
	requests []string
	shut     bool
	// answer may answer in the API's place.
	answer func(*http.Request) *http.Response
	open   map[io.Closer]bool
	// answers are the methods asked with and the types of content got.
	answers []string
}

// RoundTrip implements http.RoundTripper.
func (g *gate) RoundTrip(q *http.Request) (*http.Response, error) {
	g.mu.Lock()
	g.requests = append(g.requests, q.Method+" "+q.URL.Path+"?"+q.URL.RawQuery)
	shut, answer := g.shut, g.answer
	g.mu.Unlock()
	if shut {
		return nil, fmt.Errorf("dial tcp: %w", os.NewSyscallError("connect", syscall.ECONNREFUSED))
	}
	if answer != nil {
		if a := answer(q); a != nil {
			return a, nil
		}
	}
	a, err := g.next.RoundTrip(q)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == nil {
		g.open = map[io.Closer]bool{}
	}
	g.open[a.Body] = true
	g.answers = append(g.answers, q.Method+" "+a.Header.Get("Content-Type"))
	return a, nil
}

// close cuts all connections and refuses new ones.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = true
	for body := range g.open {
		body.Close()
	}
	g.open = nil
}

// reopen lets requests through again.
func (g *gate) reopen() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = false
}

// asked are the requests so far.
func (g *gate) asked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.requests...)
}

// got are the answers so far.
func (g *gate) got() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.answers...)
}

// count counts the requests whose text contains all words.
func (g *gate) count(words ...string) int {
	n := 0
next:
	for _, q := range g.asked() {
		for _, w := range words {
			if !strings.Contains(q, w) {
				continue next
			}
		}
		n++
	}
	return n
}

// logs keeps log lines.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String gives all lines.
func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// nodeJSON is what the tests read of a Node.
type nodeJSON struct {
	Metadata struct {
		Annotations     map[string]string
		Labels          map[string]string
		ResourceVersion string
	}
	Spec   struct{ PodCIDR string }
	Status struct {
		Conditions []struct {
			Type, Status, Reason, Message string
		}
	}
}

// flannels are the annotations with flannel's prefix, without it.
func (n nodeJSON) flannels() map[string]string {
	some := map[string]string{}
	for k, v := range n.Metadata.Annotations {
		if short, ok := strings.CutPrefix(k, prefix); ok {
			some[short] = v
		}
	}
	return some
}

// network is the condition NetworkUnavailable as text.
func (n nodeJSON) network() string {
	for _, c := range n.Status.Conditions {
		if c.Type == "NetworkUnavailable" {
			return c.Status + " " + c.Reason + ": " + c.Message
		}
	}
	return ""
}

// getNode reads a Node.
func getNode(t *testing.T, name string) (n nodeJSON) {
	t.Helper()
	shared.must(t, http.MethodGet, "/api/v1/nodes/"+name, nil, &n)
	return n
}

// makeNode creates a Node with podCIDRs and, if there are any, annotations of
// flannel, whose prefix is left out.
func makeNode(t *testing.T, name string, podCIDRs []string, annotations map[string]string, addresses ...string) {
	t.Helper()
	meta := object{"name": name}
	if annotations != nil {
		full := object{}
		for k, v := range annotations {
			full[prefix+k] = v
		}
		meta["annotations"] = full
	}
	spec := object{}
	if len(podCIDRs) > 0 {
		spec = object{"podCIDR": podCIDRs[0], "podCIDRs": podCIDRs}
	}
	var status []object
	for _, a := range addresses {
		status = append(status, object{"type": "InternalIP", "address": a})
	}
	shared.must(t, http.MethodPost, "/api/v1/nodes", object{"metadata": meta, "spec": spec, "status": object{"addresses": status}}, nil)
}

// deleteNode deletes one.
func deleteNode(t *testing.T, name string) {
	t.Helper()
	shared.must(t, http.MethodDelete, "/api/v1/nodes/"+name, nil, nil)
}

// annotate changes annotations of flannel; nil removes one.
func annotate(t *testing.T, name string, annotations map[string]any) {
	t.Helper()
	full := object{}
	for k, v := range annotations {
		full[prefix+k] = v
	}
	shared.must(t, http.MethodPatch, "/api/v1/nodes/"+name, object{"metadata": object{"annotations": full}}, nil)
}

// setStatus changes a Node's status.
func setStatus(t *testing.T, name string, status object) {
	t.Helper()
	shared.must(t, http.MethodPatch, "/api/v1/nodes/"+name+"/status", object{"status": status}, nil)
}

// flannelNode are the annotations of a stock flannel node.
func flannelNode(publicIP, mac string) map[string]string {
	return map[string]string{
		"backend-data": fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, mac), "backend-type": "vxlan",
		"kube-subnet-manager": "true", "public-ip": publicIP,
	}
}

// flannelDual are those of one with IPv6 too.
func flannelDual(publicIP, mac, publicIPv6, macV6 string) map[string]string {
	a := flannelNode(publicIP, mac)
	a["backend-v6-data"] = fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, macV6)
	a["public-ipv6"] = publicIPv6
	return a
}

var errAway *Away

// isAway tells whether an error says that the API is away.
func isAway(err error) bool { return errors.As(err, &errAway) }
