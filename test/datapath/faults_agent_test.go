//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ciliumebpf "github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/weft-net/weft/test/lab"
)

// Two nodes with weft, in traffic, and things that happen to the agent of n1.
func newTrafficPair(tb testing.TB, flags ...string) (lab.Test, *lab.Lab, route) {
	tb.Helper()
	t, l := newTrafficLab(tb, lab.Options{AgentFlags: flags})
	r := between(l.Pod(1, 1), l.Pod(2, 1))
	mustRideBase(t, r)
	return t, l, r
}

// probes are what two probes saw at the same time: UDP there, ICMP back.
type probes struct{ udp, icmp lab.ProbeResult }

func (p probes) lost() int { return p.udp.Lost + p.icmp.Lost }

func (p probes) longestGap() time.Duration { return max(p.udp.LongestGap, p.icmp.LongestGap) }

func (p probes) String() string { return fmt.Sprintf("UDP: %s; ICMP: %s", p.udp, p.icmp) }

// underTraffic runs f while two probes and a TCP stream run along a route. The
// stream has to live on.
func underTraffic(t lab.Test, r route, f func()) probes {
	t.Helper()
	from, to := podOf(r.from), podOf(r.to)
	stream := startIperf(t, r, "-t 60 -b 20M")
	udp, err := lab.StartProbe(from, to, lab.ProbeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Stop()
	icmp, err := lab.StartProbe(to, from, lab.ProbeOptions{ICMP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer icmp.Stop()
	time.Sleep(100 * time.Millisecond)
	f()
	time.Sleep(200 * time.Millisecond)
	var p probes
	var errUDP, errICMP error
	p.udp, errUDP = udp.Stop()
	p.icmp, errICMP = icmp.Stop()
	if err := errors.Join(errUDP, errICMP); err != nil {
		t.Errorf("probing: %v", err)
	}
	if !stream.client.Running() {
		t.Errorf("the TCP stream has ended: %s", stream.client.Output())
	}
	stream.client.Stop(syscall.SIGKILL)
	stream.server.Stop(syscall.SIGKILL)
	if p.udp.Sent == 0 || p.icmp.Sent == 0 {
		t.Errorf("there were no probes: %s", p)
	}
	return p
}

func podOf(p place) *lab.Pod {
	for _, pod := range p.node.Pods {
		if pod.IP == p.ip {
			return pod
		}
	}
	return nil
}

// mustLoseNothing is underTraffic that fails the test when a packet was lost,
// or when the base path does not carry traffic afterwards.
func mustLoseNothing(t lab.Test, r route, f func()) {
	t.Helper()
	if p := underTraffic(t, r, f); p.lost() > 0 {
		t.Errorf("packets were lost: %s", p)
	}
	mustRideBase(t, r)
}

// mustComeBack is underTraffic for faults that no kernel survives unharmed:
// traffic has to be back within a second after f, and on the base path.
func mustComeBack(t lab.Test, r route, fault string, f func()) {
	t.Helper()
	var took time.Duration
	p := underTraffic(t, r, func() {
		began := time.Now()
		f()
		took = time.Since(began)
		t.Eventually(10*time.Second, func() error { return r.ask(t.Context(), 1) })
		time.Sleep(100 * time.Millisecond)
	})
	t.Logf("%s: %s", fault, p)
	if gap := p.longestGap(); gap > took+lab.Patient(time.Second) {
		t.Errorf("%s: no traffic for %s; the fault itself took %s", fault, gap, took)
	}
	mustRideBase(t, r)
}

func mustStop(t lab.Test, n *lab.Node, sig syscall.Signal) {
	t.Helper()
	if err := n.StopAgent(sig); err != nil && sig != syscall.SIGKILL {
		t.Fatal(err)
	}
}

func mustStart(t lab.Test, n *lab.Node, binary string, flags ...string) {
	t.Helper()
	if err := n.StartAgent(t.Context(), binary, flags...); err != nil {
		t.Fatal(err)
	}
}

func TestAgentIsKilledAndComesBack(t *testing.T) {
	t.Parallel()
	_, l, r := newTrafficPair(t)
	n := l.Node(1)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			lt := lab.T(t)
			mustLoseNothing(lt, r, func() {
				mustStop(lt, n, sig)
				time.Sleep(500 * time.Millisecond)
				before := mustCarried(t, n, l.Node(2))
				time.Sleep(300 * time.Millisecond)
				if now := mustCarried(t, n, l.Node(2)).sub(before); now.base.TxPackets < 50 || now.base.RxPackets < 50 {
					t.Errorf("without its agent the node does not use the base path: %+v", now)
				}
			})
			before := mustCarried(t, n, l.Node(2))
			mustLoseNothing(lt, r, func() {
				mustStart(lt, n, weft)
				time.Sleep(300 * time.Millisecond)
			})
			if after := mustCarried(t, n, l.Node(2)); after.base.TxPackets <= before.base.TxPackets || after.kernel.RxPackets < before.kernel.RxPackets {
				t.Errorf("the counters did not go on: %+v, then %+v", before, after)
			}
		})
	}
}

