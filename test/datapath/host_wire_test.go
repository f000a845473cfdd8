//go:build linux

package datapath_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// wireTap sees the VXLAN packets that a node sends, at the far end of its
// cable.
type wireTap struct {
	fd   int
	done chan struct{}

	mu   sync.Mutex
	seen []outerSeen
}

// outerSeen is an outer packet on the wire.
type outerSeen struct {
	at       time.Time
	from, to netip.Addr
	tos, ttl byte
	df       bool
	length   int // of the IP packet
}

// String is what a host's rules can change of an outer packet.
func (o outerSeen) String() string {
	return fmt.Sprintf("from %s to %s dscp %d ttl %d df %v", o.from, o.to, o.tos>>2, o.ttl, o.df)
}

// etherType is a protocol number in network byte order, as AF_PACKET wants it.
func etherType(protocol uint16) uint16 { return protocol<<8 | protocol>>8 }

// mustPacketSocket opens a raw socket on a device of a space.
func mustPacketSocket(tb testing.TB, where *lab.Space, device string) (fd int) {
	tb.Helper()
	err := where.Do(func() error {
		i, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(etherType(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: etherType(unix.ETH_P_ALL), Ifindex: i.Index})
	})
	if err != nil {
		tb.Fatalf("opening a raw socket on %s of %s: %v", device, where, err)
	}
	return fd
}

// mustTapWire begins to watch what a node sends to the VXLAN port. The device
// is the one that the cable of one of its uplinks ends in.
func mustTapWire(tb testing.TB, l *lab.Lab, device string) *wireTap {
	tb.Helper()
	w := &wireTap{fd: mustPacketSocket(tb, l.Underlay, device), done: make(chan struct{})}
	err := errors.Join(
		unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
		unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
		unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
	)
	if err != nil {
		tb.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { w.run(l.Options.Port) })
	tb.Cleanup(func() {
		close(w.done)
		running.Wait()
		unix.Close(w.fd)
	})
	return w
}

func (w *wireTap) run(port uint16) {
	frame, control := make([]byte, 128), make([]byte, 64)
	for {
		select {
		case <-w.done:
			return
		default:
		}
		n, controls, _, from, err := unix.Recvmsg(w.fd, frame, control, unix.MSG_TRUNC)
		if err != nil {
			continue
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue // towards the node
		}
		o, ok := parseOuter(frame[:min(n, len(frame))], port)
		if !ok {
			continue
		}
		o.at = arrival(control[:controls])
		w.mu.Lock()
		w.seen = append(w.seen, o)
		w.mu.Unlock()
	}
}

// arrival is when the kernel received a packet, which may be some time before it is
// read.
func arrival(control []byte) time.Time {
	messages, _ := unix.ParseSocketControlMessage(control)
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Now()
}

// parseOuter reads an Ethernet frame; ok tells that it is VXLAN.
func parseOuter(frame []byte, port uint16) (o outerSeen, ok bool) {
	const ethernet, ip = 14, 20
	if len(frame) < ethernet+ip+8 || binary.BigEndian.Uint16(frame[12:]) != unix.ETH_P_IP {
		return o, false
	}
	header := frame[ethernet:]
	udp := header[int(header[0]&15)*4:]
	if header[9] != unix.IPPROTO_UDP || len(udp) < 8 || binary.BigEndian.Uint16(udp[2:]) != port {
		return o, false
	}
	return outerSeen{
		from: netip.AddrFrom4([4]byte(header[12:16])), to: netip.AddrFrom4([4]byte(header[16:20])),
		tos: header[1], ttl: header[8], df: header[6]&0x40 != 0, length: int(binary.BigEndian.Uint16(header[2:])),
	}, true
}

// between lists what was sent to an address between two moments.
func (w *wireTap) between(to netip.Addr, from, until time.Time) (seen []outerSeen) {
	time.Sleep(50 * time.Millisecond) // what has arrived may still be to be read
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, o := range w.seen {
		if o.to == to && o.at.After(from) && o.at.Before(until) {
			seen = append(seen, o)
		}
	}
	return seen
}

// longest is the length of the longest IP packet.
func longest(seen []outerSeen) (length int) {
	for _, o := range seen {
		length = max(length, o.length)
	}
	return length
}

// kinds are the different outer packets in words.
func kinds(seen []outerSeen) string {
	var words []string
	for _, o := range seen {
		if s := o.String(); !slices.Contains(words, s) {
			words = append(words, s)
		}
	}
	slices.Sort(words)
	return strings.Join(words, "; ")
}

// mustPeerWithOne makes the overlay of a bare node, with a single peer: by ip
// and bridge commands, as lab.Kernel nodes have it with all.
func mustPeerWithOne(tb testing.TB, n, peer *lab.Node) {
	tb.Helper()
	t, o := lab.T(tb), n.Overlay()
	t.Run(n, fmt.Sprintf("ip link add %s address %s mtu 1450 type vxlan id 1 local %s dev eth0 dstport 8472 nolearning", o, n.MAC, n.IP))
	t.Run(n, fmt.Sprintf("ip address add %s/32 dev %s", n.VTEP, o))
	t.Run(n, fmt.Sprintf("ip link set %s up", o))
	if err := n.AddKernelPeer(tb.Context(), peer); err != nil {
		tb.Fatal(err)
	}
}
