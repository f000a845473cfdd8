package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-net/weft/dataplane/state"
)

// bubble is a loop with a dataplane of the test's own, in a synctest bubble:
// times are exact.
type bubble struct {
	*loop
	changes chan struct{}
	log     bytes.Buffer

	start time.Time
	mu    sync.Mutex
	// syncs are when each sync began, and vnis what was desired then.
	syncs []time.Duration
	vnis  []uint32
	// fail is what syncs return; takes, how long they take.
	fail  error
	takes time.Duration
}

// inBubble runs test with a loop that runs.
func inBubble(t *testing.T, test func(b *bubble)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bubble{changes: make(chan struct{}, 1), start: time.Now()}
		b.loop = newLoop(defaultTiming(), textLog(&b.log), b.once, b.changes, func(outcome) {})
		b.jitter = func() float64 { return 1 }
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			b.Run(ctx)
		}()
		test(b)
		stop()
		<-done
	})
}

// textLog logs without times.
func textLog(w *bytes.Buffer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

// once is the dataplane's Sync.
func (b *bubble) once(_ context.Context, s state.State) error {
	b.mu.Lock()
	b.syncs = append(b.syncs, time.Since(b.start))
	b.vnis = append(b.vnis, s.VNI)
	fail, takes := b.fail, b.takes
	b.mu.Unlock()
	time.Sleep(takes)
	return fail
}

// begun returns when syncs began, and forgets them.
func (b *bubble) begun() []time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer func() { b.syncs = nil }()
	return b.syncs
}

// failing changes what syncs return.
func (b *bubble) failing(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = err
}

// after lets time pass.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// expectSyncs compares when syncs began.
func (b *bubble) expectSyncs(t *testing.T, want ...time.Duration) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Equal(b.syncs, want) {
		t.Errorf("syncs began at %v, want %v", b.syncs, want)
	}
}

const ms = time.Millisecond

func TestNothingIsSyncedBeforeTheFirstState(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.changes <- struct{}{}
		after(time.Hour)
		b.expectSyncs(t)
		if _, stuck := b.Stuck(time.Now()); stuck {
			t.Error("waiting for a store is taken for being stuck")
		}
	})
}

func TestTheFirstStateIsSyncedAtOnce(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.Want(state.State{VNI: 1})
		after(0)
		b.expectSyncs(t, 0)
	})
}

func TestManyNudgesMakeOneSync(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.Want(state.State{VNI: 1})
		after(0)
		for vni := range uint32(40) {
			b.Want(state.State{VNI: vni + 2})
			select {
			case b.changes <- struct{}{}:
			default:
			}
			after(ms)
		}
		after(200 * ms)
		b.expectSyncs(t, 0, 50*ms)
		if b.vnis[1] != 41 {
			t.Errorf("VNI %d was synced, not the last one wanted", b.vnis[1])
		}
	})
}

func TestASlowSyncIsNotInterrupted(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.takes = 300 * ms
		b.Want(state.State{VNI: 1})
		after(100 * ms)
		b.Want(state.State{VNI: 2})
		after(time.Second)
		b.expectSyncs(t, 0, 350*ms) // the least gap counts from the end
	})
}

func TestAChangeInTheKernelIsSyncedAtOnceAfterAQuietTime(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.Want(state.State{VNI: 1})
		after(10 * time.Second)
		b.changes <- struct{}{}
		after(ms)
		b.expectSyncs(t, 0, 10*time.Second)
	})
}

func TestWithoutEventsEveryMinute(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.Want(state.State{VNI: 1})
		after(150 * time.Second)
		b.expectSyncs(t, 0, time.Minute, 2*time.Minute)
	})
}

func TestRetriesBackOffAndRecover(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.failing(errors.New("no such device"))
		b.Want(state.State{VNI: 1})
		after(62 * time.Second)
		want := []time.Duration{0}
		for _, gap := range []time.Duration{250 * ms, 500 * ms, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, 30 * time.Second} {
			want = append(want, want[len(want)-1]+gap)
		}
		b.expectSyncs(t, want...)
		b.failing(nil)
		after(30 * time.Second)
		synctest.Wait()
		if got := b.log.String(); got != `level=ERROR msg="sync failed, trying again" problems=1 error="no such device"
level=INFO msg="sync is well again" failures=9 after=1m31.75s
` {
			t.Errorf("log:\n%s", got)
		}
		// And the next failure begins anew.
		b.failing(errors.New("no such device"))
		before := b.begun()
		after(time.Minute + 300*ms)
		retry := b.begun()
		if gap := retry[len(retry)-1] - before[len(before)-1]; gap != time.Minute+250*ms {
			t.Errorf("the retry came %v after the last success", gap)
		}
	})
}

