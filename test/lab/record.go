//go:build linux

package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// recordRoot holds one directory per lab with all that is needed to take the
// lab away after a crash: who made it, and which processes it runs.
//
//	/run/weftlab/.lock           held while labs are registered and removed
//	/run/weftlab/.made           directories that were made for labs
//	/run/weftlab/NAME/lab.json   options, maker, processes that hold nodes
//	/run/weftlab/NAME/pids/PID   start time and name of a process to be ended
//	/run/weftlab/NAME/*.log      what the started processes printed
const recordRoot = "/run/weftlab"

// mountPoints are directories of the machine that a lab mounts on: names of
// namespaces on the first, and inside of nodes a private tmpfs on the second.
// Those that are missing are made, and removed with the last lab.
var mountPoints = []string{netnsDir, weftStateDir}

// record is a lab as the machine remembers it.
type record struct {
	Options Options `json:"options"`
	// Maker is the process that called New.
	Maker pid `json:"maker"`
	// Holders are the processes that hold the nodes' namespaces open.
	Holders []pid `json:"holders"`
}

var validName = regexp.MustCompile(`^[a-z][a-z0-9]{0,9}$`)

// newRecord registers a lab and clears away those that crashed makers left.
func newRecord(opts Options) (*record, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab needs root: it makes namespaces")
	}
	if opts.Name == "" {
		opts.Name = freshName()
	}
	if !validName.MatchString(opts.Name) {
		return nil, fmt.Errorf("lab name %q: write up to ten lower-case letters and digits, a letter first", opts.Name)
	}
	maker, err := pidOf(os.Getpid())
	if err != nil {
		return nil, err
	}
	r := &record{Options: opts, Maker: maker}
	return r, locked(func() error {
		removeAbandoned()
		if _, err := os.Stat(r.directory()); err == nil {
			return fmt.Errorf("lab %s is already up; remove it with: weftlab down --name %s", opts.Name, opts.Name)
		}
		if err := makeMountPoints(); err != nil {
			return err
		}
		if err := os.MkdirAll(r.pidDirectory(), 0o755); err != nil {
			return err
		}
		return r.write()
	})
}

var labsOfThisProcess atomic.Int64

// freshName is a name no other lab of the machine has: the process's id and a
// running number.
func freshName() string {
	return "t" + strconv.FormatInt(int64(os.Getpid()), 36) + strconv.FormatInt(labsOfThisProcess.Add(1), 36)
}

// readRecord finds the lab that is called name.
func readRecord(name string) (*record, error) {
	r := &record{Options: Options{Name: name}}
	text, err := os.ReadFile(r.file())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNotUp, name)
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("reading %s: %w", r.file(), err)
	}
	return r, nil
}

// ErrNotUp tells that there is no lab of that name.
var ErrNotUp = errors.New("no such lab is up")

// Names lists the labs of the machine.
func Names() ([]string, error) {
	entries, err := os.ReadDir(recordRoot)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Remove takes away what is left of a lab, also when its maker crashed half
// way, and returns ErrNotUp when there is nothing.
func Remove(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("%q is not a lab's name", name)
	}
	r, err := readRecord(name)
	if err != nil {
		r = &record{Options: Options{Name: name}}
		if _, statErr := os.Stat(r.directory()); statErr != nil {
			return err
		}
	}
	return r.remove()
}

func (r *record) directory() string    { return filepath.Join(recordRoot, r.Options.Name) }
func (r *record) pidDirectory() string { return filepath.Join(r.directory(), "pids") }
func (r *record) file() string         { return filepath.Join(r.directory(), "lab.json") }

// write stores the record; a reader sees the old one or the new one.
func (r *record) write() error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(r.file()+".new", append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(r.file()+".new", r.file())
}

// setHolder stores the process that holds a node, counted from 1.
func (r *record) setHolder(node int, holder pid) error {
	for len(r.Holders) < node {
		r.Holders = append(r.Holders, pid{})
	}
	r.Holders[node-1] = holder
	return r.write()
}

