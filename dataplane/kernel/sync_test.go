//go:build linux

package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// Every test has a node of its own: two namespaces joined by a veth pair,
//
//	node  eth0 192.0.2.11/24, 2001:db8::11/64 ---- eth0  underlay
//
// and looks at the node with ip and bridge, as an operator would.

// node is a namespace with an uplink and a kernel path in it.
type node struct {
	*netns.NS
	path  *Path
	state state.State
}

func newNode(t *testing.T, peers string) *node {
	t.Helper()
	n := &node{NS: netns.New(t), state: testState(t, peers)}
	// Without duplicate address detection, whose end a second later is an event
	// that would pass for the one a test waits for.
	n.Run(t, "sysctl -q -w net/ipv6/conf/default/accept_dad=0")
	netns.Connect(t, n.NS, "eth0", netns.New(t), "eth0")
	n.Run(t,
		"ip link set lo up",
		"ip addr add 192.0.2.11/24 dev eth0",
		"ip addr add 2001:db8::11/64 dev eth0 nodad",
	)
	n.open(t)
	return n
}

func (n *node) open(t *testing.T) {
	t.Helper()
	n.MustDo(t, func() error {
		var err error
		n.path, err = Open(slog.New(slog.NewTextHandler(t.Output(), nil)))
		return err
	})
	t.Cleanup(func() {
		if err := n.path.Close(); err != nil {
			t.Error(err)
		}
	})
}

// dual gives the node an IPv6 overlay too.
func (n *node) dual() {
	n.state.Networks = append(n.state.Networks, netip.MustParsePrefix("fd00:10:244::/56"))
	n.state.Local.Prefixes = append(n.state.Local.Prefixes, netip.MustParsePrefix("fd00:10:244:25::/64"))
	n.state.Local.PublicIPv6 = netip.MustParseAddr("2001:db8::11")
	n.state.Local.MACv6 = state.MAC{0x0a, 0, 0, 0, 6, 0x0a}
}

// sync syncs, wants no error, and wants a second one to find nothing to do.
func (n *node) sync(t *testing.T) Result {
	t.Helper()
	res, err := n.path.Sync(t.Context(), n.state)
	if err != nil {
		t.Fatalf("sync: %v", err)
	}
	n.idle(t)
	return res
}

// idle wants a sync to find nothing to do.
func (n *node) idle(t *testing.T) {
	t.Helper()
	plan, err := n.path.Plan(n.state)
	if err != nil || len(plan.Steps) > 0 {
		t.Errorf("plan after sync (%v):\n%s", err, plan)
	}
	if res, err := n.path.Sync(t.Context(), n.state); err != nil || res.Steps != 0 {
		t.Errorf("a second sync made %d steps (%v)", res.Steps, err)
	}
}

// show is what an operator sees of a device: its link, addresses, routes,
// neighbours and FDB entries, but for what differs from run to run.
func (n *node) show(t *testing.T, device string) string {
	t.Helper()
	family := "-4"
	if strings.Contains(device, "-v6") {
		family = "-6"
	}
	var b strings.Builder
	b.WriteString(n.Run(t, "ip -d link show "+device))
	b.WriteString(n.Run(t, fmt.Sprintf("ip %s -o addr show dev %s scope global", family, device)))
	b.WriteString(n.Run(t, fmt.Sprintf("ip %s route show dev %s", family, device)))
	// These two are hash tables, without an order.
	b.WriteString(sorted(n.Run(t, fmt.Sprintf("ip %s neigh show dev %s nud all", family, device))))
	b.WriteString(sorted(n.Run(t, "bridge fdb show dev "+device)))
	text := regexp.MustCompile(`(?m)^\d+: `).ReplaceAllString(b.String(), "")
	text = regexp.MustCompile(`(?m)^.* NOARP *$|^(fe80|ff00|multicast).*$`).ReplaceAllString(text, "")
	text = regexp.MustCompile(`\\ +valid_lft.*| tentative`).ReplaceAllString(text, "")
	text = regexp.MustCompile(` +`).ReplaceAllString(text, " ")
	return trimmed(text)
}

func sorted(text string) string {
	return strings.Join(slices.Sorted(strings.Lines(text)), "")
}

// wantShow compares with the text of show.
func (n *node) wantShow(t *testing.T, device, want string) {
	t.Helper()
	if got, want := n.show(t, device), trimmed(want); got != want {
		t.Errorf("%s is\n%swant\n%s", device, got, want)
	}
}

