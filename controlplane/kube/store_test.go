//go:build linux && peers

package kube

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// MACs of the tests' peers.
const (
	mac2   = "0a:58:0a:f4:02:00"
	mac3   = "0a:58:0a:f4:03:00"
	mac2v6 = "0e:58:0a:f4:02:00"
)

// peer2 is how peersText shows node-2 of most tests.
const peer2 = "node-2 10.244.2.0/24 192.0.2.12 " + mac2

// makeTwo makes this node's Node, and a flannel node.
func makeTwo(t *testing.T) {
	t.Helper()
	empty(t)
	makeNode(t, me, []string{"10.244.1.0/24"}, nil, "192.0.2.11")
	makeNode(t, "node-2", []string{"10.244.2.0/24"}, flannelNode("192.0.2.12", mac2), "192.0.2.12", "198.51.100.2")
}

func TestNodeIsPublishedAsFlannelDoes(t *testing.T) {
	empty(t)
	makeNode(t, me, []string{"10.244.1.0/24"}, map[string]string{})
	shared.must(t, http.MethodPatch, "/api/v1/nodes/"+me, object{"metadata": object{
		"annotations": object{"example.com/mine": "stays"}, "labels": object{"zone": "a"},
	}}, nil)
	makeNode(t, "node-2", []string{"10.244.2.0/24"}, flannelNode("192.0.2.12", mac2), "192.0.2.12", "198.51.100.2", "192.0.2.13")
	makeNode(t, "node-3", []string{"10.244.3.0/24"}, flannelNode("192.0.2.13", mac3))
	r := start(t, singleV4)
	r.waitPeers(peer2, "node-3 10.244.3.0/24 192.0.2.13 "+mac3)
	r.waitHealth()

	s, _ := r.sink.last()
	want := state.Local{
		Node: me, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, Uplink: "eth0",
		Address: netip.MustParseAddr("192.0.2.11"), PublicIP: netip.MustParseAddr("192.0.2.11"), MAC: s.Local.MAC,
	}
	if fmt.Sprint(s.Local) != fmt.Sprint(want) || s.Local.MAC.IsZero() || s.Local.MAC[0]&3 != 2 {
		t.Errorf("local is %+v, want %+v with a local unicast MAC", s.Local, want)
	}
	// Not 192.0.2.12, which is the public IP itself, nor .13, which is another's.
	if got := fmt.Sprint(s.Aliases); got != "[{198.51.100.2 192.0.2.12}]" {
		t.Errorf("aliases are %s", got)
	}
	if s.VNI != 1 || s.Port != 8472 || fmt.Sprint(s.Networks) != "[10.244.0.0/16]" {
		t.Errorf("state is %+v", s)
	}

	n := r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) > 0 })
	if got, want := n.flannels(), flannelNode("192.0.2.11", s.Local.MAC.String()); !maps.Equal(got, want) {
		t.Errorf("annotations are %v, want %v", got, want)
	}
	if n.Metadata.Annotations["example.com/mine"] != "stays" || n.Metadata.Labels["zone"] != "a" {
		t.Errorf("something else of the Node changed: %+v", n.Metadata)
	}
	if n.network() != "" {
		t.Errorf("the node does not carry traffic yet, but says %s", n.network())
	}
	r.remains("one patch, of nodes/status, and one watch that began with all Nodes", func() bool {
		return r.gate.count("PATCH") == 1 && r.gate.count("PATCH /api/v1/nodes/"+me+"/status?") == 1 &&
			r.gate.count("GET /api/v1/nodes?") == 1 && r.gate.count("sendInitialEvents=true") == 1
	})
	if got := strings.Join(r.gate.got(), "\n"); !strings.Contains(got, "GET application/vnd.kubernetes.protobuf;stream=watch") {
		t.Errorf("Nodes come as %s", got)
	}
	r.stop()

	again := start(t, singleV4)
	second := again.waitState("a state", func(state.State) bool { return true })
	if second.Local.MAC != s.Local.MAC {
		t.Errorf("after a restart the MAC is %s, before it was %s", second.Local.MAC, s.Local.MAC)
	}
	again.remains("nothing to publish after a restart", func() bool { return again.gate.count("PATCH") == 0 })
}

