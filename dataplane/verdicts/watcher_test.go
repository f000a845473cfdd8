//go:build linux

package verdicts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

const (
	// soon is the promised 100 ms, and time for a busy machine to run the test.
	soon = time.Second
	// quiet is long enough for what was told to be read, and to poll.
	quiet = 3 * pollInterval
)

// node is a namespace with two devices of its own, n0 and n1.
//
//	n0 10.1.0.1/24 ─── n1
type node struct{ *netns.NS }

func newNode(t testing.TB) node {
	t.Helper()
	n := node{netns.New(t)}
	n.Run(t, "ip link set lo up", "ip link add n0 type veth peer name n1",
		"ip link set n0 addrgenmode none", "ip link set n1 addrgenmode none", // IPv6 would be at it for seconds
		"ip addr add 10.1.0.1/24 dev n0", "ip link set n0 up", "ip link set n1 up")
	return n
}

// mustOpen opens a watcher and waits until what is left of the making of the
// node is over.
func (n node) mustOpen(t testing.TB, o Options) *Watcher {
	t.Helper()
	var w *Watcher
	n.MustDo(t, func() (err error) {
		w, err = Open(o)
		return err
	})
	t.Cleanup(func() { _ = w.Close() })
	mustRest(t, w)
	return w
}

// mustSee waits for changes, all of them, and returns how long that took.
func mustSee(t testing.TB, w *Watcher, want Changes) time.Duration {
	t.Helper()
	begin := time.Now()
	var seen Changes
	for seen&want != want {
		changes, err := w.Wait(t.Context(), soon)
		if err != nil {
			t.Fatal(err)
		}
		if changes == 0 {
			t.Fatalf("seen: %v; want %v", seen, want)
		}
		seen |= changes
	}
	return time.Since(begin)
}

func mustSeeNothing(t testing.TB, w *Watcher, d time.Duration) {
	t.Helper()
	if changes, err := w.Wait(t.Context(), d); changes != 0 || err != nil {
		t.Errorf("seen: %v, error %v; want nothing", changes, err)
	}
}

// mustRest reads on until nothing more is told.
func mustRest(t testing.TB, w *Watcher) {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < 10*time.Second; {
		if changes, err := w.Wait(t.Context(), quiet); changes == 0 && err == nil {
			return
		}
	}
	t.Fatal("changes don't end")
}

