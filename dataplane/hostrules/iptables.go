//go:build linux

package hostrules

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// syncChains syncs what there is in iptables mode.
func (r *Rules) syncChains(ctx context.Context, s *socket, w wanted) error {
	var errs []error
	for _, c := range w.chains() {
		_, err := r.syncChain(ctx, s, r.detected, c)
		errs = append(errs, err)
		if errors.Is(err, ErrLocked) || ctx.Err() != nil {
			break // so would be the others
		}
	}
	return errors.Join(errs...)
}

// syncChain syncs a chain of iptables. What changes between listing and writing
// makes the writing fail as a whole, so both are tried again.
func (r *Rules) syncChain(ctx context.Context, s *socket, f flavour, c chain) (changed bool, err error) {
	key := fmt.Sprint(f, c.family.program, c.table)
	if len(c.rules) == 0 {
		// It is seldom there, and to look must not take a program.
		there, err := r.chainExists(ctx, s, f, c)
		if !there || err != nil {
			return false, err
		}
	}
	for range rounds {
		var lines []string
		lines, err = r.syncChainOnce(ctx, s, f, c, !r.settled[key])
		if err == nil {
			r.settled[key] = true
			if len(lines) > 0 {
				r.log.Info("rules changed", "program", c.family.program+"-"+string(f), "table", c.table, "lines", len(lines))
			}
			return len(lines) > 0, nil
		}
		if errors.Is(err, ErrLocked) || errors.Is(err, ErrNoProgram) || ctx.Err() != nil {
			break
		}
	}
	return false, err
}

// syncChainOnce lists, compares, writes.
func (r *Rules) syncChainOnce(ctx context.Context, s *socket, f flavour, c chain, starting bool) ([]string, error) {
	own, hook, err := r.listChain(ctx, s, f, c)
	if err != nil {
		return nil, err
	}
	lines := c.plan(own, hook, starting)
	if len(lines) > 0 {
		if err := r.programs.restore(ctx, c.family, f, c.table, lines); err != nil {
			return nil, err
		}
	}
	if len(c.rules) > 0 || !own.exists {
		return lines, nil
	}
	// Others may use it in rules of theirs, which is no reason to keep ours.
	deletion := "-X " + c.name
	if err := r.programs.restore(ctx, c.family, f, c.table, []string{deletion}); err != nil {
		return nil, fmt.Errorf("chain %s of table %s is empty now, but can't be deleted; does a rule lead to it? %s-%s-save -t %s: %w",
			c.name, c.table, c.family.program, f, c.table, err)
	}
	return append(lines, deletion), nil
}

// listChain lists a chain and that of its hook. Newer programs can't tell a
// chain of nft that is missing from one that they don't understand, so the
// kernel is asked.
func (r *Rules) listChain(ctx context.Context, s *socket, f flavour, c chain) (own, hook listing, err error) {
	there := true
	if f == nft {
		if there, err = r.chainExists(ctx, s, f, c); err != nil {
			return own, hook, err
		}
	}
	if there {
		if own, err = r.programs.list(ctx, c.family, f, c.table, c.name); err != nil {
			return own, hook, err
		}
	}
	hook, err = r.programs.list(ctx, c.family, f, c.table, c.hook)
	return own, hook, err
}

// chainExists tells whether a chain is there, and makes none by looking.
func (r *Rules) chainExists(ctx context.Context, s *socket, f flavour, c chain) (bool, error) {
	if f == nft {
		_, found, err := s.chain(c.family, c.table, c.name)
		if errors.Is(err, ErrUnsupported) {
			return false, nil
		}
		return found, err
	}
	tables, err := legacyTables(c.family)
	if err != nil || !slices.Contains(tables, c.table) {
		return false, err
	}
	l, err := r.programs.list(ctx, c.family, f, c.table, c.name)
	return l.exists, err
}
