//go:build linux

package dataplane

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-net/weft/dataplane/verdicts"
)

// script is a watcher whose changes come at given times.
type script struct {
	start  time.Time
	events []scripted
	// waits are how long was waited each time.
	waits []time.Duration
}

type scripted struct {
	at      time.Duration
	changes verdicts.Changes
	err     error
}

func (s *script) Wait(ctx context.Context, d time.Duration) (verdicts.Changes, error) {
	s.waits = append(s.waits, d)
	until := time.Now().Add(d)
	if len(s.events) > 0 {
		if due := s.start.Add(s.events[0].at); !due.After(until) {
			next := s.events[0]
			s.events = s.events[1:]
			time.Sleep(time.Until(due))
			return next.changes, next.err
		}
	}
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(time.Until(until)):
		return 0, nil
	}
}

// followed is what a pulse did with a script in a second.
type followed struct {
	epoch uint32
	moves map[string]uint64
	held  []string
	// at are the times of the moves.
	at []time.Duration
}

func follow(t *testing.T, events ...scripted) (f followed) {
	t.Helper()
	settings(t, "1", "1")
	synctest.Test(t, func(t *testing.T) {
		o := &obstacles{log: slog.New(slog.DiscardHandler)}
		p := newPulse(o.log, o, make(chan verdicts.Changes, 1))
		s := &script{start: time.Now(), events: events}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		done := make(chan struct{})
		go func() {
			defer close(done)
			p.follow(ctx, s)
		}()
		for last := uint32(0); ctx.Err() == nil; {
			p.mu.Lock()
			for ; last < p.epoch; last++ {
				f.at = append(f.at, time.Since(s.start))
			}
			p.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		<-done
		f.epoch, f.moves, f.held = p.epoch, p.Moves(), o.List()
		maps.DeleteFunc(f.moves, func(_ string, n uint64) bool { return n == 0 })
		if slices.Max(s.waits) > beatInterval {
			t.Errorf("waited %v for a change without a beat, want %v at most", slices.Max(s.waits), beatInterval)
		}
	})
	return f
}

// A change moves the epoch at once, and again when what was on its way has
// settled.
func TestAChangeMovesTheEpochTwice(t *testing.T) {
	for name, c := range map[string]struct {
		events []scripted
		at     []int // ms
		moves  map[string]uint64
	}{
		"nothing": {nil, nil, map[string]uint64{}},
		"one change": {
			[]scripted{{at: 50 * time.Millisecond, changes: verdicts.Nftables}},
			[]int{50, 150},
			map[string]uint64{"nftables": 1, "settled": 1},
		},
		"two kinds at once": {
			[]scripted{{at: 50 * time.Millisecond, changes: verdicts.Routes | verdicts.Nftables}},
			[]int{50, 150},
			map[string]uint64{"nftables": 1, "routes": 1, "settled": 1},
		},
		"one more before it has settled": {
			[]scripted{{at: 50 * time.Millisecond, changes: verdicts.Nftables}, {at: 90 * time.Millisecond, changes: verdicts.Routes}},
			[]int{50, 150, 250},
			map[string]uint64{"nftables": 1, "settled": 2},
		},
		"one long after the other": {
			[]scripted{{at: 50 * time.Millisecond, changes: verdicts.Rules}, {at: 600 * time.Millisecond, changes: verdicts.Rules}},
			[]int{50, 150, 600, 700},
			map[string]uint64{"rules": 2, "settled": 2},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := follow(t, c.events...)
			if !maps.Equal(f.moves, c.moves) {
				t.Errorf("moves by what made them: %v, want %v", f.moves, c.moves)
			}
			if len(f.at) != len(c.at) {
				t.Fatalf("moves at %v, want %v ms", f.at, c.at)
			}
			for i := range c.at {
				if late := f.at[i] - time.Duration(c.at[i])*time.Millisecond; late < 0 || late > 2*time.Millisecond {
					t.Errorf("moves at %v, want %v ms", f.at, c.at)
				}
			}
		})
	}
}

// Changes that never end cost a move each 100 ms, and none of them stays without
// a move after it for longer than that.
func TestAStormOfChangesIsOneMoveEach100ms(t *testing.T) {
	var storm []scripted
	for at := time.Duration(0); at < 900*time.Millisecond; at += time.Millisecond {
		storm = append(storm, scripted{at: at, changes: verdicts.Nftables})
	}
	f := follow(t, storm...)
	if n := len(f.at); n < 9 || n > 11 {
		t.Fatalf("%d moves in 900 ms of changes, want about 10: %v", n, f.at)
	}
	for i := 1; i < len(f.at); i++ {
		if gap := f.at[i] - f.at[i-1]; gap > settleTime+2*time.Millisecond {
			t.Errorf("%v without a move while there were changes", gap)
		}
	}
}

// While the host's rules can't be followed, express is held back.
func TestAWatchThatFailsHoldsExpressBack(t *testing.T) {
	f := follow(t, scripted{at: 600 * time.Millisecond, err: errors.New("no buffer")})
	if len(f.held) != 1 || f.held[0] != "the host's rules can't be followed: no buffer" {
		t.Errorf("held back by %q", f.held)
	}
	if f.moves["watch failed"] != 1 {
		t.Errorf("moves: %v; what changed while nobody watched is not known, so the epoch has to move", f.moves)
	}
}
