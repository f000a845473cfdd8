//go:build linux

package ebpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
)

// The same packets through the kernel's device alone and through our programs:
// what is on the wire, and what comes out at the other end, may differ in
// nothing but the outer IP ID and the outer UDP checksum, which we leave out.

// inBothPlaces runs a test where the uplink's skbs are stripped, and where its driver
// does that.
func inBothPlaces(t *testing.T, test func(t *testing.T, xdp bool)) {
	t.Helper()
	t.Run("skb", func(t *testing.T) { test(t, false) })
	t.Run("driver", func(t *testing.T) { test(t, true) })
}

// samples are inner packets from one pod to another, by what is special.
func samples(srcMAC, dstMAC, src, dst string) map[string]*packet {
	ip := func(with ...func(*layers.IPv4)) *packet { return eth(srcMAC, dstMAC).ip(src, dst, with...) }
	all := map[string]*packet{
		"UDP without a checksum":  ip().udpWithoutChecksum(7, 8).payload(100),
		"TCP":                     ip().tcp(1000, 80).payload(100),
		"TCP with timestamps":     ip().tcp(1000, 80, timestamps...).payload(100),
		"ping":                    ip().ping(3).payload(56),
		"a protocol nobody knows": ip().protocol(253).payload(40),
		"SCTP":                    ip().protocol(132).payload(40),
		"a bare header":           ip().protocol(253),
		"a first fragment":        ip(firstFragment).udp(7, 8).payload(800),
		"a later fragment":        ip(laterFragment).protocol(17).payload(800),
		"IP options":              ip(recordRoute).udp(7, 8).payload(100),
		"a TTL of 1":              ip(ttl(1)).udp(7, 8).payload(100),
		"DF":                      ip(dontFragment).udp(7, 8).payload(100),
	}
	for _, size := range []int{28, 29, 64, 576, 1400, 1449, 1450} {
		all[fmt.Sprintf("%d bytes", size)] = ip().udp(7, 8).payload(size - 28)
	}
	for _, value := range []uint8{0, 1, 2, 3, 0x28, 0xb8 | 1, 0xfc | 2, 0xfc | 3} {
		all[fmt.Sprintf("TOS %#02x", value)] = ip(tos(value)).udp(7, 8).payload(100)
	}
	for i := range 24 {
		all[fmt.Sprintf("flow %d", i)] = ip().udp(uint16(30000+i), uint16(53+i*i)).payload(20)
	}
	return all
}

// mustBeAlike compares what the kernel sent with what we sent.
func mustBeAlike(t *testing.T, kernels, ours []byte) {
	t.Helper()
	if kernels == nil || ours == nil {
		t.Fatalf("by the kernel arrived %d bytes, by us %d", len(kernels), len(ours))
	}
	for name, p := range map[string][]byte{"the kernel": kernels, "us": ours} {
		if onesSum(p[atIP:atUDP]) != 0xffff {
			t.Errorf("by %s: wrong IP header checksum: %x", name, p[atIP:atUDP])
		}
	}
	if !udpChecksumRight(kernels[atIP:]) || binary.BigEndian.Uint16(kernels[atUDP+6:]) == 0 {
		t.Errorf("the kernel's UDP checksum is not what this test expects of a stock peer: %x", kernels[atUDP:atVXLAN])
	}
	if binary.BigEndian.Uint16(ours[atUDP+6:]) != 0 {
		t.Errorf("our UDP checksum is %x, want 0", ours[atUDP+6:atUDP+8])
	}
	blank := func(p []byte) []byte {
		p = bytes.Clone(p)
		for _, at := range []int{atIP + 4, atIP + 10, atUDP + 6} {
			copy(p[at:], []byte{0, 0})
		}
		return p
	}
	if k, o := blank(kernels), blank(ours); !bytes.Equal(k, o) {
		t.Errorf("on the wire (without ID and checksums)\nkernel %x\nwe     %x", k, o)
	}
}

