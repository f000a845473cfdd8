//go:build linux && peers

package etcd

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/dataplane/state"
)

func TestFirstLease(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.244.7.0-24", value(7))
	o := offer(1)
	o.MAC = state.MAC{2, 0, 0, 0, 0, 1}
	n := start(t, sharedEtcd(t), o)

	all := h.leases()
	delete(all, "10.244.7.0-24")
	if len(all) != 1 {
		t.Fatalf("leases: %v", all)
	}
	got := n.state()
	key := strings.Replace(got.Local.Prefixes[0].String(), "/", "-", 1)
	if all[key].value != value(1) {
		t.Errorf("key %s has the value %s, want %s", key, all[key].value, value(1))
	}
	if ttl := h.ttl(all[key].bound); ttl < leaseTTL-time.Minute || ttl > leaseTTL {
		t.Errorf("the lease lives for %s", ttl)
	}
	want := state.State{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, VNI: 1, Port: 8472,
		Local: state.Local{
			Node: "192.0.2.1", Prefixes: got.Local.Prefixes, Uplink: "eth0",
			Address: o.Address, PublicIP: o.PublicIP, MAC: o.MAC,
		},
		Peers: []state.Peer{{
			Node: "192.0.2.7", Prefix: netip.MustParsePrefix("10.244.7.0/24"),
			PublicIP: netip.MustParseAddr("192.0.2.7"), MAC: state.MAC{2, 0, 0, 0, 0, 7},
		}},
	}
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("state\n%+v, want\n%+v", got, want)
	}
	if p := got.Local.Prefixes[0]; p.Bits() != 24 || p.Addr().Less(netip.MustParseAddr("10.244.1.0")) || netip.MustParseAddr("10.244.255.0").Less(p.Addr()) {
		t.Errorf("prefix %s", p)
	}
}

func TestNewMACIsOneThatADeviceCanHave(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	key, lease := h.lease()
	mac := n.state().Local.MAC
	if mac.IsZero() || mac[0]&3 != 2 {
		t.Errorf("MAC %s", mac)
	}
	if parsed(t, key, lease.value).MAC != mac {
		t.Errorf("the state has %s, the lease is %s", mac, lease.value)
	}
}

func TestRestartKeepsTheLeaseAndWritesNothing(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	before := n.state()
	key, lease := h.lease()
	n.stop()
	if k, l := h.lease(); k != key || l != lease {
		t.Fatalf("stopping changed %s %v to %s %v", key, lease, k, l)
	}
	again := offer(1)
	again.MAC = state.MAC{2, 0, 0, 0, 0, 99} // the device has been deleted and has another one now
	n = start(t, sharedEtcd(t), again)
	if got := n.state(); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("state\n%+v, before the restart\n%+v", got, before)
	}
	if k, l := h.lease(); k != key || l != lease {
		t.Errorf("starting again changed %s %v to %s %v", key, lease, k, l)
	}
}

// flanneld leaves a lease with its own etcd lease; a short one is not enough.
func TestLeaseOfAnotherProgramIsTakenOver(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	bound := h.bound(time.Hour)
	h.put("subnets/10.244.9.0-24", strings.Replace(value(1), "02:00:00:00:00:01", "02:00:00:00:00:aa", 1), withLease(bound))
	n := start(t, sharedEtcd(t), offer(1))
	if n.own() != "[10.244.9.0/24]" || n.state().Local.MAC != (state.MAC{2, 0, 0, 0, 0, 0xaa}) {
		t.Errorf("own %s, MAC %s", n.own(), n.state().Local.MAC)
	}
	_, lease := h.lease()
	if ttl := h.ttl(lease.bound); lease.bound == bound || ttl < leaseTTL-time.Minute {
		t.Errorf("the lease lives for %s", ttl)
	}
}

func TestOtherBackendsLeaseIsRewritten(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.244.9.0-24", `{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}`)
	o := offer(1)
	o.MAC = state.MAC{2, 0, 0, 0, 0, 1}
	n := start(t, sharedEtcd(t), o)
	if _, lease := h.lease(); n.own() != "[10.244.9.0/24]" || lease.value != value(1) {
		t.Errorf("own %s, lease %s", n.own(), lease.value)
	}
}

// Flannel finds its lease by the public IP, whatever its data are.
func TestLeaseWithBrokenDataIsRewritten(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.244.9.0-24", `{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"x"}}`)
	o := offer(1)
	o.MAC = state.MAC{2, 0, 0, 0, 0, 1}
	n := start(t, sharedEtcd(t), o)
	if _, lease := h.lease(); n.own() != "[10.244.9.0/24]" || lease.value != value(1) {
		t.Errorf("own %s, lease %s", n.own(), lease.value)
	}
}

