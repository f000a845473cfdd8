//go:build linux

package dataplane

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/kernel"
)

// Switch is a change of the acceleration switches.
type Switch struct {
	On bool
	// Paths are the names of what is switched, base and express; empty means
	// both.
	Paths []string
	// Peers are public IPs; empty means the whole node.
	Peers []netip.Addr
}

// SetAccel turns acceleration on or off, effective on the next packet. It
// outlives the agent, but not a reboot.
func SetAccel(pinDir string, s Switch) error {
	paths := ebpf.Base | ebpf.Express
	if len(s.Paths) > 0 {
		paths = 0
	}
	for _, name := range s.Paths {
		switch name {
		case "base":
			paths |= ebpf.Base
		case "express":
			paths |= ebpf.Express
		default:
			return fmt.Errorf("%q is no path that can be switched; base and express are", name)
		}
	}
	return ebpf.SetAccel(pinDir, paths, s.On, s.Peers)
}

// Removal is what Remove did, in words.
type Removal struct {
	Removed []string `json:"removed"`
	// Left is what is left on purpose.
	Left []string `json:"left,omitempty"`
}

// Remove takes weft away so that the kernel path carries on by itself: programs,
// pins and firewall; with all also the overlay devices. With nothing there it
// removes nothing.
func Remove(_ context.Context, pinDir string, vni uint32, all bool) (r Removal, err error) {
	if r.Removed, err = ebpf.Remove(pinDir); err != nil {
		return r, err
	}
	firewall, err := removeFirewall()
	r.Removed = append(r.Removed, firewall...)
	if len(r.Removed) > 0 {
		r.Left = conntrackLeft()
	}
	if err != nil || !all {
		return r, err
	}
	path, err := kernel.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return r, err
	}
	defer path.Close()
	devices, err := path.Remove(vni)
	for _, d := range devices {
		r.Removed = append(r.Removed, fmt.Sprintf("device %s with its routes, neighbours and FDB entries", d))
	}
	return r, err
}
