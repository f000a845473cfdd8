//go:build linux

package dataplane

import (
	"net/netip"
	"reflect"
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
		withMap bool
		want    []string
	}{
		"Same":            {inMap, []kernel.Entry{entry}, true, nil},
		"NoProgramsAtAll": {nil, []kernel.Entry{entry}, false, nil},
		"OnlyInKernel":    {nil, []kernel.Entry{entry}, true, []string{"10.244.2.0/24 is in the kernel but not in the peers map"}},
		"OnlyInMap":       {inMap, nil, true, []string{"10.244.2.0/24 is in the peers map but the kernel has no complete route, neighbour and FDB entry for it"}},
		"NoRoom": {known, []kernel.Entry{entry}, true, []string{
			"the accelerator has no room for it; it rides the kernel path",
		}},
		"Direct":      {known, []kernel.Entry{direct}, true, nil},
		"RouteAstray": {inMap, []kernel.Entry{astray}, true, []string{"10.244.2.0/24 is in the peers map but the kernel has no complete route, neighbour and FDB entry for it"}},
		"OtherMAC":    {inMap, []kernel.Entry{other}, true, []string{"10.244.2.0/24: the kernel has MAC 02:00:00:00:00:03, the peers map 02:00:00:00:00:02"}},
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
