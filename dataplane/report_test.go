//go:build linux

package dataplane

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
)

func TestPeersOfMapAndKernelAreCompared(t *testing.T) {
	var (
		ip     = netip.MustParseAddr("192.0.2.12")
		prefix = netip.MustParsePrefix("10.244.2.0/24")
		mac    = state.MAC{2, 0, 0, 0, 0, 2}
		inMap  = []ebpf.Peer{{PublicIP: ip, Prefixes: []netip.Prefix{prefix}, MAC: mac, Carried: true, On: true}}
		entry  = kernel.Entry{Prefix: prefix, Gateway: prefix.Addr(), MAC: mac, PublicIP: ip}
	)
	direct := kernel.Entry{Prefix: prefix, Gateway: ip, PublicIP: ip, Direct: true}
	astray := kernel.Entry{Prefix: prefix, Gateway: netip.MustParseAddr("192.0.2.1"), PublicIP: netip.MustParseAddr("192.0.2.1"), Direct: true}
	known := []ebpf.Peer{{PublicIP: ip, Prefixes: []netip.Prefix{prefix}, On: true}}
	other := entry
	other.MAC = state.MAC{2, 0, 0, 0, 0, 3}
	for name, test := range map[string]struct {
		peers   []ebpf.Peer
		entries []kernel.Entry
		withMap families
		want    []string
	}{
		"Same":            {inMap, []kernel.Entry{entry}, families{ipv4: true}, nil},
		"NoProgramsAtAll": {nil, []kernel.Entry{entry}, families{}, nil},
		"OnlyInKernel":    {nil, []kernel.Entry{entry}, families{ipv4: true}, []string{"10.244.2.0/24 is in the kernel but not in the peers map"}},
		"OnlyInMap":       {inMap, nil, families{ipv4: true}, []string{"10.244.2.0/24 is in the peers map but the kernel has no complete route, neighbour and FDB entry for it"}},
		"NoRoom": {known, []kernel.Entry{entry}, families{ipv4: true}, []string{
			"the accelerator has no room for it; it rides the kernel path",
		}},
		"Direct":      {known, []kernel.Entry{direct}, families{ipv4: true}, nil},
		"RouteAstray": {inMap, []kernel.Entry{astray}, families{ipv4: true}, []string{"10.244.2.0/24 is in the peers map but the kernel has no complete route, neighbour and FDB entry for it"}},
		"OtherMAC":    {inMap, []kernel.Entry{other}, families{ipv4: true}, []string{"10.244.2.0/24: the kernel has MAC 02:00:00:00:00:03, the peers map 02:00:00:00:00:02"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := comparePeers(test.peers, test.entries, test.withMap)
			if len(got) != 1 || got[0].PublicIP != ip || len(got[0].Prefixes) != 1 {
				t.Fatalf("peers are %+v, want the one", got)
			}
			if !reflect.DeepEqual(got[0].Divergence, test.want) {
				t.Errorf("divergence is %q, want %q", got[0].Divergence, test.want)
			}
			if isDirect := len(got[0].Direct) == 1; isDirect != (name == "Direct") {
				t.Errorf("direct are %v", got[0].Direct)
			}
		})
	}
}

