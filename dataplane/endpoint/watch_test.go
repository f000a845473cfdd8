//go:build linux

package endpoint

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// follow watches the node as the dataplane does: it looks at every nudge. It
// returns a function that waits until what is found has a line in it, or not.
func (n *node) follow(t testing.TB) (wait func(line string, want bool, within time.Duration)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	nudges, err := n.finder.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	texts := make(chan string)
	go func() {
		defer close(texts)
		for range nudges {
			found, err := n.finder.Find(prefixes)
			text := found.text()
			if err != nil {
				text = err.Error()
			}
			select {
			case texts <- text:
			case <-ctx.Done():
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		for range texts { // until the watch has ended
		}
	})
	return func(line string, want bool, within time.Duration) {
		t.Helper()
		begin := time.Now()
		deadline := time.After(within)
		last := "nothing was looked at"
		for {
			select {
			case last = <-texts:
				if strings.Contains(last, line+"\n") == want {
					t.Logf("%q %v after %v", line, want, time.Since(begin).Round(time.Millisecond))
					return
				}
			case <-deadline:
				t.Fatalf("within %v, %q did not become %v; last found:\n%s", within, line, want, last)
			}
		}
	}
}

// soon is the promised 100 ms, and time for a busy machine to run the test.
const soon = time.Second

// byEvents has the node look at events only.
func (n *node) byEvents() {
	n.finder.poll, n.finder.looks = time.Hour, nil
}

// deafToPods has the node not hear pods, as without CAP_NET_BROADCAST.
func (n *node) deafToPods() {
	n.finder.listenAll = func(*rtnl.Socket) error { return unix.EPERM }
}

func TestWatchSeesPodsComeAndGo(t *testing.T) {
	n := newNode(t)
	n.byEvents()
	wait := n.follow(t)
	a := n.pod(t, "a", "10.244.1.2")
	wait(foundA, true, soon)
	n.Run(t, "tc qdisc add dev va root tbf rate 10mbit burst 100k latency 25ms")
	wait(foundA, false, soon)
	n.Run(t, "tc qdisc del dev va root")
	wait(foundA, true, soon)
	a.Run(t, "ip link set eth0 mtu 1400")
	wait(foundA, false, soon)
	a.Run(t, "ip link set eth0 mtu 1450")
	wait(foundA, true, soon)
	n.Run(t, "ip link set cni0 address 0a:58:0a:f4:01:99")
	wait(foundA, false, soon)
	n.Run(t, "ip link set cni0 address 0a:58:0a:f4:01:01")
	wait(foundA, true, soon)
	n.Run(t, "ip link set va nomaster")
	wait(foundA, false, soon)
	n.Run(t, "ip link set va master cni0")
	wait(foundA, true, soon)
	n.Run(t, "ip link del va")
	wait(foundA, false, soon)
}

func TestWatchHearsInsideOfPods(t *testing.T) {
	n := newNode(t)
	n.byEvents()
	a := n.pod(t, "a", "10.244.1.2")
	n.wants(t, foundA)
	wait := n.follow(t)
	wait(foundA, true, soon)
	a.Run(t, "ip addr add 10.244.1.9/24 dev eth0")
	wait(strings.Replace(foundA, "1.2", "1.9", 1), true, soon)
	a.Run(t, "ip link set eth0 address 0a:00:00:00:00:77")
	wait(strings.Replace(foundA, "00:61", "00:77", 1), true, soon)
	a.Run(t, "ip addr flush dev eth0")
	wait("left va: the pod has no address inside this node's prefixes", true, soon)
}

func TestWatchSeesRoutesToPods(t *testing.T) {
	n := newNode(t)
	n.byEvents()
	p := n.wire(t, "p")
	p.Run(t, "ip addr add 10.244.1.2/24 dev eth0")
	n.Run(t, "ip route add 10.244.1.2/32 dev vp")
	found := "10.244.1.2 vp 0a:00:00:00:00:70 via " + n.mac(t, "vp") + " mtu 1450 ptp"
	n.wants(t, found)
	wait := n.follow(t)
	wait(found, true, soon)
	n.Run(t, "ip route del 10.244.1.2/32 dev vp")
	wait(found, false, soon)
	n.Run(t, "ip route add 10.244.1.2/32 dev vp")
	wait(found, true, soon)
}

// Without CAP_NET_BROADCAST an address inside a pod makes no event.
func TestWatchOfPodsThatCantBeHeard(t *testing.T) {
	t.Run("AddressComesLate", func(t *testing.T) {
		n := newNode(t)
		n.deafToPods()
		n.finder.poll = time.Hour
		wait := n.follow(t)
		a := n.wire(t, "a")
		n.Run(t, "ip link set va master cni0")
		wait("left va: the pod has no address inside this node's prefixes", true, soon)
		time.Sleep(30 * time.Millisecond)
		a.Run(t, "ip addr add 10.244.1.2/24 dev eth0")
		wait(foundA, true, soon)
	})
	t.Run("MACChanges", func(t *testing.T) {
		n := newNode(t)
		n.deafToPods()
		a := n.pod(t, "a", "10.244.1.2")
		n.wants(t, foundA)
		wait := n.follow(t)
		wait(foundA, true, soon)
		a.Run(t, "ip link set eth0 address 0a:00:00:00:00:77")
		wait(strings.Replace(foundA, "00:61", "00:77", 1), true, pollInterval+soon)
	})
	t.Run("MACChangesAndThePodSends", func(t *testing.T) {
		n := newNode(t)
		n.deafToPods()
		n.byEvents()
		a := n.pod(t, "a", "10.244.1.2")
		n.wants(t, foundA)
		wait := n.follow(t)
		wait(foundA, true, soon)
		a.Run(t, "ip link set eth0 address 0a:00:00:00:00:77", "ping -c 1 10.244.1.1")
		wait(strings.Replace(foundA, "00:61", "00:77", 1), true, stationGap+soon)
	})
}

// watch starts a watch whose sockets the test can get at.
func (n *node) watch(t testing.TB, prepare func(*watcher)) *watcher {
	t.Helper()
	n.byEvents()
	w := &watcher{finder: n.finder, nudges: make(chan struct{}, 1), events: make(chan event)}
	if err := w.subscribe(); err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		prepare(w)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go w.run(ctx)
	t.Cleanup(func() {
		cancel()
		for range w.nudges { // until it has ended
		}
	})
	return w
}

func mustNudge(t testing.TB, w *watcher, within time.Duration, why string) {
	t.Helper()
	select {
	case <-w.nudges:
	case <-time.After(within):
		t.Fatal("no nudge " + why)
	}
}

func TestWatchSubscribesAgainWhenASocketFails(t *testing.T) {
	n := newNode(t)
	n.wantsNow(t)
	var host *rtnl.Socket
	w := n.watch(t, func(w *watcher) { host = w.host })
	mustNudge(t, w, soon, "at the start")
	host.Close()
	mustNudge(t, w, resubscribeDelay+soon, "for what was not heard")
	n.Run(t, "ip link del cni0")
	mustNudge(t, w, soon, "after subscribing again")
}

func TestEventsThatAreLostMakeANudge(t *testing.T) {
	n := newNode(t)
	n.wantsNow(t)
	w := n.watch(t, func(w *watcher) {
		// Events of no interest, more than there is room for.
		_ = w.host.SetOption(unix.SOL_SOCKET, unix.SO_RCVBUF, 1)
		stop := n.churn(t)
		time.Sleep(100 * time.Millisecond)
		stop()
	})
	mustNudge(t, w, soon, "at the start")
	mustNudge(t, w, soon, "for what was lost")
}

func TestWatchEndsWithItsFinder(t *testing.T) {
	n := newNode(t)
	nudges, err := n.finder.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.finder.end()
	deadline := time.After(soon)
	for {
		select {
		case _, ok := <-nudges:
			if !ok {
				return
			}
		case <-deadline:
			t.Fatal("the channel is still open")
		}
	}
}

// A veth that comes is looked at again and again, and at some time no more.
func TestLooksForNewPods(t *testing.T) {
	w := &watcher{finder: &Finder{poll: pollInterval, looks: newVethLooks}, nudges: make(chan struct{}, 1), young: map[int]time.Time{}}
	w.finder.interest.Store(&interest{})
	born := time.Now()
	w.last = born
	w.young[7] = born
	var ages []time.Duration
	for now := born; now.Before(born.Add(10 * time.Second)); {
		now = now.Add(w.wait(now))
		if w.wait(now); len(w.nudges) == 1 {
			<-w.nudges
			ages = append(ages, now.Sub(born))
		}
	}
	want := fmt.Sprint(append(newVethLooks, 3*time.Second, 5*time.Second, 7*time.Second, 9*time.Second, 11*time.Second))
	if fmt.Sprint(ages) != want {
		t.Errorf("looks after %v, want %v", ages, want)
	}
	if len(w.young) > 0 {
		t.Errorf("a veth is still young after 10 s: %v", w.young)
	}
}

// Agents have few capabilities. What they see without each is told by this
// test's own program, started again with less.
func TestWithoutCapabilities(t *testing.T) {
	n := newNode(t)
	n.pod(t, "a", "10.244.1.2")
	refused := "left va: " + problemRefused + "; "
	for name, test := range map[string]struct {
		without []uintptr
		results bool
		want    []string
		deaf    bool
	}{
		"SysAdmin":     {without: []uintptr{unix.CAP_SYS_ADMIN}, want: []string{foundA}},
		"NetBroadcast": {without: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_BROADCAST}, want: []string{foundA}, deaf: true},
		"NetAdmin":     {without: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN}, want: []string{strings.TrimSuffix(refused, "; ")}},
		"NetAdminButWithResults": {
			without: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN}, results: true,
			want: []string{foundA, "note the kernel refuses to show pods' namespaces; the CNI plugin's results are believed instead"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := ""
			if test.results {
				dir = t.TempDir()
				text := strings.NewReplacer("veth8d1f2a3b", "va", "1e:2f:3a:4b:5c:6d", n.mac(t, "va"), "fa:16:3e:00:00:02", "0a:00:00:00:00:61").Replace(usualResult(t))
				if err := os.WriteFile(filepath.Join(dir, "cbr0-9f3c-eth0"), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var out []byte
			n.MustDo(t, func() error {
				for _, c := range test.without {
					if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
						return fmt.Errorf("dropping a capability: %w", err)
					}
				}
				cmd := exec.Command(os.Args[0], "-test.run=^TestHelperSeesWhatItMay$")
				cmd.Env = append(os.Environ(), "WEFT_ENDPOINT_HELPER=1", "WEFT_ENDPOINT_RESULTS="+dir)
				var err error
				if out, err = cmd.CombinedOutput(); err != nil {
					return fmt.Errorf("%w\n%s", err, out)
				}
				return nil
			})
			found, _, _ := strings.Cut(string(out), "--\n")
			if test.results && strings.Contains(found, "can't be listed") {
				return // some kernels refuse this too, and then it is not certain
			}
			if found != lines(test.want) {
				t.Errorf("found:\n%swant:\n%s", found, lines(test.want))
			}
			if deaf := strings.Contains(string(out), "deaf"); deaf != test.deaf {
				t.Errorf("deaf to pods: %v, want %v\n%s", deaf, test.deaf, out)
			}
		})
	}
}

