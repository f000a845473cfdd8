//go:build linux

package datapath_test

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// Packets of one flow take express, the base path and the kernel's in turn, when
// they come alone and when they come in trains. They may not overtake each other
// more than on the kernel path alone.
func TestExpressKeepsOrder(t *testing.T) {
	for name, opts := range wires() {
		t.Run(name, func(t *testing.T) {
			opts.Pods = 1
			seen := map[bool]overtakings{}
			playEverywhere(t, opts, []expressScenario{{"mixed", func(t lab.Test, w world) {
				before := w.passed(t, 1, "witness_renewal") + w.passed(t, 2, "witness_renewal")
				d := mixedTraffic(t, w)
				t.Logf("%+v, renewals of witnesses: %d", d, w.passed(t, 1, "witness_renewal")+w.passed(t, 2, "witness_renewal")-before)
				seen[w.express] = d
			}}})
			express, kernel := seen[true], seen[false]
			// A busy machine has some of either.
			if express.reorder > 2*kernel.reorder+20 {
				t.Errorf("TCP took %d segments for overtaken, %d on the kernel path", express.reorder, kernel.reorder)
			}
			if express.outOfOrder > 2*kernel.outOfOrder+100 {
				t.Errorf("TCP got %d segments out of order, %d on the kernel path", express.outOfOrder, kernel.outOfOrder)
			}
			if express.udp > kernel.udp+20 {
				t.Errorf("%d datagrams were overtaken, %d on the kernel path", express.udp, kernel.udp)
			}
		})
	}
}

// overtakings is what receivers have noticed.
type overtakings struct {
	rounds     int
	reorder    int // TCPSACKReorder, TCPTSReorder: the sender concluded it
	outOfOrder int // TCPOFOQueue: a hole before a segment
	udp        int // datagrams that came after a later one
	udpLost    int
}

// mixedTraffic asks over a TCP connection with small questions and large ones in
// turn, while a UDP stream runs.
func mixedTraffic(t lab.Test, w world) (d overtakings) {
	const lasts, large = 2500 * time.Millisecond, 256 << 10
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	serve := func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		buffer := make([]byte, large)
		for {
			if _, err := io.ReadFull(conn, buffer[:4]); err != nil {
				return
			}
			n := int(binary.BigEndian.Uint32(buffer))
			if _, err := io.ReadFull(conn, buffer[:n]); err != nil {
				return
			}
			conn.Write(buffer[:n])
		}
	}
	go serve()
	names := []string{"TCPSACKReorder", "TCPTSReorder", "TCPOFOQueue"}
	count := func() (reorder, outOfOrder int) {
		for _, p := range []place{client, server} {
			c := mustTCPCounters(t, p, names...)
			reorder += c["TCPSACKReorder"] + c["TCPTSReorder"]
			outOfOrder += c["TCPOFOQueue"]
		}
		return reorder, outOfOrder
	}
	overtaken := numbered(t, w, client, server)
	reorder, outOfOrder := count()
	var conn net.Conn
	if err := client.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp4", at(server, port).String(), answerTime)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	buffer := make([]byte, large+4)
	ask := func(n int) {
		binary.BigEndian.PutUint32(buffer, uint32(n))
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		go conn.Write(append([]byte(nil), buffer[:n+4]...))
		if _, err := io.ReadFull(conn, make([]byte, n)); err != nil {
			t.Fatalf("after %d rounds: %v", d.rounds, err)
		}
	}
	w.mustSome(t, func() {
		for end := time.Now().Add(lasts); time.Now().Before(end); d.rounds++ {
			ask(large)
			for range 20 {
				ask(50)
			}
			ask(5000) // a train of four segments
			// Long enough for the flow to leave the kernel path again.
			time.Sleep(25 * time.Millisecond)
			for range 20 {
				ask(50)
			}
		}
	})
	nowReorder, nowOutOfOrder := count()
	d.reorder, d.outOfOrder = nowReorder-reorder, nowOutOfOrder-outOfOrder
	d.udp, d.udpLost = overtaken()
	return d
}

// mustSome fails the test unless express carries some packets at every end while
// f runs.
func (w world) mustSome(t lab.Test, f func()) {
	t.Helper()
	if !w.express {
		f()
		return
	}
	before := w.ledger(t)
	f()
	now := w.ledger(t).sub(before)
	for end, p := range now {
		if p.express < 100 {
			t.Errorf("%s: %s\n%s", end, p, w.reasons(t))
		}
	}
	t.Logf("carried were %s", now)
}

// numbered sends numbered datagrams until it is told to stop, and then tells how
// many came after a later one, and how many never.
func numbered(t lab.Test, w world, from, to place) func() (overtaken, lost int) {
	t.Helper()
	echo := mustEchoUDP(t, to)
	c := mustConnectUDP(t, w, from, at(to, echo))
	stop, sent, result := make(chan struct{}), make(chan int, 1), make(chan [2]int, 1)
	go func() {
		buffer := make([]byte, 64)
		for n := 1; ; n++ {
			binary.BigEndian.PutUint32(buffer[8:], uint32(n))
			c.Write(buffer)
			select {
			case <-stop:
				sent <- n
				return
			case <-time.After(100 * time.Microsecond):
			}
		}
	}()
	go func() {
		buffer := make([]byte, 64)
		var last uint32
		came, overtaken := 0, 0
		for {
			c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			if _, err := c.Read(buffer); err != nil {
				result <- [2]int{came, overtaken}
				return
			}
			n := binary.BigEndian.Uint32(buffer[8:])
			came++
			if n < last {
				overtaken++
			}
			last = max(last, n)
		}
	}()
	return func() (overtaken, lost int) {
		close(stop)
		n, r := <-sent, <-result
		return r[1], n - r[0]
	}
}
