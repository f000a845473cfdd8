//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

func TestOverlayDeviceIsDeletedByHand(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	for range 3 {
		mustComeBack(lt, r, "flannel.1 deleted", func() { lt.Run(l.Node(1), "ip link del flannel.1") })
	}
}

func TestEntriesOfTheOverlayDeviceAreDeletedByHand(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	for _, command := range []string{
		fmt.Sprintf("ip addr del %s/32 dev flannel.1", n1.VTEP),
		fmt.Sprintf("ip route del %s", n2.Prefix),
		fmt.Sprintf("ip neigh del %s dev flannel.1", n2.VTEP),
		fmt.Sprintf("bridge fdb del %s dev flannel.1 dst %s self", n2.MAC, n2.IP),
		"ip link set flannel.1 down",
		"ip link set flannel.1 address 0a:00:00:00:00:01",
		fmt.Sprintf("bridge fdb replace %s dev flannel.1 dst 192.0.2.99 self permanent", n2.MAC),
	} {
		mustComeBack(lt, r, command, func() { lt.Run(n1, command) })
	}
}

// The kernel asks for the neighbours anew when the uplink is up again, and when
// the switch does not forward yet, a second later once more.
func TestUplinkFlaps(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	p := underTraffic(lt, r, func() {
		lt.Run(l.Node(1), "ip link set eth0 down")
		time.Sleep(200 * time.Millisecond)
		lt.Run(l.Node(1), "ip link set eth0 up")
		lt.Eventually(5*time.Second, func() error { return r.ask(t.Context(), 1) })
	})
	t.Log(p)
	if gap := p.longestGap(); gap > 2500*time.Millisecond {
		t.Errorf("no traffic for %s", gap)
	}
	mustRideBase(lt, r)
}

// A driver is loaded anew: the uplink goes, with it the overlay device on it,
// and comes back with another index.
func TestUplinkIsReplaced(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n := l.Node(1)
	mustComeBack(lt, r, "eth0 replaced", func() {
		lt.Run(l.Underlay, "ip link del n1")
		time.Sleep(200 * time.Millisecond)
		lt.Run(l.Underlay, "ip link add n1 type veth peer name eth0 netns "+n.Namespace())
		lt.Run(l.Underlay, "ip link set n1 master br0 up")
		lt.Run(n, fmt.Sprintf("ip addr add %s/24 dev eth0", n.IP))
		lt.Run(n, "ip link set eth0 up")
	})
}

func TestUplinkChangesItsMTU(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	for _, mtu := range []int{1400, 1500} {
		mustLoseNothing(lt, r, func() {
			lt.Run(l.Node(1), fmt.Sprintf("ip link set eth0 mtu %d", mtu))
			lt.Eventually(time.Second, func() error {
				if out := lt.Run(l.Node(1), "ip link show flannel.1"); !strings.Contains(out, fmt.Sprintf("mtu %d ", mtu-50)) {
					return errors.New(out)
				}
				return nil
			})
		})
		if got, want := pingSees(lt, r, fmt.Sprintf("-c 3 -M dont -s %d", mtu-50-28)), "3 of 3, ttl=62"; got != want {
			t.Errorf("MTU %d: a packet that just fits: %s", mtu, got)
		}
	}
}

func TestPeerGetsAnotherVTEPMAC(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	mustComeBack(lt, r, "another VTEP MAC", func() {
		n2.MAC[5] = 0x77 // what the lab writes from here on
		mustConfigure(t, n2, n2.IP, entriesOf(n1)...)
		mustConfigure(t, n1, n1.IP, entriesOf(n2)...)
	})
	if out := lt.Run(n2, "ip link show flannel.1"); !strings.Contains(out, n2.MAC.String()) {
		t.Errorf("n2's device has not its new MAC: %s", out)
	}
}

func TestNodeGetsAnotherAddress(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	mustComeBack(lt, r, "another public IP", func() {
		old := n2.IP
		n2.IP = netip.MustParseAddr("192.0.2.112")
		lt.Run(n2, fmt.Sprintf("ip addr add %s/24 dev eth0", n2.IP))
		lt.Run(n2, fmt.Sprintf("ip addr del %s/24 dev eth0", old))
		lt.Run(n2, fmt.Sprintf("ip addr replace %s/24 dev eth0", n2.IP))
		mustConfigure(t, n2, n2.IP, entriesOf(n1)...)
		mustConfigure(t, n1, n1.IP, entriesOf(n2)...)
	})
	if p := mustPeers(t, n1); len(p) != 1 || p[0].PublicIP != n2.IP {
		t.Errorf("n1's peers: %+v", p)
	}
}

