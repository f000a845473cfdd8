//go:build linux

package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

const (
	// netnsDir is where iproute2 looks for the names of network namespaces.
	netnsDir = "/run/netns"
	// weftStateDir is weft's default for what must survive a reboot.
	weftStateDir = "/var/lib/weft"
)

// newNamespace makes a network namespace that is held open by its name.
func newNamespace(name string) error {
	return netns.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making network namespace %s: %w", name, err)
		}
		return nameNamespace(name, "/proc/thread-self/ns/net")
	})
}

// shareNames makes the directory of names a shared mount of its own, if it is
// none, as `ip netns add` does. If iproute2 did it while a lab is up, it would
// cover the names that are there, and nobody could unmount them.
func shareNames() (mounted bool, err error) {
	share := func() error { return unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	if err := share(); !errors.Is(err, unix.EINVAL) {
		return false, err
	}
	if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return false, fmt.Errorf("mounting %s on itself: %w", netnsDir, err)
	}
	return true, share()
}

// nameNamespace gives a network namespace a name, so that `ip -n NAME` works.
func nameNamespace(name, ns string) error {
	path := filepath.Join(netnsDir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("naming network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(ns, path, "none", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("naming network namespace %s: %w", name, err)
	}
	return nil
}

// removeNamespaces takes away the names that begin with a prefix, and with
// them the namespaces that nothing else holds open.
func removeNamespaces(prefix string) error {
	entries, err := os.ReadDir(netnsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			errs = append(errs, removeNamespace(filepath.Join(netnsDir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

func removeNamespace(path string) error {
	// EINVAL: it is a name that nothing was mounted on yet.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmounting %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// inNamespace runs f on a thread inside the named network namespace.
func inNamespace(name string, f func() error) error {
	return netns.OnThread(func() error {
		ns, err := os.Open(filepath.Join(netnsDir, name))
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering network namespace %s: %w", name, err)
		}
		return f()
	})
}