// What a peer says wrongly of one family does not harm the other.
func TestPeerWithOneBrokenFamily(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), dualNetwork)
	h.put("subnets/10.244.9.0-24&fd00:10:244:9::-64", `{"PublicIP":"192.0.2.9","PublicIPv6":"nonsense","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}`)
	n := start(t, sharedEtcd(t), dualOffer(1))
	n.hasPeers(t, "10.244.9.0/24")
}

func TestPrefixOfSubnetEnv(t *testing.T) {
	t.Parallel()
	previous := func(p string) func(*Options) {
		return func(o *Options) { o.Previous = []netip.Prefix{netip.MustParsePrefix(p)} }
	}
	for name, c := range map[string]struct {
		previous string
		again    bool
	}{
		"free":              {"10.244.33.1/24", true},
		"taken":             {"10.244.44.1/24", false},
		"outside":           {"10.99.33.1/24", false},
		"of another length": {"10.244.33.1/25", false},
		"the unused first":  {"10.244.0.1/24", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := mustHand(t, sharedEtcd(t), network)
			h.put("subnets/10.244.44.0-24", value(44))
			n := start(t, sharedEtcd(t), offer(1), previous(c.previous))
			if again := n.state().Local.Prefixes[0] == netip.MustParsePrefix(c.previous).Masked(); again != c.again {
				t.Errorf("before %s, now %s", c.previous, n.own())
			}
		})
	}
}

func TestManyNodesAtOnce(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		config string
		nodes  int
	}{
		// 31 prefixes, all of them within what each node chooses from.
		"IPv4": {`{"Network": "10.244.0.0/24", "SubnetLen": 29, "Backend": {"Type": "vxlan"}}`, 20},
		// The key of both families does not keep others from half of it.
		"both families": {`{"Network": "10.244.0.0/24", "SubnetLen": 29, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",
			"IPv6SubnetLen": 53, "Backend": {"Type": "vxlan"}}`, 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := ownEtcd(t, "http")
			h := mustHand(t, s, c.config)
			var stores []*Store
			var logs []*record
			for range c.nodes {
				store, log := mustOpen(t, s)
				stores, logs = append(stores, store), append(logs, log)
			}
			var nodes []*node
			for i := range c.nodes {
				nodes = append(nodes, begin(t, stores[i], logs[i], dualOffer(i+1)))
			}
			var taken []netip.Prefix
			for _, n := range nodes {
				n.ready(t)
				n.isWell(t)
				for _, p := range n.state().Local.Prefixes {
					for _, other := range taken {
						if p.Overlaps(other) {
							t.Errorf("two nodes have %s and %s", p, other)
						}
					}
					taken = append(taken, p)
				}
			}
			if all := h.leases(); len(all) != c.nodes {
				t.Errorf("%d leases", len(all))
			}
			if all, err := h.Leases(t.Context()); err != nil || len(all.Leases) != c.nodes {
				t.Errorf("races that were lost have left leases behind in etcd: %v %v", all, err)
			}
			each := len(taken) / c.nodes
			for _, n := range nodes {
				eventually(t, func() string {
					if got := len(n.state().Peers); got != (c.nodes-1)*each {
						return fmt.Sprintf("%d peers", got)
					}
					return ""
				})
			}
		})
	}
}

// Nodes of both families that choose at the same moment may choose the same
// IPv4 prefix with different IPv6 prefixes, that is different keys.
func TestHalfOfANewLeaseIsAnothers(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), dualNetwork)
	const theirs = "10.244.33.0-24&fd00:10:244:33::-64"
	h.put("subnets/"+theirs, value(33))
	store, log := mustOpen(t, sharedEtcd(t))
	// The same as theirs in IPv4, as if it had been chosen before theirs was
	// written.
	h.put("subnets/10.244.33.0-24&fd00:10:244:1::-64", strings.Replace(value(1), "null", `"2001:db8::1"`, 1))
	store.created = "10.244.33.0-24&fd00:10:244:1::-64"
	store.Announce(dualOffer(1))
	ss := mustSession(t, store)
	if p := ss.own.prefixes[0].String(); p == "10.244.33.0/24" || len(h.leases()) != 2 || h.leases()[theirs].value != value(33) {
		t.Errorf("own %s, leases %v\n%s", p, h.leases(), log)
	}
}

