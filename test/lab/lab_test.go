//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPodsReachEachOtherThroughTwoRoutedHops(t *testing.T) {
	for _, netfilter := range []bool{false, true} {
		t.Run(fmt.Sprintf("netfilter=%v", netfilter), func(t *testing.T) {
			t.Parallel()
			lt := T(t)
			l := lt.New(Options{Kinds: []Kind{Kernel}, Netfilter: netfilter})
			out := lt.Run(l.Pod(1, 1), "ping -c 2 -i 0.05 -W 2 "+l.Pod(2, 1).IP.String())
			if !strings.Contains(out, "ttl=62") || !strings.Contains(out, " 0% packet loss") {
				t.Errorf("two routers between the pods should leave 62 of a TTL of 64:\n%s", out)
			}
		})
	}
}

func TestTracerouteShowsBothNodes(t *testing.T) {
	t.Parallel()
	lt := T(t)
	l := lt.New(Options{Kinds: []Kind{Kernel}})
	out := lt.Run(l.Pod(1, 1), "traceroute -n -q 1 -w 2 "+l.Pod(2, 1).IP.String())
	var hops []string
	for _, line := range strings.Split(strings.TrimSpace(out), "\n")[1:] {
		hops = append(hops, strings.Fields(line)[1])
	}
	want := []string{l.Node(1).Gateway.String(), l.Node(2).VTEP.String(), l.Pod(2, 1).IP.String()}
	if !slices.Equal(hops, want) {
		t.Errorf("hops %v, want own cni0, the other node's flannel.1 and the pod: %v\n%s", hops, want, out)
	}
}

func TestOnlyAWireUnderlayCutsAggregates(t *testing.T) {
	for underlay, cut := range map[Underlay]bool{Virtual: false, Wire: true} {
		t.Run(string(underlay), func(t *testing.T) {
			t.Parallel()
			lt := T(t)
			l := lt.New(Options{Kinds: []Kind{Kernel}, Underlay: underlay})
			for _, transfer := range []struct {
				name     string
				from, to Runner
				address  string
			}{
				{"overlay", l.Pod(1, 1), l.Pod(2, 1), l.Pod(2, 1).IP.String()},
				{"host", l.Node(1), l.Node(2), l.Node(2).IP.String()},
			} {
				server := lt.Start(transfer.to, "iperf3 -s -1 --forceflush")
				if err := server.WaitOutput(t.Context(), "Server listening"); err != nil {
					t.Fatal(err)
				}
				sniffer := sniff(t, l.Underlay)
				lt.Run(transfer.from, "iperf3 -n 20M -c "+transfer.address)
				longest := sniffer.stop(t)
				ethernet := l.Options.MTU + 14
				if longest < ethernet || cut != (longest == ethernet) {
					t.Errorf("%s: the longest frame on the %s underlay has %d bytes", transfer.name, underlay, longest)
				}
			}
		})
	}
}

// sniffer watches the length of all frames in a space.
type sniffer struct {
	done    chan struct{}
	longest chan int
}

func sniff(t *testing.T, s *Space) *sniffer {
	t.Helper()
	var fd int
	if err := s.Do(func() (err error) {
		const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, all); err != nil {
			return err
		}
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000})
	}); err != nil {
		t.Fatal(err)
	}
	sn := &sniffer{done: make(chan struct{}), longest: make(chan int, 1)}
	go func() {
		defer unix.Close(fd)
		longest, buffer := 0, make([]byte, 64)
		for {
			n, _, err := unix.Recvfrom(fd, buffer, unix.MSG_TRUNC)
			longest = max(longest, n)
			if err == nil {
				continue
			}
			select {
			case <-sn.done:
				sn.longest <- longest
				return
			default:
			}
		}
	}()
	return sn
}

func (s *sniffer) stop(t *testing.T) int {
	t.Helper()
	close(s.done)
	return <-s.longest
}

func TestCloseLeavesTheMachineAsItWas(t *testing.T) {
	lt := T(t)
	before := machine(t)
	l, err := New(t.Context(), Options{Nodes: 3, Pods: 2, Kinds: []Kind{Kernel}, Netfilter: true, Underlay: Wire})
	if err != nil {
		t.Fatal(err)
	}
	namespaces := lt.Run(l.Underlay, "ip netns list")
	for _, name := range []string{"-underlay", "-n1", "-n3", "-n3-p2"} {
		if !strings.Contains(namespaces, l.Name()+name) {
			t.Errorf("`ip netns` does not list %s:\n%s", l.Name()+name, namespaces)
		}
	}
	lt.Start(l.Pod(1, 1), "sh", "-c", "sleep 1000 & sleep 1000")
	var running []pid
	lt.Eventually(5*time.Second, func() error {
		if running = inside(t, l.Name()); len(running) != 3+3 {
			return fmt.Errorf("%d processes run in the lab, want three that hold nodes and a shell with two children", len(running))
		}
		return nil
	})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	assertGone(t, running)
	assertNoNames(t, l.Name())
	assertSame(t, before, machine(t))
	if err := Remove(l.Name()); !errors.Is(err, ErrNotUp) {
		t.Errorf("removing a lab that is gone: %v, want %v", err, ErrNotUp)
	}
}

