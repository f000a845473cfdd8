//go:build linux

package endpoint

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
	"github.com/weft-net/weft/dataplane/state"
)

// hostGroups are the events of the host's namespace that can tell of a change.
var hostGroups = []int{
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_NEIGH, // stations of bridges
	unix.RTNLGRP_TC,
}

// podGroups are those of the pods' namespaces, where they can be heard.
var podGroups = []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR}

// How often to look. Events of the host tell at once of a pod that comes or
// goes, and seldom of an address in it: its namespace is heard only with
// CAP_NET_BROADCAST.
const (
	// hostGap is the least time between two nudges. podGap is the least before
	// one for what a pod can change as often as it likes, and stationGap before
	// one for a MAC that a bridge has found: anybody can send from any.
	hostGap    = 10 * time.Millisecond
	podGap     = 50 * time.Millisecond
	stationGap = time.Second
	// pollInterval is how often to look without any event: tcx programs send
	// none, and pods' namespaces may not be heard.
	pollInterval = 2 * time.Second
	// resubscribeDelay is the pause after a watch socket failed.
	resubscribeDelay = time.Second
)

// newVethLooks are the times after a veth's coming at which to look whether its
// pod has an address. A CNI plugin takes some 50 ms to there.
var newVethLooks = []time.Duration{
	10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond,
	200 * time.Millisecond, 500 * time.Millisecond, time.Second,
}

