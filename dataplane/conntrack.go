//go:build linux

package dataplane

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/weft-net/weft/dataplane/internal/sysctl"
)

// sysctlPath finds a setting; tests have others.
var sysctlPath = sysctl.Path

// conntrackSettings have to be 1 for express. Conntrack does not see the
// packets that take it, so its idea of a TCP window is behind: it would call
// the next packet that it sees invalid, and so would a reset whose sequence
// number it does not expect end nothing but look as if it had.
//
// They stay set when weft goes: taken back, flows that took express would hang.
var conntrackSettings = []string{
	"net/netfilter/nf_conntrack_tcp_be_liberal",
	"net/netfilter/nf_conntrack_tcp_ignore_invalid_rst",
}

// setConntrack sets what express needs of conntrack, and says which of it were
// not so before and what is in the way.
func setConntrack() (changed []string, obstacle string) {
	for _, name := range conntrackSettings {
		path := sysctlPath(name)
		now, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			return changed, settingMissing(name)
		}
		if err == nil && strings.TrimSpace(string(now)) == "1" {
			continue
		}
		if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
			return changed, fmt.Sprintf("%s is not 1 and can't be set (%v): %s", dotted(name), errors.Unwrap(err), sysctl.Remedy)
		}
		changed = append(changed, dotted(name))
	}
	return changed, ""
}

// settingMissing says why a setting of conntrack may not be there.
func settingMissing(name string) string {
	return dotted(name) + " does not exist: conntrack is not there (modprobe nf_conntrack), or not of this network namespace"
}

// conntrackLeft says which settings stay when weft goes.
func conntrackLeft() (left []string) {
	for _, name := range conntrackSettings {
		now, err := os.ReadFile(sysctlPath(name))
		if err == nil && strings.TrimSpace(string(now)) == "1" {
			left = append(left, dotted(name)+" = 1: connections that took express need it; a reboot sets it back")
		}
	}
	return left
}

// dotted is a setting as sysctl(8) writes it.
func dotted(name string) string { return strings.ReplaceAll(name, "/", ".") }