func TestOfferedMACIsTakenUnlessAnotherWasPublished(t *testing.T) {
	empty(t)
	makeNode(t, me, []string{"10.244.1.0/24"}, nil)
	o := ourOffer()
	o.MAC = state.MAC{0x0a, 0, 0, 0, 0, 7}
	r := newRig(t, singleV4).run(o)
	r.waitState("the device's MAC", func(s state.State) bool { return s.Local.MAC == o.MAC })
	r.stop()

	// Everything was taken away but what holds the MAC, as flannel reads it.
	annotate(t, me, map[string]any{"public-ip": nil, "backend-type": nil, "kube-subnet-manager": nil, "backend-data": `{"VNI":1,"VtepMAC":"0a:00:00:00:00:08"}`})
	r = newRig(t, singleV4).run(o)
	r.waitState("the MAC that peers were told", func(s state.State) bool { return s.Local.MAC == state.MAC{0x0a, 0, 0, 0, 0, 8} })
	o.MAC = state.MAC{0x0a, 0, 0, 0, 0, 9}
	r.store.Announce(o)
	r.remains("the MAC stays", func() bool {
		s, _ := r.sink.last()
		return s.Local.MAC == state.MAC{0x0a, 0, 0, 0, 0, 8}
	})
}

func TestNodeIsWaitedFor(t *testing.T) {
	empty(t)
	makeNode(t, "node-2", []string{"10.244.2.0/24"}, flannelNode("192.0.2.12", mac2))
	r := start(t, singleV4)
	r.waitHealth("node-1", "not in the Kubernetes API")
	makeNode(t, me, nil, nil) // as its kubelet registers it: no podCIDR, no annotation
	r.waitHealth("node-1", "no podCIDR", "--allocate-node-cidrs")
	if n := r.sink.delivered(); n != 0 {
		t.Errorf("%d states before the node has a prefix", n)
	}
	if n := r.gate.count("PATCH"); n != 0 {
		t.Errorf("%d patches before the node has a prefix", n)
	}
	// kube-controller-manager gives it one.
	shared.must(t, http.MethodPatch, "/api/v1/nodes/"+me, object{"spec": object{"podCIDR": "10.244.1.0/24", "podCIDRs": []string{"10.244.1.0/24"}}}, nil)
	r.waitHealth()
	r.waitPeers(peer2)
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
}

func TestPodCIDROutsideNetwork(t *testing.T) {
	empty(t)
	makeNode(t, me, []string{"10.245.1.0/24"}, nil)
	makeNode(t, "node-2", []string{"10.244.2.0/24"}, flannelNode("192.0.2.12", mac2))
	r := start(t, singleV4)
	r.waitHealth("10.245.1.0/24", "10.244.0.0/16", "--cluster-cidr")
	r.remains("nothing is delivered or published", func() bool { return r.sink.delivered() == 0 && r.gate.count("PATCH") == 0 })
}

func TestOwnNodeIsDeletedAndComesBack(t *testing.T) {
	makeTwo(t)
	r := start(t, singleV4)
	r.waitPeers(peer2)
	deleteNode(t, me)
	r.waitHealth("not in the Kubernetes API")
	deleteNode(t, "node-2")
	n := r.sink.delivered()
	r.remains("what was delivered last is in force", func() bool { return r.sink.delivered() == n })
	// Meanwhile the controller has given it another prefix.
	first, _ := r.sink.last()
	makeNode(t, me, []string{"10.244.9.0/24"}, nil)
	r.waitPeers()
	s := r.waitState("the new prefix", func(s state.State) bool { return s.Local.Prefixes[0].String() == "10.244.9.0/24" })
	r.waitHealth()
	if s.Local.MAC != first.Local.MAC {
		t.Errorf("the MAC changed from %s to %s", first.Local.MAC, s.Local.MAC)
	}
	r.waitNode(me, "the same MAC published", func(n nodeJSON) bool {
		return maps.Equal(n.flannels(), flannelNode("192.0.2.11", first.Local.MAC.String()))
	})
}

