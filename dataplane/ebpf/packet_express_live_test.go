//go:build linux

package ebpf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// Express with all that only a kernel at work has: checksums left open, GRO,
// conntrack that follows, and redirects that arrive.
//
//	pod 10.244.1.5 ── cali5 ─ node a ═══ node b (blue): 10.244.2.7
//	                          the services 10.96.0.10 are blue's
type liveNode struct {
	*wired
	pod  *netns.NS
	gate [6]byte // cali5's address, which the pod sends to
}

func newLive(t *testing.T, lines ...string) *liveNode {
	t.Helper()
	return newLiveAt(t, false, lines...)
}

// newLiveAt is newLive, with a program in the driver too if xdp says so.
func newLiveAt(t *testing.T, xdp bool, lines ...string) *liveNode {
	t.Helper()
	w := newWired(t)
	w.xdp = xdp
	l := &liveNode{wired: w, pod: netns.New(t)}
	netns.Connect(t, w.NS, "cali5", l.pod, "eth0")
	w.Run(
		t,
		"ip addr add 10.244.1.1/32 dev cali5", "ip route add 10.244.1.5/32 dev cali5",
		"ip link set flannel.1 mtu 1450", "ip link set cali5 mtu 1450",
		"nft add table ip live",
		"nft add chain ip live forward { type filter hook forward priority 0 ; }",
		"nft add rule ip live forward ct state established counter accept",
		"nft add chain ip live dstnat { type nat hook prerouting priority dstnat ; }",
		"nft add rule ip live dstnat ip daddr 10.96.0.10 dnat to "+bluePod,
		"sysctl -qw net.netfilter.nf_conntrack_tcp_be_liberal=1 net.netfilter.nf_conntrack_tcp_ignore_invalid_rst=1",
	)
	w.b.Run(t, "ip addr add "+bluePod+"/32 dev lo", "ip link set flannel.1 mtu 1450")
	l.pod.Run(
		t,
		"ip link set lo up",
		"sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
		"ip link set eth0 mtu 1450 address "+podMAC,
		"ip addr add 10.244.1.5/24 dev eth0", "ip route add default via 10.244.1.1",
		"ping -c1 -W2 -q 10.244.1.1",
	)
	for _, line := range lines {
		switch line[0] {
		case 'a':
			w.Run(t, line[2:])
		case 'b':
			w.b.Run(t, line[2:])
		case 'p':
			l.pod.Run(t, line[2:])
		}
	}
	w.accelerate("enforce")
	if why := w.accel.NoExpress(); why != "" {
		t.Skip("this kernel has no express: " + why)
	}
	var veth int
	w.MustDo(t, func() error { veth, l.gate = interfaceIndex("cali5"), macOf("cali5"); return nil })
	w.desired.OverlayMTU = 1450
	w.sync()
	w.express = &express{
		veth: uint32(veth),
		pods: []Pod{{IP: addr(ourPod), Veth: veth, MAC: [6]byte(mustMAC(podMAC)), Gateway: l.gate, MTU: 1450}},
	}
	w.MustDo(t, func() (err error) {
		if w.heart, err = w.accel.Heartbeat(); err != nil {
			return err
		}
		failed, err := w.accel.SyncPods(w.pods, []netip.Addr{addr(ourIP), addr("10.244.1.0"), addr("10.244.1.1")})
		if len(failed) > 0 {
			err = fmt.Errorf("pods are not served: %v", failed)
		}
		return err
	})
	t.Cleanup(func() { w.heart.Close() })
	l.beats()
	return l
}

// beats keeps the heart beating until the test ends.
func (l *liveNode) beats() {
	stop, stopped := make(chan struct{}), make(chan struct{})
	beat := func() {
		if err := l.heart.Beat(Pulse{Epoch: epoch}); err != nil {
			l.tb.Error(err)
		}
	}
	beat()
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Millisecond):
				beat()
			}
		}
	}()
	l.tb.Cleanup(func() { close(stop); <-stopped })
}

