//go:build linux

package datapath_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

func TestSmallPacketsRideTheBasePath(t *testing.T) { // where express is off
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			t.Parallel()
			lt, l := newTrafficLab(t, lab.Options{Underlay: underlay})
			r := between(l.Pod(1, 1), l.Pod(2, 1))
			mustRideBase(lt, r)
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off", "express")
			}
			for name, f := range map[string]func(){
				"TCP requests":      func() { tcpRequests(lt, r) },
				"UDP requests":      func() { udpOf(100)(lt, r) },
				"UDP, full packets": func() { udpOf(1422)(lt, r) },
				"pings":             func() { pingSees(lt, r, "-c 50") },
			} {
				// Behind a packet that renews a proof the flow stays on the kernel path
				// for 20 ms, which may be all of it: once in a second.
				if err := eventually(10*time.Second, func() (err error) {
					before := [2]carried{mustCarried(t, l.Node(1), l.Node(2)), mustCarried(t, l.Node(2), l.Node(1))}
					f()
					for i, n := range l.Nodes {
						now := mustCarried(t, n, l.Node(2-i)).sub(before[i])
						if now.total().TxPackets < 20 || now.txShare() < 0.9 || now.rxShare() < 0.9 {
							err = errors.Join(err, fmt.Errorf("%s on %s: the base path's share is %.0f %% out, %.0f %% in: %+v", name, n, 100*now.txShare(), 100*now.rxShare(), now))
						}
					}
					return err
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestBulkRidesExpress(t *testing.T) { // and else the kernel path
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			t.Parallel()
			lt, l := newTrafficLab(t, lab.Options{Underlay: underlay})
			r := between(l.Pod(1, 1), l.Pod(2, 1))
			mustRideBase(lt, r)
			bulk := func() (out, in carried) {
				before := [2]carried{mustCarried(t, l.Node(1), l.Node(2)), mustCarried(t, l.Node(2), l.Node(1))}
				startIperf(lt, r, "-t 1").mustEnd()
				return mustCarried(t, l.Node(1), l.Node(2)).sub(before[0]), mustCarried(t, l.Node(2), l.Node(1)).sub(before[1])
			}
			out, in := bulk()
			if out.total().TxPackets < 10_000 || share(out.express.TxPackets, out.total().TxPackets) < 0.9 || share(in.express.RxPackets, in.total().RxPackets) < 0.9 {
				t.Errorf("express does not carry bulk: out %+v, in %+v", out, in)
			}
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off", "express")
			}
			out, in = bulk()
			if out.total().TxPackets < 10_000 || out.txShare() > 0.1 || in.rxShare() > 0.1 || out.express.TxPackets > 0 {
				t.Errorf("bulk is not left to the kernel: %.0f %% of what goes out and %.0f %% of what comes in ride the base path: %+v %+v", 100*out.txShare(), 100*in.rxShare(), out, in)
			}
		})
	}
}

// One connection has bulk and small packets in turn, which ride different
// paths. If one overtook another the receiver would queue it (TCPOFOQueue) and
// tell the sender, who notes it (TCPSACKReorder) or sends again what was not
// lost (TCPDSACKRecv).
//
// All that belongs to the connection happens on one CPU, so that only the paths can
// make the difference. Between CPUs the kernel keeps no order: what a connection sends
// on one, for an acknowledgement, and on the other, for a write, may overtake in the
// backlogs of the pod's veth.
func TestConnectionThatMixesBulkAndSmallPacketsKeepsItsOrder(t *testing.T) {
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			lt, l := newTrafficLab(t, lab.Options{Underlay: underlay})
			r := between(l.Pod(1, 1), l.Pod(2, 1))
			for _, n := range l.Nodes {
				mustQueueArrivals(lt, n, 1)
			}
			mustRideBase(lt, r)
			express, out := mixBulk(lt, r, l)
			if out.express.TxPackets < 5000 {
				t.Errorf("the connection did not take express: %+v", out)
			}
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off", "express")
			}
			base, out := mixBulk(lt, r, l)
			if out.base.TxPackets < 100 || out.kernel.TxPackets < 100 {
				t.Errorf("the connection did not mix the paths: %+v", out)
			}
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off")
			}
			kernel, _ := mixBulk(lt, r, l)
			t.Logf("out of order: %d packets with express, %d with the base path, %d with the kernel path alone", express, base, kernel)
			for mode, late := range map[string]int{"express": express, "base": base} {
				if late > 2*kernel+10 {
					t.Errorf("%d packets came out of order with %s; with the kernel path alone %d did", late, mode, kernel)
				}
			}
		})
	}
}

