package kube

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weft-net/weft/dataplane/state"
)

// node makes a node with one prefix, created at the given second.
func node(name string, created int64, prefix, publicIP, mac string) neighbor {
	m, _ := state.ParseMAC(mac)
	return neighbor{name: name, created: created, peers: []state.Peer{{
		Node: name, Prefix: netip.MustParsePrefix(prefix), PublicIP: netip.MustParseAddr(publicIP), MAC: m,
	}}}
}

// home is the node that judges.
func home() state.Local {
	return state.Local{
		Node: "self", Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
		Address: netip.MustParseAddr("192.0.2.1"), PublicIP: netip.MustParseAddr("203.0.113.1"), MAC: state.MAC{2, 0, 0, 0, 0, 1},
	}
}

// names lists the peers' nodes; those without a MAC are in brackets.
func names(m members) string {
	var list []string
	for _, p := range m.peers {
		name := p.Node
		if p.MAC.IsZero() {
			name = "(" + name + ")"
		}
		list = append(list, name)
	}
	return fmt.Sprint(list)
}

func TestWhoHasWhatTwoNodesClaim(t *testing.T) {
	for what, c := range map[string]struct {
		nodes []neighbor
		want  string
	}{
		"the older node has the prefix": {[]neighbor{
			node("a", 20, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("b", 10, "10.244.2.0/24", "192.0.2.3", "0a:00:00:00:00:03"),
		}, "[b]"},
		"of the same age, the first by name": {[]neighbor{
			node("b", 10, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("a", 10, "10.244.2.0/24", "192.0.2.3", "0a:00:00:00:00:03"),
		}, "[a]"},
		"a part of it is the same claim": {[]neighbor{
			node("a", 10, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("b", 20, "10.244.2.128/25", "192.0.2.3", "0a:00:00:00:00:03"),
		}, "[a]"},
		"and so is more than it": {[]neighbor{
			node("a", 10, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("b", 20, "10.244.2.0/23", "192.0.2.3", "0a:00:00:00:00:03"),
		}, "[a]"},
		"ours is ours, however old the other": {[]neighbor{node("a", 0, "10.244.1.0/24", "192.0.2.2", "0a:00:00:00:00:02")}, "[]"},
		"with all around it":                  {[]neighbor{node("a", 0, "10.244.0.0/16", "192.0.2.2", "0a:00:00:00:00:02")}, "[]"},
		"our address":                         {[]neighbor{node("a", 0, "10.244.2.0/24", "192.0.2.1", "0a:00:00:00:00:02")}, "[]"},
		"our public IP":                       {[]neighbor{node("a", 0, "10.244.2.0/24", "203.0.113.1", "0a:00:00:00:00:02")}, "[]"},
		"our MAC":                             {[]neighbor{node("a", 0, "10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:01")}, "[(a)]"},
		"one MAC on two machines": {[]neighbor{
			node("a", 20, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("b", 10, "10.244.3.0/24", "192.0.2.3", "0a:00:00:00:00:02"),
		}, "[b (a)]"},
		"one machine with its old Node": {[]neighbor{
			node("new", 20, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("old", 10, "10.244.3.0/24", "192.0.2.2", "0a:00:00:00:00:02"),
		}, "[old new]"},
		"a node in another's pods": {[]neighbor{
			node("a", 10, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("b", 20, "10.244.3.0/24", "10.244.2.7", "0a:00:00:00:00:03"),
		}, "[a]"},
		"a node in ours": {[]neighbor{node("b", 0, "10.244.3.0/24", "10.244.1.1", "0a:00:00:00:00:03")}, "[]"},
		"pods around another node": {[]neighbor{
			node("a", 10, "10.244.2.0/24", "10.244.3.7", "0a:00:00:00:00:02"), node("b", 20, "10.244.3.0/24", "192.0.2.3", "0a:00:00:00:00:03"),
		}, "[a]"},
		"pods around us":         {[]neighbor{node("b", 0, "192.0.2.0/25", "198.51.100.3", "0a:00:00:00:00:03")}, "[]"},
		"pods around our public": {[]neighbor{node("b", 0, "203.0.113.0/24", "198.51.100.3", "0a:00:00:00:00:03")}, "[]"},
		"what was left out takes nothing with it": {[]neighbor{
			node("a", 10, "10.244.1.0/24", "192.0.2.2", "0a:00:00:00:00:02"), node("b", 20, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"),
		}, "[b]"},
	} {
		m := judge(home(), c.nodes)
		if got := names(m); got != c.want {
			t.Errorf("%s: %s, want %s (%v)", what, got, c.want, m.faults)
		}
		kept := 0
		for _, p := range m.peers {
			if !p.MAC.IsZero() {
				kept++
			}
		}
		if len(m.faults) != len(c.nodes)-kept {
			t.Errorf("%s: faults are %v", what, m.faults)
		}
	}
}

func TestAddressesOfNodes(t *testing.T) {
	with := func(n neighbor, addresses ...string) neighbor {
		for _, a := range addresses {
			n.addresses = append(n.addresses, netip.MustParseAddr(a))
		}
		return n
	}
	m := judge(home(), []neighbor{
		with(node("b", 20, "10.244.3.0/24", "192.0.2.3", "0a:00:00:00:00:03"), "198.51.100.2", "192.0.2.2", "198.51.100.1", "2001:db8::3"),
		with(node("a", 10, "10.244.2.0/24", "192.0.2.2", "0a:00:00:00:00:02"), "192.0.2.2", "198.51.100.2", "192.0.2.1", "203.0.113.1"),
		with(node("c", 0, "10.244.1.0/24", "192.0.2.4", "0a:00:00:00:00:04"), "198.51.100.1"), // left out
	})
	if got := fmt.Sprint(m.aliases); got != "[{198.51.100.1 192.0.2.3} {198.51.100.2 192.0.2.2}]" {
		t.Errorf("aliases are %s", got)
	}
}

// The outcome must not depend on the order in which Nodes come, and no two
// prefixes may overlap, with prefixes of all lengths.
func TestOverlapsOfManyLengths(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var nodes []neighbor
		for i := range 40 {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(random.IntN(8)), byte(random.IntN(256))}), 18+random.IntN(15)).Masked()
			nodes = append(nodes, node(fmt.Sprintf("n%d", i), int64(random.IntN(5)), p.String(), fmt.Sprintf("192.0.2.%d", 100+i), fmt.Sprintf("0a:00:00:00:00:%02x", 100+i)))
		}
		first := judge(home(), append([]neighbor(nil), nodes...))
		random.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		if again := judge(home(), nodes); fmt.Sprint(again.peers) != fmt.Sprint(first.peers) {
			t.Fatalf("%v, in another order %v", first.peers, again.peers)
		}
		for i, p := range first.peers {
			if p.Prefix.Overlaps(home().Prefixes[0]) {
				t.Fatalf("%v has ours", p)
			}
			for _, q := range first.peers[:i] {
				if p.Prefix.Overlaps(q.Prefix) {
					t.Fatalf("%v and %v", p, q)
				}
			}
		}
		if len(first.peers)+len(first.faults) != len(nodes) {
			t.Fatalf("%d peers and %d faults of %d", len(first.peers), len(first.faults), len(nodes))
		}
	}
}

// A Node whose annotations can't be understood any more is gone by as it was, as
// flannel does; but for what it says well, and not beyond its deletion.
func TestNodeThatTalksNonsenseAllOfASudden(t *testing.T) {
	const v4, v6 = "10.244.2.0/24 192.0.2.2 0a:00:00:00:00:02", "fd00:10:244:2::/64 2001:db8::2 0e:00:00:00:00:02"
	const nobody = "10.244.2.0/24 192.0.2.2 00:00:00:00:00:00"
	for what, c := range map[string]struct {
		change map[string]string
		want   string
		faulty bool
		first  string // when it was never better
	}{
		"public IP":       {map[string]string{"public-ip": "x"}, v6 + "," + v4, true, v6},
		"loopback":        {map[string]string{"public-ip": "127.0.0.1"}, v6 + "," + v4, true, v6},
		"data":            {map[string]string{"backend-data": "{"}, v6 + "," + v4, true, nobody + "," + v6},
		"data of IPv6":    {map[string]string{"backend-v6-data": "[]"}, v4 + "," + v6, true, v4 + ",fd00:10:244:2::/64 2001:db8::2 00:00:00:00:00:00"},
		"a group's MAC":   {map[string]string{"backend-data": `{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}`}, v6 + "," + v4, true, nobody + "," + v6},
		"backend":         {map[string]string{"backend-type": "host-gw"}, v4 + "," + v6, true, ""},
		"half well":       {map[string]string{"public-ip": "x", "public-ipv6": "2001:db8::9"}, "fd00:10:244:2::/64 2001:db8::9 0e:00:00:00:00:02," + v4, true, "fd00:10:244:2::/64 2001:db8::9 0e:00:00:00:00:02"},
		"no MAC, soundly": {map[string]string{"backend-data": `{"VNI":1}`}, nobody + "," + v6, false, nobody + "," + v6},
		"no annotations":  {map[string]string{"kube-subnet-manager": "false"}, "", false, ""},
	} {
		r := readerOf(t, confDual)
		says := func(n neighbor) string {
			var list []string
			for _, p := range n.peers {
				list = append(list, fmt.Sprint(p.Prefix, " ", p.PublicIP, " ", p.MAC))
			}
			return strings.Join(list, ",")
		}
		good := honestNode()
		bad := honestNode()
		for key, value := range c.change {
			bad.Annotations["flannel.alpha.coreos.com/"+key] = value
		}
		for how, add := range map[string]func(n *nodes, node *corev1.Node) error{
			"an update": func(n *nodes, node *corev1.Node) error { return n.Update(node) },
			"a list":    func(n *nodes, node *corev1.Node) error { return n.Replace([]any{node}, "") },
		} {
			n := newNodes(r, func() {})
			see := func(node *corev1.Node, want string, faulty bool) {
				t.Helper()
				if err := add(n, node); err != nil {
					t.Fatal(err)
				}
				got := n.others["honest"]
				if says(got) != want || (got.fault != "") != faulty {
					t.Errorf("%s, by %s: %s, %q; want %s", what, how, says(got), got.fault, want)
				}
			}
			see(bad, c.first, c.faulty)
			see(good, v4+","+v6, false)
			see(bad, c.want, c.faulty)
			see(bad, c.want, c.faulty) // again: what was kept is kept
			other := bad.DeepCopy()
			other.CreationTimestamp = metav1.NewTime(time.Unix(1_800_000_009, 0))
			see(other, c.first, c.faulty) // another Node of its name
			see(good, v4+","+v6, false)
			if err := n.Delete(good); err != nil {
				t.Fatal(err)
			}
			see(bad, c.first, c.faulty)
		}
	}
}

func BenchmarkJudge(b *testing.B) {
	var nodes []neighbor
	for i := range 5000 {
		n := node(fmt.Sprintf("n%d", i), int64(i), fmt.Sprintf("10.%d.%d.0/24", 128+i/256, i%256), fmt.Sprintf("198.18.%d.%d", i/256, i%256), fmt.Sprintf("02:00:00:00:%02x:%02x", i/256, i%256))
		n.addresses = []netip.Addr{n.peers[0].PublicIP}
		nodes = append(nodes, n)
	}
	for b.Loop() {
		judge(home(), append([]neighbor(nil), nodes...))
	}
}
