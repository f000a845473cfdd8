package flannel

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// mustKeys returns the names with flannel's default prefix.
func mustKeys(tb testing.TB) AnnotationKeys {
	tb.Helper()
	keys, err := NewAnnotationKeys(DefaultAnnotationPrefix)
	if err != nil {
		tb.Fatal(err)
	}
	return keys
}

func TestAnnotationPrefixAsFlannelTreatsIt(t *testing.T) {
	// Flannel looks at the end of the prefix only; the API server refuses these.
	stricter := differences{
		"FLANNEL.example.com": "no annotation can begin so",
		"exa mple.com":        "no annotation can begin so",
		"x\nexample.com":      "no annotation can begin so",
	}
	names := map[string]bool{}
	for _, test := range mustCases[struct {
		Prefix, Error string
		Names         []string
	}](t, "prefixes.json") {
		names[test.Prefix] = true
		keys, err := NewAnnotationKeys(test.Prefix)
		if stricter.agree(t, test.Prefix, test.Error == "", err == nil, err) && !slices.Equal(keys.All(), test.Names) {
			t.Errorf("%q: %q, want %q", test.Prefix, keys.All(), test.Names)
		}
	}
	stricter.unused(t, names)
}

// capturedNode is a Node as kubectl and jq have printed it.
type capturedNode struct {
	Name        string
	Annotations map[string]string
	Spec        struct {
		PodCIDR  string
		PodCIDRs []string
	}
}

// mustCapturedNodes returns the nodes of a file.
func mustCapturedNodes(tb testing.TB, name string) []capturedNode {
	tb.Helper()
	var nodes []capturedNode
	for d := json.NewDecoder(bytes.NewReader(mustRead(tb, name))); ; {
		var n capturedNode
		if err := d.Decode(&n); errors.Is(err, io.EOF) {
			return nodes
		} else if err != nil {
			tb.Fatal(err)
		}
		nodes = append(nodes, n)
	}
}

// capturedNodes are the files with nodes of stock flannelds.
var capturedNodes = []string{"captured/nodes.json", "captured/nodes-dual.json", "captured/nodes-vni4096.json"}

func TestCapturedNodes(t *testing.T) {
	keys := mustKeys(t)
	v6 := network
	v4096 := network
	v4096.VNI = 4096
	got := ""
	for i, c := range []Config{network, v6, v4096} {
		for _, n := range mustCapturedNodes(t, capturedNodes[i]) {
			l, err := keys.Parse(n.Annotations)
			if err != nil {
				t.Fatal(err)
			}
			if l.Prefix, l.PrefixV6, err = ParsePodCIDRs(n.Spec.PodCIDR, n.Spec.PodCIDRs); err != nil {
				t.Fatal(err)
			}
			peers, err := l.Peers(n.Name, c)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range peers {
				got += p.Node + " " + p.Prefix.String() + " " + p.PublicIP.String() + " " + p.MAC.String() + "\n"
			}
			// What we would write in flannel's place is what it has written.
			set, _ := keys.Marshal(l)
			set["node.alpha.kubernetes.io/ttl"] = "0"
			if !maps.Equal(set, n.Annotations) {
				t.Errorf("%s: %v, flannel has %v", n.Name, set, n.Annotations)
			}
		}
	}
	want := `node1 10.244.0.0/24 192.0.2.11 7e:3b:a3:81:51:24
node2 10.244.1.0/24 192.0.2.12 2a:36:c1:2e:aa:e2
node1 10.244.0.0/24 192.0.2.11 36:24:74:8e:9f:0a
node1 fd00:10:244::/64 2001:db8::11 22:7f:88:29:30:c4
node2 10.244.1.0/24 192.0.2.12 ae:a4:d6:99:65:6d
node2 fd00:10:244:1::/64 2001:db8::12 9e:c0:f7:9a:38:a3
node1 10.244.1.0/24 192.0.2.11 42:85:25:1d:a0:16
node2 10.244.0.0/24 192.0.2.12 e2:17:31:f6:80:67
`
	if got != want {
		t.Errorf("got\n%s, want\n%s", got, want)
	}
}

