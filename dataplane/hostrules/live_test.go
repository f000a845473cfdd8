//go:build linux

package hostrules

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weft-net/weft/test/netns"
)

// town is a node with a pod and a world behind it, which is also where the pod
// of another node is:
//
//	pod 10.244.1.5 ── .1 node 192.0.2.1 ── 192.0.2.9 world, 10.244.2.5
//
// and the same with fd00:10:244: and 2001:db8::. World and pod have routes to
// each other, so that a packet that keeps its address is answered too.
type town struct{ pod, node, world *netns.NS }

func newTown(tb testing.TB) town {
	t := town{netns.New(tb), netns.New(tb), netns.New(tb)}
	netns.Connect(tb, t.node, "cni0", t.pod, "eth0")
	netns.Connect(tb, t.node, "eth0", t.world, "eth0")
	shell(tb, t.node, `
		ip link set lo up
		ip addr add 10.244.1.1/24 dev cni0; ip -6 addr add fd00:10:244:1::1/64 dev cni0 nodad
		ip addr add 192.0.2.1/24 dev eth0; ip -6 addr add 2001:db8::1/64 dev eth0 nodad
		ip addr add 203.0.113.7/32 dev lo
		ip route add 10.244.0.0/16 via 192.0.2.9; ip -6 route add fd00:10:244::/48 via 2001:db8::9
		echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding`)
	shell(tb, t.pod, `
		ip link set lo up
		ip addr add 10.244.1.5/24 dev eth0; ip -6 addr add fd00:10:244:1::5/64 dev eth0 nodad
		ip route add default via 10.244.1.1; ip -6 route add default via fd00:10:244:1::1`)
	shell(tb, t.world, `
		ip link set lo up
		ip addr add 192.0.2.9/24 dev eth0; ip -6 addr add 2001:db8::9/64 dev eth0 nodad
		ip addr add 10.244.2.5/32 dev lo; ip -6 addr add fd00:10:244:2::5/128 dev lo nodad
		ip route add 203.0.113.7 via 192.0.2.1
		ip route add 10.244.1.0/24 via 192.0.2.1; ip -6 route add fd00:10:244:1::/64 via 2001:db8::1`)
	return t
}

// serve tells who connects whence it comes, and then returns what it is sent.
func serve(tb testing.TB, ns *netns.NS) (port int) {
	tb.Helper()
	var l net.Listener
	ns.MustDo(tb, func() (err error) {
		l, err = net.Listen("tcp", ":0")
		return err
	})
	var all sync.WaitGroup
	tb.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				at := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
				fmt.Fprintf(conn, "%-39s", at.Addr().Unmap())
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	return l.Addr().(*net.TCPAddr).Port
}

// dial connects, and tells whence the server sees it come. The empty text is a
// connection that does not come about.
func dial(tb testing.TB, ns *netns.NS, from, to string, port int) (conn net.Conn, seen string) {
	tb.Helper()
	_ = ns.Do(func() (err error) {
		d := net.Dialer{Timeout: time.Second}
		if from != "" {
			d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))
		}
		conn, err = d.Dial("tcp", net.JoinHostPort(to, fmt.Sprint(port)))
		return err
	})
	if conn == nil {
		return nil, ""
	}
	tb.Cleanup(func() { conn.Close() })
	b := make([]byte, 39)
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.ReadFull(conn, b); err != nil {
		tb.Errorf("from %s to %s: %v", from, to, err)
	}
	return conn, strings.TrimSpace(string(b))
}

// mustEcho wants that a connection still works.
func mustEcho(tb testing.TB, conn net.Conn, when string) {
	tb.Helper()
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	b := []byte("hello")
	if _, err := conn.Write(b); err != nil {
		tb.Errorf("%s: %v", when, err)
		return
	}
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "hello" {
		tb.Errorf("%s: %q, %v", when, b, err)
	}
}

