//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// What pods and hosts see of a cluster in which some nodes run weft. The last
// two nodes have flannel's state made by plain ip and bridge commands; what
// their pods see of each other is what everybody should see.
//
//	n1 weft    n2 weft    n3 kernel    n4 kernel
//	   p1         p1         p1           p1
//
// Over cards, of which there are two, only n1 and n2 are there.
func newMixedLab(tb testing.TB, opts lab.Options) (lab.Test, *lab.Lab) {
	tb.Helper()
	opts.Nodes, opts.Netfilter = 4, true
	opts.Kinds = []lab.Kind{lab.Weft, lab.Weft, lab.Kernel, lab.Kernel}
	if opts.Underlay == lab.Cards {
		opts.Nodes = len(opts.Cards)
	}
	t, l := newTrafficLab(tb, opts)
	for _, n := range l.Nodes {
		// The kernel limits the rate of ICMP errors, and tests are impatient.
		if err := n.Sysctl("net/ipv4/icmp_ratemask", "0"); err != nil {
			t.Fatal(err)
		}
		for _, p := range n.Pods {
			if err := p.Sysctl("net/ipv4/icmp_ratemask", "0"); err != nil {
				t.Fatal(err)
			}
		}
	}
	return t, l
}

// mixedPairs are all combinations; the last is the kernel's alone, where it is there.
func mixedPairs(l *lab.Lab) [][2]*lab.Node {
	pairs := [][2]*lab.Node{{l.Node(1), l.Node(2)}}
	if len(l.Nodes) == 4 {
		pairs = append(pairs, [2]*lab.Node{l.Node(1), l.Node(3)}, [2]*lab.Node{l.Node(3), l.Node(1)}, [2]*lab.Node{l.Node(3), l.Node(4)})
	}
	return pairs
}

// mixedRoutes are those between the nodes' pods.
func mixedRoutes(l *lab.Lab) []route {
	var routes []route
	for _, ends := range mixedPairs(l) {
		routes = append(routes, between(ends[0].Pods[0], ends[1].Pods[0]))
	}
	for i := range routes {
		routes[i].underlay = l.Underlay
	}
	return routes
}

// situation is something that a user does, and what there is to see of it.
type situation struct {
	name string
	see  func(t lab.Test, r route) string
	want string
	// silent situations send nothing that the base path would have to carry.
	silent bool
}

func TestWhatPodsSeeOfEachOther(t *testing.T) {
	situations := []situation{
		{name: "ping", see: ping5, want: "5 of 5, ttl=62"},
		{name: "traceroute", see: traceroute, want: "own cni0, remote flannel.1, destination"},
		{name: "TCP bulk both ways", see: tcpBulk, want: "intact", silent: true},
		{name: "TCP with small segments", see: tcpSmallSegments, want: "intact"},
		{name: "TCP request and response", see: tcpRequests, want: "100 of 100 intact"},
		{name: "UDP", see: udpOf(200), want: "20 of 20 intact"},
		{name: "UDP in fragments", see: udpOf(8000), want: "20 of 20 intact"},
		{name: "UDP without checksum", see: udpWithoutChecksum, want: "20 of 20 intact"},
		{name: "nobody listens", see: portUnreachable, want: "refused 5 of 5 times"},
		{name: "DSCP and ECN", see: tosKept, want: "0x00 0x01 0x02 0x03 0xb8 0xba 0xbb"},
		{name: "a packet that just fits", see: pingOf("-c 5 -M do -s 1422"), want: "5 of 5, ttl=62"},
		{name: "a byte too long, DF", see: pingOf("-c 5 -M do -s 1423"), want: "0 of 5, local error: message too long, mtu=1450", silent: true},
		{name: "a byte too long", see: pingOf("-c 5 -M dont -s 1423"), want: "5 of 5, ttl=62"},
		{name: "TTL ends at the own node", see: pingOf("-c 5 -t 1"), want: "0 of 5, own cni0 Time to live exceeded", silent: true},
		{name: "TTL ends at the other node", see: pingOf("-c 5 -t 2"), want: "0 of 5, remote flannel.1 Time to live exceeded"},
		{name: "wider pods, DF", see: widePods("-c 3 -M do -s 1472"), want: "0 of 3, local error: message too long, mtu=1450, own cni0 Frag needed and DF set (mtu = 1450)", silent: true},
		{name: "wider pods", see: widePods("-c 3 -M dont -s 1472"), want: "3 of 3, ttl=62"},
		{name: "broadcast, multicast, ARP", see: neighbourhood, want: "0 frames on the underlay", silent: true},
		{name: "ClusterIP TCP", see: clusterIPTCP, want: "intact", silent: true},
		{name: "ClusterIP UDP", see: clusterIPUDP, want: "20 of 20 intact"},
	}
	for name, opts := range wires() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lt, l := newMixedLab(t, opts)
			for _, r := range mixedRoutes(l) {
				mustRideBase(lt, r)
				for _, s := range situations {
					t.Run(r.String()+"/"+s.name, func(t *testing.T) { expect(t, r, s) })
				}
			}
			mustHaveStripped(lt, l)
		})
	}
}