func TestPeersComeChangeAndGo(t *testing.T) {
	makeTwo(t)
	r := start(t, singleV4)
	r.waitPeers(peer2)
	makeNode(t, "node-3", []string{"10.244.3.0/24"}, nil)
	annotate(t, "node-3", map[string]any{"kube-subnet-manager": "true", "backend-type": "vxlan", "public-ip": "192.0.2.13", "backend-data": `{"VtepMAC":""}`})
	r.waitPeers(peer2, "node-3 10.244.3.0/24 192.0.2.13 00:00:00:00:00:00") // has not told its MAC
	annotate(t, "node-3", map[string]any{"backend-data": `{"VtepMAC":"` + mac3 + `"}`})
	r.waitPeers(peer2, "node-3 10.244.3.0/24 192.0.2.13 "+mac3)
	annotate(t, "node-3", map[string]any{"public-ip": "192.0.2.33"})
	r.waitPeers(peer2, "node-3 10.244.3.0/24 192.0.2.33 "+mac3)

	annotate(t, "node-3", map[string]any{"kube-subnet-manager": "false"})
	r.waitPeers(peer2)
	annotate(t, "node-3", map[string]any{"kube-subnet-manager": "true"})
	r.waitPeers(peer2, "node-3 10.244.3.0/24 192.0.2.33 "+mac3)
	for _, key := range []string{"kube-subnet-manager", "backend-type", "public-ip", "backend-data"} {
		annotate(t, "node-3", map[string]any{key: nil})
	}
	r.waitPeers(peer2)
	deleteNode(t, "node-2")
	makeNode(t, "node-2", []string{"10.244.22.0/24"}, flannelNode("192.0.2.12", mac2))
	r.waitPeers("node-2 10.244.22.0/24 192.0.2.12 " + mac2)
	deleteNode(t, "node-2")
	r.waitPeers()
	r.waitHealth()
}

func TestOneFamilyOfTwoChanges(t *testing.T) {
	empty(t)
	makeNode(t, me, []string{"fd00:10:244:1::/64", "10.244.1.0/24"}, nil)
	makeNode(t, "node-2", []string{"10.244.2.0/24", "fd00:10:244:2::/64"}, flannelDual("192.0.2.12", mac2, "2001:db8::12", mac2v6),
		"192.0.2.12", "2001:db8::1:12")
	r := start(t, dual)
	const v4, v6 = peer2, "node-2 fd00:10:244:2::/64 2001:db8::12 " + mac2v6
	r.waitPeers(v4, v6)
	s, _ := r.sink.last()
	if got := fmt.Sprint(s.Local.Prefixes); got != "[10.244.1.0/24 fd00:10:244:1::/64]" {
		t.Errorf("prefixes are %s", got)
	}
	if s.Local.MAC == s.Local.MACv6 || s.Local.MACv6.IsZero() {
		t.Errorf("MACs are %s and %s", s.Local.MAC, s.Local.MACv6)
	}
	if got := fmt.Sprint(s.Aliases); got != "[{2001:db8::1:12 2001:db8::12}]" {
		t.Errorf("aliases are %s", got)
	}
	r.waitNode(me, "both families published", func(n nodeJSON) bool {
		return maps.Equal(n.flannels(), flannelDual("192.0.2.11", s.Local.MAC.String(), "2001:db8::11", s.Local.MACv6.String()))
	})
	annotate(t, "node-2", map[string]any{"backend-v6-data": `{"VNI":1,"VtepMAC":"0e:00:00:00:00:22"}`})
	r.waitPeers(v4, "node-2 fd00:10:244:2::/64 2001:db8::12 0e:00:00:00:00:22")
	annotate(t, "node-2", map[string]any{"public-ipv6": "2001:db8::22"})
	r.waitPeers(v4, "node-2 fd00:10:244:2::/64 2001:db8::22 0e:00:00:00:00:22")
	annotate(t, "node-2", map[string]any{"public-ip": "192.0.2.22"})
	r.waitPeers("node-2 10.244.2.0/24 192.0.2.22 "+mac2, "node-2 fd00:10:244:2::/64 2001:db8::22 0e:00:00:00:00:22")
	// Of a family that is nonsense it stays as it was, and the other is followed.
	annotate(t, "node-2", map[string]any{"public-ip": "nonsense", "public-ipv6": "2001:db8::23"})
	r.waitPeers("node-2 10.244.2.0/24 192.0.2.22 "+mac2, "node-2 fd00:10:244:2::/64 2001:db8::23 0e:00:00:00:00:22")
	annotate(t, "node-2", map[string]any{"public-ip": nil}) // not told is not nonsense
	r.waitPeers("node-2 fd00:10:244:2::/64 2001:db8::23 0e:00:00:00:00:22")
	r.stop()

	// The network is IPv4 only now, and nothing of IPv6 stays published.
	one := start(t, singleV4)
	one.waitNode(me, "IPv6 gone", func(n nodeJSON) bool {
		return maps.Equal(n.flannels(), flannelNode("192.0.2.11", s.Local.MAC.String()))
	})
}

