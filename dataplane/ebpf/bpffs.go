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
func EnsureBPFFS(dir string) error { return ensureBPFFS(dir, bpffsRoot, inContainer()) }

func ensureBPFFS(dir, root, container string) error {
	on, err := onBPFFS(dir)
	if err != nil || on {
		return err
	}
	if container != "" {
		return fmt.Errorf("%s is not on a bpffs, and inside a container (%s) none is mounted: mount the host's /sys/fs/bpf into it (in Kubernetes a hostPath volume)", dir, container)
	}
	if dir != root && !strings.HasPrefix(dir, root+"/") {
		return fmt.Errorf("%s is not on a bpffs; mount one there (mount -t bpf bpf DIR) or keep the pins under %s", dir, root)
	}
	if err := unix.Mount("bpf", root, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mounting a bpffs at %s: %w", root, err)
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

// initialPIDNamespace is the inode of the host's pid namespace, the same on all
// machines (PIDNS_INIT_INO in include/uapi/linux/nsfs.h).
const initialPIDNamespace = 0xEFFFFFFC

// inContainer says how we know that we are in a container, or nothing. Marker
// files are not asked: virtual machines are made from container images too.
func inContainer() string {
	for _, name := range []string{"KUBERNETES_SERVICE_HOST", "container"} {
		if os.Getenv(name) != "" {
			return "$" + name + " is set"
		}
	}
	var pids unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &pids); err == nil && pids.Ino != initialPIDNamespace {
		return "it has process numbers of its own"
	}
	if otherMounts("/proc/1") {
		return "it has mounts of its own"
	}
	return ""
}

// otherMounts reports whether this thread's mounts are known to be others than
// those of a process. Whoever may not look at the process may not mount either.
func otherMounts(process string) bool {
	var ours, theirs unix.Stat_t
	errOurs := unix.Stat("/proc/thread-self/ns/mnt", &ours)
	errTheirs := unix.Stat(process+"/ns/mnt", &theirs)
	return errOurs == nil && errTheirs == nil && ours.Ino != theirs.Ino
}
