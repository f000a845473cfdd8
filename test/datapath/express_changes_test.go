//go:build linux

package datapath_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/lab"
)

// What operators and kubelets do while flows take express.
func TestExpressComesAndGoes(t *testing.T) {
	playExpress(t, lab.Options{}, []expressScenario{
		{"express is switched", expressSwitched},
		{"agent and programs come and go", agentComesAndGoes},
	})
}

// What a pod had, another pod gets.
func TestExpressFollowsPods(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"a pod's address is taken by another pod", addressTaken},
		{"pods exchange their addresses", addressesExchanged},
	})
}

// underStreams runs f while flows of both nodes' pods are in use, and fails the
// test when an answer is missing or a connection has ended.
func underStreams(t lab.Test, w world, f func()) {
	t.Helper()
	streams := map[string]*stream{}
	for i, ends := range [][2]place{{w.pod(1, 1), w.pod(2, 1)}, {w.pod(2, 2), w.pod(1, 2)}} {
		client, server := ends[0], ends[1]
		l, port := mustListenTCP(t, server)
		service := serviceAddress()
		if err := client.node.AddService(t.Context(), "tcp", service, at(server, port)); err != nil {
			t.Fatal(err)
		}
		streams[fmt.Sprint("TCP ", i+1)] = mustConnect(t, client, l, service).stream()
		streams[fmt.Sprint("UDP ", i+1)] = mustConnectUDP(t, w, client, at(server, mustEchoUDP(t, server))).stream()
	}
	for _, s := range streams {
		defer s.cancel()
	}
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	f()
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	for name, s := range streams {
		lost, err := s.stop()
		if lost > 0 || err != nil {
			t.Errorf("%s: %d answers are missing of %d: %v", name, lost, s.asked/64, err)
		}
	}
}

func expressSwitched(t lab.Test, w world) {
	n1 := w.Node(1)
	underStreams(t, w, func() {
		for range 20 {
			for _, n := range w.Nodes {
				mustWeft(t, n, "accel", "off", "express")
				mustWeft(t, n, "accel", "on", "express")
			}
		}
		for _, off := range [][]string{{"off", "express"}, {"off", "express", "--peer", "n2"}, {"off"}, {"off", "--peer", "n2"}} {
			mustWeft(t, n1, append([]string{"accel"}, off...)...)
			w.mustTake(t, "n2 tx, n2 rx", func() { time.Sleep(50 * time.Millisecond) })
			off[0] = "on"
			mustWeft(t, n1, append([]string{"accel"}, off...)...)
			w.mustComeToTake(t, everyEnd, func() { time.Sleep(50 * time.Millisecond) })
		}
		// The base path may be off alone.
		mustWeft(t, n1, "accel", "off", "base")
		w.mustComeToTake(t, everyEnd, func() { time.Sleep(50 * time.Millisecond) })
		mustWeft(t, n1, "accel", "on", "base")
	})
}

// agentComesAndGoes does all of it in an order of chance, which is told.
func agentComesAndGoes(t lab.Test, w world) {
	n := w.Node(1)
	liberal := func() {
		t.Helper()
		for _, name := range []string{"be_liberal", "ignore_invalid_rst"} {
			if out := t.Run(n, "sysctl -n net.netfilter.nf_conntrack_tcp_"+name); strings.TrimSpace(out) != "1" {
				t.Errorf("%s is %s", name, out)
			}
		}
	}
	restart := func(sig syscall.Signal, flags ...string) func() {
		return func() {
			mustStop(t, n, sig)
			time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
			mustStart(t, n, weft, flags...)
		}
	}
	steps := []struct {
		name string
		do   func()
	}{
		{"restart", restart(syscall.SIGTERM)},
		{"kill", restart(syscall.SIGKILL)},
		{"restart without express", func() {
			restart(syscall.SIGTERM, "--express=off")()
			w.mustTake(t, "n2 tx, n2 rx", func() { time.Sleep(100 * time.Millisecond) })
			liberal()
			restart(syscall.SIGTERM)()
		}},
		{"restart with more peers", func() {
			restart(syscall.SIGTERM, "--max-peers=100")()
			restart(syscall.SIGTERM)()
		}},
		{"remove", func() {
			mustStop(t, n, syscall.SIGTERM)
			mustWeft(t, n, "remove")
			time.Sleep(200 * time.Millisecond)
			liberal()
			mustStart(t, n, weft)
		}},
		{"switch", func() {
			mustWeft(t, n, "accel", "off")
			mustWeft(t, n, "accel", "on")
		}},
	}
	rand.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
	underStreams(t, w, func() {
		for _, s := range steps {
			t.Log(s.name)
			s.do()
			if rand.IntN(2) == 0 {
				w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
			}
		}
	})
}