func TestEncapsulationIsTheKernels(t *testing.T) {
	w := newWired(t)
	out, wire, overlay := mustTap(t, w.NS, "flannel.1"), mustTap(t, w.b, "eth0"), mustTap(t, w.b, "flannel.1")
	all := samples(ourMAC, blueMAC, ourPod, bluePod)
	through := func(frame []byte) (onWire, inside []byte) {
		out.send(frame)
		return wire.next(soon, isVXLAN), overlay.next(soon, isIPv4)
	}
	kernels := map[string][]byte{}
	for name, p := range all {
		onWire, inside := through(p.bytes(t))
		if onWire == nil || !bytes.Equal(inside, p.bytes(t)) {
			t.Fatalf("%s: through the kernel alone came %x, and inside %x", name, onWire, inside)
		}
		kernels[name] = onWire
	}
	w.accelerate("observe")
	for _, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			w.reset()
			var onWire, inside []byte
			frame := all[name].bytes(t)
			got := w.during(func() { onWire, inside = through(frame) })
			mustCount(t, got, nil, nil, sent(blueIP, "base", 1, uint64(len(frame)-14)))
			mustBeAlike(t, kernels[name], onWire)
			// A kernel that knows nothing of us takes it.
			if !bytes.Equal(inside, frame) {
				t.Errorf("at the peer's overlay device came\n     %x\nwant %x", inside, frame)
			}
		})
	}
}

// The port range of the host, down to the narrowest: the same flow has the same
// port, whoever encapsulates it.
func TestSourcePortIsTheKernels(t *testing.T) {
	for _, ports := range []string{"40000 40001", "40000 40007", "1024 65535", "50000 50000"} {
		t.Run(ports, func(t *testing.T) {
			w := newWired(t)
			w.setSysctl("net/ipv4/ip_local_port_range", ports)
			out, wire := mustTap(t, w.NS, "flannel.1"), mustTap(t, w.b, "eth0")
			flow := func(i int) []byte {
				out.send(eth(ourMAC, blueMAC).ip(ourPod, bluePod).udp(uint16(30000+i), 53).payload(20).bytes(t))
				return wire.next(soon, isVXLAN)
			}
			var kernels []uint16
			for i := range 32 {
				kernels = append(kernels, outerOf(flow(i)).sourcePort())
			}
			w.accelerate("observe")
			for i, want := range kernels {
				w.reset()
				if got := outerOf(flow(i)).sourcePort(); got != want {
					t.Errorf("flow %d: port %d, by the kernel %d", i, got, want)
				}
			}
		})
	}
}

// A route's own MTU holds for both: what does not fit leaves in fragments.
func TestRouteMTUIsTheKernels(t *testing.T) {
	for _, how := range []string{"mtu lock 1000", "mtu 1000"} {
		t.Run(how, func(t *testing.T) {
			w := newWired(t)
			w.Run(t, "ip route add "+blueIP+"/32 dev eth0 src "+ourIP+" "+how)
			out, wire := mustTap(t, w.NS, "flannel.1"), mustTap(t, w.b, "eth0")
			longest := func() int {
				out.send(toBlue(1200).bytes(t))
				return len(wire.next(soon, isVXLAN))
			}
			kernels := longest()
			w.accelerate("observe")
			if ours := longest(); ours != kernels {
				t.Errorf("1228 bytes left in a packet of %d bytes, by the kernel in fragments of %d", ours-14, kernels-14)
			}
		})
	}
}

