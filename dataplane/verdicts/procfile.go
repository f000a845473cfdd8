//go:build linux

package verdicts

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// procFile is a file below /proc that is read again and again, by one goroutine
// at a time. It stays open, which makes that one system call, and belongs to the
// namespace it was opened in.
type procFile struct {
	path string
	fd   int   // less than zero: it is not open
	err  error // of the last opening or reading
}

func newProcFile(path string) procFile { return procFile{path: path, fd: -1, err: os.ErrNotExist} }

// open opens the file in the calling thread's namespace, unless it is open. One
// may appear later, with a module.
func (p *procFile) open() {
	if p.fd < 0 {
		p.fd, p.err = unix.Open(p.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
}

// read reads the file into b. What is not there is empty.
func (p *procFile) read(b []byte) ([]byte, error) {
	if p.fd >= 0 {
		n, err := unix.Pread(p.fd, b, 0)
		if err == nil {
			return b[:n], nil
		}
		p.close() // it went with its module
	}
	if errors.Is(p.err, os.ErrNotExist) {
		return nil, nil
	}
	return nil, p.err
}

func (p *procFile) close() {
	if p.fd >= 0 {
		_ = unix.Close(p.fd)
	}
	p.fd, p.err = -1, os.ErrNotExist
}
