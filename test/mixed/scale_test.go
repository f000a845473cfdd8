//go:build linux && peers && scale

package mixed_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/test/lab"
)

// thousands is how many peers are too many to be told one by one.
const thousands = 5000

// cost is what somebody needed for thousands of peers.
type cost struct {
	// took is the time to the last of them.
	took time.Duration
	// cpu is the processor time of the process and of those that it has started.
	cpu time.Duration
	// memory is the most that it had, in kB.
	memory int
}

func (c cost) String() string {
	return fmt.Sprintf("%6.2f s to the last, %5.2f CPU s, %6.1f MB", c.took.Seconds(), c.cpu.Seconds(), float64(c.memory)/1000)
}

// 5,000 peers are there when flanneld and weft start, then they go, and then they
// come again. Run it alone, on a machine that has nothing else to do:
//
//	go test -tags peers,scale -run Thousands -v ./test/mixed
func TestThousandsOfPeers(t *testing.T) {
	const rounds = 5
	_, l := newLab(t, lab.Options{Kinds: []lab.Kind{lab.Weft, lab.Flanneld}, Store: lab.StoreKube, Room: true, FlannelFlags: healthFlags})
	stopAll := func() {
		for _, n := range l.Nodes {
			stop(t, n, syscall.SIGTERM)
		}
	}
	stopAll()
	must(t, l.CreateStrangers(t.Context(), thousands))
	costs := map[lab.Kind][]cost{}
	for round := range rounds {
		if round > 0 {
			stopAll()
		}
		for _, n := range l.Nodes {
			must(t, n.Reboot(t.Context()))
			c := mustStart(t, n)
			costs[n.Kind] = append(costs[n.Kind], c)
			t.Logf("start     %-8s %s", n.Kind, c)
		}
	}
	ours, theirs := median(costs[lab.Weft]), median(costs[lab.Flanneld])
	t.Logf("medians   weft     %s\n                            flanneld %s", ours, theirs)
	if 3*ours.took > theirs.took {
		t.Errorf("weft takes %s to the last peer, want a third of flanneld's %s at most", ours.took, theirs.took)
	}
	if 3*ours.cpu > theirs.cpu {
		t.Errorf("weft takes %s of CPU time, want a third of flanneld's %s at most", ours.cpu, theirs.cpu)
	}
	if ours.memory > theirs.memory {
		t.Errorf("weft takes %d kB, want flanneld's %d kB at most", ours.memory, theirs.memory)
	}

	mustChange(t, l, "5000 go", 1, func() { must(t, l.DeleteStrangers(t.Context())) })
	mustChange(t, l, "5000 come", 1+thousands, func() { must(t, l.CreateStrangers(t.Context(), thousands)) })
	mustReachAll(t, l)
	mustChange(t, l, "5000 go", 1, func() { must(t, l.DeleteStrangers(t.Context())) })
	for _, n := range l.Nodes {
		for _, command := range []string{"ip neighbour show dev flannel.1 nud permanent", "bridge fdb show dev flannel.1"} {
			if left := strings.Count(lab.T(t).Run(n, command), "\n"); left != 1 {
				t.Errorf("%s (%s): %s shows %d lines, want one for the other node", n, n.Kind, command, left)
			}
		}
	}
	mustReachAll(t, l)
}

// mustStart starts what runs a node's overlay, and tells what it cost until it was
// idle again.
func mustStart(t *testing.T, n *lab.Node) cost {
	t.Helper()
	began := time.Now()
	if n.Kind == lab.Weft {
		must(t, n.LaunchAgent(weft))
	} else {
		must(t, n.StartFlanneld())
	}
	mustHaveRoutes(t, n, 1+thousands)
	took := time.Since(began)
	mustIdle(t, n)
	cpu, memory := mustUsage(t, n)
	return cost{took, cpu, memory}
}

// mustChange has the peers change while both run, and logs what that cost each:
// the time is that from the API's last answer.
func mustChange(t *testing.T, l *lab.Lab, what string, routes int, change func()) {
	t.Helper()
	before := map[*lab.Node]time.Duration{}
	for _, n := range l.Nodes {
		before[n], _ = mustUsage(t, n)
	}
	began := time.Now()
	change()
	changed := time.Now()
	t.Logf("%s: the API took %.1f s", what, changed.Sub(began).Seconds())
	took := map[*lab.Node]time.Duration{}
	for _, n := range l.Nodes {
		mustHaveRoutes(t, n, routes)
		took[n] = time.Since(changed)
	}
	for _, n := range l.Nodes {
		mustIdle(t, n)
		cpu, memory := mustUsage(t, n)
		t.Logf("%-9s %-8s %s", what, n.Kind, cost{took[n], cpu - before[n], memory})
	}
}

// mustHaveRoutes waits until a node has so many routes by its overlay device.
func mustHaveRoutes(t *testing.T, n *lab.Node, want int) {
	t.Helper()
	const timeout = 2 * time.Minute
	for deadline := time.Now().Add(timeout); ; time.Sleep(50 * time.Millisecond) {
		have := 0
		err := n.Do(func() error {
			link, err := netlink.LinkByName(n.Overlay())
			if err != nil {
				return err
			}
			routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
			have = len(routes)
			return err
		})
		if err == nil && have == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s (%s) has %d routes after %s, want %d: %v", n, n.Kind, have, timeout, want, err)
		}
	}
}

// mustIdle waits until a node's daemon works no more: until it has used less than a
// third of a processor for a second. What it does now and then takes some percent.
func mustIdle(t *testing.T, n *lab.Node) {
	t.Helper()
	const interval = time.Second
	lab.T(t).Eventually(time.Minute, func() error {
		before, _ := mustUsage(t, n)
		time.Sleep(interval)
		if after, _ := mustUsage(t, n); after-before > interval/3 {
			return fmt.Errorf("%s (%s) still works", n, n.Kind)
		}
		return nil
	})
}

// mustUsage is the processor time that a node's daemon has used, and the most
// memory that it had, in kB.
func mustUsage(t *testing.T, n *lab.Node) (cpu time.Duration, memory int) {
	t.Helper()
	pid := n.Daemon().PID()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	fields := strings.Fields(string(stat)[strings.LastIndexByte(string(stat), ')')+1:])
	for _, field := range fields[11:15] { // utime, stime, and those of children that have ended
		ticks, err := strconv.Atoi(field)
		must(t, err)
		cpu += time.Duration(ticks) * 10 * time.Millisecond
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	memory, err = strconv.Atoi(strings.Fields(peak)[0])
	must(t, err)
	return cpu, memory
}

// median is that of each part.
func median(all []cost) cost {
	middle := func(less func(a, b cost) int) cost { return slices.SortedFunc(slices.Values(all), less)[len(all)/2] }
	return cost{
		took:   middle(func(a, b cost) int { return int(a.took - b.took) }).took,
		cpu:    middle(func(a, b cost) int { return int(a.cpu - b.cpu) }).cpu,
		memory: middle(func(a, b cost) int { return a.memory - b.memory }).memory,
	}
}
