//go:build linux

// Package netns gives tests network namespaces of their own: real kernels,
// nothing of the machine touched.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is a network namespace that lives as long as its test.
type NS struct {
	handle netns.NsHandle
}

// New makes an empty network namespace with loopback down. The test is skipped
// without root, unless WEFT_REQUIRE_ROOT is set: then it fails.
func New(tb testing.TB) *NS {
	tb.Helper()
	RequireRoot(tb)
	var ns NS
	err := OnThread(func() error {
		h, err := netns.New()
		ns.handle = h
		return err
	})
	if err != nil {
		tb.Fatalf("making a network namespace: %v", err)
	}
	tb.Cleanup(func() { ns.handle.Close() })
	return &ns
}

// RequireRoot skips the test without root, and fails it when
// WEFT_REQUIRE_ROOT says that it must run.
func RequireRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("WEFT_REQUIRE_ROOT") != "" {
		tb.Fatal("this test needs root, and WEFT_REQUIRE_ROOT says it must run")
	}
	tb.Skip("needs root")
}

// FD returns the namespace's file descriptor, valid until the test ends.
func (ns *NS) FD() int { return int(ns.handle) }

// Path names the namespace for programs: `nsenter --net=PATH`, `ip link set
// netns` by another process of this one's pid namespace.
func (ns *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()) }

// Do runs f on a thread inside the namespace. Goroutines and processes that f
// starts: processes inherit the namespace, goroutines do not.
func (ns *NS) Do(f func() error) error {
	return OnThread(func() error {
		if err := unix.Setns(ns.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering network namespace: %w", err)
		}
		return f()
	})
}

// MustDo is Do that fails the test on error.
func (ns *NS) MustDo(tb testing.TB, f func() error) {
	tb.Helper()
	if err := ns.Do(f); err != nil {
		tb.Fatal(err)
	}
}

// errGoexit tells that f left its thread by runtime.Goexit (t.Fatal).
var errGoexit = errors.New("the function left its namespace thread by Goexit (do not call Fatal there; return an error)")

// OnThread runs f on a locked thread that is thrown away afterwards, so that
// no namespace can leak into another goroutine. The process' main thread can't be
// thrown away, and what it is in the process is in: it is passed over.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		err := errGoexit
		defer func() { done <- err }()
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			err = OnThread(f) // on another one, since this is taken
			return
		}
		err = f()
	}()
	return <-done
}
