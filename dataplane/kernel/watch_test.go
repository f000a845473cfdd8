//go:build linux

package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
)

const (
	// soon bounds the wait for a nudge that must come.
	soon = 5 * time.Second
	// quiet is how long no nudge comes when none may.
	quiet = 300 * time.Millisecond
)

// watching is a node with a watch, synced.
func watching(t *testing.T, peers string) (*node, <-chan struct{}) {
	t.Helper()
	n := newNode(t, peers)
	nudges, err := n.path.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.sync(t)
	wantQuiet(t, nudges)
	return n, nudges
}

func wantNudge(t *testing.T, nudges <-chan struct{}) {
	t.Helper()
	select {
	case _, open := <-nudges:
		if !open {
			t.Fatal("the watch ended")
		}
	case <-time.After(soon):
		t.Fatal("no nudge")
	}
}

// wantQuiet drains what is under way and then wants no nudge any more.
func wantQuiet(t *testing.T, nudges <-chan struct{}) {
	t.Helper()
	for range 10 {
		select {
		case <-nudges:
		case <-time.After(quiet):
			return
		}
	}
	t.Fatal("nudges without end")
}

// Whatever somebody does to the overlay is noticed at once and made good.
func TestDamageIsNoticedAndMadeGood(t *testing.T) {
	for name, damage := range map[string]string{
		"DeviceDeleted":     "ip link del flannel.1",
		"DeviceRenamed":     "ip link set flannel.1 down name gone",
		"DeviceDown":        "ip link set flannel.1 down",
		"DeviceMTU":         "ip link set flannel.1 mtu 1300",
		"DeviceMAC":         "ip link set flannel.1 address 0a:00:00:00:00:ff",
		"AddressDeleted":    "ip addr del 10.244.25.0/32 dev flannel.1",
		"RouteDeleted":      "ip route del 10.244.4.0/24",
		"RouteReplaced":     "ip route replace 10.244.4.0/24 via 192.0.2.12 dev eth0",
		"NeighbourDeleted":  "ip neigh del 10.244.4.0 dev flannel.1",
		"NeighbourChanged":  "ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:ff dev flannel.1 nud permanent",
		"NeighboursFlushed": "ip neigh flush dev flannel.1 nud all",
		"FDBDeleted":        "bridge fdb del 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self",
		"FDBChanged":        "bridge fdb replace 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.99 self permanent",
		"RoutesFlushed":     "ip route flush dev flannel.1",
		"StaleRoute":        "ip route add 10.244.66.0/24 via 10.244.66.0 dev flannel.1 onlink",
		"StaleNeighbour":    "ip neigh add 10.244.66.0 lladdr 0a:00:00:00:00:66 dev flannel.1 nud permanent",
		"StaleFDB":          "bridge fdb add 0a:00:00:00:00:66 dev flannel.1 dst 192.0.2.66 self permanent",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, nudges := watching(t, peerB)
			if _, err := n.Try(damage); err != nil && strings.Contains(err.Error(), "busy") {
				t.Skip("this kernel renames no device that is up; newer ones run this")
			} else if err != nil {
				t.Fatal(err)
			}
			wantNudge(t, nudges)
			if name == "DeviceRenamed" {
				// It still has our VNI: the operator is told, and removes it.
				if _, err := n.path.Sync(t.Context(), n.state); err == nil {
					t.Error("no error although the VNI is taken")
				}
				n.Run(t, "ip link del gone")
			}
			if res := n.sync(t); res.Steps == 0 {
				t.Error("nothing made good")
			}
			n.wantShow(t, "flannel.1", flannelDevice+flannelPeerB)
			wantQuiet(t, nudges)
		})
	}
}

func TestUplinkAndRulesAreWatched(t *testing.T) {
	for name, change := range map[string]string{
		"MTU":            "ip link set eth0 mtu 1400",
		"AddressAdded":   "ip addr add 192.0.2.77/24 dev eth0",
		"AddressDeleted": "ip addr del 2001:db8::11/64 dev eth0",
		"Down":           "ip link set eth0 down",
		"DeviceOnIt":     "ip link add link eth0 name on0 type macvlan", // as a VLAN would be
		"Rule":           "ip rule add from 10.244.25.0/24 lookup 100",
		"PodsRoute":      "ip route add 10.244.4.128/25 via 192.0.2.1 dev eth0",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, nudges := watching(t, peerB)
			n.Run(t, change)
			wantNudge(t, nudges)
		})
	}
}

