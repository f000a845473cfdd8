//go:build linux

package rtnl

import (
	"cmp"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace, held for what has no netlink: sysctls,
// bpf(2) and new sockets.
type Namespace struct{ file *os.File }

// OpenNamespace opens the calling thread's network namespace.
func OpenNamespace() (*Namespace, error) {
	file, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("opening the network namespace: %w", err)
	}
	return &Namespace{file}, nil
}

// Close lets go of the namespace.
func (n *Namespace) Close() error { return n.file.Close() }

// Fd is the namespace's file descriptor, valid until Close.
func (n *Namespace) Fd() uintptr { return n.file.Fd() }

// Do runs f on a thread in the namespace.
func (n *Namespace) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		changed, err := n.enter()
		if !changed {
			defer runtime.UnlockOSThread()
		} // else the thread is thrown away with the goroutine
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// enter moves the calling thread, unless it is there already: a container
// without CAP_SYS_ADMIN may not move.
func (n *Namespace) enter() (changed bool, err error) {
	var here unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &here); err != nil {
		return false, fmt.Errorf("looking at the network namespace: %w", err)
	}
	conn, err := n.file.SyscallConn() // holds the file open while it is used
	if err != nil {
		return false, fmt.Errorf("entering the network namespace: %w", err)
	}
	controlErr := conn.Control(func(fd uintptr) {
		var there unix.Stat_t
		if err = unix.Fstat(int(fd), &there); err != nil || here.Dev == there.Dev && here.Ino == there.Ino {
			return
		}
		if err = unix.Setns(int(fd), unix.CLONE_NEWNET); err == nil {
			changed = true
		}
	})
	if err = cmp.Or(controlErr, err); err != nil {
		return changed, fmt.Errorf("entering the network namespace: %w", err)
	}
	return changed, nil
}
