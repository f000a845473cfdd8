//go:build linux

package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// watchGroups are the kernel's events that can tell of a change in what Sync
// makes, or in what it leans on.
var watchGroups = []int{
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_NEIGH, // FDB entries too
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
}

// resubscribeDelay is the pause after a watch socket failed.
const resubscribeDelay = time.Second

// Watch nudges whenever something that Sync cares about may have changed,
// until ctx is done or the path closed; then the channel is closed. Many changes make one nudge.
// Some of Sync's own changes are seen too, of devices above all: they cause one more
// Sync, which finds nothing to do and so causes no more.
//
// What to care about is known from the last Sync. Events that came while
// nobody listened, because the socket ran over or failed, are made up for by a
// nudge.
func (p *Path) Watch(ctx context.Context) (<-chan struct{}, error) {
	w := &watcher{path: p, nudges: make(chan struct{}, 1)}
	if err := w.subscribe(); err != nil {
		return nil, fmt.Errorf("watching the kernel: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.life, cancel)
	go func() {
		defer cancel()
		defer stop()
		w.run(ctx)
	}()
	return w.nudges, nil
}

// Caused matches the events about routes and neighbours that the path itself has
// caused, for those who listen for what others change. Of FDB entries of a VXLAN
// device the kernel does not say who has caused them (vxlan_fdb_notify).
func (p *Path) Caused() [][]rtnl.Match {
	var all [][]rtnl.Match
	for _, kind := range []uint16{unix.RTM_NEWROUTE, unix.RTM_DELROUTE, unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH} {
		all = append(all, []rtnl.Match{rtnl.CausedBy(p.socket.Port()), rtnl.Kind(kind)})
	}
	return all
}

// watcher is one Watch.
type watcher struct {
	path   *Path
	nudges chan struct{}
	socket *rtnl.Socket
	// devices are the indexes of devices that have the name of an overlay
	// device.
	devices map[int]bool
}

func (w *watcher) run(ctx context.Context) {
	defer close(w.nudges)
	for {
		err := w.listen(ctx)
		w.socket.Close()
		for ctx.Err() == nil {
			w.path.log.Warn("watching the kernel failed; subscribing again", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(resubscribeDelay):
			}
			if err = w.subscribe(); err == nil {
				w.nudge() // for all that was not heard
				break
			}
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// subscribe opens the socket first and then reads which overlay devices there
// are, so that none comes unnoticed.
func (w *watcher) subscribe() error {
	err := w.path.namespace.Do(func() error {
		var err error
		w.socket, err = rtnl.Open(watchGroups...)
		return err
	})
	if err != nil {
		return err
	}
	w.socket.Drop(w.path.Caused()...)
	if err := w.findDevices(); err != nil {
		w.socket.Close()
		return err
	}
	return nil
}

// listen reads events until the socket fails or ctx is done.
func (w *watcher) listen(ctx context.Context) error {
	socket := w.socket
	defer context.AfterFunc(ctx, socket.Close)()
	for {
		received, err := socket.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			// More came than we could take. What was lost is unknown; the
			// socket goes on.
			w.nudge()
			if err = w.findDevices(); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		relevant := false
		for m := range received {
			if w.relevant(m) {
				relevant = true
			}
		}
		if relevant {
			w.nudge()
		}
	}
}

// nudge leaves a nudge, unless one lies there already.
func (w *watcher) nudge() {
	select {
	case w.nudges <- struct{}{}:
	default:
	}
}

// findDevices reads which overlay devices there are. It has a socket of its
// own for that, so that it never waits for a Sync.
func (w *watcher) findDevices() error {
	var socket *rtnl.Socket
	err := w.path.namespace.Do(func() error {
		var err error
		socket, err = rtnl.Open()
		return err
	})
	if err != nil {
		return err
	}
	defer socket.Close()
	err = socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			return rtnl.NewRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP, make([]byte, unix.SizeofIfInfomsg)...)
		},
		unix.RTM_NEWLINK,
		func() { w.devices = map[int]bool{} },
		func(data []byte) {
			if index, name := parseLink(data); isDeviceName(name) {
				w.devices[index] = true
			}
		},
	)
	if err != nil && !errors.Is(err, rtnl.ErrInterrupted) { // a device that comes meanwhile is heard of
		return fmt.Errorf("reading links: %w", err)
	}
	return nil
}

// parseLink reads index and name of a link (struct ifinfomsg and attributes).
func parseLink(data []byte) (index int, name string) {
	if len(data) < unix.SizeofIfInfomsg {
		return 0, ""
	}
	for kind, value := range rtnl.Attributes(data[unix.SizeofIfInfomsg:]) {
		if kind == unix.IFLA_IFNAME {
			name = unix.ByteSliceToString(value)
			break
		}
	}
	return int(binary.NativeEndian.Uint32(data[4:])), name
}

// relevant reports whether an event has to do with what Sync makes.
func (w *watcher) relevant(m rtnl.Message) bool {
	in := w.path.interest.Load()
	switch m.Kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return w.relevantLink(in, m)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < unix.SizeofIfAddrmsg {
			return false
		}
		index := int(binary.NativeEndian.Uint32(m.Data[4:]))
		return index == in.uplinkIndex || w.devices[index] && !isLinkLocal(m.Data) || in.isLocal(m.Data)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		r, ok := parseRoute(m.Data)
		if (r.index == in.uplinkIndex || r.kind == "multipath") && rtnl.RouteMTU(m.Data) > 0 {
			return true // the accelerator has to know
		}
		return ok && (w.devices[r.index] || in.inRoute(r.prefix)) || in.inUnderlay(r.prefix)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		n, ok := parseNeighbour(m.Data)
		if !ok || !w.devices[n.index] {
			return false
		}
		if n.family == unix.AF_BRIDGE {
			if !n.used {
				// Older kernels, as 6.12, tell of a request too, after what it did and
				// without the underlay address (rtnl_fdb_notify).
				return false
			}
			return in.inFDB(n.fdbEntry(), m.Kind == unix.RTM_NEWNEIGH)
		}
		return in.inNeighbour(n.neighbour(), m.Kind == unix.RTM_NEWNEIGH)
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return true
	}
	return false
}

// isLocal reports whether an event about an address (struct ifaddrmsg and
// attributes) is about one that packets are sent from.
func (in *interest) isLocal(data []byte) bool {
	return hasAddress(data, func(a netip.Addr) bool { return slices.Contains(in.local, a) })
}

// isLinkLocal reports whether an event about an address is about one that the kernel
// gives each device: nobody leans on an overlay device's, and it comes a second
// after the device.
func isLinkLocal(data []byte) bool { return hasAddress(data, netip.Addr.IsLinkLocalUnicast) }

// hasAddress reports whether an event about an address (struct ifaddrmsg and
// attributes) is about one that is such.
func hasAddress(data []byte, such func(netip.Addr) bool) bool {
	if len(data) < unix.SizeofIfAddrmsg {
		return false
	}
	for kind, value := range rtnl.Attributes(data[unix.SizeofIfAddrmsg:]) {
		if kind != unix.IFA_LOCAL && kind != unix.IFA_ADDRESS {
			continue
		}
		if a, ok := netip.AddrFromSlice(value); ok && such(a) {
			return true
		}
	}
	return false
}

// relevantLink looks at a link that is new, changed or gone.
func (w *watcher) relevantLink(in *interest, m rtnl.Message) bool {
	if len(m.Data) < unix.SizeofIfInfomsg || m.Data[0] == unix.AF_BRIDGE {
		return false // of AF_BRIDGE: a bridge speaks of its port
	}
	index, name := parseLink(m.Data)
	was := w.devices[index] // it may have been renamed away
	delete(w.devices, index)
	is := isDeviceName(name)
	if is && m.Kind == unix.RTM_NEWLINK {
		w.devices[index] = true
	}
	return is || was || name == in.uplink || index == in.uplinkIndex
}
