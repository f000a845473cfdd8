package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
)

// runSchema is the version of the run file's form. A field that is added does
// not change it.
const runSchema = 1

// runInfo is what the agent tells the other commands: what only it knows. What
// the kernel holds they read for themselves.
type runInfo struct {
	SchemaVersion int       `json:"schemaVersion"`
	Version       string    `json:"version"`
	PID           int       `json:"pid"`
	StartedAt     time.Time `json:"startedAt"`
	// StoppedAt is set when the agent has ended by itself. An agent that was
	// killed leaves it out.
	StoppedAt time.Time `json:"stoppedAt,omitzero"`
	Store     storeInfo `json:"store"`
	Node      string    `json:"node,omitempty"`
	VNI       uint32    `json:"vni,omitempty"`
	Sync      syncInfo  `json:"sync"`
	Ready     bool      `json:"ready"`
	Mode      string    `json:"mode,omitempty"`
	Reason    string    `json:"reason,omitempty"`
	// WayToPrograms is the command that gives the agent's pod what programs need.
	WayToPrograms string `json:"wayToPrograms,omitempty"`
	// Express is how the express path stood when the agent last looked.
	Express expressInfo `json:"express,omitzero"`
	// NoXDP is what was in the way of stripping packets in the uplink's driver.
	NoXDP   string     `json:"noXDP,omitempty"`
	Peers   int        `json:"peers"`
	Names   names      `json:"names,omitempty"`
	Metrics metricInfo `json:"metrics,omitzero"`
}

// storeInfo is where the peers come from.
type storeInfo struct {
	Kind   string `json:"kind"`
	Config string `json:"config,omitempty"`
	Error  string `json:"error,omitempty"`
}

// syncInfo is how the loop fares.
type syncInfo struct {
	Last        time.Time `json:"last,omitzero"`
	LastSuccess time.Time `json:"lastSuccess,omitzero"`
	// Error is of the latest sync, if that failed.
	Error    string `json:"error,omitempty"`
	Failures int    `json:"failures,omitempty"`
}

// expressInfo is what the pins do not tell of the express path.
type expressInfo struct {
	Reasons   []string              `json:"reasons,omitempty"`
	LeftAlone []dataplane.LeftAlone `json:"leftAlone,omitempty"`
}

// metricInfo is where the agent serves metrics.
type metricInfo struct {
	Address string `json:"address,omitempty"`
}

// names are the peers' node names by public IP.
type names map[netip.Addr]string

// namesOf lists the names in a state.
func namesOf(s state.State) names {
	n := names{}
	for _, p := range s.Peers {
		n[p.PublicIP] = p.Node
	}
	return n
}

// runPath is where the run file lies.
func runPath(runDir string) string { return filepath.Join(runDir, "agent.json") }

// readRunInfo reads the run file. An agent that never ran gives fs.ErrNotExist.
func readRunInfo(runDir string) (runInfo, error) {
	data, err := os.ReadFile(runPath(runDir))
	if err != nil {
		return runInfo{}, fmt.Errorf("reading what the agent says: %w", err)
	}
	var info runInfo
	if err := json.Unmarshal(data, &info); err != nil {
		return runInfo{}, fmt.Errorf("reading %s: %w", runPath(runDir), err)
	}
	if info.SchemaVersion != runSchema {
		return runInfo{}, fmt.Errorf("%s has schema version %d, this weft knows %d; use the weft that the agent runs", runPath(runDir), info.SchemaVersion, runSchema)
	}
	return info, nil
}

// writeRunInfo replaces the run file in one step.
func writeRunInfo(runDir string, info runInfo) error {
	data, err := json.Marshal(info)
	if err != nil {
		return fmt.Errorf("writing the run file: %w", err)
	}
	// The mode is for everybody to read, whatever the umask is.
	if err := renameio.WriteFile(runPath(runDir), append(data, '\n'), 0o644, renameio.IgnoreUmask()); err != nil {
		return fmt.Errorf("writing the run file: %w", err)
	}
	return nil
}

// record is the run file of a running agent.
type record struct {
	runDir   string
	gap      time.Duration
	dirty    chan struct{}
	failures *failures

	writing sync.Mutex // one writer of the file at a time

	mu   sync.Mutex
	info runInfo
}

// With thousands of names the file is large, and in a storm of changes nobody reads
// each of them. writeShare is one part of how much of the time it is being written,
// while that means a rest of longestWriteGap at most.
const (
	writeShare      = 20
	longestWriteGap = 2 * time.Second
)

// newRecord makes a record that begins with info.
func newRecord(runDir string, info runInfo, log *slog.Logger) *record {
	info.SchemaVersion = runSchema
	return &record{
		runDir:   runDir,
		gap:      250 * time.Millisecond,
		dirty:    make(chan struct{}, 1),
		failures: newFailures(log, "writing the run file"),
		info:     info,
	}
}

// Update changes the record; the file follows.
func (r *record) Update(change func(*runInfo)) {
	r.mu.Lock()
	change(&r.info)
	r.mu.Unlock()
	select {
	case r.dirty <- struct{}{}:
	default:
	}
}

// Info returns the record as it is.
func (r *record) Info() runInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.info
}

// Write writes the file now.
func (r *record) Write() error {
	r.writing.Lock()
	defer r.writing.Unlock()
	return writeRunInfo(r.runDir, r.Info())
}

// Run writes the file after changes until ctx is done.
func (r *record) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.dirty:
		}
		began := time.Now()
		r.failures.Note(r.Write())
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(r.gap, min(writeShare*time.Since(began), longestWriteGap))):
		}
	}
}

// life is whether the agent of a run directory lives.
type life string

const (
	never   life = "never"   // it has not run here since the directory was made
	running life = "running" // it lives
	stopped life = "stopped" // it ended by itself
	dead    life = "dead"    // it was killed
)

// agentView is an agent as the other commands see it.
type agentView struct {
	Life   life
	Holder string
	Info   runInfo
}

// viewAgent looks at the agent of a run directory.
func viewAgent(runDir string) (agentView, error) {
	holder, held, err := lockHeld(runDir)
	if err != nil {
		return agentView{}, err
	}
	view := agentView{Life: never, Holder: holder}
	view.Info, err = readRunInfo(runDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return agentView{}, err
	}
	switch {
	case held:
		view.Life = running
	case err != nil:
		view.Life = never
	case view.Info.StoppedAt.IsZero():
		view.Life = dead
	default:
		view.Life = stopped
	}
	return view, nil
}

// vni is the overlay to look at: the one asked for, else the agent's, else
// flannel's default.
func (v agentView) vni(asked uint) uint32 {
	switch {
	case asked != 0:
		return uint32(asked)
	case v.Info.VNI != 0:
		return v.Info.VNI
	}
	return 1
}