// What a stock flanneld leaves, taken from a node of its own with these
// addresses, MACs and prefixes put in.
const flannelDevice = `
	flannel.1: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN mode DEFAULT group default
	link/ether 0a:00:00:00:00:0a brd ff:ff:ff:ff:ff:ff promiscuity 0 allmulti 0 minmtu 68 maxmtu 65535
	vxlan id 1 local 192.0.2.11 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx addrgenmode eui64 numtxqueues 1 numrxqueues 1 gso_max_size 65536 gso_max_segs 65535 tso_max_size 524280 tso_max_segs 65535 gro_max_size 65536
	flannel.1 inet 10.244.25.0/32 scope global flannel.1
`

const flannelPeerB = `
	10.244.4.0/24 via 10.244.4.0 onlink
	10.244.4.0 lladdr 0a:00:00:00:00:0b PERMANENT
	0a:00:00:00:00:0b dst 192.0.2.12 self permanent
`

// likeFlannel makes by hand what flannel makes for the node and peer b.
var likeFlannel = []string{
	"ip link add flannel.1 address 0a:00:00:00:00:0a mtu 1450 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning udpcsum",
	"ip link set flannel.1 txqueuelen 0",
	"sysctl -q -w net/ipv6/conf/flannel.1/accept_ra=0",
	"ip addr add 10.244.25.0/32 dev flannel.1",
	"ip link set flannel.1 up",
	"ip neigh add 10.244.4.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent",
	"bridge fdb add 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self permanent",
	"ip route add 10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink",
}

func TestFreshNodeHoldsWhatFlannelWouldMake(t *testing.T) {
	n := newNode(t, peerB)
	res := n.sync(t)
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
	if got := n.Run(t, "cat /proc/thread-self/net/dev_snmp6/flannel.1"); got == "" {
		t.Error("no IPv6 on flannel.1, so accept_ra is not tested")
	}
	if got := strings.TrimSpace(n.Run(t, "sysctl -n net/ipv6/conf/flannel.1/accept_ra")); got != "0" {
		t.Errorf("accept_ra is %s", got)
	}
	if len(res.Overlays) != 1 || res.Steps == 0 || len(res.Failed) != 0 {
		t.Errorf("result is %+v", res)
	}
	want := Overlay{
		Name: "flannel.1", Index: res.Overlays[0].Index, MAC: mustMAC(t, ownMAC), MTU: 1450,
		Address: netip.MustParseAddr("10.244.25.0"), Local: netip.MustParseAddr("192.0.2.11"),
	}
	if res.Overlays[0] != want || want.Index == 0 {
		t.Errorf("overlay is %+v, want %+v", res.Overlays[0], want)
	}
	up := res.Uplink
	if up.Name != "eth0" || up.MTU != 1500 || up.Kind != "veth" || up.EncapType != "ether" || up.MAC.IsZero() || !up.Up || up.Master != "" ||
		!slices.Contains(up.Addrs, netip.MustParsePrefix("192.0.2.11/24")) {
		t.Errorf("uplink is %+v", up)
	}
}

func TestPlanPrintedIsWhatAnOperatorCanType(t *testing.T) {
	n := newNode(t, peerB)
	n.dual()
	n.state.Peers = append(n.state.Peers, mustPeers(t, "b fd00:10:244:4::/64 2001:db8::12 0a:00:00:00:06:0b")...)
	plan, err := n.path.Plan(n.state)
	if err != nil {
		t.Fatal(err)
	}
	n.Run(t, slices.Collect(lines(plan.String()))...)
	n.idle(t)
	n.state.Peers = nil
	if plan, err = n.path.Plan(n.state); err != nil {
		t.Fatal(err)
	}
	if len(plan.Steps) != 6 {
		t.Errorf("plan to remove two peers:\n%s", plan)
	}
	n.Run(t, slices.Collect(lines(plan.String()))...)
	n.idle(t)
}

func TestDeviceOfFlannelIsAdopted(t *testing.T) {
	n := newNode(t, peerB)
	n.Run(t, likeFlannel...)
	before := n.Run(t, "ip -o link show flannel.1")
	n.state.Local.MAC = state.MAC{} // the device has one
	if res := n.sync(t); res.Steps != 0 {
		t.Errorf("%d steps to adopt what is complete", res.Steps)
	}
	if after := n.Run(t, "ip -o link show flannel.1"); after != before {
		t.Errorf("device was\n%sis\n%s", before, after)
	}
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
}

