//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/test/lab"
)

// heldWithin is how long it may take until the agent notices an attachment:
// it looks every second.
const heldWithin = 4 * time.Second

// taker is one of our programs that takes packets away from those behind it.
type taker struct {
	device  string
	at      ebpf.AttachType
	parent  uint32
	program string
}

var takers = []taker{
	{"eth0", ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS, "uplink_in"},
	{"flannel.1", ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS, "overlay_out"},
}

// mustSeeAll asserts that a foreign program sees every ping of a pod: what is
// at the device of one direction.
func mustSeeAll(tb testing.TB, f *foreign, from, to *lab.Pod) {
	tb.Helper()
	before := f.mustSeen(tb)
	if err := pings(tb, from, to.IP); err != nil {
		tb.Error(err)
	}
	if seen := f.mustSeen(tb) - before; seen < 5 {
		tb.Errorf("the foreign program saw %d of 5 packets", seen)
	}
}

// Somebody's program that sits in front of ours sees all packets while ours
// accelerate; neither disturbs the other, whatever is done to weft.
func TestForeignProgramInFrontOfOurs(t *testing.T) {
	for _, taker := range takers {
		t.Run(taker.program, func(t *testing.T) {
			t.Parallel()
			lt, l := newLab(t, lab.Options{})
			n1, from, to := l.Node(1), l.Pod(1, 1), l.Pod(2, 1)
			mustUseBase(t, from, to)
			f := mustForeign(t, "in_front")
			mustAttachTCX(t, n1, taker.device, taker.at, link.Head(), f.program)
			time.Sleep(1500 * time.Millisecond)
			for _, step := range []struct {
				name string
				do   func()
				base bool
			}{
				{"attached", func() {}, true},
				{"agent restarted", func() {
					if err := n1.RestartAgent(t.Context(), syscall.SIGTERM); err != nil {
						t.Fatal(err)
					}
				}, true},
				{"agent killed and started", func() {
					if err := n1.RestartAgent(t.Context(), syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}, true},
				{"switched off", func() { lt.Run(n1, weft, "accel", "off") }, false},
				{"switched on", func() { lt.Run(n1, weft, "accel", "on") }, true},
				{"removed", func() {
					if err := n1.StopAgent(syscall.SIGTERM); err != nil {
						t.Fatal(err)
					}
					lt.Run(n1, weft, "remove")
				}, false},
			} {
				step.do()
				if step.base {
					mustUseBase(t, from, to)
				}
				before := f.mustSeen(t)
				if err := pings(t, from, to.IP); err != nil {
					t.Errorf("%s: %v", step.name, err)
				}
				if seen := f.mustSeen(t) - before; seen < 5 {
					t.Errorf("%s: the foreign program saw %d of 5 packets", step.name, seen)
				}
			}
		})
	}
}

// Somebody's program that sits behind ours would not see what we take: then we
// take nothing, say why, and begin again when it has gone.
func TestForeignProgramBehindOurs(t *testing.T) {
	for _, taker := range takers {
		for kind, attach := range map[string]func(t *testing.T, n *lab.Node, f *foreign) (detach func()){
			"tcx": func(t *testing.T, n *lab.Node, f *foreign) func() {
				l := mustAttachTCX(t, n, taker.device, taker.at, link.Tail(), f.program)
				return func() { l.Close() }
			},
			"clsact filter": func(t *testing.T, n *lab.Node, f *foreign) func() {
				if err := n.Do(func() error { return addFilter(taker.device, taker.parent, 7, "behind", f.program.FD()) }); err != nil {
					t.Fatal(err)
				}
				return func() { lab.T(t).Run(n, "tc qdisc delete dev "+taker.device+" clsact") }
			},
		} {
			t.Run(taker.program+"/"+kind, func(t *testing.T) {
				t.Parallel()
				_, l := newLab(t, lab.Options{})
				n1, from, to := l.Node(1), l.Pod(1, 1), l.Pod(2, 1)
				mustUseBase(t, from, to)
				f := mustForeign(t, "behind_ours")
				detach := attach(t, n1, f)
				mustBeHeld(t, n1, taker.program)
				mustSeeAll(t, f, from, to)
				if err := n1.RestartAgent(t.Context(), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				mustBeHeld(t, n1, taker.program)
				mustSeeAll(t, f, from, to)
				if passed, _ := mustReason(t, n1, "held"); passed == 0 {
					t.Error("no packet is counted as held")
				}
				detach()
				mustUseBase(t, from, to)
				if reason := mustStatus(t, n1).Reason; reason != "" {
					t.Errorf("still held back: %s", reason)
				}
			})
		}
	}
}

// mustBeHeld waits until the node says that acceleration is held back because
// of what sits behind one of our programs, and asserts that it is.
func mustBeHeld(tb testing.TB, n *lab.Node, because string) {
	tb.Helper()
	t := lab.T(tb)
	t.Eventually(heldWithin, func() error {
		if reason := mustStatus(tb, n).Reason; !strings.Contains(reason, "behind "+because) {
			return fmt.Errorf("weft status says %q", reason)
		}
		if text := t.Run(n, weft, "status"); !strings.Contains(text, "behind "+because) {
			return fmt.Errorf("weft status says:\n%s", text)
		}
		return nil
	})
	t.Eventually(heldWithin, func() error {
		before := baseOf(tb, n)
		from := n.Pods[0]
		if err := pings(tb, from, n.Peers()[0].Pods[0].IP); err != nil {
			return err
		}
		if after := baseOf(tb, n); after != before {
			return fmt.Errorf("the base path has carried %d packets", after-before)
		}
		return nil
	})
}

// baseOf is what a node has carried by the base path, with all peers.
func baseOf(tb testing.TB, n *lab.Node) (packets uint64) {
	tb.Helper()
	for _, p := range mustPeers(tb, n) {
		base := byPath(p, "base")
		packets += base.TxPackets + base.RxPackets
	}
	return packets
}

// A queueing discipline on flannel.1 shapes what is sent there, so nothing may
// pass it by.
func TestQueueOnTheOverlayDevice(t *testing.T) {
	t.Parallel()
	lt, l := newLab(t, lab.Options{})
	n1, from, to := l.Node(1), l.Pod(1, 1), l.Pod(2, 1)
	mustUseBase(t, from, to)
	lt.Run(n1, "tc qdisc add dev flannel.1 root tbf rate 100mbit burst 100k latency 50ms")
	mustBeHeld(t, n1, "overlay_out")
	lt.Run(n1, "tc qdisc delete dev flannel.1 root")
	mustUseBase(t, from, to)
}

// A u32 filter on the uplink, as shaping scripts add it.
func TestU32FilterOnTheUplink(t *testing.T) {
	t.Parallel()
	lt, l := newLab(t, lab.Options{})
	n1, from, to := l.Node(1), l.Pod(1, 1), l.Pod(2, 1)
	mustUseBase(t, from, to)
	lt.Run(n1, "tc qdisc add dev eth0 clsact")
	lt.Run(n1, "tc filter add dev eth0 ingress protocol ip prio 5 u32 match ip dport 9 0xffff classid 1:1")
	mustBeHeld(t, n1, "uplink_in")
	lt.Run(n1, "tc qdisc delete dev eth0 clsact")
	mustUseBase(t, from, to)
}

// A filter that is gone again before anybody looks for changes, while the agent had
// seen it for another reason: each time acceleration comes back at once.
func TestFilterThatIsSoonGone(t *testing.T) {
	t.Parallel()
	lt, l := newLab(t, lab.Options{})
	n1, from, to := l.Node(1), l.Pod(1, 1), l.Pod(2, 1)
	mustUseBase(t, from, to)
	for i := range 3 {
		lt.Run(n1, "tc qdisc add dev eth0 clsact")
		lt.Run(n1, "tc filter add dev eth0 ingress protocol ip prio 5 u32 match ip dport 9 0xffff classid 1:1")
		lt.Run(n1, fmt.Sprintf("ip neighbour add 10.244.77.%d lladdr 0a:58:0a:f4:4d:01 dev flannel.1 nud permanent", i+1))
		lt.Eventually(heldWithin, func() error {
			if mustStatus(t, n1).Reason == "" {
				return errors.New("nothing is held back")
			}
			return nil
		})
		lt.Run(n1, "tc qdisc delete dev eth0 clsact")
		mustUseBase(t, from, to)
	}
}

// flannel.1 is deleted and made again by hand, with the same address, while no
// agent runs: the kernel path carries, and nothing ends in the old device.
func TestOverlayDeviceMadeAnewByHand(t *testing.T) {
	t.Parallel()
	lt, l := newLab(t, lab.Options{})
	n1, n2, from, to := l.Node(1), l.Node(2), l.Pod(1, 1), l.Pod(2, 1)
	mustUseBase(t, from, to)
	if err := n1.StopAgent(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	mustUseBase(t, from, to) // without an agent, too
	lt.Run(n1, "ip link delete flannel.1")
	mustPeerWithOne(t, n1, n2)
	// At once, while proofs of the former device are still fresh.
	for range 3 {
		if err := pings(t, to, from.IP); err != nil {
			t.Error(err)
		}
	}
	lt.MustLoseNothing(to, from, lab.ProbeOptions{Interval: 5 * time.Millisecond}, func() { time.Sleep(2500 * time.Millisecond) })
	if missing := mustStatus(t, n1); missing.Mode != "kernel" {
		t.Errorf("weft status says mode %s, reason %q, although the device has no program", missing.Mode, missing.Reason)
	}

	lt.MustLoseNothing(to, from, lab.ProbeOptions{Interval: 5 * time.Millisecond}, func() {
		if err := n1.StartAgent(t.Context(), weft); err != nil {
			t.Fatal(err)
		}
		mustUseBase(t, from, to)
	})
	for _, h := range mustStatus(t, n1).Hooks {
		if h.Attached == "" {
			t.Errorf("%s is not attached", h.Program)
		}
	}
}