// mixBulk sends bulk and small packets from node 1 to node 2, counts those out of
// order, and tells what the connection rode.
func mixBulk(t lab.Test, r route, l *lab.Lab) (late int, out carried) {
	t.Helper()
	before := mustCarried(t, l.Node(1), l.Node(2))
	onCPU(t, 1, func() { late = disorder(t, r) })
	return late, mustCarried(t, l.Node(1), l.Node(2)).sub(before)
}

// mustQueueArrivals makes a node receive on one CPU, wherever they were sent, so that
// packets pile up there as they do behind a network card: one that is handled
// at once can't be overtaken.
func mustQueueArrivals(t lab.Test, n *lab.Node, cpu int) {
	t.Helper()
	t.Run(n, "unshare", "-m", "sh", "-c", fmt.Sprintf(
		"mount -t sysfs sysfs /sys && echo %x >/sys/class/net/eth0/queues/rx-0/rps_cpus", 1<<cpu))
}

// onCPU runs f on one CPU, in another goroutine; f may end the test.
func onCPU(t lab.Test, cpu int, f func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		defer close(done)
		runtime.LockOSThread() // and the thread ends with the goroutine
		var set unix.CPUSet
		set.Set(cpu)
		err := unix.SchedSetaffinity(0, &set)
		if err == nil {
			f()
		}
		done <- err
	}()
	err, finished := <-done
	if err != nil {
		t.Fatal(err)
	}
	if !finished {
		t.FailNow() // f has said why
	}
}

// disorder sends bulk and small packets in turn over one connection for a
// while and counts the packets that came out of order.
func disorder(t lab.Test, r route) int {
	t.Helper()
	names := []string{"TCPOFOQueue", "TCPSACKReorder", "TCPDSACKRecv", "TCPDSACKOfoRecv", "TCPTSReorder"}
	count := func() (sum int) {
		for _, p := range []place{r.from, r.to} {
			for _, n := range mustTCPCounters(t, p, names...) {
				sum += n
			}
		}
		return sum
	}
	before := count()
	listener, port := mustListenTCP(t, r.to)
	got := make(chan int)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			got <- 0
			return
		}
		defer conn.Close()
		sum, buffer := 0, make([]byte, 1<<20)
		for {
			n, err := conn.Read(buffer)
			sum += n
			if err != nil {
				got <- sum
				return
			}
		}
	}()
	conn, err := r.from.Dial("tcp4", netip.AddrPortFrom(r.to.ip, port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sent, bulk, small := 0, make([]byte, 128<<10), make([]byte, 100)
	write := func(b []byte) {
		n, err := conn.Write(b)
		sent += n
		if err != nil {
			t.Error(err)
		}
	}
	for range 40 {
		write(bulk)
		for range 20 {
			write(small)
		}
		time.Sleep(25 * time.Millisecond) // the memory of an aggregate fades
		for range 10 {
			write(small)
			time.Sleep(200 * time.Microsecond)
		}
		write(bulk) // an aggregate right behind small packets
	}
	conn.Close()
	if n := <-got; n != sent {
		t.Errorf("%d bytes of %d came", n, sent)
	}
	return count() - before
}

// One UDP flow has packets of all sizes, and aggregates that the sender made
// (UDP_SEGMENT). Who plays video notices what overtakes.
func TestUDPFlowOfMixedSizesKeepsItsOrder(t *testing.T) {
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			lt, l := newTrafficLab(t, lab.Options{Underlay: underlay})
			r := between(l.Pod(1, 1), l.Pod(2, 1))
			mustQueueArrivals(lt, l.Node(2), 1)
			mustRideBase(lt, r)
			before := mustCarried(t, l.Node(1), l.Node(2))
			accelerated := disorderUDP(lt, r)
			now := mustCarried(t, l.Node(1), l.Node(2)).sub(before)
			if now.base.TxPackets+now.express.TxPackets < 100 || now.kernel.TxPackets < 100 {
				t.Errorf("the flow did not mix the paths: %+v", now)
			}
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off")
			}
			kernel := disorderUDP(lt, r)
			t.Logf("out of order: %s with weft, %s with the kernel path alone", accelerated, kernel)
			if accelerated.late > kernel.late || accelerated.lost > kernel.lost {
				t.Errorf("%s; with the kernel path alone %s", accelerated, kernel)
			}
		})
	}
}