// A peer behind a gateway: the packet goes where the kernel sends it.
func TestNextHopIsTheKernels(t *testing.T) {
	w := newWired(t)
	w.Run(
		t,
		"ip route add "+farIP+"/32 via "+blueIP+" dev eth0 src "+ourIP,
		"bridge fdb append "+farMAC+" dev flannel.1 dst "+farIP,
	)
	out, wire := mustTap(t, w.NS, "flannel.1"), mustTap(t, w.b, "eth0")
	frame := eth(ourMAC, farMAC).ip(ourPod, farPod).udp(7, 8).payload(100).bytes(t)
	through := func() []byte {
		out.send(frame)
		return wire.next(soon, isVXLAN)
	}
	kernels := through()
	w.accelerate("observe")
	var ours []byte
	got := w.during(func() { ours = through() })
	mustCount(t, got, nil, nil, sent(farIP, "base", 1, 128))
	mustBeAlike(t, kernels, ours)
}

// A packet with a VLAN tag on the overlay device, as a VLAN device on top of it
// makes: the tag goes inside, as ever.
func TestTaggedPacketOnTheOverlayIsTheKernels(t *testing.T) {
	w := newWired(t)
	mustTagAll(w, "flannel.1")
	out, wire := mustTap(t, w.NS, "flannel.1"), mustTap(t, w.b, "eth0")
	through := func() []byte {
		out.send(toBlue(100).bytes(t))
		return wire.next(soon, isVXLAN)
	}
	kernels := through()
	w.accelerate("observe")
	var ours []byte
	got := w.during(func() { ours = through() })
	mustCount(t, got, one(weftReasonREASON_INNER_NOT_IPV4), nil, nil)
	if kernels == nil || ours == nil || !bytes.Equal(kernels[atInner:], ours[atInner:]) || !bytes.Equal(ours[atInner+12:atInner+16], []byte{0x81, 0, 0, 5}) {
		t.Errorf("inside\nkernel %x\nwe     %x", kernels, ours)
	}
}

// offloads are what a peer may be set to: which checksums are computed before
// the packet leaves it, and which are left open for a network card.
var offloads = map[string]struct {
	setUp []string
	// An outer checksum that nobody verified, or computed yet, is none that
	// our programs can tell from a wrong one.
	unverified bool
}{
	"all checksums whole":          {[]string{"ethtool -K eth0 tx off"}, true},
	"the inner checksum is open":   {[]string{"ethtool -K eth0 tx on"}, true},
	"the outer checksum is open":   {[]string{"ethtool -K eth0 tx on", "ethtool -K flannel.1 tx off"}, true},
	"no outer checksum":            {[]string{"ip link del flannel.1", "noudpcsum"}, false},
	"whole, and GRO on the way in": {[]string{"ethtool -K eth0 tx off", "gro"}, false},
}

// unprotected are the samples that have no checksum of their own.
var unprotected = map[string]bool{
	"UDP without a checksum": true, "a protocol nobody knows": true, "SCTP": true, "a bare header": true,
	"a first fragment": true, "a later fragment": true,
}

func (w *wired) offload(lines []string) {
	w.tb.Helper()
	for _, line := range lines {
		switch line {
		case "noudpcsum":
			w.b.Run(
				w.tb,
				"ip link add flannel.1 address "+blueMAC+" type vxlan id 1 local "+blueIP+" dev eth0 dstport 8472 nolearning noudpcsum",
				"ip addr add 10.244.2.0/32 dev flannel.1",
				"ip link set flannel.1 up",
				"ip neigh add 10.244.1.0 lladdr "+ourMAC+" dev flannel.1 nud permanent",
				"bridge fdb append "+ourMAC+" dev flannel.1 dst "+ourIP,
				"ip route add 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink",
			)
		case "gro":
			w.Run(w.tb, "ethtool -K eth0 gro on")
		default:
			w.b.Run(w.tb, line)
		}
	}
}

