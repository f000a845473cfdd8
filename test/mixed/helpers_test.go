//go:build linux && peers

package mixed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// Who runs the overlay of a node tells so at flannel's own health checks.
const (
	healthPort = "10401"
	readyBody  = "flanneld is ready"
)

// healthFlags are what both are told for that.
var healthFlags = []string{"--healthz-ip", "127.0.0.1", "--healthz-port", healthPort}

// start starts flanneld or weft on a node, and waits until it has done its work.
func start(tb testing.TB, n *lab.Node, who lab.Kind) {
	tb.Helper()
	n.Kind = who
	var err error
	if who == lab.Weft {
		err = n.LaunchAgent(weft)
	} else {
		err = n.StartFlanneld()
	}
	if err != nil {
		tb.Fatal(err)
	}
	waitForReady(tb, n)
	if err := n.WaitForPeers(tb.Context()); err != nil {
		tb.Fatal(err)
	}
}

// waitForReady waits until who runs the overlay of a node says so.
func waitForReady(tb testing.TB, n *lab.Node) {
	tb.Helper()
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := ready(n)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%s does not get ready: %v\n%s%s", n, err, n.FlanneldLog(), n.AgentLog())
		}
	}
}

// ready asks flannel's health check.
func ready(n *lab.Node) error {
	answer, err := n.HTTP().Get("http://127.0.0.1:" + healthPort + "/readyz")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && (answer.StatusCode != http.StatusOK || string(body) != readyBody) {
		err = fmt.Errorf("%s: %s", answer.Status, body)
	}
	return err
}

// stop ends what runs the overlay of a node.
func stop(tb testing.TB, n *lab.Node, sig syscall.Signal) {
	tb.Helper()
	var err error
	if n.Kind == lab.Weft {
		err = n.StopAgent(sig)
	} else {
		err = n.StopFlanneld(sig)
	}
	if err != nil {
		tb.Fatal(err)
	}
}

// mustReachAll fails unless all pods and nodes reach all pods of other nodes.
func mustReachAll(tb testing.TB, l *lab.Lab) {
	tb.Helper()
	if err := reachAll(tb.Context(), l); err != nil {
		tb.Fatalf("not everybody reaches everybody:\n%v", err)
	}
}

// reachAll tries every pair of pods on different nodes in both directions, from
// every node to the pods of others, and from every pod to the world outside.
func reachAll(ctx context.Context, l *lab.Lab) error {
	const atOnce = 4
	var (
		all    sync.WaitGroup
		places = make(chan struct{}, atOnce)
		mu     sync.Mutex
		errs   []error
	)
	try := func(f func() error) {
		all.Go(func() {
			places <- struct{}{}
			err := f()
			<-places
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	for _, n := range l.Nodes {
		for _, from := range n.Pods {
			try(func() error { return reachWorld(l, from) })
		}
		for _, peer := range n.Peers() {
			for _, to := range peer.Pods {
				for _, address := range to.Addresses() {
					try(func() error { return ping(ctx, n, address, 63) })
					for _, from := range n.Pods {
						try(func() error { return reach(ctx, from, to, address) })
					}
				}
			}
		}
	}
	all.Wait()
	const shown = 3
	if len(errs) > shown {
		errs = append(errs[:shown], fmt.Errorf("and %d more", len(errs)-shown))
	}
	return errors.Join(errs...)
}

// reach tries ping, UDP and TCP between two pods, with small packets and with such
// as have to be cut into pieces.
func reach(ctx context.Context, from, to *lab.Pod, address netip.Addr) error {
	return errors.Join(
		ping(ctx, from, address, 62),
		ping(ctx, from, address, 62, "-s", "4000"),
		reachUDP(from, to, address),
		reachTCP(from, to, address),
	)
}

// ping wants one answer of three, with a TTL: the first large packet may be told
// to be smaller.
func ping(ctx context.Context, from lab.Runner, address netip.Addr, ttl int, flags ...string) error {
	command := append([]string{"ping", "-n", "-c", "3", "-i", "0.1", "-W", "2"}, flags...)
	out, err := from.Output(ctx, append(command, address.String())...)
	if err == nil && !strings.Contains(out, fmt.Sprintf("ttl=%d ", ttl)) {
		err = fmt.Errorf("%s to %s: want ttl=%d:\n%s", from, address, ttl, out)
	}
	return err
}

// reachUDP wants a packet of 8000 bytes to come back whole, once in three times.
func reachUDP(from, to *lab.Pod, address netip.Addr) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("UDP from %s to %s (%s): %w", from, to, address, err)
		}
	}()
	var server net.PacketConn
	if err := to.Do(func() (err error) {
		server, err = net.ListenPacket("udp", net.JoinHostPort(address.String(), "0"))
		return err
	}); err != nil {
		return err
	}
	defer server.Close()
	go func() {
		buffer := make([]byte, 1<<16)
		for {
			n, who, err := server.ReadFrom(buffer)
			if err != nil {
				return // closed
			}
			_, _ = server.WriteTo(buffer[:n], who) // what is lost is asked for again
		}
	}()
	client, err := from.Dial("udp", server.LocalAddr().String())
	if err != nil {
		return err
	}
	defer client.Close()
	question, answer := bytes.Repeat([]byte("weft"), 2000), make([]byte, 1<<16)
	for range 3 {
		if _, err = client.Write(question); err != nil {
			continue // larger than the path takes, as was just learnt
		}
		if err := client.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return err
		}
		var n int
		if n, err = client.Read(answer); err == nil && bytes.Equal(answer[:n], question) {
			return nil
		}
	}
	return errors.Join(err, errors.New("no answer that is right"))
}

