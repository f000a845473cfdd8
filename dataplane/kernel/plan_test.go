package kernel

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// The node of these tests is 192.0.2.11 with pods 10.244.25.0/24, its peers
// are b (192.0.2.12) and c (192.0.2.13).
const (
	ownMAC = "0a:00:00:00:00:0a"
	peerB  = "b 10.244.4.0/24 192.0.2.12 0a:00:00:00:00:0b\n"
	peerC  = "c 10.244.7.0/24 192.0.2.13 0a:00:00:00:00:0c\n"

	// A device as flannel leaves it, and what a peer has on it.
	goodDevice = `
		link flannel.1 UP mtu 1450 address 0a:00:00:00:00:0a type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning
		addr 10.244.25.0/32
	`
	goodB = `
		route 10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink
		neigh 10.244.4.0 lladdr 0a:00:00:00:00:0b PERMANENT
		fdb 0a:00:00:00:00:0b dst 192.0.2.12 self permanent
	`
	makeB = `
		bridge fdb replace 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self permanent
		ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent
		ip route add 10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink
	`
)

// testUplink has a way to both families' underlay.
func testUplink() Uplink {
	return Uplink{Name: "eth0", Index: 2, MTU: 1500, Up: true, Addrs: []netip.Prefix{
		netip.MustParsePrefix("192.0.2.11/24"), netip.MustParsePrefix("2001:db8::11/64"),
	}}
}

func testState(tb testing.TB, peers string) state.State {
	s := state.State{
		VNI: 1, Port: 8472,
		Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")},
		Local: state.Local{
			Node: "a", Uplink: "eth0",
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.25.0/24")},
			PublicIP: netip.MustParseAddr("192.0.2.11"),
			MAC:      mustMAC(tb, ownMAC),
		},
		Peers: mustPeers(tb, peers),
	}
	s.Sort()
	return s
}