func TestWhatHostsAndPodsSeeOfEachOther(t *testing.T) {
	situations := []situation{
		{name: "ping", see: ping5, want: "5 of 5, ttl=63"},
		{name: "TCP request and response", see: tcpRequests, want: "100 of 100 intact"},
		{name: "TCP bulk both ways", see: tcpBulk, want: "intact", silent: true},
		{name: "UDP", see: udpOf(200), want: "20 of 20 intact"},
		{name: "UDP in fragments", see: udpOf(8000), want: "20 of 20 intact"},
		{name: "nobody listens", see: portUnreachable, want: "refused 5 of 5 times"},
	}
	for name, opts := range wires() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lt, l := newMixedLab(t, opts)
			for _, ends := range mixedPairs(l) {
				pod, host, other := podPlace(ends[0].Pods[0]), hostPlace(ends[0]), podPlace(ends[1].Pods[0])
				overlay := place{&ends[1].Space, ends[1], ends[1].VTEP}
				for _, r := range []route{{from: host, to: other}, {from: pod, to: overlay}} {
					mustRideBase(lt, r)
					for _, s := range situations {
						t.Run(fmt.Sprintf("%s(%s)-%s(%s)/%s", r.from, ends[0].Kind, r.to, ends[1].Kind, s.name), func(t *testing.T) { expect(t, r, s) })
					}
				}
			}
			mustHaveStripped(lt, l)
		})
	}
}

// The way back of what a pod sends to a node's own address leads through the
// overlay, with that address as the inner source.
func TestPodReachesTheOtherHostsAddress(t *testing.T) {
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			t.Parallel()
			lt, l := newTrafficLab(t, lab.Options{Underlay: underlay})
			r := route{from: podPlace(l.Pod(1, 1)), to: hostPlace(l.Node(2))}
			mustRideBase(lt, between(l.Pod(1, 1), l.Pod(2, 1)))
			before := mustCarried(t, l.Node(1), l.Node(2))
			for name, see := range map[string]func(lab.Test, route) string{
				"TCP bulk both ways": tcpBulk, "UDP": udpOf(200), "UDP in fragments": udpOf(8000),
			} {
				if got := see(lt, r); got != "intact" && got != "20 of 20 intact" {
					t.Errorf("%s: %s", name, got)
				}
			}
			if got := pingSees(lt, r, "-c 5"); got != "5 of 5, ttl=63" {
				t.Errorf("ping: %s", got)
			}
			if now := mustCarried(t, l.Node(1), l.Node(2)).sub(before); now.base.RxPackets < 25 {
				t.Errorf("the answers did not come by the base path: %+v", now)
			}
			for _, n := range l.Nodes {
				for _, reason := range mustStatus(t, n).Reasons {
					if strings.HasPrefix(reason.Name, "source_") && reason.Passed+reason.Dropped > 0 {
						t.Errorf("%s: %d packets failed the source check: %s", n, reason.Passed, reason.Name)
					}
				}
			}
		})
	}
}