func TestEachKindOfChangeIsSeen(t *testing.T) {
	n := newNode(t)
	n.Run(t, "ip link add br0 type bridge", "ip link set br0 addrgenmode none", "ip link set br0 up", "ip route add 10.7.0.0/16 dev n0", "ip nexthop add id 8 dev n0",
		"nft add table inet t", "nft add set inet t s { type ipv4_addr; }",
		"nft add chain inet t c { type filter hook forward priority 0; }",
		"iptables-nft -N known")
	w := n.mustOpen(t, Options{})
	for _, test := range []struct {
		name string
		run  string
		want Changes
	}{
		{"a ruleset", "nft add rule inet t c drop", Nftables},
		{"a ruleset is flushed", "nft flush chain inet t c", Nftables},
		{"a set's element", "nft add element inet t s { 10.0.0.1 }", Nftables},
		{"a set's element goes", "nft delete element inet t s { 10.0.0.1 }", Nftables},
		{"a chain's policy", "nft chain inet t c { policy drop; }", Nftables},
		{"a named object", "nft add quota inet t q { 100 bytes }", Nftables},
		{"a bridge's ruleset", "nft add table bridge b", Nftables},
		{"a table goes", "nft delete table bridge b", Nftables},
		{"iptables-nft", "iptables-nft -A FORWARD -j DROP", Nftables},
		{"ip6tables-nft", "ip6tables-nft -P FORWARD DROP", Nftables},
		{"a route", "ip route add 10.8.0.0/16 dev n0", Routes},
		{"a route of another table", "ip route add blackhole 10.9.0.0/16 table 100", Routes},
		{"a route goes", "ip route del 10.8.0.0/16", Routes},
		{"an IPv6 route", "ip -6 route add fd01::/64 dev n0", Routes},
		{"an address", "ip addr add 10.2.0.1/24 dev n0", Routes},
		{"an address goes", "ip addr del 10.2.0.1/24 dev n0", Routes},
		{"a routing rule", "ip rule add fwmark 7 table 100", Rules},
		{"a routing rule goes", "ip rule del fwmark 7 table 100", Rules},
		{"an IPv6 routing rule", "ip -6 rule add fwmark 7 table 100", Rules},
		{"a nexthop", "ip nexthop add id 7 dev n0", Nexthops},
		{"a nexthop goes", "ip nexthop del id 7", Nexthops},
		{"forwarding", "sysctl -w net.ipv4.ip_forward=1", Forwarding},
		{"forwarding of a device", "sysctl -w net.ipv4.conf.n0.forwarding=0", Forwarding},
		{"a reverse path filter", "sysctl -w net.ipv4.conf.n0.rp_filter=1", Forwarding},
		{"the reverse path filter of all", "sysctl -w net.ipv4.conf.all.rp_filter=2", Forwarding},
		{"IPv6 forwarding", "sysctl -w net.ipv6.conf.all.forwarding=1", Forwarding},
		{"linkdown routes", "sysctl -w net.ipv4.conf.all.ignore_routes_with_linkdown=1", Forwarding},
		{"a policy", "ip xfrm policy add src 10.3.0.0/16 dst 10.4.0.0/16 dir fwd action block", XFRM},
		{"the default policy", "ip xfrm policy setdefault fwd block", XFRM},
		{"a policy goes", "ip xfrm policy flush", XFRM},
		{"a sysctl without event", "sysctl -w net.ipv4.conf.all.route_localnet=1", Settings},
		{"source addresses of its own", "sysctl -w net.ipv4.conf.all.accept_local=1", Settings},
		{"no xfrm", "sysctl -w net.ipv4.conf.all.disable_xfrm=1", Settings},
		{"no policies", "sysctl -w net.ipv4.conf.all.disable_policy=1", Settings},
		{"marks for the source", "sysctl -w net.ipv4.conf.all.src_valid_mark=1", Settings},
		{"no IPv6 policies", "sysctl -w net.ipv6.conf.all.disable_policy=1", Settings},
		{"a bridge's own setting", "ip link set br0 type bridge nf_call_iptables 1", Links},
		{"a device goes down with its routes", "ip link set n0 down", Links},
		{"a device comes", "ip link set n0 up", Links},
		{"its other end goes down", "ip link set n1 down", Links},
		{"a device goes", "ip link del n0", Links},
	} {
		t.Run(test.name, func(t *testing.T) {
			mustRest(t, w)
			n.Run(t, test.run)
			if took := mustSee(t, w, test.want); took > 100*time.Millisecond {
				t.Logf("took %v", took)
			}
		})
	}
	// Neither said what they did not see.
	if blind := w.Blind(); len(blind) > 0 {
		t.Errorf("blind: %q", blind)
	}
}

// A policy that reaches the end of its life is told to another group.
func TestTheEndOfAPolicysLifeIsSeen(t *testing.T) {
	n := newNode(t)
	w := n.mustOpen(t, Options{})
	n.Run(t, "ip xfrm policy add src 10.3.0.0/16 dst 10.4.0.0/16 dir fwd action block limit time-hard 2")
	mustSee(t, w, XFRM)
	mustEndByItself(t, w)
}

func TestXFRMStatesAreSeen(t *testing.T) {
	const add = "ip xfrm state add src 10.1.0.1 dst 10.1.0.2 proto esp spi 0x7 aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128"
	n := newNode(t)
	w := n.mustOpen(t, Options{})
	if out, err := n.Try(add + " limit time-hard 2"); err != nil {
		if strings.Contains(out, "not found") {
			t.Skip("this kernel has no ESP, or no AES for it")
		}
		t.Fatal(err)
	}
	mustSee(t, w, XFRM)
	mustEndByItself(t, w)
	n.Run(t, add)
	mustSee(t, w, XFRM)
	mustRest(t, w)
	n.Run(t, "ip xfrm state flush")
	mustSee(t, w, XFRM)
}

// mustEndByItself waits for the end of what has two seconds to live.
func mustEndByItself(t *testing.T, w *Watcher) {
	t.Helper()
	mustRest(t, w)
	if changes, err := w.Wait(t.Context(), 5*time.Second); changes != XFRM || err != nil {
		t.Fatalf("seen: %v, error %v", changes, err)
	}
	mustRest(t, w)
}

func TestBridgeNetfilterIsSeen(t *testing.T) {
	n := newNode(t)
	if _, err := n.Try("ls /proc/sys/net/bridge"); err != nil {
		t.Skip("this kernel has no br_netfilter loaded")
	}
	w := n.mustOpen(t, Options{})
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-filter-vlan-tagged"} {
		value := strings.TrimSpace(n.Run(t, "cat /proc/sys/net/bridge/"+name))
		n.Run(t, fmt.Sprintf("sysctl -w net.bridge.%s=%d", name, 1-int(value[0]-'0')))
		mustSee(t, w, Settings)
	}
	mustSeeNothing(t, w, 2*pollsPerSettings*pollInterval)
}

