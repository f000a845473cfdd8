//go:build linux

package firewall

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// Firewall keeps the table of one network namespace: that of the thread that
// called Open. Its methods may be called from any goroutine.
type Firewall struct {
	log       *slog.Logger
	namespace *rtnl.Namespace
	// around, if there is one, runs large changes of the table.
	around func(change func() error) error
	// mu makes one reading or change happen at a time.
	mu sync.Mutex
	// known is the table as it was in a generation of nf_tables; nil when we
	// don't know. While the generation is the same, it need not be read again:
	// thousands of elements take tens of milliseconds.
	known *known
}

// known is what the table held in a generation.
type known struct {
	table      table
	generation uint32
}

// Open looks whether the kernel can have the table, in the calling thread's
// network namespace. Nothing is changed yet. The error is ErrUnsupported where
// nf_tables is missing.
func Open(log *slog.Logger) (_ *Firewall, err error) {
	namespace, err := rtnl.OpenNamespace()
	if err != nil {
		return nil, err
	}
	f := &Firewall{log: log, namespace: namespace}
	defer func() {
		if err != nil {
			_ = namespace.Close()
		}
	}()
	return f, f.with(func(s *socket) error {
		_, err := s.generation()
		return err
	})
}

// Around has each change of the table by Sync that is about hundreds of elements run
// by around, which runs what it is given, once.
func (f *Firewall) Around(around func(change func() error) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.around = around
}

// Close lets go of the namespace. The table stays, and drops. Remove takes it
// away.
func (f *Firewall) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.namespace.Close()
}

// with runs f with a socket of the namespace.
func (f *Firewall) with(do func(*socket) error) error {
	var s *socket
	if err := f.namespace.Do(func() (err error) {
		s, err = openSocket(f.around)
		return err
	}); err != nil {
		return err
	}
	defer s.close()
	return do(s)
}

// maxRounds is how often one Sync looks at the table: what fails may have been
// changed by others meanwhile. What fails then is made from nothing.
const maxRounds = 3

// Sync makes the table what the rules say, whatever it was, and is idempotent:
// with nothing to do it only reads, so that nobody is told of a change. A
// change is one transaction: no packet meets a table half done. What was
// dropped so far stays counted.
//
// An error that tells of rules that make no sense comes after all others were
// put into the kernel.
func (f *Firewall) Sync(rules Rules) error {
	want, refused := rules.table()
	if rules.Port == 0 {
		return refused
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return errors.Join(f.sync(want), refused)
}

func (f *Firewall) sync(want table) error {
	var last error
	for range maxRounds {
		err := f.with(func(s *socket) error { return f.syncOnce(s, want) })
		if err == nil {
			return nil
		}
		f.known = nil
		if errors.Is(err, ErrUnsupported) || errors.Is(err, unix.EPERM) {
			return fmt.Errorf("firewall: %w", err)
		}
		last = err
	}
	f.log.Warn("the table can't be repaired, so it is made anew", "table", tableName, "err", last)
	if err := f.with(func(s *socket) error { return s.rebuild(want) }); err != nil {
		return fmt.Errorf("firewall: making table inet %s: %w", tableName, err)
	}
	return nil
}

// syncOnce reads, compares, applies.
func (f *Firewall) syncOnce(s *socket, want table) error {
	have, generation, err := f.actual(s, want)
	if err != nil {
		return err
	}
	return f.write(s, want, have, generation)
}

// write makes the table what it shall be, from what it was in a generation.
func (f *Firewall) write(s *socket, want, have table, generation uint32) error {
	todo := makePlan(want, have)
	if len(todo) == 0 {
		f.known = &known{want, generation}
		return nil
	}
	f.known = nil
	if err := s.apply(todo); err != nil {
		return err
	}
	f.log.Info("table changed", "table", tableName, "new", !have.exists, "steps", len(todo))
	// One transaction, one generation: if it is the next, it was ours, and
	// nobody has changed anything since we looked.
	if now, err := s.generation(); err == nil && now == generation+1 {
		f.known = &known{want, now}
	}
	return nil
}

// actual is what the table holds, and in which generation.
func (f *Firewall) actual(s *socket, want table) (table, uint32, error) {
	if f.known != nil {
		now, err := s.generation()
		if err != nil {
			return table{}, 0, err
		}
		if now == f.known.generation {
			return f.known.table, now, nil
		}
	}
	return s.readTable(want)
}

// rebuild makes the table from nothing, but for the count.
func (s *socket) rebuild(want table) error {
	_, packets, bytes, _ := s.readCounter() // what can't be read is lost
	err := s.apply(makeRebuild(want, packets, bytes))
	if errors.Is(err, unix.ENOENT) { // all that it leans on it has made itself
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// ErrNoTable says that the table is not there.
var ErrNoTable = errors.New("there is no nftables table inet " + tableName)

// Dropped tells what was dropped since the table was made. The error is
// ErrNoTable when there is none.
func (f *Firewall) Dropped() (packets, bytes uint64, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	err = f.with(func(s *socket) error {
		var found bool
		var err error
		found, packets, bytes, err = s.readCounter()
		if err == nil && !found {
			return ErrNoTable
		}
		return err
	})
	return packets, bytes, err
}

// Remove takes the table away, and tells whether it was there.
func (f *Firewall) Remove() (removed bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known = nil
	err = f.with(func(s *socket) error {
		err := s.apply(plan{{op: deleteTable}})
		removed = err == nil
		return unlessMissing(err)
	})
	if err != nil {
		return false, fmt.Errorf("firewall: removing table inet %s: %w", tableName, err)
	}
	return removed, nil
}
