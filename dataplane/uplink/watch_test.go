//go:build linux

package uplink

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

const (
	// soon bounds the wait for a nudge that must come.
	soon = 5 * time.Second
	// quiet is how long no nudge comes when none may.
	quiet = settleTime + 200*time.Millisecond
)

// nudged counts nudges until there is none for a while.
func nudged(t *testing.T, nudges <-chan struct{}) (count int) {
	t.Helper()
	for wait := soon; ; wait = quiet {
		select {
		case _, open := <-nudges:
			if !open {
				t.Error("the watch ended")
				return count
			}
			count++
		case <-time.After(wait):
			return count
		}
	}
}

// settled waits until the node is as it was set up: that an interface carries is
// told some time after it was turned on.
func settled(t *testing.T, nudges <-chan struct{}) {
	t.Helper()
	for {
		select {
		case <-nudges:
		case <-time.After(quiet):
			return
		}
	}
}

func wantQuiet(t *testing.T, nudges <-chan struct{}) {
	t.Helper()
	select {
	case <-nudges:
		t.Error("a nudge")
	case <-time.After(quiet):
	}
}

func TestChangesAreNoticed(t *testing.T) {
	for name, test := range map[string]struct {
		options Options
		change  string
		noticed bool
	}{
		"AddressAdded":      {v4, "ip addr add 192.0.2.77/24 dev eth0", true},
		"AddressRemoved":    {v4, "ip addr del 192.0.2.11/24 dev eth0", true},
		"IPv6Address":       {v6, "ip addr add 2001:db8::77/64 dev eth0", true},
		"InterfaceAdded":    {v4, "ip link add eth9 type veth peer name wire9", true},
		"InterfaceRemoved":  {v4, "ip link del eth1", true},
		"MTU":               {v4, "ip link set eth0 mtu 1300", true},
		"DefaultRoute":      {v4, "ip route replace default via 192.0.2.2", true},
		"IPv6DefaultRoute":  {v6, "ip -6 route del default", true},
		"OtherRoute":        {v4, "ip route add 10.9.0.0/16 via 192.0.2.1", false},
		"RouteToTheReached": {v4.with(reach("10.9.0.1")), "ip route add 10.9.0.0/16 via 198.51.100.1", true},
		"RouteApartFromIt":  {v4.with(reach("10.9.0.1")), "ip route add 10.8.0.0/16 via 198.51.100.1", false},
		"RuleWhenReaching":  {v4.with(reach("10.9.0.1")), "ip rule add to 10.9.0.1 lookup 100", true},
		"Rule":              {v4, "ip rule add to 10.9.0.1 lookup 100", false},
		"Neighbour":         {v4, "ip neigh add 192.0.2.55 lladdr 0a:00:00:00:00:55 dev eth0 nud permanent", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, ns := newFinder(t, &bytes.Buffer{}, hostOfTests)
			nudges, err := f.Watch(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Find(test.options); err != nil {
				t.Fatal(err)
			}
			settled(t, nudges)
			ns.Run(t, test.change)
			if !test.noticed {
				wantQuiet(t, nudges)
			} else if nudged(t, nudges) == 0 {
				t.Error("no nudge")
			}
		})
	}
}

func TestManyChangesMakeFewNudges(t *testing.T) {
	f, ns := newFinder(t, &bytes.Buffer{}, hostOfTests)
	nudges, err := f.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	settled(t, nudges)
	begin := time.Now()
	count := make(chan int)
	go func() { count <- nudged(t, nudges) }()
	for i := range 100 {
		ns.Run(t, fmt.Sprintf("ip addr add 192.0.2.%d/24 dev eth0", 120+i))
	}
	most := int(time.Since(begin)/settleTime) + 2
	if got := <-count; got == 0 || got > most {
		t.Errorf("%d nudges, want 1 to %d", got, most)
	}
	up, err := f.Find(v4)
	if err != nil || text(up) != "eth0 192.0.2.11" {
		t.Errorf("found %s (%v)", text(up), err)
	}
}

// The address of the interface changes, and Find finds the new one after the
// nudge.
func TestAddressChanged(t *testing.T) {
	f, ns := newFinder(t, &bytes.Buffer{}, hostOfTests)
	nudges, err := f.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before, err := f.Find(v4.with(iface("eth1")))
	if err != nil {
		t.Fatal(err)
	}
	settled(t, nudges)
	ns.Run(t, "ip addr del 198.51.100.11/24 dev eth1", "ip addr add 198.51.100.12/24 dev eth1")
	if nudged(t, nudges) == 0 {
		t.Error("no nudge")
	}
	after, err := f.Find(v4.with(iface("eth1")))
	if err != nil || before == after || text(after) != "eth1 198.51.100.12" {
		t.Errorf("found %s (%v), was %s", text(after), err, text(before))
	}
}

func TestBrokenSocketIsReplaced(t *testing.T) {
	f, ns := newFinder(t, &bytes.Buffer{}, hostOfTests)
	socket, err := f.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan struct{}, 1)
	go f.listen(t.Context(), socket, events)
	socket.Close()
	if nudged(t, events) == 0 {
		t.Error("no nudge for what was not heard")
	}
	ns.Run(t, "ip addr add 192.0.2.77/24 dev eth0")
	if nudged(t, events) == 0 {
		t.Error("no nudge by the new socket")
	}
}

func TestOverrunNudges(t *testing.T) {
	f, ns := newFinder(t, &bytes.Buffer{}, hostOfTests)
	socket, err := f.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	if err := socket.SetOption(unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
		t.Fatal(err)
	}
	for i := range 100 { // of no interest, and more than fit
		ns.Run(t, fmt.Sprintf("ip route add 10.9.%d.0/24 via 192.0.2.1", i))
	}
	events := make(chan struct{}, 1)
	go f.listen(t.Context(), socket, events)
	if nudged(t, events) == 0 {
		t.Error("no nudge for what was lost")
	}
}

func TestWatchEndsWithItsContextAndItsFinder(t *testing.T) {
	for name, end := range map[string]func(*Finder, context.CancelFunc){
		"Context": func(_ *Finder, cancel context.CancelFunc) { cancel() },
		"Finder":  func(f *Finder, _ context.CancelFunc) { _ = f.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			f, _ := newFinder(t, &bytes.Buffer{}, hostOfTests)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			nudges, err := f.Watch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			end(f, cancel)
			for deadline := time.After(soon); ; {
				select {
				case _, open := <-nudges:
					if !open {
						return
					}
				case <-deadline:
					t.Fatal("the channel is not closed")
				}
			}
		})
	}
}

// FuzzRoute: the kernel's own messages, and such with any damage, are read without
// harm.
func FuzzRoute(f *testing.F) {
	f.Add([]byte{unix.AF_INET, 16, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0, 8, 0, 1, 0, 10, 9, 0, 0})
	f.Add(make([]byte, unix.SizeofRtMsg))
	f.Fuzz(func(_ *testing.T, data []byte) {
		for _, kind := range []uint16{unix.RTM_NEWROUTE, unix.RTM_NEWLINK, unix.RTM_NEWADDR} {
			_ = relevant(rtnl.Message{Kind: kind, Data: data}, netip.MustParseAddr("10.9.0.1"))
		}
	})
}
