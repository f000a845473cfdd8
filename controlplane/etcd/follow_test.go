//go:build linux && peers

package etcd

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func withLease(id clientv3.LeaseID) clientv3.OpOption { return clientv3.WithLease(id) }

func slept(d time.Duration) error {
	time.Sleep(d)
	return nil
}

func TestPeersComeChangeAndGo(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	own := func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")} }
	n := start(t, sharedEtcd(t), offer(1), own)
	h.put("subnets/10.244.3.0-24", value(3))
	n.hasPeers(t, "10.244.3.0/24")
	h.put("subnets/10.244.2.0-24", value(2))
	n.hasPeers(t, "10.244.2.0/24 10.244.3.0/24")
	h.put("subnets/10.244.3.0-24", value(4))
	eventually(t, func() string {
		if p := n.state().Peers[1]; p.PublicIP.String() != "192.0.2.4" || p.Node != "192.0.2.4" || p.MAC[5] != 4 {
			return fmt.Sprint(p)
		}
		return ""
	})
	h.delete("subnets/10.244.2.0-24")
	n.hasPeers(t, "10.244.3.0/24")
	if len(n.everBroken()) > 0 {
		t.Errorf("health: %q", n.everBroken())
	}
}

func TestHostileLeases(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.244.5.0-24", value(5))
	own := func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")} }
	n := start(t, sharedEtcd(t), offer(1), own)
	var puts []clientv3.Op
	for key, v := range map[string]string{
		"":                        "x",
		"10.244.20.0-24/":         value(20),
		"../10.244.21.0-24":       value(21),
		"10.244.22.0-24":          "",
		"10.244.23.0-24":          `{"PublicIP":`,
		"10.244.24.0-24":          `{"PublicIP":"127.0.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}`,
		"10.244.25.0-24":          `{"PublicIP":"192.0.2.25","BackendType":"host-gw"}`,
		"10.244.26.0-24":          value(26) + strings.Repeat(" ", 1<<20),
		"10.244.1.128-25":         value(27), // half of ours
		"10.244.5.0-25":           value(28), // half of a peer's
		"10.244.0.0-16":           value(29), // everybody's
		"10.244.5.0-24&fd00::-64": value(30), // a peer's prefix under another key
		"10.99.1.0-24":            value(31), // outside
		"10.244.32.0-24":          value(1),  // in our name
		"10.244.33.0-24":          `{"PublicIP":"192.0.2.33","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}}`,
	} {
		puts = append(puts, clientv3.OpPut(h.prefix+"/subnets/"+key, v))
	}
	puts = append(puts, clientv3.OpPut(h.prefix+"/subnets/10.244.40.0-24", value(40)))
	_, err := h.Txn(t.Context()).Then(puts...).Commit()
	must(t, err)
	n.hasPeers(t, "10.244.5.0/24 10.244.33.0/24 10.244.40.0/24")
	if p := n.state().Peers[0]; p.PublicIP.String() != "192.0.2.5" {
		t.Errorf("10.244.5.0/24 went to %s", p.PublicIP)
	}
	if p := n.state().Peers[1]; !p.MAC.IsZero() || p.PublicIP.String() != "192.0.2.33" {
		t.Errorf("10.244.33.0/24 has broken data and went to %+v", p)
	}
	log := n.log.String()
	lines := strings.Count(log, "level=WARN")
	if lines != 11 || !strings.Contains(log, "/10.244.1.128-25 ") || !strings.Contains(log, "are not as they should be\" number=4") {
		t.Errorf("log:\n%s", log)
	}
	h.put("subnets/10.244.41.0-24", value(41))
	n.hasPeers(t, "10.244.5.0/24 10.244.33.0/24 10.244.40.0/24 10.244.41.0/24")
	if got := strings.Count(n.log.String(), "level=WARN"); got != lines {
		t.Errorf("said again:\n%s", n.log)
	}
	if len(n.everBroken()) > 0 || n.own() != "[10.244.1.0/24]" {
		t.Errorf("own %s, health: %q", n.own(), n.everBroken())
	}
}

