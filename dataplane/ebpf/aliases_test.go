//go:build linux

package ebpf

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// Nodes 1 (10.244.1.0/24) and 2 (10.244.2.0/24) are carried, 3 (10.244.3.0/24) is
// known only.
func TestAliases(t *testing.T) {
	peer := func(node int) state.Peer {
		return state.Peer{
			Prefix:   netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(node), 0}), 24),
			PublicIP: nodeIP(node), MAC: state.MAC{2, 0, 0, 0, 0, byte(node)},
		}
	}
	alias := func(address string, node int) state.Alias {
		return state.Alias{Addr: netip.MustParseAddr(address), PublicIP: nodeIP(node)}
	}
	for name, c := range map[string]struct {
		aliases []state.Alias
		want    map[string]int // address → node
	}{
		"some of each": {
			[]state.Alias{alias("198.51.100.1", 1), alias("198.51.100.2", 2), alias("198.51.100.3", 3), alias("198.51.100.11", 1)},
			map[string]int{"198.51.100.1": 1, "198.51.100.2": 2, "198.51.100.3": 3, "198.51.100.11": 1},
		},
		"said twice":                        {[]state.Alias{alias("198.51.100.1", 1), alias("198.51.100.1", 1)}, map[string]int{"198.51.100.1": 1}},
		"of nobody":                         {[]state.Alias{alias("198.51.100.9", 9)}, nil},
		"another's public IP":               {[]state.Alias{alias("192.0.2.2", 1), alias("192.0.2.3", 1)}, nil},
		"its own public IP":                 {[]state.Alias{alias("192.0.2.1", 1)}, nil},
		"through another's alias":           {[]state.Alias{alias("198.51.100.1", 1), {Addr: addr("198.51.100.2"), PublicIP: addr("198.51.100.1")}}, map[string]int{"198.51.100.1": 1}},
		"a pod's address":                   {[]state.Alias{alias("10.244.2.7", 1), alias("10.244.3.7", 1), alias("10.244.1.7", 1)}, nil},
		"claimed by two":                    {[]state.Alias{alias("172.17.0.1", 1), alias("172.17.0.1", 2), alias("198.51.100.1", 1)}, map[string]int{"198.51.100.1": 1}},
		"claimed by two, one of them again": {[]state.Alias{alias("172.17.0.1", 1), alias("172.17.0.1", 2), alias("172.17.0.1", 1)}, nil},
		"IPv6":                              {[]state.Alias{alias("2001:db8::1", 1)}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSlots(8)
			placed := place(&s, 8, []state.Peer{peer(1), peer(2)}, []state.Peer{peer(3)})
			before := len(placed.nodes)
			placed.addAliases(c.aliases, 100, netip.Addr.Is4)
			if got := len(placed.nodes) - before; got != len(c.want) {
				t.Errorf("%d aliases are in the map, want %d: %v", got, len(c.want), placed.nodes)
			}
			for node := 1; node <= 3; node++ {
				if got := placed.nodes[nodeIP(node)].remote; got != nodeIP(node) {
					t.Errorf("%v is now %v's", nodeIP(node), got)
				}
			}
			for address, node := range c.want {
				got, want := placed.nodes[addr(address)], placed.nodes[nodeIP(node)]
				if got != want || want.remote != nodeIP(node) {
					t.Errorf("%s is %+v, want %+v", address, got, want)
				}
			}
		})
	}
}

func TestMoreAliasesThanFit(t *testing.T) {
	s := newSlots(8)
	placed := place(&s, 8, []state.Peer{{Prefix: mustPrefix("10.244.1.0/24"), PublicIP: nodeIP(1)}}, nil)
	var many []state.Alias
	for i := range byte(100) {
		many = append(many, state.Alias{Addr: netip.AddrFrom4([4]byte{198, 51, 100, i}), PublicIP: nodeIP(1)})
	}
	placed.addAliases(many, 10, netip.Addr.Is4)
	if len(placed.nodes) != 10 || !placed.nodes[many[0].Addr].remote.IsValid() {
		t.Errorf("%d entries, want 10 with the first aliases among them", len(placed.nodes))
	}
}

// A packet from another address of its node passes the source check, and such an
// address is one that pods must not send to; when it goes, neither any more.
func TestPacketsFromAnotherAddressOfANode(t *testing.T) {
	n := newNode(t)
	n.accel.own = []netip.Addr{addr(ourIP)} // until our own are known nothing is removed
	const alias = "198.51.100.77"
	inner := eth(blueMAC, ourMAC).ip(alias, ourPod).udp(1, 2).payload(20)
	for i, step := range []struct {
		aliases []state.Alias
		from    string
		want    weftReason
	}{
		{nil, blueIP, weftReasonREASON_SOURCE_NOT_ITS_PREFIX},
		{[]state.Alias{{Addr: addr(alias), PublicIP: addr(blueIP)}}, blueIP, weftReasonREASON_NONE},
		{[]state.Alias{{Addr: addr(alias), PublicIP: addr(blueIP)}}, greenIP, weftReasonREASON_SOURCE_NOT_ITS_PREFIX},
		// It is an inner address of the node, and no outer one.
		{[]state.Alias{{Addr: addr(alias), PublicIP: addr(blueIP)}}, alias, weftReasonREASON_SOURCE_UNKNOWN_PEER},
		{[]state.Alias{{Addr: addr(alias), PublicIP: addr(greenIP)}}, blueIP, weftReasonREASON_SOURCE_NOT_ITS_PREFIX},
		{nil, blueIP, weftReasonREASON_SOURCE_NOT_ITS_PREFIX},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			n.tb = t
			n.desired.Aliases = step.aliases
			n.desired.SourceCheck = "enforce"
			n.sync()
			n.reset()
			in := carried(step.from, inner).bytes(t)
			want := packetCase{verdict: dropped, reason: step.want}
			if step.want == weftReasonREASON_NONE {
				want = packetCase{verdict: redirected, counted: received(step.from, "base", 1, uint64(len(in)-atInnerIP))}
			}
			want.check(t, in, n.run(uplinkIn, in))
			var one uint32
			err := n.accel.objects.NodeAddresses.Lookup(toBE32(addr(alias)), &one)
			if (err == nil) != (len(step.aliases) > 0) {
				t.Errorf("%s in node_addresses: %v", alias, err)
			}
		})
	}
}
