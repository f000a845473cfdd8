//go:build linux

// Package verdicts tells when the kernel may judge a forwarded packet otherwise
// than before: rulesets, routes, forwarding, xfrm and bridge-netfilter settings
// of one network namespace.
//
// It also names the rules that treat the packets of one established flow
// differently from one another (PerPacketRules): no earlier verdict stands for
// the next of those.
//
// Nothing tells of the members of an ipset, of what the packet path adds to a
// set and time takes out of it, of IPVS, of a table of nftables that goes with
// the process that owned it, and of sysctls of single devices but for forwarding
// and reverse path filters. So a verdict that was seen must end by itself.
package verdicts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// Options say how a Watcher watches. The zero value will do.
type Options struct {
	Log *slog.Logger
	// Poll is how often to look at legacy tables, which send no event, pollInterval by
	// default. Settings are read once in pollsPerSettings of it.
	Poll time.Duration
}

const (
	// pollInterval is short enough for what is polled to be seen within 100 ms.
	// Where legacy tables are large their entries are read less often.
	pollInterval = 50 * time.Millisecond
	// pollsPerSettings is in how many polls settings are read once: they are many, and
	// hardly ever change.
	pollsPerSettings = 10
	// openInterval is how often to look whether there is more to be polled: a
	// module may have been loaded.
	openInterval = time.Second
)

// Watcher watches one network namespace. One goroutine at a time may wait; the
// other methods may be called from any.
type Watcher struct {
	opts      Options
	namespace *rtnl.Namespace
	sockets   []*socket
	// epoll becomes readable when a socket is. The runtime waits for it.
	epoll    *os.File
	readable syscall.RawConn

	// What is polled, under pollMu.
	pollMu       sync.Mutex
	nextPoll     time.Time
	nextSettings time.Time
	nextOpen     time.Time
	settings     settings
	tables       legacyTables
	ebtables     []string // what of them can't be watched

	closed atomic.Bool

	// unheard is held while nothing is heard of nf_tables.
	unheard sync.Mutex

	mu    sync.Mutex
	blind []string
	// untold is what may have changed besides what the sockets tell, and deaf a
	// socket that could not join its groups again.
	untold Changes
	deaf   *socket
}

// Open subscribes in the network namespace of the calling thread. From its
// return on no change is missed.
func Open(opts Options) (_ *Watcher, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Poll == 0 {
		opts.Poll = pollInterval
	}
	w := &Watcher{opts: opts, settings: newSettings(), tables: newLegacyTables()}
	defer func() {
		if err != nil {
			_ = w.Close()
			err = fmt.Errorf("watching what verdicts depend on: %w", err)
		}
	}()
	if w.namespace, err = rtnl.OpenNamespace(); err != nil {
		return nil, err
	}
	if err := w.openEpoll(); err != nil {
		return nil, err
	}
	for _, s := range subscriptions {
		if err := w.subscribe(s); err != nil {
			return nil, err
		}
	}
	_, err = w.poll() // what there is at the start
	return w, err
}

// openEpoll opens what waits for all sockets.
func (w *Watcher) openEpoll() error {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("opening an epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // else the runtime would not wait for it
		_ = unix.Close(fd)
		return fmt.Errorf("opening an epoll: %w", err)
	}
	w.epoll = os.NewFile(uintptr(fd), "epoll")
	w.readable, err = w.epoll.SyscallConn()
	return err
}

// subscribe opens a socket and has the epoll wait for it.
func (w *Watcher) subscribe(s subscription) error {
	opened, err := subscribe(s)
	if s.optional && errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // what is not there doesn't change
	}
	if err != nil {
		return err
	}
	w.sockets = append(w.sockets, opened)
	var addErr error
	err = opened.conn.Control(func(fd uintptr) {
		addErr = w.readable.Control(func(epoll uintptr) {
			err = unix.EpollCtl(int(epoll), unix.EPOLL_CTL_ADD, int(fd), &unix.EpollEvent{Events: unix.EPOLLIN})
		})
	})
	return errors.Join(err, addErr)
}

// Close lets go of the sockets; a Wait returns os.ErrClosed.
func (w *Watcher) Close() error {
	w.closed.Store(true)
	var errs []error
	for _, s := range w.sockets {
		s.close()
	}
	if w.epoll != nil {
		errs = append(errs, w.epoll.Close())
	}
	if w.namespace != nil {
		errs = append(errs, w.namespace.Close())
	}
	w.pollMu.Lock()
	defer w.pollMu.Unlock()
	w.settings.close()
	w.tables.close()
	return errors.Join(errs...)
}

// Blind lists what can't be watched here, with the reason. It may grow: tables
// come into being later.
func (w *Watcher) Blind() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.blind
}

// Wait returns what has changed, as soon as something has, or nothing after d.
// Nothing means that all that was told has been read. Where more is told than
// can be read, Wait returns with what it knows, and the next one with the rest:
// whoever acts on its return covers that too.
//
// After an error events may be lost: open another Watcher.
func (w *Watcher) Wait(ctx context.Context, d time.Duration) (Changes, error) {
	defer context.AfterFunc(ctx, func() { _ = w.epoll.SetReadDeadline(time.Now()) })()
	changes, err := w.wait(ctx, time.Now().Add(d))
	if err != nil && w.closed.Load() {
		err = os.ErrClosed
	}
	return changes, err
}