// A busy host: pods come and go, others' routes and neighbours change.
func TestLifeOfTheHostDoesNotNudge(t *testing.T) {
	n, nudges := watching(t, peerB)
	n.Run(t,
		"ip link add cni0 type bridge", "ip link set cni0 up", "ip addr add 10.244.25.1/24 dev cni0",
		"ip link add veth1 type veth peer name veth2", "ip link set veth1 master cni0 up", "ip link set veth2 up",
		"ip neigh add 10.244.25.7 lladdr 0a:00:00:00:00:07 dev cni0 nud permanent",
		"bridge fdb add 0a:00:00:00:00:07 dev veth1 master static",
		"ip neigh add 192.0.2.12 lladdr 0a:00:00:00:00:12 dev eth0 nud reachable",
		"ip neigh add 10.244.88.0 lladdr 0a:00:00:00:00:88 dev flannel.1 nud stale",
		"ip neigh del 10.244.88.0 dev flannel.1",
		"ip route add 10.244.25.9/32 dev cni0",
		"ip route add 203.0.113.0/24 via 192.0.2.1 dev eth0",
		"ip route add 10.0.0.0/8 via 192.0.2.1 dev eth0",
		"ip route add 10.244.4.0/24 via 192.0.2.1 dev eth0 table 100",
		"ip link del veth1",
	)
	select {
	case <-nudges:
		t.Error("nudged")
	case <-time.After(quiet):
	}
}

// What Sync itself does about peers needs no further Sync, nor does the address that
// the kernel gives each device.
func TestOwnChangesOfPeersDoNotNudge(t *testing.T) {
	n, nudges := watching(t, peerB)
	n.state.Networks = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	many, moved := manyPeers(300), manyPeers(300)
	for i := range moved {
		moved[i].MAC[0] ^= 0x10
		moved[i].PublicIP = netip.AddrFrom4([4]byte{198, 19, byte(i >> 8), byte(i)})
	}
	mustBeQuiet := func(after string) {
		select {
		case <-nudges:
			t.Errorf("nudged after %s", after)
		case <-time.After(quiet): // what comes later is judged by what is wanted then
		}
	}
	for _, change := range []struct {
		what  string
		peers []state.Peer
	}{
		{"300 came", append(n.state.Peers, many...)},
		{"100 went", many[100:]},
		{"all went", nil},
		{"all came back", many},
		{"all have moved", moved},
	} {
		n.state.Peers = change.peers
		if res := n.sync(t); res.Steps == 0 {
			t.Fatalf("%s: nothing was done", change.what)
		}
		mustBeQuiet(change.what)
	}
	n.Run(t, "ip addr add fe80::77/64 dev flannel.1", "ip addr del fe80::77/64 dev flannel.1")
	mustBeQuiet("a link-local address came and went")
}

// Sync upon every nudge comes to rest, also when the socket ran over.
func TestOwnChangesComeToRest(t *testing.T) {
	n := newNode(t, "")
	n.state.Networks = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	n.state.Peers = manyPeers(3000)
	nudges, err := n.path.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	syncs, steps := 0, 0
	do := func() {
		res, err := n.path.Sync(t.Context(), n.state)
		if err != nil {
			t.Fatal(err)
		}
		syncs, steps = syncs+1, steps+res.Steps
	}
	do()
	for {
		select {
		case <-nudges:
			do()
			continue
		case <-time.After(quiet):
		}
		break
	}
	t.Logf("%d syncs, %d steps", syncs, steps)
	if syncs > 10 || steps != 4+3*3000 {
		t.Errorf("%d syncs made %d steps", syncs, steps)
	}
}

func TestOverrunNudges(t *testing.T) {
	n := newNode(t, peerB)
	n.sync(t)
	w := &watcher{path: n.path, nudges: make(chan struct{}, 1)}
	if err := w.subscribe(); err != nil {
		t.Fatal(err)
	}
	// Nobody listens while more comes than fits, and then the device is
	// deleted and made anew unheard.
	if err := w.socket.SetOption(unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		n.Run(t, fmt.Sprintf("ip route add 203.0.113.%d/32 via 192.0.2.1 dev eth0", i))
	}
	n.Run(t, "ip link del flannel.1")
	n.sync(t)
	go w.run(t.Context())
	wantNudge(t, w.nudges)
	wantQuiet(t, w.nudges)
	// The new device's index is known.
	n.Run(t, "ip neigh del 10.244.4.0 dev flannel.1")
	wantNudge(t, w.nudges)
}

func TestBrokenSocketIsReplaced(t *testing.T) {
	n := newNode(t, peerB)
	w := &watcher{path: n.path, nudges: make(chan struct{}, 1)}
	if err := w.subscribe(); err != nil {
		t.Fatal(err)
	}
	first := w.socket
	go w.run(t.Context())
	n.sync(t)
	wantQuiet(t, w.nudges)
	first.Close()
	wantNudge(t, w.nudges)
	n.Run(t, "ip link del flannel.1")
	wantNudge(t, w.nudges)
}

func TestWatchEndsWithItsContextAndItsPath(t *testing.T) {
	for name, end := range map[string]func(*node, context.CancelFunc){
		"Context": func(_ *node, cancel context.CancelFunc) { cancel() },
		"Path":    func(n *node, _ context.CancelFunc) { _ = n.path.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, peerB)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			nudges, err := n.path.Watch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			end(n, cancel)
			select {
			case _, open := <-nudges:
				if open {
					t.Error("a nudge instead of the end")
				}
			case <-time.After(soon):
				t.Error("the channel is not closed")
			}
			if name == "Path" {
				if _, err := n.path.Sync(t.Context(), n.state); !errors.Is(err, os.ErrClosed) {
					t.Errorf("sync of a closed path: %v", err)
				}
			}
		})
	}
}