// dial connects the pod to an address; the other end is accepted at node b.
func (l *liveNode) dial(to, listen string) (client, server net.Conn) {
	t := l.tb
	t.Helper()
	var listener net.Listener
	l.b.MustDo(t, func() (err error) {
		listener, err = net.Listen("tcp4", listen)
		return err
	})
	defer listener.Close()
	l.pod.MustDo(t, func() (err error) {
		client, err = (&net.Dialer{Timeout: soon}).Dial("tcp4", to)
		return err
	})
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// pingPong sends small messages there and back.
func pingPong(client, server net.Conn, rounds, size int) error {
	for i := range rounds {
		data := bytes.Repeat([]byte{byte(i + 1)}, size+i)
		if err := exchange(client, server, data); err != nil {
			return err
		}
		if err := exchange(server, client, data); err != nil {
			return err
		}
	}
	return nil
}

// liveSettings are what is done by whom: checksums on the way out, merging on
// the way in.
var liveSettings = map[string][]string{
	"as devices are":           nil,
	"checksums open":           {"a ethtool -K eth0 tx on", "b ethtool -K eth0 tx on"},
	"checksums whole":          {"p ethtool -K eth0 tx off", "a ethtool -K cali5 tx off"},
	"GRO on the uplink":        {"a ethtool -K eth0 gro on"},
	"no GRO anywhere":          {"a ethtool -K eth0 gro off", "a ethtool -K flannel.1 gro off"},
	"outer checksums open":     {"b ethtool -K eth0 tx on", "b ethtool -K flannel.1 tx off"},
	"no received checksums":    {"a ethtool -K eth0 rx off", "p ethtool -K eth0 rx off"},
	"no segmentation offloads": {"p ethtool -K eth0 tso off gso off", "b ethtool -K flannel.1 tso off gso off"},
}

func TestConnectionsByExpress(t *testing.T) {
	for name, lines := range liveSettings {
		for to, listen := range map[string]string{bluePod + ":7000": bluePod + ":7000", "10.96.0.10:7000": bluePod + ":7000"} {
			t.Run(name+", to "+to, func(t *testing.T) {
				l := newLive(t, lines...)
				client, server := l.dial(to, listen)
				if err := pingPong(client, server, 20, 1); err != nil { // until it is witnessed
					t.Fatal(err)
				}
				l.reset0()
				got := l.during(func() {
					if err := pingPong(client, server, 50, 10); err != nil {
						t.Error(err)
					}
				})
				p := got.paths[blueIP+" express"]
				if p.TxPackets < 40 || p.RxPackets < 40 {
					t.Errorf("by express went %+v (all paths %v, passed %v)", p, got.paths, got.passed)
				}
				if len(got.dropped) != 0 {
					t.Errorf("dropped %v", got.dropped)
				}
				// Both ways in bulk, whatever road the packets take.
				for _, size := range []int{1000, 1398, 1399, 30_000, 1_000_000} {
					data := bytes.Repeat([]byte("0123456789"), size/10+1)[:size]
					for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
						if err := exchange(way[0], way[1], data); err != nil {
							t.Errorf("%d bytes: %v", size, err)
						}
					}
				}
				if err := pingPong(client, server, 5, 100); err != nil {
					t.Error(err)
				}
				// Conntrack sees the end, whatever it has not seen before.
				client.Close()
				server.Close()
				if state := l.tcpStateSoon(tcpTimeWait, tcpClose, tcpLastAck); !slices.Contains([]uint8{tcpTimeWait, tcpClose}, state) {
					t.Errorf("conntrack's state is %d after the end", state)
				}
			})
		}
	}
}

// reset0 makes the peer freshly proven.
func (l *liveNode) reset0() {
	l.tb.Helper()
	l.peerState(blueIP, func(s *weftPeerState) { *s = weftPeerState{RxProven: coarseNow(), TxProven: coarseNow()} })
	time.Sleep(30 * time.Millisecond) // no aggregate is remembered any more
}

// tcpStateSoon waits until the one TCP entry is in one of the first states
// wanted, and returns its state.
func (l *liveNode) tcpStateSoon(wanted ...uint8) (state uint8) {
	l.tb.Helper()
	for end := time.Now().Add(soon); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		for flow, e := range l.entries() {
			if info, ok := e.ProtoInfo.(*netlink.ProtoInfoTCP); ok && flow.Protocol == unix.IPPROTO_TCP {
				state = info.State
			}
		}
		if slices.Contains(wanted[:2], state) {
			return state
		}
	}
	return state
}

// packets sends one datagram each way, some times.
func (l *liveNode) packets(rounds int, client net.Conn, server net.PacketConn) error {
	buffer := make([]byte, 2000)
	for i := range rounds {
		data := bytes.Repeat([]byte{byte(i + 1)}, 100+i)
		if _, err := client.Write(data); err != nil {
			return err
		}
		deadline := time.Now().Add(soon)
		if err := errors.Join(server.SetDeadline(deadline), client.SetDeadline(deadline)); err != nil {
			return err
		}
		n, from, err := server.ReadFrom(buffer)
		if err != nil || !bytes.Equal(buffer[:n], data) {
			return fmt.Errorf("packet %d came as %x: %w", i, buffer[:n], err)
		}
		if _, err := server.WriteTo(data, from); err != nil {
			return err
		}
		if n, err = client.Read(buffer); err != nil || !bytes.Equal(buffer[:n], data) {
			return fmt.Errorf("answer %d came as %x: %w", i, buffer[:n], err)
		}
	}
	return nil
}

