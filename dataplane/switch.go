//go:build linux

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/kernel"
)

// Switch is a change of the acceleration switches.
type Switch struct {
	On bool
	// Peers are public IPs; empty means the whole node.
	Peers []netip.Addr
}

// SetAccel turns acceleration on or off, effective on the next packet. It
// outlives the agent, but not a reboot.
func SetAccel(pinDir string, s Switch) error {
	return ebpf.SetAccel(pinDir, s.On, s.Peers)
}

// Remove takes weft away so that the kernel path carries on by itself: the
// programs and pins; with all also the overlay devices. It returns what it
// removed, in words; with nothing there it removes nothing.
func Remove(_ context.Context, pinDir string, vni uint32, all bool) ([]string, error) {
	removed, err := ebpf.Remove(pinDir)
	if err != nil || !all {
		return removed, err
	}
	path, err := kernel.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return removed, err
	}
	defer path.Close()
	devices, err := path.Remove(vni)
	for _, d := range devices {
		removed = append(removed, fmt.Sprintf("device %s with its routes, neighbours and FDB entries", d))
	}
	return removed, errors.Join(err)
}