func TestDeviceIsMadeAnewAndKeepsItsMAC(t *testing.T) {
	for name, wrong := range map[string]string{
		"VNI":   "type vxlan id 5 local 192.0.2.11 dev eth0 dstport 8472 nolearning",
		"Port":  "type vxlan id 1 local 192.0.2.11 dev eth0 dstport 4789 nolearning",
		"Local": "type vxlan id 1 local 192.0.2.99 dev eth0 dstport 8472 nolearning",
		"Dev":   "type vxlan id 1 local 192.0.2.11 dev eth9 dstport 8472 nolearning",
		"Group": "type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 group 239.1.1.1",
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, peerB)
			n.Run(t,
				"ip link add eth9 type veth peer name eth9peer",
				"ip link add flannel.1 address 0a:00:00:00:00:0a "+wrong,
				"ip link set flannel.1 up",
			)
			n.state.Local.MAC = state.MAC{}
			n.sync(t)
			n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
		})
	}
}

func TestChangedStateMakesTheDeviceAnew(t *testing.T) {
	n := newNode(t, peerB)
	n.sync(t)
	n.state.Local.MAC = state.MAC{}
	n.state.Port = 4789
	n.sync(t)
	n.wantShow(t, "flannel.1", strings.ReplaceAll(flannelDevice, "8472", "4789")+flannelPeerB)

	n.Run(t, "ip addr add 192.0.2.21/24 dev eth0")
	n.state.Local.PublicIP = netip.MustParseAddr("192.0.2.21")
	n.sync(t)
	n.wantShow(t, "flannel.1", strings.NewReplacer("8472", "4789", "192.0.2.11", "192.0.2.21").Replace(flannelDevice)+flannelPeerB)

	// Another VNI is another device; its routes take over, the old device is
	// left to whoever changed the VNI.
	n.state.VNI = 7
	n.state.Local.MAC = mustMAC(t, ownMAC)
	n.sync(t)
	n.wantShow(t, "flannel.7", strings.NewReplacer("8472", "4789", "192.0.2.11", "192.0.2.21", "id 1", "id 7", "flannel.1", "flannel.7").Replace(flannelDevice)+flannelPeerB)
}

func TestDeviceIsPutRightInPlace(t *testing.T) {
	for name, wrong := range map[string][]string{
		"MTU":         {"ip link set flannel.1 mtu 1300"},
		"Down":        {"ip link set flannel.1 down"},
		"MAC":         {"ip link set flannel.1 address 0a:00:00:00:00:ff"},
		"Learning":    {"ip link set flannel.1 type vxlan learning"},
		"AcceptRA":    {"sysctl -q -w net/ipv6/conf/flannel.1/accept_ra=2"},
		"AddressGone": {"ip addr del 10.244.25.0/32 dev flannel.1"},
		"OldAddress":  {"ip addr flush dev flannel.1", "ip addr add 10.244.99.0/32 dev flannel.1"},
		"All": {
			"ip link set flannel.1 down", "ip link set flannel.1 mtu 1300", "ip link set flannel.1 address 0a:00:00:00:00:ff",
			"ip link set flannel.1 type vxlan learning", "ip addr flush dev flannel.1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, peerB)
			n.sync(t)
			index := n.sync(t).Overlays[0].Index
			n.Run(t, wrong...)
			if res := n.sync(t); res.Overlays[0].Index != index || res.Steps == 0 {
				t.Errorf("device made anew, or nothing done: %+v", res)
			}
			n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
			if got := strings.TrimSpace(n.Run(t, "sysctl -n net/ipv6/conf/flannel.1/accept_ra")); got != "0" {
				t.Errorf("accept_ra is %s", got)
			}
		})
	}
}

// In a container that has /proc/sys read-only the overlay works all the same.
func TestSettingsAreReadOnly(t *testing.T) {
	n := newNode(t, peerB)
	n.path.setting = func(string) string { return "/proc/sys/kernel/random/entropy_avail" } // a number that nobody may set
	n.sync(t)
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
	if res := n.sync(t); res.Steps != 0 {
		t.Errorf("there was something to do again: %+v", res)
	}
}

