//go:build linux

package ebpf

import (
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Heartbeat is the agent's sign of life, without which there is no express. It
// is written beside a Sync, and outlives the Accelerator that it is from.
type Heartbeat struct{ m *ebpf.Map }

// PulseLife is how long express goes on without a beat: PULSE_LIFE of
// bpf/constants.h.
const PulseLife = 3 * time.Second

// Pulse is one beat.
type Pulse struct {
	// Epoch tells witnesses apart that are from before and after a change of
	// what the host lets through.
	Epoch uint32
	// Held tells that express must be held back.
	Held bool
}

// Heartbeat returns the heartbeat that the programs of a look at.
func (a *Accelerator) Heartbeat() (*Heartbeat, error) {
	m, err := a.objects.Heartbeat.Clone()
	if err != nil {
		return nil, fmt.Errorf("cloning map heartbeat: %w", err)
	}
	return &Heartbeat{m}, nil
}

// Read returns the last beat.
func (h *Heartbeat) Read() (Pulse, error) {
	var have weftPulse
	if err := h.m.Lookup(uint32(0), &have); err != nil {
		return Pulse{}, fmt.Errorf("reading map heartbeat: %w", err)
	}
	return Pulse{Epoch: have.Epoch, Held: have.Held != 0}, nil
}

// Beat writes a beat of now.
func (h *Heartbeat) Beat(p Pulse) error {
	return h.write(weftPulse{Beat: coarseNow(), Epoch: p.Epoch, Held: boolean(p.Held)})
}

// coarseNow is what bpf_ktime_get_coarse_ns returns.
func coarseNow() uint64 {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now) // every Linux has it
	return uint64(now.Nano())
}

// Stop ends express at once.
func (h *Heartbeat) Stop() error {
	p, err := h.Read()
	if err != nil {
		return err
	}
	return h.write(weftPulse{Epoch: p.Epoch, Held: boolean(p.Held)})
}

func (h *Heartbeat) write(p weftPulse) error {
	if err := h.m.Put(uint32(0), p); err != nil {
		return fmt.Errorf("writing map heartbeat: %w", err)
	}
	return nil
}

// Close lets go of the map.
func (h *Heartbeat) Close() error { return h.m.Close() }