// TestHelperSeesWhatItMay is the program of TestWithoutCapabilities.
func TestHelperSeesWhatItMay(t *testing.T) {
	if os.Getenv("WEFT_ENDPOINT_HELPER") == "" {
		return
	}
	f, err := Open(Options{ResultsDir: os.Getenv("WEFT_ENDPOINT_RESULTS")})
	if err != nil {
		t.Fatal(err)
	}
	found, err := f.Find(prefixes)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Print(found.text(), "--\n")
	w := &watcher{finder: f}
	if err := w.subscribe(); err != nil {
		t.Fatal(err)
	}
	if w.pods == nil {
		fmt.Println("deaf")
	}
}

// What has to do with peers is not even heard: there may be thousands of them.
func TestPeersAreNotHeard(t *testing.T) {
	n := newNode(t)
	n.finder.opts.Ignore = [][]rtnl.Match{{rtnl.Kind(unix.RTM_NEWROUTE)}}
	n.pod(t, "a", "10.244.1.2")
	n.Run(t, "ip link add flannel.1 type vxlan id 1 dstport 8472 local 127.0.0.1", "ip link set flannel.1 up")
	w := &watcher{finder: n.finder}
	if err := w.subscribe(); err != nil {
		t.Fatal(err)
	}
	defer w.host.Close()
	if w.pods != nil {
		defer w.pods.Close()
	}
	n.Run(t,
		"bridge fdb add 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self permanent",
		"ip neigh add 10.244.2.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent",
		"ip -6 neigh add fd00::2 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent",
		"ip route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink",
		"bridge fdb del 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self permanent",
		"bridge fdb add 0a:00:00:00:00:77 dev va master static",
	)
	for begin := time.Now(); ; {
		received, err := w.host.Receive()
		if err != nil || time.Since(begin) > soon {
			t.Fatalf("the bridge's station is not heard of (%v)", err)
		}
		for m := range received {
			_, mac, ok := parseStation(m.Data)
			switch {
			case mac.String() == "0a:00:00:00:00:77":
				return
			case m.Kind == unix.RTM_NEWNEIGH && ok && mac.String() != "0a:00:00:00:00:0b": // another of the bridge
			case m.Kind == unix.RTM_NEWNEIGH, m.Kind == unix.RTM_DELNEIGH, m.Kind == unix.RTM_NEWROUTE:
				t.Errorf("heard of kind %d, of %v; want only the bridge's stations", m.Kind, mac)
			}
		}
	}
}
