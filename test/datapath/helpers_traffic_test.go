//go:build linux

package datapath_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/test/lab"
)

// underlays are the two that everything has to work on.
var underlays = []lab.Underlay{lab.Virtual, lab.Wire}

// newTrafficLab is newLab on an underlay that merges what it delivers, as a
// network card does: veth hands packets to GRO only when the device that sends
// them can't send aggregates (veth_skb_is_eligible_for_gro), and here that is
// the bridge's port.
func newTrafficLab(tb testing.TB, opts lab.Options) (lab.Test, *lab.Lab) {
	tb.Helper()
	t, l := newLab(tb, opts)
	if opts.Underlay != lab.Virtual {
		for _, n := range l.Nodes {
			t.Run(l.Underlay, fmt.Sprintf("ethtool -K %s tso off", n))
		}
	}
	return t, l
}

// place is a node or a pod, with an address that others can send to.
type place struct {
	*lab.Space
	node *lab.Node
	ip   netip.Addr
}

func podPlace(p *lab.Pod) place   { return place{&p.Space, p.Node, p.IP} }
func hostPlace(n *lab.Node) place { return place{&n.Space, n, n.IP} }

// route is who talks to whom.
type route struct {
	from, to place
	underlay *lab.Space // where frames between them can be seen; may be nil
}

func between(from, to *lab.Pod) route { return route{from: podPlace(from), to: podPlace(to)} }

func (r route) String() string {
	return fmt.Sprintf("%s(%s)-%s(%s)",
		strings.ReplaceAll(r.from.String(), "/", ""), r.from.node.Kind,
		strings.ReplaceAll(r.to.String(), "/", ""), r.to.node.Kind)
}

// weftEnds are the ends of the route that run weft, each with its peer.
func (r route) weftEnds() [][2]*lab.Node {
	var ends [][2]*lab.Node
	for _, e := range [][2]*lab.Node{{r.from.node, r.to.node}, {r.to.node, r.from.node}} {
		if e[0].Kind == lab.Weft {
			ends = append(ends, e)
		}
	}
	return ends
}

// carried is what a node has carried to and from a peer.
type carried struct{ express, base, kernel ebpf.PathCounters }

// mustCarried reads the pins, as `weft peers` does.
func mustCarried(tb testing.TB, n, peer *lab.Node) carried {
	tb.Helper()
	view, err := ebpf.OpenView(n.Path("/sys/fs/bpf/weft"))
	if err != nil {
		tb.Fatal(err)
	}
	defer view.Close()
	peers, err := view.Peers()
	if err != nil {
		tb.Fatal(err)
	}
	var c carried
	for _, p := range peers {
		for i, counters := range p.Paths {
			if p.PublicIP != peer.IP {
				continue
			}
			switch ebpf.PathNames[i] {
			case "express":
				c.express = counters
			case "base":
				c.base = counters
			case "kernel":
				c.kernel = counters
			}
		}
	}
	return c
}

// sub is what was counted between two looks.
func (c carried) sub(before carried) carried {
	return carried{subCounters(c.express, before.express), subCounters(c.base, before.base), subCounters(c.kernel, before.kernel)}
}

func subCounters(a, b ebpf.PathCounters) ebpf.PathCounters {
	return ebpf.PathCounters{
		TxPackets: a.TxPackets - b.TxPackets, TxBytes: a.TxBytes - b.TxBytes,
		RxPackets: a.RxPackets - b.RxPackets, RxBytes: a.RxBytes - b.RxBytes,
	}
}

// total is the sum over the paths.
func (c carried) total() ebpf.PathCounters {
	var sum ebpf.PathCounters
	for _, path := range []ebpf.PathCounters{c.express, c.base, c.kernel} {
		sum.TxPackets += path.TxPackets
		sum.TxBytes += path.TxBytes
		sum.RxPackets += path.RxPackets
		sum.RxBytes += path.RxBytes
	}
	return sum
}