func TestNoPrefixIsFree(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), `{"Network": "10.244.0.0/28", "SubnetLen": 30, "Backend": {"Type": "vxlan"}}`)
	for i := 1; i <= 3; i++ {
		h.put(fmt.Sprintf("subnets/10.244.0.%d-30", 4*i), value(i+10))
	}
	store, log := mustOpen(t, sharedEtcd(t))
	n := begin(t, store, log, offer(1))
	n.says(t, "no /30 from 10.244.0.4 to 10.244.0.12 is free", "3 prefixes leased", "delete the leases of nodes that are gone", h.prefix+"/subnets/")
	if n.count() != 0 {
		t.Error("a state was delivered without a lease")
	}
	h.delete("subnets/10.244.0.8-30")
	n.ready(t)
	n.isWell(t)
	if n.own() != "[10.244.0.8/30]" {
		t.Errorf("own %s", n.own())
	}
}

func TestLeaseThatDoesNotFitIsGivenUp(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.99.1.0-24", value(1))
	n := start(t, sharedEtcd(t), offer(1))
	if key, _ := h.lease(); key == "10.99.1.0-24" || !strings.Contains(n.log.String(), "does not fit") {
		t.Errorf("lease %s\n%s", key, n.log)
	}
}

func TestIPv6IsTurnedOn(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), dualNetwork)
	h.put("subnets/10.244.9.0-24", value(1))
	n := start(t, sharedEtcd(t), dualOffer(1))
	key, lease := h.lease()
	if !strings.HasPrefix(key, "10.244.9.0-24&fd00:10:244:") {
		t.Errorf("key %s", key)
	}
	got := n.state().Local
	want := fmt.Sprintf(`{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"%s"}}`, got.MACv6)
	if lease.value != want {
		t.Errorf("value %s, want %s", lease.value, want)
	}
	if got.PublicIPv6.String() != "2001:db8::1" || got.AddressV6.String() != "2001:db8::1" || len(got.Prefixes) != 2 || got.MACv6.IsZero() {
		t.Errorf("local part %+v", got)
	}
}

func TestIPv6IsTurnedOff(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.244.9.0-24&fd00:10:244:9::-64", strings.Replace(value(1), "null", `"2001:db8::1"`, 1))
	start(t, sharedEtcd(t), dualOffer(1))
	if key, _ := h.lease(); key != "10.244.9.0-24" {
		t.Errorf("key %s", key)
	}
}

func TestIPv6Alone(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48", "Backend": {"Type": "vxlan"}}`)
	var nodes []*node
	for i := range 2 {
		o := dualOffer(i + 1)
		o.PublicIP, o.Address = netip.Addr{}, netip.Addr{}
		nodes = append(nodes, start(t, sharedEtcd(t), o))
	}
	for i, n := range nodes {
		n.hasPeers(t, nodes[1-i].state().Local.Prefixes[0].String())
		if got := n.state().Local; got.PublicIP.IsValid() || !got.MAC.IsZero() || got.MACv6.IsZero() || got.Node != got.PublicIPv6.String() {
			t.Errorf("local part %+v", got)
		}
	}
	for key := range h.leases() {
		if !strings.HasPrefix(key, "0.0.0.0-0&fd00:10:244:") {
			t.Errorf("key %s", key)
		}
	}
}

func TestNodeLacksAFamily(t *testing.T) {
	t.Parallel()
	mustHand(t, sharedEtcd(t), dualNetwork)
	store, log := mustOpen(t, sharedEtcd(t))
	n := begin(t, store, log, offer(1))
	n.says(t, "the network has IPv6 but this node has no IPv6 address", `"eth0"`, "--public-ipv6")
	store.Announce(dualOffer(1))
	n.ready(t)
	n.isWell(t)
}

func TestAddressIsGoneForAWhile(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	n.watches(t, h)
	before := n.state()
	n.store.Announce(controlplane.Offer{Uplink: "eth0"})
	n.says(t, "this node has no IPv4 address", `"eth0"`, "--public-ip")
	h.put("subnets/10.244.0.0-30", value(3))
	n.hasPeers(t, "10.244.0.0/30")
	if got := n.state().Local; fmt.Sprint(got) != fmt.Sprint(before.Local) {
		t.Errorf("local part %+v, was %+v", got, before.Local)
	}
	n.store.Announce(offer(1))
	n.isWell(t)
}

