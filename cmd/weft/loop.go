package main

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/weft-net/weft/dataplane/state"
)

// loop makes the dataplane hold the desired state. Everything that happens is a
// nudge to sync the whole of it again; many nudges make one sync.
type loop struct {
	timing  timing
	log     *slog.Logger
	sync    func(context.Context, state.State) error
	changed <-chan struct{}
	// synced is called after every sync.
	synced func(outcome)
	// jitter returns a factor for the retry gap: nodes that fail together
	// shall not retry together.
	jitter func() float64

	wanted chan struct{}

	mu      sync.Mutex
	desired *state.State
	// overdue is when the loop must have shown life again; zero while it
	// waits for its first state.
	overdue time.Time
}

// outcome is how a sync went.
type outcome struct {
	state    state.State
	at       time.Time
	duration time.Duration
	err      error
}

// newLoop makes a loop that syncs with the given function and looks again when
// changed says so.
func newLoop(t timing, log *slog.Logger, sync func(context.Context, state.State) error, changed <-chan struct{}, synced func(outcome)) *loop {
	return &loop{
		timing:  t,
		log:     log,
		sync:    sync,
		changed: changed,
		synced:  synced,
		jitter:  func() float64 { return 0.75 + rand.Float64()/4 },
		wanted:  make(chan struct{}, 1),
	}
}

// Want replaces the desired state and returns at once.
func (l *loop) Want(s state.State) {
	l.mu.Lock()
	l.desired = &s
	l.mu.Unlock()
	select {
	case l.wanted <- struct{}{}:
	default:
	}
}

// Run syncs until ctx is done.
func (l *loop) Run(ctx context.Context) {
	failures := newFailures(l.log, "sync")
	select {
	case <-ctx.Done():
		return
	case <-l.wanted:
	}
	retries, busy := 0, false
	for {
		took, err := l.once(ctx)
		if ctx.Err() != nil {
			return // what a cancelled sync says is no failure
		}
		failures.Note(err)
		if err == nil {
			retries = 0
		} else {
			retries++
		}
		gap := l.timing.LeastGap
		if busy {
			gap = l.timing.busyGap(took)
		}
		if busy = l.wait(ctx, retries, gap); ctx.Err() != nil {
			return
		}
	}
}

// once syncs the desired state, and says how long that took.
func (l *loop) once(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	l.mu.Lock()
	desired := *l.desired
	l.overdue = start.Add(l.timing.StuckAfter)
	l.mu.Unlock()
	err := l.sync(ctx, desired)
	end := time.Now()
	if ctx.Err() == nil {
		l.synced(outcome{state: desired, at: end, duration: end.Sub(start), err: err})
	}
	return end.Sub(start), err
}

// wait returns when it is time for the next sync, or ctx is done. retries counts the
// failures since the last success; gap is what has to lie between two syncs, and busy
// tells that there was no rest: something had happened before the gap was over.
func (l *loop) wait(ctx context.Context, retries int, gap time.Duration) (busy bool) {
	end := time.Now()
	due := end.Add(l.timing.LongestGap)
	nudged := end.Add(gap)
	if retries > 0 {
		retry := l.retryGap(retries)
		due = end.Add(retry)
		nudged = end.Add(min(retry, l.timing.NudgedMax))
	}
	for {
		l.expect(due)
		select {
		case <-ctx.Done():
			return false
		case <-l.wanted:
			// What is wanted now may not be what fails: it gets its chance.
			due = earlier(due, end.Add(gap))
			busy = busy || time.Since(end) < gap
		case _, open := <-l.changed:
			if !open {
				l.changed = nil // a closed dataplane has no more news
				continue
			}
			due = earlier(due, nudged)
			busy = busy || time.Since(end) < gap
		case <-time.After(time.Until(due)):
			l.drain()
			return busy
		}
	}
}

// drain forgets the nudges that the sync about to start answers.
func (l *loop) drain() {
	select {
	case <-l.wanted:
	default:
	}
	select {
	case <-l.changed:
	default:
	}
}

// retryGap is the wait after so many failures in a row: it doubles.
func (l *loop) retryGap(retries int) time.Duration {
	gap := l.timing.RetryMin
	for range retries - 1 {
		if gap *= 2; gap >= l.timing.RetryMax {
			gap = l.timing.RetryMax
			break
		}
	}
	return time.Duration(float64(gap) * l.jitter())
}

// expect notes when the loop will show life again at the latest.
func (l *loop) expect(due time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.overdue = due.Add(l.timing.StuckAfter)
}

// Stuck tells for how long the loop has been overdue.
func (l *loop) Stuck(now time.Time) (time.Duration, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.overdue.IsZero() || !now.After(l.overdue) {
		return 0, false
	}
	return now.Sub(l.overdue), true
}

// earlier returns the earlier of two times.
func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