func TestNodeWithoutPrefixOfOneFamily(t *testing.T) {
	makeTwo(t)
	r := start(t, dual)
	r.waitHealth("no IPv6 podCIDR", "fd00:10:244::/48")
	r.remains("nothing is delivered", func() bool { return r.sink.delivered() == 0 })
}

func TestSomebodyChangesOurAnnotations(t *testing.T) {
	makeTwo(t)
	r := start(t, singleV4)
	n := r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
	want := n.flannels()
	for _, change := range []map[string]any{
		{"backend-data": `{"VNI":1,"VtepMAC":"0a:00:00:00:00:66"}`},
		{"public-ip": nil},
		{"kube-subnet-manager": nil, "backend-data": nil, "backend-type": nil, "public-ip": nil},
	} {
		patches := r.gate.count("PATCH")
		annotate(t, me, change)
		r.waitNode(me, "annotations as before", func(n nodeJSON) bool { return maps.Equal(n.flannels(), want) })
		r.remains("one patch is enough", func() bool { return r.gate.count("PATCH") == patches+1 })
	}
	if !strings.Contains(r.log.String(), "somebody changed this node's annotations") {
		t.Error("the log does not say so")
	}
	if n := r.sink.delivered(); n != 1 {
		t.Errorf("%d deliveries, but nothing changed", n)
	}
}

func TestSomebodyElseInsistsOnOtherAnnotations(t *testing.T) {
	makeTwo(t)
	r := start(t, singleV4)
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		annotate(t, me, map[string]any{"public-ip": "203.0.113.9"})
	}
	if n := r.gate.count("PATCH"); n > changesAtOnce {
		t.Errorf("%d patches in two seconds", n)
	}
}

func TestOfferChanges(t *testing.T) {
	makeTwo(t)
	r := newRig(t, singleV4)
	r.store.timing.Gap = time.Hour // is for peers
	r.run(ourOffer())
	first := r.waitState("a state", func(state.State) bool { return true })
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return n.flannels()["public-ip"] == "192.0.2.11" })
	o := ourOffer()
	o.PublicIP, o.Address, o.Uplink = netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("192.0.2.111"), "eth1"
	r.store.Announce(o)
	s := r.waitState("the new addresses", func(s state.State) bool { return s.Local.PublicIP == o.PublicIP })
	if s.Local.Address != o.Address || s.Local.Uplink != "eth1" || s.Local.MAC != first.Local.MAC || peersText(s) != peer2 {
		t.Errorf("state is %+v", s)
	}
	r.waitNode(me, "the new public IP published", func(n nodeJSON) bool { return n.flannels()["public-ip"] == "203.0.113.7" })
	o.PublicIP = netip.Addr{}
	r.store.Announce(o)
	r.waitHealth("no IPv4 address", "--public-ip")
}

func TestOperatorOverwritesPublicIP(t *testing.T) {
	makeTwo(t)
	annotate(t, me, map[string]any{"public-ip-overwrite": "203.0.113.1"})
	r := start(t, singleV4)
	published := func(ip string) {
		t.Helper()
		s := r.waitState("public IP "+ip, func(s state.State) bool { return s.Local.PublicIP.String() == ip })
		if s.Local.Address.String() != "192.0.2.11" {
			t.Errorf("packets are sent from %s", s.Local.Address)
		}
		r.waitNode(me, "public IP "+ip, func(n nodeJSON) bool { return n.flannels()["public-ip"] == ip })
	}
	published("203.0.113.1")
	annotate(t, me, map[string]any{"public-ip-overwrite": "203.0.113.2", "node-public-ip": "203.0.113.3"})
	published("203.0.113.2")
	annotate(t, me, map[string]any{"public-ip-overwrite": nil})
	published("203.0.113.3")
	if o, err := r.store.Overrides(t.Context()); err != nil || o.NodePublicIP.String() != "203.0.113.3" || o.PublicIPOverwrite.IsValid() {
		t.Errorf("overrides are %+v, %v", o, err)
	}
	annotate(t, me, map[string]any{"node-public-ip": "nowhere"})
	published("192.0.2.11")
	r.waitHealth("node-public-ip", "nowhere")
	annotate(t, me, map[string]any{"node-public-ip": nil})
	r.waitHealth()
	deleteNode(t, me)
	if o, err := r.store.Overrides(t.Context()); err != nil || o != (flannel.Overrides{}) {
		t.Errorf("overrides of a node that is not there: %+v, %v", o, err)
	}
}

