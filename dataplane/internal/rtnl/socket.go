//go:build linux

// Package rtnl is a small rtnetlink socket, for what comes by the hundred:
// requests go many to a datagram, answers are parsed in place, and dumps are
// filtered by the kernel. It knows messages and attributes; what they mean is
// its callers' to know.
package rtnl

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// BatchSize is how many requests Batch takes, in one datagram. The kernel
	// may queue a refusal of about 1 KiB (with its overhead) of each before we can
	// read the first, and a default receive queue takes 208 KiB.
	BatchSize = 64
	// askSize is the same for Ask: an answer, such as a link, takes up to 4 KiB.
	askSize = 32
	// DumpTries is how often a dump is read until no change has come between,
	// where nothing speaks for fewer.
	DumpTries = 10

	// receiveSize is the size of the receive buffer in bytes: the kernel fills
	// at most 32 KiB per datagram of a dump (netlink_dump in
	// net/netlink/af_netlink.c).
	receiveSize = 64 << 10
	// gatherTime is the least time between two waits of Receive.
	gatherTime = 5 * time.Millisecond
	// answerTimeout bounds the wait for an answer. The kernel answers within
	// milliseconds, but for the time that others hold its RTNL lock.
	answerTimeout = 30 * time.Second
)

// Socket is a rtnetlink socket of the namespace it was opened in. It serves one
// caller at a time; Close may be called meanwhile.
type Socket struct {
	file *os.File
	conn syscall.RawConn
	port uint32
	seq  uint32
	buf  []byte
	// waited is when Receive last began to wait.
	waited time.Time
}

// Open opens a socket in the namespace of the calling thread, which hears the
// given multicast groups (RTNLGRP_*).
func Open(groups ...int) (_ *Socket, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	s := &Socket{file: os.NewFile(uintptr(fd), "rtnetlink"), buf: make([]byte, receiveSize)}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("binding a netlink socket: %w", err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, fmt.Errorf("asking for a netlink socket's address: %w", err)
	}
	s.port = name.(*unix.SockaddrNetlink).Pid
	// Errors in words (4.12), without our request in them (4.3), and dumps that
	// the kernel filters, also those of other namespaces (4.20). A kernel
	// without them works too; that it answers for our own namespace is seen in
	// the answers.
	for _, option := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK, unix.NETLINK_GET_STRICT_CHK} {
		_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, option, 1)
	}
	// More than the machine's limit needs CAP_NET_ADMIN; we mostly have it.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 2<<20)
	for _, group := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			return nil, fmt.Errorf("joining netlink group %d: %w", group, err)
		}
	}
	s.conn, err = s.file.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return s, nil
}

// Close ends the socket; a Receive that waits returns an error.
func (s *Socket) Close() { _ = s.file.Close() }

// SetOption sets a socket option that is a number.
func (s *Socket) SetOption(level, option, value int) error {
	var optErr error
	err := s.conn.Control(func(fd uintptr) { optErr = unix.SetsockoptInt(int(fd), level, option, value) })
	return cmp.Or(err, optErr)
}

// Port is the socket's address in netlink, by which the kernel tells who caused an
// event.
func (s *Socket) Port() uint32 { return s.port }

// Drop has the kernel drop events as DropFilter says.
func (s *Socket) Drop(drops ...[]Match) {
	_ = s.conn.Control(func(fd uintptr) { SetFilter(int(fd), DropFilter(drops...)) })
}

// Receive waits for one datagram and returns its messages. ENOBUFS says that
// events were lost; the socket goes on. Of events that come one upon another the
// first is returned at once, and those behind it when some have gathered: each
// would wake its listener, and cost the machine more than it takes to read it.
func (s *Socket) Receive() (iter.Seq[Message], error) {
	return s.receive(time.Time{}, func() {
		time.Sleep(time.Until(s.waited.Add(gatherTime)))
		s.waited = time.Now()
	})
}

// receive returns the messages of one datagram. Before it waits for one, it calls
// idle.
func (s *Socket) receive(deadline time.Time, idle func()) (iter.Seq[Message], error) {
	if err := s.file.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := s.conn.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), s.buf, unix.MSG_TRUNC)
			if recvErr == unix.EAGAIN {
				idle()
			}
			return recvErr != unix.EAGAIN && recvErr != unix.EINTR
		})
		if err = cmp.Or(err, recvErr); err != nil { // without err, recvErr is final
			return nil, err
		}
		if n > len(s.buf) {
			return nil, fmt.Errorf("netlink datagram of %d bytes is larger than the buffer", n)
		}
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue // not from the kernel
		}
		return messages(s.buf[:n]), nil
	}
}