func TestMACOfTheStateWins(t *testing.T) {
	n := newNode(t, peerB)
	n.sync(t)
	n.state.Local.MAC = mustMAC(t, "0a:00:00:00:00:aa")
	n.sync(t)
	n.wantShow(t, "flannel.1", strings.ReplaceAll(flannelDevice, "00:0a brd", "00:aa brd")+flannelPeerB)
}

func TestMTUFollowsTheUplink(t *testing.T) {
	n := newNode(t, peerB)
	n.sync(t)
	n.Run(t, "ip link set eth0 mtu 1400")
	n.sync(t)
	n.wantShow(t, "flannel.1", strings.ReplaceAll(flannelDevice, "mtu 1450", "mtu 1350")+flannelPeerB)
}

func TestStaleAddressGoesAndOthersStay(t *testing.T) {
	n := newNode(t, peerB)
	n.Run(t, likeFlannel...)
	n.Run(t, "ip addr add 10.244.99.0/32 dev flannel.1", "ip addr add 172.16.0.1/24 dev flannel.1")
	n.sync(t)
	n.wantShow(t, "flannel.1", flannelDevice+`
		flannel.1 inet 172.16.0.1/24 scope global flannel.1
		10.244.4.0/24 via 10.244.4.0 onlink
		172.16.0.0/24 proto kernel scope link src 172.16.0.1
		10.244.4.0 lladdr 0a:00:00:00:00:0b PERMANENT
		0a:00:00:00:00:0b dst 192.0.2.12 self permanent
	`)
}

func TestPeersComeChangeAndGo(t *testing.T) {
	n := newNode(t, "")
	for _, step := range []struct{ peers, want string }{
		{"", ""},
		{peerB, flannelPeerB},
		// New MAC.
		{"b 10.244.4.0/24 192.0.2.12 0a:00:00:00:00:bb", strings.ReplaceAll(flannelPeerB, "00:0b", "00:bb")},
		// New address.
		{"b 10.244.4.0/24 192.0.2.112 0a:00:00:00:00:bb", strings.NewReplacer("00:0b", "00:bb", "2.12", "2.112").Replace(flannelPeerB)},
		// The prefix goes to another node.
		{"c 10.244.4.0/24 192.0.2.12 0a:00:00:00:00:0b", flannelPeerB},
		// The prefix is cut in half: another route through the same gateway.
		{"c 10.244.4.0/25 192.0.2.12 0a:00:00:00:00:0b", strings.ReplaceAll(flannelPeerB, "/24", "/25")},
		{"", ""},
	} {
		n.state.Peers = mustPeers(t, step.peers)
		n.sync(t)
		n.wantShow(t, "flannel.1", flannelDevice+step.want)
	}
}

func TestStalePeersOfADeadPastGo(t *testing.T) {
	n := newNode(t, peerB)
	n.Run(t, likeFlannel...)
	n.Run(t,
		"ip neigh add 10.244.66.0 lladdr 0a:00:00:00:00:66 dev flannel.1 nud permanent",
		"bridge fdb add 0a:00:00:00:00:66 dev flannel.1 dst 192.0.2.66 self permanent",
		"ip route add 10.244.66.0/24 via 10.244.66.0 dev flannel.1 onlink",
	)
	if res := n.sync(t); res.Steps != 3 {
		t.Errorf("%d steps", res.Steps)
	}
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
}

func TestForeignThingsAreLeftAlone(t *testing.T) {
	n := newNode(t, peerB)
	n.Run(t, likeFlannel...)
	n.Run(t,
		"ip neigh add 10.244.88.0 lladdr 0a:00:00:00:00:88 dev flannel.1 nud stale",
		"ip neigh add 10.244.87.0 lladdr 0a:00:00:00:00:87 dev flannel.1 nud permanent extern_learn",
		"bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.0.2.99 self permanent",
		"bridge fdb add 0a:00:00:00:00:84 dev flannel.1 dst 192.0.2.84 port 4789 self permanent",
		"bridge fdb add 0a:00:00:00:00:83 dev flannel.1 dst 192.0.2.83 self dynamic",
		"ip route add 10.99.0.0/16 via 10.244.4.0 dev flannel.1 onlink",
		"ip route add 10.98.0.0/16 dev flannel.1",
		"ip route add 10.97.0.0/24 via 10.97.0.0 dev flannel.1 onlink proto static",
		"ip route add 10.244.66.0/24 via 192.0.2.1 dev eth0",
		"ip route add 10.244.67.0/24 via 10.244.67.0 dev flannel.1 onlink table 100",
	)
	before := n.show(t, "flannel.1") + n.Run(t, "ip route show table all")
	n.state.Peers = append(n.state.Peers, mustPeers(t, peerC)...)
	n.sync(t)
	n.state.Peers = mustPeers(t, peerB)
	n.sync(t)
	if after := n.show(t, "flannel.1") + n.Run(t, "ip route show table all"); after != before {
		t.Errorf("was\n%sis\n%s", before, after)
	}
}

