//go:build linux

package ebpf

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// lock takes the pin directory for one writer: the agent and weft accel both
// carry the switches into the maps, and neither may undo the other. It makes
// the directory if need be. The kernel drops the lock of a dead process.
func lock(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making pin directory: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("opening pin directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}