func TestPlan(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*state.State)
		peers  string
		before string
		want   string
		// failed are parts of the errors of peers, by prefix.
		failed map[string]string
	}{
		{
			name:  "FreshNode",
			peers: peerB,
			want: `
				ip link add flannel.1 address 0a:00:00:00:00:0a mtu 1450 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning udpcsum
				sysctl -w net/ipv6/conf/flannel.1/accept_ra=0
				ip addr add 10.244.25.0/32 dev flannel.1
				ip link set flannel.1 up
			` + makeB,
		},
		{
			name:   "AllIsAsFlannelLeftIt",
			peers:  peerB,
			before: goodDevice + goodB,
		},
		{
			name:   "NoMACGivenKeepsTheDevices",
			change: func(s *state.State) { s.Local.MAC = state.MAC{} },
			peers:  peerB,
			before: goodDevice + goodB,
		},
		{
			name:   "MACChangedFlushesNeighbours",
			change: func(s *state.State) { s.Local.MAC = state.MAC{0x0a, 0xff} },
			peers:  peerB,
			before: goodDevice + goodB,
			want: `
				ip link set flannel.1 address 0a:ff:00:00:00:00
				ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent
			`,
		},
		{
			name:   "PortChangedMakesTheDeviceAnewWithItsMAC",
			change: func(s *state.State) { s.Port, s.Local.MAC = 4789, state.MAC{} },
			peers:  peerB,
			before: goodDevice + goodB,
			want: `
				ip link del flannel.1
				ip link add flannel.1 address 0a:00:00:00:00:0a mtu 1450 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 4789 nolearning udpcsum
				sysctl -w net/ipv6/conf/flannel.1/accept_ra=0
				ip addr add 10.244.25.0/32 dev flannel.1
				ip link set flannel.1 up
			` + makeB,
		},
		{
			name: "DeviceInExternalModeIsMadeAnew",
			before: `
				link flannel.1 UP mtu 1450 address 0a:00:00:00:00:0a type vxlan external id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning
				addr 10.244.25.0/32
			`,
			want: `
				ip link del flannel.1
				ip link add flannel.1 address 0a:00:00:00:00:0a mtu 1450 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning udpcsum
				sysctl -w net/ipv6/conf/flannel.1/accept_ra=0
				ip addr add 10.244.25.0/32 dev flannel.1
				ip link set flannel.1 up
			`,
		},
		{
			name:   "UplinkMTUChangedAndDeviceDown",
			before: strings.NewReplacer("1450", "8950", " UP", "").Replace(goodDevice),
			want: `
				ip link set flannel.1 mtu 1450
				ip link set flannel.1 up
			`,
		},
		{
			name:   "MTUGiven",
			change: func(s *state.State) { s.Local.MTU = 1400 },
			before: goodDevice,
			want:   `ip link set flannel.1 mtu 1400`,
		},
		{
			name:   "LearningOn",
			before: strings.ReplaceAll(goodDevice, "nolearning", ""),
			want:   `ip link set flannel.1 type vxlan nolearning`,
		},
		{
			name:   "LearningWanted",
			change: func(s *state.State) { s.Learning = true },
			before: goodDevice,
			want:   `ip link set flannel.1 type vxlan learning`,
		},
		{
			name:   "LearningWantedOfANewDevice",
			change: func(s *state.State) { s.Learning, s.GBP = true, true },
			want: `
				ip link add flannel.1 address 0a:00:00:00:00:0a mtu 1450 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 learning udpcsum gbp
				sysctl -w net/ipv6/conf/flannel.1/accept_ra=0
				ip addr add 10.244.25.0/32 dev flannel.1
				ip link set flannel.1 up
			`,
		},
		{
			name:   "GroupPolicyWantedMakesTheDeviceAnew",
			change: func(s *state.State) { s.GBP = true },
			before: goodDevice,
			want: `
				ip link del flannel.1
				ip link add flannel.1 address 0a:00:00:00:00:0a mtu 1450 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning udpcsum gbp
				sysctl -w net/ipv6/conf/flannel.1/accept_ra=0
				ip addr add 10.244.25.0/32 dev flannel.1
				ip link set flannel.1 up
			`,
		},
		{
			name:   "GroupPolicyAsWanted",
			change: func(s *state.State) { s.GBP = true },
			before: strings.ReplaceAll(goodDevice, "nolearning", "nolearning gbp"),
		},
		{
			name: "PacketsAreSentFromTheInterfacesAddressBehindNAT",
			change: func(s *state.State) {
				s.Local.Address, s.Local.PublicIP = s.Local.PublicIP, netip.MustParseAddr("203.0.113.9")
			},
			before: goodDevice,
		},
		{
			name:   "MTUGivenThatDoesNotFitTheUplink",
			change: func(s *state.State) { s.Local.MTU = 8950 },
			before: goodDevice,
		},
		{
			name:   "AddressesOfAnotherPodPrefix",
			before: strings.ReplaceAll(goodDevice, "10.244.25.0/32", "10.244.99.0/32") + "addr 172.16.0.1/24",
			want: `
				ip addr add 10.244.25.0/32 dev flannel.1
				ip addr del 10.244.99.0/32 dev flannel.1
				# flannel.1 has the address 172.16.0.1/24, which is not ours; left alone
			`,
		},
		{
			name:   "PeerAdded",
			peers:  peerB + peerC,
			before: goodDevice + goodB,
			want: `
				bridge fdb replace 0a:00:00:00:00:0c dev flannel.1 dst 192.0.2.13 self permanent
				ip neigh replace 10.244.7.0 lladdr 0a:00:00:00:00:0c dev flannel.1 nud permanent
				ip route add 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink
			`,
		},
		{
			name:   "PeerRemoved",
			before: goodDevice + goodB,
			want: `
				ip route del 10.244.4.0/24 via 10.244.4.0 dev flannel.1
				ip neigh del 10.244.4.0 dev flannel.1
				bridge fdb del 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self
			`,
		},
		{
			name:   "PeerHasANewMAC",
			peers:  "b 10.244.4.0/24 192.0.2.12 0a:00:00:00:00:bb",
			before: goodDevice + goodB,
			want: `
				bridge fdb replace 0a:00:00:00:00:bb dev flannel.1 dst 192.0.2.12 self permanent
				ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:bb dev flannel.1 nud permanent
				bridge fdb del 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self
			`,
		},
		{
			name:   "PeerHasANewAddress",
			peers:  "b 10.244.4.0/24 192.0.2.112 0a:00:00:00:00:0b",
			before: goodDevice + goodB,
			want:   `bridge fdb replace 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.112 self permanent`,
		},
		{
			name:   "PrefixMovedToAnotherNode",
			peers:  "c 10.244.4.0/24 192.0.2.13 0a:00:00:00:00:0c",
			before: goodDevice + goodB,
			want: `
				bridge fdb replace 0a:00:00:00:00:0c dev flannel.1 dst 192.0.2.13 self permanent
				ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:0c dev flannel.1 nud permanent
				bridge fdb del 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self
			`,
		},
		{
			name:   "OneEntryLost",
			peers:  peerB,
			before: goodDevice + "neigh 10.244.4.0 FAILED\n" + strings.Join(strings.Split(goodB, "\n")[:2], "\n") + "\nfdb 0a:00:00:00:00:0b dst 192.0.2.12 self permanent",
			want:   `ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent`,
		},
		{
			name:   "NodeWithTwoPrefixes",
			peers:  peerB + "b 10.244.5.0/24 192.0.2.12 0a:00:00:00:00:0b",
			before: goodDevice + goodB,
			want: `
				ip neigh replace 10.244.5.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent
				ip route add 10.244.5.0/24 via 10.244.5.0 dev flannel.1 onlink
			`,
		},
		{
			name:  "ForeignThingsAreLeftAlone",
			peers: peerB,
			before: goodDevice + goodB + `
				route 10.99.0.0/16 via 10.244.4.0 dev flannel.1 onlink
				route 10.98.0.0/16 dev flannel.1
				route 10.97.0.0/24 via 10.97.0.0 dev flannel.1 proto static onlink
				route 10.96.0.0/24 via 10.96.0.0 dev flannel.1 metric 50 onlink
				neigh 10.244.88.0 lladdr 0a:00:00:00:00:88 REACHABLE
				neigh 10.244.87.0 lladdr 0a:00:00:00:00:87 extern_learn PERMANENT
				fdb 00:00:00:00:00:00 dst 192.0.2.99 self permanent
				fdb 0a:00:00:00:00:86 dst 192.0.2.86 self
				fdb 0a:00:00:00:00:85 dst 192.0.2.85 extern_learn self permanent
				fdb 0a:00:00:00:00:84 dst 192.0.2.84 port 4789 self permanent
			`,
		},
		{
			name:   "FallbackRouteWithAWorseMetricStays",
			peers:  peerB,
			before: goodDevice + "route 10.244.4.0/24 via 192.0.2.1 dev eth0 metric 100",
			want:   makeB,
		},
		{
			name:   "RouteElsewhereIsAConflict",
			peers:  peerB + peerC,
			before: goodDevice + "route 10.244.4.0/24 via 192.0.2.1 dev eth0 proto static",
			want: `
				bridge fdb replace 0a:00:00:00:00:0c dev flannel.1 dst 192.0.2.13 self permanent
				ip neigh replace 10.244.7.0 lladdr 0a:00:00:00:00:0c dev flannel.1 nud permanent
				ip route add 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink
			`,
			failed: map[string]string{"10.244.4.0/24": `node "b"): a route that is not ours leads elsewhere: 10.244.4.0/24 via 192.0.2.1 dev eth0 proto static;`},
		},
		{
			name:   "RouteThatLeansOnAnotherForItsGatewayIsReplaced",
			peers:  peerB,
			before: goodDevice + strings.ReplaceAll(goodB, " onlink", ""),
			want:   "ip route replace 10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink",
		},
		{
			name:   "BlackholeIsAConflict",
			peers:  peerB,
			before: goodDevice + "route blackhole 10.244.4.0/24",
			failed: map[string]string{"10.244.4.0/24": `leads elsewhere: blackhole 10.244.4.0/24;`},
		},
		{
			name:   "RoutesOfAnotherVNIAndOfDirectRoutingAreReplaced",
			peers:  peerB + peerC,
			before: goodDevice + "route 10.244.4.0/24 via 10.244.4.0 dev flannel.4096 onlink\n route 10.244.7.0/24 via 192.0.2.13 dev eth0",
			want: `
				bridge fdb replace 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self permanent
				bridge fdb replace 0a:00:00:00:00:0c dev flannel.1 dst 192.0.2.13 self permanent
				ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent
				ip neigh replace 10.244.7.0 lladdr 0a:00:00:00:00:0c dev flannel.1 nud permanent
				ip route replace 10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink
				ip route replace 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink
			`,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := testState(t, test.peers)
			if test.change != nil {
				test.change(&s)
			}
			wants, err := overlays(s, testUplink())
			if err != nil {
				t.Fatal(err)
			}
			plan, err := makePlan(wants[0], s.Peers, mustActual(t, test.before))
			if err != nil {
				t.Fatal(err)
			}
			if got, want := plan.String(), trimmed(test.want); got != want {
				t.Errorf("plan is\n%swant\n%s", got, want)
			}
			checkFailed(t, plan.Failed, test.failed)
		})
	}
}