func TestWhoIsMasqueraded(t *testing.T) {
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			town := newTown(t)
			world, pod := serve(t, town.world), serve(t, town.pod)
			mustSync(t, open(t, town.node), s.in(dual()))
			fromHost := "192.0.2.1"
			if s.nftables {
				fromHost = "203.0.113.7" // flannel's last rule is never reached
			}
			for _, c := range []struct {
				what     string
				in       *netns.NS
				from, to string
				port     int
				seen     string
			}{
				{"pod to world", town.pod, "", "192.0.2.9", world, "192.0.2.1"},
				{"pod to world", town.pod, "", "2001:db8::9", world, "2001:db8::1"},
				{"pod to pod", town.pod, "", "10.244.2.5", world, "10.244.1.5"},
				{"pod to pod", town.pod, "", "fd00:10:244:2::5", world, "fd00:10:244:1::5"},
				{"another node's pod to pod", town.world, "10.244.2.5", "10.244.1.5", pod, "10.244.2.5"},
				{"world to pod", town.world, "192.0.2.9", "10.244.1.5", pod, "192.0.2.9"},
				{"world to pod", town.world, "2001:db8::9", "fd00:10:244:1::5", pod, "2001:db8::9"},
				{"host to another node's pod", town.node, "203.0.113.7", "10.244.2.5", world, fromHost},
				{"host's pod address to another node's pod", town.node, "10.244.1.1", "10.244.2.5", world, "10.244.1.1"},
			} {
				if _, seen := dial(t, c.in, c.from, c.to, c.port); seen != c.seen {
					t.Errorf("%s: %s sees %q, want %s", c.what, c.to, seen, c.seen)
				}
			}
		})
	}
}

// Docker's policy keeps pods from being forwarded; --iptables-forward-rules
// helps.
func TestForwardedAgainstDockersPolicy(t *testing.T) {
	for _, s := range situations[:2] {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			town := newTown(t)
			world := serve(t, town.world)
			shell(t, town.node, "iptables -P FORWARD DROP; ip6tables -P FORWARD DROP")
			d := s.in(dual())
			d.Forward = false
			r := open(t, town.node)
			mustSync(t, r, d)
			if _, seen := dial(t, town.pod, "", "192.0.2.9", world); seen != "" {
				t.Error("forwarded without the rules")
			}
			d.Forward = true
			mustSync(t, r, d)
			for _, to := range []string{"192.0.2.9", "2001:db8::9"} {
				if _, seen := dial(t, town.pod, "", to, world); seen == "" {
					t.Errorf("not forwarded to %s", to)
				}
			}
		})
	}
}

// Connections outlive whatever is done to the rules.
func TestConnectionsGoOn(t *testing.T) {
	hostOf(t, nft)
	town := newTown(t)
	world := serve(t, town.world)
	load(t, town.node, "nft-dual")
	conns := map[string]net.Conn{}
	for _, to := range []string{"192.0.2.9", "2001:db8::9", "10.244.2.5"} {
		conn, seen := dial(t, town.pod, "", to, world)
		if seen == "" {
			t.Fatalf("no connection to %s", to)
		}
		conns[to] = conn
	}
	all := func(when string) {
		for to, conn := range conns {
			mustEcho(t, conn, when+", to "+to)
		}
	}
	all("before")
	r := open(t, town.node)
	mustSync(t, r, dual())
	all("taken over")
	moved := dual()
	moved.OrderedPorts = true
	mustSync(t, r, moved)
	all("rules rewritten")
	moved.NFTables = true
	mustSync(t, r, moved)
	all("in nftables mode")
	mustSync(t, r, dual())
	all("and back")
	// With the last rule that needs it the kernel ends conntrack, and with it
	// NAT; but kube-proxy or Docker have some.
	shell(t, town.node, "for ip in ip ip6; do ${ip}tables -A INPUT -m conntrack --ctstate INVALID -j DROP; done")
	if _, err := r.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	all("removed")
}

