package main

import (
	"context"
	"log/slog"
	"sync"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/uplink"
)

// offer tells a store what this node brings, and again when that changes.
type offer struct {
	log   *slog.Logger
	store controlplane.Store
	find  func() (uplink.Uplink, error)

	mu   sync.Mutex
	made controlplane.Offer
}

// Look finds the uplink and announces what has changed. While none is found, as
// during a restart of the network's configuration, the last one stays.
func (f *offer) Look() error {
	found, err := f.find()
	if err != nil {
		return err
	}
	f.change(func(o *controlplane.Offer) {
		o.Uplink, o.UplinkMTU = found.Name, found.MTU
		o.Address, o.AddressV6 = found.Address, found.AddressV6
		o.PublicIP, o.PublicIPv6 = found.PublicIP, found.PublicIPv6
	})
	return nil
}

// Carrying announces that the node carries traffic, with the devices that it has.
func (f *offer) Carrying(s state.State) {
	f.change(func(o *controlplane.Offer) {
		o.MAC, o.MACv6, o.Carrying = s.Local.MAC, s.Local.MACv6, true
	})
}

// change announces the offer if it differs from what was announced last.
func (f *offer) change(change func(*controlplane.Offer)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := f.made
	change(&next)
	if next == f.made {
		return
	}
	if next.Uplink != f.made.Uplink || next.Address != f.made.Address || next.AddressV6 != f.made.AddressV6 {
		f.log.Info("this node's uplink", "interface", next.Uplink, "mtu", next.UplinkMTU,
			"address", next.Address, "ipv6", next.AddressV6, "public", next.PublicIP, "publicIPv6", next.PublicIPv6)
	}
	f.made = next
	f.store.Announce(next)
}

// Made is what was announced last.
func (f *offer) Made() controlplane.Offer {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.made
}

// Follow looks again whenever events says so.
func (f *offer) Follow(ctx context.Context, events <-chan struct{}) {
	problems := newFailures(f.log, "finding the uplink")
	for {
		select {
		case <-ctx.Done():
			return
		case _, open := <-events:
			if !open {
				return
			}
			problems.Note(f.Look())
		}
	}
}