func TestNetworkIsAvailableOnceTrafficIsCarried(t *testing.T) {
	makeTwo(t)
	unavailable := func(status, reason string) {
		setStatus(t, me, object{"conditions": []object{{"type": "NetworkUnavailable", "status": status, "reason": reason, "message": "m"}}})
	}
	unavailable("True", "NoRouteCreated") // as a cloud provider's node begins
	r := start(t, singleV4)
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
	r.remains("not before it carries traffic", func() bool { return getNode(t, me).network() == "True NoRouteCreated: m" })
	o := ourOffer()
	o.Carrying = true
	r.store.Announce(o)
	const up = "False FlannelIsUp: Flannel is running on this node"
	is := func(text string) func(nodeJSON) bool { return func(n nodeJSON) bool { return n.network() == text } }
	r.waitNode(me, up, is(up))
	patches := r.gate.count("PATCH")
	r.remains("once", func() bool { return r.gate.count("PATCH") == patches })
	for _, lost := range []string{"True", "Unknown"} {
		unavailable(lost, "Lost")
		r.waitNode(me, up, is(up))
	}
	unavailable("False", "RouteCreated") // somebody else says so too: no quarrel
	r.remains("left as it is", func() bool { return getNode(t, me).network() == "False RouteCreated: m" })
	r.stop()

	o2, _ := optionsFor(t, singleV4, shared.token(t, "weft"))
	o2.SetNodeNetworkUnavailable = false
	unavailable("True", "NoRouteCreated")
	quiet := newRigOf(t, o2).run(o)
	quiet.waitPeers(peer2)
	quiet.remains("left alone where it is not wanted", func() bool { return getNode(t, me).network() == "True NoRouteCreated: m" })
}