// answer is receive for what the kernel was asked for.
func (s *Socket) answer() (iter.Seq[Message], error) {
	return s.receive(time.Now().Add(answerTimeout), func() {})
}

// send sends one datagram.
func (s *Socket) send(b []byte) error {
	if err := s.file.SetWriteDeadline(time.Now().Add(answerTimeout)); err != nil {
		return err
	}
	var sendErr error
	err := s.conn.Write(func(fd uintptr) bool {
		sendErr = unix.Sendto(int(fd), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		return sendErr != unix.EAGAIN && sendErr != unix.EINTR
	})
	return cmp.Or(err, sendErr) // without err, sendErr is final
}

// ErrInterrupted says that the table changed while it was dumped.
var ErrInterrupted = errors.New("the table kept changing while it was read")

// Dump asks for a table and calls each for every answer of kind answer; data is
// valid until each returns. The kernel tells when the table changed under way,
// and then entries may be missing or twice: reset is called and all is read
// again, as UntilWhole does it.
func (s *Socket) Dump(tries int, makeRequest func() *Request, answer uint16, reset func(), each func(data []byte)) error {
	return UntilWhole(tries, func() (interrupted bool, err error) {
		reset()
		return s.dumpOnce(makeRequest(), answer, each)
	})
}

// UntilWhole reads a table again and again until it did not change meanwhile.
// After the given number of tries that is ErrInterrupted.
func UntilWhole(tries int, read func() (interrupted bool, err error)) error {
	for try := range tries {
		interrupted, err := read()
		if err != nil || !interrupted {
			return err
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
	}
	return ErrInterrupted
}

func (s *Socket) dumpOnce(r *Request, answer uint16, each func([]byte)) (interrupted bool, err error) {
	s.seq++
	if err := s.send(r.finish(s.seq)); err != nil {
		return false, err
	}
	for {
		received, err := s.answer()
		if err != nil {
			return false, err
		}
		for m := range received {
			if m.seq != s.seq || m.port != s.port {
				continue // the rest of an answer that we gave up on
			}
			interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.Kind {
			case answer:
				each(m.Data)
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				return interrupted, ackError(m)
			}
		}
	}
}

// Ask sends requests that have one answer each, many in one datagram, and calls
// each with the number of the request and its answer, or the kernel's refusal.
// data is valid until each returns. The error is about the asking itself.
func (s *Socket) Ask(requests []*Request, each func(i int, data []byte, refusal error)) error {
	for begin := 0; begin < len(requests); begin += askSize {
		some := requests[begin:min(begin+askSize, len(requests))]
		answered, open := make([]bool, len(some)), len(some)
		err := s.exchange(some, func(i int, m Message) (done bool) {
			if answered[i] {
				return false
			}
			answered[i] = true
			if m.Kind == unix.NLMSG_ERROR {
				each(begin+i, nil, cmp.Or(ackError(m), errNoAnswer))
			} else {
				each(begin+i, m.Data, nil)
			}
			open--
			return open == 0
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// errNoAnswer says that the kernel acknowledged a question without answering.
var errNoAnswer = errors.New("the kernel gave no answer")

// Batch sends requests, at most BatchSize, in one datagram and returns an error
// or nil for each. The kernel does them one after the other, in order, and goes
// on after one that fails.
//
// Of one that failed it always tells, so that only the last has to be acknowledged
// (netlink_rcv_skb in net/netlink/af_netlink.c).
func (s *Socket) Batch(requests []*Request) []error {
	errs := make([]error, len(requests))
	if len(requests) == 0 {
		return errs
	}
	last := len(requests) - 1
	requests[last].acknowledged()
	err := s.exchange(requests, func(i int, m Message) (done bool) {
		if m.Kind != unix.NLMSG_ERROR {
			return false
		}
		errs[i] = ackError(m)
		return i == last
	})
	if err != nil { // then nobody knows of the others
		for i := range errs {
			errs[i] = cmp.Or(errs[i], err)
		}
	}
	return errs
}

// exchange sends requests in one datagram and calls take for each message that
// comes back, with the number of the request, until that is all.
func (s *Socket) exchange(requests []*Request, take func(i int, m Message) (done bool)) error {
	first := s.seq + 1
	var b []byte
	for _, r := range requests {
		s.seq++
		b = append(b, r.finish(s.seq)...)
	}
	if err := s.send(b); err != nil {
		return err
	}
	for done := false; !done; {
		received, err := s.answer()
		if err != nil {
			return fmt.Errorf("waiting for the kernel's answer: %w", err)
		}
		for m := range received {
			i := int(int32(m.seq - first))
			if m.port != s.port || i < 0 || i >= len(requests) {
				continue // the rest of an answer that we gave up on
			}
			done = take(i, m) || done
		}
	}
	return nil
}