func TestPeerGoesAndComesBack(t *testing.T) {
	t.Parallel()
	lt, l := newTrafficLab(t, lab.Options{Nodes: 3})
	n1 := l.Node(1)
	stays, goes := between(l.Pod(1, 1), l.Pod(2, 1)), between(l.Pod(1, 1), l.Pod(3, 1))
	mustRideBase(lt, goes)
	for range 2 {
		mustLoseNothing(lt, stays, func() {
			mustConfigure(t, n1, n1.IP, entriesOf(l.Node(2))...)
			lt.Eventually(2*time.Second, func() error {
				if len(mustPeers(t, n1)) != 1 {
					return errors.New("it is still a peer")
				}
				return nil
			})
			if goes.ask(t.Context(), 1) == nil {
				t.Error("it still answers")
			}
			mustConfigure(t, n1, n1.IP, entriesOf(l.Node(2), l.Node(3))...)
			lt.Eventually(2*time.Second, func() error { return goes.ask(t.Context(), 1) })
		})
		mustRideBase(lt, goes)
	}
}

// compareWithKernel does the same with acceleration and without, twice each,
// and fails the test when weft loses more than the kernel alone. The better of
// two counts: a busy machine loses time between the commands in f.
func compareWithKernel(t lab.Test, l *lab.Lab, r route, what string, f func()) {
	t.Helper()
	least := map[string]int{}
	for i, mode := range []string{"on", "off", "on", "off"} {
		for _, n := range l.Nodes {
			mustWeft(t, n, "accel", mode)
		}
		if mode == "on" {
			mustRideBase(t, r)
		}
		p := underTraffic(t, r, f)
		t.Logf("%s, acceleration %s: %d lost, longest gap %s", what, mode, p.lost(), p.longestGap())
		if i < 2 || p.lost() < least[mode] {
			least[mode] = p.lost()
		}
	}
	for _, n := range l.Nodes {
		mustWeft(t, n, "accel", "on")
	}
	// A packet is sent every 2 ms each way; 50 ms both ways are what a busy
	// machine needs between two commands in f.
	if least["on"] > least["off"]+50 {
		t.Errorf("%s: %d packets were lost with weft, %d with the kernel path alone", what, least["on"], least["off"])
	}
}

func TestNeighbourGetsAnotherMAC(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n2, last := l.Node(2), 0
	compareWithKernel(lt, l, r, "the peer's eth0 gets another MAC and says so", func() {
		last++
		lt.Run(n2, fmt.Sprintf("ip link set eth0 address 0a:58:c0:00:02:%02x", 0x80+last))
		lt.Run(n2, fmt.Sprintf("arping -q -U -c 1 -I eth0 %s", n2.IP))
		time.Sleep(300 * time.Millisecond)
	})
}

// What is sent while the next hop's MAC is asked for waits for the answer, and
// then has to leave with the outer Ethernet header.
func TestNeighbourOfTheUplinkIsForgotten(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	forget := func() {
		for range 5 {
			lt.Run(n1, fmt.Sprintf("ip neigh del %s dev eth0", n2.IP))
			time.Sleep(50 * time.Millisecond)
		}
	}
	mustWeft(t, n1, "accel", "off")
	if p := underTraffic(lt, r, forget); p.lost() > 0 {
		t.Fatalf("the kernel path alone loses packets: %s", p)
	}
	mustWeft(t, n1, "accel", "on")
	mustRideBase(lt, r)
	mustLoseNothing(lt, r, forget)
}

func TestRouteToThePeerMovesBehindTheGateway(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	for path, value := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/send_redirects": "0", "net/ipv4/conf/br0/send_redirects": "0",
	} {
		if err := l.Underlay.Sysctl(path, value); err != nil {
			t.Fatal(err)
		}
	}
	compareWithKernel(lt, l, r, "on-link, by the gateway, on-link", func() {
		lt.Run(n1, fmt.Sprintf("ip route replace %s/32 via %s dev eth0", n2.IP, lab.Gateway))
		time.Sleep(200 * time.Millisecond)
		forwards, base := mustGatewayForwards(lt, l), mustCarried(t, n1, n2).base.TxPackets
		time.Sleep(200 * time.Millisecond)
		base = mustCarried(t, n1, n2).base.TxPackets - base
		if forwards = mustGatewayForwards(lt, l) - forwards; forwards == 0 || forwards < base {
			t.Errorf("the gateway forwards %d of the %d packets of the base path", forwards, base)
		}
		lt.Run(n1, fmt.Sprintf("ip route del %s/32", n2.IP))
		time.Sleep(200 * time.Millisecond)
	})

	lt.Run(n1, fmt.Sprintf("ip route replace %s/32 via %s dev eth0", n2.IP, lab.Gateway))
	mustRideBase(lt, r)
	last := 0
	compareWithKernel(lt, l, r, "the gateway gets another MAC and says so", func() {
		last++
		lt.Run(l.Underlay, fmt.Sprintf("ip link set br0 address 0a:58:c0:00:02:%02x", 0xa0+last))
		lt.Run(l.Underlay, fmt.Sprintf("arping -q -U -c 1 -I br0 %s", lab.Gateway))
		time.Sleep(300 * time.Millisecond)
	})
}

