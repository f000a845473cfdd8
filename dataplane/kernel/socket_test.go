//go:build linux

package kernel

import (
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestInterruptedDumpIsReadAgainUntilItIsWhole(t *testing.T) {
	wrong := errors.New("wrong")
	for name, test := range map[string]struct {
		interrupted int
		fail, want  error
		reads       int
	}{
		"Whole":      {interrupted: 0, reads: 1},
		"ThreeTimes": {interrupted: 3, reads: 4},
		"WithoutEnd": {interrupted: 1000, want: errInterrupted, reads: dumpTries},
		"Failed":     {interrupted: 0, fail: wrong, want: wrong, reads: 1},
	} {
		t.Run(name, func(t *testing.T) {
			reads := 0
			err := untilWhole(func() (bool, error) {
				reads++
				return reads <= test.interrupted, test.fail
			})
			if !errors.Is(err, test.want) || (err == nil) != (test.want == nil) || reads != test.reads {
				t.Errorf("%d reads, error %v; want %d, %v", reads, err, test.reads, test.want)
			}
		})
	}
}

// Others change their own things all the time while we sync.
func TestSyncOnABusyHost(t *testing.T) {
	n := newNode(t, "")
	n.path.log = slog.New(slog.DiscardHandler)
	n.state.Networks = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	n.state.Peers = manyPeers(300)
	var others *netlink.Handle
	n.MustDo(t, func() (err error) {
		others, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	defer others.Close()
	lo, err := others.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 20, byte(i >> 1), 1}), 24)
			addr := &netlink.Addr{IPNet: ipNet(prefix)}
			if i%2 == 0 {
				_ = others.AddrAdd(lo, addr)
			} else {
				_ = others.AddrDel(lo, addr)
			}
		}
	})
	for range 50 {
		if _, err := n.path.Sync(t.Context(), n.state); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	done.Wait()
	n.idle(t)
}

func TestKernelsAnswerInWords(t *testing.T) {
	n := newNode(t, "")
	r := newRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE, make([]byte, unix.SizeofRtMsg)...)
	r.b[unix.NLMSG_HDRLEN] = unix.AF_INET
	err := n.path.socket.batch([]*request{r.uint32(unix.RTA_OIF, 4711)})[0]
	if !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("error is %v", err)
	}
	t.Log(err)
}

func FuzzMessages(f *testing.F) {
	f.Add(routeRequest(Step{Prefix: netip.MustParsePrefix("10.244.4.0/24"), Addr: netip.MustParseAddr("10.244.4.0")}, 3, unix.RTM_NEWROUTE, 0, 0).finish(1))
	f.Add(peerRequest(Step{Op: SetFDB, Addr: netip.MustParseAddr("2001:db8::1")}, 3).finish(1))
	f.Add(peerRequest(Step{Op: SetNeighbour, Addr: netip.MustParseAddr("10.244.4.0")}, 3).finish(1))
	f.Fuzz(func(_ *testing.T, b []byte) {
		for m := range messages(b) {
			_ = ackError(m)
			if n, ok := parseNeighbour(m.data); ok {
				_, _ = n.neighbour(), n.fdbEntry()
			}
			r, _, _ := parseRoute(m.data)
			_ = r.String()
			_, _ = parseLink(m.data)
		}
	})
}