// txShare and rxShare are the base path's shares of the packets, 0 to 1.
func (c carried) txShare() float64 { return share(c.base.TxPackets, c.total().TxPackets) }
func (c carried) rxShare() float64 { return share(c.base.RxPackets, c.total().RxPackets) }

func share(part, whole uint64) float64 {
	if whole == 0 {
		return 0
	}
	return float64(part) / float64(whole)
}

// mustRideBase waits until single packets of a route ride the base path, both
// ways and at each end that runs weft. A test that begins with it does not
// pass by the kernel's merit alone.
func mustRideBase(t lab.Test, r route) {
	t.Helper()
	const packets = 5
	t.Eventually(5*time.Second, func() error {
		ends := r.weftEnds()
		before := make([]carried, len(ends))
		for i, e := range ends {
			before[i] = mustCarried(t, e[0], e[1])
		}
		if err := r.ask(t.Context(), packets); err != nil {
			return err
		}
		for i, e := range ends {
			now := mustCarried(t, e[0], e[1]).sub(before[i])
			if now.base.TxPackets < packets-1 || now.base.RxPackets < packets-1 {
				return fmt.Errorf("%s does not carry %s by the base path: %+v", e[0], r, now)
			}
		}
		return nil
	})
}

// ask pings along a route.
func (r route) ask(ctx context.Context, packets int) error {
	return r.from.Run(ctx, fmt.Sprintf("ping -q -n -c %d -i 0.01 -W 1 %s", packets, r.to.ip))
}

// overBase runs f and fails the test when the ends of the route that run weft
// carried nothing by the base path meanwhile.
func overBase(t lab.Test, r route, f func()) {
	t.Helper()
	ends := r.weftEnds()
	before := make([]carried, len(ends))
	for i, e := range ends {
		before[i] = mustCarried(t, e[0], e[1])
	}
	f()
	var packets uint64
	for i, e := range ends {
		now := mustCarried(t, e[0], e[1]).sub(before[i])
		packets += now.base.TxPackets + now.base.RxPackets
	}
	if len(ends) > 0 && packets == 0 {
		t.Error("the base path carried nothing of this")
	}
}

// mustWeft runs the program under test on a node.
func mustWeft(tb testing.TB, n *lab.Node, args ...string) string {
	tb.Helper()
	out, err := n.Output(tb.Context(), append([]string{weft}, args...)...)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// peerEntry is a peer as it stands in the config file.
type peerEntry struct {
	name     string
	prefixes []netip.Prefix
	ip       netip.Addr
	mac      string
}

func entryOf(n *lab.Node) peerEntry {
	return peerEntry{n.String(), []netip.Prefix{n.Prefix}, n.IP, n.MAC.String()}
}

func entriesOf(nodes ...*lab.Node) []peerEntry {
	var entries []peerEntry
	for _, n := range nodes {
		entries = append(entries, entryOf(n))
	}
	return entries
}

// mustConfigure writes a node's config file: what the lab writes, and what it
// can't express.
func mustConfigure(tb testing.TB, n *lab.Node, publicIP netip.Addr, peers ...peerEntry) {
	tb.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "interface: eth0\npublicIP: %s\nnetwork: [%s]\n", publicIP, lab.Network)
	fmt.Fprintf(&b, "node:\n  name: %s\n  prefixes: [%s]\n  mac: %q\n", n, n.Prefix, n.MAC)
	if len(peers) == 0 {
		b.WriteString("peers: []\n")
	} else {
		b.WriteString("peers:\n")
	}
	for _, p := range peers {
		var prefixes []string
		for _, prefix := range p.prefixes {
			prefixes = append(prefixes, prefix.String())
		}
		fmt.Fprintf(&b, "  - name: %s\n    prefixes: [%s]\n    publicIP: %s\n    mac: %q\n",
			p.name, strings.Join(prefixes, ", "), p.ip, p.mac)
	}
	mustWriteConfig(tb, n, b.String())
}

// mustWriteConfig puts a text in place of a node's config file, whole.
func mustWriteConfig(tb testing.TB, n *lab.Node, text string) {
	tb.Helper()
	path := n.Path(lab.StaticFile)
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		tb.Fatal(err)
	}
}