// Where our reading of nodes differs from flannel's; see leaseDifferences.
var nodeDifferences = differences{
	"no MAC, IPv4":                            "not told yet",
	"no data, IPv4":                           "not told yet",
	"public IPv6 nonsense, IPv4":              "IPv6 is wrong, IPv4 is not",
	"IPv4 node in a dual-stack network, IPv4": "it has told no IPv6 yet; IPv4 works",
	"outside the network, IPv4":               "every pod prefix lies inside Network",
}

func TestNodesAsFlannelReadsThem(t *testing.T) {
	keys := mustKeys(t)
	names := map[string]bool{}
	for _, test := range mustCases[struct {
		Name, PodCIDR, Error, Type string
		IPv4, IPv6                 bool
		Annotations                map[string]string
		PodCIDRs                   []string
		V4, V6                     *readPeer
	}](t, "nodes.json") {
		names[test.Name+", IPv4"], names[test.Name+", IPv6"] = true, true
		c := Config{VNI: 1}
		if test.IPv4 {
			c.Network = network.Network
		}
		if test.IPv6 {
			c.IPv6Network = network.IPv6Network
		}
		l, err := keys.Parse(test.Annotations)
		v4, v6, cidrErr := ParsePodCIDRs(test.PodCIDR, test.PodCIDRs)
		l.Prefix, l.PrefixV6 = v4, v6
		peers, peersErr := l.Peers("n", c)
		comparePeers(t, nodeDifferences, test.Name, test.Type, test.V4, test.V6, peers, errors.Join(err, cidrErr, peersErr))
	}
	nodeDifferences.unused(t, names)
}

func TestNodeThatHasToldNothing(t *testing.T) {
	keys := mustKeys(t)
	for _, annotations := range []map[string]string{nil, {}, {"node.alpha.kubernetes.io/ttl": "0"}} {
		if l, err := keys.Parse(annotations); err != nil || l != (Lease{}) || keys.IsManaged(annotations) {
			t.Errorf("%v: %+v, %v", annotations, l, err)
		}
	}
	if !keys.IsManaged(map[string]string{keys.Managed: "true"}) || keys.IsManaged(map[string]string{keys.Managed: "yes"}) {
		t.Error("flannel serves nodes that say true, and no others")
	}
	if v4, v6, err := ParsePodCIDRs("", nil); err != nil || v4.IsValid() || v6.IsValid() {
		t.Errorf("no podCIDR: %s, %s, %v", v4, v6, err)
	}
}

func TestHostileAnnotations(t *testing.T) {
	keys := mustKeys(t)
	good := Lease{PublicIP: addr("192.0.2.11"), MAC: mac("0a:58:0a:f4:01:00"), VNI: 1, PublicIPv6: addr("2001:db8::11"), MACv6: mac("0a:58:0a:f4:01:01"), VNIv6: 1, BackendType: "vxlan"}
	onlyV6, withoutData := good, good
	onlyV6.PublicIP, onlyV6.MAC, onlyV6.VNI = addr(""), state.MAC{}, 0
	withoutData.MAC, withoutData.VNI = state.MAC{}, 0
	onlyV6.Broken, withoutData.Broken = true, true
	names := "annotations flannel.alpha.coreos.com/public-ip and flannel.alpha.coreos.com/backend-data: "
	for _, test := range []struct{ key, value, err string }{
		{keys.PublicIP, "$(reboot)", `"$(reboot)" is no IPv4 address`},
		{keys.PublicIP, "127.0.0.1", `public IP 127.0.0.1 is not the address of one host`},
		{keys.PublicIP, "2001:db8::1", `public IP 2001:db8::1 is no plain IPv4 address`},
		{keys.PublicIP, "192.0.2.11\x1b[2J", `"192.0.2.11\x1b[2J" is no IPv4 address`},
		{keys.PublicIP, strings.Repeat("x", 100), `"` + strings.Repeat("x", 80) + `"… is no IPv4 address`},
		{keys.BackendData, `{"VNI":16777216}`, `VNI 16777216 is larger than 16777215`},
		{keys.BackendData, `{"VNI":1,"VtepMAC":"x"}`, `VtepMAC: "x" is not the MAC address of one device`},
		{keys.BackendData, `{"VNI":1`, `backend data is "{\"VNI\":1", not of the form {"VNI":1,"VtepMAC":"0a:58:0a:f4:01:00"}`},
		{keys.BackendData, strings.Repeat("x", maxBackendData+1), `backend data of 4097 bytes; the limit is 4096`},
	} {
		set, _ := keys.Marshal(good)
		set[test.key] = test.value
		want := onlyV6
		if test.key == keys.BackendData {
			want = withoutData
		}
		l, err := keys.Parse(set)
		if l != want || err == nil || err.Error() != names+test.err {
			t.Errorf("%s=%.30q: %+v\n got %v\nwant %s", test.key, test.value, l, err, names+test.err)
		}
	}
}