func TestReservationStaysOne(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	h.put("subnets/10.244.9.0-24", `{"PublicIP":"192.0.2.1"}`)
	o := offer(1)
	o.MAC = state.MAC{2, 0, 0, 0, 0, 1}
	n := start(t, sharedEtcd(t), o)
	key, lease := h.lease()
	if key != "10.244.9.0-24" || lease.value != value(1) || lease.bound != 0 {
		t.Errorf("lease %s %v", key, lease)
	}
	if n.store.held.bound != 0 || n.own() != "[10.244.9.0/24]" {
		t.Errorf("own %s", n.own())
	}
}

func TestAddressChanges(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	key, lease := h.lease()
	mac := n.state().Local.MAC
	moved := offer(2)
	moved.Uplink, moved.MAC = "eth1", state.MAC{2, 0, 0, 0, 0, 99}
	n.store.Announce(moved)
	eventually(t, func() string {
		if got := n.state().Local; got.PublicIP != moved.PublicIP || got.Uplink != "eth1" || got.MAC != mac {
			return fmt.Sprintf("local part %+v", got)
		}
		k, l := h.lease()
		if got := parsed(t, k, l.value); k != key || got.PublicIP != moved.PublicIP || got.MAC != mac || l.bound != lease.bound {
			return fmt.Sprintf("lease %s %v, was %s %v", k, l, key, lease)
		}
		return ""
	})
	if len(n.everBroken()) > 0 {
		t.Errorf("health: %q", n.everBroken())
	}
}

// The address changes while etcd is away, and when it is back the leases have to
// be listed again: ours has the old one.
func TestAddressChangesUnseen(t *testing.T) {
	t.Parallel()
	s := sharedEtcd(t)
	h := mustHand(t, s, network)
	store, _ := mustOpen(t, s)
	store.Announce(offer(1))
	mustSession(t, store)
	key, _ := h.lease()
	h.put("subnets/10.244.250.0-24", value(250))
	store.Announce(offer(2))
	mustSession(t, store)
	all := h.leases()
	if len(all) != 2 || parsed(t, key, all[key].value).PublicIP != offer(2).PublicIP {
		t.Errorf("leases %v, ours was %s", all, key)
	}
}

// mustSession has a store acquire its lease over a new connection.
func mustSession(tb testing.TB, store *Store) *session {
	tb.Helper()
	ctx := tb.Context()
	client, err := store.connect(ctx)
	must(tb, err)
	tb.Cleanup(func() { client.Close() })
	must(tb, store.configure(ctx, client, &sink{}))
	ss := &session{Store: store, client: client, sink: &sink{}}
	must(tb, ss.acquire(ctx))
	return ss
}

func TestRenewing(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	store, log := mustOpen(t, sharedEtcd(t))
	store.timing.TTL, store.timing.Margin = 4*time.Second, 2*time.Second
	n := begin(t, store, log, offer(1))
	n.ready(t)
	key, lease := h.lease()
	for began := time.Now(); time.Since(began) < 6*time.Second; time.Sleep(100 * time.Millisecond) {
		if ttl := h.ttl(lease.bound); ttl < time.Second {
			t.Fatalf("the lease has %s left", ttl)
		}
	}
	if k, l := h.lease(); k != key || l != lease {
		t.Errorf("renewing changed %s %v to %s %v", key, lease, k, l)
	}
	if len(n.everBroken()) > 0 || n.count() != 1 {
		t.Errorf("%d states, health %q", n.count(), n.everBroken())
	}
}

// A flanneld that is started in our place writes the same value with an etcd
// lease of its own. Ours must not run out on the key then, nor theirs.
func TestLeaseIsBoundAnew(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	key, lease := h.lease()
	bound := h.bound(time.Hour)
	must(t, slept(1100*time.Millisecond))
	h.put("subnets/"+key, lease.value, withLease(bound))
	eventually(t, func() string {
		if ttl := h.ttl(bound); ttl < time.Hour-time.Second {
			return fmt.Sprintf("the new lease was not renewed: %s", ttl)
		}
		return ""
	})
	if len(n.everBroken()) > 0 {
		t.Errorf("health: %q", n.everBroken())
	}
}

func TestLeaseIsDeleted(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	key, lease := h.lease()
	h.delete("subnets/" + key)
	eventually(t, func() string {
		if all := h.leases(); all[key].value != lease.value {
			return fmt.Sprint(all)
		}
		return ""
	})
	n.isWell(t)
	if said := n.everBroken(); len(said) != 1 || !strings.Contains(said[0], key+", has been deleted") {
		t.Errorf("health: %q", said)
	}
	if n.count() != 1 {
		t.Errorf("%d states were delivered, and they are the same", n.count())
	}
}

