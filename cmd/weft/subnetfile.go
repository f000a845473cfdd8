package main

import (
	"log/slog"
	"os"

	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// subnetFile is flannel's subnet.env, which the CNI plugin and Docker wait for:
// so it is written when the node can carry their packets.
type subnetFile struct {
	path   string // "" for none
	ipMasq bool
	log    *slog.Logger
	// written is what was written last.
	written *flannel.SubnetEnv
}

// Write writes what a state that is in force says; mtu is the overlay's. What is
// there already is not written again.
func (f *subnetFile) Write(s state.State, mtu int) error {
	if f.path == "" {
		return nil
	}
	var c flannel.Config
	var l flannel.Lease
	for _, n := range s.Networks {
		*either(n.Addr().Is4(), &c.Network, &c.IPv6Network) = n
	}
	for _, p := range s.Local.Prefixes {
		*either(p.Addr().Is4(), &l.Prefix, &l.PrefixV6) = p
	}
	e := flannel.NewSubnetEnv(c, l, mtu, f.ipMasq)
	if f.written != nil && *f.written == e {
		// Somebody may have cleaned up /run.
		if _, err := os.Stat(f.path); err == nil {
			return nil
		}
	}
	if err := flannel.WriteFile(f.path, e); err != nil {
		return err
	}
	f.written = &e
	f.log.Info("subnet file written", "path", f.path, "subnet", e.Subnet, "ipv6", e.IPv6Subnet, "mtu", e.MTU)
	return nil
}

// either is a or b.
func either[T any](first bool, a, b *T) *T {
	if first {
		return a
	}
	return b
}