func TestAccelerationIsSwitchedOffAndOnWhileTrafficFlows(t *testing.T) {
	t.Parallel()
	_, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	for _, flags := range [][]string{nil, {"--peer", n2.String()}} {
		t.Run("accel off "+strings.Join(flags, " "), func(t *testing.T) {
			lt := lab.T(t)
			mustLoseNothing(lt, r, func() {
				for range 20 {
					mustWeft(t, n1, append([]string{"accel", "off"}, flags...)...)
					mustWeft(t, n1, append([]string{"accel", "on"}, flags...)...)
				}
			})
			// From the next packet on.
			for range 5 {
				mustWeft(t, n1, append([]string{"accel", "off"}, flags...)...)
				before := mustCarried(t, n1, n2)
				if err := r.ask(t.Context(), 10); err != nil {
					t.Error(err)
				}
				now := mustCarried(t, n1, n2).sub(before)
				if now.base.TxPackets+now.base.RxPackets > 0 || now.kernel.TxPackets < 10 || now.kernel.RxPackets < 10 {
					t.Errorf("acceleration is off: %+v", now)
				}
				mustWeft(t, n1, append([]string{"accel", "on"}, flags...)...)
				before = mustCarried(t, n1, n2)
				if err := r.ask(t.Context(), 10); err != nil {
					t.Error(err)
				}
				now = mustCarried(t, n1, n2).sub(before)
				if now.base.TxPackets < 8 || now.base.RxPackets < 8 {
					t.Errorf("acceleration is on: %+v", now)
				}
			}
		})
	}
}

func TestOnePeerIsSwitchedOff(t *testing.T) {
	t.Parallel()
	lt, l := newTrafficLab(t, lab.Options{Nodes: 3})
	to2, to3 := between(l.Pod(1, 1), l.Pod(2, 1)), between(l.Pod(1, 1), l.Pod(3, 1))
	mustRideBase(lt, to2)
	mustRideBase(lt, to3)
	mustWeft(t, l.Node(1), "accel", "off", "--peer", "n2")
	mustRideBase(lt, to3)
	before := mustCarried(t, l.Node(1), l.Node(2))
	if err := to2.ask(t.Context(), 10); err != nil {
		t.Error(err)
	}
	if now := mustCarried(t, l.Node(1), l.Node(2)).sub(before); now.base.TxPackets+now.base.RxPackets > 0 {
		t.Errorf("the peer that is off rides the base path: %+v", now)
	}
}

