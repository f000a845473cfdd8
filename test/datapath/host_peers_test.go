//go:build linux

package datapath_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// mustEcho serves TCP connections of a pod, sending back what comes.
func mustEcho(tb testing.TB, p *lab.Pod, port uint16) {
	tb.Helper()
	var listener net.Listener
	err := p.Do(func() (err error) {
		listener, err = net.ListenTCP("tcp4", &net.TCPAddr{Port: int(port)})
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { listener.Close() })
	go echoConnections(listener)
}

// echoConnections sends back what comes, until the listener is closed.
func echoConnections(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn) // the client sees what is missing
		}()
	}
}

// mustTalk makes small requests over one connection, and then sends more than
// any queue holds, both answered.
func mustTalk(tb testing.TB, from *lab.Pod, to netip.AddrPort) {
	tb.Helper()
	conn, err := from.Dial("tcp4", to.String())
	if err != nil {
		tb.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		tb.Fatal(err)
	}
	request := make([]byte, 200)
	for range 100 {
		if _, err := conn.Write(request); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.ReadFull(conn, request); err != nil {
			tb.Fatalf("%s to %s: a small answer: %v", from, to, err)
		}
	}
	const bulk = 20 << 20
	go func() { _, _ = io.CopyN(conn, zeros{}, bulk) }() // what is missing is missed below
	began := time.Now()
	if _, err := io.CopyN(io.Discard, conn, bulk); err != nil {
		tb.Fatalf("%s to %s: a long answer: %v", from, to, err)
	}
	// A connection that lives on retransmissions alone needs far longer.
	if took := time.Since(began); took > 20*time.Second {
		tb.Errorf("%s to %s: 20 MB there and back took %s", from, to, took)
	}
}

// zeros reads as many zeros as one likes.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// A stock peer with checksum offload off on flannel.1, as flannel's own advice
// against broken network cards has it, sends outer checksums that are still to
// be filled in. Pods and ClusterIPs are reached, both ways.
func TestPeerWithoutChecksumOffload(t *testing.T) {
	for _, underlay := range []lab.Underlay{lab.Virtual, lab.Wire} {
		t.Run(string(underlay), func(t *testing.T) {
			t.Parallel()
			lt, l := newLab(t, lab.Options{Kinds: []lab.Kind{lab.Weft, lab.Kernel}, Netfilter: true, Underlay: underlay})
			n1, n2 := l.Node(1), l.Node(2)
			lt.Run(n2, "ethtool -K flannel.1 tx off")
			mustUseBase(t, l.Pod(1, 1), l.Pod(2, 1))
			lt.Run(n1, "weft accel off express") // TestMixedNodes has it on
			before := mustPath(t, n1, n2, "base")
			for _, way := range [][2]*lab.Pod{{l.Pod(1, 1), l.Pod(2, 1)}, {l.Pod(2, 1), l.Pod(1, 1)}} {
				from, to := way[0], way[1]
				mustEcho(t, to, 7000)
				mustTalk(t, from, netip.AddrPortFrom(to.IP, 7000))
				service := netip.AddrPortFrom(netip.MustParseAddr("10.96.0.10"), 80)
				if err := from.Node.AddService(t.Context(), "tcp", service, netip.AddrPortFrom(to.IP, 7000)); err != nil {
					t.Fatal(err)
				}
				mustTalk(t, from, service)
			}
			after := mustPath(t, n1, n2, "base")
			if after.TxPackets-before.TxPackets < 200 || after.RxPackets-before.RxPackets < 200 {
				t.Errorf("the base path carried %d packets out and %d in", after.TxPackets-before.TxPackets, after.RxPackets-before.RxPackets)
			}
		})
	}
}

// Pods build a VXLAN tunnel of their own between them, also on the port that
// the nodes use.
func TestTunnelBetweenPods(t *testing.T) {
	for _, port := range []int{4789, 8472} {
		for _, underlay := range []lab.Underlay{lab.Virtual, lab.Wire} {
			t.Run(fmt.Sprintf("port %d %s", port, underlay), func(t *testing.T) {
				t.Parallel()
				lt, l := newLab(t, lab.Options{Underlay: underlay})
				a, b := l.Pod(1, 1), l.Pod(2, 1)
				mustUseBase(t, a, b)
				for i, end := range [][2]*lab.Pod{{a, b}, {b, a}} {
					lt.Run(end[0], fmt.Sprintf("ip link add vx0 mtu 1400 type vxlan id 42 local %s remote %s dstport %d", end[0].IP, end[1].IP, port))
					lt.Run(end[0], fmt.Sprintf("ip address add 10.99.0.%d/24 dev vx0", i+1))
					lt.Run(end[0], "ip link set vx0 up")
				}
				lt.Eventually(3*time.Second, func() error { return pings(t, a, netip.MustParseAddr("10.99.0.2")) })
				before := baseOf(t, l.Node(1)) + baseOf(t, l.Node(2))
				sent, _ := mustReason(t, l.Node(1), "encap_refused")
				for _, size := range []string{"16", "1300", "4000"} {
					if err := pings(t, a, netip.MustParseAddr("10.99.0.2"), "-s", size); err != nil {
						t.Error(err)
					}
				}
				mustEcho(t, b, 7000)
				mustTalk(t, a, netip.MustParseAddrPort("10.99.0.2:7000"))
				base := baseOf(t, l.Node(1)) + baseOf(t, l.Node(2)) - before
				refused, _ := mustReason(t, l.Node(1), "encap_refused")
				if base < 20 && refused-sent < 20 {
					t.Errorf("the base path carried %d packets and %d were refused: nobody looked at them", base, refused-sent)
				}
				t.Logf("base path %d, encap refused %d", base, refused-sent)
				mustUseBase(t, a, b)
			})
		}
	}
}

