//go:build linux

package kernel

import (
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// podRoutes are the routes to pods of other nodes, of both families.
func (n *node) podRoutes(t *testing.T) string {
	t.Helper()
	text := n.Run(t, "ip -4 route show root 10.244.0.0/16") + n.Run(t, "ip -6 route show root fd00:10:244::/56")
	text = regexp.MustCompile(`(?m)^.* proto kernel .*$`).ReplaceAllString(text, "")
	return trimmed(regexp.MustCompile(`(?m) +$`).ReplaceAllString(text, ""))
}

func (n *node) wantRoutes(t *testing.T, want string) {
	t.Helper()
	if got := n.podRoutes(t); got != trimmed(want) {
		t.Errorf("routes are\n%swant\n%s", got, trimmed(want))
	}
}

// bothFamilies is node b in both.
const bothFamilies = peerB + "b fd00:10:244:4::/64 2001:db8::12 0a:00:00:00:06:0b\n"

const (
	directRoutes = `
		10.244.4.0/24 via 192.0.2.12 dev eth0
		fd00:10:244:4::/64 via 2001:db8::12 dev eth0 metric 1024 pref medium
	`
	tunnelRoutes = `
		10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink
		fd00:10:244:4::/64 via fd00:10:244:4:: dev flannel-v6.1 metric 1024 onlink pref medium
	`
)

func TestDirectRoutingComesAndGoes(t *testing.T) {
	n := newNode(t, bothFamilies)
	n.dual()
	n.state.DirectRouting = true
	res := n.sync(t)
	if got := prefixWords(res.Direct); got != "10.244.4.0/24 fd00:10:244:4::/64" {
		t.Errorf("direct are %s", got)
	}
	// As stock flanneld leaves it: the device is there, without a peer on it.
	n.wantShow(t, "flannel.1", flannelDevice)
	n.wantRoutes(t, directRoutes)

	n.state.DirectRouting = false
	if res := n.sync(t); len(res.Direct) != 0 {
		t.Errorf("direct are %v", res.Direct)
	}
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
	n.wantRoutes(t, tunnelRoutes)

	n.state.DirectRouting = true
	n.sync(t)
	n.wantShow(t, "flannel.1", flannelDevice)
	n.wantRoutes(t, directRoutes)

	// DirectRouting is turned off, and the peer goes at the same time.
	n.state.DirectRouting, n.state.Peers = false, nil
	n.sync(t)
	n.wantRoutes(t, "")
}

func TestEntriesOfPeersServedDirectly(t *testing.T) {
	n := newNode(t, bothFamilies+peerC)
	n.dual()
	n.state.DirectRouting = true
	n.Run(t, "ip route add 192.0.2.13/32 via 192.0.2.1", "ip route add 10.244.99.0/24 via 192.0.2.1 proto static")
	n.sync(t)
	var prefixes []netip.Prefix
	for _, p := range n.state.Peers {
		prefixes = append(prefixes, p.Prefix)
	}
	entries, err := n.path.Entries(1, prefixes...)
	want := "[{10.244.4.0/24 192.0.2.12 00:00:00:00:00:00 192.0.2.12 true}" +
		" {10.244.7.0/24 10.244.7.0 0a:00:00:00:00:0c 192.0.2.13 false}" +
		" {fd00:10:244:4::/64 2001:db8::12 00:00:00:00:00:00 2001:db8::12 true}]"
	if fmt.Sprint(entries) != want || err != nil {
		t.Errorf("entries are\n%v (%v), want\n%s", entries, err, want)
	}

	// They are removed on request, and no others.
	n.Run(t, "ip route replace fd00:10:244:4::/64 via 2001:db8::12 dev eth0 proto static")
	peers := append(n.state.Peers, mustPeers(t, "x 10.244.99.0/24 192.0.2.99 -")...)
	if removed, err := n.path.RemoveDirect(peers); removed != 1 || err != nil {
		t.Errorf("%d removed (%v)", removed, err)
	}
	n.wantRoutes(t, `
		10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink
		10.244.99.0/24 via 192.0.2.1 dev eth0 proto static
		fd00:10:244:4::/64 via 2001:db8::12 dev eth0 proto static metric 1024 pref medium
	`)
	if removed, err := n.path.RemoveDirect(peers); removed != 0 || err != nil {
		t.Errorf("%d removed again (%v)", removed, err)
	}
}

// Whether a peer is on one of the uplink's networks changes with the routes and
// addresses of the host.
func TestDirectRoutingFollowsTheRoutes(t *testing.T) {
	const tunnel = "10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink"
	const directly = "10.244.4.0/24 via 192.0.2.12 dev eth0"
	for name, test := range map[string]struct {
		change string
		then   string
	}{
		"RouteThroughARouter":   {"ip route add 192.0.2.12/32 via 192.0.2.1 dev eth0", tunnel},
		"RouteInAnotherTable":   {"ip route add 192.0.2.0/24 via 192.0.2.1 dev eth0 table 100", directly},
		"RuleForAnotherTable":   {"ip rule add to 192.0.2.12 lookup 100", tunnel},
		"RouteByAnotherDevice":  {"ip route add 192.0.2.12/32 dev eth1", tunnel},
		"Unreachable":           {"ip route add unreachable 192.0.2.12/32", tunnel},
		"BroadcastAddress":      {"ip addr add 192.0.2.13/31 dev eth0 broadcast 192.0.2.12", tunnel},
		"NodesOwn":              {"ip addr add 192.0.2.12/32 dev eth1", tunnel},
		"SmallerNetworkOnTheUp": {"ip addr add 192.0.2.9/29 dev eth0", directly},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, peerB)
			n.Run(t, "ip link add eth1 type veth peer name eth1peer", "ip link set eth1 up", "ip link set eth1peer up",
				"ip route add 198.51.100.0/24 via 192.0.2.1 dev eth0 table 100", "ip route add default via 192.0.2.1 dev eth0 table 100")
			n.state.DirectRouting = true
			nudges, err := n.path.Watch(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			n.sync(t)
			n.wantRoutes(t, directly)
			wantQuiet(t, nudges)
			n.Run(t, test.change)
			wantNudge(t, nudges)
			n.sync(t)
			n.wantRoutes(t, test.then)
			wantQuiet(t, nudges)
		})
	}
}