func TestStrippingIsTheKernels(t *testing.T) {
	for name, c := range offloads {
		t.Run(name, func(t *testing.T) {
			w := newWired(t)
			w.offload(c.setUp)
			out, overlay := mustTap(t, w.b, "flannel.1"), mustTap(t, w.NS, "flannel.1")
			all := samples(blueMAC, ourMAC, bluePod, ourPod)
			for name, p := range all {
				out.send(p.bytes(t))
				if inside := overlay.next(soon, isIPv4); !bytes.Equal(inside, p.bytes(t)) {
					t.Fatalf("%s: through the kernel alone came %x", name, inside)
				}
			}
			w.accelerate("enforce")
			for _, name := range slices.Sorted(maps.Keys(all)) {
				t.Run(name, func(t *testing.T) {
					w.reset()
					mustArrive(t, w, out, overlay, all[name].bytes(t), c.unverified && unprotected[name])
				})
			}
		})
	}
}

// mustArrive sends a frame out of b's overlay device, which must come out of ours as
// it is, and be counted: on the kernel path where it is not protected.
func mustArrive(t *testing.T, w *wired, out, overlay *tap, frame []byte, unprotected bool) {
	t.Helper()
	var inside []byte
	got := w.during(func() {
		out.send(frame)
		inside = overlay.next(soon, isIPv4)
		time.Sleep(2 * time.Millisecond) // the kernel's path is counted behind the tap
	})
	if !bytes.Equal(inside, frame) {
		t.Errorf("at our overlay device came\n     %x\nwant %x", inside, frame)
	}
	if size := uint64(len(frame) - 14); unprotected {
		mustCount(t, got, one(weftReasonREASON_INNER_UNPROTECTED), nil, received(blueIP, "kernel", 1, size))
	} else {
		mustCount(t, got, nil, nil, received(blueIP, "base", 1, size))
	}
}

// A packet that was damaged before it was encapsulated is found out by whoever
// receives it, though the outer checksum was verified on the way.
func TestWrongInnerChecksumIsFound(t *testing.T) { inBothPlaces(t, wrongChecksumIsFound) }

func wrongChecksumIsFound(t *testing.T, xdp bool) {
	for name, lines := range map[string][]string{
		"GRO off": {"ethtool -K eth0 gro off"}, "GRO on": {"ethtool -K eth0 gro on"}, "no outer checksum": nil,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWired(t)
			w.xdp = xdp
			w.Run(t, "ip addr add 10.244.1.5/32 dev lo")
			w.Run(t, lines...)
			if lines == nil {
				w.offload(offloads["no outer checksum"].setUp)
			}
			w.accelerate("enforce")
			out, receive := mustTap(t, w.b, "flannel.1"), mustListen(t, w.NS, "10.244.1.5:40000")
			damaged := fromBlue(100).bytes(t, set(100, 0xde, 0xad))
			for _, off := range []uint32{1, 0} {
				w.reset()
				w.inForce(func(f *weftInForce) { f.Off = off })
				out.send(damaged)
				if data := receive(never); data != nil {
					t.Errorf("with the switch %d a damaged packet was received: %x", off, data)
				}
				out.send(fromBlue(100).bytes(t))
				if receive(soon) == nil {
					t.Errorf("with the switch %d a good packet was not received", off)
				}
			}
		})
	}
}

// All pairs of ECN fields, from the wire: what the kernel makes of them, we do.
func TestECNOnTheWayInIsTheKernels(t *testing.T) { inBothPlaces(t, ecnIsTheKernels) }

