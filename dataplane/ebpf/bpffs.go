//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// bpffsRoot is where a bpffs belongs.
const bpffsRoot = "/sys/fs/bpf"

// EnsureBPFFS sees to it that pins can be made under dir. On a host a missing
// bpffs is mounted at its usual place. In a container never: the mount would
// end with the container, and so would the traffic that hangs on the pins.
func EnsureBPFFS(dir string) error {
	on, err := onBPFFS(dir)
	if err != nil || on {
		return err
	}
	if container := inContainer(); container != "" {
		return fmt.Errorf("%s is not on a bpffs, and inside a container (%s) none is mounted: mount the host's /sys/fs/bpf into it (in Kubernetes a hostPath volume)", dir, container)
	}
	if dir != bpffsRoot && !strings.HasPrefix(dir, bpffsRoot+"/") {
		return fmt.Errorf("%s is not on a bpffs; mount one there (mount -t bpf bpf DIR) or keep the pins under %s", dir, bpffsRoot)
	}
	if err := unix.Mount("bpf", bpffsRoot, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mounting a bpffs at %s: %w", bpffsRoot, err)
	}
	return nil
}

// onBPFFS tells whether dir, or the nearest directory above that exists, is on
// a bpffs.
func onBPFFS(dir string) (bool, error) {
	for ; ; dir = filepath.Dir(dir) {
		var fs unix.Statfs_t
		err := unix.Statfs(dir, &fs)
		if errors.Is(err, unix.ENOENT) && dir != "/" {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("looking at the file system of %s: %w", dir, err)
		}
		return fs.Type == unix.BPF_FS_MAGIC, nil
	}
}

// inContainer says how we know that we are in a container, or nothing.
func inContainer() string {
	for _, name := range []string{"KUBERNETES_SERVICE_HOST", "container"} {
		if os.Getenv(name) != "" {
			return "$" + name + " is set"
		}
	}
	for _, path := range []string{"/.dockerenv", "/run/.containerenv"} {
		if _, err := os.Stat(path); err == nil {
			return path + " is there"
		}
	}
	return ""
}
