// Package load is traffic that misses nothing: it keeps going while something is done
// to a cluster's network, and reports every request that failed. A pod of the cluster
// makes it (test/cluster/pod), a test asks the pod for the report.
package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// Targets are whom to ask: addresses with ports.
type Targets struct {
	// Stream are servers that echo TCP. Each has one connection, which lives on.
	Stream []string
	// HTTP are web servers. Each request is a new connection to /who.
	HTTP []string
	// UDP are servers that echo datagrams.
	UDP []string
}

// The pace of a target: slow enough for all pairs of a cluster on two CPUs, and fast
// enough that no gap of a tenth of a second is missed.
const (
	streamPace = 20 * time.Millisecond
	httpPace   = 100 * time.Millisecond
	udpPace    = 20 * time.Millisecond
	// patience is how long an answer may take. Lost packets of TCP are sent again
	// within; of UDP none are, but a machine with much to do may take seconds.
	patience    = 10 * time.Second
	udpPatience = 4 * time.Second
)

// Count is what became of the requests of one kind.
type Count struct {
	Asked, Failed int
	// Resets are the failures by a connection that was reset or refused.
	Resets int
	// Slowest is the longest that an answer took.
	Slowest time.Duration
	// First are the first failures, in words.
	First []string
}

// Add adds those of another.
func (c *Count) Add(more Count) {
	c.Asked += more.Asked
	c.Failed += more.Failed
	c.Resets += more.Resets
	c.Slowest = max(c.Slowest, more.Slowest)
	for _, said := range more.First {
		c.remember(said)
	}
}

const remembered = 5

func (c *Count) remember(said string) {
	if len(c.First) < remembered {
		c.First = append(c.First, said)
	}
}

// String returns a line for people.
func (c Count) String() string {
	return fmt.Sprintf("%d requests, %d failed, %d of them reset, slowest %s", c.Asked, c.Failed, c.Resets, c.Slowest.Round(time.Millisecond))
}

// Report is what a load has seen, by kind.
type Report struct{ Stream, HTTP, UDP Count }

// Add adds what another has seen.
func (r *Report) Add(more Report) {
	r.Stream.Add(more.Stream)
	r.HTTP.Add(more.HTTP)
	r.UDP.Add(more.UDP)
}

// Failed is the number of failures of all kinds.
func (r Report) Failed() int { return r.Stream.Failed + r.HTTP.Failed + r.UDP.Failed }

// String returns a line of each kind.
func (r Report) String() string {
	return fmt.Sprintf("long-lived TCP: %s\nHTTP:           %s\nUDP:            %s", r.Stream, r.HTTP, r.UDP)
}

// Load is traffic that runs until Stop.
type Load struct {
	stop    context.CancelFunc
	askers  sync.WaitGroup
	mu      sync.Mutex
	report  Report
	started time.Time
}

// Start starts asking all targets.
func Start(t Targets) *Load {
	ctx, stop := context.WithCancel(context.Background())
	l := &Load{stop: stop, started: time.Now()}
	for _, to := range t.Stream {
		s := &stream{to: to}
		l.keepAsking(ctx, &l.report.Stream, to, streamPace, s.ask, s.close)
	}
	for _, to := range t.HTTP {
		l.keepAsking(ctx, &l.report.HTTP, to, httpPace, func() error { return fetch(to) }, nil)
	}
	for _, to := range t.UDP {
		u := &datagrams{to: to}
		l.keepAsking(ctx, &l.report.UDP, to, udpPace, u.ask, u.close)
	}
	return l
}

// Stop ends it and reports.
func (l *Load) Stop() Report {
	l.stop()
	l.askers.Wait()
	return l.report
}

// keepAsking asks at a pace until the end, and counts.
func (l *Load) keepAsking(ctx context.Context, count *Count, to string, pace time.Duration, ask func() error, end func()) {
	l.askers.Go(func() {
		if end != nil {
			defer end()
		}
		tick := time.NewTicker(pace)
		defer tick.Stop()
		for ctx.Err() == nil {
			began := time.Now()
			err := ask()
			l.note(count, to, began, err)
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
}

func (l *Load) note(count *Count, to string, began time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	count.Asked++
	count.Slowest = max(count.Slowest, time.Since(began))
	if err == nil {
		return
	}
	count.Failed++
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF) {
		count.Resets++
	}
	count.remember(fmt.Sprintf("%s after %s: %v", to, began.Sub(l.started).Round(time.Millisecond), err))
}

// stream is one connection on which messages come back.
type stream struct {
	to   string
	conn net.Conn
}

func (s *stream) ask() (err error) {
	if s.conn == nil {
		if s.conn, err = net.DialTimeout("tcp", s.to, patience); err != nil {
			s.conn = nil
			return err
		}
	}
	defer func() {
		if err != nil { // the next message goes by a new one
			s.close()
		}
	}()
	message := []byte("weft")
	if err := s.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := s.conn.Write(message); err != nil {
		return err
	}
	_, err = io.ReadFull(s.conn, message)
	return err
}

func (s *stream) close() {
	if s.conn != nil {
		_ = s.conn.Close() // nothing more is asked of it
		s.conn = nil
	}
}

// fetch gets a page by a new connection.
func fetch(to string) error {
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + to + "/who")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	_, err = io.ReadAll(answer.Body)
	return err
}

// datagrams are a flow of numbered datagrams that come back.
type datagrams struct {
	to     string
	conn   net.Conn
	number uint32
}

func (d *datagrams) ask() (err error) {
	if d.conn == nil {
		if d.conn, err = net.Dial("udp", d.to); err != nil {
			return err
		}
	}
	d.number++
	question, answer := fmt.Appendf(nil, "weft %d", d.number), make([]byte, 64)
	if err := d.conn.SetDeadline(time.Now().Add(udpPatience)); err != nil {
		return err
	}
	if _, err := d.conn.Write(question); err != nil {
		return err
	}
	for {
		n, err := d.conn.Read(answer)
		if err != nil {
			return fmt.Errorf("datagram %d: %w", d.number, err)
		}
		if string(answer[:n]) == string(question) { // else it is a late one
			return nil
		}
	}
}

func (d *datagrams) close() {
	if d.conn != nil {
		_ = d.conn.Close() // nothing more is asked of it
	}
}