func (w *Watcher) wait(ctx context.Context, end time.Time) (Changes, error) {
	for {
		changes, err := w.look()
		if err == nil && changes == 0 {
			err = ctx.Err()
		}
		if err != nil || changes != 0 || !time.Now().Before(end) {
			return changes, err
		}
		if err := w.sleep(ctx, end); err != nil {
			return 0, err
		}
	}
}

// look reads all that was told, and polls when it is time to.
func (w *Watcher) look() (changes Changes, err error) {
	if changes, err = w.takeUntold(); err != nil {
		return 0, err
	}
	for _, s := range w.sockets {
		seen, err := s.drain()
		if err != nil {
			return changes, err
		}
		changes |= seen
	}
	if now := time.Now(); !now.Before(w.nextPoll) {
		seen, err := w.poll()
		if err != nil {
			return changes, err
		}
		changes |= seen
		w.nextPoll = w.afterPoll(now)
	}
	return changes, nil
}

// afterPoll is when the next poll is due: where there can be no legacy tables, for the
// settings alone.
func (w *Watcher) afterPoll(now time.Time) time.Time {
	if w.tables.possible() {
		return now.Add(w.opts.Poll)
	}
	return w.nextSettings
}

// sleep waits until something is told, it is time to poll, or the end.
func (w *Watcher) sleep(ctx context.Context, end time.Time) error {
	if w.nextPoll.Before(end) {
		end = w.nextPoll
	}
	if err := w.epoll.SetReadDeadline(end); err != nil {
		return err
	}
	// Whoever moved the deadline to wake us may have done so before.
	if err := ctx.Err(); err != nil || w.hasUntold() {
		return err
	}
	var waitErr error
	err := w.readable.Read(func(epoll uintptr) bool {
		var n int
		n, waitErr = unix.EpollWait(int(epoll), make([]unix.EpollEvent, 1), 0)
		return n > 0 || waitErr != nil
	})
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(waitErr, unix.EINTR) {
		return nil
	}
	return errors.Join(err, waitErr)
}

// Unheard runs do, and hears nothing of nf_tables meanwhile; then Wait tells that
// nf_tables has changed, whatever did. It is for a large change of one's own, and do
// is one transaction: where somebody listens the kernel makes a message of each
// element of a set (nf_tables_setelem_notify), which takes longer than to add it.
// Transactions come one after another (commit_mutex in net/netfilter/nf_tables_api.c),
// so that others' changes are told late only if they come right before it or behind
// it: by as long as it takes, which is tens of milliseconds for 20,000 elements.
func (w *Watcher) Unheard(do func() error) error {
	w.unheard.Lock()
	defer w.unheard.Unlock()
	for _, s := range w.sockets {
		if s.protocol != unix.NETLINK_NETFILTER || s.leave() != nil {
			continue // then it is heard, and that is all
		}
		defer w.hearAgain(s)
	}
	return do()
}

// hearAgain has a socket join its groups again, and Wait tell of what may have been
// missed.
func (w *Watcher) hearAgain(s *socket) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deaf, w.untold = nil, w.untold|Nftables
	if s.join() != nil {
		w.deaf = s // takeUntold tries again, and says why if it fails
	}
	_ = w.epoll.SetReadDeadline(time.Now())
}

// hasUntold reports whether takeUntold has something to tell.
func (w *Watcher) hasUntold() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.untold != 0 || w.deaf != nil
}

// takeUntold returns what may have changed besides what the sockets tell.
func (w *Watcher) takeUntold() (Changes, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.deaf != nil {
		if err := w.deaf.join(); err != nil {
			return 0, err
		}
		w.deaf = nil
	}
	changes := w.untold
	w.untold = 0
	return changes, nil
}

// poll looks at what sends no event.
func (w *Watcher) poll() (changes Changes, err error) {
	w.pollMu.Lock()
	defer w.pollMu.Unlock()
	if w.closed.Load() {
		return 0, os.ErrClosed
	}
	if now := time.Now(); !now.Before(w.nextOpen) {
		w.nextOpen = now.Add(openInterval)
		if err := w.namespace.Do(func() error {
			w.open()
			return nil
		}); err != nil {
			return 0, err
		}
	}
	if now := time.Now(); !now.Before(w.nextSettings) {
		w.nextSettings = now.Add(pollsPerSettings * w.opts.Poll)
		if w.settings.changed() {
			changes |= Settings
		}
	}
	if w.tables.changed() {
		changes |= Iptables
	}
	w.setBlind(slices.Concat(w.tables.why, w.ebtables))
	return changes, nil
}

// open opens what is polled, as far as it is there.
func (w *Watcher) open() {
	w.settings.open()
	w.tables.open()
	w.ebtables = ebtablesLegacy()
}

// setBlind says what can't be watched, once.
func (w *Watcher) setBlind(reasons []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, reason := range reasons {
		if !slices.Contains(w.blind, reason) {
			w.opts.Log.Warn("some changes here are not seen", "what", reason)
		}
	}
	w.blind = reasons
}