func TestThousandsOfNodesAtOnce(t *testing.T) {
	const nodes, perTxn = 5000, 100
	h := mustHand(t, sharedEtcd(t), `{"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}`)
	own := func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix("10.255.1.0/24")} }
	n := start(t, sharedEtcd(t), offer(1), own)
	before := n.count()
	began := time.Now()
	for i := 0; i < nodes; i += perTxn {
		var puts []clientv3.Op
		for j := i + 1; j <= i+perTxn; j++ {
			key := fmt.Sprintf("%s/subnets/10.%d.%d.0-24", h.prefix, 100+j/250, j%250)
			puts = append(puts, clientv3.OpPut(key, fmt.Sprintf(
				`{"PublicIP":"198.18.%d.%d","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:%02x:%02x"}}`, j/250, j%250+1, j/250, j%250)))
		}
		_, err := h.Txn(t.Context()).Then(puts...).Commit()
		must(t, err)
	}
	written := time.Since(began)
	eventually(t, func() string {
		if got := len(n.state().Peers); got != nodes {
			return fmt.Sprintf("%d peers", got)
		}
		return ""
	})
	deliveries := n.count() - before
	t.Logf("%d leases: written within %s, the last delivered after %s, in %d states", nodes,
		written.Round(time.Millisecond), n.at[len(n.at)-1].Sub(began).Round(time.Millisecond), deliveries)
	if most := int(time.Since(began)/impatient().Patience) + 2; deliveries > most {
		t.Errorf("%d states were delivered, want %d at most", deliveries, most)
	}
	n.stop()
	began = time.Now()
	n = start(t, sharedEtcd(t), offer(1), own)
	t.Logf("a restart had all of them after %s, in %d states", time.Since(began).Round(time.Millisecond), n.count())
	if got := len(n.state().Peers); got != nodes || n.count() != 1 {
		t.Errorf("%d peers in the first of %d states", got, n.count())
	}
	before = n.count()
	_, err := h.Delete(t.Context(), h.prefix+"/subnets/10.1", clientv3.WithPrefix())
	must(t, err)
	n.hasPeers(t, "")
	if deliveries := n.count() - before; deliveries > 5 {
		t.Errorf("%d states for one deletion", deliveries)
	}
}

func TestEtcdIsDownAtStart(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	mustHand(t, s, network)
	s.kill()
	store, log := mustOpen(t, s)
	n := begin(t, store, log, offer(1))
	n.says(t, "connection refused", s.url)
	must(t, slept(500*time.Millisecond))
	if n.count() != 0 {
		t.Error("a state was delivered")
	}
	s.restart(t)
	n.ready(t)
	n.isWell(t)
	if said := n.everBroken(); len(said) > 2 {
		t.Errorf("health: %q", said)
	}
}

func TestEtcdIsRestarted(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	h := mustHand(t, s, network)
	h.put("subnets/10.244.2.0-24", value(2))
	own := func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")} }
	n := start(t, s, offer(1), own)
	n.watches(t, h)
	before := n.count()
	s.kill()
	n.says(t, s.client, "connection refused")
	must(t, slept(500*time.Millisecond))
	if n.count() != before {
		t.Errorf("%d states while etcd was away", n.count()-before)
	}
	s.restart(t)
	n.isWell(t)
	h.put("subnets/10.244.3.0-24", value(3))
	n.hasPeers(t, "10.244.2.0/24 10.244.3.0/24")
	if n.own() != "[10.244.1.0/24]" || strings.Contains(n.log.String(), "acquired") && strings.Count(n.log.String(), "acquired") != 1 {
		t.Errorf("own %s\n%s", n.own(), n.log)
	}
}

