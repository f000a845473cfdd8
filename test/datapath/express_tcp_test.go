//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// Conntrack's entries live and die as if it had seen every packet.
func TestExpressKeepsConntrackTrue(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"short connections", shortConnections},
		{"a connection closes in steps", closingStates},
		{"forged resets", forgedResets},
		{"a connection is reset", resetConnection},
		{"timeouts", timeouts},
		{"conntrack is flushed under load", flushedUnderLoad},
	})
}

// invalid is how many packets conntrack on a node has called invalid.
func invalid(t lab.Test, n *lab.Node) (sum int) {
	t.Helper()
	for _, m := range regexp.MustCompile(` invalid=(\d+)`).FindAllStringSubmatch(t.Run(n, "conntrack -S"), -1) {
		count, _ := strconv.Atoi(m[1])
		sum += count
	}
	return sum
}

// withoutInvalid runs f and fails the test when conntrack called a packet
// invalid meanwhile.
func withoutInvalid(t lab.Test, w world, f func()) {
	t.Helper()
	before := []int{invalid(t, w.Node(1)), invalid(t, w.Node(2))}
	f()
	for i, n := range w.Nodes {
		if now := invalid(t, n) - before[i]; now > 0 {
			t.Errorf("conntrack of %s called %d packets invalid", n, now)
		}
	}
}

// tracked lists the states of conntrack's entries to a TCP port of a node, and
// how many there are of each: "2 ESTABLISHED, 1 TIME_WAIT".
func tracked(t lab.Test, n *lab.Node, port uint16) string {
	t.Helper()
	states := map[string]int{}
	for line := range strings.Lines(t.Run(n, "sh", "-c", fmt.Sprintf("conntrack -L -p tcp --orig-port-dst %d 2>/dev/null", port))) {
		if fields := strings.Fields(line); len(fields) > 3 {
			states[fields[3]]++
		}
	}
	var words []string
	for _, state := range slices.Sorted(maps.Keys(states)) {
		words = append(words, fmt.Sprintf("%d %s", states[state], state))
	}
	return strings.Join(words, ", ")
}

