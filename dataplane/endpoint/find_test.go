//go:build linux

package endpoint

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
	"github.com/weft-net/weft/test/netns"
)

// Every test has a node of its own, as the CNI plugin bridge leaves it:
//
//	pod a                     node
//	eth0 10.244.1.2/24 ------ va ─┐
//	pod b                         cni0 10.244.1.1/24
//	eth0 10.244.1.3/24 ------ vb ─┘
//
// and is looked at with ip, bridge and tc, as an operator would.

type node struct {
	*netns.NS
	finder *Finder
}

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{NS: netns.New(t)}
	n.Run(t,
		"ip link set lo up",
		"ip link add cni0 address 0a:58:0a:f4:01:01 type bridge",
		"ip addr add 10.244.1.1/24 dev cni0",
		"ip link set cni0 mtu 1450 up",
	)
	n.open(t, Options{})
	return n
}

// open opens the node's finder anew.
func (n *node) open(t testing.TB, opts Options) {
	t.Helper()
	opts.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	n.MustDo(t, func() (err error) {
		n.finder, err = Open(opts)
		return err
	})
	f := n.finder
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

// wire makes a pod's namespace, and a veth to it, both ends up. The pod's MAC
// ends in its letter.
func (n *node) wire(t testing.TB, name string) *netns.NS {
	t.Helper()
	pod := netns.New(t)
	n.Run(t,
		fmt.Sprintf("ip link add v%s mtu 1450 type veth peer name eth0 mtu 1450 address 0a:00:00:00:00:%02x netns %s", name, name[0], pod.Path()),
		fmt.Sprintf("ip link set v%s up", name),
	)
	pod.Run(t, "ip link set lo up", "ip link set eth0 up")
	return pod
}

// pod makes a pod on cni0.
func (n *node) pod(t testing.TB, name, address string) *netns.NS {
	t.Helper()
	return n.podOn(t, "cni0", name, address)
}

// podOn makes a pod on a bridge.
func (n *node) podOn(t testing.TB, bridge, name, address string) *netns.NS {
	t.Helper()
	pod := n.wire(t, name)
	n.Run(t, fmt.Sprintf("ip link set v%s master %s", name, bridge))
	pod.Run(t, "ip addr add "+address+"/24 dev eth0")
	return pod
}

func (n *node) find(t testing.TB) Found {
	t.Helper()
	found, err := n.finder.Find(prefixes)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// wants finds until that is found, or for a while: the kernel tells bridges of
// their ports with a delay.
func (n *node) wants(t testing.TB, want ...string) {
	t.Helper()
	var got string
	for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if got = n.find(t).text(); got == lines(want) {
			return
		}
	}
	t.Errorf("found:\n%swant:\n%s", got, lines(want))
}

// wantsNow wants it at the first look.
func (n *node) wantsNow(t testing.TB, want ...string) {
	t.Helper()
	if got := n.find(t).text(); got != lines(want) {
		t.Errorf("found:\n%swant:\n%s", got, lines(want))
	}
}

// What is found of pods a and b where nothing is wrong.
const (
	foundA = "10.244.1.2 va 0a:00:00:00:00:61 via 0a:58:0a:f4:01:01 mtu 1450 cni0"
	foundB = "10.244.1.3 vb 0a:00:00:00:00:62 via 0a:58:0a:f4:01:01 mtu 1450 cni0"
)

func TestPodsComeAndGo(t *testing.T) {
	n := newNode(t)
	n.wantsNow(t)
	n.pod(t, "a", "10.244.1.2")
	n.pod(t, "b", "10.244.1.3")
	n.wants(t, foundA, foundB)
	n.wantsNow(t, foundA, foundB)

	old := n.find(t).Endpoints[0]
	n.Run(t, "ip link del va")
	n.wantsNow(t, foundB)

	n.pod(t, "c", "10.244.1.2")
	n.wants(t, strings.NewReplacer("va", "vc", "00:61", "00:63").Replace(foundA), foundB)
	if e := n.find(t).Endpoints[0]; e.Veth == old.Veth {
		t.Errorf("the address of a new pod is at the old one's interface %d", e.Veth)
	}
}

func TestChangesInsideAPod(t *testing.T) {
	n := newNode(t)
	a := n.pod(t, "a", "10.244.1.2")
	n.wants(t, foundA)

	a.Run(t, "ip link set eth0 address 0a:00:00:00:00:77")
	n.wantsNow(t, strings.Replace(foundA, "00:61", "00:77", 1))
	a.Run(t, "ip addr add 10.244.1.9/24 dev eth0", "ip addr add 172.30.0.1/16 dev eth0")
	n.wantsNow(t, strings.Replace(foundA, "00:61", "00:77", 1), strings.NewReplacer("1.2", "1.9", "00:61", "00:77").Replace(foundA))
	a.Run(t, "ip addr del 10.244.1.2/24 dev eth0", "ip addr replace 10.244.1.9/24 dev eth0")
	a.Run(t, "ip link set eth0 mtu 1400 address 0a:00:00:00:00:61")
	n.wantsNow(t, strings.NewReplacer("1.2", "1.9", "1450", "1400").Replace(foundA))
	a.Run(t, "ip addr flush dev eth0")
	n.wantsNow(t, "left va: the pod has no address inside this node's prefixes")
	a.Run(t, "ip addr add 10.244.1.2/24 dev eth0", "ip link set eth0 down")
	if found := n.find(t); len(found.Endpoints) != 0 {
		t.Errorf("found a pod that is down:\n%s", found.text())
	}
}

// The number of a namespace that is gone passes to the next one. If that
// happens while we look, nothing may be said of the veth that it was read from.
func TestNumberOfANamespacePassesOn(t *testing.T) {
	n := newNode(t)
	a := n.pod(t, "a", "10.244.1.2")
	b := n.pod(t, "b", "10.244.1.3")
	n.wants(t, foundA, foundB)
	links, err := n.finder.readLinks()
	if err != nil {
		t.Fatal(err)
	}
	var veth device
	for _, l := range links {
		if l.name == "va" {
			veth = l
		}
	}
	what := func(veth device) pod {
		pods, err := n.finder.readPods([]candidate{{veth: veth}}, prefixes)
		if err != nil {
			t.Fatal(err)
		}
		return pods[veth.index]
	}
	if p := what(veth); p.problem != "" || len(p.addrs) != 1 {
		t.Fatalf("pod a is %+v", p)
	}
	t.Run("ToAPodOfAnotherVeth", func(t *testing.T) {
		gone := veth
		gone.index = 4711
		if p := what(gone); p.problem != problemGone || len(p.addrs) > 0 {
			t.Errorf("another pod is taken for it: %+v", p)
		}
	})
	t.Run("ToNobody", func(t *testing.T) {
		gone := veth
		gone.netns = 4711
		if p := what(gone); p.problem != problemGone {
			t.Errorf("the pod is %+v", p)
		}
	})
	t.Run("ToOneWithAnotherDeviceThere", func(t *testing.T) {
		gone := veth
		gone.peer = 1 // lo
		if p := what(gone); p.problem != problemGone {
			t.Errorf("the pod is %+v", p)
		}
	})
	t.Run("ToOneWithoutSuchADevice", func(t *testing.T) {
		gone := veth
		gone.peer = 4711
		if p := what(gone); p.problem != problemGone {
			t.Errorf("the pod is %+v", p)
		}
	})
	t.Run("ToAVethBetweenOthers", func(t *testing.T) {
		b.Run(t, "ip link add outer index 4712 type veth peer name inner index 77 netns "+a.Path())
		gone := veth
		gone.index, gone.peer = 4712, 77
		if p := what(gone); p.problem != problemGone {
			t.Errorf("a device that leads to another namespace is taken for it: %+v", p)
		}
	})
}

// An address that a pod has on another of its devices is not found at its veth.
func TestAddressOnAnotherDeviceOfThePod(t *testing.T) {
	n := newNode(t)
	a := n.pod(t, "a", "10.244.1.2")
	a.Run(t, "ip link add inner type bridge", "ip link set inner up", "ip addr add 10.244.1.8/32 dev inner")
	n.wants(t, foundA)
	// As a pod that holds a virtual machine has it.
	a.Run(t, "ip link add k6t-eth0 type bridge", "ip link set eth0 master k6t-eth0")
	n.wants(t, "left va: the pod's end is part of another device in the pod")
}

func TestPodWithTwoInterfaces(t *testing.T) {
	n := newNode(t)
	a := n.pod(t, "a", "10.244.1.2")
	n.Run(t,
		"ip link add va2 mtu 1450 type veth peer name net1 mtu 1450 address 0a:00:00:00:00:32 netns "+a.Path(),
		"ip link set va2 master cni0 up",
		"ip link add other type bridge", "ip link set other up",
		"ip link add va3 type veth peer name net2 netns "+a.Path(),
		"ip link set va3 master other up",
	)
	a.Run(t, "ip link set net1 up", "ip addr add 10.244.1.4/24 dev net1", "ip link set net2 up", "ip addr add 10.244.1.5/24 dev net2")
	n.wants(t, foundA, "10.244.1.4 va2 0a:00:00:00:00:32 via 0a:58:0a:f4:01:01 mtu 1450 cni0")
}

// Docker's bridge and pods look the same: another name, and addresses in our
// prefix because Docker was told so.
func TestAnyBridgeWithOurGateway(t *testing.T) {
	n := newNode(t)
	n.Run(t,
		"ip link del cni0",
		"ip link add docker0 address 02:42:0a:f4:01:01 type bridge",
		"ip addr add 10.244.1.1/24 dev docker0",
		"ip link set docker0 up",
		"ip link add br-other type bridge", // a network of its own
		"ip addr add 172.18.0.1/16 dev br-other",
		"ip link set br-other up",
	)
	n.podOn(t, "docker0", "a", "10.244.1.2")
	b := n.podOn(t, "br-other", "b", "172.18.0.2")
	b.Run(t, "ip addr add 10.244.1.3/24 dev eth0") // says so, and is not there
	n.wants(t, "10.244.1.2 va 0a:00:00:00:00:61 via 02:42:0a:f4:01:01 mtu 1450 docker0")
}

// The CNI plugin ptp:
//
//	pod p                          node
//	eth0 10.244.1.2/24 ----------- vp 10.244.1.1/32, route 10.244.1.2/32
func TestPodsWithoutABridge(t *testing.T) {
	n := newNode(t)
	n.Run(t, "ip link del cni0")
	p := n.wire(t, "p")
	p.Run(t, "ip addr add 10.244.1.2/24 dev eth0")
	n.Run(t, "ip link set vp address 0a:00:00:00:01:01", "ip addr add 10.244.1.1/32 dev vp")
	noRoute := "left vp 10.244.1.2: the host has no route to it"
	n.wants(t, noRoute)
	n.Run(t, "ip route add 10.244.1.2/32 dev vp scope host")
	found := "10.244.1.2 vp 0a:00:00:00:00:70 via 0a:00:00:00:01:01 mtu 1450 ptp"
	n.wants(t, found)

	n.wire(t, "q").Run(t, "ip addr add 10.244.1.3/24 dev eth0")
	n.Run(t, "ip route add 10.244.1.3/32 dev vp")
	n.wants(t, found, "left vq 10.244.1.3: the host has no route for it alone that leads to the veth")
	n.Run(t, "ip route del 10.244.1.3/32 dev vp", "ip route add 10.244.1.0/24 dev vq")
	n.wants(t, found, "left vq 10.244.1.3: the host has no route for it alone that leads to the veth")
	n.Run(t, "ip route replace 10.244.1.3/32 via 10.244.1.2 dev vq onlink")
	n.wants(t, found, "left vq 10.244.1.3: the host's route to it is by way of a gateway")
	n.Run(t, "ip route replace 10.244.1.3/32 dev vq")
	n.wants(t, found, "10.244.1.3 vq 0a:00:00:00:00:71 via "+n.mac(t, "vq")+" mtu 1450 ptp")
	n.Run(t, "ip route del 10.244.1.0/24", "ip route del 10.244.1.2/32 dev vp", "ip route add blackhole 10.244.1.2/32")
	n.wants(t, "10.244.1.3 vq 0a:00:00:00:00:71 via "+n.mac(t, "vq")+" mtu 1450 ptp", noRoute)
}

func (n *node) mac(t testing.TB, device string) string {
	t.Helper()
	return strings.Fields(n.Run(t, "ip -br link show "+device))[2]
}

func TestRouteOfAPodThatLeadsElsewhere(t *testing.T) {
	n := newNode(t)
	n.pod(t, "a", "10.244.1.2")
	n.Run(t, "ip link add other type bridge", "ip link set other up", "ip route add 10.244.1.2/32 dev other")
	n.wants(t, "left va 10.244.1.2: the host's route to it does not lead to bridge cni0")
}

func TestPodsThatPretend(t *testing.T) {
	t.Run("GatewaysAddress", func(t *testing.T) {
		n := newNode(t)
		n.pod(t, "a", "10.244.1.1")
		n.pod(t, "b", "10.244.1.3")
		n.wants(t, foundB, "left va 10.244.1.1: is an address of this host")
	})
	t.Run("AnotherPodsAddress", func(t *testing.T) {
		n := newNode(t)
		a := n.pod(t, "a", "10.244.1.2")
		n.pod(t, "b", "10.244.1.3")
		a.Run(t, "ip addr add 10.244.1.3/24 dev eth0")
		n.wants(t, foundA,
			"left va 10.244.1.3: is claimed by the pods of va, vb", "left vb 10.244.1.3: is claimed by the pods of va, vb",
			"note 10.244.1.3 is claimed by the pods of va, vb: none of them is accelerated")
		a.Run(t, "ip addr del 10.244.1.3/24 dev eth0")
		n.wants(t, foundA, foundB)
	})
	t.Run("AnotherPodsMAC", func(t *testing.T) {
		n := newNode(t)
		a := n.pod(t, "a", "10.244.1.2")
		n.pod(t, "b", "10.244.1.3")
		a.Run(t, "ip link set eth0 address 0a:00:00:00:00:62")
		same := "MAC 0a:00:00:00:00:62 is on bridge cni0 more than once (va, vb)"
		n.wants(t, "left va: "+same, "left vb: "+same)
	})
	t.Run("AddressOutsideThePrefix", func(t *testing.T) {
		n := newNode(t)
		n.pod(t, "a", "10.244.2.2")
		n.wants(t, "left va: the pod has no address inside this node's prefixes")
	})
	t.Run("HostsOtherEnd", func(t *testing.T) {
		n := newNode(t)
		n.Run(t,
			"ip link add va type veth peer name inner", "ip link set va master cni0 up",
			"ip link set inner up", "ip addr add 10.244.1.2/24 dev inner")
		n.wants(t)
	})
}

func TestBridgePorts(t *testing.T) {
	n := newNode(t)
	n.pod(t, "a", "10.244.1.2")
	for setting, test := range map[string]struct {
		set, back string
		want      []string
	}{
		"Hairpin":    {"hairpin on", "hairpin off", []string{foundA, "note bridge cni0 has ports in hairpin mode, which does not concern routed packets"}},
		"Isolated":   {"isolated on", "isolated off", []string{foundA, "note bridge cni0 has isolated ports, which does not concern routed packets"}},
		"Unlearning": {"learning off", "learning on", []string{"left va: the bridge port does not learn"}},
		"Locked":     {"locked on", "locked off", []string{"left va: the bridge port is locked"}},
		"Disabled":   {"state 0", "state 3", []string{"left va: the bridge does not forward on the port"}},
	} {
		t.Run(setting, func(t *testing.T) {
			n.Run(t, "bridge link set dev va "+test.set)
			n.wants(t, test.want...)
			n.Run(t, "bridge link set dev va "+test.back)
			n.wants(t, foundA)
		})
	}
}

func TestIPv6Pods(t *testing.T) {
	n := newNode(t)
	n.Run(t, "ip addr add fd00:10:244:1::1/64 dev cni0 nodad")
	a := n.pod(t, "a", "10.244.1.2")
	a.Run(t, "ip addr add fd00:10:244:1::2/64 dev eth0 nodad")
	both := append(prefixes, netip.MustParsePrefix("fd00:10:244:1::/64"))
	n.wants(t, foundA) // IPv6 is not asked for
	found, err := n.finder.Find(both)
	if want := lines([]string{foundA, strings.Replace(foundA, "10.244.1.2", "fd00:10:244:1::2", 1)}); err != nil || found.text() != want {
		t.Errorf("found (%v):\n%swant:\n%s", err, found.text(), want)
	}
	n.wants(t, foundA)
}

// While duplicate addresses are looked for, and when one was found, a device
// does not answer for its address.
func TestUnusableAddresses(t *testing.T) {
	for flags, want := range map[uint32]bool{
		0: true, unix.IFA_F_PERMANENT: true, unix.IFA_F_DEPRECATED: true,
		unix.IFA_F_TENTATIVE: false, unix.IFA_F_DADFAILED: false,
	} {
		r := rtnl.NewRequest(unix.RTM_NEWADDR, 0, ifaddrmsg(unix.AF_INET6, 2)...).
			Attr(unix.IFA_ADDRESS, netip.MustParseAddr("fd00::2").AsSlice()).
			Uint32(unix.IFA_FLAGS, flags)
		if _, _, usable, ok := parseAddress(r.Data()); !ok || usable != want {
			t.Errorf("with flags %#x the address is usable: %v, want %v", flags, usable, want)
		}
	}
}