func TestUplinkDownAndUpWithDirectRouting(t *testing.T) {
	n := newNode(t, bothFamilies)
	n.dual()
	n.state.DirectRouting = true
	nudges, err := n.path.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.sync(t)
	wantQuiet(t, nudges)
	n.Run(t, "ip link set eth0 down")
	wantNudge(t, nudges)
	if res, err := n.path.Sync(t.Context(), n.state); err != nil && !strings.Contains(err.Error(), "has no address 2001:db8::11") || len(res.Direct) != 0 {
		t.Errorf("sync while down: %+v, %v", res.Direct, err)
	}
	n.Run(t, "ip link set eth0 up", "ip addr replace 2001:db8::11/64 dev eth0 nodad")
	wantNudge(t, nudges)
	wantQuiet(t, nudges)
	n.sync(t)
	n.wantRoutes(t, directRoutes)
}

func TestStaleDirectRoutesOfADeadPastGo(t *testing.T) {
	n := newNode(t, bothFamilies)
	n.dual()
	n.state.DirectRouting = true
	n.Run(t,
		"ip route add default via 192.0.2.1 dev eth0",
		// What flannel makes, and left.
		"ip route add 10.244.66.0/24 via 192.0.2.66",
		"ip route add fd00:10:244:66::/64 via 2001:db8::66",
		"ip route add 10.244.4.0/24 via 192.0.2.44",
		// What it does not make.
		"ip route add 10.244.67.0/24 via 192.0.2.1",
		"ip route add 10.244.68.0/24 via 192.0.2.68 proto static",
		"ip route add 10.244.69.0/24 via 192.0.2.69 src 192.0.2.11",
		"ip route add 10.244.70.0/24 via 192.0.2.70 mtu 1400",
		"ip route add 10.244.71.0/24 via 192.0.2.71 table 100",
		"ip -6 route add fd00:10:244:67::/64 via 2001:db8::67 pref high",
	)
	n.sync(t)
	n.wantRoutes(t, `
		10.244.4.0/24 via 192.0.2.12 dev eth0
		10.244.67.0/24 via 192.0.2.1 dev eth0
		10.244.68.0/24 via 192.0.2.68 dev eth0 proto static
		10.244.69.0/24 via 192.0.2.69 dev eth0 src 192.0.2.11
		10.244.70.0/24 via 192.0.2.70 dev eth0 mtu 1400
		fd00:10:244:4::/64 via 2001:db8::12 dev eth0 metric 1024 pref medium
		fd00:10:244:67::/64 via 2001:db8::67 dev eth0 metric 1024 pref high
	`)
}