func TestSwitchesAndCountersSurviveRestarts(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		mustSurvive(lt, r, n1, n2, func() {
			if err := n1.RestartAgent(t.Context(), sig); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// The peers' counters outlive agents, and the totals that an agent publishes begin
// with it.
func TestTotalsBeginWithTheAgent(t *testing.T) {
	t.Parallel()
	const packets = 100
	_, l, r := newTrafficPair(t)
	n := l.Node(1)
	mustAsk := func() {
		if err := r.ask(t.Context(), packets); err != nil {
			t.Fatal(err)
		}
	}
	mustAsk()
	if err := n.RestartAgent(t.Context(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	before := mustCarried(t, n, l.Node(2)).total().TxPackets
	if first := mustTotalSent(t, n); before < packets || first > packets/10 {
		t.Errorf("%d packets were sent before the agent started, and its total begins at %d", before, first)
	}
	mustAsk()
	sent := mustCarried(t, n, l.Node(2)).total().TxPackets - before
	if total := mustTotalSent(t, n); total < packets || total > sent+packets/10 {
		t.Errorf("the total tells of %d packets, %d were sent", total, sent)
	}
}

var totalSent = regexp.MustCompile(`(?m)^weft_transmit_packets_total\{path="\w+"\} (\S+)$`)

// mustTotalSent is how many packets the agent says to have sent to all peers.
func mustTotalSent(t *testing.T, n *lab.Node) (sum uint64) {
	t.Helper()
	metrics, err := n.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	paths := totalSent.FindAllStringSubmatch(metrics, -1)
	if len(paths) != 3 {
		t.Fatalf("the totals are of %d paths, want 3", len(paths))
	}
	for _, path := range paths {
		count, err := strconv.ParseUint(path[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += count
	}
	return sum
}

// A script restarts the agent, waits until it is ready and goes on by name.
func TestPeersHaveTheirNamesOnceTheAgentIsReady(t *testing.T) {
	t.Parallel()
	_, l, _ := newTrafficPair(t)
	n := l.Node(1)
	for i := range 10 {
		if err := n.RestartAgent(t.Context(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if out, err := n.Output(t.Context(), weft, "accel", "on", "--peer", "n2"); err != nil {
			t.Fatalf("restart %d: %s%v", i+1, out, err)
		}
	}
}

// A number of peers that no longer fits means new maps. The operator's
// decision was not about maps.
func TestSwitchesSurviveAChangeOfMaxPeers(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n1 := l.Node(1)
	for _, flags := range [][]string{nil, {"--peer", l.Node(2).IP.String()}} {
		mustWeft(t, n1, append([]string{"accel", "off"}, flags...)...)
		mustStop(lt, n1, syscall.SIGTERM)
		mustStart(lt, n1, weft, "--max-peers", fmt.Sprint(100+len(flags)))
		before := mustCarried(t, n1, l.Node(2))
		if err := r.ask(t.Context(), 5); err != nil {
			t.Error(err)
		}
		if now := mustCarried(t, n1, l.Node(2)).sub(before); now.base.TxPackets+now.base.RxPackets > 0 {
			t.Errorf("accel off %s did not survive a restart with another --max-peers: %+v", strings.Join(flags, " "), now)
		}
		mustWeft(t, n1, append([]string{"accel", "on"}, flags...)...)
		mustRideBase(lt, r)
	}
}

// mustSurvive switches acceleration off, for the node and for a peer, runs f,
// and fails the test when it is on again or counters have gone back.
func mustSurvive(t lab.Test, r route, n, peer *lab.Node, f func()) {
	t.Helper()
	for _, flags := range [][]string{nil, {"--peer", peer.IP.String()}} {
		mustWeft(t, n, append([]string{"accel", "off"}, flags...)...)
		before := mustCarried(t, n, peer)
		f()
		if err := r.ask(t.Context(), 5); err != nil {
			t.Error(err)
		}
		after := mustCarried(t, n, peer)
		if after.base != before.base {
			t.Errorf("accel off %s: the base path carried packets, or its counters went back: %+v, then %+v", strings.Join(flags, " "), before.base, after.base)
		}
		if after.kernel.TxPackets < before.kernel.TxPackets+5 || after.kernel.RxPackets < before.kernel.RxPackets+5 {
			t.Errorf("accel off %s: the counters did not go on: %+v, then %+v", strings.Join(flags, " "), before.kernel, after.kernel)
		}
		mustWeft(t, n, append([]string{"accel", "on"}, flags...)...)
		mustRideBase(t, r)
	}
}

func TestMaxPeersIsChangedAtARestart(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	for _, number := range []string{"10", "2000", "1"} {
		mustLoseNothing(lt, r, func() {
			mustStop(lt, l.Node(1), syscall.SIGTERM)
			mustStart(lt, l.Node(1), weft, "--max-peers", number)
			time.Sleep(300 * time.Millisecond)
		})
		for _, m := range mustStatus(t, l.Node(1)).Maps {
			if m.Name == "peer_states" && fmt.Sprint(m.MaxEntries) != number {
				t.Errorf("there is room for %d peers, not %s", m.MaxEntries, number)
			}
		}
	}
}

// programs tells what runs on a node: the tags of the programs, which are a
// hash of their instructions, and the numbers of programs and links.
type programs struct{ tags, ids, links string }

func mustPrograms(t lab.Test, n *lab.Node) programs {
	t.Helper()
	var p programs
	for _, h := range mustStatus(t, n).Hooks {
		prog, err := ciliumebpf.NewProgramFromID(ciliumebpf.ProgramID(h.ID))
		if err != nil {
			t.Fatal(err)
		}
		info, err := prog.Info()
		prog.Close()
		if err != nil {
			t.Fatal(err)
		}
		l, err := link.LoadPinnedLink(n.Path("/sys/fs/bpf/weft/links/"+h.Program), nil)
		if err != nil {
			t.Fatal(err)
		}
		linkInfo, err := l.Info()
		l.Close()
		if err != nil {
			t.Fatal(err)
		}
		p.tags += fmt.Sprintf("%s %s\n", h.Program, info.Tag)
		p.ids += fmt.Sprintf("%s %d\n", h.Program, h.ID)
		p.links += fmt.Sprintf("%s %d\n", h.Program, linkInfo.ID)
	}
	return p
}

func TestWeftIsUpgradedToOtherPrograms(t *testing.T) {
	t.Parallel()
	other := mustBuildOther(t)
	lt, l, r := newTrafficPair(t)
	n1, n2 := l.Node(1), l.Node(2)
	for _, binary := range []string{other, weft} {
		before, counters := mustPrograms(lt, n1), mustCarried(t, n1, n2)
		mustLoseNothing(lt, r, func() {
			mustStop(lt, n1, syscall.SIGTERM)
			mustStart(lt, n1, binary)
			time.Sleep(300 * time.Millisecond)
		})
		after := mustPrograms(lt, n1)
		if after.tags == before.tags || after.ids == before.ids {
			t.Errorf("the programs are the old ones:\n%s%s", after.tags, after.ids)
		}
		if after.links != before.links {
			t.Errorf("links were made anew:\n%sthen\n%s", before.links, after.links)
		}
		if now := mustCarried(t, n1, n2); now.base.TxPackets < counters.base.TxPackets+100 || now.kernel.RxPackets < counters.kernel.RxPackets {
			t.Errorf("the counters did not go on: %+v, then %+v", counters, now)
		}
		mustSurvive(lt, r, n1, n2, func() {
			mustStop(lt, n1, syscall.SIGTERM)
			mustStart(lt, n1, other)
			mustStop(lt, n1, syscall.SIGTERM)
			mustStart(lt, n1, binary)
		})
	}
}

// mustBuildOther builds weft with programs that differ in a constant.
var mustBuildOther = func() func(testing.TB) string {
	var once sync.Once
	var binary string
	var err error
	return func(tb testing.TB) string {
		tb.Helper()
		once.Do(func() { binary, err = lab.BuildOtherWeft(filepath.Dir(weft)) })
		if err != nil {
			tb.Fatal(err)
		}
		return binary
	}
}()

func TestWeftIsRemoved(t *testing.T) {
	t.Parallel()
	lt, l, r := newTrafficPair(t)
	n := l.Node(1)
	if out, err := n.Output(t.Context(), weft, "remove"); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("weft remove beside a running agent: %s %v", out, err)
	}
	mustRideBase(lt, r)
	hooks := mustStatus(t, n).Hooks
	p := underTraffic(lt, r, func() {
		mustStop(lt, n, syscall.SIGTERM)
		out := mustWeft(t, n, "remove")
		for _, h := range hooks {
			if !strings.Contains(out, "removed program "+h.Program) {
				t.Errorf("weft remove does not tell of %s:\n%s", h.Program, out)
			}
		}
	})
	if p.lost() > 0 {
		t.Errorf("packets were lost: %s", p)
	}
	if _, err := os.Stat(n.Path("/sys/fs/bpf/weft")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
	for _, device := range []string{"eth0", n.Overlay()} {
		if left := mustAttached(lt, n, device); left != "" {
			t.Errorf("left on %s: %s", device, left)
		}
	}
	if out := mustWeft(t, n, "remove"); out != "There is nothing to remove.\n" {
		t.Errorf("removing once more: %s", out)
	}
	mustLoseNothing(lt, r, func() {
		mustStart(lt, n, weft)
		time.Sleep(300 * time.Millisecond)
	})
}

// mustAttached lists what is attached to a device: tcx programs and filters.
func mustAttached(t lab.Test, n *lab.Node, device string) string {
	t.Helper()
	var left []string
	err := n.Do(func() error {
		i, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		for _, at := range []ciliumebpf.AttachType{ciliumebpf.AttachTCXIngress, ciliumebpf.AttachTCXEgress} {
			chain, err := link.QueryPrograms(link.QueryOptions{Target: i.Index, Attach: at})
			if err != nil {
				return err
			}
			for _, p := range chain.Programs {
				left = append(left, fmt.Sprintf("%v program %d", at, p.ID))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if q := t.Run(n, "tc qdisc show dev "+device); strings.Contains(q, "clsact") {
		left = append(left, q)
	}
	return strings.Join(left, ", ")
}

func TestBrokenConfigIsReloadedUnderTraffic(t *testing.T) {
	t.Parallel()
	lt, l := newTrafficLab(t, lab.Options{Nodes: 3})
	r := between(l.Pod(1, 1), l.Pod(2, 1))
	n := l.Node(1)
	mustConfigure(t, n, n.IP, entriesOf(l.Node(2))...)
	to3 := between(l.Pod(1, 1), l.Pod(3, 1))
	lt.Eventually(2*time.Second, func() error {
		if to3.ask(t.Context(), 1) == nil {
			return errors.New("n3 is still a peer")
		}
		return nil
	})
	for name, text := range map[string]string{
		"empty": "", "cut off": "interface: eth0\npublicIP: 192.0.2.11\nnetwo", "not YAML": "a: [b", "no peers": "interface: eth0\npublicIP: 192.0.2.11\nnetwork: [10.244.0.0/16]\nnode: {name: n1, prefixes: [10.244.1.0/24]}\n",
		"bad MAC": "interface: eth0\npublicIP: 192.0.2.11\nnetwork: [10.244.0.0/16]\nnode: {name: n1, prefixes: [10.244.1.0/24]}\npeers: [{name: n2, prefixes: [10.244.2.0/24], publicIP: 192.0.2.12, mac: what}]\n",
	} {
		t.Run(name, func(t *testing.T) {
			lt := lab.T(t)
			mustLoseNothing(lt, r, func() {
				mustWriteConfig(t, n, text)
				lt.Eventually(3*time.Second, func() error {
					if !strings.Contains(mustWeft(t, n, "status"), "keeping what was read last") {
						return errors.New("weft status does not tell")
					}
					return nil
				})
				if !strings.Contains(n.AgentLog(), "keeping what was read last") {
					t.Error("the log does not tell")
				}
			})
			mustLoseNothing(lt, r, func() {
				mustConfigure(t, n, n.IP, entriesOf(l.Node(2), l.Node(3))...)
				lt.Eventually(3*time.Second, func() error { return to3.ask(t.Context(), 1) })
				lt.Eventually(3*time.Second, func() error {
					if strings.Contains(mustWeft(t, n, "status"), "keeping what was read last") {
						return errors.New("weft status still tells of the fault")
					}
					return nil
				})
			})
			mustConfigure(t, n, n.IP, entriesOf(l.Node(2))...)
		})
	}
}
