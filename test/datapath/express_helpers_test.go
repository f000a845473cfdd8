//go:build linux

package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/test/lab"
)

// What the express path carries meets no rule and no route: it has to be as if
// it had. So each scenario is played twice with the same outcome asserted: on
// nodes that do express, and on nodes that have no weft at all. Where express is
// there, the counters have to tell that it carried the packets, or that it did
// not.
//
//	n1             n2
//	   p1 p2 p3       p1 p2 p3        and the underlay, as a host beside them

// world is a lab in which a scenario is played.
type world struct {
	*lab.Lab
	// express tells that the nodes do express; else they have no weft.
	express bool
}

// expressScenario is something that happens. It leaves the nodes as it found
// them, but for conntrack's entries.
type expressScenario struct {
	name string
	play func(t lab.Test, w world)
}

// playEverywhere plays scenarios one after the other, in a lab on each road.
func playEverywhere(t *testing.T, opts lab.Options, scenarios []expressScenario) {
	t.Run("express", func(t *testing.T) { playExpress(t, opts, scenarios) })
	t.Run("kernel", func(t *testing.T) {
		opts.Kinds = []lab.Kind{lab.Kernel}
		playIn(t, newWorld(t, opts), scenarios)
	})
}

// playExpress plays scenarios on nodes that do express only, for what they
// assert of the counters or of the agent.
func playExpress(t *testing.T, opts lab.Options, scenarios []expressScenario) {
	playIn(t, newWorld(t, opts), scenarios)
}

func playIn(t *testing.T, w world, scenarios []expressScenario) {
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) { s.play(lab.T(t), w) })
	}
}

// newWorld makes a lab of two nodes with three pods each, and kube-proxy's rules.
func newWorld(tb testing.TB, opts lab.Options) world {
	tb.Helper()
	if opts.Pods == 0 {
		opts.Pods = 3
	}
	opts.Netfilter = true
	t, l := newLab(tb, opts)
	w := world{l, len(opts.Kinds) == 0 || slices.Contains(opts.Kinds, lab.Weft)}
	for _, n := range l.Nodes {
		// The kernel limits the rate of ICMP errors, and tests are impatient.
		if err := n.Sysctl("net/ipv4/icmp_ratemask", "0"); err != nil {
			tb.Fatal(err)
		}
	}
	if w.express {
		t.Eventually(10*time.Second, func() error { return expressReady(t, l) })
	}
	return w
}

// expressReady tells what keeps a lab's weft nodes from express.
func expressReady(t lab.Test, l *lab.Lab) error {
	t.Helper()
	for _, n := range l.Nodes {
		if n.Kind != lab.Weft {
			continue
		}
		if e := mustStatus(t, n).Express; !e.On || e.Pods != len(n.Pods) {
			return fmt.Errorf("%s does no express, or knows not all of its pods: %+v", n, e)
		}
	}
	return nil
}

// pod is a place by its node's and its own number.
func (w world) pod(node, pod int) place { return podPlace(w.Pod(node, pod)) }

// paths are packets by the way that they took.
type paths struct{ express, base, kernel uint64 }

func (p paths) share() float64 {
	if all := p.express + p.base + p.kernel; all > 0 {
		return float64(p.express) / float64(all)
	}
	return 0
}

func (p paths) String() string {
	return fmt.Sprintf("%d express, %d base, %d kernel", p.express, p.base, p.kernel)
}

// ends are the places where packets between n1 and n2 are counted: what n1 sent
// is "n1 tx".
var ends = []string{"n1 tx", "n1 rx", "n2 tx", "n2 rx"}

// ledger is what was carried, by end.
type ledger map[string]paths

func (l ledger) String() string {
	var b strings.Builder
	for _, end := range ends {
		if p, ok := l[end]; ok {
			fmt.Fprintf(&b, "%s: %s; ", end, p)
		}
	}
	return strings.TrimSuffix(b.String(), "; ")
}

func (l ledger) sub(before ledger) ledger {
	now := ledger{}
	for end, p := range l {
		b := before[end]
		now[end] = paths{p.express - b.express, p.base - b.base, p.kernel - b.kernel}
	}
	return now
}

// ledger reads the counters of the weft nodes among n1 and n2.
func (w world) ledger(tb testing.TB) ledger {
	tb.Helper()
	l := ledger{}
	for _, e := range (route{from: hostPlace(w.Node(1)), to: hostPlace(w.Node(2))}).weftEnds() {
		var tx, rx paths
		for i, c := range mustPathCounters(tb, e[0], e[1]) {
			switch ebpf.PathNames[i] {
			case "express":
				tx.express, rx.express = c.TxPackets, c.RxPackets
			case "base":
				tx.base, rx.base = c.TxPackets, c.RxPackets
			case "kernel":
				tx.kernel, rx.kernel = c.TxPackets, c.RxPackets
			}
		}
		l[e[0].String()+" tx"], l[e[0].String()+" rx"] = tx, rx
	}
	return l
}

