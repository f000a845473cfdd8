//go:build linux

package ebpf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// Two nodes with an IPv6 overlay beside the IPv4 one, as flannel sets it up, and
// with programs on both.
//
//	node a                                       node b (blue)
//	flannel-v6.1  fd00:10:244:1::/128            flannel-v6.1  fd00:10:244:2::/128
//	eth0          2001:db8::11/64 ────────────── eth0          2001:db8::12/64
type wired6 struct{ a, b *node }

const (
	ourVTEP6  = "fd00:10:244:1::"
	blueVTEP6 = "fd00:10:244:2::"
)

func newWired6(t *testing.T) wired6 {
	t.Helper()
	pair := newWired(t)
	setUp := func(ns *netns.NS, ip, mac, vtep, peerIP, peerMAC, peerVTEP string, peer state.Peer) *node {
		ns.Run(t, "sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.all.forwarding=1")
		makeOverlay6(t, ns, ip, mac)
		ns.Run(
			t,
			"ip addr add "+vtep+"/128 dev flannel-v6.1 nodad",
			"ip neigh add "+peerVTEP+" lladdr "+peerMAC+" dev flannel-v6.1 nud permanent",
			"bridge fdb append "+peerMAC+" dev flannel-v6.1 dst "+peerIP,
			"ip route add "+peerVTEP+"/64 via "+peerVTEP+" dev flannel-v6.1 onlink",
		)
		n := &node{NS: ns, tb: t}
		n.MustDo(t, func() (err error) {
			n.overlay6 = uint32(interfaceIndex("flannel-v6.1"))
			n.accel, err = Open(Options{PinDir: filepath.Join(mustBPFFS(t), "weft"), MaxPeers: 16, VNI: 1, Port: 8472, IPv6: true, NoIPv4: true})
			return err
		})
		t.Cleanup(func() { n.accel.Close() })
		n.desired = Desired{Overlay6: int(n.overlay6), Peers: []state.Peer{peer}}
		n.sync()
		return n
	}
	w := wired6{
		a: setUp(pair.NS, ourIP6, ourMAC6, ourVTEP6, blueIP6, blueMAC6, blueVTEP6, peer6("b", "fd00:10:244:2::/64", blueIP6, blueMAC6)),
		b: setUp(pair.b, blueIP6, blueMAC6, blueVTEP6, ourIP6, ourMAC6, ourVTEP6, peer6("a", "fd00:10:244:1::/64", ourIP6, ourMAC6)),
	}
	for range 100 { // an address may not be usable at once
		if _, err := w.a.Try("ping -6 -c1 -W1 -q " + blueVTEP6); err == nil {
			return w
		}
	}
	t.Fatal("the nodes do not reach each other")
	return w
}

// counted is what a node has counted of its only peer.
func counted(t *testing.T, n *node) PathCounters {
	t.Helper()
	peers, err := n.accel.View().Peers()
	if err != nil || len(peers) != 1 {
		t.Fatalf("peers %+v, %v", peers, err)
	}
	for i, c := range peers[0].Paths {
		if i != int(weftPacketPathPATH_KERNEL) && c != (PathCounters{}) {
			t.Errorf("the path %s has counted %+v", PathNames[i], c)
		}
	}
	return peers[0].Paths[weftPacketPathPATH_KERNEL]
}

// What one node counts as sent the other counts as received, and as much as the
// packets on the wire carry: aggregates, fragments and single packets.
func TestIPv6IsCountedAsOnTheWire(t *testing.T) {
	for name, settings := range map[string][]string{
		"aggregates cross whole": {"ethtool -K eth0 tx on"},
		"packets cross alone":    {"ethtool -K eth0 tx on", "ethtool -K eth0 tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off tso off gso off gro off"},
		"and are merged":         {"ethtool -K eth0 tx on", "ethtool -K eth0 tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off tso off gso off gro on"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWired6(t)
			for _, n := range []*node{w.a, w.b} {
				n.Run(t, settings...)
				n.Run(
					t,
					"nft add table ip6 wire",
					"nft add counter ip6 wire came",
					"nft add chain ip6 wire input { type filter hook input priority -400 ; }",
					"nft add rule ip6 wire input udp dport 8472 counter name came",
				)
			}
			for what, load := range map[string]func(){
				"TCP": func() { w.transfer(t, 3<<20) },
				"UDP, some in fragments": func() {
					for _, size := range []int{0, 1, 100, 1300, 5000, 20000} {
						w.datagrams(t, size, 0)
					}
				},
				"UDP in aggregates": func() { w.datagrams(t, 12345, 1000) },
				"pings": func() {
					w.a.Run(t, "ping -6 -c 20 -i 0.002 -q "+blueVTEP6, "ping -6 -c 3 -s 4000 -i 0.002 -q "+blueVTEP6)
				},
				"from the node": func() { w.a.Run(t, "ping -6 -c 5 -i 0.002 -q -I "+ourIP6+" "+blueVTEP6) },
			} {
				a, b, cameA, cameB := counted(t, w.a), counted(t, w.b), w.a.came(t), w.b.came(t)
				load()
				time.Sleep(100 * time.Millisecond) // the last answers are under way
				a, b = a.to(counted(t, w.a)), b.to(counted(t, w.b))
				if a.TxPackets != b.RxPackets || a.TxBytes != b.RxBytes || b.TxPackets != a.RxPackets || b.TxBytes != a.RxBytes {
					t.Errorf("%s: a counted %+v, b counted %+v", what, a, b)
				}
				if a.TxPackets < 5 || what != "from the node" && b.TxPackets < 5 {
					t.Errorf("%s: there was no traffic: %+v", what, a)
				}
				if name != "packets cross alone" {
					continue
				}
				cameA, cameB = w.a.came(t).since(cameA), w.b.came(t).since(cameB)
				if cameA != (load6{a.RxPackets, a.RxBytes}) || cameB != (load6{b.RxPackets, b.RxBytes}) {
					t.Errorf("%s: a counted %+v, b counted %+v, but on the wire came %+v and %+v", what, a, b, cameA, cameB)
				}
			}
		})
	}
}