// mustBeTracked waits for the states of entries on both nodes.
func mustBeTracked(t lab.Test, w world, port uint16, want string) {
	t.Helper()
	for _, n := range w.Nodes {
		var got string
		for range 50 {
			if got = tracked(t, n, port); got == want {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if got != want {
			t.Errorf("conntrack of %s has %q, not %q", n, got, want)
		}
	}
}

func shortConnections(t lab.Test, w world) {
	const connections = 5000
	client, server := w.pod(1, 1), w.pod(2, 1)
	port := mustAnswer(t, server)
	withoutInvalid(t, w, func() {
		var err error
		w.mustSome(t, func() { err = connectShortly(client, at(server, port), connections, 0) })
		if err != nil {
			t.Error(err)
		}
	})
	mustBeTracked(t, w, port, fmt.Sprintf("%d TIME_WAIT", connections))
}

// mustAnswer listens for connections that echo, however many they are.
func mustAnswer(t lab.Test, at place) (port uint16) {
	t.Helper()
	l, port := mustListenTCP(t, at)
	go echoConnections(l)
	return port
}

// connectShortly makes connections one after the other, from ports that begin with a
// given one, or from any (0). Four of five end after a question, one lasts long enough
// for express.
func connectShortly(from place, to netip.AddrPort, connections, firstPort int) error {
	return from.Do(func() error {
		for i := range connections {
			d := net.Dialer{Timeout: answerTime}
			if firstPort > 0 {
				d.LocalAddr = &net.TCPAddr{Port: firstPort + i}
			}
			conn, err := d.Dial("tcp4", to.String())
			if err != nil {
				return err
			}
			c := &talk{Conn: conn}
			err = c.ask(1 + i%5/4*15)
			conn.Close()
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// One end says that it has nothing more to send, the other goes on.
func closingStates(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	withoutInvalid(t, w, func() {
		var conn, serv *net.TCPConn
		err := client.Do(func() error {
			c, err := net.DialTimeout("tcp4", at(server, port).String(), answerTime)
			if err == nil {
				conn = c.(*net.TCPConn)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if serv, err = l.AcceptTCP(); err != nil {
			t.Fatal(err)
		}
		defer serv.Close()
		send := func(from, to net.Conn) {
			t.Helper()
			buffer := make([]byte, 100)
			for range 100 {
				from.Write(buffer)
				to.SetReadDeadline(time.Now().Add(answerTime))
				if _, err := io.ReadFull(to, buffer); err != nil {
					t.Fatal(err)
				}
			}
		}
		w.mustTake(t, everyEnd, func() {
			send(conn, serv)
			send(serv, conn)
		})
		mustBeTracked(t, w, port, "1 ESTABLISHED")
		conn.CloseWrite()
		time.Sleep(20 * time.Millisecond)
		mustBeTracked(t, w, port, "1 CLOSE_WAIT")
		w.mustTake(t, "", func() { send(serv, conn) })
		mustBeTracked(t, w, port, "1 CLOSE_WAIT")
		serv.CloseWrite()
		mustBeTracked(t, w, port, "1 TIME_WAIT")
	})
}

// mustSet sets some of conntrack's settings on all nodes for a scenario, and waits
// until an agent has seen it.
func mustSet(t lab.Test, w world, settings ...string) {
	t.Helper()
	for _, n := range w.Nodes {
		for _, s := range settings {
			name, _, _ := strings.Cut(s, "=")
			was := strings.TrimSpace(t.Run(n, "sysctl -n net.netfilter.nf_conntrack_"+name))
			t.Run(n, "sysctl -qw net.netfilter.nf_conntrack_"+s)
			atEnd(t, n, fmt.Sprintf("sysctl -qw net.netfilter.nf_conntrack_%s=%s", name, was))
		}
	}
	if w.express {
		time.Sleep(settingsSeen)
	}
}

// settingsSeen is how long an agent may take to look at settings.
const settingsSeen = 1500 * time.Millisecond

// A reset ends the connection at the other end and in conntrack: on the kernel
// path after the timeout of what is closed (10 s by default). Conntrack has not
// seen the packets that took express, so it can't tell such a reset from a forged
// one, and gives the entry the timeout of what is not acknowledged (300 s).
func resetConnection(t lab.Test, w world) {
	mustSet(t, w, "tcp_timeout_close=1", "tcp_timeout_unacknowledged=2")
	client, server := w.pod(1, 1), w.pod(2, 1)
	for _, end := range []string{"client", "server"} {
		l, port := mustListenTCP(t, server)
		withoutInvalid(t, w, func() {
			c := mustConnect(t, client, l, at(server, port))
			w.mustTake(t, everyEnd, func() { c.mustAsk(t, 500) })
			if end == "client" {
				c.Conn.(*net.TCPConn).SetLinger(0)
				c.Conn.Close()
			} else {
				c.serv.(*net.TCPConn).SetLinger(0)
				c.serv.Close()
				c.SetReadDeadline(time.Now().Add(answerTime))
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the client is not told of the reset: %v", err)
				}
			}
		})
		began := time.Now()
		t.Eventually(4*time.Second, func() error {
			for _, n := range w.Nodes {
				if left := tracked(t, n, port); left != "" {
					return fmt.Errorf("%s after a reset by the %s: %s", n, end, left)
				}
			}
			return nil
		})
		t.Logf("reset by the %s: conntrack forgot the connection after %s", end, time.Since(began).Round(10*time.Millisecond))
	}
}

// nextByte asks a socket for the number of the next byte it will send.
func nextByte(conn net.Conn) (number uint32, err error) {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	failed := raw.Control(func(fd uintptr) {
		const tcpRepairOn, tcpRepairOffNoProbe, tcpSendQueue = 1, -1, 2
		if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, tcpRepairOn); err != nil {
			return
		}
		if err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, tcpSendQueue); err == nil {
			var n int
			n, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
			number = uint32(n)
		}
		err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, tcpRepairOffNoProbe))
	})
	return number, errors.Join(failed, err)
}

// sendRaw sends IPv4 packets from a place.
func sendRaw(from place, packets ...[]byte) error {
	return from.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, p := range packets {
			to := &unix.SockaddrInet4{Addr: [4]byte(p[16:20])}
			if err := unix.Sendto(fd, p, 0, to); err != nil {
				return err
			}
		}
		return nil
	})
}

// tcpSegment is a segment with nothing in it.
func tcpSegment(from, to netip.AddrPort, change func(*layers.TCP)) []byte {
	ip := &layers.IPv4{
		Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP,
		SrcIP: from.Addr().AsSlice(), DstIP: to.Addr().AsSlice(),
	}
	tcp := &layers.TCP{SrcPort: layers.TCPPort(from.Port()), DstPort: layers.TCPPort(to.Port()), Window: 1000}
	change(tcp)
	_ = tcp.SetNetworkLayerForChecksum(ip) // it is one
	return serialized(ip, tcp)
}

// serialized computes lengths and checksums.
func serialized(what ...gopacket.SerializableLayer) []byte {
	buffer := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, what...); err != nil {
		panic(err)
	}
	return buffer.Bytes()
}

// Resets that TCP does not believe: far out of its window, just before it, and
// in it but not exactly what is expected. The connection lives on, and so does
// conntrack's entry.
func forgedResets(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	for _, off := range []int32{1 << 30, -100000, -1, 10} {
		c := mustConnect(t, client, l, at(server, port))
		w.mustTake(t, everyEnd, func() { c.mustAsk(t, 200) })
		next, err := nextByte(c.Conn)
		if err != nil {
			t.Fatal(err)
		}
		from := c.LocalAddr().(*net.TCPAddr).AddrPort()
		if err := sendRaw(client, tcpSegment(from, at(server, port), func(tcp *layers.TCP) {
			tcp.RST, tcp.Seq = true, next+uint32(off)
		})); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
		for _, n := range w.Nodes {
			out := t.Run(n, "sh", "-c", fmt.Sprintf("conntrack -L -p tcp --orig-port-src %d --orig-port-dst %d 2>/dev/null", from.Port(), port))
			fields := strings.Fields(out)
			if len(fields) < 4 || fields[3] != "ESTABLISHED" {
				t.Errorf("%s: after a reset %d bytes off conntrack has: %s", n, off, out)
				continue
			}
			if life, err := strconv.Atoi(fields[2]); err != nil || life < 200 {
				t.Errorf("%s: after a reset %d bytes off conntrack's entry ends in %s s", n, off, fields[2])
			}
		}
		w.mustTake(t, everyEnd, func() {
			if err := c.ask(200); err != nil {
				t.Errorf("after a reset %d bytes off: %v", off, err)
			}
		})
		c.close()
	}
}

// Entries of flows that are used do not end, and those of idle ones end as they
// would have. Where an entry ended, the next packet of its flow would go to
// another endpoint, where nobody listens.
func timeouts(t lab.Test, w world) {
	// Shorter than the time between two packets that the host's stack gets to
	// renew a witness.
	mustSet(t, w, "tcp_timeout_established=4", "tcp_timeout_unacknowledged=1", "udp_timeout_stream=1", "udp_timeout=3")
	client, server, other := w.pod(1, 1), w.pod(2, 1), w.pod(2, 2)
	service := serviceAddress()
	l, port := mustListenTCP(t, server)
	echo := mustEchoUDP(t, server)
	mustRule(t, w.Node(1), natTable("prerouting", "dstnat", dnat(service, at(server, port), "tcp")+"; add rule ip scenario prerouting "+dnat(service, at(server, echo), "udp")))
	busy := mustConnect(t, client, l, service)
	idle := mustConnect(t, client, l, at(server, port))
	busyUDP := mustConnectUDP(t, w, client, service)
	mustNft(t, w.Node(1), "flush chain ip scenario prerouting; add rule ip scenario prerouting "+dnat(service, at(other, 9), "tcp")+
		"; add rule ip scenario prerouting "+dnat(service, at(other, 9), "udp"))
	time.Sleep(settled)
	if w.express {
		w.mustTake(t, everyEnd, func() { idle.mustAsk(t, 200) })
	} else {
		idle.mustAsk(t, 200)
	}
	idlePort := idle.LocalAddr().(*net.TCPAddr).Port
	began := time.Now()
	has := func(n *lab.Node) bool {
		return t.Run(n, "sh", "-c", fmt.Sprintf("conntrack -L -p tcp --orig-port-src %d --orig-port-dst %d 2>/dev/null", idlePort, port)) != ""
	}
	used := make(chan error, 1)
	go func() { // apart, since conntrack's program may take longer than a timeout
		used <- func() error {
			for time.Since(began) < 7*time.Second {
				if err := busy.ask(1); err != nil {
					return fmt.Errorf("a TCP connection that was used all the time after %s: %w", time.Since(began), err)
				}
				if err := busyUDP.ask(1); err != nil {
					return fmt.Errorf("a UDP flow that was used all the time after %s: %w", time.Since(began), err)
				}
				time.Sleep(5 * time.Millisecond)
			}
			return nil
		}()
	}()
	time.Sleep(2500*time.Millisecond - time.Since(began))
	for _, n := range w.Nodes {
		if known := has(n); !known && time.Since(began) < 4*time.Second {
			t.Errorf("%s has forgotten an idle connection after %s, with a timeout of 4 s", n, time.Since(began))
		}
	}
	time.Sleep(6500*time.Millisecond - time.Since(began))
	for _, n := range w.Nodes {
		if has(n) {
			t.Errorf("%s still knows an idle connection after %s, with a timeout of 4 s", n, time.Since(began))
		}
	}
	if err := <-used; err != nil {
		t.Fatal(err)
	}
}

// Connections without NAT survive it: conntrack picks them up again.
func flushedUnderLoad(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	tcp := mustConnect(t, client, l, at(server, port)).stream()
	defer tcp.cancel()
	udp := (&talk{Conn: mustDialUDP(t, client, at(server, mustEchoUDP(t, server)))}).stream()
	defer udp.cancel()
	time.Sleep(100 * time.Millisecond)
	for range 20 {
		for _, n := range w.Nodes {
			t.Run(n, "conntrack -F")
		}
		time.Sleep(30 * time.Millisecond)
	}
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	for name, s := range map[string]*stream{"TCP": tcp, "UDP": udp} {
		if lost, err := s.stop(); lost > 0 || err != nil {
			t.Errorf("%s: %d answers are missing: %v", name, lost, err)
		}
	}
}