// What happens while a node is cut off is told by the watch when it is back,
// without listing everything again.
func TestWatchIsResumed(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.244.2.0-24", value(2))
	r := mustRelay(t, sharedEtcd(t))
	own := func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")} }
	n := start(t, sharedEtcd(t), offer(1), own, r.through)
	n.watches(t, h)
	r.sever()
	n.says(t, "at http://"+r.address)
	h.delete("subnets/10.244.2.0-24")
	h.put("subnets/10.244.3.0-24", value(3))
	r.mend()
	n.hasPeers(t, "10.244.3.0/24")
	n.isWell(t)
	for _, said := range n.everBroken() {
		if strings.Contains(said, "listing") {
			t.Errorf("health: %q", said)
		}
	}
}

func TestEtcdIsCompactedUnderAPausedWatch(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	h := mustHand(t, s, network)
	h.put("subnets/10.244.2.0-24", value(2))
	r := mustRelay(t, s)
	own := func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")} }
	n := start(t, s, offer(1), own, r.through)
	n.watches(t, h)
	r.sever()
	n.says(t, r.address)
	h.delete("subnets/10.244.2.0-24")
	h.put("subnets/10.244.3.0-24", value(3))
	h.compact()
	r.mend()
	n.hasPeers(t, "10.244.3.0/24")
	n.isWell(t)
	if !strings.Contains(n.log.String(), "compacted") || n.own() != "[10.244.1.0/24]" {
		t.Errorf("own %s\n%s", n.own(), n.log)
	}
	h.put("subnets/10.244.4.0-24", value(4))
	n.hasPeers(t, "10.244.3.0/24 10.244.4.0/24")
}

// An etcd without its data is behind the revision that the watch waits for, and
// would say nothing for long.
func TestEtcdHasLostItsData(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	h := mustHand(t, s, network)
	for i := 2; i < 50; i++ {
		h.put(fmt.Sprintf("subnets/10.244.%d.0-24", i), value(i))
	}
	own := func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")} }
	n := start(t, s, offer(1), own)
	n.watches(t, h)
	s.kill()
	n.says(t, s.client)
	s.forget(t)
	s.restart(t)
	h.put("subnets/10.244.99.0-24", value(99))
	n.hasPeers(t, "10.244.99.0/24")
	n.isWell(t)
	if _, ok := h.leases()["10.244.1.0-24"]; !ok {
		t.Errorf("leases %v", h.leases())
	}
	if !strings.Contains(n.log.String(), "configuration in etcd has changed") {
		t.Errorf("log:\n%s", n.log)
	}
}

// An etcd that was set back to what it was, with our lease in it, is behind that
// revision too.
func TestEtcdIsRestoredFromABackup(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	h := mustHand(t, s, network)
	n := start(t, s, offer(1))
	n.watches(t, h)
	s.kill()
	backup := filepath.Join(t.TempDir(), "backup")
	must(t, os.CopyFS(backup, os.DirFS(filepath.Join(s.dir, "data"))))
	s.restart(t)
	for i := 2; i < 20; i++ {
		h.put(fmt.Sprintf("subnets/10.243.%d.0-24", i), value(i))
	}
	n.watches(t, h)
	s.kill()
	n.says(t, s.client)
	s.forget(t)
	must(t, os.Rename(backup, filepath.Join(s.dir, "data")))
	s.restart(t)
	n.isWell(t)
	h.put("subnets/10.244.0.0-30", value(3))
	n.hasPeers(t, "10.244.0.0/30")
}

func TestChangesWithoutEndAreDelivered(t *testing.T) {
	timing := timing{Quiet: 50 * time.Millisecond, Patience: 250 * time.Millisecond}
	var c changes
	now := time.Now()
	for step := 0; !c.Due(timing, now); step++ {
		if c.Note(now); step > 10 {
			t.Fatal("they are put off for ever")
		}
		now = now.Add(30 * time.Millisecond)
	}
	c = changes{}
	if c.Due(timing, now) {
		t.Error("due without a change")
	}
	c.Note(now)
	if left := c.Left(timing, now); left != timing.Quiet {
		t.Errorf("%s left after one change", left)
	}
}