// reachTCP wants 300 kB to come back as they were sent.
func reachTCP(from, to *lab.Pod, address netip.Addr) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("TCP from %s to %s (%s): %w", from, to, address, err)
		}
	}()
	var listener net.Listener
	if err := to.Do(func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address.String(), "0"))
		return err
	}); err != nil {
		return err
	}
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return // closed
		}
		defer conn.Close()
		_, _ = io.Copy(conn, conn) // the other side finds out
	}()
	client, err := from.Dial("tcp", listener.Addr().String())
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	sent := bytes.Repeat([]byte("weft's"), 50_000)
	go func() { _, _ = client.Write(sent) }() // the reader finds out
	received := make([]byte, len(sent))
	if _, err := io.ReadFull(client, received); err != nil {
		return err
	}
	if !bytes.Equal(received, sent) {
		return errors.New("what came back is not what was sent")
	}
	return nil
}

// reachWorld connects a pod to the world outside, which must see the node's
// address: pods are masqueraded there.
func reachWorld(l *lab.Lab, from *lab.Pod) error {
	for i, address := range from.Node.Addresses() {
		outside := []netip.Addr{lab.Gateway, lab.GatewayV6}
		if l.Options.Families == lab.IPv6 {
			outside = outside[1:]
		}
		var listener net.Listener
		if err := l.Underlay.Do(func() (err error) {
			listener, err = net.Listen("tcp", net.JoinHostPort(outside[i].String(), "0"))
			return err
		}); err != nil {
			return err
		}
		defer listener.Close()
		client, err := from.Dial("tcp", listener.Addr().String())
		if err != nil {
			return fmt.Errorf("%s to the world: %w", from, err)
		}
		defer client.Close()
		served, err := listener.Accept()
		if err != nil {
			return err
		}
		defer served.Close()
		if seen := served.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); seen != address {
			return fmt.Errorf("%s to the world: it is seen as %s, want its node's %s", from, seen, address)
		}
	}
	return nil
}

// mustHold waits until a node's kernel holds a state, and fails with the
// difference.
func mustHold(tb testing.TB, n *lab.Node, want, whose string) {
	tb.Helper()
	lab.T(tb).Eventually(10*time.Second, func() error {
		got, err := n.KernelState(tb.Context())
		if err == nil && got != want {
			err = fmt.Errorf("%s differs from %s (-) in\n%s", n, whose, lab.Diff(want, got))
		}
		return err
	})
}

// mustState is what a node's kernel holds when it changes no more.
func mustState(tb testing.TB, n *lab.Node) (state string) {
	tb.Helper()
	lab.T(tb).Eventually(20*time.Second, func() error {
		last := state
		time.Sleep(time.Second)
		var err error
		state, err = n.KernelState(tb.Context())
		if err == nil && state != last {
			err = fmt.Errorf("%s still changes:\n%s", n, lab.Diff(last, state))
		}
		return err
	})
	return state
}

// flannelAnnotations is what flannel's annotations of a Node begin with.
const flannelAnnotations = "flannel.alpha.coreos.com/"

// mustPublished is what a node has told the store of itself, by name.
func mustPublished(tb testing.TB, n *lab.Node, l *lab.Lab) map[string]string {
	tb.Helper()
	if l.Kube == nil {
		all, err := l.Etcd.Get(tb.Context(), lab.FlannelPrefix+"/subnets/")
		if err != nil {
			tb.Fatal(err)
		}
		maps.DeleteFunc(all, func(_, value string) bool { return !strings.Contains(value, `"PublicIP":"`+n.IP.String()+`"`) })
		return all
	}
	all, err := l.Kube.Annotations(tb.Context(), n)
	if err != nil {
		tb.Fatal(err)
	}
	maps.DeleteFunc(all, func(key, _ string) bool { return !strings.HasPrefix(key, flannelAnnotations) })
	return all
}