// anyAddress answers what comes to a port of a pod, whatever the address. While
// the socket is open, so is the pod's namespace.
func anyAddress(t lab.Test, p *lab.Pod, port int) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	if err := p.Do(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: port})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go countPackets(conn, &atomic.Int64{}, true)
	return conn
}

// haveAddress gives a pod one address in the place of another, and tells its
// neighbours.
func haveAddress(t lab.Test, p *lab.Pod, old, now netip.Addr) {
	t.Helper()
	t.Run(p, fmt.Sprintf("ip address delete %s/24 dev eth0", old))
	t.Run(p, fmt.Sprintf("ip address add %s/24 dev eth0", now))
	t.Run(p, fmt.Sprintf("ip route replace default via %s", p.Node.Gateway))
	announce(t, p, now)
}

// announce tells the neighbours of a pod's address, as CNI plugins do, by a
// gratuitous ARP.
func announce(t lab.Test, p *lab.Pod, ip netip.Addr) {
	t.Helper()
	broadcast := state.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	a := ip.As4()
	frame := append(append(broadcast[:], p.MAC[:]...), 0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1)
	frame = append(append(append(append(frame, p.MAC[:]...), a[:]...), broadcast[:]...), a[:]...)
	if err := sendFrames(p, frame); err != nil {
		t.Fatal(err)
	}
}

// sendFrames sends frames out of a pod's eth0.
func sendFrames(p *lab.Pod, frames ...[]byte) error {
	send, end, err := frameSender(p)
	if err != nil {
		return err
	}
	defer end()
	return send(frames...)
}

// frameSender prepares to send frames out of a pod's eth0, until end is called.
func frameSender(p *lab.Pod) (send func(frames ...[]byte) error, end func(), err error) {
	var eth0 *net.Interface
	var fd int
	err = p.Do(func() (err error) {
		if eth0, err = net.InterfaceByName("eth0"); err != nil {
			return err
		}
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	})
	send = func(frames ...[]byte) error {
		for _, f := range frames {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: eth0.Index}); err != nil {
				return err
			}
		}
		return nil
	}
	return send, func() { unix.Close(fd) }, err
}

