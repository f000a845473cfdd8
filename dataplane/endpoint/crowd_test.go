//go:build linux

package endpoint

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// quickPod makes a pod without programs, which take too long by the hundred.
// number is in its MAC and in its veth's name. It lives until its namespace is
// closed.
func (n *node) quickPod(number int, ip netip.Addr) (ns netns.NsHandle, err error) {
	err = n.Do(func() error {
		host, err := netns.Get()
		if err != nil {
			return err
		}
		defer host.Close()
		if ns, err = netns.New(); err != nil { // moves this thread
			return err
		}
		if err := netns.Set(host); err != nil {
			return err
		}
		bridge, err := netlink.LinkByName("cni0")
		if err != nil {
			return err
		}
		veth := netlink.NewLinkAttrs()
		veth.Name, veth.MTU, veth.MasterIndex, veth.Flags = fmt.Sprintf("veth%d", number), 1450, bridge.Attrs().Index, net.FlagUp
		if err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: veth, PeerName: "eth0", PeerMTU: 1450, PeerNamespace: netlink.NsFd(ns),
			PeerHardwareAddr: net.HardwareAddr{0x0a, 0, 0, 1, byte(number >> 8), byte(number)},
		}); err != nil {
			return err
		}
		if err := netns.Set(ns); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(eth0); err != nil {
			return err
		}
		return netlink.AddrAdd(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(24, 32)}})
	})
	if err != nil && ns.IsOpen() {
		ns.Close()
	}
	return ns, err
}

// crowd makes many pods.
func (n *node) crowd(t testing.TB, pods int) {
	t.Helper()
	for i := range pods {
		ns, err := n.quickPod(i, netip.AddrFrom4([4]byte{10, 244, 1, byte(i + 2)}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Close() })
	}
	for deadline := time.Now().Add(10 * time.Second); len(n.find(t).Endpoints) != pods; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("found %d endpoints of %d:\n%s", len(n.find(t).Endpoints), pods, n.find(t).text())
		}
	}
}

func TestCrowdedNode(t *testing.T) {
	n := newNode(t)
	n.crowd(t, 250)
	var took []time.Duration
	before := cpuTime(t)
	for range 20 {
		begin := time.Now()
		if found := n.find(t); len(found.Endpoints) != 250 {
			t.Fatalf("found %d endpoints", len(found.Endpoints))
		}
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	cpu := (cpuTime(t) - before) / time.Duration(len(took))
	t.Logf("250 pods: best %v, median %v, worst %v; processor %v", took[0], took[len(took)/2], took[len(took)-1], cpu)
	if cpu > time.Second { // some 15 ms on a machine, ten times that in a virtual one
		t.Errorf("looking at 250 pods takes %v of a processor", cpu)
	}
}

// cpuTime is what this process has used.
func cpuTime(tb testing.TB) time.Duration {
	tb.Helper()
	var use unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &use); err != nil {
		tb.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}

func BenchmarkFind250Pods(b *testing.B) {
	n := newNode(b)
	n.crowd(b, 250)
	b.ReportAllocs()
	for b.Loop() {
		n.find(b)
	}
}

// Pods come and go as fast as can be, all with the same address. The kernel
// gives the number of a namespace that is gone to the next one, while the veth
// of the first may be still there: what is said of a veth must be true of it.
func TestAddressUsedAgainAndAgain(t *testing.T) {
	n := newNode(t)
	ip := netip.MustParseAddr("10.244.1.9")
	stop := make(chan struct{})
	var churn sync.WaitGroup
	var failed error
	made := 0
	churn.Go(func() {
		runtime.LockOSThread()
		for ; ; made++ {
			select {
			case <-stop:
				return
			default:
			}
			ns, err := n.quickPod(made, ip)
			if err != nil {
				failed = err
				return
			}
			ns.Close()
		}
	})
	seen := map[string]bool{}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		for _, e := range n.find(t).Endpoints {
			number := int(e.MAC[4])<<8 | int(e.MAC[5])
			if e.Name != fmt.Sprintf("veth%d", number) || e.IP != ip {
				t.Fatalf("%+v is of the pod of veth%d", e, number)
			}
			seen[e.Name] = true
		}
	}
	close(stop)
	churn.Wait()
	if failed != nil {
		t.Fatal(failed)
	}
	t.Logf("%d pods were made, %d of them seen", made, len(seen))
	if len(seen) == 0 {
		t.Error("no pod was ever seen")
	}
}

// churn changes addresses that are nobody's, until stop.
func (n *node) churn(t testing.TB) (stop func()) {
	t.Helper()
	var others *netlink.Handle
	n.MustDo(t, func() (err error) {
		others, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	lo, err := others.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	end := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		defer others.Close()
		for i := 0; ; i++ {
			select {
			case <-end:
				return
			default:
			}
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(172, 20, byte(i>>1), 1), Mask: net.CIDRMask(24, 32)}}
			if i%2 == 0 {
				_ = others.AddrAdd(lo, addr)
			} else {
				_ = others.AddrDel(lo, addr)
			}
		}
	})
	return func() {
		close(end)
		done.Wait()
	}
}

// Others change their own things all the time while we look.
func TestBusyHost(t *testing.T) {
	n := newNode(t)
	n.pod(t, "a", "10.244.1.2")
	n.wants(t, foundA)
	defer n.churn(t)()
	for range 50 {
		n.wantsNow(t, foundA)
	}
}