func ecnIsTheKernels(t *testing.T, xdp bool) {
	w := newWired(t)
	w.xdp = xdp
	wire, overlay := mustTap(t, w.b, "eth0"), mustTap(t, w.NS, "flannel.1")
	table := func(also func(inner, outer uint8, frame []byte)) {
		for inner := range uint8(4) {
			for outer := range uint8(4) {
				wire.send(eth(wireMAC, uplinkMAC).ip(blueIP, ourIP, tos(0xb8|outer)).udp(50000, 8472).vxlan(1).
					around(eth(blueMAC, ourMAC).ip(bluePod, ourPod, tos(0x28|inner)).udp(7, 8).payload(50)).bytes(t))
				also(inner, outer, overlay.next(never, isIPv4))
			}
		}
	}
	kernels := map[[2]uint8][]byte{}
	table(func(inner, outer uint8, frame []byte) { kernels[[2]uint8{inner, outer}] = frame })
	if kernels[[2]uint8{0, 3}] != nil || kernels[[2]uint8{2, 3}] == nil {
		t.Fatal("the kernel does not do RFC 6040")
	}
	w.accelerate("enforce")
	got := w.during(func() {
		table(func(inner, outer uint8, frame []byte) {
			if want := kernels[[2]uint8{inner, outer}]; !bytes.Equal(frame, want) {
				t.Errorf("inner %d, outer %d: came\n     %x\nwant %x", inner, outer, frame, want)
			}
			w.reset()
		})
	})
	mustCount(t, got, one(weftReasonREASON_ECN_CONGESTED), nil, received(blueIP, "base", 15, 15*78))
}

// Whatever we leave to the kernel, malformed or not, meets what it would have
// met without us.
func TestPassedPacketsMeetTheKernelAsEver(t *testing.T) { inBothPlaces(t, passedMeetTheKernel) }

func passedMeetTheKernel(t *testing.T, xdp bool) {
	w := newWired(t)
	w.xdp = xdp
	wire, overlay := mustTap(t, w.b, "eth0"), mustTap(t, w.NS, "flannel.1")
	marker := carried(blueIP, eth(blueMAC, ourMAC).ip(bluePod, ourPod).protocol(254).payload(9)).bytes(t)
	// What comes before the marker comes because of the packet.
	through := func(packet []byte) (frames [][]byte) {
		wire.send(packet)
		wire.send(marker)
		for {
			frame := overlay.next(soon, func([]byte) bool { return true })
			if frame == nil {
				t.Fatal("the marker did not come")
			}
			if bytes.Equal(frame, marker[atInner:]) {
				return frames
			}
			frames = append(frames, frame)
		}
	}
	kernels := map[string][][]byte{}
	came := 0
	for _, c := range inCases() {
		kernels[c.name] = through(c.packet.bytes(t, c.broken...))
		came += len(kernels[c.name])
	}
	if came < 10 {
		t.Errorf("only %d packets came through the kernel alone; what is compared?", came)
	}
	w.accelerate("observe")
	for _, c := range inCases() {
		t.Run(c.name, func(t *testing.T) {
			w.reset()
			// The marker takes the kernel path too, or it could overtake.
			w.peerState(blueIP, func(s *weftPeerState) { s.Off = 1 })
			if c.given != nil && c.reason != weftReasonREASON_DEVICE_MISSING {
				c.given(w.node)
			}
			frames := through(c.packet.bytes(t, c.broken...))
			if !slices.EqualFunc(frames, kernels[c.name], bytes.Equal) {
				t.Errorf("came\n     %x\nwant %x", frames, kernels[c.name])
			}
		})
	}
}

// Sockets at both ends, with every checksum left open that the devices allow:
// what is sent is received, by either path and both ways, and the same socket's
// packets leave from one outer port.
func TestSocketsSeeNoDifference(t *testing.T) { inBothPlaces(t, socketsSeeNoDifference) }

