//go:build linux

package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// place is where something is opened: a test's namespace, a node, a pod.
type place interface{ Do(f func() error) error }

// open opens the firewall of a place.
func open(tb testing.TB, where place) *Firewall {
	tb.Helper()
	var fw *Firewall
	if err := where.Do(func() (err error) {
		fw, err = Open(slog.New(slog.NewTextHandler(tb.Output(), nil)))
		return err
	}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := fw.Close(); err != nil {
			tb.Error(err)
		}
	})
	return fw
}

// mustSync syncs and wants no error.
func mustSync(tb testing.TB, fw *Firewall, r Rules) {
	tb.Helper()
	if err := fw.Sync(r); err != nil {
		tb.Fatalf("sync: %v", err)
	}
}

// dropped is the number of packets dropped so far.
func dropped(tb testing.TB, fw *Firewall) uint64 {
	tb.Helper()
	packets, bytes, err := fw.Dropped()
	if err != nil {
		tb.Fatal(err)
	}
	if (packets == 0) != (bytes == 0) {
		tb.Errorf("%d packets of %d bytes were dropped", packets, bytes)
	}
	return packets
}

// rulesOf are the rules that a node of a lab should have.
func rulesOf(n *lab.Node) Rules {
	r := Rules{
		Port:     8472,
		Prefixes: []netip.Prefix{n.Prefix},
		Devices:  []string{"cni0", n.Overlay()},
	}
	for _, peer := range n.Peers() {
		r.Nodes = append(r.Nodes, peer.IP, peer.VTEP, peer.Gateway, broadcast(peer.Prefix))
	}
	return r
}

// broadcast is the last address of a prefix.
func broadcast(p netip.Prefix) netip.Addr { return behind(p).Prev() }

// What a forged packet says: it comes from a host that does not exist, and is
// for the port of a server that every victim runs.
var (
	forger  = netip.MustParseAddr("203.0.113.66")
	forger6 = netip.MustParseAddr("2001:db8:66::66")
)

const serverPort = 5300

// forge is the payload of a VXLAN packet that has a node deliver a text to one
// of its pods, or to whom it can.
func forge(tb testing.TB, node net.HardwareAddr, victim netip.Addr, text string) []byte {
	tb.Helper()
	eth := &layers.Ethernet{SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 0x66}, DstMAC: node, EthernetType: layers.EthernetTypeIPv4}
	udp := &layers.UDP{SrcPort: 6666, DstPort: serverPort}
	var ip interface {
		gopacket.SerializableLayer
		gopacket.NetworkLayer
	} = &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: forger.AsSlice(), DstIP: victim.AsSlice()}
	if victim.Is6() {
		eth.EthernetType = layers.EthernetTypeIPv6
		ip = &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolUDP, SrcIP: forger6.AsSlice(), DstIP: victim.AsSlice()}
	}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		tb.Fatal(err)
	}
	return serialize(tb, &layers.VXLAN{ValidIDFlag: true, VNI: 1}, eth, ip, udp, gopacket.Payload(text))
}

func serialize(tb testing.TB, all ...gopacket.SerializableLayer) []byte {
	tb.Helper()
	buffer := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, all...); err != nil {
		tb.Fatal(err)
	}
	return slices.Clone(buffer.Bytes())
}

// server notes what arrives at a UDP port, and may answer.
type server struct {
	conn *net.UDPConn
	mu   sync.Mutex
	got  []string
}

// serve opens a server in a place until the test ends. What answer returns is
// sent back; it may be nil.
func serve(tb testing.TB, where place, address string, answer func(text string) []byte) *server {
	tb.Helper()
	s := &server{}
	if err := where.Do(func() error {
		at, err := net.ResolveUDPAddr("udp", address)
		if err != nil {
			return err
		}
		s.conn, err = net.ListenUDP("udp", at)
		return err
	}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.conn.Close() })
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := s.conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			text := string(buf[:n])
			s.mu.Lock()
			s.got = append(s.got, fmt.Sprintf("%s %s", from.Addr().Unmap(), text))
			s.mu.Unlock()
			if answer != nil {
				_, _ = s.conn.WriteToUDPAddrPort(answer(text), from)
			}
		}
	}()
	return s
}

