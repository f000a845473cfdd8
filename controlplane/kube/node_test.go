package kube

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// readerOf makes a reader for the node "self".
func readerOf(tb testing.TB, netconf string) reader {
	tb.Helper()
	config, err := flannel.ParseConfig([]byte(netconf))
	if err != nil {
		tb.Fatal(err)
	}
	keys, err := flannel.NewAnnotationKeys(flannel.DefaultAnnotationPrefix)
	if err != nil {
		tb.Fatal(err)
	}
	return reader{keys: keys, config: config, node: "self"}
}

// Configurations of the tests.
const (
	confV4   = `{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`
	confDual = `{"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","EnableIPv6":true,"Backend":{"Type":"vxlan"}}`
)

// kubeNode makes a Node with annotations of flannel, whose prefix is left out.
func kubeNode(name string, podCIDRs []string, annotations map[string]string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{}}}
	if len(podCIDRs) > 0 {
		n.Spec.PodCIDR, n.Spec.PodCIDRs = podCIDRs[0], podCIDRs
	}
	for k, v := range annotations {
		n.Annotations["flannel.alpha.coreos.com/"+k] = v
	}
	return n
}

// stock are the annotations of a stock flannel node.
func stock(publicIP, mac string) map[string]string {
	return map[string]string{
		"backend-data": fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, mac), "backend-type": "vxlan",
		"kube-subnet-manager": "true", "public-ip": publicIP,
	}
}

func TestPrefixWithHostBits(t *testing.T) {
	// API servers refuse it by now; Nodes from before still have it.
	n := readerOf(t, confV4).neighbor(kubeNode("b", []string{"10.244.2.7/24"}, stock("192.0.2.2", "0a:00:00:00:00:02")))
	if len(n.peers) != 1 || n.peers[0].Prefix.String() != "10.244.2.0/24" || n.fault != "" {
		t.Errorf("read %+v", n)
	}
	lease, err := readerOf(t, confV4).prefixes(own{found: true, podCIDR: "10.244.1.9/24"})
	if err != nil || lease.Prefix.String() != "10.244.1.0/24" {
		t.Errorf("own prefix is %v, %v", lease.Prefix, err)
	}
}

// What stock flanneld 0.28.10 has written to real Nodes; the files are those of
// controlplane/flannel.
func TestNodesOfStockFlannel(t *testing.T) {
	for file, want := range map[string]string{
		"nodes.json":      "[{node2 10.244.1.0/24 192.0.2.12 2a:36:c1:2e:aa:e2}]",
		"nodes-dual.json": "[{node2 10.244.1.0/24 192.0.2.12 ae:a4:d6:99:65:6d} {node2 fd00:10:244:1::/64 2001:db8::12 9e:c0:f7:9a:38:a3}]",
	} {
		for _, n := range fixtures(t, file) {
			if n.Name != "node2" {
				continue
			}
			got := readerOf(t, confDual).neighbor(n)
			if fmt.Sprint(got.peers) != want || got.fault != "" {
				t.Errorf("%s: read %+v, want %s", file, got, want)
			}
		}
	}
}

// fixtures reads Nodes from a file: what jq makes of them, one after the other.
func fixtures(tb testing.TB, file string) (nodes []*corev1.Node) {
	tb.Helper()
	data, err := os.Open(filepath.Join("../flannel/testdata/captured", file))
	if err != nil {
		tb.Fatal(err)
	}
	defer data.Close()
	for stream := json.NewDecoder(data); stream.More(); {
		var n struct {
			Name        string
			Annotations map[string]string
			Spec        corev1.NodeSpec
		}
		if err := stream.Decode(&n); err != nil {
			tb.Fatal(err)
		}
		nodes = append(nodes, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, Annotations: n.Annotations}, Spec: n.Spec})
	}
	return nodes
}