// A node with two public IPs is two peers. That of IPv6 is counted on the kernel
// path, and so not in the map of those that leave it.
func TestIPv6PeersAreCompared(t *testing.T) {
	var (
		ip, ip4 = netip.MustParseAddr("2001:db8::12"), netip.MustParseAddr("192.0.2.12")
		prefix  = netip.MustParsePrefix("fd00:10:244:2::/64")
		prefix4 = netip.MustParsePrefix("10.244.2.0/24")
		mac     = state.MAC{2, 0, 0, 0, 0, 2}
		entry   = kernel.Entry{Prefix: prefix, Gateway: prefix.Addr(), MAC: mac, PublicIP: ip}
		entry4  = kernel.Entry{Prefix: prefix4, Gateway: prefix4.Addr(), MAC: mac, PublicIP: ip4}
		direct  = kernel.Entry{Prefix: prefix, Gateway: ip, PublicIP: ip, Direct: true}
		peer    = ebpf.Peer{PublicIP: ip, Prefixes: []netip.Prefix{prefix}, MAC: mac, On: true, Express: true}
		peer4   = ebpf.Peer{PublicIP: ip4, Prefixes: []netip.Prefix{prefix4}, MAC: mac, Carried: true, On: true, Express: true}
		counted = peer
	)
	counted.Carried = true
	counted.Paths[2].TxPackets = 7
	other := entry
	other.MAC = state.MAC{2, 0, 0, 0, 0, 3}
	for name, test := range map[string]struct {
		peers   []ebpf.Peer
		entries []kernel.Entry
		withMap families
		want    []string
	}{
		"Counted":         {[]ebpf.Peer{peer4, counted}, []kernel.Entry{entry4, entry}, families{true, true}, nil},
		"CountedAlone":    {[]ebpf.Peer{counted}, []kernel.Entry{entry4, entry}, families{ipv6: true}, nil},
		"NoProgramsForIt": {[]ebpf.Peer{peer4}, []kernel.Entry{entry4, entry}, families{ipv4: true}, nil},
		"NoProgramsAtAll": {nil, []kernel.Entry{entry4, entry}, families{}, nil},
		"OnlyInKernel":    {[]ebpf.Peer{peer4}, []kernel.Entry{entry4, entry}, families{true, true}, []string{"fd00:10:244:2::/64 is in the kernel but not in the peers map"}},
		"OtherMAC":        {[]ebpf.Peer{peer4, counted}, []kernel.Entry{entry4, other}, families{true, true}, []string{"fd00:10:244:2::/64: the kernel has MAC 02:00:00:00:00:03, the peers map 02:00:00:00:00:02"}},
		"NoRoom":          {[]ebpf.Peer{peer4, peer}, []kernel.Entry{entry4, entry}, families{true, true}, []string{"the accelerator has no room for it; its packets are not counted"}},
		"PastTheOverlay":  {[]ebpf.Peer{peer4, peer}, []kernel.Entry{entry4, direct}, families{true, true}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := comparePeers(test.peers, test.entries, test.withMap)
			if len(got) != 2 || got[0].PublicIP != ip4 || got[1].PublicIP != ip {
				t.Fatalf("peers are %+v, want both", got)
			}
			if len(got[0].Divergence) > 0 || !reflect.DeepEqual(got[1].Divergence, test.want) {
				t.Errorf("divergence is %q and %q, want none and %q", got[0].Divergence, got[1].Divergence, test.want)
			}
			if got[1].InMap || !got[1].Switches.All() {
				t.Errorf("IPv6 seems to be accelerated: %+v", got[1])
			}
			var want []PathCounters
			if strings.HasPrefix(name, "Counted") || name == "OtherMAC" {
				want = []PathCounters{{Path: "express"}, {Path: "base"}, {Path: "kernel", TxPackets: 7}}
			}
			if !reflect.DeepEqual(got[1].Counters, want) {
				t.Errorf("counters are %+v, want %+v", got[1].Counters, want)
			}
		})
	}
}