func TestPlanRefusesTheDevice(t *testing.T) {
	for _, test := range []struct {
		name, before, want string
	}{
		{"NoDeviceAndNoMAC", "", "flannel.1 does not exist, and no MAC"},
		{"DeviceIsABridge", "link flannel.1 mtu 1500 type bridge", `named flannel.1 exists, but it is of type "bridge", not vxlan`},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := testState(t, peerB)
			s.Local.MAC = state.MAC{}
			wants, err := overlays(s, testUplink())
			if err != nil {
				t.Fatal(err)
			}
			plan, err := makePlan(wants[0], s.Peers, mustActual(t, test.before))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
			if len(plan.Steps) != 0 {
				t.Errorf("steps in spite of it:\n%s", plan)
			}
		})
	}
}

func TestOverlays(t *testing.T) {
	dual := func(s *state.State) {
		s.Local.PublicIPv6 = netip.MustParseAddr("2001:db8::11")
		s.Local.Prefixes = append(s.Local.Prefixes, netip.MustParsePrefix("fd00:10:244:1::/64"))
	}
	for _, test := range []struct {
		name    string
		change  func(*state.State, *Uplink)
		devices string
		err     string
	}{
		{name: "IPv4Only", devices: "flannel.1 1450 10.244.25.0/32"},
		{name: "DualStack", change: func(s *state.State, _ *Uplink) { dual(s) }, devices: "flannel.1 1450 10.244.25.0/32, flannel-v6.1 1430 fd00:10:244:1::/128"},
		{
			name: "UplinkTooSmallForIPv6LeavesIPv4",
			change: func(s *state.State, u *Uplink) {
				dual(s)
				u.MTU = 1340
			},
			devices: "flannel.1 1290 10.244.25.0/32",
			err:     "overlay device flannel-v6.1: MTU 1270 is less than the 1280 bytes",
		},
		{
			name:   "UplinkHasNotTheAddress",
			change: func(s *state.State, _ *Uplink) { s.Local.PublicIP = netip.MustParseAddr("192.0.2.111") },
			err:    "uplink eth0 has no address 192.0.2.111; its addresses are 192.0.2.11/24, 2001:db8::11/64",
		},
		{
			name: "AddressIsOnLoopback",
			change: func(s *state.State, u *Uplink) {
				s.Local.PublicIP = netip.MustParseAddr("198.51.100.7")
				u.Others = []netip.Prefix{netip.MustParsePrefix("198.51.100.7/32")}
			},
			devices: "flannel.1 1450 10.244.25.0/32",
		},
		{
			name: "IPv6Only",
			change: func(s *state.State, _ *Uplink) {
				dual(s)
				s.Local.PublicIP = netip.Addr{}
			},
			devices: "flannel-v6.1 1430 fd00:10:244:1::/128",
		},
		{
			name: "MTUGivenForBothFamilies",
			change: func(s *state.State, _ *Uplink) {
				dual(s)
				s.Local.MTU = 1440
			},
			devices: "flannel.1 1440 10.244.25.0/32, flannel-v6.1 1430 fd00:10:244:1::/128",
		},
		{
			name:   "NoPodPrefix",
			change: func(s *state.State, _ *Uplink) { s.Local.Prefixes = nil },
			err:    "this node has underlay address 192.0.2.11, but no pod prefix",
		},
		{name: "NoVNI", change: func(s *state.State, _ *Uplink) { s.VNI = 0 }, err: "VNI 0"},
		{name: "VNITooLarge", change: func(s *state.State, _ *Uplink) { s.VNI = 1 << 24 }, err: "VNI 16777216"},
		{name: "NameTooLong", change: func(s *state.State, _ *Uplink) { s.VNI = 1<<24 - 1 }, err: "flannel.16777215: the name is longer than the 15 characters"},
		{name: "NoPort", change: func(s *state.State, _ *Uplink) { s.Port = 0 }, err: "port 0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, up := testState(t, peerB), testUplink()
			if test.change != nil {
				test.change(&s, &up)
			}
			wants, err := overlays(s, up)
			if got := errorText(err); !strings.Contains(got, test.err) || (got == "") != (test.err == "") {
				t.Errorf("error is %q, want %q", got, test.err)
			}
			var devices []string
			for _, o := range wants {
				devices = append(devices, strings.Join([]string{o.name, itoa(o.mtu), o.address().String()}, " "))
			}
			if got := strings.Join(devices, ", "); got != test.devices {
				t.Errorf("devices are %q, want %q", got, test.devices)
			}
		})
	}
}