// While the base path is in use, single packets are sent through the kernel to
// see that the host still lets them pass. The ones behind must not overtake.
//
// Those before may be overtaken in one case: when the CPU was held up for so long
// that more of them wait in its backlog than it takes at a time (64, dev_weight).
// So it may take some tries on a busy machine; without the care that is taken,
// packets overtake at each renewal.
func TestBusyFlowKeepsItsOrderWhenTheHostsProofIsRenewed(t *testing.T) {
	const tries = 3
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			lt, l := newTrafficLab(t, lab.Options{Underlay: underlay})
			r := between(l.Pod(1, 1), l.Pod(2, 1))
			mustQueueArrivals(lt, l.Node(2), 1)
			mustRideBase(lt, r)
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off", "express")
			}
			var accelerated sequenceSeen
			for range tries {
				accelerated = mustRenewUnderBursts(lt, r, l.Node(2), l.Node(1))
				if accelerated.late == 0 {
					return
				}
			}
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off")
			}
			if kernel := burstsUDP(lt, r); accelerated.late > kernel.late {
				t.Errorf("%s, and so %d times; with the kernel path alone %s", accelerated, tries, kernel)
			}
		})
	}
}

// While the host's rulesets change, each change brings packets of the flow back to
// the host's stack, and the next ones from there to express. These may not overtake,
// but see TestBusyFlowKeepsItsOrderWhenTheHostsProofIsRenewed.
func TestBusyFlowKeepsItsOrderWhenItComesBackToExpress(t *testing.T) {
	const tries = 3
	for _, underlay := range underlays {
		t.Run(string(underlay), func(t *testing.T) {
			lt, l := newTrafficLab(t, lab.Options{Underlay: underlay})
			r := between(l.Pod(1, 1), l.Pod(2, 1))
			mustQueueArrivals(lt, l.Node(2), 1)
			mustRideBase(lt, r)
			var express sequenceSeen
			for range tries {
				express = mustComeBackUnderBursts(lt, r, l.Node(2), l.Node(1))
				if express.late == 0 {
					return
				}
			}
			for _, n := range l.Nodes {
				mustWeft(t, n, "accel", "off")
			}
			if kernel := burstsUDP(lt, r); express.late > kernel.late {
				t.Errorf("%s, and so %d times; with the kernel path alone %s", express, tries, kernel)
			}
		})
	}
}

// mustComeBackUnderBursts sends bursts to a node whose rulesets change, and asserts
// that they rode express between the changes.
func mustComeBackUnderBursts(t lab.Test, r route, to, from *lab.Node) sequenceSeen {
	t.Helper()
	receiver := mustListenUDP(t, r.to)
	conn := mustDialUDP(t, r.from, netip.AddrPortFrom(r.to.ip, uint16(receiver.LocalAddr().(*net.UDPAddr).Port)))
	mustAnswerUntilAssured(t, conn, receiver)
	stop, changes := make(chan struct{}), make(chan int)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				changes <- n
				return
			case <-time.After(150 * time.Millisecond):
				for _, change := range []string{"add", "delete"} {
					if _, err := to.Output(t.Context(), "nft", change, "table", "ip", "order"); err != nil {
						t.Error(err)
					}
				}
			}
		}
	}()
	before := mustCarried(t, to, from)
	waited, _ := mustReason(t, to, "flow_order")
	seen := sendBursts(t, conn, receiver)
	close(stop)
	n := <-changes
	now := mustCarried(t, to, from).sub(before)
	again, _ := mustReason(t, to, "flow_order")
	t.Logf("%s; %d changes, %d packets by express, %d of them in line, %d by the base path", seen, n, now.express.RxPackets, again-waited, now.base.RxPackets)
	if n < 10 || share(now.express.RxPackets, now.total().RxPackets) < 0.2 || again == waited || now.base.RxPackets+now.kernel.RxPackets < uint64(n) {
		t.Errorf("the flow did not go between express and the stack: %d changes, %+v, %d in line", n, now, again-waited)
	}
	return seen
}

// mustAnswerUntilAssured has a flow answered until conntrack calls it assured.
func mustAnswerUntilAssured(t lab.Test, conn, receiver *net.UDPConn) {
	t.Helper()
	buffer := make([]byte, 1)
	for end := time.Now().Add(assuredAfter); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err := conn.Write(buffer); err != nil {
			t.Fatal(err)
		}
		receiver.SetReadDeadline(time.Now().Add(answerTime))
		_, from, err := receiver.ReadFromUDPAddrPort(buffer)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := receiver.WriteToUDPAddrPort(buffer, from); err != nil {
			t.Fatal(err)
		}
	}
	receiver.SetReadDeadline(time.Time{})
}