func TestOnePeerThatFailsLeavesTheOthersServed(t *testing.T) {
	n := newNode(t, peerB+peerC+"self 10.244.9.0/24 192.0.2.11 0a:00:00:00:00:09\nlater 10.244.8.0/24 192.0.2.8 -")
	n.Run(t, "ip route add 10.244.7.0/24 via 192.0.2.1 dev eth0 proto static")
	res, err := n.path.Sync(t.Context(), n.state)
	if err == nil || !strings.Contains(err.Error(), "2 of 4 peers not served") ||
		!strings.Contains(err.Error(), "10.244.7.0/24 via 192.0.2.1 dev eth0 proto static") {
		t.Errorf("error is %v", err)
	}
	checkFailed(t, res.Failed, map[string]string{"10.244.7.0/24": "not ours", "10.244.9.0/24": "this node's own"})
	if len(res.Skipped) != 1 || res.Skipped[0] != netip.MustParsePrefix("10.244.8.0/24") {
		t.Errorf("skipped are %v", res.Skipped)
	}
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)

	// When the conflict goes, the peer is served.
	n.Run(t, "ip route del 10.244.7.0/24")
	n.state.Peers = mustPeers(t, peerB+peerC)
	n.sync(t)
}

// The kernel itself refuses a peer here, in the middle of a batch.
func TestKernelRefusesOnePeer(t *testing.T) {
	n := newNode(t, peerB)
	n.sync(t)
	bad := Step{Op: AddRoute, Device: "flannel.1", Prefix: netip.MustParsePrefix("10.244.8.0/24"), Peer: netip.MustParsePrefix("10.244.8.0/24")}
	bad.Addr = netip.MustParseAddr("192.0.2.11") // our own address is no gateway
	good := Step{Op: AddRoute, Device: "flannel.1", Prefix: netip.MustParsePrefix("10.244.9.0/24"), Peer: netip.MustParsePrefix("10.244.9.0/24")}
	good.Addr = good.Prefix.Addr()
	neigh := Step{Op: SetNeighbour, Device: "flannel.1", Addr: netip.MustParseAddr("224.0.0.1"), MAC: mustMAC(t, "0a:00:00:00:00:08"), Peer: good.Peer}
	index := n.sync(t).Overlays[0].Index
	o := n.path.applyPeers(t.Context(), []Step{bad, good}, index)
	if err := o.failed[bad.Peer]; o.done != 1 || len(o.failed) != 1 || !errors.Is(err, unix.EINVAL) ||
		!strings.Contains(err.Error(), "peer 10.244.8.0/24: ip route add 10.244.8.0/24 via 192.0.2.11 dev flannel.1 onlink: invalid argument (Nexthop has invalid gateway") {
		t.Errorf("outcome is %+v", o)
	}
	// Whose neighbour fails gets no route.
	good.Prefix = netip.MustParsePrefix("10.244.10.0/24")
	if o := n.path.applyPeers(t.Context(), []Step{neigh, good}, 99999); o.done != 0 || len(o.failed) != 1 || !strings.Contains(o.failed[good.Peer].Error(), "ip neigh") {
		t.Errorf("outcome is %+v", o)
	}
}