// A gateway among several of a route, too, is a router and no node.
func TestRoutersOfRoutesWithSeveralNextHopsAreKnown(t *testing.T) {
	n := newNode(t, peerB)
	n.state.DirectRouting = true
	n.Run(t,
		"ip route add default nexthop via 192.0.2.1 dev eth0 nexthop via 192.0.2.2 dev eth0",
		"ip route add 10.244.67.0/24 via 192.0.2.2",
	)
	n.sync(t)
	n.wantRoutes(t, "10.244.4.0/24 via 192.0.2.12 dev eth0\n10.244.67.0/24 via 192.0.2.2 dev eth0")
}

// A route that the kernel refuses leaves the tunnel as it was.
func TestDirectRouteThatIsRefusedLeavesTheTunnel(t *testing.T) {
	n := newNode(t, peerB)
	index := n.sync(t).Overlays[0].Index
	steps := []Step{
		{Op: ReplaceRoute, Device: "eth9", index: 9999, Prefix: netip.MustParsePrefix("10.244.4.0/24"), Addr: netip.MustParseAddr("192.0.2.12"), Peer: netip.MustParsePrefix("10.244.4.0/24")},
		{Op: DeleteNeighbour, Device: "flannel.1", Addr: netip.MustParseAddr("10.244.4.0"), After: netip.MustParsePrefix("10.244.4.0/24")},
		{Op: DeleteFDB, Device: "flannel.1", MAC: mustMAC(t, "0a:00:00:00:00:0b"), Addr: netip.MustParseAddr("192.0.2.12"), After: netip.MustParsePrefix("10.244.4.0/24")},
	}
	if o := n.path.applyPeers(t.Context(), steps, index); o.done != 0 || len(o.failed) != 1 {
		t.Errorf("outcome is %+v", o)
	}
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)

	// The plan says so itself.
	n.state.DirectRouting = true
	plan, err := n.path.Plan(n.state)
	if err != nil || len(plan.Steps) != 3 {
		t.Fatalf("plan (%v):\n%s", err, plan)
	}
	for _, s := range plan.Steps[1:] {
		if s.After != steps[0].Peer {
			t.Errorf("%s is done in any case", s)
		}
	}
}

// Two nodes, a pod on each, pinging each other in both families while
// DirectRouting is turned on and off on either: no packet is lost.
//
//	a  10.244.25.1 cni0 -- eth0 192.0.2.11 ---- 192.0.2.12 eth0 -- cni0 10.244.4.1  b
func TestDirectRoutingIsTurnedOnAndOffUnderTraffic(t *testing.T) {
	nodes := []*node{{NS: netns.New(t)}, {NS: netns.New(t)}}
	netns.Connect(t, nodes[0].NS, "eth0", nodes[1].NS, "eth0")
	prefixes := []string{"25", "4"}
	for i, n := range nodes {
		own, other := prefixes[i], prefixes[1-i]
		n.state = testState(t, fmt.Sprintf(
			"other 10.244.%s.0/24 192.0.2.%d 0a:00:00:00:00:%02x\nother fd00:10:244:%s::/64 2001:db8::%d 0a:00:00:00:06:%02x",
			other, 12-i, 12-i, other, 12-i, 12-i))
		n.state.Networks = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/56")}
		n.state.Local.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.244." + own + ".0/24"), netip.MustParsePrefix("fd00:10:244:" + own + "::/64")}
		n.state.Local.PublicIP = netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", 11+i))
		n.state.Local.PublicIPv6 = netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", 11+i))
		n.state.Local.MAC = mustMAC(t, fmt.Sprintf("0a:00:00:00:00:%02x", 11+i))
		n.state.Local.MACv6 = mustMAC(t, fmt.Sprintf("0a:00:00:00:06:%02x", 11+i))
		n.Run(t, "ip link set lo up", "sysctl -q -w net/ipv6/conf/all/accept_dad=0 net/ipv6/conf/default/accept_dad=0",
			fmt.Sprintf("ip addr add 192.0.2.%d/24 dev eth0", 11+i), fmt.Sprintf("ip addr add 2001:db8::%d/64 dev eth0 nodad", 11+i),
			"ip link add cni0 type bridge", "ip link set cni0 up",
			"ip addr add 10.244."+own+".1/24 dev cni0", "ip addr add fd00:10:244:"+own+"::1/64 dev cni0 nodad")
		n.open(t)
		n.path.log = slog.New(slog.DiscardHandler)
		n.sync(t)
	}
	var done sync.WaitGroup
	for _, ping := range []string{
		"ping -q -c 400 -i 0.005 -W 2 -I 10.244.25.1 10.244.4.1",
		"ping -q -c 400 -i 0.005 -W 2 -I fd00:10:244:25::1 fd00:10:244:4::1",
	} {
		done.Go(func() {
			if out, err := nodes[0].Try(ping); err != nil || !strings.Contains(out, " 0% packet loss") {
				t.Errorf("%s: %v\n%s", ping, err, out)
			}
		})
	}
	for i := range 16 {
		time.Sleep(100 * time.Millisecond)
		n := nodes[i%2]
		n.state.DirectRouting = !n.state.DirectRouting
		if _, err := n.path.Sync(t.Context(), n.state); err != nil {
			t.Error(err)
		}
	}
	done.Wait()
}

