//go:build linux

package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// workload is one kind of traffic. The tests named after netperf's do what
// netperf does.
type workload struct {
	name, about string
	unit        string
	// serverCounts tells whose count is the result.
	serverCounts bool
	client       func(l load) (count, error)
	server       func(l load) (count, error)
	// settle is the least time before counting.
	settle time.Duration
}

// workloads are all kinds of traffic.
func workloads() []workload {
	return []workload{
		{"TCP_RR", "one byte there and one back over a standing connection", "transactions/s", false, tcpRR, tcpEcho, 0},
		{"UDP_RR", "one byte there and one back in datagrams", "transactions/s", false, udpRR, udpEcho, udpAssured},
		{"TCP_CRR", "connect, one byte there and one back, close", "transactions/s", false, tcpCRR, tcpEcho, 0},
		{"UDP_STREAM", "datagrams of 64 bytes one way, as they arrive", "packets/s", true, udpStream, udpSink, 0},
		{"TCP_STREAM", "one stream of bulk data, as it arrives", "Gbit/s", true, tcpStream(1), tcpSink(1), 0},
		{"TCP_STREAM8", "eight streams of bulk data at the same time", "Gbit/s", true, tcpStream(8), tcpSink(8), 0},
	}
}

// findWorkload finds one by its name.
func findWorkload(name string) (workload, error) {
	var names []string
	for _, w := range workloads() {
		if strings.EqualFold(w.name, name) {
			return w, nil
		}
		names = append(names, w.name)
	}
	return workload{}, usagef("there is no test %q; there are %s", name, strings.Join(names, ", "))
}

// load is what one side of a test is told.
type load struct {
	at   netip.AddrPort
	warm time.Duration
	time time.Duration
	// rate is how much junk is sent a second.
	rate int
}

// count is what one side counted, as it prints it for bench.
type count struct {
	Transactions uint64  `json:"transactions"`
	Bytes        uint64  `json:"bytes"`
	Lost         uint64  `json:"lost"`
	Seconds      float64 `json:"seconds"`
	// junk is how many datagrams of it came by a second, as bench has it.
	junk float64
}

// rate is the result in the workload's unit.
func (c count) rate(w workload) float64 {
	if c.Seconds == 0 {
		return 0
	}
	if w.unit == "Gbit/s" {
		return float64(c.Bytes) * 8 / 1e9 / c.Seconds
	}
	return float64(c.Transactions) / c.Seconds
}

const (
	// datagram is the payload of UDP_STREAM, in bytes.
	datagram = 64
	// chunk is how much TCP_STREAM hands over at a time.
	chunk = 128 << 10
	// udpAssured is when conntrack takes a UDP flow with replies for one that
	// will last: two seconds. What rules can tell of it does not change from then on.
	udpAssured = 2200 * time.Millisecond
	// lostAfter is when UDP_RR gives up on an answer.
	lostAfter = 100 * time.Millisecond
	// silence ends a UDP server that has been talked to.
	silence = 500 * time.Millisecond
	// serverReady is what a server prints when it may be talked to.
	serverReady = "ready"
)

// runLoad is "weftlab load", one side of a test: bench starts it in pods.
func runLoad(e *env, args []string) error {
	fs := newFlags(e, "load", "[flags] client|server TEST ADDRESS:PORT | junk HEX ADDRESS:PORT", "Makes the traffic of bench.")
	var l load
	fs.DurationVar(&l.warm, "warm", 200*time.Millisecond, "`time` before counting begins")
	fs.DurationVar(&l.time, "time", time.Second, "`time` to count")
	fs.IntVar(&l.rate, "rate", defaultJunkRate, "`number` of datagrams of junk a second")
	rest, err := parseFlags(fs, args, 3)
	if err != nil {
		return err
	}
	if len(rest) < 3 {
		return usagef(`load: "weftlab load -h" shows how to call it`)
	}
	side, err := findSide(rest[0], rest[1])
	if err != nil {
		return err
	}
	if l.at, err = netip.ParseAddrPort(rest[2]); err != nil {
		return usagef("load: %v", err)
	}

	// Nothing but the test shall run: no other program if that can be had, and
	// of Go's runtime neither scheduler nor garbage collector.
	runtime.GOMAXPROCS(1)
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, -20)
	debug.SetGCPercent(-1)
	c, err := side(l)
	if err != nil {
		return fmt.Errorf("%s of %s: %w", rest[0], rest[1], err)
	}
	return json.NewEncoder(e.stdout).Encode(c)
}

