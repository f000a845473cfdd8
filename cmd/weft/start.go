package main

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/uplink"
)

// rules are what flannel would write into the host's firewall, if the node stands
// in a flannel's place.
func (s source) rules(o *agentOptions) dataplane.Rules {
	if !s.flannel {
		return dataplane.Rules{}
	}
	return o.rules()
}

// runStore finds out what is to be known before the store can run, and runs it.
func (a *agent) runStore(ctx context.Context, n node, parts *sync.WaitGroup) error {
	var store controlplane.Store
	if !a.retry(ctx, func() (err error) {
		store, err = a.source.open(ctx)
		return err
	}) {
		return nil
	}
	if a.source.prepare == nil {
		return store.Run(ctx, a)
	}
	var known preparation
	if !a.retry(ctx, func() (err error) {
		known, err = a.source.prepare(ctx, store)
		return err
	}) {
		return nil
	}
	finder, err := n.OpenUplink(a.log)
	if err != nil {
		return err
	}
	defer finder.Close()
	events, err := finder.Watch(ctx)
	if err != nil {
		return err
	}
	offer := &offer{log: a.log, store: store, find: func() (uplink.Uplink, error) { return finder.Find(known.uplink) }}
	if offer.made.MAC, offer.made.MACv6, err = a.path.MACs(known.vni); err != nil {
		return err
	}
	if !a.retry(ctx, offer.Look) {
		return nil
	}
	a.setOffer(offer)
	parts.Go(func() { offer.Follow(ctx, events) })
	return store.Run(ctx, a)
}

// retry does something until it works, and tells as the store's health what is in
// the way; false when ctx is done.
func (a *agent) retry(ctx context.Context, try func() error) bool {
	for failures := 1; ; failures++ {
		err := try()
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			return true
		}
		a.Health(err)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(a.loop.retryGap(failures)):
		}
	}
}

// startFromMemory has the node carry traffic as it did last when the store does not
// tell in time what it should: after a reboot while the API is away.
func (a *agent) startFromMemory(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(a.timing.StoreWait):
	}
	last, at, err := a.memory.Recall()
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			a.log.Warn("nothing to go by until the store answers", "error", err)
		}
		return
	}
	a.wanting.Lock()
	told := a.desired != nil
	a.wanting.Unlock()
	if told {
		return
	}
	a.log.Warn("the store has said nothing yet; going by what it said last", "store", a.source.kind, "at", at, "peers", len(namesOf(last)))
	a.want(last)
}

// sync makes the dataplane hold a state, unless the host lacks what flannel
// demands of it.
func (a *agent) sync(ctx context.Context, s state.State) error {
	err := a.path.Sync(ctx, s)
	if a.source.flannel && !s.NFTables {
		err = errors.Join(err, a.path.BridgeFault(s))
	}
	return err
}

// carries tells whoever waits that the node carries the traffic of a state.
func (a *agent) carries(s state.State, first bool) {
	if err := a.subnet.Write(s, a.path.MTU()); err != nil {
		a.log.Error("the subnet file can't be written; pods can't start without it", "error", err)
	}
	if offer := a.getOffer(); offer != nil {
		offer.Carrying(s)
	}
	if !first {
		return
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		a.log.Warn("systemd can't be told that the node is ready", "error", err)
	}
}

// setOffer and getOffer are for the goroutines of the store and of the loop.
func (a *agent) setOffer(o *offer) {
	a.wanting.Lock()
	defer a.wanting.Unlock()
	a.offer = o
}

func (a *agent) getOffer() *offer {
	a.wanting.Lock()
	defer a.wanting.Unlock()
	return a.offer
}