// What was to be removed is gone already, what was to be added is there.
func TestOperationsAreRepeatable(t *testing.T) {
	n := newNode(t, peerB)
	index := n.sync(t).Overlays[0].Index
	steps := []Step{
		{Op: SetFDB, MAC: mustMAC(t, "0a:00:00:00:00:0b"), Addr: netip.MustParseAddr("192.0.2.12")},
		{Op: SetNeighbour, MAC: mustMAC(t, "0a:00:00:00:00:0b"), Addr: netip.MustParseAddr("10.244.4.0")},
		{Op: ReplaceRoute, Prefix: netip.MustParsePrefix("10.244.4.0/24"), Addr: netip.MustParseAddr("10.244.4.0")},
		{Op: DeleteRoute, Prefix: netip.MustParsePrefix("10.244.50.0/24"), Addr: netip.MustParseAddr("10.244.50.0")},
		{Op: DeleteNeighbour, Addr: netip.MustParseAddr("10.244.50.0")},
		{Op: DeleteFDB, MAC: mustMAC(t, "0a:00:00:00:00:50"), Addr: netip.MustParseAddr("192.0.2.50")},
	}
	if o := n.path.applyPeers(t.Context(), steps, index); o.done != len(steps) {
		t.Errorf("outcome is %+v", o)
	}
	for _, s := range []Step{
		{Op: AddAddress, Prefix: netip.MustParsePrefix("10.244.25.0/32")},
		{Op: DeleteAddress, Prefix: netip.MustParsePrefix("10.244.77.0/32")},
	} {
		s.Device = "flannel.1"
		if err := n.path.applyDevice(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	n.idle(t)
	// The device has gone with all that was to be removed from it.
	n.Run(t, "ip link del flannel.1")
	if o := n.path.applyPeers(t.Context(), steps[3:], index); o.done != 3 {
		t.Errorf("outcome without the device is %+v", o)
	}
	if err := n.path.applyDevice(Step{Op: DeleteDevice, Device: "flannel.1"}); err != nil {
		t.Error(err)
	}
}

func TestDualStack(t *testing.T) {
	n := newNode(t, peerB+"b fd00:10:244:4::/64 2001:db8::12 0a:00:00:00:06:0b")
	n.dual()
	res := n.sync(t)
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
	device := strings.NewReplacer(
		"flannel.1:", "flannel-v6.1:", "1450", "1430", "192.0.2.11", "2001:db8::11", "00:00:0a brd", "00:06:0a brd",
		"flannel.1 inet 10.244.25.0/32 scope global flannel.1", "flannel-v6.1 inet6 fd00:10:244:25::/128 scope global",
	).Replace(flannelDevice)
	n.wantShow(t, "flannel-v6.1", device+`
		fd00:10:244:4::/64 via fd00:10:244:4:: metric 1024 onlink pref medium
		fd00:10:244:25:: proto kernel metric 256 pref medium
		fd00:10:244:4:: lladdr 0a:00:00:00:06:0b PERMANENT
		0a:00:00:00:06:0b dst 2001:db8::12 self permanent
	`)
	if len(res.Overlays) != 2 || res.Overlays[0].Name != "flannel.1" || res.Overlays[1].Name != "flannel-v6.1" {
		t.Errorf("overlays are %+v", res.Overlays)
	}
	entries, err := n.path.Entries(1)
	if want := "[{10.244.4.0/24 10.244.4.0 0a:00:00:00:00:0b 192.0.2.12 false} {fd00:10:244:4::/64 fd00:10:244:4:: 0a:00:00:00:06:0b 2001:db8::12 false}]"; fmt.Sprint(entries) != want || err != nil {
		t.Errorf("entries are %v (%v), want %s", entries, err, want)
	}

	// Everything of a peer's IPv6 changes, then it goes.
	n.Run(t, "ip addr add fd00:10:244:99::/128 dev flannel-v6.1") // of a past prefix
	n.state.Peers = mustPeers(t, peerB+"b fd00:10:244:4::/64 2001:db8::112 0a:00:00:00:06:bb")
	n.sync(t)
	if got := n.show(t, "flannel-v6.1"); !strings.Contains(got, "06:bb dst 2001:db8::112") || strings.Contains(got, "06:0b") || strings.Contains(got, "244:99") {
		t.Errorf("flannel-v6.1 is\n%s", got)
	}
	n.state.Peers = nil
	n.sync(t)
	n.wantShow(t, "flannel-v6.1", device+"fd00:10:244:25:: proto kernel metric 256 pref medium")

	removed, err := n.path.Remove(1)
	if err != nil || !slices.Equal(removed, []string{"flannel.1", "flannel-v6.1"}) {
		t.Errorf("removed %v (%v)", removed, err)
	}
	if removed, err := n.path.Remove(1); err != nil || len(removed) != 0 {
		t.Errorf("removed again %v (%v)", removed, err)
	}
	if entries, err := n.path.Entries(1); err != nil || len(entries) != 0 {
		t.Errorf("entries without devices are %v (%v)", entries, err)
	}
}

func TestDeviceOfAnotherKindIsRefused(t *testing.T) {
	n := newNode(t, peerB)
	n.Run(t, "ip link add flannel.1 type bridge")
	before := n.Run(t, "ip -d link show flannel.1")
	_, err := n.path.Sync(t.Context(), n.state)
	if err == nil || !strings.Contains(err.Error(), `a device named flannel.1 exists, but it is of type "bridge"`) {
		t.Errorf("sync: %v", err)
	}
	if removed, err := n.path.Remove(1); err == nil || len(removed) != 0 {
		t.Errorf("removed %v (%v)", removed, err)
	}
	if _, _, err := n.path.DeviceMAC("flannel.1"); err == nil {
		t.Error("DeviceMAC gave a bridge's MAC")
	}
	if after := n.Run(t, "ip -d link show flannel.1"); after != before {
		t.Errorf("device was\n%sis\n%s", before, after)
	}
}

func TestVNITakenByAnotherDevice(t *testing.T) {
	n := newNode(t, peerB)
	n.Run(t, "ip link add other type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472")
	_, err := n.path.Sync(t.Context(), n.state)
	if err == nil || !strings.Contains(err.Error(), "the vxlan device other has VNI 1 and port 8472 already") {
		t.Errorf("sync: %v", err)
	}
}

func TestUplinkWithoutTheAddress(t *testing.T) {
	n := newNode(t, peerB)
	n.state.Local.PublicIP = netip.MustParseAddr("192.0.2.99")
	res, err := n.path.Sync(t.Context(), n.state)
	if err == nil || !strings.Contains(err.Error(), "uplink eth0 has no address 192.0.2.99; its addresses are 192.0.2.11/24, 2001:db8::11/64") {
		t.Errorf("sync: %v", err)
	}
	if res.Uplink.Name != "eth0" {
		t.Errorf("the result has no uplink: %+v", res)
	}
	n.state.Local.Uplink = "eth7"
	if _, err := n.path.Sync(t.Context(), n.state); err == nil || !strings.Contains(err.Error(), "uplink eth7") {
		t.Errorf("sync: %v", err)
	}
}

func TestDeviceMAC(t *testing.T) {
	n := newNode(t, peerB)
	ask := func() (mac state.MAC, ok bool, err error) {
		n.MustDo(t, func() error {
			mac, ok, err = DeviceMAC("flannel.1")
			return nil
		})
		return mac, ok, err
	}
	if mac, ok, err := ask(); ok || err != nil {
		t.Errorf("without a device: %s, %v, %v", mac, ok, err)
	}
	n.state.Local.MAC = state.MAC{}
	if _, err := n.path.Sync(t.Context(), n.state); err == nil || !strings.Contains(err.Error(), "no MAC is given") {
		t.Errorf("sync without a MAC: %v", err)
	}
	n.state.Local.MAC = mustMAC(t, ownMAC)
	n.sync(t)
	if mac, ok, err := ask(); !ok || err != nil || mac.String() != ownMAC {
		t.Errorf("with a device: %s, %v, %v", mac, ok, err)
	}
}

func TestSyncStopsWithItsContext(t *testing.T) {
	n := newNode(t, peerB)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if res, err := n.path.Sync(ctx, n.state); !errors.Is(err, context.Canceled) || res.Steps != 0 {
		t.Errorf("sync: %+v, %v", res, err)
	}
}

// manyPeers are n peers, each with prefix, address and MAC of its own.
func manyPeers(n int) []state.Peer {
	peers := make([]state.Peer, n)
	for i := range peers {
		hi, lo := byte(i>>8), byte(i)
		peers[i] = state.Peer{
			Node:     fmt.Sprintf("node-%d", i),
			Prefix:   netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + hi, lo, 0}), 24),
			PublicIP: netip.AddrFrom4([4]byte{198, 18, hi, lo}),
			MAC:      state.MAC{0x0a, 0x01, 0, 0, hi, lo},
		}
	}
	return peers
}