func TestTrimKeepsWhatIsRead(t *testing.T) {
	r := readerOf(t, confDual)
	for _, name := range []string{"self", "other"} {
		n := kubeNode(name, []string{"10.244.2.0/24", "fd00:10:244:2::/64"}, stock("192.0.2.2", "0a:00:00:00:00:02"))
		n.ResourceVersion, n.CreationTimestamp = "17", metav1.Unix(1_800_000_000, 0)
		n.Annotations["example.com/big"] = strings.Repeat("x", 1000)
		n.ManagedFields = make([]metav1.ManagedFieldsEntry, 10)
		n.Status.Images = make([]corev1.ContainerImage, 50)
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue, Reason: "r", Message: "m"}}
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.22"}}
		trimmed, err := r.trim(n.DeepCopy())
		if err != nil {
			t.Fatal(err)
		}
		small := trimmed.(*corev1.Node)
		if len(small.Status.Images)+len(small.ManagedFields) != 0 || small.Annotations["example.com/big"] != "" {
			t.Errorf("%s: kept %+v", name, small)
		}
		if a, b := r.own(n), r.own(small); name == "self" && (!a.equal(b) || a.version != b.version) {
			t.Errorf("own is read as %+v, trimmed as %+v", a, b)
		}
		if a, b := r.neighbor(n), r.neighbor(small); !a.equal(b) || len(a.peers) == 0 || len(a.addresses) == 0 {
			t.Errorf("%s is read as %+v, trimmed as %+v", name, a, b)
		}
	}
}

func TestStatusAddresses(t *testing.T) {
	all := []corev1.NodeAddress{
		{Type: corev1.NodeHostName, Address: "node-b"},
		{Type: corev1.NodeInternalDNS, Address: "192.0.2.9"},
		{Type: corev1.NodeInternalIP, Address: "192.0.2.2"},
		{Type: corev1.NodeExternalIP, Address: "::ffff:192.0.2.3"},
		{Type: corev1.NodeInternalIP, Address: "192.0.2.2"},
		{Type: corev1.NodeInternalIP, Address: "fe80::1%eth0"},
		{Type: corev1.NodeInternalIP, Address: "10.244.9.9"},
		{Type: corev1.NodeInternalIP, Address: " 192.0.2.4"},
		{Type: corev1.NodeInternalIP, Address: "2001:db8::2"},
	}
	r := readerOf(t, confV4)
	if got := fmt.Sprint(r.addresses(all)); got != "[192.0.2.2 192.0.2.3 2001:db8::2]" {
		t.Errorf("addresses are %s", got)
	}
	var many []corev1.NodeAddress
	for i := range 1000 {
		many = append(many, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("198.18.%d.%d", i/250, i%250+1)})
	}
	if got := len(r.addresses(many)); got != maxAddresses {
		t.Errorf("%d addresses of a thousand", got)
	}
}

func TestMACThatIsPublishedAndOffered(t *testing.T) {
	r := readerOf(t, confDual)
	node := own{found: true, podCIDRs: []string{"10.244.1.0/24", "fd00:10:244:1::/64"}, annotations: map[string]string{
		r.keys.BackendData:   `{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}`, // the address and the type are gone
		r.keys.BackendV6Data: `garbage`,
	}}
	offer := controlplane.Offer{
		PublicIP: netip.MustParseAddr("192.0.2.1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"),
		MAC: state.MAC{2, 0, 0, 0, 0, 1}, MACv6: state.MAC{2, 0, 0, 0, 0, 2},
	}
	var m macs
	me, ignored, err := r.self(node, offer, &m)
	if err != nil || ignored != nil {
		t.Fatal(err, ignored)
	}
	if me.local.MAC.String() != "0a:00:00:00:00:01" || me.local.MACv6 != offer.MACv6 {
		t.Errorf("MACs are %s and %s", me.local.MAC, me.local.MACv6)
	}
	node.annotations, offer.MAC, offer.MACv6 = nil, state.MAC{}, state.MAC{}
	again, _, _ := r.self(node, offer, &m)
	if again.local.MAC != me.local.MAC || again.local.MACv6 != me.local.MACv6 {
		t.Errorf("MACs became %s and %s", again.local.MAC, again.local.MACv6)
	}
	seen := map[state.MAC]bool{}
	for range 100 {
		mac := chooseMAC(state.MAC{}, state.MAC{}, state.MAC{})
		if mac[0]&3 != 2 || seen[mac] {
			t.Fatalf("%s is not a new, local, unicast MAC", mac)
		}
		seen[mac] = true
	}
}