// mustPathCounters reads a node's counters of a peer, in the order of
// ebpf.PathNames.
func mustPathCounters(tb testing.TB, n, peer *lab.Node) []ebpf.PathCounters {
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
	for _, p := range peers {
		if p.PublicIP == peer.IP {
			return p.Paths[:]
		}
	}
	return nil
}

// everyEnd has express carry a flow all the way.
const everyEnd = "n1 tx, n1 rx, n2 tx, n2 rx"

// mostly is the share of the packets that has to take express: handshakes,
// closes and renewals don't.
const mostly = 0.8

// mustTake runs f and fails the test unless most of what was carried went by
// express at the ends that are listed, and nothing at the others. Without weft
// it just runs f.
func (w world) mustTake(t lab.Test, list string, f func()) {
	t.Helper()
	if err := w.take(t, list, f); err != nil {
		t.Errorf("%v\n%s", err, w.reasons(t))
	}
}

// mustComeToTake is mustTake for flows that express may have to get to know
// again: f is run until it is so.
func (w world) mustComeToTake(t lab.Test, list string, f func()) {
	t.Helper()
	t.Eventually(5*time.Second, func() error { return w.take(t, list, f) })
}

// take runs f and tells what was not carried as it is to be.
func (w world) take(t lab.Test, list string, f func()) error {
	t.Helper()
	if !w.express {
		f()
		return nil
	}
	before := w.ledger(t)
	f()
	now := w.ledger(t).sub(before)
	wrong := false
	for end, p := range now {
		if strings.Contains(list, end) {
			wrong = wrong || p.share() < mostly
		} else {
			wrong = wrong || p.express > 0
		}
	}
	if wrong {
		return fmt.Errorf("express is to carry %q and nothing else; carried were %s", list, now)
	}
	return nil
}

