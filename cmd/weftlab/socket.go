//go:build linux

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socket is a blocking IPv4 socket that is read and written by bare system
// calls. Go's own sockets would measure Go's poller too, and its ordinary
// system calls the scheduler: both cost as much as what is to be measured.
type socket int

// newSocket opens a socket of type unix.SOCK_STREAM or unix.SOCK_DGRAM.
func newSocket(kind int) (socket, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening a socket: %w", err)
	}
	return socket(fd), nil
}

// address is an IPv4 address and port as the kernel takes it.
func address(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// listen opens a socket that is bound to an address; a TCP one also listens.
func listen(kind int, at netip.AddrPort) (socket, error) {
	s, err := newSocket(kind)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return -1, err
	}
	if err := unix.Bind(int(s), address(at)); err != nil {
		return -1, fmt.Errorf("binding to %s: %w", at, err)
	}
	if kind == unix.SOCK_STREAM {
		return s, unix.Listen(int(s), 1024)
	}
	return s, nil
}

// connect opens a socket that is connected to an address.
func connect(kind int, to *unix.SockaddrInet4) (socket, error) {
	s, err := newSocket(kind)
	if err != nil {
		return -1, err
	}
	err = unix.Connect(int(s), to)
	for errors.Is(err, unix.EINTR) {
		err = unix.Connect(int(s), to)
	}
	if err != nil {
		s.close()
		return -1, fmt.Errorf("connecting: %w", err)
	}
	return s, nil
}

// accept waits for a connection.
func (s socket) accept() (socket, error) {
	fd, err := call(unix.SYS_ACCEPT4, uintptr(s), 0, 0)
	return socket(fd), err
}

// read reads what is there, and waits until there is something.
func (s socket) read(b []byte) (int, error) {
	n, err := call(unix.SYS_READ, uintptr(s), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	runtime.KeepAlive(b)
	return n, err
}

// write writes all of b.
func (s socket) write(b []byte) error {
	for len(b) > 0 {
		n, err := call(unix.SYS_WRITE, uintptr(s), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		runtime.KeepAlive(b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// writeSome writes as much of b as there is room for.
func (s socket) writeSome(b []byte) (int, error) {
	n, err := call(unix.SYS_WRITE, uintptr(s), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	runtime.KeepAlive(b)
	return n, err
}

// waiting is sockets that are read or written by one thread, whichever can be.
type waiting []unix.PollFd

// add adds a socket and what it waits for. A single one waits by itself: read
// and write block, as they do for any program with one connection.
func (w *waiting) add(s socket, event int16) error {
	*w = append(*w, unix.PollFd{Fd: int32(s), Events: event})
	if len(*w) == 1 {
		return nil
	}
	for _, p := range *w {
		if err := unix.SetNonblock(int(p.Fd), true); err != nil {
			return err
		}
	}
	return nil
}

// each waits until something can be done and does it.
func (w waiting) each(do func(s socket) error) error {
	if len(w) == 1 {
		return do(socket(w[0].Fd))
	}
	if _, err := call(unix.SYS_POLL, uintptr(unsafe.Pointer(unsafe.SliceData(w))), uintptr(len(w)), ^uintptr(0)); err != nil {
		return err
	}
	for _, p := range w {
		if p.Revents == 0 {
			continue
		}
		if err := do(socket(p.Fd)); err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
	return nil
}

func (s socket) close() { _, _ = call(unix.SYS_CLOSE, uintptr(s), 0, 0) }

// call makes a system call without telling Go's scheduler, so that the whole
// program stands still while it blocks: it has nothing else to do.
func call(number, a, b, c uintptr) (int, error) {
	for {
		n, _, err := unix.RawSyscall(number, a, b, c)
		switch err {
		case 0:
			return int(n), nil
		case unix.EINTR:
			continue
		default:
			return 0, err
		}
	}
}

// noDelay makes TCP send small writes at once.
func (s socket) noDelay() error {
	return unix.SetsockoptInt(int(s), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

// patience limits how long read waits; it then returns EAGAIN.
func (s socket) patience(d time.Duration) error {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	return unix.SetsockoptTimeval(int(s), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
}

// roomy gives the socket room for what comes while another program has the CPU.
func (s socket) roomy() error {
	return unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
}

// connectTo fixes a datagram socket's other side.
func (s socket) connectTo(sa unix.Sockaddr) error { return unix.Connect(int(s), sa) }