// mustRenewUnderBursts sends bursts to a node and asserts that they rode the base
// path, and that the proof of its host was renewed meanwhile.
func mustRenewUnderBursts(t lab.Test, r route, to, from *lab.Node) sequenceSeen {
	t.Helper()
	before := mustCarried(t, to, from)
	renewals, _ := mustReason(t, to, "host_renewal")
	seen := burstsUDP(t, r)
	now := mustCarried(t, to, from).sub(before)
	again, _ := mustReason(t, to, "host_renewal")
	if now.rxShare() < 0.9 || again == renewals {
		t.Errorf("the flow does not ride the base path, or the proof was not renewed: %+v, %d renewals", now, again-renewals)
	}
	t.Logf("%s, %d renewals", seen, again-renewals)
	return seen
}

// burstsUDP sends bursts of small numbered packets for some seconds.
func burstsUDP(t lab.Test, r route) sequenceSeen {
	t.Helper()
	receiver := mustListenUDP(t, r.to)
	port := uint16(receiver.LocalAddr().(*net.UDPAddr).Port)
	return sendBursts(t, mustDialUDP(t, r.from, netip.AddrPortFrom(r.to.ip, port)), receiver)
}

// sendBursts is burstsUDP on sockets that it closes the receiver of.
func sendBursts(t lab.Test, conn, receiver *net.UDPConn) sequenceSeen {
	t.Helper()
	seen := make(chan sequenceSeen)
	go func() { seen <- receiveSequence(receiver) }()
	number := 0
	onCPU(t, 0, func() {
		packet := make([]byte, 100)
		for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			for range 40 {
				binary.BigEndian.PutUint32(packet, uint32(number))
				number++
				if _, err := conn.Write(packet); err != nil {
					t.Error(err)
				}
			}
		}
	})
	time.Sleep(100 * time.Millisecond)
	receiver.Close()
	s := <-seen
	s.lost = number - s.came
	return s
}

// sequenceSeen is what a receiver of numbered packets saw.
type sequenceSeen struct{ came, late, lost int }

func (s sequenceSeen) String() string {
	return fmt.Sprintf("%d late and %d lost of %d packets", s.late, s.lost, s.came+s.lost)
}

// disorderUDP sends numbered packets of mixed sizes.
func disorderUDP(t lab.Test, r route) sequenceSeen {
	t.Helper()
	receiver := mustListenUDP(t, r.to)
	port := uint16(receiver.LocalAddr().(*net.UDPAddr).Port)
	conn := mustDialUDP(t, r.from, netip.AddrPortFrom(r.to.ip, port))
	seen := make(chan sequenceSeen)
	go func() { seen <- receiveSequence(receiver) }()
	number := 0
	segments := func(count, size int) {
		datagram := make([]byte, count*size)
		for i := range count {
			binary.BigEndian.PutUint32(datagram[i*size:], uint32(number))
			number++
		}
		var control []byte
		if count > 1 {
			control = segmentSize(uint16(size))
		}
		if _, _, err := conn.WriteMsgUDP(datagram, control, nil); err != nil {
			t.Error(err)
		}
	}
	onCPU(t, 0, func() {
		for range 40 {
			for _, size := range []int{40, 1400, 60, 1000, 100} {
				segments(1, size)
			}
			segments(20, 1000)
			segments(1, 64)
			segments(30, 200)
			segments(1, 1400)
			time.Sleep(25 * time.Millisecond) // the memory of an aggregate fades
			for range 5 {
				segments(1, 100)
			}
			segments(10, 500)
			segments(1, 50)
			time.Sleep(2 * time.Millisecond)
		}
	})
	time.Sleep(100 * time.Millisecond)
	receiver.Close()
	s := <-seen
	s.lost = number - s.came
	return s
}

// segmentSize is the control message that makes the kernel cut a datagram.
func segmentSize(size uint16) []byte {
	const udpSegment = 103 // UDP_SEGMENT of linux/udp.h
	control := make([]byte, unix.CmsgSpace(2))
	binary.NativeEndian.PutUint64(control, uint64(unix.CmsgLen(2)))
	binary.NativeEndian.PutUint32(control[8:], unix.SOL_UDP)
	binary.NativeEndian.PutUint32(control[12:], udpSegment)
	binary.NativeEndian.PutUint16(control[unix.CmsgLen(0):], size)
	return control
}

// receiveSequence counts numbered packets until the socket is closed.
func receiveSequence(receiver *net.UDPConn) sequenceSeen {
	var s sequenceSeen
	buffer, highest := make([]byte, 1<<16), -1
	for {
		n, _, err := receiver.ReadFrom(buffer)
		if err != nil {
			return s
		}
		if n < 4 {
			continue
		}
		s.came++
		number := int(binary.BigEndian.Uint32(buffer))
		if number < highest {
			s.late++
		}
		highest = max(highest, number)
	}
}