func TestFiveThousandDirectPeers(t *testing.T) {
	const count = 5000
	n := newNode(t, "")
	n.path.log = slog.New(slog.DiscardHandler)
	n.Run(t, "ip addr add 198.18.255.1/15 dev eth0")
	n.state.Networks = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	n.state.DirectRouting = true
	sync := func(what string, steps int) {
		t.Helper()
		before := cpuTime(t)
		res, err := n.path.Sync(t.Context(), n.state)
		t.Logf("%s: %v CPU", what, (cpuTime(t) - before).Round(time.Millisecond))
		if err != nil || res.Steps != steps {
			t.Errorf("%s: %d steps, want %d (%v)", what, res.Steps, steps, err)
		}
	}
	sync("device", 4)
	n.state.Peers = manyPeers(count)
	for i := range n.state.Peers {
		n.state.Peers[i].MAC = state.MAC{}
	}
	sync("5,000 peers added", count)
	sync("nothing to do", 0)
	n.state.Peers = nil
	sync("5,000 peers removed", count)
}

// The device learns, and carries marks, as the state says, and is what flannel
// makes with the same settings.
func TestLearningAndGroupPolicy(t *testing.T) {
	n := newNode(t, peerB)
	index := n.sync(t).Overlays[0].Index
	n.state.Learning = true
	if res := n.sync(t); res.Overlays[0].Index != index {
		t.Error("the device was made anew for learning")
	}
	learning := strings.ReplaceAll(flannelDevice, "nolearning ", "") // said only when it is off
	n.wantShow(t, "flannel.1", learning+flannelPeerB)
	n.state.GBP, n.state.Local.MAC = true, state.MAC{}
	// Device deleted, made with all its settings, accept_ra, address, up; peer.
	if res := n.sync(t); res.Overlays[0].Index == index || res.Steps != 5+3 {
		t.Errorf("the device was not made anew for gbp, or not at once: %d steps", res.Steps)
	}
	n.wantShow(t, "flannel.1", strings.ReplaceAll(learning, "noudp6zerocsumrx", "noudp6zerocsumrx gbp")+flannelPeerB)
	n.state.GBP, n.state.Learning = false, false
	n.sync(t)
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
}

func TestBehindNATPacketsAreSentFromTheInterfacesAddress(t *testing.T) {
	n := newNode(t, peerB)
	n.state.Local.Address, n.state.Local.PublicIP = n.state.Local.PublicIP, netip.MustParseAddr("203.0.113.9")
	res := n.sync(t)
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
	if res.Overlays[0].Local != n.state.Local.Address {
		t.Errorf("overlay is %+v", res.Overlays[0])
	}
}