// to is what was counted since c.
func (c PathCounters) to(now PathCounters) PathCounters {
	return PathCounters{now.TxPackets - c.TxPackets, now.TxBytes - c.TxBytes, now.RxPackets - c.RxPackets, now.RxBytes - c.RxBytes}
}

// load6 is what VXLAN packets over IPv6 carried, in inner IP bytes.
type load6 struct{ packets, bytes uint64 }

func (l load6) since(before load6) load6 {
	return load6{l.packets - before.packets, l.bytes - before.bytes}
}

// came is what came in, as netfilter saw the outer packets.
func (n *node) came(t *testing.T) load6 {
	t.Helper()
	var answer struct {
		Nftables []struct {
			Counter *struct{ Packets, Bytes uint64 }
		}
	}
	if err := json.Unmarshal([]byte(n.Run(t, "nft -j list counter ip6 wire came")), &answer); err != nil {
		t.Fatal(err)
	}
	for _, entry := range answer.Nftables {
		if c := entry.Counter; c != nil {
			return load6{c.Packets, c.Bytes - c.Packets*(40+8+8+14)}
		}
	}
	t.Fatal("nft knows no counter")
	return load6{}
}

// transfer sends so many bytes from a to b by TCP, and waits until the connection
// is closed.
func (w wired6) transfer(t *testing.T, size int) {
	t.Helper()
	var listener net.Listener
	w.b.MustDo(t, func() (err error) {
		listener, err = net.Listen("tcp6", "["+blueVTEP6+"]:0")
		return err
	})
	defer listener.Close()
	received := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			received <- err
			return
		}
		n, err := io.Copy(io.Discard, conn)
		if err == nil && n != int64(size) {
			err = fmt.Errorf("%d bytes arrived of %d", n, size)
		}
		conn.Close()
		received <- err
	}()
	var conn net.Conn
	w.a.MustDo(t, func() (err error) {
		conn, err = net.Dial("tcp6", listener.Addr().String())
		return err
	})
	if _, err := io.Copy(conn, bytes.NewReader(make([]byte, size))); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := <-received; err != nil {
		t.Fatal(err)
	}
}

// datagrams sends ten datagrams from a to b, each split by the kernel to segments
// if it shall, and as many answers.
func (w wired6) datagrams(t *testing.T, size, segment int) {
	t.Helper()
	open := func(n *node, ip string) *net.UDPConn {
		var conn net.PacketConn
		n.MustDo(t, func() (err error) {
			conn, err = net.ListenPacket("udp6", "["+ip+"]:0")
			return err
		})
		t.Cleanup(func() { conn.Close() })
		return conn.(*net.UDPConn)
	}
	from, to := open(w.a, ourVTEP6), open(w.b, blueVTEP6)
	pieces := 1
	if segment > 0 {
		pieces = (size + segment - 1) / segment
		for _, conn := range []*net.UDPConn{from, to} {
			raw, err := conn.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := raw.Control(func(fd uintptr) {
				if err := unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, segment); err != nil {
					t.Error(err)
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	buffer := make([]byte, 1<<16)
	send := func(from, to *net.UDPConn) {
		t.Helper()
		if _, err := from.WriteTo(make([]byte, size), to.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		for range pieces {
			if err := to.SetReadDeadline(time.Now().Add(soon)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := to.ReadFrom(buffer); err != nil {
				t.Fatalf("a datagram of %d bytes: %v", size, err)
			}
		}
	}
	for range 10 {
		send(from, to)
		send(to, from)
	}
}

// What no program run can bring: a tag, which takes a packet to another network,
// and a packet that is cut within its header.
func TestIPv6FramesOfAnotherKind(t *testing.T) {
	w := newWired6(t)
	wire, arrived := mustTap(t, w.b.NS, "flannel-v6.1"), mustTap(t, w.a.NS, "flannel-v6.1")
	plain := fromBlue6().udp(7, 8).payload(100).bytes(t)
	tagged := append(append(bytes.Clone(plain[:12]), 0x81, 0, 0, 5), plain[12:]...)
	for _, c := range []struct {
		name           string
		frame          []byte
		protocol       uint16
		sent, received uint64 // packets counted
		lost           bool
	}{
		{name: "as it should be", frame: plain, protocol: unix.ETH_P_IPV6, sent: 1, received: 1},
		{name: "tagged", frame: tagged, protocol: unix.ETH_P_8021Q},
		{name: "called something else", frame: plain, protocol: unix.ETH_P_IP, received: 1},
		{name: "cut", frame: plain[:53], protocol: unix.ETH_P_IPV6, lost: true},
	} {
		a, b := counted(t, w.a), counted(t, w.b)
		wire.sendAs(c.frame, c.protocol)
		// A tap sees no tag, and comes before the programs.
		if !c.lost && arrived.next(soon, func(f []byte) bool { return bytes.Equal(f, plain) }) == nil {
			t.Errorf("%s: it did not arrive", c.name)
		}
		time.Sleep(20 * time.Millisecond)
		a, b = a.to(counted(t, w.a)), b.to(counted(t, w.b))
		if b.TxPackets != c.sent || a.RxPackets != c.received || a.RxBytes != 148*c.received {
			t.Errorf("%s: sent %+v, received %+v; want %d packets and %d", c.name, b, a, c.sent, c.received)
		}
	}
}
