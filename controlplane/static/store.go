package static

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/dataplane/state"
)

// Store delivers what a file says, at start and whenever the file changes.
type Store struct {
	path   string
	log    *slog.Logger
	timing timing
	// last is the state delivered last, of the file seen last.
	last state.State
	seen sighting
}

var _ controlplane.Store = (*Store)(nil)

// timing says when the file is looked at.
type timing struct {
	// Quiet is how long the file must have been left alone after an event
	// before it is read: an editor or a template engine writes in pieces.
	Quiet time.Duration
	// Patience bounds the wait for quiet.
	Patience time.Duration
	// Poll is how often the file is looked at without an event: inotify may
	// have no watches left, does not work on every network filesystem, and
	// cannot watch a directory that is not there yet.
	Poll time.Duration
}

// defaultTiming is for files that people and ConfigMaps write.
func defaultTiming() timing {
	return timing{Quiet: 100 * time.Millisecond, Patience: 2 * time.Second, Poll: 10 * time.Second}
}

// Open reads the file. At start a file that is missing or has faults is an
// error for whoever started us to see; later, see Run.
func Open(path string, log *slog.Logger) (*Store, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("finding the config file: %w", err)
	}
	s := &Store{path: path, log: log, timing: defaultTiming()}
	data, seen, err := read(path)
	if err != nil {
		return nil, err
	}
	if s.last, err = Parse(path, data); err != nil {
		return nil, err
	}
	s.seen = seen
	return s, nil
}

// Kind implements controlplane.Store.
func (s *Store) Kind() string { return "static" }

// Announce implements controlplane.Store. The file says everything.
func (s *Store) Announce(controlplane.Offer) {}

// Path is the file, absolute.
func (s *Store) Path() string { return s.path }

// State is the last good content of the file. It is for the time before Run.
func (s *Store) State() state.State { return s.last }

// Run implements controlplane.Store. While the file is missing or has faults,
// what it last said stays in force.
func (s *Store) Run(ctx context.Context, sink controlplane.Sink) error {
	watch := newWatch(s.path, s.timing.Poll, s.log)
	defer watch.Close()
	return s.run(ctx, sink, watch.Events())
}

// run looks at the file whenever events says so, and now and then.
func (s *Store) run(ctx context.Context, sink controlplane.Sink, events <-chan struct{}) error {
	sink.Health(nil)
	sink.Deliver(s.last)
	poll := time.NewTicker(s.timing.Poll)
	defer poll.Stop()
	for {
		// The file may have changed between Open and the watch, and again
		// while it was read: so look first, then wait.
		s.look(sink)
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
		case <-events:
			s.settle(ctx, events)
		}
	}
}

// settle returns when no event has come for a while, or none of that helps.
func (s *Store) settle(ctx context.Context, events <-chan struct{}) {
	patience := time.NewTimer(s.timing.Patience)
	defer patience.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-patience.C:
			return
		case <-events:
		case <-time.After(s.timing.Quiet):
			return
		}
	}
}

// look reads the file if it may have changed and delivers what is new.
func (s *Store) look(sink controlplane.Sink) {
	if info, err := os.Stat(s.path); err == nil && s.seen.same(info) {
		return
	}
	data, seen, err := read(s.path)
	if errors.Is(err, errChanging) {
		return // its writer is not done: an event or the poll brings us back
	}
	s.seen = seen
	if err != nil {
		sink.Health(err)
		return
	}
	next, err := Parse(s.path, data)
	if err != nil {
		sink.Health(err)
		return
	}
	sink.Health(nil)
	if !reflect.DeepEqual(next, s.last) {
		s.last = next
		sink.Deliver(next)
	}
}

// sighting is what a file looked like when it was read.
type sighting struct {
	info fs.FileInfo
	at   time.Time
}

// same tells that the file has not changed since. A file written within the
// clock tick in which it was read may have changed without looking different,
// so a sighting of a file that young proves nothing.
func (s sighting) same(info fs.FileInfo) bool {
	const tick = 100 * time.Millisecond
	return s.info != nil && os.SameFile(s.info, info) &&
		s.info.Size() == info.Size() && s.info.ModTime().Equal(info.ModTime()) &&
		s.at.Sub(s.info.ModTime()) > tick
}

// errChanging says that a file was written while it was read.
var errChanging = errors.New("the file is being written")

// read returns the content of a regular file of bounded size.
func read(path string) ([]byte, sighting, error) {
	// A FIFO would make the open wait for a writer.
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, sighting{}, fmt.Errorf("config file %s is missing: %w", path, fs.ErrNotExist)
	case err != nil:
		return nil, sighting{}, fmt.Errorf("reading the config file: %w", err)
	case !info.Mode().IsRegular():
		return nil, sighting{}, fmt.Errorf("config file %s is not a regular file; give the path of a YAML file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, sighting{}, fmt.Errorf("reading the config file: %w", err)
	}
	defer file.Close()
	before, err := file.Stat()
	if err != nil {
		return nil, sighting{}, fmt.Errorf("reading the config file: %w", err)
	}
	at := time.Now()
	data, err := io.ReadAll(io.LimitReader(file, MaxSize+1))
	if err != nil {
		return nil, sighting{}, fmt.Errorf("reading the config file: %w", err)
	}
	after, err := file.Stat()
	if err != nil {
		return nil, sighting{}, fmt.Errorf("reading the config file: %w", err)
	}
	if before.Size() != after.Size() || !before.ModTime().Equal(after.ModTime()) {
		return nil, sighting{}, errChanging
	}
	return data, sighting{info: after, at: at}, nil
}
