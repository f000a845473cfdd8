//go:build linux

package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// pid is a process that can be told from a later one with the same number.
type pid struct {
	ID int `json:"id"`
	// Start is when it was started, in clock ticks since boot.
	Start uint64 `json:"start"`
}

// pidOf identifies a running process.
func pidOf(id int) (pid, error) {
	_, start, err := procStat(id)
	return pid{ID: id, Start: start}, err
}

// alive reports whether the process still runs. A zombie does not.
func (p pid) alive() bool {
	state, start, err := procStat(p.ID)
	return err == nil && p.ID > 0 && start == p.Start && state != 'Z' && state != 'X'
}

// signal sends a signal to the process group that p leads.
func (p pid) signal(sig unix.Signal) error {
	if !p.alive() {
		return nil
	}
	if err := unix.Kill(-p.ID, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("sending %s to process %d: %w", sig, p.ID, err)
	}
	return nil
}

// endAll ends processes: politely, and after a while by force.
func endAll(all []pid) error {
	for _, step := range []struct {
		signal unix.Signal
		wait   time.Duration
	}{{unix.SIGTERM, 3 * time.Second}, {unix.SIGKILL, 5 * time.Second}} {
		for _, p := range all {
			if err := p.signal(step.signal); err != nil {
				return err
			}
		}
		if all = stillAlive(all, step.wait); len(all) == 0 {
			return nil
		}
	}
	return fmt.Errorf("processes %v do not end", all)
}

// stillAlive returns those that have not ended within a time.
func stillAlive(all []pid, wait time.Duration) []pid {
	for deadline := time.Now().Add(wait); ; time.Sleep(2 * time.Millisecond) {
		var left []pid
		for _, p := range all {
			if p.alive() {
				left = append(left, p)
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// writePID notes a process in a directory, and what it is.
func writePID(dir string, p pid, what string) error {
	return os.WriteFile(filepath.Join(dir, strconv.Itoa(p.ID)), fmt.Appendf(nil, "%d %s\n", p.Start, what), 0o644)
}

// readPID reads what writePID wrote.
func readPID(path string) (pid, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return pid{}, err
	}
	id, err := strconv.Atoi(filepath.Base(path))
	if err != nil {
		return pid{}, err
	}
	start, _, _ := strings.Cut(string(text), " ")
	ticks, err := strconv.ParseUint(start, 10, 64)
	return pid{ID: id, Start: ticks}, err
}

// procStat reads a process's state and start time from /proc (proc(5), stat).
func procStat(id int) (state byte, start uint64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", id))
	if err != nil {
		return 0, 0, err
	}
	// The name, in parentheses, may hold anything: what follows begins after
	// the last one. State is the third field of all, start time the 22nd.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("reading /proc/%d/stat: %d fields", id, len(fields))
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return fields[0][0], start, err
}
