//go:build linux

package endpoint

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A node has hundreds of pods and each is asked several things, so this has its
// own small netlink socket, as the kernel path has: requests go many to a
// datagram, answers are parsed in place.

const (
	// receiveSize is the size of the receive buffer in bytes: the kernel fills
	// at most 32 KiB per datagram of a dump (netlink_dump in
	// net/netlink/af_netlink.c).
	receiveSize = 64 << 10
	// batchSize is how many requests go into one datagram. The kernel queues
	// one answer of up to 4 KiB (a link, with its overhead) for each before we
	// can read the first, and a default receive queue takes 208 KiB.
	batchSize = 32
	// answerTimeout bounds the wait for an answer. The kernel answers within
	// milliseconds, but for the time that others hold its RTNL lock.
	answerTimeout = 30 * time.Second
	// dumpTries is how often a dump is read until no change has come between.
	// podTries is the same for what a pod can change: it shall not keep us.
	dumpTries = 10
	podTries  = 3
)

// native is the byte order of netlink's own fields.
var native = binary.NativeEndian

// socket is a rtnetlink socket of the namespace it was opened in.
type socket struct {
	file *os.File
	conn syscall.RawConn
	port uint32
	seq  uint32
	buf  []byte
}

// openSocket opens a socket in the namespace of the calling thread, which
// hears the given multicast groups (RTNLGRP_*).
func openSocket(groups ...int) (_ *socket, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	s := &socket{file: os.NewFile(uintptr(fd), "rtnetlink"), buf: make([]byte, receiveSize)}
	defer func() {
		if err != nil {
			s.close()
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
	// Errors in words (4.12), without our request in them (4.3), and dumps of
	// other namespaces (4.20). That a kernel without the last answers for ours
	// is seen in the answers.
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

// close ends the socket; a receive that waits returns os.ErrClosed.
func (s *socket) close() { _ = s.file.Close() }

// message is one message that was received. data lies in the socket's buffer
// and is valid until the next receive.
type message struct {
	kind  uint16
	flags uint16
	seq   uint32
	port  uint32
	data  []byte
}

// receive waits for one datagram and returns its messages.
func (s *socket) receive(deadline time.Time) (iter.Seq[message], error) {
	if err := s.file.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := s.conn.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), s.buf, unix.MSG_TRUNC)
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

// messages splits a datagram.
func messages(b []byte) iter.Seq[message] {
	return func(yield func(message) bool) {
		for len(b) >= unix.NLMSG_HDRLEN {
			size := int(native.Uint32(b))
			if size < unix.NLMSG_HDRLEN || size > len(b) {
				return
			}
			m := message{
				kind:  native.Uint16(b[4:]),
				flags: native.Uint16(b[6:]),
				seq:   native.Uint32(b[8:]),
				port:  native.Uint32(b[12:]),
				data:  b[unix.NLMSG_HDRLEN:size],
			}
			if !yield(m) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

// attributes splits a sequence of attributes into type and value.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(native.Uint16(b))
			if size < unix.SizeofRtAttr || size > len(b) {
				return
			}
			if !yield(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:size]) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

// align rounds up to the alignment of messages and attributes.
func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// request builds one message.
type request struct{ b []byte }

// newRequest begins a message with its fixed part, such as a struct ndmsg.
func newRequest(kind, flags uint16, fixed ...byte) *request {
	r := &request{b: make([]byte, unix.NLMSG_HDRLEN, 96)}
	native.PutUint16(r.b[4:], kind)
	native.PutUint16(r.b[6:], flags|unix.NLM_F_REQUEST)
	r.b = append(r.b, fixed...)
	return r
}

// attr adds an attribute.
func (r *request) attr(kind uint16, value []byte) *request {
	r.b = native.AppendUint16(r.b, uint16(unix.SizeofRtAttr+len(value)))
	r.b = native.AppendUint16(r.b, kind)
	r.b = append(r.b, value...)
	for len(r.b) != align(len(r.b)) {
		r.b = append(r.b, 0)
	}
	return r
}

// uint32 adds an attribute with a number in the machine's byte order.
func (r *request) uint32(kind uint16, value uint32) *request {
	return r.attr(kind, native.AppendUint32(nil, value))
}

// finish sets length and sequence number.
func (r *request) finish(seq uint32) []byte {
	native.PutUint32(r.b, uint32(len(r.b)))
	native.PutUint32(r.b[8:], seq)
	return r.b
}

// send sends one datagram.
func (s *socket) send(b []byte) error {
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

// errInterrupted says that the table changed while it was dumped.
var errInterrupted = errors.New("the table kept changing while it was read")

// dump asks for a table and calls each for every answer of kind answer. The
// kernel tells when the table changed under way, and then entries may be
// missing or twice: reset is called and all is read again.
func (s *socket) dump(tries int, makeRequest func() *request, answer uint16, reset func(), each func(data []byte)) error {
	return untilWhole(tries, func() (interrupted bool, err error) {
		reset()
		return s.dumpOnce(makeRequest(), answer, each)
	})
}

// untilWhole reads a table again and again until it did not change meanwhile,
// a bounded number of times.
func untilWhole(tries int, read func() (interrupted bool, err error)) error {
	for try := range tries {
		interrupted, err := read()
		if err != nil || !interrupted {
			return err
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
	}
	return errInterrupted
}

func (s *socket) dumpOnce(r *request, answer uint16, each func([]byte)) (interrupted bool, err error) {
	s.seq++
	if err := s.send(r.finish(s.seq)); err != nil {
		return false, err
	}
	for {
		received, err := s.receive(time.Now().Add(answerTimeout))
		if err != nil {
			return false, err
		}
		for m := range received {
			if m.seq != s.seq || m.port != s.port {
				continue // the rest of an answer that we gave up on
			}
			interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.kind {
			case answer:
				each(m.data)
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				return interrupted, ackError(m)
			}
		}
	}
}

// ask sends requests that have one answer each, many in one datagram, and calls
// each with the number of the request and its answer, or the kernel's refusal.
// data is valid until each returns. The error is about the asking itself.
func (s *socket) ask(requests []*request, each func(i int, data []byte, refusal error)) error {
	for begin := 0; begin < len(requests); begin += batchSize {
		batch := requests[begin:min(begin+batchSize, len(requests))]
		if err := s.askBatch(batch, func(i int, data []byte, refusal error) { each(begin+i, data, refusal) }); err != nil {
			return err
		}
	}
	return nil
}

func (s *socket) askBatch(requests []*request, each func(i int, data []byte, refusal error)) error {
	first := s.seq + 1
	var b []byte
	for _, r := range requests {
		s.seq++
		b = append(b, r.finish(s.seq)...)
	}
	if err := s.send(b); err != nil {
		return err
	}
	answered := make([]bool, len(requests))
	for open := len(requests); open > 0; {
		received, err := s.receive(time.Now().Add(answerTimeout))
		if err != nil {
			return fmt.Errorf("waiting for the kernel's answer: %w", err)
		}
		for m := range received {
			i := int(int32(m.seq - first))
			if m.port != s.port || i < 0 || i >= len(requests) || answered[i] {
				continue // the rest of an answer that we gave up on
			}
			if m.kind == unix.NLMSG_ERROR {
				each(i, nil, cmp.Or(ackError(m), errNoAnswer))
			} else {
				each(i, m.data, nil)
			}
			answered[i] = true
			open--
		}
	}
	return nil
}

// errNoAnswer says that the kernel acknowledged a question without answering.
var errNoAnswer = errors.New("the kernel gave no answer")

// ackError reads an acknowledgement (struct nlmsgerr) or the end of a dump:
// nil, or the errno with the kernel's own words where it has some.
func ackError(m message) error {
	if len(m.data) < 4 {
		return nil
	}
	errno := int32(native.Uint32(m.data))
	if errno == 0 {
		return nil
	}
	err := error(unix.Errno(-errno))
	const sizeofError = 4 + unix.NLMSG_HDRLEN // the request's header comes back, its rest is capped
	if m.kind != unix.NLMSG_ERROR || m.flags&unix.NLM_F_ACK_TLVS == 0 || len(m.data) < sizeofError {
		return err
	}
	rest := m.data[sizeofError:]
	if m.flags&unix.NLM_F_CAPPED == 0 { // the whole request came back
		size := int(native.Uint32(m.data[4:])) - unix.NLMSG_HDRLEN
		if size < 0 || align(size) > len(rest) {
			return err
		}
		rest = rest[align(size):]
	}
	for kind, value := range attributes(rest) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w (%s)", err, unix.ByteSliceToString(value))
		}
	}
	return err
}
