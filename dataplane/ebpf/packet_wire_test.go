//go:build linux

package ebpf

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// Two nodes and the wires between them, as flannel sets them up. The programs
// come to node a when the test says so; node b is blue of knownPeers, and a
// kernel that knows nothing of us.
//
//	node a                                         node b (blue)
//	flannel.1  10.244.1.0/32  0a:58:0a:f4:01:00    flannel.1  10.244.2.0/32  0a:58:0a:f4:02:00
//	eth0       192.0.2.11/24 ───────────────────── eth0       192.0.2.12/24
//	eth1       198.51.100.11/24 ────────────────── eth1       198.51.100.12/24
type wired struct {
	*node // a
	b     *netns.NS
	xdp   bool // packets are to be stripped in the driver
}

func newWired(t *testing.T) *wired {
	t.Helper()
	w := &wired{node: &node{NS: netns.New(t), tb: t}, b: netns.New(t)}
	for _, ns := range []*netns.NS{w.NS, w.b} {
		ns.Run(
			t,
			"sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1",
			"sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.lo.forwarding=1",
			"sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0",
			"ip link set lo up",
		)
	}
	netns.Cable(t, w.NS, "eth0", w.b, "eth0")
	netns.Connect(t, w.NS, "eth1", w.b, "eth1")
	setUp := func(ns *netns.NS, uplinkMAC, ip, side, mac, vtep, peerIP, peerMAC, peerVTEP, peerPrefix, prefix string) {
		ns.Run(
			t,
			"ip link set eth0 address "+uplinkMAC,
			"ip addr add "+ip+"/24 dev eth0",
			"ip addr add "+side+"/24 dev eth1",
			// Whole checksums on the wire, as a network card sends them.
			"ethtool -K eth0 tx off",
			"ethtool -K eth1 tx off",
			"ip link add flannel.1 address "+mac+" type vxlan id 1 local "+ip+" dev eth0 dstport 8472 nolearning udpcsum",
			"ip addr add "+vtep+"/32 dev flannel.1",
			"ip link set flannel.1 up",
			"ip neigh add "+peerVTEP+" lladdr "+peerMAC+" dev flannel.1 nud permanent",
			"bridge fdb append "+peerMAC+" dev flannel.1 dst "+peerIP,
			"ip route add "+peerPrefix+" via "+peerVTEP+" dev flannel.1 onlink",
			"ip route add blackhole "+prefix, // pods that are not there don't answer
		)
	}
	setUp(w.NS, uplinkMAC, ourIP, "198.51.100.11", ourMAC, "10.244.1.0", blueIP, blueMAC, "10.244.2.0", "10.244.2.0/24", "10.244.1.0/24")
	setUp(w.b, wireMAC, blueIP, "198.51.100.12", blueMAC, "10.244.2.0", ourIP, ourMAC, "10.244.1.0", "10.244.1.0/24", "10.244.2.0/24")
	w.NS.Run(t, "ping -c1 -W2 -q "+blueIP) // both neighbour tables know the other
	return w
}

// accelerate brings the programs to node a.
func (w *wired) accelerate(check string) {
	t := w.tb
	t.Helper()
	w.MustDo(t, func() (err error) {
		w.uplink, w.overlay = uint32(interfaceIndex("eth0")), uint32(interfaceIndex("flannel.1"))
		w.accel, err = Open(Options{PinDir: filepath.Join(mustBPFFS(t), "weft"), MaxPeers: 16, VNI: 1, Port: 8472, XDP: w.xdp})
		return err
	})
	t.Cleanup(func() { w.accel.Close() })
	w.desired = Desired{
		Uplink: int(w.uplink), Overlay: int(w.overlay),
		Local: addr(ourIP), MAC: [6]byte(mustMAC(ourMAC)), SourceCheck: check, Peers: knownPeers(),
	}
	w.sync()
	w.reset()
	switch why := w.accel.NoXDP(); {
	case strings.Contains(why, "no tcx link"):
		t.Skip("this kernel has no tcx links, without which nothing is stripped in a driver")
	case why != "":
		t.Fatalf("no XDP: %s", why)
	}
}

// stripped is how many packets the driver has stripped.
func (w *wired) stripped() uint64 {
	w.tb.Helper()
	x, err := w.accel.View().XDP()
	if err != nil {
		w.tb.Fatal(err)
	}
	return x.Stripped
}

