//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// Places in the initial RAM disk that both sides know.
const (
	jobFile   = "/job.json"
	moduleDir = "/modules"
)

// initrd makes the machine's first file system: this binary as init, the few
// modules it needs to reach the shared root, and the job.
func (k *kernel) initrd(ctx context.Context, j job) ([]byte, error) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	task, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	var a archive
	a.add("init", 0o100755, self)
	a.add(strings.TrimPrefix(jobFile, "/"), 0o100644, task)
	for _, dir := range []string{moduleDir, "/dev", "/proc", "/sys", "/lower", "/upper", "/root"} {
		a.add(strings.TrimPrefix(dir, "/"), 0o40755, nil)
	}
	files, err := k.moduleFiles(ctx, "virtio_pci", "virtiofs", "overlay")
	if err != nil {
		return nil, err
	}
	for i, file := range files {
		data, err := readModule(ctx, file)
		if err != nil {
			return nil, err
		}
		// The number keeps them in the order in which they must be loaded.
		a.add(fmt.Sprintf("%s/%03d", strings.TrimPrefix(moduleDir, "/"), i), 0o100644, data)
	}
	return a.close(), nil
}

func readModule(ctx context.Context, file string) ([]byte, error) {
	if strings.HasSuffix(file, ".xz") {
		return exec.CommandContext(ctx, "xz", "-dc", file).Output()
	}
	return os.ReadFile(file)
}

// archive is a cpio archive of the kind the kernel unpacks: "newc", see
// Documentation/driver-api/early-userspace/buffer-format.rst.
type archive struct {
	buf   bytes.Buffer
	inode int
}

func (a *archive) add(name string, mode int, data []byte) {
	a.inode++
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, mode, 0 /* uid */, 0 /* gid */, 1 /* links */, 0 /* mtime */, len(data),
		0, 0, 0, 0 /* devices */, len(name)+1, 0 /* checksum */)
	a.buf.WriteString(name + "\x00")
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *archive) close() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}