// datagrams opens sockets at both ends; without makes them leave out checksums.
func (l *liveNode) datagrams(to string, without bool) (client net.Conn, server net.PacketConn) {
	t := l.tb
	t.Helper()
	control := func(_, _ string, c syscall.RawConn) (err error) {
		if without {
			if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1) }); e != nil {
				return e
			}
		}
		return err
	}
	l.b.MustDo(t, func() (err error) {
		server, err = (&net.ListenConfig{Control: control}).ListenPacket(context.Background(), "udp4", bluePod+":7000")
		return err
	})
	l.pod.MustDo(t, func() (err error) {
		client, err = (&net.Dialer{Control: control}).Dial("udp4", to)
		return err
	})
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestDatagramsByExpress(t *testing.T) {
	for name, lines := range liveSettings {
		for _, to := range []string{bluePod + ":7000", "10.96.0.10:7000"} {
			for _, without := range []bool{false, true} {
				if without && lines != nil && name != "outer checksums open" {
					continue // the others say nothing about packets without
				}
				what := map[bool]string{false: "", true: ", without checksums"}[without]
				t.Run(name+", to "+to+what, func(t *testing.T) {
					l := newLive(t, lines...)
					client, server := l.datagrams(to, without)
					if err := l.packets(3, client, server); err != nil {
						t.Fatal(err)
					}
					f := flow{protocol: unix.IPPROTO_UDP, from: client.LocalAddr().String(), to: to}
					l.entry(f, withStatus(ipsConfirmed|ipsSeenReply|ipsAssured)) // as after two seconds
					if err := l.packets(newcomer+4, client, server); err != nil {
						t.Fatal(err)
					}
					l.reset0()
					wire := mustTap(t, l.b, "eth0")
					var frame []byte
					got := l.during(func() {
						if err := l.packets(20, client, server); err != nil {
							t.Error(err)
						}
						frame = wire.next(soon, isVXLAN)
					})
					p := got.paths[blueIP+" express"]
					if without && to != bluePod+":7000" {
						if p != (PathCounters{}) || got.passed["flow_special"] < 20 {
							t.Errorf("by express went %+v (passed %v)", p, got.passed)
						}
						return
					}
					// An outer checksum over no inner one is the kernel's to verify.
					if p.TxPackets < 18 || !without && p.RxPackets < 18 {
						t.Errorf("by express went %+v (all paths %v, passed %v)", p, got.paths, got.passed)
					}
					if zero := frame != nil && frame[atInnerIP+26] == 0 && frame[atInnerIP+27] == 0; zero != without {
						t.Errorf("on the wire the checksum is zero: %v (%x)", zero, frame)
					}
					if len(got.dropped) != 0 {
						t.Errorf("dropped %v", got.dropped)
					}
				})
			}
		}
	}
}

// A flow that conntrack comes to call assured needs new witnesses, of both directions:
// the next packet brings them, however new the old ones are.
func TestDatagramsThatBecomeAssured(t *testing.T) {
	l := newLive(t)
	client, server := l.datagrams(bluePod+":7000", false)
	if err := l.packets(newcomer+6, client, server); err != nil {
		t.Fatal(err)
	}
	l.reset0()
	got := l.during(func() {
		l.entry(flow{protocol: unix.IPPROTO_UDP, from: client.LocalAddr().String(), to: bluePod + ":7000"},
			withStatus(ipsConfirmed|ipsSeenReply|ipsAssured)) // as after two seconds
		if err := l.packets(20, client, server); err != nil {
			t.Error(err)
		}
	})
	if p := got.paths[blueIP+" express"]; p.TxPackets < 18 || p.RxPackets < 18 || got.passed["witness_stale"] != 2 {
		t.Errorf("by express went %+v (all paths %v, passed %v)", p, got.paths, got.passed)
	}
}

