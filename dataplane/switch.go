//go:build linux

package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/hostrules"
	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
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
// pins and firewall; with all also the overlay devices, the host's rules for the
// overlay, and the routes of DirectRouting to peers that the pins know or the caller
// tells. With nothing there it removes nothing.
func Remove(ctx context.Context, pinDir string, vni uint32, all bool, told []state.Peer) (r Removal, err error) {
	peers := append(pinnedPeers(pinDir), told...)
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
	if n, directErr := path.RemoveDirect(peers); n > 0 || directErr != nil {
		r.Removed = append(r.Removed, fmt.Sprintf("%d routes of direct routing", n))
		err = directErr
	}
	devices, devicesErr := path.Remove(vni)
	for _, d := range devices {
		r.Removed = append(r.Removed, fmt.Sprintf("device %s with its routes, neighbours and FDB entries", d))
	}
	rules, rulesErr := removeHostRules(ctx)
	if rules {
		r.Removed = append(r.Removed, "flannel's masquerading and forwarding rules")
	}
	return r, errors.Join(err, devicesErr, rulesErr)
}

// removeHostRules tells whether there were any.
func removeHostRules(ctx context.Context) (bool, error) {
	rules, err := hostrules.Open(hostrules.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return false, err
	}
	defer rules.Close()
	return rules.Remove(ctx)
}

// pinnedPeers are the peers that the pins know, without their MACs; none where
// there are no pins.
func pinnedPeers(pinDir string) []state.Peer {
	view, err := ebpf.OpenView(pinDir)
	if err != nil {
		return nil
	}
	defer view.Close()
	var all []state.Peer
	peers, err := view.Peers()
	if err != nil {
		return nil
	}
	for _, p := range peers {
		for _, prefix := range p.Prefixes {
			all = append(all, state.Peer{Prefix: prefix, PublicIP: p.PublicIP})
		}
	}
	return all
}
