//go:build linux

// Package sysctl says where the settings of the network are.
package sysctl

import (
	"os"
	"path/filepath"
)

// A container that is not privileged has /proc/sys read-only, and runtimes mount
// nothing inside /proc (checkProcMount in runc's libcontainer/rootfs_linux.go). So a
// pod has the host's /proc/sys/net elsewhere. What is in it is that of the network
// namespace of whoever looks.
const (
	own      = "/proc/sys"
	fromHost = "/host/proc/sys"
)

// Remedy is what to do when a setting can't be written.
const Remedy = "set it on the host, or mount the host's /proc/sys/net at " + fromHost + "/net"

// Path is the file of a setting, by its name below /proc/sys: the host's, where that
// is mounted.
func Path(name string) string { return choose(fromHost, own, name) }

func choose(first, second, name string) string {
	path := filepath.Join(first, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	return filepath.Join(second, name)
}
