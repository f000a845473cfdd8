//go:build linux

package dataplane

import (
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routesByMark tells whether the host has routing rules that look at the mark
// of a packet. bpf_fib_lookup() can't (before 6.10), so marked packets are then
// left to the kernel. When the rules can't be read the answer is yes.
func routesByMark() bool {
	rules, err := netlink.RuleList(unix.AF_INET)
	if err != nil {
		return true
	}
	for _, r := range rules {
		if r.Mark != 0 || r.Mask != nil && *r.Mask != 0 {
			return true
		}
	}
	return false
}

// routesByTOS tells whether the host has routing rules that look at the TOS of a
// packet: then packets of one flow may go different ways. When the rules can't
// be read the answer is yes.
func routesByTOS() bool {
	rules, err := netlink.RuleList(unix.AF_INET)
	if err != nil {
		return true
	}
	for _, r := range rules {
		if r.Tos != 0 {
			return true
		}
	}
	return false
}