// findSide finds what a side of a test does, or who sends junk.
func findSide(side, what string) (func(load) (count, error), error) {
	if side == "junk" {
		datagram, err := hex.DecodeString(what)
		if err != nil {
			return nil, usagef("load: junk %q: %v", what, err)
		}
		return func(l load) (count, error) { return sendJunk(datagram, l) }, nil
	}
	w, err := findWorkload(what)
	if err != nil {
		return nil, err
	}
	do, ok := map[string]func(load) (count, error){"client": w.client, "server": w.server}[side]
	if !ok {
		return nil, usagef("load: %q is neither client nor server", side)
	}
	return do, nil
}

// announce tells bench that the server listens.
func announce() { fmt.Println(serverReady) }

// repeat makes transactions until the time is over, and counts those after the
// warm-up. The clock is looked at only now and then.
func (l load) repeat(transaction func(c *count) error) (count, error) {
	const often = 16
	run := func(d time.Duration) (count, error) {
		var c count
		for begun := time.Now(); ; {
			for range often {
				if err := transaction(&c); err != nil {
					return c, err
				}
			}
			if passed := time.Since(begun); passed >= d {
				c.Seconds = passed.Seconds()
				return c, nil
			}
		}
	}
	if _, err := run(l.warm); err != nil {
		return count{}, err
	}
	return run(l.time)
}

func tcpRR(l load) (count, error) {
	s, err := connect(unix.SOCK_STREAM, address(l.at))
	if err != nil {
		return count{}, err
	}
	defer s.close()
	if err := s.noDelay(); err != nil {
		return count{}, err
	}
	b := make([]byte, 1)
	return l.repeat(func(c *count) error { return ask(s, b, c) })
}

// ask sends a byte and waits for one.
func ask(s socket, b []byte, c *count) error {
	if err := s.write(b); err != nil {
		return err
	}
	n, err := s.read(b)
	if err != nil {
		return err
	}
	if n == 0 {
		return errors.New("the server closed the connection")
	}
	c.Transactions++
	return nil
}

func tcpCRR(l load) (count, error) {
	to, b := address(l.at), make([]byte, 1)
	return l.repeat(func(c *count) error {
		s, err := connect(unix.SOCK_STREAM, to)
		if err != nil {
			return err
		}
		defer s.close()
		return ask(s, b, c)
	})
}

// tcpEcho answers each byte with one, connection after connection, until it is
// killed.
func tcpEcho(l load) (count, error) {
	listener, err := listen(unix.SOCK_STREAM, l.at)
	if err != nil {
		return count{}, err
	}
	announce()
	b := make([]byte, 1)
	for {
		s, err := listener.accept()
		if err != nil {
			return count{}, err
		}
		if err := s.noDelay(); err != nil {
			return count{}, err
		}
		for {
			if n, err := s.read(b); err != nil || n == 0 {
				break
			}
			if err := s.write(b); err != nil {
				break
			}
		}
		s.close()
	}
}

func udpRR(l load) (count, error) {
	s, err := connect(unix.SOCK_DGRAM, address(l.at))
	if err != nil {
		return count{}, err
	}
	defer s.close()
	if err := s.patience(lostAfter); err != nil {
		return count{}, err
	}
	b := make([]byte, 1)
	return l.repeat(func(c *count) error {
		err := ask(s, b, c)
		if errors.Is(err, unix.EAGAIN) {
			c.Lost++
			return nil
		}
		return err
	})
}

// udpEcho answers each datagram of the first who talks to it, until it is
// killed. Like netperf's it is connected: one lookup less per answer.
func udpEcho(l load) (count, error) {
	s, err := listen(unix.SOCK_DGRAM, l.at)
	if err != nil {
		return count{}, err
	}
	announce()
	b := make([]byte, 1)
	_, from, err := unix.Recvfrom(int(s), b, 0)
	if err != nil {
		return count{}, err
	}
	if err := s.connectTo(from); err != nil {
		return count{}, err
	}
	for {
		if err := s.write(b); err != nil {
			return count{}, err
		}
		if _, err := s.read(b); err != nil {
			return count{}, err
		}
	}
}