// Whoever only counts makes no packet take another path.
func TestModeByWhatIsAttached(t *testing.T) {
	hook := func(program, kind string, counts bool) ebpf.Hook {
		return ebpf.Hook{Program: program, Kind: kind, Counts: counts}
	}
	for name, c := range map[string]struct {
		hooks      []ebpf.Hook
		mode       string
		reason     string
		ipv4, ipv6 bool
	}{
		"All":          {[]ebpf.Hook{hook("uplink_in", "tcx", false), hook("overlay6_in", "tcx", true)}, ModeEBPF, "", true, true},
		"NotIPv4":      {[]ebpf.Hook{hook("uplink_in", "", false), hook("overlay6_in", "tcx", true)}, ModeKernel, "not attached: uplink_in", false, true},
		"NotIPv6":      {[]ebpf.Hook{hook("uplink_in", "tcx", false), hook("overlay6_in", "", true)}, ModeEBPF, "", true, false},
		"IPv6Alone":    {[]ebpf.Hook{hook("overlay6_in", "clsact", true)}, ModeKernel, "no program carries packets; IPv6 rides the kernel path", false, true},
		"IPv6NotThere": {[]ebpf.Hook{hook("overlay6_in", "", true)}, ModeKernel, "no program carries packets; IPv6 rides the kernel path", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			if mode, reason := judge(c.hooks); mode != c.mode || reason != c.reason {
				t.Errorf("mode %s (%q), want %s (%q)", mode, reason, c.mode, c.reason)
			}
			if ipv4, ipv6 := attached(c.hooks); ipv4 != c.ipv4 || ipv6 != c.ipv6 {
				t.Errorf("attached: IPv4 %v, IPv6 %v", ipv4, ipv6)
			}
		})
	}
}

func TestUplinksThatAreNotUnderstood(t *testing.T) {
	good := kernel.Uplink{Name: "eth0", Index: 2, EncapType: "ether", Kind: "device"}
	if reason := unsuitable(good); reason != "" {
		t.Errorf("a network card is refused: %s", reason)
	}
	for name, change := range map[string]func(*kernel.Uplink){
		"NoEthernetHeader": func(u *kernel.Uplink) { u.EncapType = "none" },
		"PartOfABond":      func(u *kernel.Uplink) { u.Master = "bond0" },
		"Bond":             func(u *kernel.Uplink) { u.Kind = "bond" },
		"Bridge":           func(u *kernel.Uplink) { u.Kind = "bridge" },
		"VLAN":             func(u *kernel.Uplink) { u.Kind = "vlan" },
	} {
		t.Run(name, func(t *testing.T) {
			u := good
			change(&u)
			if unsuitable(u) == "" {
				t.Errorf("%+v is accepted", u)
			}
		})
	}
}

// Without programs nothing but the routes tells of peers past the overlay, and of
// those only the ones that lead where a peer is.
func TestPeersServedDirectlyWithoutPrograms(t *testing.T) {
	peer := func(prefix, ip string) state.Peer {
		return state.Peer{Prefix: netip.MustParsePrefix(prefix), PublicIP: netip.MustParseAddr(ip)}
	}
	past := func(prefix, ip string) kernel.Entry {
		a := netip.MustParseAddr(ip)
		return kernel.Entry{Prefix: netip.MustParsePrefix(prefix), Gateway: a, PublicIP: a, Direct: true}
	}
	told := []state.Peer{
		peer("10.244.2.0/24", "192.0.2.12"), peer("10.244.3.0/24", "192.0.2.12"), peer("10.244.4.0/24", "192.0.2.14"),
		peer("10.244.5.0/24", "192.0.2.15"), peer("fd00:2::/64", "2001:db8::12"),
	}
	entries := []kernel.Entry{
		past("10.244.2.0/24", "192.0.2.12"), past("10.244.3.0/24", "192.0.2.12"), past("fd00:2::/64", "2001:db8::12"),
		past("10.244.4.0/24", "192.0.2.1"), // to a router
		past("10.244.9.0/24", "192.0.2.19"),
	}
	var got []string
	for _, p := range comparePeers(servedDirectly(told, entries), entries, families{}) {
		got = append(got, fmt.Sprint(p.PublicIP, p.Prefixes, p.Direct, p.Divergence, p.Counters, p.InMap, p.Switches))
	}
	want := []string{
		"192.0.2.12 [10.244.2.0/24 10.244.3.0/24] [10.244.2.0/24 10.244.3.0/24] [] [] false {true true}",
		"2001:db8::12 [fd00:2::/64] [fd00:2::/64] [] [] false {true true}",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}