// received reports whether a text arrives within a while.
func (s *server) received(text string, within time.Duration) bool {
	for deadline := time.Now().Add(within); ; time.Sleep(2 * time.Millisecond) {
		s.mu.Lock()
		found := slices.ContainsFunc(s.got, func(got string) bool { return strings.HasSuffix(got, text) })
		s.mu.Unlock()
		if found || time.Now().After(deadline) {
			return found
		}
	}
}

const (
	// arrives bounds the wait for what should come, stays that for what should
	// not.
	arrives = 3 * time.Second
	stays   = 100 * time.Millisecond
)

var texts atomic.Int64

// newText is a text that was never sent before.
func newText() string { return fmt.Sprintf("<text %d>", texts.Add(1)) }

// dropPrivileges takes all rights from the calling thread. It belongs to a Do,
// which throws the thread away.
func dropPrivileges() error {
	const nobody = 65534
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
		return fmt.Errorf("becoming nobody: %w", errno)
	}
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_UDP); err == nil {
		unix.Close(fd)
		return errors.New("nobody may open raw sockets, so is not nobody")
	}
	return nil
}

// send sends a payload from an unprivileged program in a pod, with the given
// socket options set first.
func send(from place, port int, to netip.AddrPort, payload []byte, options ...func(fd int) error) error {
	return from.Do(func() error {
		if err := dropPrivileges(); err != nil {
			return err
		}
		var optionErr error
		config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) {
				for _, set := range options {
					optionErr = errors.Join(optionErr, set(int(fd)))
				}
			})
		}}
		network := "udp4"
		if to.Addr().Is6() {
			network = "udp6"
		}
		conn, err := config.ListenPacket(context.Background(), network, fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		defer conn.Close()
		if optionErr != nil {
			return optionErr
		}
		_, err = conn.WriteTo(payload, net.UDPAddrFromAddrPort(to))
		return err
	})
}

// withIPOptions makes a socket send IP options: no operation, record route.
func withIPOptions(fd int) error {
	return unix.SetsockoptString(fd, unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x07\x07\x04\x00\x00\x00\x00")
}

// withBroadcast allows a socket to broadcast.
func withBroadcast(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
}

// sendRaw sends IPv4 packets as they are, which takes CAP_NET_RAW, as most
// containers have it.
func sendRaw(from place, to netip.Addr, packets ...[]byte) error {
	return from.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, p := range packets {
			if err := unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
				return err
			}
		}
		return nil
	})
}

// udpPacket is a whole IPv4 packet.
func udpPacket(tb testing.TB, from, to netip.AddrPort, payload []byte) []byte {
	tb.Helper()
	ip := &layers.IPv4{
		Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, Id: uint16(texts.Add(1)),
		SrcIP: from.Addr().AsSlice(), DstIP: to.Addr().AsSlice(),
	}
	udp := &layers.UDP{SrcPort: layers.UDPPort(from.Port()), DstPort: layers.UDPPort(to.Port())}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		tb.Fatal(err)
	}
	return serialize(tb, ip, udp, gopacket.Payload(payload))
}

// fragments cuts an IPv4 packet without options so that the first fragment has
// that many bytes after the IP header, a multiple of 8.
func fragments(packet []byte, first int) [][]byte {
	const header, moreFragments = 20, 1 << 13
	cut := func(from, to int, flags uint16) []byte {
		f := append(slices.Clone(packet[:header]), packet[header+from:header+to]...)
		binary.BigEndian.PutUint16(f[6:], flags|uint16(from/8))
		return f // the kernel fills in the length and the checksum
	}
	end := len(packet) - header
	return [][]byte{cut(0, first, moreFragments), cut(first, end, 0)}
}
