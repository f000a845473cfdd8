//go:build linux

package lab

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Stream is a TCP connection between two pods on which both sides write all the
// time, at a pace that loses nothing on its own. It asks the kernel for each segment
// that was lost, which iperf3 can't: that counts as sent again also what was only
// late.
type Stream struct {
	ends    [2]*net.TCPConn
	begun   time.Time
	stop    chan struct{}
	writers sync.WaitGroup
	readers sync.WaitGroup

	mu     sync.Mutex
	sent   int64
	moved  int64
	resent []time.Duration
	err    error
}

// StreamResult is what a Stream saw.
type StreamResult struct {
	// Bytes were received, both directions together.
	Bytes int64
	// Lost is the number of segments that TCP had to send again. Those that it sent
	// again too early, as on a busy machine, are not among them: the other side says
	// that they came twice.
	Lost int
	// Resent is when, since the start, segments were found to be sent again.
	Resent []time.Duration
}

// String returns a line for people.
func (r StreamResult) String() string {
	return fmt.Sprintf("%d bytes received, %d segments lost, sent again at %v", r.Bytes, r.Lost, r.Resent)
}

const (
	// streamPace is the time between writes, and streamChunk what is written: 4
	// MB/s, more than one segment at a time.
	streamPace  = time.Millisecond
	streamChunk = 4000
	// streamSettle is how long the kernels may still talk about what has arrived.
	streamSettle = 300 * time.Millisecond
	// streamTimeout is how long a write or a read may hang.
	streamTimeout = 10 * time.Second
)

// StartStream connects one pod to an address of another and begins to write.
func StartStream(from, to *Pod, address netip.Addr) (*Stream, error) {
	for _, pod := range []*Pod{from, to} {
		// No tail loss probes: on a busy machine there are hundreds that nothing was
		// lost for, and taken together the counts of them are off by a few.
		if err := pod.Sysctl("net/ipv4/tcp_early_retrans", "0"); err != nil {
			return nil, err
		}
	}
	s := &Stream{stop: make(chan struct{}), begun: time.Now()}
	var listener net.Listener
	err := to.Do(func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address.String(), "0"))
		return err
	})
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	dialled, err := from.Dial("tcp", listener.Addr().String())
	if err != nil {
		return nil, fmt.Errorf("stream %s to %s: %w", from, to, err)
	}
	accepted, err := listener.Accept()
	if err != nil {
		dialled.Close()
		return nil, fmt.Errorf("stream %s to %s: %w", from, to, err)
	}
	s.ends = [2]*net.TCPConn{dialled.(*net.TCPConn), accepted.(*net.TCPConn)}
	for _, end := range s.ends {
		s.writers.Go(func() { s.note(s.write(end)) })
		s.readers.Go(func() { s.note(s.read(end)) })
	}
	return s, nil
}

// write writes until Stop.
func (s *Stream) write(end *net.TCPConn) error {
	chunk := make([]byte, streamChunk)
	tick := time.NewTicker(streamPace)
	defer tick.Stop()
	var resent uint32
	for {
		select {
		case <-s.stop:
			return nil
		case <-tick.C:
		}
		if err := end.SetWriteDeadline(time.Now().Add(streamTimeout)); err != nil {
			return err
		}
		n, err := end.Write(chunk)
		s.mu.Lock()
		s.sent += int64(n)
		s.mu.Unlock()
		if err != nil {
			return err
		}
		info, err := tcpInfo(end)
		if err != nil {
			return err
		}
		if info.Total_retrans > resent {
			resent = info.Total_retrans
			s.mu.Lock()
			s.resent = append(s.resent, time.Since(s.begun).Round(time.Millisecond))
			s.mu.Unlock()
		}
	}
}

// read counts what comes until the other side says that it was all.
func (s *Stream) read(end *net.TCPConn) error {
	buffer := make([]byte, 1<<16)
	for {
		if err := end.SetReadDeadline(time.Now().Add(streamTimeout)); err != nil {
			return err
		}
		n, err := end.Read(buffer)
		s.mu.Lock()
		s.moved += int64(n)
		s.mu.Unlock()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *Stream) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = errors.Join(s.err, err)
}

// Stop ends the writing, waits until all has arrived, and tells what was seen. The
// error is about the connection: it hung or was reset.
func (s *Stream) Stop() (StreamResult, error) {
	close(s.stop)
	s.writers.Wait()
	s.waitForAll()
	var lost int
	for _, end := range s.ends {
		info, err := tcpInfo(end)
		if err == nil {
			lost += int(info.Total_retrans) - int(info.Dsack_dups)
		}
		s.note(err)
		s.note(end.CloseWrite())
	}
	s.readers.Wait()
	for _, end := range s.ends {
		end.Close()
	}
	return StreamResult{Bytes: s.moved, Lost: lost, Resent: s.resent}, s.err
}

// waitForAll returns when all that was sent has arrived and nothing about it is
// under way any more, or after a while.
func (s *Stream) waitForAll() {
	for deadline := time.Now().Add(streamTimeout); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		s.mu.Lock()
		arrived := s.moved == s.sent || s.err != nil
		s.mu.Unlock()
		if arrived {
			break
		}
	}
	time.Sleep(streamSettle)
}

// tcpInfo is what the kernel knows of a connection.
func tcpInfo(end *net.TCPConn) (info *unix.TCPInfo, err error) {
	raw, err := end.SyscallConn()
	if err != nil {
		return nil, err
	}
	asked := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	return info, errors.Join(asked, err)
}