func socketsSeeNoDifference(t *testing.T, xdp bool) {
	for name, lines := range map[string][]string{
		"checksums whole on the wire": nil,
		"checksums open on the wire":  {"ethtool -K eth0 tx on"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWired(t)
			w.xdp = xdp
			w.Run(t, lines...)
			w.b.Run(t, lines...)
			w.accelerate("enforce")
			wire := mustTap(t, w.b, "eth0")
			paths := []struct {
				name string
				off  uint32
			}{{"kernel", 1}, {"base", 0}}

			t.Run("UDP", func(t *testing.T) {
				receive := mustListen(t, w.b, "10.244.2.0:4000")
				back := mustListen(t, w.NS, "10.244.1.0:5001")
				send := mustDial(t, w.NS, "10.244.1.0:5000", "10.244.2.0:4000")
				answer := mustDial(t, w.b, "10.244.2.0:4001", "10.244.1.0:5001")
				var frames [][]byte
				for i, path := range paths {
					w.reset()
					w.inForce(func(f *weftInForce) { f.Off = path.off })
					data := bytes.Repeat([]byte{byte(i + 1)}, 701)
					got := w.during(func() {
						for _, way := range []struct {
							from io.Writer
							to   func(time.Duration) []byte
						}{{send, receive}, {answer, back}} {
							if _, err := way.from.Write(data); err != nil {
								t.Fatal(err)
							}
							if came := way.to(soon); !bytes.Equal(came, data) {
								t.Errorf("%s: received %d bytes: %x", path.name, len(came), came)
							}
						}
					})
					frames = append(frames, wire.next(soon, isVXLAN))
					want := map[string]PathCounters{blueIP + " " + path.name: {1, 729, 1, 729}}
					if !maps.Equal(got.paths, want) {
						t.Errorf("%s: counted %+v (passed %v), want %+v", path.name, got.paths, got.passed, want)
					}
				}
				if frames[0] == nil || frames[1] == nil {
					t.Fatal("not seen on the wire")
				}
				if k, o := outerOf(frames[0]), outerOf(frames[1]); k.sourcePort() != o.sourcePort() || k.tos() != o.tos() {
					t.Errorf("by the kernel from port %d with TOS %d, by us %d and %d", k.sourcePort(), k.tos(), o.sourcePort(), o.tos())
				}
				for i, frame := range frames {
					if lines == nil && !udpChecksumRight(frame[atInnerIP:]) {
						t.Errorf("%s: the inner UDP checksum is wrong: %x", paths[i].name, frame[atInnerIP:])
					}
				}
			})
			t.Run("TCP", func(t *testing.T) {
				client, server := mustConnect(t, w, "10.244.2.0:4002")
				for i, path := range paths {
					for _, size := range []int{1, 1000, 200_000} {
						w.reset()
						w.inForce(func(f *weftInForce) { f.Off = path.off })
						data := bytes.Repeat([]byte{byte(i + size)}, size)
						for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
							if err := exchange(way[0], way[1], data); err != nil {
								t.Errorf("%d bytes by the %s path: %v", size, path.name, err)
							}
						}
					}
				}
				peers, err := w.accel.View().Peers()
				if err != nil {
					t.Fatal(err)
				}
				if p := peers[0].Paths[weftPacketPathPATH_BASE]; p.TxPackets == 0 || p.RxPackets == 0 {
					t.Errorf("nothing rode the base path: %+v", peers[0])
				}
			})
		})
	}
}

// mustConnect makes a TCP connection from node a to an address of node b.
func mustConnect(t *testing.T, w *wired, address string) (client, server net.Conn) {
	t.Helper()
	var listener net.Listener
	w.b.MustDo(t, func() (err error) {
		listener, err = net.Listen("tcp4", address)
		return err
	})
	defer listener.Close()
	w.MustDo(t, func() (err error) {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 244, 1, 0)}, Timeout: 5 * time.Second}
		client, err = dialer.Dial("tcp4", address)
		return err
	})
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// exchange sends data one way and compares what comes.
func exchange(from, to net.Conn, data []byte) error {
	deadline := time.Now().Add(5 * time.Second)
	if err := errors.Join(from.SetDeadline(deadline), to.SetDeadline(deadline)); err != nil {
		return err
	}
	errs := make(chan error, 1)
	go func() {
		_, err := from.Write(data)
		errs <- err
	}()
	came := make([]byte, len(data))
	if n, err := io.ReadFull(to, came); err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if !bytes.Equal(came, data) {
		return errors.New("other data came than was sent")
	}
	return <-errs
}