// A network card's checksum over the whole packet, and a tap in the pod: what
// arrives there.
func TestWhatThePodSees(t *testing.T) {
	l := newLive(t)
	client, server := l.dial(bluePod+":7000", bluePod+":7000")
	if err := pingPong(client, server, 20, 1); err != nil {
		t.Fatal(err)
	}
	l.reset0()
	inside := mustTap(t, l.pod, "eth0")
	var frame []byte
	got := l.during(func() {
		if err := exchange(server, client, []byte("weft")); err != nil {
			t.Error(err)
		}
		frame = inside.next(soon, func(f []byte) bool { return isIPv4(f) && bytes.HasSuffix(f, []byte("weft")) })
	})
	if got.paths[blueIP+" express"].RxPackets == 0 {
		t.Fatalf("paths %v, passed %v", got.paths, got.passed)
	}
	if frame == nil || !bytes.Equal(frame[:6], mustMAC(podMAC)) || !bytes.Equal(frame[6:12], l.gate[:]) || frame[atIP+8] != 63 ||
		onesSum(frame[atIP:atIP+20]) != 0xffff {
		t.Errorf("the pod got %x", frame)
	}
}

// A rule that is added takes effect with the next epoch, and within the life of
// a witness without.
func TestRuleThatIsAddedLater(t *testing.T) {
	for name, moved := range map[string]bool{"the epoch moves": true, "nobody notices": false} {
		t.Run(name, func(t *testing.T) {
			l := newLive(t)
			client, server := l.dial(bluePod+":7000", bluePod+":7000")
			if err := pingPong(client, server, 20, 1); err != nil {
				t.Fatal(err)
			}
			l.Run(t, "nft insert rule ip live forward tcp dport 7000 drop", "nft insert rule ip live forward tcp sport 7000 drop")
			started := time.Now()
			if moved {
				// Witnesses of before are of another epoch.
				all, err := readAll[weftFlow, weftWitness](l.accel.objects.Witnesses)
				if err != nil || len(all) < 2 {
					t.Fatalf("%d witnesses: %v", len(all), err)
				}
				for f, w := range all {
					w.Epoch--
					l.put(l.accel.objects.Witnesses, f, w)
				}
			}
			for time.Since(started) < 8*time.Second {
				client.SetDeadline(time.Now().Add(300 * time.Millisecond))
				server.SetDeadline(time.Now().Add(300 * time.Millisecond))
				if _, err := client.Write([]byte("x")); err != nil {
					break
				}
				if _, err := server.Read(make([]byte, 100)); err != nil {
					break
				}
			}
			took := time.Since(started)
			if moved && took > time.Second || took > 6*time.Second {
				t.Errorf("packets went past the rule for %v", took)
			}
		})
	}
}

// A tag takes a pod's packet to another network, and so never by express. A tag
// of VLAN 0 is none to the kernel: it must not hide an injection.
func TestTaggedPacketsOfPods(t *testing.T) {
	l := newLive(t)
	client, server := l.datagrams(bluePod+":7000", false)
	if err := l.packets(3, client, server); err != nil {
		t.Fatal(err)
	}
	f := flow{protocol: unix.IPPROTO_UDP, from: client.LocalAddr().String(), to: bluePod + ":7000"}
	l.entry(f, withStatus(ipsConfirmed|ipsSeenReply|ipsAssured))
	if err := l.packets(newcomer+4, client, server); err != nil {
		t.Fatal(err)
	}
	gate := net.HardwareAddr(l.gate[:]).String()
	wire, overlay := mustTap(t, l.pod, "eth0"), mustTap(t, l.NS, "flannel.1")
	tagged := func(frame []byte, id byte) []byte {
		return slices.Concat(frame[:12], []byte{0x81, 0, 0, id}, frame[12:])
	}
	for id := range byte(2) {
		l.reset0()
		got := l.during(func() {
			wire.send(tagged(f.packet(podMAC, gate, 100).bytes(t), id))
			time.Sleep(20 * time.Millisecond)
		})
		if got.paths[blueIP+" express"] != (PathCounters{}) {
			t.Errorf("of VLAN %d: went by express (%v)", id, got.paths)
		}
	}
	inner := eth(blueMAC, ourMAC).ip(bluePod, "10.244.1.99").udp(1, 2).payload(99)
	for id := range byte(2) {
		got := l.during(func() {
			wire.send(tagged(eth(podMAC, gate).ip(ourPod, ourIP).udp(40000, 8472).vxlan(1).around(inner).bytes(t), id))
			if frame := overlay.next(never, isIPv4); frame != nil {
				t.Errorf("of VLAN %d: came out of the overlay: %x", id, frame)
			}
		})
		if got.dropped["pod_vxlan_injection"] != 1 {
			t.Errorf("of VLAN %d: dropped %v", id, got.dropped)
		}
	}
}
