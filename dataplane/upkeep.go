//go:build linux

package dataplane

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/weft-net/weft/dataplane/hostrules"
	"github.com/weft-net/weft/dataplane/state"
)

// upkeep keeps the host's rules for the overlay as they shall be: at each Sync, and
// now and then, since nobody tells when somebody else changes them.
type upkeep struct {
	rules *hostrules.Rules
	wants Rules
	log   *slog.Logger

	mu      sync.Mutex
	desired *hostrules.Desired
	failed  string // what went wrong last
}

// openUpkeep returns nil where the rules are none of our business.
func openUpkeep(o Options) (*upkeep, error) {
	if o.Rules.Resync == 0 {
		return nil, nil
	}
	rules, err := hostrules.Open(hostrules.Options{Log: o.Log})
	if err != nil {
		return nil, fmt.Errorf("opening the host's rules: %w", err)
	}
	return &upkeep{rules: rules, wants: o.Rules, log: o.Log}, nil
}

// sync makes the rules what a state wants.
func (u *upkeep) sync(ctx context.Context, s state.State) error {
	if u == nil {
		return nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.desired = &hostrules.Desired{
		Networks: s.Networks, Prefixes: s.Local.Prefixes, NFTables: s.NFTables,
		Masquerade: u.wants.Masquerade, OrderedPorts: u.wants.OrderedPorts,
		Forward: u.wants.Forward, Blackhole: u.wants.Blackhole,
	}
	return u.again(ctx)
}

// again repairs what has changed.
func (u *upkeep) again(ctx context.Context) error {
	err := u.rules.Sync(ctx, *u.desired)
	if err != nil {
		return fmt.Errorf("the host's rules for the overlay: %w", err)
	}
	return nil
}

// follow repairs the rules every so often until ctx is done.
func (u *upkeep) follow(ctx context.Context) {
	ticks := time.NewTicker(u.wants.Resync)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticks.C:
			u.look(ctx)
		}
	}
}

// look repairs the rules and tells of trouble once.
func (u *upkeep) look(ctx context.Context) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.desired == nil {
		return
	}
	said := ""
	if err := u.again(ctx); err != nil && ctx.Err() == nil {
		said = err.Error()
	}
	switch {
	case said == u.failed:
	case said == "":
		u.log.Info("the host's rules for the overlay are in order again")
	default:
		u.log.Error("the host's rules for the overlay can't be looked after", "error", said)
	}
	u.failed = said
}

// close leaves the rules in force: connections lean on them.
func (u *upkeep) close() error {
	if u == nil {
		return nil
	}
	return u.rules.Close()
}