// What the packet path adds to a set, and time takes out, is no change of the
// ruleset, and a node may have thousands a second of it.
func TestPacketsThatFillASetMakeNoChange(t *testing.T) {
	n := newNode(t)
	n.Run(t, "nft add table ip t", "nft add set ip t s { type ipv4_addr; flags dynamic,timeout; timeout 100ms; size 1000; }",
		"nft add chain ip t o { type filter hook output priority 0; }",
		"nft add rule ip t o update @s { ip daddr } counter")
	w := n.mustOpen(t, Options{})
	n.Run(t, "ping -c 20 -i 0.01 127.0.0.9")
	mustSeeNothing(t, w, quiet)
	if rules := n.Run(t, "nft list chain ip t o"); strings.Contains(rules, "packets 0") {
		t.Fatalf("no packet met the set:\n%s", rules)
	}
	mustSeeNothing(t, w, 500*time.Millisecond) // the element goes
}

func TestNothingChangesWhileNothingIsDone(t *testing.T) {
	w := newNode(t).mustOpen(t, Options{})
	begin := time.Now()
	mustSeeNothing(t, w, 500*time.Millisecond)
	if took := time.Since(begin); took < 500*time.Millisecond || took > 500*time.Millisecond+soon {
		t.Errorf("waited %v", took)
	}
}

// batch makes a file of many commands for `ip -batch`.
func batch(t testing.TB, count int, line string) string {
	t.Helper()
	path := t.TempDir() + "/batch"
	var text strings.Builder
	for i := range count {
		fmt.Fprintf(&text, line+"\n", i>>8, i&255)
	}
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Who waits is woken: it's not that the next poll finds what was told.
func TestWaitIsWoken(t *testing.T) {
	n := newNode(t)
	w := n.mustOpen(t, Options{Poll: time.Hour})
	for run, want := range map[string]Changes{
		"ip route add blackhole 10.8.0.0/16": Routes,
		"nft add table ip t":                 Nftables,
		"ip xfrm policy add src 10.3.0.0/16 dst 10.4.0.0/16 dir fwd action block": XFRM,
	} {
		mustRest(t, w)
		done := make(chan error, 1)
		time.AfterFunc(quiet, func() {
			_, err := n.Try(run)
			done <- err
		})
		begin := time.Now()
		if changes, err := w.Wait(t.Context(), time.Minute); changes != want || err != nil || time.Since(begin) > quiet+soon {
			t.Errorf("%s: seen: %v, error %v, after %v", run, changes, err, time.Since(begin))
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

func TestAThousandChangesAreOne(t *testing.T) {
	n := newNode(t)
	w := n.mustOpen(t, Options{Poll: time.Hour})
	n.Run(t, "ip -batch "+batch(t, 1000, "route add blackhole 10.100.%d.%d"), "nft add table ip t")
	mustSee(t, w, Routes|Nftables)
	// A slow machine reads them in parts.
	parts := 1
	for ; parts < 20; parts++ {
		changes, err := w.Wait(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if changes == 0 {
			break
		}
	}
	if parts == 20 {
		t.Errorf("a thousand changes came in %d parts and more", parts)
	}
	t.Logf("a thousand changes came in %d parts", parts)
}

func TestLostEventsAreAChange(t *testing.T) {
	n := newNode(t)
	w := n.mustOpen(t, Options{Poll: time.Hour})
	for _, s := range w.sockets {
		if err := s.conn.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) }); err != nil {
			t.Fatal(err)
		}
	}
	n.Run(t, "ip -batch "+batch(t, 100, "route add blackhole 10.100.%d.%d"))
	changes, err := w.Wait(t.Context(), soon)
	if changes != Routes|Overrun || err != nil {
		t.Errorf("seen: %v, error %v", changes, err)
	}
	mustSeeNothing(t, w, quiet)
	n.Run(t, "ip route add blackhole 10.101.0.0")
	mustSee(t, w, Routes) // and it hears again
}

// Transactions of a thousand messages take no more room in a queue than others.
func TestLargeTransactionsDontOverrun(t *testing.T) {
	n := newNode(t)
	w := n.mustOpen(t, Options{Poll: time.Hour})
	for _, s := range w.sockets {
		_ = s.conn.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<10) })
	}
	n.MustDo(t, func() error { return feed("nft -f -", services(1000)) })
	changes, err := w.Wait(t.Context(), soon)
	if changes != Nftables || err != nil {
		t.Errorf("seen: %v, error %v", changes, err)
	}
	mustSeeNothing(t, w, quiet)
}