// cpuTime is the CPU time this process has used.
func cpuTime(t *testing.T) time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func TestFiveThousandPeers(t *testing.T) {
	const count = 5000
	n := newNode(t, "")
	n.path.log = slog.New(slog.DiscardHandler)
	n.state.Networks = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	timed := func(what string, wantSteps int) {
		t.Helper()
		before := cpuTime(t)
		begin := time.Now()
		res, err := n.path.Sync(t.Context(), n.state)
		took := time.Since(begin)
		cpu := cpuTime(t) - before
		t.Logf("%s: %v, %v CPU, %d steps", what, took.Round(time.Millisecond), cpu.Round(time.Millisecond), res.Steps)
		if err != nil || res.Steps != wantSteps {
			t.Errorf("%s: %d steps, want %d (%v)", what, res.Steps, wantSteps, err)
		}
	}
	const device = 4 // add, accept_ra, address, up
	timed("device", device)
	n.state.Peers = manyPeers(count)
	timed("5,000 peers added", 3*count)
	timed("nothing to do", 0)
	timed("nothing to do", 0)
	n.state.Peers[77].MAC[1] = 0x77
	timed("one MAC changed", 3) // new FDB entry, neighbour, old FDB entry
	n.Run(t, "ip link del flannel.1")
	timed("device deleted", device+3*count)
	n.state.Peers = nil
	timed("5,000 peers removed", 3*count)
}