func TestAKernelEventCutsARetryShortButNotToAStorm(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.failing(errors.New("no such device"))
		b.Want(state.State{VNI: 1})
		after(31750 * ms) // the next retry is 30 s away
		b.begun()
		for range 100 {
			select {
			case b.changes <- struct{}{}:
			default:
			}
			after(100 * ms)
		}
		if syncs := b.begun(); len(syncs) < 4 || len(syncs) > 6 {
			t.Errorf("in ten seconds of events syncs began at %v", syncs)
		}
	})
}

func TestANewStateIsTriedAtOnceWhileFailing(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.failing(errors.New("no such device"))
		b.Want(state.State{VNI: 1})
		after(32 * time.Second)
		b.failing(nil)
		b.Want(state.State{VNI: 2})
		after(ms)
		syncs := b.begun()
		if last := syncs[len(syncs)-1]; last != 32*time.Second || b.vnis[len(b.vnis)-1] != 2 {
			t.Errorf("syncs began at %v", syncs)
		}
	})
}

func TestAHangingSyncIsStuck(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.takes = 10 * time.Minute
		b.Want(state.State{VNI: 1})
		after(119 * time.Second)
		if _, stuck := b.Stuck(time.Now()); stuck {
			t.Error("stuck too early")
		}
		after(2 * time.Second)
		if _, stuck := b.Stuck(time.Now()); !stuck {
			t.Error("a sync that hangs for two minutes is not noticed")
		}
		after(9 * time.Minute)
		if _, stuck := b.Stuck(time.Now()); stuck {
			t.Error("still stuck after the sync has ended")
		}
	})
}

func TestAClosedChangedChannelDoesNotSpin(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.Want(state.State{VNI: 1})
		after(0)
		close(b.changes)
		after(59 * time.Second)
		b.expectSyncs(t, 0)
		after(2 * time.Second)
		b.expectSyncs(t, 0, time.Minute)
	})
}

func TestACancelledSyncIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		l := newLoop(defaultTiming(), textLog(&log), func(ctx context.Context, _ state.State) error {
			<-ctx.Done()
			return ctx.Err()
		}, nil, func(outcome) { t.Error("an outcome was told") })
		ctx, stop := context.WithCancel(t.Context())
		l.Want(state.State{})
		go l.Run(ctx)
		synctest.Wait()
		stop()
		synctest.Wait()
		if log.Len() > 0 {
			t.Error(log.String())
		}
	})
}

func TestFailuresAreLoggedOncePerKind(t *testing.T) {
	var log bytes.Buffer
	f := newFailures(textLog(&log), "sync")
	noDevice, denied := errors.New("no such device"), errors.New("permission denied")
	var errs []error
	for i := range 3 {
		errs = append(errs, fmt.Errorf("adding route %d: %w", i, noDevice))
	}
	errs = append(errs, fmt.Errorf("adding rule: %w", denied))
	f.Note(fmt.Errorf("syncing: %w", errors.Join(errs...)))
	f.Note(errors.Join(errs[0], fmt.Errorf("%w: see %w", errors.New("other"), denied)))
	f.Note(errs[1])
	f.count, f.since = 3, time.Now()
	f.Note(nil)
	f.Note(nil)
	got := strings.ReplaceAll(log.String(), "after=0s", "after=N")
	want := `level=ERROR msg="sync failed, trying again" problems=3 error="adding route 0: no such device"
level=ERROR msg="sync failed, trying again" problems=1 error="adding rule: permission denied"
level=ERROR msg="sync failed, trying again" problems=1 error="other: see permission denied"
level=INFO msg="sync is well again" failures=3 after=N
`
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// Changes without end do not keep a CPU busy: syncs have gaps between them that grow with
// their length, but for the second.
func TestChangesWithoutEnd(t *testing.T) {
	inBubble(t, func(b *bubble) {
		b.takes = 100 * ms
		b.Want(state.State{VNI: 1})
		for vni := range uint32(200) {
			after(10 * ms)
			b.Want(state.State{VNI: vni + 2})
		}
		after(10 * time.Second)
		b.expectSyncs(t, 0, 150*ms, 550*ms, 950*ms, 1350*ms, 1750*ms, 2150*ms)

		b.takes = 10 * time.Second
		b.Want(state.State{VNI: 300})
		b.changes <- struct{}{}
		after(time.Second)
		b.changes <- struct{}{}
		after(10 * time.Second)
		b.changes <- struct{}{}
		after(20 * time.Second)
		start := 12 * time.Second // after a rest a sync is not delayed
		b.expectSyncs(t, 0, 150*ms, 550*ms, 950*ms, 1350*ms, 1750*ms, 2150*ms, start, start+10050*ms, start+21050*ms)
	})
}