func TestHeartbeatsOfNodesAreNothingNew(t *testing.T) {
	makeTwo(t)
	r := start(t, singleV4)
	r.waitPeers(peer2)
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
	for i := range 50 {
		for _, name := range []string{me, "node-2"} {
			setStatus(t, name, object{
				"conditions": []object{{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": fmt.Sprint(i), "lastHeartbeatTime": time.Now().UTC().Format(time.RFC3339)}},
				"images":     []object{{"names": []string{fmt.Sprintf("image-%d", i)}, "sizeBytes": i}},
			})
		}
	}
	r.remains("one delivery, one patch", func() bool { return r.sink.delivered() == 1 && r.gate.count("PATCH") == 1 })
}

func TestHostileNodesHarmNobody(t *testing.T) {
	makeTwo(t)
	time.Sleep(1100 * time.Millisecond) // creation times are in seconds
	huge := strings.Repeat("x", 200_000)
	hostile := func(name, podCIDR string, change map[string]string, addresses ...string) {
		a := flannelNode("198.18.0.99", "0a:00:00:00:00:99")
		maps.Copy(a, change)
		makeNode(t, name, []string{podCIDR}, a, addresses...)
	}
	hostile("a-huge", "10.244.50.0/24", map[string]string{"backend-data": huge})
	hostile("a-huge-ip", "10.244.51.0/24", map[string]string{"public-ip": huge})
	hostile("a-mac", "10.244.52.0/24", map[string]string{"backend-data": `{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}`})
	hostile("a-ip", "10.244.53.0/24", map[string]string{"public-ip": "$(reboot)"})
	hostile("a-loopback", "10.244.54.0/24", map[string]string{"public-ip": "127.0.0.1"})
	hostile("a-type", "10.244.55.0/24", map[string]string{"backend-type": "host-gw"})
	hostile("a-thief", "10.244.2.0/24", nil)
	hostile("a-part", "10.244.2.128/25", nil)
	hostile("a-all", "10.244.0.0/16", nil)
	hostile("a-ours", "10.244.1.0/24", nil)
	hostile("a-outside", "192.0.2.0/24", nil)
	hostile("a-our-ip", "10.244.56.0/24", map[string]string{"public-ip": "192.0.2.11"})
	hostile("a-their-mac", "10.244.57.0/24", map[string]string{"backend-data": `{"VNI":1,"VtepMAC":"` + mac2 + `"}`})
	hostile("a-their-ip", "10.244.58.0/24", map[string]string{"public-ip": "192.0.2.12", "backend-data": `{"VNI":1,"VtepMAC":"0a:00:00:00:00:58"}`})
	hostile("a-addresses", "10.244.59.0/24", map[string]string{"public-ip": "198.18.0.59", "backend-data": `{"VNI":1,"VtepMAC":"0a:00:00:00:00:59"}`},
		"192.0.2.11", "192.0.2.12", "198.51.100.2", "10.244.2.9", "127.0.0.1", "224.0.0.1", "0.0.0.0", "fe80::1", "203.0.113.59")
	want := []string{
		peer2,
		// They can't be reached, but known are they all the same.
		"a-huge 10.244.50.0/24 198.18.0.99 00:00:00:00:00:00",
		"a-mac 10.244.52.0/24 198.18.0.99 00:00:00:00:00:00",
		"a-their-mac 10.244.57.0/24 198.18.0.99 00:00:00:00:00:00",
		"a-their-ip 10.244.58.0/24 192.0.2.12 0a:00:00:00:00:58",
		"a-addresses 10.244.59.0/24 198.18.0.59 0a:00:00:00:00:59",
	}
	check := func(r *rig) {
		t.Helper()
		r.waitPeers(want...)
		s, _ := r.sink.last()
		if got := fmt.Sprint(s.Aliases); got != "[{198.51.100.2 192.0.2.12} {203.0.113.59 198.18.0.59}]" {
			t.Errorf("aliases are %s", got)
		}
		r.waitHealth()
	}
	r := start(t, singleV4)
	check(r)
	for _, name := range []string{"a-huge", "a-huge-ip", "a-mac", "a-ip", "a-loopback", "a-type", "a-thief", "a-part", "a-all", "a-ours", "a-outside", "a-our-ip", "a-their-mac"} {
		if n := strings.Count(r.log.String(), "node="+name+" "); n != 1 {
			t.Errorf("%d lines about %s", n, name)
		}
	}
	if n := len(r.log.String()); n > 20_000 {
		t.Errorf("the log has %d bytes", n)
	}
	// What is asked of the Node that was there first does not depend on which
	// event came first.
	r.stop()
	check(start(t, singleV4))
}

func TestAPIServerIsStoppedAndStarted(t *testing.T) {
	makeTwo(t)
	r := start(t, singleV4)
	r.waitPeers(peer2)
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
	r.waitHealth()
	delivered := r.sink.delivered()
	shared.stopAPI()
	stopped := time.Now()
	r.waitHealth("127.0.0.1:"+shared.port, "since", "connection refused")
	if err, _ := r.sink.healthNow(); !isAway(err) || errAway.Since.Before(stopped.Add(-5*time.Second)) || errAway.Since.After(time.Now()) {
		t.Errorf("away since %v, stopped at %v: %v", errAway, stopped, err)
	}
	r.remains("nothing is taken away", func() bool { return r.sink.delivered() == delivered })
	o := ourOffer()
	o.PublicIP, o.Address = netip.MustParseAddr("192.0.2.110"), netip.MustParseAddr("192.0.2.110")
	r.store.Announce(o)
	s := r.waitState("the address that changed meanwhile", func(s state.State) bool { return s.Local.Address == o.Address })
	if peersText(s) != peer2 {
		t.Errorf("peers are %s", peersText(s))
	}
	if _, err := r.store.Overrides(t.Context()); !isAway(err) {
		t.Errorf("asking an API that is away: %v", err)
	}
	if err := shared.startAPI(); err != nil {
		t.Fatal(err)
	}
	annotate(t, "node-2", map[string]any{"public-ip": "192.0.2.22"})
	r.waitPeers("node-2 10.244.2.0/24 192.0.2.22 " + mac2)
	r.waitHealth()
	r.waitNode(me, "the address that changed meanwhile", func(n nodeJSON) bool { return n.flannels()["public-ip"] == "192.0.2.110" })
}

// An API that is away for a day is asked some thousand times. Nothing comes of that
// but one health, and when it is back the node goes on as if nothing had been.
func TestAPIIsAwayForADay(t *testing.T) {
	makeTwo(t)
	r := newRig(t, singleV4)
	day := int(24 * time.Hour / defaultTiming().Backoff.Cap)
	r.store.timing.Backoff = wait.Backoff{Duration: time.Millisecond, Factor: 1, Steps: 100, Cap: time.Millisecond}
	r.run(ourOffer())
	r.waitPeers(peer2)
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
	r.waitHealth()
	r.wait("a log of that", func() bool { return strings.Contains(r.log.String(), "this node is published") })
	r.sink.mu.Lock()
	healths, delivered := len(r.sink.health), r.sink.number
	r.sink.mu.Unlock()
	lines, routines := strings.Count(r.log.String(), "\n"), runtime.NumGoroutine()
	r.gate.close()
	asked := r.gate.count("GET")
	r.wait("a day of tries", func() bool { return r.gate.count("GET") >= asked+day })
	r.sink.mu.Lock()
	healths = len(r.sink.health) - healths
	r.sink.mu.Unlock()
	if n := r.sink.delivered(); healths != 1 || n != delivered {
		t.Errorf("%d healths, want one; %d states, want none", healths, n-delivered)
	}
	if n := strings.Count(r.log.String(), "\n"); n != lines {
		t.Errorf("%d lines were logged", n-lines)
	}
	if n := runtime.NumGoroutine(); n > routines+10 {
		t.Errorf("%d goroutines, and before %d", n, routines)
	}
	annotate(t, "node-2", map[string]any{"public-ip": "192.0.2.22"})
	annotate(t, me, map[string]any{"public-ip": nil})
	r.gate.reopen()
	r.waitPeers("node-2 10.244.2.0/24 192.0.2.22 " + mac2)
	r.waitNode(me, "annotations", func(n nodeJSON) bool { return len(n.flannels()) == 4 })
	r.waitHealth()
}

func TestAPIIsAwayFromTheStart(t *testing.T) {
	makeTwo(t)
	r := newRig(t, singleV4)
	r.store.timing.Backoff.Duration, r.store.timing.Backoff.Cap = time.Hour, time.Hour
	r.gate.close()
	r.run(ourOffer())
	r.waitHealth("connection refused")
	if err, _ := r.sink.healthNow(); strings.Contains(err.Error(), me) {
		t.Errorf("nothing is known of the node, but: %v", err)
	}
	if n := r.sink.delivered(); n != 0 {
		t.Errorf("%d states from nowhere", n)
	}
	// Run ends at once although it waits for its next try: see rig.run.
	r.stop()

	r = newRig(t, singleV4)
	r.gate.close()
	r.run(ourOffer())
	r.waitHealth("connection refused")
	r.gate.reopen()
	r.waitPeers(peer2)
	r.waitHealth()
}

func TestNodesChangeWhileNobodyWatches(t *testing.T) {
	makeTwo(t)
	makeNode(t, "node-3", []string{"10.244.3.0/24"}, flannelNode("192.0.2.13", mac3))
	r := start(t, singleV4)
	r.waitPeers(peer2, "node-3 10.244.3.0/24 192.0.2.13 "+mac3)
	for _, forgotten := range []bool{false, true} {
		r.gate.close()
		r.waitHealth("connection refused")
		if forgotten {
			// etcd was compacted meanwhile: the API server can't go on where
			// the watch ended.
			refuse(r.gate, http.StatusGone, "Expired", "too old resource version", func(q *http.Request) bool {
				return q.URL.Query().Get("watch") != "" && q.URL.Query().Get("resourceVersion") != "" && r.gate.count("GET") < 1000 &&
					q.URL.Query().Get("sendInitialEvents") == ""
			})
			deleteNode(t, "node-4")
		} else {
			deleteNode(t, "node-3")
			makeNode(t, "node-4", []string{"10.244.4.0/24"}, flannelNode("192.0.2.14", "0a:58:0a:f4:04:00"))
		}
		r.gate.reopen()
		if forgotten {
			r.waitPeers(peer2)
		} else {
			r.waitPeers(peer2, "node-4 10.244.4.0/24 192.0.2.14 0a:58:0a:f4:04:00")
		}
	}
	if r.gate.count("sendInitialEvents=true") < 2 {
		t.Error("there was no second look at all Nodes")
	}
}

// refuse has the gate answer some requests as an API server would.
func refuse(g *gate, code int, reason, message string, which func(*http.Request) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.answer = func(q *http.Request) *http.Response {
		if !which(q) {
			return nil
		}
		text := fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","message":%q,"reason":%q,"code":%d}`, message, reason, code)
		return &http.Response{
			StatusCode: code, Status: fmt.Sprint(code), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Request: q,
			Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(text)),
		}
	}
}

func TestAPIServerThatKnowsNoWatchList(t *testing.T) {
	makeTwo(t)
	r := newRig(t, singleV4)
	refuse(r.gate, http.StatusUnprocessableEntity, "Invalid", "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
		func(q *http.Request) bool { return q.URL.Query().Get("sendInitialEvents") != "" })
	r.run(ourOffer())
	r.waitPeers(peer2)
	r.waitHealth()
	if n := r.gate.count("GET /api/v1/nodes?", "limit="); n != 1 {
		t.Errorf("%d lists", n)
	}
	deleteNode(t, "node-2")
	r.waitPeers()
}

func TestRoleOfFlannelIsEnough(t *testing.T) {
	makeTwo(t)
	token := shared.token(t, "weft")
	o, _ := optionsFor(t, singleV4, token)
	shared.must(t, http.MethodPost, "/api/v1/namespaces/weft/pods", object{
		"metadata": object{"name": "agent"},
		"spec":     object{"nodeName": me, "containers": []object{{"name": "c", "image": "i"}}},
	}, nil)
	defer shared.do(http.MethodDelete, "/api/v1/namespaces/weft/pods/agent?gracePeriodSeconds=0", nil, nil)
	environment := map[string]string{"POD_NAME": "agent", "POD_NAMESPACE": "weft"}
	name, err := FindNode(t.Context(), o, func(key string) string { return environment[key] })
	if err != nil || name != me {
		t.Errorf("FindNode: %q, %v", name, err)
	}
	environment["POD_NAME"] = "nobody"
	if _, err := FindNode(t.Context(), o, func(key string) string { return environment[key] }); err == nil || !strings.Contains(err.Error(), `weft/nobody`) {
		t.Errorf("FindNode for a pod that is not there: %v", err)
	}
	// It really is narrow.
	r := newRigOf(t, o)
	_, err = r.store.client.rest.Delete().Resource("nodes").Name("node-2").Do(t.Context()).Get()
	if err == nil || !strings.Contains(err.Error(), "forbidden") {
		t.Errorf("deleting a Node: %v", err)
	}
	offer := ourOffer()
	offer.Carrying = true
	r.run(offer)
	r.waitPeers(peer2)
	r.waitHealth()
	r.waitNode(me, "the condition", func(n nodeJSON) bool { return strings.HasPrefix(n.network(), "False FlannelIsUp") })
}

func TestRoleThatMayNotPatch(t *testing.T) {
	makeTwo(t)
	o, _ := optionsFor(t, singleV4, shared.token(t, "reader"))
	r := newRigOf(t, o).run(ourOffer())
	r.waitPeers(peer2) // what can be done is done
	r.waitHealth("publishing this node", "forbidden", "nodes/status")
	time.Sleep(time.Second)
	if n := r.gate.count("PATCH"); n > 2 {
		t.Errorf("%d attempts in a second", n)
	}
}

func TestCredentialsAreRefused(t *testing.T) {
	makeTwo(t)
	o, _ := optionsFor(t, singleV4, "of yesterday")
	r := newRigOf(t, o).run(ourOffer())
	r.waitHealth(shared.url(), "since", "Unauthorized")
}

func TestStoreThatWasNotAnnounced(t *testing.T) {
	makeTwo(t)
	r := newRig(t, singleV4)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.store.Run(ctx, r.sink) }()
	r.remains("nothing can be delivered", func() bool { return r.sink.delivered() == 0 })
	r.store.Announce(ourOffer())
	r.waitPeers(peer2)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAnotherAnnotationPrefix(t *testing.T) {
	makeTwo(t)
	o, _ := optionsFor(t, singleV4, shared.token(t, "weft"))
	o.AnnotationPrefix = "example.com/net"
	r := newRigOf(t, o).run(ourOffer())
	r.waitPeers() // node-2 belongs to another flannel
	n := r.waitNode(me, "annotations", func(n nodeJSON) bool { return n.Metadata.Annotations["example.com/net-public-ip"] == "192.0.2.11" })
	if len(n.flannels()) != 0 {
		t.Errorf("the other flannel's annotations are %v", n.flannels())
	}
	if keys := slices.Sorted(maps.Keys(n.Metadata.Annotations)); !slices.Contains(keys, "example.com/net-backend-data") {
		t.Errorf("annotations are %v", keys)
	}
}