// expect fails the test when there is something else to see than wanted, or
// when it was not weft's base path that showed it.
func expect(t *testing.T, r route, s situation) {
	lt := lab.T(t)
	see := func() {
		if got := s.see(lt, r); got != s.want {
			t.Errorf("saw  %s\nwant %s", got, s.want)
		}
	}
	if s.silent {
		see()
		return
	}
	overBase(lt, r, see)
}

// ping5 pings.
func ping5(t lab.Test, r route) string { return pingSees(t, r, "-c 5") }

func pingOf(flags string) func(lab.Test, route) string {
	return func(t lab.Test, r route) string { return pingSees(t, r, flags) }
}

func traceroute(t lab.Test, r route) string {
	out := t.Run(r.from, "traceroute -n -q 1 -w 2 "+r.to.ip.String())
	var hops []string
	for _, line := range strings.Split(strings.TrimSpace(out), "\n")[1:] {
		hops = append(hops, inRoles(r, strings.Fields(line)[1]))
	}
	return strings.Join(hops, ", ")
}

func tcpBulk(t lab.Test, r route) string {
	l, port := mustListenTCP(t, r.to)
	return transferTCP(r.from, l, netip.AddrPortFrom(r.to.ip, port), 8<<20)
}

func tcpSmallSegments(t lab.Test, r route) string {
	l, port := mustListenTCP(t, r.to)
	return transferTCP(r.from, l, netip.AddrPortFrom(r.to.ip, port), 256<<10,
		option(unix.IPPROTO_TCP, unix.TCP_MAXSEG, 200))
}

// tcpRequests asks over one connection, each question after the last answer.
func tcpRequests(t lab.Test, r route) string {
	l, port := mustListenTCP(t, r.to)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		buffer := make([]byte, 1<<16)
		for {
			n, err := conn.Read(buffer)
			if err != nil {
				return
			}
			conn.Write(buffer[:n])
		}
	}()
	conn, err := r.from.Dial("tcp4", netip.AddrPortFrom(r.to.ip, port).String())
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	return askUDP(conn, 100, 100)
}

func udpOf(size int) func(lab.Test, route) string {
	return func(t lab.Test, r route) string {
		port := mustEchoUDP(t, r.to)
		return askUDP(mustDialUDP(t, r.from, netip.AddrPortFrom(r.to.ip, port)), 20, size)
	}
}

func udpWithoutChecksum(t lab.Test, r route) string {
	port := mustEchoUDP(t, r.to)
	conn := mustDialUDP(t, r.from, netip.AddrPortFrom(r.to.ip, port), option(unix.SOL_SOCKET, unix.SO_NO_CHECK, 1))
	return askUDP(conn, 20, 200)
}

// portUnreachable sends to a port where nobody listens.
func portUnreachable(t lab.Test, r route) string {
	refused := 0
	for range 5 {
		conn := mustDialUDP(t, r.from, netip.AddrPortFrom(r.to.ip, 9))
		conn.Write([]byte("anybody?"))
		conn.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, unix.ECONNREFUSED) {
			refused++
		}
		conn.Close()
	}
	return fmt.Sprintf("refused %d of 5 times", refused)
}

// tosKept tells with which TOS packets arrive that are sent with different ones.
func tosKept(t lab.Test, r route) string {
	receiver := mustListenUDP(t, r.to)
	port := uint16(receiver.LocalAddr().(*net.UDPAddr).Port)
	var seen []string
	for _, tos := range []int{0x00, 0x01, 0x02, 0x03, 0xb8, 0xba, 0xbb} {
		seen = append(seen, tosOf(t, r, receiver, port, tos, 5))
	}
	return strings.Join(seen, " ")
}