func TestEtcdHangs(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	h := mustHand(t, s, network)
	store, log := mustOpen(t, s)
	store.timing.KeepAlive, store.timing.Answer = 10*time.Second, time.Second // the client's least
	n := begin(t, store, log, offer(1))
	n.ready(t)
	n.watches(t, h)
	must(t, s.cmd.Process.Signal(syscall.SIGSTOP))
	n.says(t, s.url, "does not answer")
	must(t, s.cmd.Process.Signal(syscall.SIGCONT))
	n.isWell(t)
	h.put("subnets/10.244.0.0-30", value(3))
	n.hasPeers(t, "10.244.0.0/30")
}

func TestConfigurationIsMissingAtFirst(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), "")
	store, log := mustOpen(t, sharedEtcd(t))
	n := begin(t, store, log, offer(1))
	n.says(t, "etcdctl put "+h.prefix+"/config '{")
	h.put("config", network)
	n.ready(t)
	n.isWell(t)
	if said := n.everBroken(); len(said) != 1 {
		t.Errorf("health: %q", said)
	}
}

func TestConfigurationIsBroken(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), `{"Network": "10.244.0.0/16", "SubnetLen": 31, "Backend": {"Type": "host-gw"}}`)
	store, log := mustOpen(t, sharedEtcd(t))
	n := begin(t, store, log, offer(1))
	n.says(t, h.prefix+"/config", "host-gw", "SubnetLen")
	h.put("config", network)
	n.ready(t)
	n.isWell(t)
	if len(h.leases()) != 1 {
		t.Errorf("leases: %v", h.leases())
	}
}

// It can't change under running pods; whoever changes it is told so.
func TestConfigurationChanges(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	before := n.own()
	key, _ := h.lease()
	h.put("config", strings.Replace(network, "10.244", "10.99", 1))
	h.delete("subnets/" + key) // so that the leases are listed again
	eventually(t, func() string {
		if !strings.Contains(n.log.String(), "configuration in etcd has changed; restart") {
			return n.log.String()
		}
		return ""
	})
	n.isWell(t)
	if n.own() != before {
		t.Errorf("own %s, before %s", n.own(), before)
	}
	n.stop()
	n = start(t, sharedEtcd(t), offer(1))
	if !strings.HasPrefix(n.own(), "[10.99.") {
		t.Errorf("own %s after a restart", n.own())
	}
}

func TestStoppingWhileEtcdIsAway(t *testing.T) {
	t.Parallel()
	mustHand(t, sharedEtcd(t), network)
	r := mustRelay(t, sharedEtcd(t))
	n := start(t, sharedEtcd(t), offer(1), r.through)
	r.sever()
	n.says(t, r.address)
	began := time.Now()
	n.stop()
	if took := time.Since(began); took > time.Second {
		t.Errorf("stopping took %s", took)
	}
}

// A watch that etcd does not confirm is given up after a while.
func TestEtcdHangsBeforeTheWatch(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	mustHand(t, s, network)
	store, _ := mustOpen(t, s)
	store.timing.Answer = time.Second
	store.Announce(offer(1))
	ss := mustSession(t, store)
	must(t, s.cmd.Process.Signal(syscall.SIGSTOP))
	must(t, slept(100*time.Millisecond)) // its threads stop one by one
	failed := make(chan error, 1)
	go func() {
		_, err := ss.watch(t.Context())
		failed <- err
	}()
	select {
	case err := <-failed:
		if err == nil || !strings.Contains(err.Error(), "watching the leases") || !strings.Contains(err.Error(), "no answer from "+s.url) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("still waiting for etcd to confirm the watch")
	}
}

// flanneld's defaults are two endpoints, of which most often one is nobody's.
func TestOneOfTwoEndpointsIsDead(t *testing.T) {
	t.Parallel()
	mustHand(t, sharedEtcd(t), network)
	dead, err := freePort()
	must(t, err)
	n := start(t, sharedEtcd(t), offer(1), func(o *Options) { o.Endpoints = []string{"http://" + dead, " " + o.Endpoints[0]} })
	n.isWell(t)
	if said := n.everBroken(); len(said) > 0 {
		t.Errorf("health: %q", said)
	}
}
