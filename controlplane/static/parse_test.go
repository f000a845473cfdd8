package static

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// example is the file in the package's documentation.
func example(tb testing.TB) []byte {
	tb.Helper()
	data, err := os.ReadFile("testdata/example.yaml")
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func mustMAC(tb testing.TB, s string) state.MAC {
	tb.Helper()
	mac, err := state.ParseMAC(s)
	if err != nil {
		tb.Fatal(err)
	}
	return mac
}

func TestExample(t *testing.T) {
	got, err := Parse("weft.yaml", example(t))
	if err != nil {
		t.Fatal(err)
	}
	want := state.State{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")},
		VNI:      1, Port: 8472,
		Local: state.Local{
			Node:     "node-a",
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
			Uplink:   "eth0",
			PublicIP: netip.MustParseAddr("192.0.2.1"),
			MAC:      mustMAC(t, "0a:58:0a:f4:01:00"),
		},
		Peers: []state.Peer{{
			Node:     "node-b",
			Prefix:   netip.MustParsePrefix("10.244.2.0/24"),
			PublicIP: netip.MustParseAddr("192.0.2.2"),
			MAC:      mustMAC(t, "0a:58:0a:f4:02:00"),
		}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestExampleIsTheDocumentedOne(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(example(t))) {
		if !strings.Contains(string(doc), "//\t"+line) {
			t.Errorf("doc.go lacks the line %q", line)
		}
	}
}

func TestIPv6(t *testing.T) {
	got, err := Parse("weft.yaml", []byte(`
interface: eth0
publicIP: 2001:db8::1
network: ["fd00:10:244::/48"]
node: {name: a, prefixes: ["fd00:10:244:1::/64"], mac: "0a:58:00:00:00:01"}
peers:
- {name: b, prefixes: ["fd00:10:244:2::/64", "fd00:10:244:3::/64"], publicIP: "2001:db8::2", mac: "0a:58:00:00:00:02"}
`))
	if err != nil {
		t.Fatal(err)
	}
	if got.Local.PublicIP.IsValid() || got.Local.PublicIPv6 != netip.MustParseAddr("2001:db8::1") {
		t.Errorf("public addresses are %v and %v", got.Local.PublicIP, got.Local.PublicIPv6)
	}
	if !got.Local.MAC.IsZero() || got.Local.MACv6.IsZero() {
		t.Errorf("MACs are %v and %v", got.Local.MAC, got.Local.MACv6)
	}
	if len(got.Peers) != 2 || got.Peers[0].Node != "b" || got.Peers[1].Node != "b" {
		t.Errorf("one peer per prefix wanted, got %+v", got.Peers)
	}
}

// Each case is the example with one piece of text replaced, and the fault.
func TestFaults(t *testing.T) {
	for _, test := range []struct{ name, old, new, want string }{
		{"interface missing", "interface: eth0 ", "#", `2: interface is missing; name the interface that carries the underlay, as in eth0`},
		{"interface too long", "eth0", "averyveryverylongname", `1: interface: "averyveryverylongname" is no interface name; ` + "`ip link` lists them"},
		{"publicIP missing", "publicIP: 192.0.2.1 ", "#", `1: publicIP is missing; give this node's address on the underlay`},
		{"publicIP no address", "192.0.2.1 ", "eth0 ", `2: publicIP: "eth0" is no IP address; give this node's address on the underlay`},
		{"publicIP mapped", "192.0.2.1 ", `"::ffff:192.0.2.1"`, `2: publicIP: ::ffff:192.0.2.1 is an IPv4 address in IPv6 form; write 192.0.2.1`},
		{"publicIP with zone", "192.0.2.1 ", `"fe80::1%eth0"`, `2: publicIP: fe80::1%eth0 is link-local; give an address that can be routed`},
		{"publicIP loopback", "192.0.2.1 ", "127.0.0.1 ", `2: publicIP: 127.0.0.1 is not the address of one host; give this node's address on the underlay`},
		{"publicIP in the overlay", "192.0.2.1 ", "10.244.7.7 ", `2: publicIP: 10.244.7.7 lies inside the overlay's network 10.244.0.0/16; give the address on the underlay`},
		{"vni zero", "vni: 1 ", "vni: 0 ", `3: vni: "0" is no number from 1 to 16777215; flannel's default is 1`},
		{"vni too large", "vni: 1 ", "vni: 16777216 ", `3: vni: "16777216" is no number from 1 to 16777215; flannel's default is 1`},
		{"vni octal", "vni: 1 ", "vni: 010 ", `3: vni: "010" is no number from 1 to 16777215; flannel's default is 1`},
		{"vni a list", "vni: 1 ", "vni: [1] ", `3: vni is a list; give one value`},
		{"vni empty", "vni: 1 ", "vni: ", `3: vni has no value; give one, or leave the key out`},
		{"port too large", "8472", "65536", `4: port: "65536" is no number from 1 to 65535; flannel's default is 8472`},
		{"mtu too small", "mtu: 0 ", "mtu: 67 ", `5: mtu: "67" is no number from 68 to 65535; or 0 to follow the uplink; 68 is the least that IPv4 allows`},
		{"network missing", "network: ", "# ", ``},
		{"network of two", "- 10.244.0.0/16", "- 10.244.0.0/16\n  - 10.245.0.0/16", `7: network has 2 entries; give one that holds all pod prefixes`},
		{"network everything", "10.244.0.0/16", "0.0.0.0/0", `7: network[0]: 0.0.0.0/0 is everything; give the part that pods use`},
		{"network with host bits", "10.244.0.0/16", "10.244.1.0/16", `7: network[0]: 10.244.1.0/16 has host bits set; write 10.244.0.0/16`},
		{"network of the other family", "10.244.0.0/16", "fd00::/48", `7: network[0]: fd00::/48 is IPv6, but publicIP 192.0.2.1 is IPv4; one file carries one family`},
		{"node without a name", "name: node-a", "#", `10: node name is missing; name the node`},
		{"node with a bad name", "node-a ", "node_a$ ", `9: node name: "node_a$" is no host name; use up to 253 letters, digits, dots and dashes`},
		{"node with two prefixes", "[10.244.1.0/24]", "[10.244.1.0/24, 10.244.3.0/24]", `10: node.prefixes has 2 entries; a node has one pod prefix per family, and this file carries one family`},
		{"prefix with host bits", "10.244.1.0/24", "10.244.1.1/24", `10: node prefixes[0]: 10.244.1.1/24 has host bits set; write 10.244.1.0/24`},
		{"prefix outside", "10.244.1.0/24", "10.245.1.0/24", `10: node prefixes[0]: 10.245.1.0/24 lies outside network 10.244.0.0/16; give a part of it, or widen network`},
		{"prefix wider than network", "10.244.1.0/24", "10.240.0.0/12", `10: node prefixes[0]: 10.240.0.0/12 lies outside network 10.244.0.0/16; give a part of it, or widen network`},
		{"prefix too small", "10.244.1.0/24", "10.244.1.0/31", `10: node prefixes[0]: 10.244.1.0/31 has no room for a gateway and pods; give /30 or shorter`},
		{"prefix a word", "10.244.1.0/24", "pods", `10: node prefixes[0]: "pods" is no prefix; write it as 10.244.1.0/24 or fd00:10:244:1::/64`},
		{"prefixes no list", "[10.244.1.0/24]", "10.244.1.0/24", `10: node.prefixes is "10.244.1.0/24"; give a list, as in [10.244.0.0/16]`},
		{"prefixes empty", "[10.244.1.0/24]", "[]", `10: node: prefixes is an empty list; give the node's pod prefix, as in [10.244.1.0/24]`},
		{"mac multicast", "0a:58:0a:f4:01:00", "01:58:0a:f4:01:00", `11: node.mac: "01:58:0a:f4:01:00" is no MAC address of one device; write it as 0a:58:0a:f4:01:00`},
		{"mac twice", "0a:58:0a:f4:02:00", "0a:58:0a:f4:01:00", `16: peers[0] ("node-b") mac: 0a:58:0a:f4:01:00 is the node.mac (line 11) already; every overlay device needs its own`},
		{"peer without mac", "mac: 0a:58:0a:f4:02:00", "#", `13: peers[0] ("node-b"): mac is missing; nothing discovers it here: give the address of the peer's overlay device (` + "`ip link show flannel.1`" + ` there)`},
		{"peer without publicIP", "publicIP: 192.0.2.2", "#", `13: peers[0] ("node-b") publicIP is missing; give the peer's address on the underlay`},
		{"peer with our name", "node-b", "node-a", `13: peers[0] ("node-a") name: "node-a" is the name of node (line 9) already; names must differ`},
		{"peer with our address", "192.0.2.2", "192.0.2.1", `15: peers[0] ("node-b") publicIP: 192.0.2.1 is this node's own; leave this node out of peers`},
		{"peer in the overlay", "192.0.2.2", "10.244.2.1", `15: peers[0] ("node-b") publicIP: 10.244.2.1 lies inside the overlay's network 10.244.0.0/16; give the address on the underlay`},
		{"peer of the other family", "192.0.2.2", "2001:db8::2", `15: peers[0] ("node-b") publicIP: 2001:db8::2 is IPv6, but this node's publicIP 192.0.2.1 is IPv4; one file carries one family`},
		{"peer prefix of the other family", "10.244.2.0/24", "fd00::/64", `14: peers[0] ("node-b") prefixes[0]: fd00::/64 is IPv6, but publicIP 192.0.2.1 is IPv4; one file carries one family`},
		{"peer with our prefix", "10.244.2.0/24", "10.244.1.0/24", `14: peers[0] ("node-b"): prefix 10.244.1.0/24 is the same as 10.244.1.0/24 of node (line 10); a pod address must lead to one node`},
		{"peer inside our prefix", "10.244.2.0/24", "10.244.1.128/25", `14: peers[0] ("node-b"): prefix 10.244.1.128/25 overlaps 10.244.1.0/24 of node (line 10); a pod address must lead to one node`},
		{"unknown key", "vni:", "vnid:", `3: the file: unknown key "vnid"; known are interface, publicIP, vni, port, mtu, network, node, peers`},
		{"unknown key of a peer", "mac: 0a:58:0a:f4:02:00", "mac: 0a:58:0a:f4:02:00\n    weight: 3", `17: peers[0]: unknown key "weight"; known are name, prefixes, publicIP, mac`},
		{"key twice", "port: 8472", "vni: 8472", `4: the file: key "vni" was given on line 3 already; keep one`},
		{"anchor", "vni: 1", "vni: &x 1", `3: vni has the anchor &x; write values out, without anchors and aliases`},
		{"second document", "peers:", "---\npeers:", ``},
		{"no YAML", "vni: 1", "vni: [1", ``},
	} {
		t.Run(strings.ReplaceAll(test.name, " ", "_"), func(t *testing.T) {
			text := string(example(t))
			if !strings.Contains(text, test.old) {
				t.Fatalf("the example does not contain %q", test.old)
			}
			_, err := Parse("w", []byte(strings.Replace(text, test.old, test.new, 1)))
			if err == nil {
				t.Fatal("no fault was found")
			}
			if test.want == "" {
				t.Log(err)
				return
			}
			if got := err.Error(); got != "w:"+test.want {
				t.Errorf("got  %s\nwant w:%s", got, test.want)
			}
		})
	}
}

func TestAllFaultsAreReportedAtOnceInOrder(t *testing.T) {
	_, err := Parse("w", []byte(`port: 0
colour: red
publicIP: 192.0.2.1
network: [10.244.0.0/16]
node: {name: a}
peers:
- {name: b, prefixes: [10.244.2.0/24], publicIP: 192.0.2.2, mac: 0a:58:00:00:00:02}
- {name: b, prefixes: [10.244.2.0/25], publicIP: 192.0.2.2, mac: 0a:58:00:00:00:02}
- nonsense
`))
	want := `w:1: interface is missing; name the interface that carries the underlay, as in eth0
w:1: port: "0" is no number from 1 to 65535; flannel's default is 8472
w:2: the file: unknown key "colour"; known are interface, publicIP, vni, port, mtu, network, node, peers
w:5: node: prefixes is missing; give the node's pod prefix, as in [10.244.1.0/24]
w:8: peers[1] ("b") name: "b" is the name of peers[0] ("b") (line 7) already; names must differ
w:8: peers[1] ("b") publicIP: 192.0.2.2 belongs to peers[0] ("b") (line 7) already; put all prefixes of a node under one entry
w:8: peers[1] ("b") mac: 0a:58:00:00:00:02 is the peers[0] ("b") mac (line 7) already; every overlay device needs its own
w:8: peers[1] ("b"): prefix 10.244.2.0/25 overlaps 10.244.2.0/24 of peers[0] ("b") (line 7); a pod address must lead to one node
w:9: peers[2] is "nonsense"; it must be keys with values`
	if err == nil || err.Error() != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
}

// A file that is cut off while it is written must not take peers away.
func TestFileCutOff(t *testing.T) {
	text := example(t)
	for end := range len(text) - 1 {
		got, err := Parse("w", text[:end])
		if err == nil && len(got.Peers) == 0 {
			t.Errorf("cut off after %d bytes the file has no peers:\n%s", end, text[:end])
		}
	}
}

func TestBounds(t *testing.T) {
	if _, err := Parse("w", bytes.Repeat([]byte("#"), MaxSize+1)); err == nil || !strings.Contains(err.Error(), "the limit is 33554432") {
		t.Errorf("a file above the size limit: %v", err)
	}
	peers := "peers:\n" + strings.Repeat("- {}\n", MaxPeers+1)
	if _, err := Parse("w", []byte(peers)); err == nil || !strings.Contains(err.Error(), "peers has 100001 entries; the limit is 100000") {
		t.Errorf("a file with too many peers: %v", err)
	}
	_, err := Parse("w", []byte("peers:\n"+strings.Repeat("- {}\n", 1000)))
	if lines := strings.Count(err.Error(), "\n"); lines != maxFaults || !strings.Contains(err.Error(), "more faults") {
		t.Errorf("%d lines of faults", lines)
	}
}

// manyPeers is a file with n peers.
func manyPeers(n int) []byte {
	var b bytes.Buffer
	b.WriteString("interface: eth0\npublicIP: 192.0.2.1\nnetwork: [10.0.0.0/8]\nnode: {name: me, prefixes: [10.255.255.0/24]}\npeers:\n")
	for i := range n {
		fmt.Fprintf(&b, "- name: node-%d\n  prefixes: [10.%d.%d.%d/28]\n  publicIP: 172.%d.%d.%d\n  mac: 0a:58:00:%02x:%02x:%02x\n",
			i, i>>12, i>>4&255, i&15<<4, 16+i>>16, i>>8&255, i&255, i>>16, i>>8&255, i&255)
	}
	return b.Bytes()
}

func TestFiveThousandPeers(t *testing.T) {
	s, err := Parse("w", manyPeers(5000))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Peers) != 5000 {
		t.Errorf("%d peers", len(s.Peers))
	}
}

func BenchmarkParse(b *testing.B) {
	for _, n := range []int{5000, MaxPeers} {
		data := manyPeers(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Parse("w", data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(example(f))
	f.Add(manyPeers(3))
	f.Add([]byte("publicIP: 2001:db8::1\nnetwork: [\"fd00::/48\"]\npeers: []\n"))
	f.Add([]byte("a: &a [*a]\n<<: *a\n"))
	f.Add([]byte("? [x]\n: y\npeers: !!binary aGk=\n"))
	f.Add([]byte("--- \n...\n---\n"))
	f.Add([]byte("\xff\xfep\x00e\x00e\x00r\x00s\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Parse("w", data)
		if err != nil {
			var faults *Error
			if !errors.As(err, &faults) || len(faults.Faults) == 0 {
				t.Fatalf("an error without faults: %v", err)
			}
			for _, f := range faults.Faults {
				if f.Line < 1 || f.Text == "" || strings.Contains(f.Text, "\n") {
					t.Fatalf("fault %+v", f)
				}
			}
			return
		}
		checkState(t, s)
	})
}

// checkState checks what every state from a file must hold.
func checkState(t *testing.T, s state.State) {
	t.Helper()
	if len(s.Networks) != 1 || len(s.Local.Prefixes) != 1 || s.Local.Node == "" || s.Local.Uplink == "" {
		t.Fatalf("something is missing: %+v", s)
	}
	if s.VNI < 1 || s.VNI >= 1<<24 || s.Port == 0 || s.Local.MTU < 0 || s.Local.MTU > 65535 {
		t.Fatalf("something is out of bounds: %+v", s)
	}
	if s.Local.PublicIP.IsValid() == s.Local.PublicIPv6.IsValid() {
		t.Fatalf("one family wanted: %+v", s.Local)
	}
	inside := func(p netip.Prefix) bool {
		return p == p.Masked() && s.Networks[0].Overlaps(p) && p.Bits() >= s.Networks[0].Bits()
	}
	prefixes := append([]netip.Prefix{}, s.Local.Prefixes...)
	for _, p := range s.Peers {
		if p.Node == "" || p.MAC.IsZero() || p.PublicIP.Is4() != p.Prefix.Addr().Is4() {
			t.Fatalf("peer %+v", p)
		}
		prefixes = append(prefixes, p.Prefix)
	}
	for i, p := range prefixes {
		if !inside(p) {
			t.Fatalf("prefix %v of network %v", p, s.Networks[0])
		}
		for _, q := range prefixes[:i] {
			if p.Overlaps(q) {
				t.Fatalf("%v overlaps %v", p, q)
			}
		}
	}
}