// The pods of one node have a smaller MTU than the overlay, as after a change
// of the CNI configuration: whoever sends too much is told, as by a plain
// kernel node.
func TestPodsWithSmallerMTU(t *testing.T) {
	t.Parallel()
	outcomes := map[lab.Kind]string{}
	for _, kind := range []lab.Kind{lab.Kernel, lab.Weft} {
		t.Run(string(kind), func(t *testing.T) {
			lt, l := newLab(t, lab.Options{Kinds: []lab.Kind{kind}, Netfilter: true})
			a, b := l.Pod(1, 1), l.Pod(2, 1)
			lt.Run(b, "ip link set eth0 mtu 1300")
			lt.Run(l.Node(2), "ip link set "+b.Veth+" mtu 1300")
			lt.Run(l.Node(2), "ip link set cni0 mtu 1300")
			if kind == lab.Weft {
				mustUseBase(t, a, b)
			}
			var outcome []string
			ask := func(from, to *lab.Pod, words ...string) {
				out, err := from.Output(t.Context(), append(append([]string{"ping", "-n", "-c", "2", "-i", "0.2", "-W", "1"}, words...), to.IP.String())...)
				result := "answered"
				switch {
				case strings.Contains(out, "Frag needed") || strings.Contains(out, "too long"):
					result = "told that it is too long"
				case err != nil:
					result = "no answer"
				}
				outcome = append(outcome, fmt.Sprintf("%s %s: %s", from, strings.Join(words, " "), result))
			}
			for _, way := range [][2]*lab.Pod{{a, b}, {b, a}} {
				for _, size := range []string{"1272", "1273", "1400", "1422"} {
					ask(way[0], way[1], "-M", "dont", "-s", size)
					ask(way[0], way[1], "-M", "do", "-s", size)
					lt.Run(way[0], "ip route flush cache")
				}
				ask(way[0], way[1], "-M", "dont", "-s", "5000")
			}
			mustEcho(t, b, 7000)
			mustTalk(t, a, netip.AddrPortFrom(b.IP, 7000))
			mustEcho(t, a, 7000)
			mustTalk(t, b, netip.AddrPortFrom(a.IP, 7000))
			outcomes[kind] = strings.Join(outcome, "\n")
		})
	}
	if outcomes[lab.Kernel] != outcomes[lab.Weft] {
		t.Errorf("plain kernel nodes:\n%s\nweft nodes:\n%s", outcomes[lab.Kernel], outcomes[lab.Weft])
	}
}

// The host has a routing rule by mark: marked packets leave by the second
// uplink, whoever marked them, and also when the rule comes after the agent was
// killed.
func TestRoutingRuleByMark(t *testing.T) {
	t.Parallel()
	outcomes := map[string]string{}
	for _, node := range hostNodes {
		t.Run(node.name, func(t *testing.T) {
			lt, l := newLab(t, lab.Options{Kinds: []lab.Kind{node.kind, lab.Kernel}, Pods: 2})
			n1, n2, p := l.Node(1), l.Node(2), l.Pod(2, 1)
			mustAddUplinks(t, l)
			if node.kind == lab.Weft {
				mustUseBase(t, l.Pod(1, 1), p)
			}
			if node.killed {
				if err := n1.StopAgent(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			lt.Run(n1, "ip route add 192.0.2.12 via 198.51.100.12 dev eth1 table 100")
			lt.Run(n1, "ip rule add fwmark 7 table 100")
			lt.Run(n1, fmt.Sprintf("iptables-nft -w -t mangle -A PREROUTING -s %s -j MARK --set-mark 7", l.Pod(1, 2).IP))
			time.Sleep(300 * time.Millisecond)
			taps := map[string]*wireTap{"eth0": mustTapWire(t, l, "n1"), "eth1": mustTapWire(t, l, "n1b")}
			var outcome []string
			for _, sender := range []struct {
				name string
				from lab.Runner
				word []string
			}{
				{"pod without mark", l.Pod(1, 1), nil},
				{"pod that is marked", l.Pod(1, 2), nil},
				{"host without mark", n1, nil},
				{"host with SO_MARK", n1, []string{"-m", "7"}},
				{"host with another mark", n1, []string{"-m", "9"}},
			} {
				if node.kind == lab.Weft {
					mustUseBase(t, l.Pod(1, 1), p)
				}
				begun := time.Now()
				if err := pings(t, sender.from, p.IP, sender.word...); err != nil {
					t.Errorf("%s: %v", sender.name, err)
				}
				// Others' packets, ARP and the like are not VXLAN to n2.
				var leaves []string
				for _, device := range []string{"eth0", "eth1"} {
					if len(taps[device].between(n2.IP, begun, time.Now())) > 0 {
						leaves = append(leaves, device)
					}
				}
				outcome = append(outcome, sender.name+" leaves by "+strings.Join(leaves, " and "))
			}
			outcomes[node.name] = strings.Join(outcome, "\n")
		})
	}
	for _, node := range hostNodes[1:] {
		t.Run(node.name+" as a plain kernel node", func(t *testing.T) {
			if plain := outcomes["plain kernel"]; outcomes[node.name] != plain {
				t.Errorf("a plain kernel node:\n%s\nthis node:\n%s", plain, outcomes[node.name])
			}
		})
	}
}