// With packets on their way all the time, one that meets no rules at all would
// end a masqueraded connection.
func TestModeChangesUnderTraffic(t *testing.T) {
	hostOf(t, nft)
	town := newTown(t)
	world := serve(t, town.world)
	r := open(t, town.node)
	mustSync(t, r, v4())
	conn, seen := dial(t, town.pod, "", "192.0.2.9", world)
	if seen != "192.0.2.1" {
		t.Fatalf("the world sees %q", seen)
	}
	stop := make(chan struct{})
	var traffic sync.WaitGroup
	echoes := 0
	traffic.Go(func() {
		for !t.Failed() {
			select {
			case <-stop:
				return
			default:
			}
			mustEcho(t, conn, "while the mode changes")
			echoes++
		}
	})
	d := v4()
	for range 6 {
		d.NFTables = !d.NFTables
		mustSync(t, r, d)
	}
	close(stop)
	traffic.Wait()
	if echoes < 100 {
		t.Errorf("only %d echoes", echoes)
	}
}

// While rules change all the time, whoever looks finds all of them.
func TestNoMomentWithoutRules(t *testing.T) {
	const changes = 16
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			r := open(t, ns)
			mustSync(t, r, s.in(v4()))
			stop, looked := make(chan struct{}), atomic.Int64{}
			var watcher sync.WaitGroup
			watcher.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					n, err := lookAt(s, ns)
					if n != 6 || err != nil {
						t.Errorf("%d rules were there, want 6 (%v)", n, err)
						return
					}
					looked.Add(1)
				}
			})
			moved := s.in(v4())
			for i := range changes {
				moved.Prefixes = []netip.Prefix{[]netip.Prefix{own4, other4}[(i+1)%2]}
				mustSync(t, r, moved)
			}
			close(stop)
			watcher.Wait()
			if looked.Load() < changes/4 {
				t.Errorf("looked %d times only", looked.Load())
			}
		})
	}
}

// lookAt counts the rules for masquerading, each in its chain and reached. One
// that looks twice must look at the same.
func lookAt(s situation, ns *netns.NS) (n int, err error) {
	if s.mode == inLegacy {
		text, err := tryShell(ns, "iptables-legacy-save -t nat")
		n := strings.Count(text, "-A FLANNEL-POSTRTG ")
		if strings.Count(text, "-A POSTROUTING ") != 1 {
			n = 0
		}
		return n, err
	}
	table, chain := "nat", "FLANNEL-POSTRTG"
	if s.nftables {
		table, chain = ipv4.table, "postrtg"
	}
	err = ns.Do(func() error {
		sock, err := openSocket()
		if err != nil {
			return err
		}
		defer sock.Close()
		for {
			before, err := sock.generation()
			if err != nil {
				return err
			}
			rules, err := sock.rules(ipv4, table, chain)
			if err != nil {
				return err
			}
			jumps := 1
			if !s.nftables {
				all, err := sock.rules(ipv4, table, "POSTROUTING")
				if err != nil {
					return err
				}
				jumps = len(all)
			}
			after, err := sock.generation()
			if err != nil {
				return err
			}
			if before == after {
				n = len(rules) * jumps
				return nil
			}
		}
	})
	return n, err
}