// holder returns the process that holds a node, or one that does not exist.
func (r *record) holder(node int) pid {
	if node > len(r.Holders) {
		return pid{}
	}
	return r.Holders[node-1]
}

// remove takes the lab away. What is already gone is no error.
func (r *record) remove() error {
	return locked(func() error {
		err := r.removeLab()
		names, namesErr := Names()
		if err = errors.Join(err, namesErr); len(names) > 0 {
			return err
		}
		// The lock goes with the rest: whoever waits for it will notice.
		return errors.Join(err, removeMountPoints(), os.RemoveAll(recordRoot))
	})
}

// removeLab takes the lab away but leaves what all labs share.
func (r *record) removeLab() error {
	return errors.Join(
		r.endProcesses(),
		r.Options.releaseCards(),
		removeNamespaces(r.Options.Name+"-"),
		os.RemoveAll(r.directory()),
	)
}

// endProcesses ends every process that was started in the lab.
func (r *record) endProcesses() error {
	entries, err := os.ReadDir(r.pidDirectory())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var all []pid
	for _, e := range entries {
		if p, err := readPID(filepath.Join(r.pidDirectory(), e.Name())); err == nil {
			all = append(all, p)
		}
	}
	return endAll(all)
}

// removeAbandoned removes the labs whose maker is gone without having closed
// them, unless they were to be kept. One that does not go stands in nobody's
// way: `weftlab down` tells why.
func removeAbandoned() {
	names, _ := Names()
	for _, name := range names {
		if r, err := readRecord(name); err == nil && !r.Options.Keep && !r.Maker.alive() {
			_ = r.removeLab()
		}
	}
}

// locked runs f while no other process registers or removes a lab.
func locked(f func() error) error {
	for {
		lock, err := lockFile()
		if err != nil {
			return err
		}
		if lock == nil {
			continue
		}
		defer lock.Close()
		return f()
	}
}

// lockFile takes the lock. It returns nil when the file was removed, together
// with the last lab, while we waited.
func lockFile() (*os.File, error) {
	if err := os.MkdirAll(recordRoot, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(recordRoot, ".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	ours, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if now, err := os.Stat(path); err != nil || !os.SameFile(ours, now) {
		f.Close()
		return nil, nil
	}
	return f, nil
}

// makeMountPoints makes the missing ones and notes them.
func makeMountPoints() error {
	made, err := madeMountPoints()
	if err != nil {
		return err
	}
	for _, dir := range mountPoints {
		if _, err := os.Stat(dir); err == nil {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		made = append(made, dir)
	}
	mounted, err := shareNames()
	if mounted {
		made = append(made, mountedMark+netnsDir)
	}
	return errors.Join(err, os.WriteFile(madeFile, []byte(strings.Join(made, "\n")), 0o644))
}

const (
	madeFile = recordRoot + "/.made"
	// mountedMark stands in madeFile before a directory that was mounted on
	// itself.
	mountedMark = "mounted:"
)

func madeMountPoints() ([]string, error) {
	text, err := os.ReadFile(madeFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return strings.Fields(string(text)), nil
}

// removeMountPoints undoes makeMountPoints, last first, except where somebody
// else uses by now what was made.
func removeMountPoints() error {
	made, err := madeMountPoints()
	for _, dir := range slices.Backward(made) {
		undone := undoMountPoint(dir)
		for _, fine := range []error{unix.ENOTEMPTY, unix.EBUSY, unix.EINVAL, fs.ErrNotExist} {
			if errors.Is(undone, fine) {
				undone = nil
			}
		}
		err = errors.Join(err, undone)
	}
	return err
}

func undoMountPoint(dir string) error {
	if path, ok := strings.CutPrefix(dir, mountedMark); ok {
		return unix.Unmount(path, 0)
	}
	return os.Remove(dir)
}