// An address that is not the uplink's is watched nevertheless.
func TestAddressOnLoopback(t *testing.T) {
	n := newNode(t, peerB)
	n.Run(t, "ip addr add 198.51.100.7/32 dev lo")
	n.state.Local.PublicIP = netip.MustParseAddr("198.51.100.7")
	nudges, err := n.path.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.sync(t)
	n.wantShow(t, "flannel.1", strings.ReplaceAll(flannelDevice, "192.0.2.11", "198.51.100.7")+flannelPeerB)
	wantQuiet(t, nudges)
	n.Run(t, "ip addr del 198.51.100.7/32 dev lo")
	wantNudge(t, nudges)
	if _, err := n.path.Sync(t.Context(), n.state); err == nil || !strings.Contains(err.Error(), "no address 198.51.100.7") {
		t.Errorf("sync: %v", err)
	}
}

func TestIPv6Only(t *testing.T) {
	n := newNode(t, "b fd00:10:244:4::/64 2001:db8::12 0a:00:00:00:06:0b")
	n.dual()
	n.state.Networks, n.state.Local.Prefixes = n.state.Networks[1:], n.state.Local.Prefixes[1:]
	n.state.Local.PublicIP = netip.Addr{}
	res := n.sync(t)
	if len(res.Overlays) != 1 || res.Overlays[0].Name != "flannel-v6.1" {
		t.Fatalf("overlays are %+v", res.Overlays)
	}
	n.wantRoutes(t, "fd00:10:244:4::/64 via fd00:10:244:4:: dev flannel-v6.1 metric 1024 onlink pref medium")
	if out, err := n.Try("ip link show flannel.1"); err == nil {
		t.Errorf("there is an IPv4 overlay too:\n%s", out)
	}
	n.state.DirectRouting = true
	n.sync(t)
	n.wantRoutes(t, "fd00:10:244:4::/64 via 2001:db8::12 dev eth0 metric 1024 pref medium")
}

// IPv6 asks where a gateway is before it takes it: routes that somebody else has
// to the peer's prefix, or to a wider one, are no hindrance.
func TestIPv6RoutesElsewhereAreNoHindrance(t *testing.T) {
	for name, route := range map[string]string{
		"Fallback":      "fd00:10:244:4::/64 via 2001:db8::1 metric 2000",
		"WholeNetwork":  "fd00:10:244::/56 via 2001:db8::1",
		"WiderStill":    "fd00::/16 via 2001:db8::1",
		"PartOfNetwork": "fd00:10:244::/60 via 2001:db8::1",
		"Blackhole":     "blackhole fd00:10:244::/56",
		"OtherVNI":      "fd00:10:244:4::/64 via fd00:10:244:4:: dev flannel-v6.7 onlink",
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, bothFamilies)
			n.dual()
			n.Run(t, "ip link add flannel-v6.7 type vxlan id 7 local 2001:db8::11 dev eth0 dstport 8472 nolearning", "ip link set flannel-v6.7 up")
			n.Run(t, "ip -6 route add "+route)
			n.sync(t)
			got := n.Run(t, "ip -6 route show dev flannel-v6.1 proto boot")
			if want := "fd00:10:244:4::/64 via fd00:10:244:4:: metric 1024 onlink pref medium"; strings.TrimSpace(got) != want {
				t.Errorf("routes are\n%swant\n%s", got, want)
			}
		})
	}
}

// We died between the steps.
func TestRouteToAGatewayThatWasLeftBehindGoes(t *testing.T) {
	n := newNode(t, bothFamilies)
	n.dual()
	n.sync(t)
	n.Run(t, "ip -6 route add fd00:10:244:4::/128 dev flannel-v6.1", "ip -6 route add fd00:10:244:99::/128 dev flannel-v6.1")
	n.sync(t)
	got := regexp.MustCompile(`(?m) +$`).ReplaceAllString(n.Run(t, "ip -6 route show dev flannel-v6.1 proto boot"), "")
	want := `
		fd00:10:244:4::/64 via fd00:10:244:4:: metric 1024 onlink pref medium
		fd00:10:244:99:: metric 1024 pref medium
	`
	if trimmed(got) != trimmed(want) {
		t.Errorf("routes are\n%swant\n%s", got, want)
	}
}