// mustListenUDP opens a UDP socket in a place.
func mustListenUDP(tb testing.TB, at place) *net.UDPConn {
	tb.Helper()
	var conn *net.UDPConn
	err := at.Do(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: at.ip.AsSlice()})
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	if err := conn.SetReadBuffer(8 << 20); err != nil {
		tb.Fatal(err)
	}
	return conn
}

// mustDialUDP opens a connected UDP socket in a place; control may set options
// before it is bound.
func mustDialUDP(tb testing.TB, at place, to netip.AddrPort, control ...func(fd int) error) *net.UDPConn {
	tb.Helper()
	var conn net.Conn
	err := at.Do(func() (err error) {
		conn, err = dialer(control).Dial("udp4", to.String())
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	return conn.(*net.UDPConn)
}

func dialer(control []func(fd int) error) *net.Dialer {
	return &net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, c syscall.RawConn) (err error) {
		failed := c.Control(func(fd uintptr) {
			for _, f := range control {
				err = errors.Join(err, f(int(fd)))
			}
		})
		return errors.Join(failed, err)
	}}
}

// option sets a socket option.
func option(level, name, value int) func(fd int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
}

// mustEchoUDP answers what comes to a port of a place with the same bytes.
func mustEchoUDP(tb testing.TB, at place) (port uint16) {
	tb.Helper()
	conn := mustListenUDP(tb, at)
	go func() {
		buffer := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				conn.WriteTo(buffer[:n], from)
			}
		}
	}()
	return uint16(conn.LocalAddr().(*net.UDPAddr).Port)
}

// askUDP sends datagrams of a size one by one, waits for each one's answer and
// tells how many came back as they were sent.
func askUDP(conn net.Conn, count, size int) string {
	intact, buffer := 0, make([]byte, 1<<16)
	for i := range count {
		datagram := pattern(uint64(i), size)
		if _, err := conn.Write(datagram); err != nil {
			return err.Error()
		}
		conn.SetReadDeadline(time.Now().Add(time.Second))
		n, err := conn.Read(buffer)
		if err == nil && bytes.Equal(buffer[:n], datagram) {
			intact++
		}
	}
	return fmt.Sprintf("%d of %d intact", intact, count)
}

// pattern is a reproducible content.
func pattern(seed uint64, size int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	content := make([]byte, size)
	rand.NewChaCha8(key).Read(content)
	return content
}

// mustListenTCP opens a TCP port in a place.
func mustListenTCP(tb testing.TB, at place) (*net.TCPListener, uint16) {
	tb.Helper()
	var l *net.TCPListener
	err := at.Do(func() (err error) {
		l, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: at.ip.AsSlice()})
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	return l, uint16(l.Addr().(*net.TCPAddr).Port)
}

// transferTCP sends content both ways at once over one connection to an
// address that leads to the listener, and tells whether it arrived intact.
func transferTCP(from place, listener *net.TCPListener, to netip.AddrPort, bytes int, control ...func(fd int) error) string {
	const limit = 20 * time.Second
	up, down := pattern(1, bytes), pattern(2, bytes)
	served := make(chan error, 1)
	go func() {
		listener.SetDeadline(time.Now().Add(limit))
		conn, err := listener.Accept()
		if err == nil {
			err = exchange(conn, down, up, limit)
		}
		served <- err
	}()
	var conn net.Conn
	err := from.Do(func() (err error) {
		conn, err = dialer(control).Dial("tcp4", to.String())
		return err
	})
	if err != nil {
		return err.Error()
	}
	if err := errors.Join(exchange(conn, up, down, limit), <-served); err != nil {
		return err.Error()
	}
	return "intact"
}

// exchange sends one content, expects the other, and closes.
func exchange(conn net.Conn, send, expect []byte, limit time.Duration) error {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write(send)
		sent <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	sum := sha256.New()
	n, err := io.Copy(sum, conn)
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if want := sha256.Sum256(expect); n != int64(len(expect)) || !bytes.Equal(sum.Sum(nil), want[:]) {
		return fmt.Errorf("%d of %d bytes came, or others than were sent", n, len(expect))
	}
	return nil
}