func TestWaitEnds(t *testing.T) {
	w := newNode(t).mustOpen(t, Options{Poll: time.Hour})
	t.Run("WithItsContext", func(t *testing.T) {
		for range 20 {
			ctx, cancel := context.WithCancel(t.Context())
			go cancel()
			begin := time.Now()
			changes, err := w.Wait(ctx, time.Minute)
			if changes != 0 || !errors.Is(err, context.Canceled) || time.Since(begin) > soon {
				t.Fatalf("seen: %v, error %v, after %v", changes, err, time.Since(begin))
			}
		}
	})
	t.Run("AndCanBeCalledAgain", func(t *testing.T) { mustSeeNothing(t, w, quiet) })
	t.Run("WithTheWatcher", func(t *testing.T) {
		time.AfterFunc(quiet, func() { _ = w.Close() })
		begin := time.Now()
		_, err := w.Wait(t.Context(), time.Minute)
		if !errors.Is(err, os.ErrClosed) || time.Since(begin) > soon {
			t.Errorf("error %v, after %v", err, time.Since(begin))
		}
	})
}

// What can't be watched is said once, and listed.
func TestBlindness(t *testing.T) {
	var log strings.Builder
	w := &Watcher{opts: Options{Log: slog.New(slog.NewTextHandler(&log, nil))}}
	for range 3 {
		w.setBlind([]string{"iptables-legacy: refused"})
	}
	w.setBlind([]string{"iptables-legacy: refused", "ip6tables-legacy: refused"})
	if lines := strings.Count(log.String(), "\n"); lines != 2 {
		t.Errorf("logged %d lines, want 2:\n%s", lines, &log)
	}
	if len(w.Blind()) != 2 {
		t.Errorf("blind: %q", w.Blind())
	}
}

func TestOtherNamespacesAreNotHeard(t *testing.T) {
	w := newNode(t).mustOpen(t, Options{})
	other := newNode(t)
	other.Run(t, "ip route add blackhole 10.8.0.0/16", "nft add table ip t", "iptables-legacy -A FORWARD -j DROP",
		"sysctl -w net.ipv4.conf.all.route_localnet=1", "ip xfrm policy add src 10.3.0.0/16 dst 10.4.0.0/16 dir fwd action block")
	mustSeeNothing(t, w, 2*pollsPerSettings*pollInterval)
}

// A module brings its files when it is loaded, and takes them when it goes.
func TestFilesThatComeAndGo(t *testing.T) {
	dir := t.TempDir()
	p := newProcFile(filepath.Join(dir, "late"))
	b := make([]byte, 8)
	mustRead := func(want string) {
		t.Helper()
		p.open()
		if text, err := p.read(b); string(text) != want || err != nil {
			t.Errorf("read %q, error %v, want %q", text, err, want)
		}
	}
	mustRead("")
	if err := os.WriteFile(p.path, []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRead("1\n")
	if err := os.WriteFile(p.path, []byte("2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRead("2\n")
	_ = unix.Close(p.fd) // as when the file is no more: reading fails
	if text, err := p.read(b); len(text) > 0 || err != nil {
		t.Errorf("read %q, error %v", text, err)
	}
	mustRead("2\n")
	p.close()
}

// What is done unheard is told when it is done, by whomever, and what comes after it
// as ever.
func TestUnheardChangesAreToldOnce(t *testing.T) {
	n := newNode(t)
	n.Run(t, "nft add table inet t", "nft add set inet t s { type ipv4_addr; }")
	w := n.mustOpen(t, Options{Poll: time.Hour}) // nothing but what is told wakes it
	told := make(chan Changes, 1)
	err := w.Unheard(func() error {
		n.Run(t, "nft add element inet t s { 10.0.0.1 }", "nft add chain inet t c")
		mustSeeNothing(t, w, quiet)
		n.Run(t, "ip route add 10.8.0.0/16 dev n0")
		mustSee(t, w, Routes)
		mustSeeNothing(t, w, quiet)
		go func() {
			changes, err := w.Wait(t.Context(), 10*soon)
			if err != nil {
				t.Error(err)
			}
			told <- changes
		}()
		time.Sleep(quiet) // for it to wait
		return errDone
	})
	if !errors.Is(err, errDone) {
		t.Errorf("error %v, want what was returned", err)
	}
	select {
	case changes := <-told:
		if changes != Nftables {
			t.Errorf("seen: %v, want %v", changes, Nftables)
		}
	case <-time.After(soon):
		t.Fatal("not told")
	}
	mustSeeNothing(t, w, quiet)
	n.Run(t, "nft add element inet t s { 10.0.0.2 }")
	mustSee(t, w, Nftables)
}

var errDone = errors.New("done")