func TestLeaseIsTakenByAnotherNode(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	key, _ := h.lease()
	before := n.own()
	h.put("subnets/"+key, value(2))
	eventually(t, func() string {
		if n.own() == before {
			return "still " + before
		}
		return ""
	})
	n.isWell(t)
	n.hasPeers(t, strings.Trim(before, "[]"))
	if all := h.leases(); len(all) != 2 || all[key].value != value(2) {
		t.Errorf("leases %v", all)
	}
	if log := n.log.String(); !strings.Contains(log, "its pods have to be started again") || !strings.Contains(log, "taken-by=192.0.2.2") {
		t.Errorf("log:\n%s", log)
	}
	if said := n.everBroken(); len(said) != 1 || !strings.Contains(said[0], "rewritten by somebody else: "+value(2)) {
		t.Errorf("health: %q", said)
	}
}

func TestLeaseIsRewrittenInOurName(t *testing.T) {
	t.Parallel()
	h := mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	key, lease := h.lease()
	h.put("subnets/"+key, value(1), withLease(lease.bound))
	eventually(t, func() string {
		if _, l := h.lease(); l.value != lease.value {
			return l.value
		}
		return ""
	})
	n.isWell(t)
	if n.count() != 1 {
		t.Errorf("%d states were delivered", n.count())
	}
}

// expire runs a node whose lease expires while the node is cut off, lets
// meanwhile happen, and lets it back.
func expire(t *testing.T, meanwhile func(h *hand, key string)) (*hand, *node, string) {
	t.Helper()
	h := mustHand(t, sharedEtcd(t), network)
	r := mustRelay(t, sharedEtcd(t))
	store, log := mustOpen(t, sharedEtcd(t), r.through)
	store.timing.TTL, store.timing.Margin = 2*time.Second, time.Second
	n := begin(t, store, log, offer(1))
	n.ready(t)
	key, _ := h.lease()
	r.sever()
	eventually(t, func() string {
		if all := h.leases(); len(all) > 0 {
			return fmt.Sprint(all)
		}
		return ""
	})
	meanwhile(h, key)
	r.mend()
	n.isWell(t)
	return h, n, key
}

func TestLeaseExpiresWhileEtcdIsAway(t *testing.T) {
	t.Parallel()
	h, n, key := expire(t, func(*hand, string) {})
	eventually(t, func() string {
		if _, ok := h.leases()[key]; !ok {
			return fmt.Sprintf("%v without %s", h.leases(), key)
		}
		return ""
	})
	if n.count() != 1 {
		t.Errorf("%d states were delivered", n.count())
	}
}

func TestExpiredLeaseIsTakenByAnotherNode(t *testing.T) {
	t.Parallel()
	_, n, key := expire(t, func(h *hand, key string) { h.put("subnets/"+key, value(2)) })
	prefix := strings.Replace(key, "-", "/", 1)
	n.hasPeers(t, prefix)
	if n.own() == "["+prefix+"]" {
		t.Errorf("own %s", n.own())
	}
}

func TestDeadlineCountsBothClocks(t *testing.T) {
	timing := timing{Margin: time.Hour}
	now := time.Now()
	d := timing.renewal(now, 24*time.Hour)
	if left := d.Left(now); left > 23*time.Hour || left < 22*time.Hour+50*time.Minute {
		t.Errorf("%s left", left)
	}
	// The machine slept: only the time of day went on.
	if left := d.Left(now.Round(0).Add(23 * time.Hour)); left > 0 {
		t.Errorf("after a sleep %s left", left)
	}
	if left := d.Left(now.Add(23 * time.Hour)); left > 0 {
		t.Errorf("after 23 hours %s left", left)
	}
	if left := timing.renewal(now, time.Hour).Left(now); left > 31*time.Minute || left < 20*time.Minute {
		t.Errorf("a lease shorter than the margin has %s left", left)
	}
}

// Announcing goes on while the store runs.
func TestAnnouncingFromEverywhere(t *testing.T) {
	t.Parallel()
	mustHand(t, sharedEtcd(t), network)
	n := start(t, sharedEtcd(t), offer(1))
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() { n.store.Announce(offer(i + 1)) })
	}
	all.Wait()
	n.store.Announce(offer(20))
	eventually(t, func() string {
		if got := n.state().Local.PublicIP; got != offer(20).PublicIP {
			return got.String()
		}
		return ""
	})
}