func TestFamilyThatIsNoLongerInUse(t *testing.T) {
	keys := mustKeys(t)
	set, remove := keys.Marshal(Lease{PublicIPv6: addr("2001:db8::11"), MACv6: mac("0a:58:0a:f4:01:01"), VNIv6: 1})
	if !slices.Equal(remove, []string{keys.BackendData, keys.PublicIP}) || set[keys.BackendData] != "" || len(set) != 4 {
		t.Errorf("set %v, remove %v", set, remove)
	}
}

func TestOverridesOfAnOperator(t *testing.T) {
	keys := mustKeys(t)
	got, err := keys.ParseOverrides(map[string]string{
		keys.PublicIPOverwrite: "203.0.113.1", keys.PublicIPv6Overwrite: "2001:db8::1",
		keys.NodePublicIP: "203.0.113.2", keys.NodePublicIPv6: "2001:db8::2",
	})
	want := Overrides{addr("203.0.113.1"), addr("2001:db8::1"), addr("203.0.113.2"), addr("2001:db8::2")}
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := keys.ParseOverrides(nil); err != nil || got != (Overrides{}) {
		t.Errorf("without annotations: %+v, %v", got, err)
	}
	got, err = keys.ParseOverrides(map[string]string{keys.PublicIPOverwrite: "x", keys.NodePublicIP: "203.0.113.2", keys.NodePublicIPv6: "203.0.113.2"})
	text := `annotation flannel.alpha.coreos.com/public-ip-overwrite: "x" is no IPv4 address
annotation flannel.alpha.coreos.com/node-public-ipv6: public IP 203.0.113.2 is no plain IPv6 address`
	if got != (Overrides{NodePublicIP: addr("203.0.113.2")}) || err == nil || err.Error() != text {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzAnnotations(f *testing.F) {
	keys := mustKeys(f)
	for _, name := range capturedNodes {
		for _, n := range mustCapturedNodes(f, name) {
			cidrs := append(slices.Clone(n.Spec.PodCIDRs), "", "")
			f.Add(n.Annotations[keys.BackendType], n.Annotations[keys.PublicIP], n.Annotations[keys.BackendData],
				n.Annotations[keys.PublicIPv6], n.Annotations[keys.BackendV6Data], cidrs[0], cidrs[1])
		}
	}
	f.Add("vxlan", "192.0.2.1", `{"VtepMAC":""}`, "::", "null", "fd00:10:244::/64", "10.244.7.9/24")
	f.Fuzz(func(t *testing.T, backend, ip, data, ip6, data6, cidr, cidr2 string) {
		l, err := keys.Parse(map[string]string{
			keys.BackendType: backend, keys.PublicIP: ip, keys.BackendData: data, keys.PublicIPv6: ip6, keys.BackendV6Data: data6,
		})
		set, _ := keys.Marshal(l)
		back, backErr := keys.Parse(set)
		if backErr != nil {
			t.Fatalf("%v: %v", set, backErr)
		}
		if err == nil && l.half(false).publishable() && l.half(true).publishable() && backend == BackendType && back != l {
			t.Fatalf("%+v came back as %+v", l, back)
		}
		if l.Prefix, l.PrefixV6, err = ParsePodCIDRs(cidr, []string{cidr2}); err == nil {
			mustBeSoundPeers(t, l)
		}
		if l.Prefix, l.PrefixV6, err = ParsePodCIDRs("", []string{cidr, cidr2}); err == nil {
			mustBeSoundPeers(t, l)
		}
	})
}

func FuzzAnnotationPrefix(f *testing.F) {
	for _, c := range mustCases[struct{ Prefix string }](f, "prefixes.json") {
		f.Add(c.Prefix)
	}
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := NewAnnotationKeys(text)
		if err != nil {
			return
		}
		for _, k := range keys.All() {
			if strings.Count(k, "/") != 1 || strings.ContainsAny(k, " \n\t\"") || strings.ToLower(k) != k {
				t.Fatalf("%q", k)
			}
		}
	})
}