// reasons are what the nodes have counted, for people.
func (w world) reasons(t lab.Test) string {
	t.Helper()
	var b strings.Builder
	for _, n := range w.Nodes {
		if n.Kind != lab.Weft {
			continue
		}
		fmt.Fprintf(&b, "%s:", n)
		for _, r := range mustStatus(t, n).Reasons {
			if r.Passed+r.Dropped > 0 {
				fmt.Fprintf(&b, " %s %d/%d", r.Name, r.Passed, r.Dropped)
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// passed is how often a weft node passed packets on for a reason, else 0.
func (w world) passed(t lab.Test, node int, reason string) uint64 {
	t.Helper()
	if w.Node(node).Kind != lab.Weft {
		return 0
	}
	passed, _ := mustReason(t, w.Node(node), reason)
	return passed
}

// answerTime is how long a question may be without answer before it counts as
// lost: TCP's own repetitions fit in.
const answerTime = 2 * time.Second

// talk is a TCP connection or a pair of UDP sockets: the client asks, the server
// answers with the same bytes.
type talk struct {
	net.Conn
	peer netip.AddrPort // as which the server sees the client
	serv net.Conn       // the server's end, of TCP
	next byte
}

// mustConnect connects to an address that leads to a listener of mustListenTCP.
func mustConnect(t lab.Test, from place, listener *net.TCPListener, to netip.AddrPort, control ...func(fd int) error) *talk {
	t.Helper()
	c, err := connectTCP(from, listener, to, control...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

func connectTCP(from place, listener *net.TCPListener, to netip.AddrPort, control ...func(fd int) error) (*talk, error) {
	c := &talk{}
	err := from.Do(func() (err error) {
		d := dialer(control)
		d.Timeout = answerTime
		c.Conn, err = d.Dial("tcp4", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	listener.SetDeadline(time.Now().Add(answerTime))
	if c.serv, err = listener.Accept(); err != nil {
		c.Conn.Close()
		return nil, err
	}
	c.peer = c.serv.RemoteAddr().(*net.TCPAddr).AddrPort()
	go func() {
		buffer := make([]byte, 1<<16)
		for {
			n, err := c.serv.Read(buffer)
			if err != nil {
				return
			}
			if _, err := c.serv.Write(buffer[:n]); err != nil {
				return
			}
		}
	}()
	return c, nil
}

// close closes without waiting for the other end.
func (c *talk) close() {
	c.Conn.Close()
	if c.serv != nil {
		c.serv.Close()
	}
}

// askOnce asks and waits for the answer. Answers to earlier questions that came
// late are passed over.
func (c *talk) askOnce(patience time.Duration) error {
	c.next++
	question := [64]byte{0: c.next}
	if _, err := c.Write(question[:]); err != nil {
		return err
	}
	c.SetReadDeadline(time.Now().Add(patience))
	var answer [64]byte
	for {
		if _, err := io.ReadFull(c.Conn, answer[:]); err != nil {
			return err
		}
		if answer[0] == c.next {
			return nil
		}
	}
}

// ask asks a number of times and returns an error at the first without answer.
func (c *talk) ask(times int) error {
	for i := range times {
		if err := c.askOnce(answerTime); err != nil {
			return fmt.Errorf("question %d of %d: %w", i+1, times, err)
		}
	}
	return nil
}

// mustAsk is ask that fails the test.
func (c *talk) mustAsk(t lab.Test, times int) {
	t.Helper()
	if err := c.ask(times); err != nil {
		t.Fatal(err)
	}
}

// askFor asks again and again for a time.
func (c *talk) askFor(d, pause time.Duration) error {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(pause) {
		if err := c.ask(1); err != nil {
			return err
		}
	}
	return nil
}

// assuredAfter is how long a UDP flow has to be answered until conntrack calls it
// assured. With that express ends for a moment.
const assuredAfter = 2300 * time.Millisecond

// mustConnectUDP makes a UDP flow that conntrack calls assured, to an address that
// leads to an echo. Without express there is nothing to wait for.
func mustConnectUDP(t lab.Test, w world, from place, to netip.AddrPort, control ...func(fd int) error) *talk {
	t.Helper()
	c := &talk{Conn: mustDialUDP(t, from, to, control...)}
	mustAssure(t, w, c)
	return c
}

// mustAssure asks until conntrack calls UDP flows assured.
func mustAssure(t lab.Test, w world, flows ...*talk) {
	t.Helper()
	after := assuredAfter
	if !w.express {
		after = 20 * time.Millisecond
	}
	for end := time.Now().Add(after); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for _, c := range flows {
			c.mustAsk(t, 1)
		}
	}
}

// stream asks all the time, without waiting for the answers, and knows when the
// last came.
type stream struct {
	*talk
	stopped  chan struct{}
	once     sync.Once
	asking   sync.WaitGroup
	running  sync.WaitGroup
	mu       sync.Mutex
	asked    int // bytes
	answered int
	last     time.Time
	err      error
}

// streamInterval is how far the questions of a stream are apart.
const streamInterval = time.Millisecond

// stream starts to ask.
func (c *talk) stream() *stream {
	s := &stream{talk: c, stopped: make(chan struct{}), last: time.Now()}
	c.SetReadDeadline(time.Time{})
	s.running.Go(func() {
		buffer := make([]byte, 1<<16)
		for {
			n, err := c.Read(buffer)
			s.mu.Lock()
			if err == nil {
				s.answered += n
				s.last = time.Now()
			} else if !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNREFUSED) && !isTimeout(err) {
				s.err = errors.Join(s.err, err)
			}
			s.mu.Unlock()
			if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return
			}
		}
	})
	s.asking.Go(func() {
		tick := time.NewTicker(streamInterval)
		defer tick.Stop()
		for {
			select {
			case <-s.stopped:
				return
			case <-tick.C:
			}
			// A full window of a connection that is cut must not hold us.
			c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			var question [64]byte
			n, _ := c.Write(question[:])
			s.mu.Lock()
			s.asked += n
			s.mu.Unlock()
		}
	})
	return s
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// lastAnswer is when the last answer came.
func (s *stream) lastAnswer() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// cancel ends the asking.
func (s *stream) cancel() { s.end(0) }

// stop ends the asking, waits for answers that are under way, and tells how many
// are missing.
func (s *stream) stop() (lost int, err error) { return s.end(answerTime) }

func (s *stream) end(patience time.Duration) (lost int, err error) {
	s.once.Do(func() { close(s.stopped) })
	s.asking.Wait()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		s.mu.Lock()
		done := s.answered >= s.asked || s.err != nil
		s.mu.Unlock()
		if done {
			break
		}
	}
	s.SetReadDeadline(time.Now())
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return (s.asked - s.answered + 63) / 64, s.err
}

// mustLive waits until answers come.
func (s *stream) mustLive(t lab.Test, within time.Duration) {
	t.Helper()
	began := time.Now()
	t.Eventually(within, func() error {
		if last := s.lastAnswer(); last.Before(began) {
			return fmt.Errorf("no answer since %s", time.Since(last))
		}
		return nil
	})
}

// atEnd runs a command when the scenario is over, however it ended.
func atEnd(t lab.Test, where interface {
	Run(context.Context, ...string) error
}, command ...string,
) {
	t.Helper()
	t.Cleanup(func() {
		if err := where.Run(context.Background(), command...); err != nil {
			t.Error(err)
		}
	})
}

// mustNft loads rules on a node.
func mustNft(t lab.Test, n lab.Runner, rules string) {
	t.Helper()
	t.Run(n, "nft", rules)
}

// at is an address of a place.
func at(p place, port uint16) netip.AddrPort { return netip.AddrPortFrom(p.ip, port) }