func TestCrashedLabIsRemovedByTheNext(t *testing.T) {
	lt := T(t)
	before := machine(t)
	// The test's own program builds a lab and is killed in the middle.
	maker := exec.Command(os.Args[0])
	maker.Env = append(os.Environ(), helper+"=1")
	stdout, err := maker.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := maker.Start(); err != nil {
		t.Fatal(err)
	}
	var name string
	if _, err := fmt.Fscan(stdout, &name); err != nil {
		t.Fatal(err)
	}
	if err := maker.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = maker.Wait() // it was killed
	if _, err := Open(name); err != nil {
		t.Fatalf("the lab of the crashed process should still be there: %v", err)
	}
	running := inside(t, name)
	if len(running) != 2 {
		t.Errorf("%v run in the crashed lab, want two processes that hold nodes", running)
	}
	l := lt.New(Options{})
	if _, err := Open(name); !errors.Is(err, ErrNotUp) {
		t.Errorf("lab %s of the crashed process is still there (%v)", name, err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	assertGone(t, running)
	assertNoNames(t, name)
	assertSame(t, before, machine(t))
}

// helper in the environment makes the test binary a program that makes a lab,
// says its name and hangs.
const helper = "WEFT_LAB_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helper) == "" {
		os.Exit(m.Run())
	}
	l, err := New(context.Background(), Options{Kinds: []Kind{Kernel}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(l.Name())
	select {}
}

func TestInterruptedBuildLeavesNothing(t *testing.T) {
	T(t)
	before := machine(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Millisecond)
	defer cancel()
	if l, err := New(ctx, Options{Nodes: 30, Pods: 5}); err == nil {
		l.Close()
		t.Fatal("thirty nodes in 60 ms: this test tests nothing")
	}
	assertSame(t, before, machine(t))
}

// machine describes what a lab might leave behind. Tests of other packages may
// have labs and namespaces of their own at the same time, so what they share
// with ours is looked at only while nobody has any.
func machine(t *testing.T) map[string]string {
	t.Helper()
	output := func(command ...string) string {
		out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
		return string(out)
	}
	found := map[string]string{
		"links":     output("ip", "-o", "link"),
		"addresses": output("ip", "-o", "-4", "address"),
		"rules":     output("nft", "list", "ruleset"),
		"forward":   output("cat", "/proc/sys/net/ipv4/ip_forward"),
	}
	names, err := filepath.Glob(netnsDir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	if labs, err := Names(); err == nil && len(labs) == 0 && len(names) == 0 {
		found["mounts"] = withoutTests(output("cat", "/proc/self/mounts"))
		found["directories"] = output("find", "/run", "/var/lib", "-maxdepth", "1")
	}
	return found
}

// withoutTests leaves out the mounts that tests of other packages have in
// directories of their own (testing.T.TempDir): a lab has none there.
func withoutTests(mounts string) string {
	var kept strings.Builder
	for line := range strings.Lines(mounts) {
		if !strings.Contains(line, " "+os.TempDir()+"/Test") {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

// inside lists the processes in the namespaces of a lab.
func inside(t *testing.T, name string) []pid {
	t.Helper()
	paths, err := filepath.Glob(netnsDir + "/" + name + "-*")
	if err != nil {
		t.Fatal(err)
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []pid
	for _, process := range processes {
		for _, path := range paths {
			theirs, err1 := os.Stat(process + "/ns/net")
			ours, err2 := os.Stat(path)
			if err1 != nil || err2 != nil || !os.SameFile(theirs, ours) {
				continue
			}
			id, _ := strconv.Atoi(filepath.Base(process))
			if p, err := pidOf(id); err == nil {
				found = append(found, p)
			}
		}
	}
	return found
}

func assertGone(t *testing.T, all []pid) {
	t.Helper()
	for _, p := range stillAlive(all, time.Second) {
		t.Errorf("process %d is left behind", p.ID)
	}
}

func assertNoNames(t *testing.T, lab string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if names, _ := filepath.Glob(netnsDir + "/" + lab + "-*"); len(names) > 0 || strings.Contains(string(mounts), lab+"-") {
		t.Errorf("namespaces of lab %s are left behind: %v\n%s", lab, names, mounts)
	}
}

func assertSame(t *testing.T, before, after map[string]string) {
	t.Helper()
	for what := range before {
		if _, ok := after[what]; ok && before[what] != after[what] {
			t.Errorf("%s before:\n%s\nafter:\n%s", what, before[what], after[what])
		}
	}
}