// mustTCPCounters reads a place's extended TCP counters (TcpExt of /proc/net/netstat).
func mustTCPCounters(tb testing.TB, at place, names ...string) map[string]int {
	tb.Helper()
	out, err := at.Output(tb.Context(), "cat /proc/net/netstat")
	if err != nil {
		tb.Fatal(err)
	}
	counters := map[string]int{}
	lines := strings.Split(out, "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		keys, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		if len(keys) == 0 || keys[0] != "TcpExt:" {
			continue
		}
		for j, key := range keys {
			if slices.Contains(names, key) {
				counters[key], _ = strconv.Atoi(values[j])
			}
		}
	}
	return counters
}

// iperf is an iperf3 client and its server.
type iperf struct {
	t              lab.Test
	client, server *lab.Process
}

var iperfPort atomic.Uint32

// startIperf starts iperf3 along a route with flags for the client.
func startIperf(t lab.Test, r route, flags string) iperf {
	t.Helper()
	port := 5200 + iperfPort.Add(1)
	server := t.Start(r.to, fmt.Sprintf("iperf3 -s -1 --forceflush -p %d", port))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := server.WaitOutput(ctx, "Server listening"); err != nil {
		t.Fatal(err)
	}
	return iperf{t, t.Start(r.from, fmt.Sprintf("iperf3 -c %s -p %d %s", r.to.ip, port, flags)), server}
}

// mustEnd waits for the end and fails the test when the client failed.
func (i iperf) mustEnd() {
	i.t.Helper()
	ctx, cancel := context.WithTimeout(i.t.Context(), 60*time.Second)
	defer cancel()
	if err := i.client.Wait(ctx); err != nil {
		i.t.Error(err)
	}
	if err := i.server.Wait(ctx); err != nil {
		i.t.Error(err)
	}
}

// pingSees is what a ping shows its user: how often it was answered, with
// which TTLs, and what errors came from where.
func pingSees(t lab.Test, r route, flags string) string {
	t.Helper()
	out, _ := r.from.Output(t.Context(), "sh", "-c", fmt.Sprintf("ping -n -i 0.02 -W 0.5 %s %s 2>&1", flags, r.to.ip))
	seen := map[string]bool{}
	for _, m := range pingTTL.FindAllString(out, -1) {
		seen[m] = true
	}
	for _, m := range pingError.FindAllStringSubmatch(out, -1) {
		seen[inRoles(r, sequence.ReplaceAllString(m[1]+m[2], ""))] = true
	}
	words := make([]string, 0, len(seen))
	for w := range seen {
		words = append(words, w)
	}
	slices.Sort(words)
	if m := pingCount.FindStringSubmatch(out); m != nil {
		words = append([]string{m[2] + " of " + m[1]}, words...)
	}
	return strings.Join(words, ", ")
}

var (
	pingTTL   = regexp.MustCompile(`ttl=\d+`)
	pingError = regexp.MustCompile(`(?m)^(?:From (\S+ icmp_seq=\d+ .*)|ping: (.*))$`)
	pingCount = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)
	sequence  = regexp.MustCompile(` icmp_seq=\d+`)
	address   = regexp.MustCompile(`\d+\.\d+\.\d+\.\d+`)
)

// inRoles puts the roles on a route in the place of addresses.
func inRoles(r route, text string) string {
	of := map[string]string{
		r.from.node.Gateway.String(): "own cni0", r.to.node.Gateway.String(): "remote cni0",
		r.from.node.VTEP.String(): "own flannel.1", r.to.node.VTEP.String(): "remote flannel.1",
		r.from.node.IP.String(): "own host", r.to.node.IP.String(): "remote host",
		r.from.ip.String(): "source", r.to.ip.String(): "destination",
	}
	return address.ReplaceAllStringFunc(text, func(a string) string {
		if role, ok := of[a]; ok {
			return role
		}
		return a
	})
}