// kube-proxy, Docker and others write at the same time.
func TestOthersWriteMeanwhile(t *testing.T) {
	const changes = 10
	for _, s := range situations {
		t.Run(s.name, func(t *testing.T) {
			s.host(t)
			ns := netns.New(t)
			r := open(t, ns)
			mustSync(t, r, s.in(v4()))
			stop := make(chan struct{})
			var others sync.WaitGroup
			end := sync.OnceFunc(func() { close(stop); others.Wait() })
			t.Cleanup(end)
			others.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := tryShell(ns, `
						iptables -w 5 -t nat -I POSTROUTING -s 10.9.9.9 -j ACCEPT
						iptables -w 5 -I FORWARD -s 10.9.9.9 -j ACCEPT
						iptables -w 5 -t nat -D POSTROUTING -s 10.9.9.9 -j ACCEPT
						iptables -w 5 -D FORWARD -s 10.9.9.9 -j ACCEPT`); err != nil {
						t.Error(err)
						return
					}
				}
			})
			moved := s.in(v4())
			for i := range changes {
				moved.Prefixes = []netip.Prefix{[]netip.Prefix{own4, other4}[(i+1)%2]}
				mustSync(t, r, moved)
			}
			end()
			moved.Prefixes = []netip.Prefix{own4}
			mustSync(t, r, moved)
			if s.nftables {
				want := section(fixture(t, "nftables-v4"), "nft list ruleset")
				if got := section(rulesets(t, ns), "nft list ruleset"); !strings.Contains(got, want) {
					t.Errorf("the rules are\n%swant\n%s", got, want)
				}
			} else {
				wantSaved(t, ns, fixture(t, s.name+"-v4"))
			}
		})
	}
}

func TestBlackholeRoute(t *testing.T) {
	ns := netns.New(t)
	shell(t, ns, "ip link set lo up")
	routes := func() string {
		return strings.ReplaceAll(shell(t, ns, "ip route show; ip -6 route show type blackhole"), " \n", "\n")
	}
	want := func(when, text string) {
		t.Helper()
		if got := routes(); got != text {
			t.Errorf("%s the routes are\n%swant\n%s", when, got, text)
		}
	}
	r := open(t, ns)
	d := dual()
	d.Masquerade, d.Forward, d.Blackhole = false, false, true
	const both = "blackhole 10.244.1.0/24\nblackhole fd00:10:244:1::/64 dev lo metric 1024 pref medium\n"
	for range 2 {
		mustSync(t, r, d)
		want("added,", both)
	}
	d.Prefixes = []netip.Prefix{other4}
	mustSync(t, r, d)
	want("for another prefix,", "blackhole 10.244.7.0/24\n")
	shell(t, ns, "ip route del blackhole 10.244.7.0/24")
	mustSync(t, r, d)
	want("repaired,", "blackhole 10.244.7.0/24\n")
	d.Blackhole = false
	mustSync(t, r, d)
	want("switched off,", "")

	// A bridge's route keeps it out.
	shell(t, ns, "ip link add cni0 type bridge; ip link set cni0 up; ip addr add 10.244.7.1/24 dev cni0")
	d.Blackhole = true
	mustSync(t, r, d)
	if got := routes(); strings.Contains(got, "blackhole") {
		t.Errorf("beside a bridge the routes are\n%s", got)
	}
	shell(t, ns, "ip link del cni0; ip route add blackhole 10.244.9.0/24")
	mustSync(t, r, d)
	removed, err := open(t, ns).Remove(t.Context(), other4, own6) // another process
	if !removed || err != nil {
		t.Errorf("removed: %v, %v", removed, err)
	}
	want("removed,", "blackhole 10.244.9.0/24\n") // it is not ours
}

func BenchmarkSync(b *testing.B) {
	for _, s := range situations {
		for _, c := range []struct {
			name   string
			before string // another program's change before each Sync
		}{{"Unchanged", ""}, {"OthersChanged", "nft add table ip mine; nft delete table ip mine"}} {
			b.Run(s.name+"/"+c.name, func(b *testing.B) {
				s.host(b)
				ns := netns.New(b)
				r := open(b, ns)
				mustSync(b, r, s.in(dual()))
				mustSync(b, r, s.in(dual()))
				b.ReportAllocs()
				for b.Loop() {
					if c.before != "" {
						b.StopTimer()
						shell(b, ns, c.before)
						b.StartTimer()
					}
					mustSync(b, r, s.in(dual()))
				}
			})
		}
	}
}