// tosOf sends some packets with a TOS and tells with which ones they arrive.
func tosOf(t lab.Test, r route, receiver *net.UDPConn, port uint16, tos, packets int) string {
	t.Helper()
	if err := setOption(receiver, unix.IPPROTO_IP, unix.IP_RECVTOS, 1); err != nil {
		t.Fatal(err)
	}
	conn := mustDialUDP(t, r.from, netip.AddrPortFrom(r.to.ip, port), option(unix.IPPROTO_IP, unix.IP_TOS, tos))
	defer conn.Close()
	var seen []string
	buffer, control := make([]byte, 64), make([]byte, 128)
	for range packets {
		conn.Write([]byte{byte(tos)})
		receiver.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, n, _, _, err := receiver.ReadMsgUDP(buffer, control)
		arrived := "lost"
		if err == nil {
			arrived = tosIn(control[:n])
		}
		if !slices.Contains(seen, arrived) {
			seen = append(seen, arrived)
		}
	}
	return strings.Join(seen, "/")
}

func tosIn(control []byte) string {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 || len(messages[0].Data) < 1 {
		return "unknown"
	}
	return fmt.Sprintf("0x%02x", messages[0].Data[0])
}

func setOption(conn *net.UDPConn, level, name, value int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	failed := raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, name, value) })
	return errors.Join(failed, set)
}

// widePods pings from a pod whose devices take longer packets than the
// overlay: the node has to fragment or to say so.
func widePods(flags string) func(lab.Test, route) string {
	return func(t lab.Test, r route) string {
		wide := func(mtu int) {
			t.Run(r.from.node, fmt.Sprintf("ip link set veth1 mtu %d", mtu))
			t.Run(r.from.node, fmt.Sprintf("ip link set cni0 mtu %d", mtu))
			t.Run(r.from, fmt.Sprintf("ip link set eth0 mtu %d", mtu))
		}
		wide(1500)
		defer wide(1450)
		defer t.Run(r.from, "ip route flush cache")
		return pingSees(t, r, flags)
	}
}

// neighbourhood sends what is for the neighbourhood only.
func neighbourhood(t lab.Test, r route) string {
	underlay := r.underlay
	t.Run(underlay, "nft", `add table bridge watch { chain forward { type filter hook forward priority 0; udp dport 8472 counter; }; }`)
	defer t.Run(underlay, "nft delete table bridge watch")
	t.Run(r.from, "sh", "-c", fmt.Sprintf(`
		ping -n -b -c 2 -i 0.02 -W 0.1 255.255.255.255
		ping -n -b -c 2 -i 0.02 -W 0.1 %s
		ping -n -c 2 -i 0.02 -W 0.1 224.0.0.251
		ping -n -c 2 -i 0.02 -W 0.1 %s
		ping -n -c 2 -i 0.02 -W 0.1 ff02::fb%%eth0
		true`, lastOf(r.from.node.Prefix), r.from.node.Prefix.Addr().Next().Next().Next().Next()))
	time.Sleep(100 * time.Millisecond)
	m := regexp.MustCompile(`packets (\d+)`).FindStringSubmatch(t.Run(underlay, "nft list table bridge watch"))
	return m[1] + " frames on the underlay"
}

// lastOf is the last address of a prefix, its broadcast address.
func lastOf(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	a[3] = 255
	return netip.AddrFrom4(a)
}

// clusterIP makes a service in front of a place, on the sender's node.
func clusterIP(t lab.Test, r route, proto string, port uint16) netip.AddrPort {
	t.Helper()
	number := services.Add(1)
	service := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(number)}), 80)
	if err := r.from.node.AddService(t.Context(), proto, service, netip.AddrPortFrom(r.to.ip, port)); err != nil {
		t.Fatal(err)
	}
	return service
}

// services numbers the services of all labs.
var services atomic.Uint32

func clusterIPTCP(t lab.Test, r route) string {
	l, port := mustListenTCP(t, r.to)
	return transferTCP(r.from, l, clusterIP(t, r, "tcp", port), 4<<20)
}

func clusterIPUDP(t lab.Test, r route) string {
	service := clusterIP(t, r, "udp", mustEchoUDP(t, r.to))
	return askUDP(mustDialUDP(t, r.from, service), 20, 500)
}
