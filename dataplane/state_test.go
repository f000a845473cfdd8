//go:build linux

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
)

// A program does its work only for peers to which the kernel's own route leads
// through the overlay device.
func TestWhoIsCarriedByPrograms(t *testing.T) {
	peers := map[string]state.Peer{}
	var all []state.Peer
	for i, name := range []string{"tunnel", "direct", "skipped", "failed"} {
		peers[name] = state.Peer{Node: name, Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 0}), 24)}
		all = append(all, peers[name])
	}
	all = append(all, state.Peer{Node: "v6", Prefix: netip.MustParsePrefix("fd00::/64")})
	all = append(all, state.Peer{Node: "skippedv6", Prefix: netip.MustParsePrefix("fd00:0:0:1::/64")})
	carried, known := served(all, kernel.Result{
		Direct:  []netip.Prefix{peers["direct"].Prefix},
		Skipped: []netip.Prefix{peers["skipped"].Prefix, netip.MustParsePrefix("fd00:0:0:1::/64")},
		Failed:  map[netip.Prefix]error{peers["failed"].Prefix: errors.New("refused")},
	})
	names := func(peers []state.Peer) string {
		var names []string
		for _, p := range peers {
			names = append(names, p.Node)
		}
		return strings.Join(names, " ")
	}
	if got := names(carried) + ", " + names(known); got != "tunnel v6, direct skipped skippedv6" {
		t.Errorf("carried and known are %s", got)
	}
}

func TestKernelPathCarriesWhatProgramsCannot(t *testing.T) {
	uplink := kernel.Uplink{Name: "eth0", Index: 2, EncapType: "ether", Kind: "device"}
	for name, c := range map[string]struct {
		state state.State
		accel string
		want  string
	}{
		"Plain":       {state.State{}, "auto", ""},
		"NoIPv4":      {state.State{Local: state.Local{PublicIPv6: netip.MustParseAddr("2001:db8::11")}}, "auto", "IPv6 rides the kernel path"},
		"Direct":      {state.State{DirectRouting: true}, "auto", ""},
		"GroupPolicy": {state.State{GBP: true}, "auto", "GBP"},
		"Learning":    {state.State{Learning: true}, "auto", "Learning"},
		"Off":         {state.State{GBP: true}, "off", "--accel=off"},
	} {
		t.Run(name, func(t *testing.T) {
			d := &Dataplane{opts: Options{Accel: c.accel}}
			if !c.state.Local.PublicIPv6.IsValid() {
				c.state.Local.PublicIP = netip.MustParseAddr("192.0.2.11")
			}
			if got := d.hopeless(c.state, uplink); !strings.Contains(got, c.want) || (got == "") != (c.want == "") {
				t.Errorf("reason is %q, want %q", got, c.want)
			}
		})
	}
}

func TestAliasesThatCanBe(t *testing.T) {
	alias := func(addr string) state.Alias {
		return state.Alias{Addr: netip.MustParseAddr(addr), PublicIP: netip.MustParseAddr("192.0.2.12")}
	}
	s := state.State{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/56")},
		Local: state.Local{
			PublicIP: netip.MustParseAddr("203.0.113.11"), Address: netip.MustParseAddr("192.0.2.11"),
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.250.1.0/24")},
		},
	}
	uplink := kernel.Uplink{
		Addrs:  []netip.Prefix{netip.MustParsePrefix("192.0.2.111/24")},
		Others: []netip.Prefix{netip.MustParsePrefix("172.17.0.1/16")},
	}
	good := []state.Alias{alias("198.51.100.7"), alias("2001:db8::7"), alias("172.17.0.2")}
	for _, a := range []string{
		"203.0.113.11", "192.0.2.11", "192.0.2.111", "172.17.0.1", // ours
		"10.244.9.9", "fd00:10:244::9", "10.250.1.9", // pods'
		"0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "169.254.1.1", "::", "::1", "ff02::1", "fe80::1", "::ffff:198.51.100.8",
	} {
		s.Aliases = append(s.Aliases, alias(a))
	}
	s.Aliases = append(s.Aliases, state.Alias{}, state.Alias{Addr: netip.MustParseAddr("2001:db8::7%eth0"), PublicIP: good[0].PublicIP})
	s.Aliases = append(s.Aliases, good...)
	if got := aliases(s, uplink); fmt.Sprint(got) != fmt.Sprint(good) {
		t.Errorf("kept are %v, want %v", got, good)
	}

	// One node can't take all the room.
	s.Aliases = nil
	for i := range byte(100) {
		s.Aliases = append(s.Aliases, state.Alias{Addr: netip.AddrFrom4([4]byte{198, 51, 100, i}), PublicIP: good[0].PublicIP})
	}
	s.Aliases = append(s.Aliases, state.Alias{Addr: netip.MustParseAddr("198.51.101.1"), PublicIP: netip.MustParseAddr("192.0.2.13")})
	if got := aliases(s, uplink); len(got) != maxAliasesOfANode+1 || got[len(got)-1] != s.Aliases[100] {
		t.Errorf("%d kept, the last %v", len(got), got[len(got)-1])
	}
	for i := range 3 * maxAliases {
		node := netip.AddrFrom4([4]byte{198, 18, byte(i >> 10), byte(i >> 2)})
		s.Aliases = append(s.Aliases, state.Alias{Addr: netip.AddrFrom4([4]byte{100, byte(i >> 16), byte(i >> 8), byte(i)}), PublicIP: node})
	}
	if got := aliases(s, uplink); len(got) != maxAliases {
		t.Errorf("%d kept, want %d", len(got), maxAliases)
	}
}
