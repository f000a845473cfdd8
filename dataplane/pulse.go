//go:build linux

package dataplane

import (
	"context"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/verdicts"
)

// Intervals of the pulse.
const (
	// beatInterval is how often the programs get a sign of life; without one
	// for PULSE_LIFE (bpf/constants.h) they do no express.
	beatInterval = 500 * time.Millisecond
	// settleTime is between the two moves of the epoch that a change makes. It
	// covers packets that were judged before the change and witnessed after it.
	settleTime = 100 * time.Millisecond
	// gatherTime is the rest after a change that the second move covers anyway:
	// others gather meanwhile.
	gatherTime = 10 * time.Millisecond
	// watchRetry is the pause after watching failed.
	watchRetry = time.Second
)

// pulse tells the programs that the agent lives, and moves the epoch whenever
// the host may judge packets otherwise than before.
type pulse struct {
	log       *slog.Logger
	obstacles *obstacles
	// changed is told of every change that moved the epoch.
	changed chan<- verdicts.Changes

	mu        sync.Mutex
	heartbeat *ebpf.Heartbeat // nil before the programs are loaded
	epoch     uint32
	moves     map[string]uint64 // of the epoch, by what made them
}

func newPulse(log *slog.Logger, o *obstacles, changed chan<- verdicts.Changes) *pulse {
	p := &pulse{log: log, obstacles: o, changed: changed, moves: map[string]uint64{moveSettled: 0, moveUnwatched: 0}}
	for _, kind := range verdicts.Kinds() {
		p.moves[kind] = 0
	}
	return p
}

// What moves the epoch besides changes.
const (
	moveSettled   = "settled"
	moveUnwatched = "watch failed"
)

// watcher is a verdicts.Watcher.
type watcher interface {
	Wait(ctx context.Context, d time.Duration) (verdicts.Changes, error)
}

// use makes h the heartbeat from now on. Its epoch goes on behind the one that
// is there: what changed while nobody watched is not known.
func (p *pulse) use(h *ebpf.Heartbeat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.letGo()
	p.heartbeat = h
	if h == nil {
		return
	}
	if last, err := h.Read(); err == nil && last.Epoch >= p.epoch {
		p.epoch = last.Epoch
	}
	p.epoch++
	p.beatLocked()
}

// letGo ends express until the next beat and forgets the heartbeat.
func (p *pulse) letGo() {
	if p.heartbeat == nil {
		return
	}
	if err := p.heartbeat.Stop(); err != nil {
		p.log.Warn("ending express", "err", err)
	}
	p.heartbeat.Close()
	p.heartbeat = nil
}

func (p *pulse) beat() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.beatLocked()
}

func (p *pulse) beatLocked() {
	if p.heartbeat == nil {
		return
	}
	held := len(p.obstacles.List()) > 0
	if err := p.heartbeat.Beat(ebpf.Pulse{Epoch: p.epoch, Held: held}); err != nil {
		p.log.Warn("telling the programs that the agent lives", "err", err)
	}
}

// move moves the epoch: all witnesses are void. why are the kinds of change.
func (p *pulse) move(why ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.epoch++
	for _, kind := range why {
		p.moves[kind]++
	}
	p.beatLocked()
}

// Moves counts the moves of the epoch, by what made them.
func (p *pulse) Moves() map[string]uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.moves)
}

// follow beats until ctx is done, and moves the epoch twice for a change: at
// once, and when packets that were on their way have settled. Changes in
// between make one more pair, however many they are.
func (p *pulse) follow(ctx context.Context, w watcher) {
	var settle time.Time // when the second move is due
	var more bool        // there were changes since the first
	for ctx.Err() == nil {
		if more {
			time.Sleep(min(gatherTime, time.Until(settle)))
		}
		wait := beatInterval
		if !settle.IsZero() {
			wait = max(0, min(wait, time.Until(settle)))
		}
		changes, err := w.Wait(ctx, wait)
		if ctx.Err() != nil {
			return
		}
		p.watches(err)
		if err != nil {
			p.pause(ctx)
			continue
		}
		if changes != 0 {
			p.tell(changes)
		}
		switch due := !settle.IsZero() && !time.Now().Before(settle); {
		case changes != 0 && settle.IsZero():
			p.move(strings.Split(changes.String(), ", ")...)
			settle = time.Now().Add(settleTime)
		case due && (more || changes != 0):
			p.move(moveSettled)
			settle, more = time.Now().Add(settleTime), false
		case due:
			p.move(moveSettled)
			settle = time.Time{}
		case changes != 0:
			more = true
		}
		p.checkConntrack()
		p.beat()
	}
}

// watches says whether the host's rules can be followed.
func (p *pulse) watches(err error) {
	if err == nil {
		p.obstacles.set(findsWatch)
		return
	}
	p.obstacles.set(findsWatch, "the host's rules can't be followed: "+err.Error())
	p.move(moveUnwatched)
}

func (p *pulse) pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(watchRetry):
	}
}

func (p *pulse) tell(changes verdicts.Changes) {
	select {
	case p.changed <- changes:
	default: // it is looking already, or will
	}
}

// checkConntrack keeps conntrack's settings as express needs them.
func (p *pulse) checkConntrack() {
	changed, obstacle := setConntrack()
	for _, name := range changed {
		p.log.Info("set for express, and left so when weft goes", "sysctl", name, "value", 1)
	}
	p.obstacles.set(findsConntrack, obstacle)
}
