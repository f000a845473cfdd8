//go:build linux

package datapath_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// UDP that nobody answers: logs, metrics, media. To the rules each of its packets
// is a new flow's.
func TestExpressCarriesMonologues(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"from the first moments on", monologue},
		{"to a service", monologueToService},
		{"without checksums", monologueWithoutChecksums},
		{"a rule against new flows", monologueForbidden},
		{"answered after a while", monologueAnswered},
		{"longer than conntrack waits", monologueOutlivesTimeout},
	})
}

// listener counts what comes in.
type listener struct {
	*net.UDPConn
	port uint16
	got  atomic.Int64
	from atomic.Pointer[netip.AddrPort] // who sent the last
}

func mustListenTo(t lab.Test, p place) *listener {
	t.Helper()
	l := &listener{UDPConn: mustListenUDP(t, p)}
	l.port = l.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	go func() {
		buffer := make([]byte, 1<<16)
		for {
			_, from, err := l.ReadFromUDPAddrPort(buffer)
			if err != nil {
				return
			}
			l.from.Store(&from)
			l.got.Add(1)
		}
	}()
	return l
}

// say sends datagrams, a little apart.
func say(t lab.Test, c net.Conn, count int) {
	t.Helper()
	for range count {
		if _, err := c.Write(make([]byte, 64)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// mustHear waits until so many datagrams have come, and no more.
func (l *listener) mustHear(t lab.Test, count int64) {
	t.Helper()
	t.Eventually(answerTime, func() error {
		if got := l.got.Load(); got != count {
			return fmt.Errorf("%d datagrams have come, %d were sent", got, count)
		}
		return nil
	})
}

// oneWay is the ends that count what goes from n1 to n2.
const oneWay = "n1 tx, n2 rx"

func monologue(t lab.Test, w world) {
	l := mustListenTo(t, w.pod(2, 1))
	c := mustDialUDP(t, w.pod(1, 1), at(w.pod(2, 1), l.port))
	w.mustTake(t, oneWay, func() { say(t, c, 500) })
	l.mustHear(t, 500)
}

func monologueToService(t lab.Test, w world) {
	l := mustListenTo(t, w.pod(2, 1))
	service := serviceAddress()
	if err := w.Node(1).AddService(t.Context(), "udp", service, at(w.pod(2, 1), l.port)); err != nil {
		t.Fatal(err)
	}
	c := mustDialUDP(t, w.pod(1, 1), service)
	w.mustTake(t, oneWay, func() { say(t, c, 500) })
	l.mustHear(t, 500)
	if from := l.from.Load(); from.Addr() != w.pod(1, 1).ip {
		t.Errorf("the server sees %s as its client", from)
	}
}

func monologueWithoutChecksums(t lab.Test, w world) {
	l := mustListenTo(t, w.pod(2, 1))
	c := mustDialUDP(t, w.pod(1, 1), at(w.pod(2, 1), l.port), option(unix.SOL_SOCKET, unix.SO_NO_CHECK, 1))
	w.mustTake(t, oneWay, func() { say(t, c, 500) })
	l.mustHear(t, 500)
}

// Packets of the flow are new ones to netfilter as long as nobody answers.
func monologueForbidden(t lab.Test, w world) {
	for _, node := range []int{1, 2} {
		l := mustListenTo(t, w.pod(2, 1))
		c := mustDialUDP(t, w.pod(1, 1), at(w.pod(2, 1), l.port))
		w.mustComeToTake(t, oneWay, func() { say(t, c, 200) })
		mustRule(t, w.Node(node), "add table ip scenario; add chain ip scenario forward { type filter hook forward priority 0; }; "+
			fmt.Sprintf("add rule ip scenario forward ct state new udp dport %d drop", l.port))
		time.Sleep(250 * time.Millisecond) // the epoch moves within 100 ms, and once more 100 ms later
		before := l.got.Load()
		say(t, c, 100)
		time.Sleep(50 * time.Millisecond)
		if got := l.got.Load() - before; got != 0 {
			t.Errorf("%d of 100 datagrams came through a rule of n%d that drops new flows", got, node)
		}
		t.Run(w.Node(node), "nft delete table ip scenario")
		mustNft(t, w.Node(node), "add table ip scenario") // that mustRule takes away
	}
}

// With the first answer it is another flow to the rules, and conntrack wants to
// see two seconds of it.
func monologueAnswered(t lab.Test, w world) {
	l := mustListenTo(t, w.pod(2, 1))
	c := mustDialUDP(t, w.pod(1, 1), at(w.pod(2, 1), l.port))
	w.mustTake(t, oneWay, func() { say(t, c, 500) })
	if _, err := l.WriteToUDPAddrPort([]byte("enough"), *l.from.Load()); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(answerTime))
	if _, err := c.Read(make([]byte, 16)); err != nil {
		t.Fatalf("the answer did not come: %v", err)
	}
	say(t, c, 100)
	// A flow that is older than two seconds is assured by its next packet.
	time.Sleep(assuredAfter)
	say(t, c, 20)
	for _, n := range []*lab.Node{w.Node(1), w.Node(2)} {
		entry := trackedAs(t, n, fmt.Sprintf("--orig-port-dst %d", l.port))
		if !strings.Contains(entry, "[ASSURED]") {
			t.Errorf("%s tracks it as %q", n, entry)
		}
	}
	w.mustComeToTake(t, oneWay, func() { say(t, c, 200) })
}

// Busy for longer than an entry without answers lives: it stays the same entry,
// or a service would choose another backend.
func monologueOutlivesTimeout(t lab.Test, w world) {
	const timeout = 2 * time.Second
	for _, n := range []*lab.Node{w.Node(1), w.Node(2)} {
		t.Run(n, "sysctl -qw net.netfilter.nf_conntrack_udp_timeout=2")
		atEnd(t, n, "sysctl -qw net.netfilter.nf_conntrack_udp_timeout=30")
	}
	time.Sleep(time.Second) // the agent looks for changed settings
	l := mustListenTo(t, w.pod(2, 1))
	service := serviceAddress()
	if err := w.Node(1).AddService(t.Context(), "udp", service, at(w.pod(2, 1), l.port)); err != nil {
		t.Fatal(err)
	}
	c := mustDialUDP(t, w.pod(1, 1), service)
	say(t, c, 100)
	flow := fmt.Sprintf("--orig-port-src %d -o id", c.LocalAddr().(*net.UDPAddr).Port)
	before := entryID(trackedAs(t, w.Node(1), flow))
	w.mustTake(t, oneWay, func() {
		for end := time.Now().Add(timeout * 3 / 2); time.Now().Before(end); {
			say(t, c, 50)
		}
	})
	if after := entryID(trackedAs(t, w.Node(1), flow)); before == "" || after != before {
		t.Errorf("conntrack's entry %q became %q", before, after)
	}
	time.Sleep(timeout + time.Second)
	if left := trackedAs(t, w.Node(1), flow); left != "" {
		t.Errorf("left %s after its last packet: %s", timeout+time.Second, left)
	}
}

// trackedAs is what a node's conntrack says of UDP flows.
func trackedAs(t lab.Test, n *lab.Node, flows string) string {
	t.Helper()
	return t.Run(n, "sh", "-c", "conntrack -L -p udp "+flows+" 2>/dev/null")
}

// entryID takes the number out of conntrack's line.
func entryID(line string) string {
	_, id, _ := strings.Cut(line, "id=")
	return strings.TrimSpace(id)
}