func udpStream(l load) (count, error) {
	s, err := connect(unix.SOCK_DGRAM, address(l.at))
	if err != nil {
		return count{}, err
	}
	defer s.close()
	b := make([]byte, datagram)
	c, err := l.repeat(func(c *count) error {
		c.Transactions++
		// ENOBUFS: a queue on the way is full, which is a loss like any other.
		if err := s.write(b); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
		return nil
	})
	// Any of these tells the server that this was all. When it has gone for
	// that reason, the next is refused.
	for range 5 {
		time.Sleep(20 * time.Millisecond)
		if s.write(b[:1]) != nil {
			break
		}
	}
	return c, err
}

// udpSink counts datagrams until a short one, or silence, tells that it was
// all. Counting begins after the warm-up.
func udpSink(l load) (count, error) {
	s, err := listen(unix.SOCK_DGRAM, l.at)
	if err != nil {
		return count{}, err
	}
	if err := s.roomy(); err != nil {
		return count{}, err
	}
	announce()
	b := make([]byte, datagram)
	if _, err := s.read(b); err != nil {
		return count{}, err
	}
	if err := s.patience(silence); err != nil {
		return count{}, err
	}
	m := meter{every: 64, warm: l.warm, begun: time.Now()}
	for {
		n, err := s.read(b)
		if n < datagram || err != nil {
			return m.result(), nil
		}
		m.add(n)
	}
}

// tcpStream sends over a number of connections, to each as much as it takes.
func tcpStream(streams int) func(load) (count, error) {
	return func(l load) (count, error) {
		var all waiting
		for range streams {
			s, err := connect(unix.SOCK_STREAM, address(l.at))
			if err != nil {
				return count{}, err
			}
			defer s.close()
			if err := all.add(s, unix.POLLOUT); err != nil {
				return count{}, err
			}
		}
		b := make([]byte, chunk)
		return l.repeat(func(c *count) error {
			return all.each(func(s socket) error {
				n, err := s.writeSome(b)
				c.Transactions++
				c.Bytes += uint64(n)
				return err
			})
		})
	}
}

// tcpSink counts what a number of connections bring together, until the first
// of them ends.
func tcpSink(streams int) func(load) (count, error) {
	return func(l load) (count, error) {
		listener, err := listen(unix.SOCK_STREAM, l.at)
		if err != nil {
			return count{}, err
		}
		announce()
		var all waiting
		for range streams {
			s, err := listener.accept()
			if err != nil {
				return count{}, err
			}
			if err := all.add(s, unix.POLLIN); err != nil {
				return count{}, err
			}
		}
		b := make([]byte, chunk)
		m := meter{every: 1, warm: l.warm, begun: time.Now()}
		for {
			err := all.each(func(s socket) error {
				n, err := s.read(b)
				if n == 0 && err == nil {
					return io.EOF
				}
				m.add(n)
				return err
			})
			if errors.Is(err, io.EOF) {
				return m.result(), nil
			}
			if err != nil {
				return m.result(), err
			}
		}
	}
}

// meter counts what arrives after a warm-up. It reads the clock once in so many
// arrivals.
type meter struct {
	every       uint64
	warm        time.Duration
	begun, last time.Time
	counting    bool
	arrivals    uint64
	count       count
}

func (m *meter) add(bytes int) {
	m.count.Transactions++
	m.count.Bytes += uint64(bytes)
	if m.arrivals++; m.arrivals%m.every != 0 {
		return
	}
	m.last = time.Now()
	if !m.counting && m.last.Sub(m.begun) >= m.warm {
		m.counting, m.begun, m.count = true, m.last, count{}
	}
}

// result is the count up to now, that is up to the last arrival, save for the
// few since the clock was read.
func (m *meter) result() count {
	if !m.counting {
		return count{}
	}
	m.count.Seconds = m.last.Sub(m.begun).Seconds()
	return m.count
}