// FuzzNode gives one node's owner the pen: whatever it writes, it comes to no
// more than the owner's own prefixes, and an honest node that was there before
// keeps all that it has.
func FuzzNode(f *testing.F) {
	for _, file := range []string{"nodes.json", "nodes-dual.json"} {
		for _, n := range fixtures(f, file) {
			a := n.Annotations
			p := "flannel.alpha.coreos.com/"
			f.Add(n.Spec.PodCIDR, strings.Join(n.Spec.PodCIDRs, ","), a[p+"kube-subnet-manager"], a[p+"backend-type"],
				a[p+"backend-data"], a[p+"public-ip"], a[p+"backend-v6-data"], a[p+"public-ipv6"], "192.0.2.12,198.51.100.7")
		}
	}
	r := readerOf(f, confDual)
	local := state.Local{
		Node: "self", Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")},
		Address: netip.MustParseAddr("192.0.2.1"), PublicIP: netip.MustParseAddr("203.0.113.1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"),
		MAC: state.MAC{2, 0, 0, 0, 0, 1}, MACv6: state.MAC{2, 0, 0, 0, 0, 2},
	}
	honest := r.neighbor(honestNode())
	alone := judge(local, []neighbor{honest})
	if len(alone.peers) != 2 || len(alone.aliases) != 1 {
		f.Fatalf("the honest node is %+v", alone)
	}
	f.Fuzz(func(t *testing.T, podCIDR, podCIDRs, managed, kind, data, publicIP, dataV6, publicIPv6, addresses string) {
		n := kubeNode("hostile", nil, map[string]string{
			"kube-subnet-manager": managed, "backend-type": kind, "backend-data": data, "public-ip": publicIP,
			"backend-v6-data": dataV6, "public-ipv6": publicIPv6, "public-ip-overwrite": publicIP, "node-public-ipv6": publicIPv6,
		})
		n.CreationTimestamp = metav1.NewTime(time.Unix(1_800_000_001, 0))
		n.Spec.PodCIDR = podCIDR
		if podCIDRs != "" {
			n.Spec.PodCIDRs = strings.Split(podCIDRs, ",")
		}
		for a := range strings.SplitSeq(addresses, ",") {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
		}
		hostile := r.neighbor(n)
		if len(hostile.peers) > 2 || len(hostile.addresses) > maxAddresses || len(hostile.fault) > 400 || strings.Contains(hostile.fault, "\n") {
			t.Fatalf("read %+v", hostile)
		}
		together := judge(local, []neighbor{hostile, honest})
		checkMembers(t, r, local, together, alone)
		var m macs
		_, _, _ = r.self(r.own(n), controlplane.Offer{}, &m)
	})
}

// honestNode is one that was there before.
func honestNode() *corev1.Node {
	a := stock("192.0.2.2", "0a:00:00:00:00:02")
	maps.Copy(a, map[string]string{"public-ipv6": "2001:db8::2", "backend-v6-data": `{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}`})
	n := kubeNode("honest", []string{"10.244.2.0/24", "fd00:10:244:2::/64"}, a)
	n.CreationTimestamp = metav1.NewTime(time.Unix(1_800_000_000, 0))
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeExternalIP, Address: "198.51.100.2"}}
	return n
}

// checkMembers checks what must hold whatever a newer node says.
func checkMembers(t *testing.T, r reader, local state.Local, together, alone members) {
	t.Helper()
	var honest []state.Peer
	networks := r.config.Networks()
	for i, p := range together.peers {
		if p.Node == "honest" {
			honest = append(honest, p)
		}
		if p.Prefix != p.Prefix.Masked() || !networks[0].Contains(p.Prefix.Addr()) && !networks[1].Contains(p.Prefix.Addr()) || p.Prefix.Addr().Is4() != p.PublicIP.Is4() {
			t.Errorf("peer %+v", p)
		}
		for _, q := range together.peers[:i] {
			if p.Prefix.Overlaps(q.Prefix) || !p.MAC.IsZero() && p.MAC == q.MAC && p.PublicIP.Is4() == q.PublicIP.Is4() && p.PublicIP != q.PublicIP {
				t.Errorf("peers %+v and %+v", p, q)
			}
		}
		for _, q := range local.Prefixes {
			if p.Prefix.Overlaps(q) {
				t.Errorf("peer %+v has our prefix", p)
			}
		}
	}
	if fmt.Sprint(honest) != fmt.Sprint(alone.peers) {
		t.Errorf("the honest node has %v of %v", honest, alone.peers)
	}
	for _, a := range together.aliases {
		if networks[0].Contains(a.Addr) || networks[1].Contains(a.Addr) || a.Addr == local.Address || a.Addr == local.PublicIP {
			t.Errorf("alias %+v", a)
		}
		for _, p := range together.peers {
			if a.Addr == p.PublicIP {
				t.Errorf("alias %+v is a public IP", a)
			}
		}
	}
}
