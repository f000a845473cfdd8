//go:build linux

package uplink

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

const (
	// settleTime is how long more events are waited for after the first: an
	// interface that comes brings several. It bounds how often Watch nudges.
	settleTime = 200 * time.Millisecond
	// resubscribeDelay is the pause after a watch socket failed.
	resubscribeDelay = time.Second
)

// Watch nudges when Find may find something else than before: when interfaces,
// addresses or default routes change, or what leads to the address that is to be
// reached. Many changes make one nudge; events that were lost make one too. When
// ctx is done or the Finder closed, the channel is closed.
func (f *Finder) Watch(ctx context.Context) (<-chan struct{}, error) {
	socket, err := f.subscribe()
	if err != nil {
		return nil, fmt.Errorf("watching interfaces: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(f.life, cancel)
	nudges := make(chan struct{}, 1)
	events := make(chan struct{}, 1)
	go func() {
		defer cancel()
		defer stop()
		defer close(events)
		f.listen(ctx, socket, events)
	}()
	go func() {
		defer close(nudges)
		settle(ctx, events, nudges)
	}()
	return nudges, nil
}

// settle makes one nudge of the events of a while, until events is closed.
func settle(ctx context.Context, events <-chan struct{}, nudges chan<- struct{}) {
	for range events {
		select {
		case <-time.After(settleTime):
		case <-ctx.Done():
			continue // events are closed soon
		}
		select { // what came meanwhile is in this nudge
		case <-events:
		default:
		}
		signal(nudges)
	}
}

// signal leaves a nudge, unless one lies there already.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (f *Finder) subscribe() (socket *rtnl.Socket, err error) {
	err = f.namespace.Do(func() error {
		socket, err = rtnl.Open(
			unix.RTNLGRP_LINK,
			unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
			unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
		)
		return err
	})
	return socket, err
}

// listen turns the kernel's events into ours until ctx is done. A socket that
// fails is replaced.
func (f *Finder) listen(ctx context.Context, socket *rtnl.Socket, events chan<- struct{}) {
	for {
		err := f.hear(ctx, socket, events)
		socket.Close()
		for ctx.Err() == nil {
			f.log.Warn("watching interfaces failed; subscribing again", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(resubscribeDelay):
			}
			if socket, err = f.subscribe(); err == nil {
				signal(events) // for all that was not heard
				break
			}
		}
		if ctx.Err() != nil {
			if err == nil {
				socket.Close()
			}
			return
		}
	}
}

// hear reads events until the socket fails or ctx is done.
func (f *Finder) hear(ctx context.Context, socket *rtnl.Socket, events chan<- struct{}) error {
	defer context.AfterFunc(ctx, socket.Close)()
	for {
		received, err := socket.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			signal(events) // more came than we could take
			continue
		case err != nil:
			return err
		}
		for m := range received {
			if relevant(m, *f.reach.Load()) {
				signal(events)
			}
		}
	}
}

// relevant reports whether an event can make Find find something else, when it
// was to reach an address, or not.
func relevant(m rtnl.Message, reach netip.Addr) bool {
	switch m.Kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return len(m.Data) >= unix.SizeofIfInfomsg && m.Data[0] != unix.AF_BRIDGE // a bridge speaks of its port
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return true
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return reach.IsValid()
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return relevantRoute(m.Data, reach)
	}
	return false
}

// relevantRoute looks at a route (struct rtmsg and attributes): the default route
// counts, and what leads to the address that is to be reached.
func relevantRoute(data []byte, reach netip.Addr) bool {
	if len(data) < unix.SizeofRtMsg || rtnl.Uint32(data[8:])&unix.RTM_F_CLONED != 0 {
		return false
	}
	bits := int(data[1])
	if bits == 0 {
		return true
	}
	for kind, value := range rtnl.Attributes(data[unix.SizeofRtMsg:]) {
		if dst, ok := netip.AddrFromSlice(value); ok && kind == unix.RTA_DST {
			return netip.PrefixFrom(dst, bits).Contains(reach)
		}
	}
	return false
}
