//go:build linux

package hostrules

import (
	"errors"
	"fmt"
)

// rounds is how often to look at what others change while we do: kube-proxy writes
// for a moment, not for ever.
const rounds = 20

// syncTables syncs what there is in nftables mode.
func (r *Rules) syncTables(s *socket, w wanted) error {
	var errs []error
	for _, t := range w.tables() {
		errs = append(errs, r.syncTable(s, t))
	}
	return errors.Join(errs...)
}

// syncTable syncs a table in nftables mode. One that is not used may fail: a
// kernel without IPv6 need not have it.
func (r *Rules) syncTable(s *socket, t table) (err error) {
	key := t.family.table
	for range rounds {
		var steps []step
		steps, err = r.syncTableOnce(s, t)
		if err == nil {
			r.settled[key] = true
			r.written[key] = map[string][]rule{}
			for _, c := range t.chains {
				r.written[key][c.name] = c.rules
			}
			if len(steps) > 0 {
				r.log.Info("rules changed", "table", t.family.word+" "+key, "steps", len(steps))
			}
			return nil
		}
		if !errors.Is(err, errChanged) {
			break
		}
	}
	if !t.used() && errors.Is(err, ErrUnsupported) {
		r.log.Debug("a table that is not used can't be made", "table", t.family.word+" "+key, "err", err)
		return nil
	}
	return fmt.Errorf("table %s %s: %w", t.family.word, key, err)
}

// syncTableOnce reads, compares, writes.
func (r *Rules) syncTableOnce(s *socket, t table) ([]step, error) {
	generation, err := s.generation()
	if err != nil {
		return nil, err
	}
	have, err := s.read(t)
	if err != nil {
		return nil, err
	}
	steps := t.plan(have, r.written[t.family.table], !r.settled[t.family.table])
	if len(steps) == 0 {
		return nil, nil
	}
	return steps, s.write(t, steps, generation)
}

// cleanTable deletes a table of nftables mode.
func (r *Rules) cleanTable(s *socket, t table) (found bool, err error) {
	delete(r.written, t.family.table)
	for range rounds {
		var generation uint32
		generation, err = s.generation()
		if err == nil {
			found, _, err = s.table(t.family, t.family.table)
		}
		if err == nil && found {
			err = s.write(t, []step{{op: deleteTable}}, generation)
		}
		if errors.Is(err, ErrUnsupported) {
			return false, nil
		}
		if !errors.Is(err, errChanged) {
			break
		}
	}
	if found && err == nil {
		r.log.Info("table deleted", "table", t.family.word+" "+t.family.table)
	}
	return found && err == nil, err
}