// Watch nudges whenever endpoints may have come, gone or changed, and every few
// seconds, until ctx is done or the finder closed; then the channel is closed.
// Many changes make one nudge. What to take notice of is known from the last
// Find.
func (f *Finder) Watch(ctx context.Context) (<-chan struct{}, error) {
	w := &watcher{finder: f, nudges: make(chan struct{}, 1), events: make(chan event)}
	if err := w.subscribe(); err != nil {
		return nil, fmt.Errorf("watching for endpoints: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(f.life, cancel)
	go func() {
		defer cancel()
		defer stop()
		w.run(ctx)
	}()
	return w.nudges, nil
}

// event is what a socket has heard.
type event struct {
	// gap is the least time from the last nudge to one for this.
	gap time.Duration
	// came and went are veths.
	came, went []int
	// err ends the socket.
	err error
}

// watcher is one Watch.
type watcher struct {
	finder *Finder
	nudges chan struct{}
	events chan event
	// host hears the host's namespace, pods also those of the pods; it is nil
	// where that is not allowed.
	host, pods *rtnl.Socket
	told       bool

	last  time.Time // when the last nudge was
	next  time.Time // when one is due; zero when none is
	young map[int]time.Time
}

// subscribe opens the sockets.
func (w *watcher) subscribe() error {
	return w.finder.namespace.Do(func() (err error) {
		if w.host, err = rtnl.Open(hostGroups...); err != nil {
			return err
		}
		w.host.Drop(append(noStations(), w.finder.opts.Ignore...)...)
		w.pods, err = rtnl.Open(podGroups...)
		if err == nil {
			err = w.finder.listenAll(w.pods)
		}
		if err != nil {
			if w.pods != nil {
				w.pods.Close()
			}
			w.pods = nil
			w.deaf(err)
		}
		return nil
	})
}

// noStations matches the neighbours that are no stations of a bridge: those of IP,
// and the addresses that a device itself listens to or, as VXLAN does, sends by.
func noStations() [][]rtnl.Match {
	const family, flags = unix.NLMSG_HDRLEN, unix.NLMSG_HDRLEN + 10 // in struct ndmsg
	added := rtnl.Kind(unix.RTM_NEWNEIGH)
	return [][]rtnl.Match{
		{rtnl.Kind(unix.RTM_DELNEIGH)}, // a pod that goes is told of otherwise
		{added, {Offset: family, Size: 1, Mask: 0xff, Value: unix.AF_INET}},
		{added, {Offset: family, Size: 1, Mask: 0xff, Value: unix.AF_INET6}},
		{added, {Offset: flags, Size: 1, Mask: unix.NTF_SELF, Value: unix.NTF_SELF}},
	}
}

// deaf says, once, that pods' namespaces can't be heard.
func (w *watcher) deaf(err error) {
	if !w.told {
		w.finder.opts.Log.Info("changes inside pods are found by looking", "every", w.finder.poll, "reason", err)
	}
	w.told = true
}

// listenAll makes a socket hear the events of all namespaces that have a number
// in ours.
func listenAll(s *rtnl.Socket) error {
	if err := s.SetOption(unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 1); err != nil {
		return fmt.Errorf("listening to other namespaces (CAP_NET_BROADCAST): %w", err)
	}
	return nil
}

// run listens until ctx is done, subscribing again whenever a socket fails.
func (w *watcher) run(ctx context.Context) {
	defer close(w.nudges)
	for {
		err := w.listen(ctx)
		for ctx.Err() == nil {
			w.finder.opts.Log.Warn("watching for endpoints failed; subscribing again", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(resubscribeDelay):
			}
			if err = w.subscribe(); err == nil {
				w.due(0) // for all that was not heard
				break
			}
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// listen turns events and the passing of time into nudges.
func (w *watcher) listen(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, s := range []struct {
		socket *rtnl.Socket
		read   func(rtnl.Message) (event, bool)
	}{{w.host, w.hostEvent}, {w.pods, w.podEvent}} {
		if s.socket != nil {
			go hear(ctx, s.socket, w.events, s.read)
		}
	}
	w.young = map[int]time.Time{}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-w.events:
			if e.err != nil {
				return e.err
			}
			w.take(e)
		case <-timer.C:
		}
		timer.Reset(w.wait(time.Now()))
	}
}

// take takes notice of an event.
func (w *watcher) take(e event) {
	now := time.Now()
	for _, index := range e.came {
		if _, known := w.young[index]; !known && w.finder.interest.Load().open(index) {
			w.young[index] = now
		}
	}
	for _, index := range e.went {
		delete(w.young, index)
	}
	w.due(e.gap)
}

// due makes a nudge due a while after the last one.
func (w *watcher) due(gap time.Duration) {
	if at := w.last.Add(gap); w.next.IsZero() || at.Before(w.next) {
		w.next = at
	}
}

// wait leaves a nudge if one is due, and returns how long to wait for the next.
func (w *watcher) wait(now time.Time) time.Duration {
	at := w.last.Add(w.finder.poll)
	if !w.next.IsZero() && w.next.Before(at) {
		at = w.next
	}
	if look, ok := w.nextLook(); ok && look.Before(at) {
		at = look
	}
	if at.After(now) {
		return at.Sub(now)
	}
	select {
	case w.nudges <- struct{}{}:
	default: // one lies there already
	}
	w.last, w.next = now, time.Time{}
	return w.wait(now)
}

// nextLook is when to look again for the address of a young pod. Veths whose
// pods have one, or have had time enough, are young no more.
func (w *watcher) nextLook() (at time.Time, ok bool) {
	in := w.finder.interest.Load()
	for index, born := range w.young {
		i := slices.IndexFunc(w.finder.looks, func(age time.Duration) bool { return born.Add(age).After(w.last) })
		if i < 0 || !in.open(index) {
			delete(w.young, index)
			continue
		}
		if look := born.Add(w.finder.looks[i]); !ok || look.Before(at) {
			at, ok = look, true
		}
	}
	return at, ok
}

// hear reads events off a socket until it fails or ctx is done.
func hear(ctx context.Context, s *rtnl.Socket, events chan<- event, read func(rtnl.Message) (event, bool)) {
	defer s.Close()
	defer context.AfterFunc(ctx, s.Close)()
	for {
		received, err := s.Receive()
		var all event
		relevant := false
		switch {
		case errors.Is(err, unix.ENOBUFS):
			relevant, all.gap = true, podGap // more came than we could take; look
		case err != nil:
			relevant, all.err = true, err
		default:
			all.gap = stationGap
			for m := range received {
				if e, ok := read(m); ok {
					relevant = true
					all.gap = min(all.gap, e.gap)
					all.came = append(all.came, e.came...)
					all.went = append(all.went, e.went...)
				}
			}
		}
		if !relevant {
			continue
		}
		select {
		case events <- all:
		case <-ctx.Done():
			return
		}
		if all.err != nil {
			return
		}
	}
}

// hostEvent reads an event of the host's namespace.
func (w *watcher) hostEvent(m rtnl.Message) (event, bool) {
	in := w.finder.interest.Load()
	switch m.Kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return linkEvent(in, m)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, _, _, ok := parseAddress(m.Data)
		return event{gap: hostGap}, ok && in.inAddress(a.prefix.Addr())
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		_, dst, ok := parseRoute(m.Data)
		return event{gap: hostGap}, ok && in.inRoute(dst)
	case unix.RTM_NEWNEIGH:
		index, mac, ok := parseStation(m.Data)
		return event{gap: stationGap}, ok && in.inStation(index, mac)
	case unix.RTM_NEWQDISC, unix.RTM_DELQDISC, unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
		q, ok := parseQdisc(m.Data)
		return event{gap: hostGap}, ok && in.inVeth(q.device)
	}
	return event{}, false
}

// linkEvent reads of a device that is new, changed or gone.
func linkEvent(in *interest, m rtnl.Message) (event, bool) {
	l, _, ok := parseLink(m.Data)
	if !ok {
		return event{}, false
	}
	if m.Kind == unix.RTM_DELLINK && m.Data[0] != unix.AF_BRIDGE { // of AF_BRIDGE: it is a port no more
		return event{gap: hostGap, went: []int{l.index}}, l.kind == "veth" || l.kind == "bridge" || in.inVeth(l.index)
	}
	if l.kind == "veth" && l.netns != noNamespace {
		return event{gap: hostGap, came: []int{l.index}}, true
	}
	return event{gap: hostGap}, l.kind == "bridge" || in.inVeth(l.index)
}

// podEvent reads an event of any namespace.
func (w *watcher) podEvent(m rtnl.Message) (event, bool) {
	switch m.Kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		l, _, ok := parseLink(m.Data)
		return event{gap: podGap}, ok && l.kind == "veth"
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, _, _, ok := parseAddress(m.Data)
		return event{gap: podGap}, ok && w.finder.interest.Load().inAddress(a.prefix.Addr())
	}
	return event{}, false
}

// parseStation reads of a bridge's FDB entry at which port it is (struct ndmsg
// and attributes).
func parseStation(data []byte) (index int, mac state.MAC, ok bool) {
	if len(data) < unix.SizeofNdMsg || data[0] != unix.AF_BRIDGE {
		return 0, mac, false
	}
	for attr, value := range rtnl.Attributes(data[unix.SizeofNdMsg:]) {
		if attr == unix.NDA_LLADDR && len(value) == len(mac) {
			mac, ok = state.MAC(value), true
		}
	}
	return int(int32(binary.NativeEndian.Uint32(data[4:]))), mac, ok
}