// mustOverlayMACs are those of a node's overlay devices.
func mustOverlayMACs(tb testing.TB, n *lab.Node) (all []string) {
	tb.Helper()
	for _, device := range n.Overlays() {
		shown := lab.T(tb).Run(n, "ip -o link show dev "+device)
		_, mac, _ := strings.Cut(shown, "link/ether ")
		all = append(all, strings.Fields(mac)[0])
	}
	return all
}

// mustSubnetFile is a node's subnet file.
func mustSubnetFile(tb testing.TB, n *lab.Node) string {
	tb.Helper()
	text, err := os.ReadFile(n.Path(lab.SubnetFile))
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}

// route is who sends to whom while something happens.
type route struct{ from, to *lab.Pod }

// mustLoseNothing lets pods send to each other by all families of the lab while f
// runs: UDP every 2 ms, ping every 5 ms and a TCP connection. It fails if anything
// was lost.
func mustLoseNothing(tb testing.TB, l *lab.Lab, routes []route, f func()) {
	tb.Helper()
	var ends []func()
	defer func() {
		for _, end := range ends {
			end()
		}
	}()
	for _, r := range routes {
		for _, v6 := range []bool{false, true} {
			if v6 && !l.Options.Families.Has6() || !v6 && !l.Options.Families.Has4() {
				continue
			}
			for _, o := range []lab.ProbeOptions{{IPv6: v6}, {IPv6: v6, ICMP: true, Interval: 5 * time.Millisecond}} {
				ends = append(ends, mustProbe(tb, r, o))
			}
			ends = append(ends, mustStream(tb, r, v6))
		}
	}
	f()
}

// mustIperf runs iperf3 between two pods, and returns what ends it and fails if it
// stood still for half a second or was cut off. What it had to send again is not
// judged: its count has what TCP sent too early on a busy machine, which that of
// the streams beside it has not.
func mustIperf(tb testing.TB, r route) func() {
	tb.Helper()
	t, address := lab.T(tb), r.to.Addresses()[0].String()
	server := t.Start(r.to, "iperf3", "--server", "--bind", address, "--one-off", "--forceflush")
	must(tb, server.WaitOutput(tb.Context(), "Server listening"))
	client := t.Start(r.from, "iperf3", "--client", address, "--time", "600", "--bitrate", "50M", "--interval", "0.5", "--format", "k", "--forceflush")
	must(tb, client.WaitOutput(tb.Context(), "Retr"))
	return func() {
		tb.Helper()
		running := client.Running()
		must(tb, client.Stop(syscall.SIGTERM))
		must(tb, server.Stop(syscall.SIGTERM))
		intervals, resent := iperfInterval.FindAllStringSubmatch(client.Output(), -1), 0
		intervals = intervals[:max(0, len(intervals)-1)] // the last was cut off
		for _, words := range intervals {
			again, err := strconv.Atoi(words[3])
			must(tb, err)
			resent += again
			if words[2] == "0.00" {
				tb.Errorf("iperf3 %s to %s stood still in its second %s", r.from, r.to, words[1])
			}
		}
		tb.Logf("iperf3 %s to %s: %d half seconds, %d segments sent again", r.from, r.to, len(intervals), resent)
		if !running || len(intervals) < 4 {
			tb.Errorf("iperf3 %s to %s, running at the end: %t\n%s", r.from, r.to, running, client.Output())
		}
	}
}

// iperfInterval is a line that iperf3 prints for an interval: its seconds, the rate
// in kbit/s, and how many segments were sent again.
var iperfInterval = regexp.MustCompile(`(?m)^\[ *\d+\] +([\d.]+-[\d.]+) +sec +[\d.]+ \w+ +([\d.]+) Kbits/sec +(\d+) +[\d.]+ \w+ *$`)

// mustProbe starts a probe, and returns what ends it and fails if it lost
// anything.
func mustProbe(tb testing.TB, r route, o lab.ProbeOptions) func() {
	tb.Helper()
	p, err := lab.StartProbe(r.from, r.to, o)
	if err != nil {
		tb.Fatal(err)
	}
	return func() {
		tb.Helper()
		result, err := p.Stop()
		if err != nil || result.Lost > 0 || result.Sent == 0 {
			tb.Errorf("probe %s to %s (%+v): %s, %v", r.from, r.to, o, result, err)
		}
	}
}

// mustStream is mustProbe for a TCP connection.
func mustStream(tb testing.TB, r route, v6 bool) func() {
	tb.Helper()
	address := r.to.IP
	if v6 {
		address = r.to.IPv6
	}
	s, err := lab.StartStream(r.from, r.to, address)
	if err != nil {
		tb.Fatal(err)
	}
	return func() {
		tb.Helper()
		result, err := s.Stop()
		if err != nil || result.Lost > 0 || result.Bytes == 0 {
			tb.Errorf("stream %s to %s (%s): %s, %v", r.from, r.to, address, result, err)
		}
	}
}