// during returns what was counted while f ran.
func (w *wired) during(f func()) outcome {
	before := w.count()
	f()
	after := w.count()
	out := outcome{
		passed:  difference(after.passed, before.passed),
		dropped: difference(after.dropped, before.dropped),
		paths:   map[string]PathCounters{},
	}
	for key, now := range after.paths {
		was := before.paths[key]
		now.TxPackets -= was.TxPackets
		now.TxBytes -= was.TxBytes
		now.RxPackets -= was.RxPackets
		now.RxBytes -= was.RxBytes
		if now != (PathCounters{}) {
			out.paths[key] = now
		}
	}
	return out
}

// tap is a packet socket on a device.
type tap struct {
	tb    testing.TB
	fd    int
	index int
}

func htons(n uint16) uint16 { return n<<8 | n>>8 }

// mustTap sees all that comes in on a device of a namespace from now on, and
// can send raw frames there.
func mustTap(tb testing.TB, ns *netns.NS, device string) *tap {
	tb.Helper()
	p := &tap{tb: tb, fd: -1}
	ns.MustDo(tb, func() error {
		i, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		p.index = i.Index
		if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: i.Index})
	})
	tb.Cleanup(func() { unix.Close(p.fd) })
	return p
}

func (p *tap) send(frame []byte) {
	p.tb.Helper()
	p.sendAs(frame, unix.ETH_P_IP)
}

// sendAs is send of what the kernel is told to be of a protocol.
func (p *tap) sendAs(frame []byte, protocol uint16) {
	p.tb.Helper()
	if err := unix.Sendto(p.fd, frame, 0, &unix.SockaddrLinklayer{Protocol: htons(protocol), Ifindex: p.index, Halen: 6}); err != nil {
		p.tb.Fatalf("sending %d bytes: %v", len(frame), err)
	}
}

// next returns the next frame that comes in and that is wanted, nil if there is
// none for so long.
func (p *tap) next(wait time.Duration, wanted func([]byte) bool) []byte {
	p.tb.Helper()
	buffer := make([]byte, 1<<16)
	for deadline := time.Now().Add(wait); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return nil
		}
		tv := unix.NsecToTimeval(int64(max(left, time.Millisecond)))
		if err := unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			p.tb.Fatal(err)
		}
		n, from, err := unix.Recvfrom(p.fd, buffer, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			p.tb.Fatalf("receiving: %v", err)
		}
		if from.(*unix.SockaddrLinklayer).Pkttype != unix.PACKET_OUTGOING && wanted(buffer[:n]) {
			return append([]byte(nil), buffer[:n]...)
		}
	}
}

// isVXLAN tells VXLAN packets and later fragments of UDP.
func isVXLAN(frame []byte) bool {
	return len(frame) >= atVXLAN && frame[12] == 8 && frame[13] == 0 && frame[atIP+9] == 17 &&
		frame[atUDP+2] == 8472>>8 && frame[atUDP+3] == 8472&0xff
}

func isIPv4(frame []byte) bool { return len(frame) >= 34 && frame[12] == 8 && frame[13] == 0 }

func macOf(device string) [6]byte {
	i, err := net.InterfaceByName(device)
	if err != nil {
		panic(err)
	}
	return [6]byte(i.HardwareAddr)
}

// mustListen opens a UDP socket in a namespace and returns how to wait for the
// next datagram, nil if there is none for so long.
func mustListen(tb testing.TB, ns *netns.NS, address string) func(time.Duration) []byte {
	tb.Helper()
	var socket net.PacketConn
	ns.MustDo(tb, func() (err error) {
		socket, err = net.ListenPacket("udp4", address)
		return err
	})
	tb.Cleanup(func() { socket.Close() })
	return func(wait time.Duration) []byte {
		data := make([]byte, 1<<16)
		if err := socket.SetReadDeadline(time.Now().Add(wait)); err != nil {
			tb.Fatal(err)
		}
		n, _, err := socket.ReadFrom(data)
		if err != nil {
			return nil
		}
		return data[:n]
	}
}

// mustDial opens a UDP socket in a namespace that sends to one address.
func mustDial(tb testing.TB, ns *netns.NS, from, to string) (socket *net.UDPConn) {
	tb.Helper()
	ns.MustDo(tb, func() (err error) {
		local, err := net.ResolveUDPAddr("udp4", from)
		if err != nil {
			return err
		}
		remote, err := net.ResolveUDPAddr("udp4", to)
		if err != nil {
			return err
		}
		socket, err = net.DialUDP("udp4", local, remote)
		return err
	})
	tb.Cleanup(func() { socket.Close() })
	return socket
}