// tapped gets every IPv4 packet that comes to a pod.
func tapped(t lab.Test, p *lab.Pod, f func(ip []byte)) {
	t.Helper()
	var fd int
	if err := p.Do(func() (err error) {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		const ipv4 = 0x0800
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		network := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, ipv4))
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: eth0.Index, Protocol: network})
	}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		<-stopped
		unix.Close(fd)
	})
	go func() {
		defer close(stopped)
		buffer := make([]byte, 1<<16)
		for {
			n, from, err := unix.Recvfrom(fd, buffer, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && n >= 20 && ll.Pkttype != unix.PACKET_OUTGOING {
				f(buffer[:n])
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
}

// strayed counts UDP packets to a port that come to a pod which has not their
// destination address.
func strayed(t lab.Test, p *lab.Pod, port uint16, has *atomic.Pointer[netip.Addr]) *atomic.Int64 {
	t.Helper()
	var count atomic.Int64
	tapped(t, p, func(ip []byte) {
		to := netip.AddrFrom4([4]byte(ip[16:20]))
		if ip[9] == unix.IPPROTO_UDP && len(ip) >= 24 && binary.BigEndian.Uint16(ip[22:]) == port && to != *has.Load() {
			count.Add(1)
		}
	})
	return &count
}

const takenPort = 7777

// p1 of n2 is deleted, p3 gets its address, and later p1 is there again, behind
// another veth.
func addressTaken(t lab.Test, w world) {
	client, old, heir := w.pod(1, 1), w.Pod(2, 1), w.Pod(2, 3)
	conn := anyAddress(t, old, takenPort)
	anyAddress(t, heir, takenPort)
	var addr atomic.Pointer[netip.Addr]
	addr.Store(&old.IP)
	stray := strayed(t, heir, takenPort, &addr)
	s := mustConnectUDP(t, w, client, netip.AddrPortFrom(old.IP, takenPort)).stream()
	defer s.cancel()
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })

	conn.Close()
	if err := old.Destroy(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	haveAddress(t, heir, heir.IP, old.IP)
	mustAnswerSoon(t, s, heir, old.IP)
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })

	addr.Store(&heir.IP)
	haveAddress(t, heir, old.IP, heir.IP)
	if err := old.Rebuild(t.Context()); err != nil {
		t.Fatal(err)
	}
	anyAddress(t, old, takenPort)
	mustAnswerSoon(t, s, old, old.IP)
	strays := stray.Load()
	time.Sleep(settled)
	if late := stray.Load() - strays; late > 0 {
		t.Errorf("%d packets came to a pod that has not their address any more", late)
	}
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	if w.express {
		t.Eventually(5*time.Second, func() error { return expressReady(t, w.Lab) })
	}
}

// mustAnswerSoon fails the test unless answers come soon from the pod that has an
// address now. A bridge does not forward for a port that is new until the kernel
// gets around to it, so the pod says more than once that it is there.
func mustAnswerSoon(t lab.Test, s *stream, p *lab.Pod, ip netip.Addr) {
	t.Helper()
	began := time.Now()
	for deadline := began.Add(2 * time.Second); s.lastAnswer().Before(began); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s, which has %s now, does not answer", p, ip)
		}
		announce(t, p, ip)
	}
	t.Logf("%s, which has %s now, answers after %s", p, ip, s.lastAnswer().Sub(began).Round(time.Millisecond))
}

func addressesExchanged(t lab.Test, w world) {
	pods := []*lab.Pod{w.Pod(2, 1), w.Pod(2, 2)}
	addrs := make([]atomic.Pointer[netip.Addr], 2)
	strays := make([]*atomic.Int64, 2)
	streams := make([]*stream, 2)
	for i, p := range pods {
		anyAddress(t, p, takenPort)
		addrs[i].Store(&p.IP)
		strays[i] = strayed(t, p, takenPort, &addrs[i])
		streams[i] = mustConnectUDP(t, w, w.pod(1, 1+i), netip.AddrPortFrom(p.IP, takenPort)).stream()
		defer streams[i].cancel()
	}
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	for range 4 { // there and back again
		was := []*netip.Addr{addrs[0].Load(), addrs[1].Load()}
		for i, p := range pods {
			addrs[i].Store(was[1-i])
			haveAddress(t, p, *was[i], *was[1-i])
		}
		// How soon that must be is for the tests of the endpoints to say: here many
		// namespaces come and go, and the kernel makes all wait for those.
		t.Eventually(time.Second, func() error {
			before := strays[0].Load() + strays[1].Load()
			time.Sleep(100 * time.Millisecond)
			if stray := strays[0].Load() + strays[1].Load() - before; stray > 0 {
				return fmt.Errorf("%d packets came to a pod that has not their address any more", stray)
			}
			return nil
		})
		for _, s := range streams {
			s.mustLive(t, time.Second)
		}
		w.mustComeToTake(t, everyEnd, func() { time.Sleep(50 * time.Millisecond) })
	}
}
