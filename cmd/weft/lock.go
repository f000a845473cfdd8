package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// lock keeps a second agent from the same run directory, and tells others that
// an agent is alive. The kernel lets go of it when the process ends, however it
// ends; so, unlike a process number, it is never wrong about a dead agent, and
// it means the same inside and outside of a container.
type lock struct {
	file *os.File
}

// errLocked says that another process holds the lock.
var errLocked = errors.New("holds the lock")

// lockPath is where the lock lies.
func lockPath(runDir string) string { return filepath.Join(runDir, "agent.lock") }

// takeLock takes the lock of a run directory, which it makes if need be. It
// writes this process's number into it for others to name.
func takeLock(runDir string) (*lock, error) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, fmt.Errorf("making the run directory: %w", err)
	}
	file, err := os.OpenFile(lockPath(runDir), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the lock: %w", err)
	}
	// An open-file-description lock rather than flock: others can ask for its
	// state without taking it for a moment, which could turn an agent away.
	err = unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		holder := lockHolder(file)
		file.Close()
		return nil, fmt.Errorf("%s %w %s", holder, errLocked, lockPath(runDir))
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("locking %s: %w", lockPath(runDir), err)
	}
	if err := file.Truncate(0); err == nil {
		_, err = file.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		if err != nil {
			file.Close()
			return nil, fmt.Errorf("writing %s: %w", lockPath(runDir), err)
		}
	}
	return &lock{file}, nil
}

// Release lets go of the lock. The file stays: to remove it would let two
// processes hold locks on two files of one name.
func (l *lock) Release() { l.file.Close() }

// lockHeld tells whether somebody holds the lock of a run directory, and who.
func lockHeld(runDir string) (holder string, held bool, err error) {
	file, err := os.Open(lockPath(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("asking whether an agent runs: %w", err)
	}
	defer file.Close()
	ask := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(file.Fd(), unix.F_OFD_GETLK, &ask); err != nil {
		return "", false, fmt.Errorf("asking for the state of %s: %w", lockPath(runDir), err)
	}
	if ask.Type == unix.F_UNLCK {
		return "", false, nil
	}
	return lockHolder(file), true, nil
}

// lockHolder reads who wrote itself into the lock.
func lockHolder(file *os.File) string {
	data := make([]byte, 20)
	n, _ := file.ReadAt(data, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(data[:n])))
	if err != nil {
		return "a process that has not said its number yet"
	}
	return fmt.Sprintf("process %d", pid)
}
