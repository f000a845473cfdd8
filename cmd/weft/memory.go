package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/weft-net/weft/dataplane/state"
)

// memorySchema is the version of the memory's form.
const memorySchema = 1

// remembered is what a store delivered last, for a start at which it can't be
// asked.
type remembered struct {
	SchemaVersion int         `json:"schemaVersion"`
	Store         string      `json:"store"`
	At            time.Time   `json:"at"`
	State         state.State `json:"state"`
}

// memory keeps what a store delivered last in a file that outlives a reboot.
type memory struct {
	path  string
	store string // its kind
	log   *slog.Logger
	now   func() time.Time

	mu    sync.Mutex
	last  *state.State // that is or will be in the file
	dirty bool
}

func newMemory(stateDir, store string, log *slog.Logger, now func() time.Time) *memory {
	return &memory{path: filepath.Join(stateDir, "state.json"), store: store, log: log, now: now}
}

// Recall returns what was remembered, and when; fs.ErrNotExist if nothing of this
// store was.
func (m *memory) Recall() (state.State, time.Time, error) {
	data, err := os.ReadFile(m.path)
	if err != nil {
		return state.State{}, time.Time{}, fmt.Errorf("recalling the last state: %w", err)
	}
	var r remembered
	if err := json.Unmarshal(data, &r); err != nil {
		return state.State{}, time.Time{}, fmt.Errorf("recalling the last state from %s: %w", m.path, err)
	}
	if r.SchemaVersion != memorySchema || r.Store != m.store {
		return state.State{}, time.Time{}, fmt.Errorf("the last state in %s is of another store or version: %w", m.path, fs.ErrNotExist)
	}
	return r.State, r.At, nil
}

// Note takes a state that has been delivered.
func (m *memory) Note(s state.State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last == nil || !reflect.DeepEqual(*m.last, s) {
		m.last, m.dirty = &s, true
	}
}

// Run writes what is new, now and then and at the end.
func (m *memory) Run(ctx context.Context, interval time.Duration) {
	problems := newFailures(m.log, "remembering the peers")
	ticks := time.NewTicker(interval)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			problems.Note(m.write())
			return
		case <-ticks.C:
			problems.Note(m.write())
		}
	}
}

// write writes what has not been written.
func (m *memory) write() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.dirty {
		return nil
	}
	data, err := json.Marshal(remembered{SchemaVersion: memorySchema, Store: m.store, At: m.now().UTC(), State: *m.last})
	if err != nil {
		return err
	}
	err = os.MkdirAll(filepath.Dir(m.path), 0o755)
	if err == nil {
		err = renameio.WriteFile(m.path, data, 0o644)
	}
	if err != nil {
		return fmt.Errorf("a restart without the %s store will know no peers: %w", m.store, err)
	}
	m.dirty = false
	return nil
}