// A step on the device fails: peers are served, and the error says what is
// not as it should be.
func TestDeviceThatCannotBePutRightStillServesPeers(t *testing.T) {
	n := newNode(t, peerB)
	n.state.Local.MTU = 60 // less than a vxlan device can have
	n.Run(t, likeFlannel[:5]...)
	res, err := n.path.Sync(t.Context(), n.state)
	if err == nil || !strings.Contains(err.Error(), "overlay device flannel.1: ip link set flannel.1 mtu 60: ") {
		t.Errorf("sync: %v", err)
	}
	if res.Steps != 3 || len(res.Overlays) != 1 {
		t.Errorf("result is %+v", res)
	}
	n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
}

// Two nodes, and a pod address on each: what is programmed carries packets.
//
//	a  10.244.25.1 flannel.1 -- eth0 192.0.2.11 ---- 192.0.2.12 eth0 -- flannel.1 10.244.4.1  b
func TestPacketsFlowBetweenTwoNodes(t *testing.T) {
	const a, b = "10.244.25.0/24", "10.244.4.0/24"
	nodes := []*node{{NS: netns.New(t)}, {NS: netns.New(t)}}
	netns.Connect(t, nodes[0].NS, "eth0", nodes[1].NS, "eth0")
	for i, n := range nodes {
		own, other := []string{a, b}[i], []string{b, a}[i]
		n.state = testState(t, fmt.Sprintf("other %s 192.0.2.%d 0a:00:00:00:00:%02x", other, 12-i, 12-i))
		n.state.Local.Prefixes = []netip.Prefix{netip.MustParsePrefix(own)}
		n.state.Local.PublicIP = netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", 11+i))
		n.state.Local.MAC = mustMAC(t, fmt.Sprintf("0a:00:00:00:00:%02x", 11+i))
		pod := n.state.Local.Prefixes[0].Addr().Next()
		n.Run(t, "ip link set lo up", fmt.Sprintf("ip addr add 192.0.2.%d/24 dev eth0", 11+i),
			"ip link add cni0 type bridge", "ip link set cni0 up", fmt.Sprintf("ip addr add %s/24 dev cni0", pod))
		n.open(t)
		n.sync(t)
	}
	nodes[0].Run(t, "ping -c 3 -i 0.2 -W 2 -I 10.244.25.1 10.244.4.1")
	nodes[1].Run(t, "ping -c 3 -i 0.2 -W 2 -s 1422 -M do -I 10.244.4.1 10.244.25.1") // 1450 bytes: the whole MTU
}

// Others change their own things all the time while we sync.
func TestSyncOnABusyHost(t *testing.T) {
	n := newNode(t, "")
	n.path.log = slog.New(slog.DiscardHandler)
	n.state.Networks = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	n.state.Peers = manyPeers(300)
	var others *netlink.Handle
	n.MustDo(t, func() (err error) {
		others, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	defer others.Close()
	lo, err := others.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 20, byte(i >> 1), 1}), 24)
			addr := &netlink.Addr{IPNet: ipNet(prefix)}
			if i%2 == 0 {
				_ = others.AddrAdd(lo, addr)
			} else {
				_ = others.AddrDel(lo, addr)
			}
		}
	})
	for range 50 {
		if _, err := n.path.Sync(t.Context(), n.state); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	done.Wait()
	n.idle(t)
}