// A route of the underlay has a smaller MTU than the uplink, as behind a VPN:
// no packet is longer, and what doesn't fit still arrives.
func TestRouteToThePeerHasASmallerMTU(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	lt.Run(l.Underlay, "nft", fmt.Sprintf("add table bridge watch { chain forward { type filter hook forward priority 0; ip saddr %s ip length > 1300 counter; }; }", n1.IP))
	lt.Run(n1, fmt.Sprintf("ip route replace %s/32 dev eth0 mtu 1300", n2.IP))
	// A forwarding lookup says nothing of this MTU, the agent tells the programs.
	lt.Eventually(5*time.Second, func() error {
		before := mustWatched(lt, l)
		if got := udpOf(1300)(lt, r); got != "20 of 20 intact" {
			return fmt.Errorf("datagrams of 1300 bytes: %s", got)
		}
		if longer := mustWatched(lt, l) - before; longer != 0 {
			return fmt.Errorf("%d packets longer than the route's MTU are on the underlay", longer)
		}
		return nil
	})
	before := mustWatched(lt, l)
	overBase(lt, r, func() {
		for _, size := range []int{100, 1300, 1422, 4000} {
			if got := udpOf(size)(lt, r); got != "20 of 20 intact" {
				t.Errorf("datagrams of %d bytes: %s", size, got)
			}
		}
	})
	if longer := mustWatched(lt, l) - before; longer != 0 {
		t.Errorf("%d packets longer than the route's MTU are on the underlay", longer)
	}
}

// mustWatched is how many packets the underlay's table watch has counted.
func mustWatched(t lab.Test, l *lab.Lab) uint64 {
	t.Helper()
	m := regexp.MustCompile(`packets (\d+)`).FindStringSubmatch(t.Run(l.Underlay, "nft list table bridge watch"))
	if m == nil {
		t.Fatal("the underlay counts nothing")
	}
	count, err := strconv.ParseUint(m[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return count
}

// mustGatewayForwards is how many packets the gateway has forwarded.
func mustGatewayForwards(t lab.Test, l *lab.Lab) uint64 {
	t.Helper()
	out := t.Run(l.Underlay, "nstat -a -s -z IpForwDatagrams")
	fields := strings.Fields(out)
	for i, f := range fields {
		if f == "IpForwDatagrams" && i+1 < len(fields) {
			count, _ := strconv.ParseUint(fields[i+1], 10, 64)
			return count
		}
	}
	t.Fatalf("nstat says nothing of forwarding: %s", out)
	return 0
}

// A stopping agent is told so in the middle of a sync, more often than not
// when much is going on. Traffic, counters and switches are none of its
// business then.
func TestAgentIsStoppedInTheMiddleOfASync(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n := l.Node(1)
	// Somebody's routing daemon nudges the agent all the time.
	daemon := lt.Start(n, "sh", "-c", "while ip route add blackhole 10.244.99.0/24 metric 99 && ip route del blackhole 10.244.99.0/24 metric 99; do :; done")
	defer daemon.Stop(syscall.SIGKILL)
	for i := range 20 {
		time.Sleep(time.Duration(i) * 7 * time.Millisecond)
		before := mustCarried(t, n, l.Node(2))
		mustStop(lt, n, syscall.SIGTERM)
		if status := mustStatus(t, n); status.Mode != "ebpf" {
			t.Fatalf("stop %d took the programs away: %s\n%s", i+1, status.Reason, n.AgentLog())
		}
		mustStart(lt, n, weft)
		if after := mustCarried(t, n, l.Node(2)); after.base.TxPackets < before.base.TxPackets {
			t.Fatalf("stop %d took the counters away: %+v, then %+v", i+1, before, after)
		}
	}
	mustRideBase(lt, r)
}

// The uplink is away for a moment: a driver is loaded anew, a virtual machine
// is moved. The operator's decision was not about that.
func TestSwitchesSurviveTheUplinksAbsence(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n := l.Node(1)
	mustWeft(t, n, "accel", "off")
	lt.Run(n, "ip link set eth0 name eth9")
	time.Sleep(time.Second)
	lt.Run(n, "ip link set eth9 name eth0")
	lt.Eventually(5*time.Second, func() error {
		if s := mustStatus(t, n); s.Mode != "ebpf" {
			return errors.New(s.Reason)
		}
		return nil
	})
	lt.Eventually(5*time.Second, func() error { return r.ask(t.Context(), 3) })
	before := mustCarried(t, n, l.Node(2))
	if err := r.ask(t.Context(), 10); err != nil {
		t.Error(err)
	}
	if now := mustCarried(t, n, l.Node(2)).sub(before); now.base.TxPackets > 0 || !strings.Contains(mustWeft(t, n, "status"), "off") {
		t.Errorf("acceleration is on again: %+v", now)
	}
}
