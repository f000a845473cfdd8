//go:build linux

package datapath_test

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// What pods see of the way that their packets took: the same, whichever it was.
func TestExpressLooksLikeTheKernel(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"headers", headersSeen},
		{"the host marks packets", hostMarks},
		{"the host limits packets", hostLimits},
		{"packets are too long", tooLong},
	})
}

// observed collects short descriptions of packets.
type observed struct {
	mu   sync.Mutex
	seen map[string]int
}

func (o *observed) note(what string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.seen == nil {
		o.seen = map[string]int{}
	}
	o.seen[what]++
}

// take returns what was seen since the last time, ordered, without how often.
func (o *observed) take() string {
	time.Sleep(30 * time.Millisecond) // the tap's
	o.mu.Lock()
	defer o.mu.Unlock()
	kinds := slices.Sorted(maps.Keys(o.seen))
	o.seen = nil
	return strings.Join(kinds, ", ")
}

// observeHeaders notes the TTL and the TOS of the packets of a protocol that come
// to a pod from another.
func observeHeaders(t lab.Test, p *lab.Pod, from netip.Addr, protocol byte) *observed {
	t.Helper()
	o := &observed{}
	tapped(t, p, func(ip []byte) {
		if ip[9] == protocol && netip.AddrFrom4([4]byte(ip[12:16])) == from {
			o.note(fmt.Sprintf("ttl %d tos 0x%02x", ip[8], ip[1]))
		}
	})
	return o
}

// observeErrors notes ICMP errors that come to a pod, with who sent them.
func observeErrors(t lab.Test, p *lab.Pod) *observed {
	t.Helper()
	o := &observed{}
	tapped(t, p, func(ip []byte) {
		header := int(ip[0]&0xf) * 4
		if ip[9] != unix.IPPROTO_ICMP || len(ip) < header+8 {
			return
		}
		what := fmt.Sprintf("type %d code %d", ip[header], ip[header+1])
		if ip[header] == 3 && ip[header+1] == 4 {
			what += fmt.Sprintf(" mtu %d", binary.BigEndian.Uint16(ip[header+6:]))
		}
		o.note(fmt.Sprintf("%s from %s", what, netip.AddrFrom4([4]byte(ip[12:16]))))
	})
	return o
}

func (o *observed) mustShow(t lab.Test, what, want string) {
	t.Helper()
	if got := o.take(); got != want {
		t.Errorf("%s: saw %q, want %q", what, got, want)
	}
}

func headersSeen(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	udp := mustConnectUDP(t, w, client, at(server, mustEchoUDP(t, server)))
	l, port := mustListenTCP(t, server)
	tcp := mustConnect(t, client, l, at(server, port))
	tcp.mustAsk(t, 10)
	errors := observeErrors(t, w.Pod(1, 1))
	for _, c := range []struct {
		name     string
		talk     *talk
		protocol byte
	}{{"TCP", tcp, unix.IPPROTO_TCP}, {"UDP", udp, unix.IPPROTO_UDP}} {
		atServer := observeHeaders(t, w.Pod(2, 1), client.ip, c.protocol)
		atClient := observeHeaders(t, w.Pod(1, 1), server.ip, c.protocol)
		w.mustTake(t, everyEnd, func() { c.talk.mustAsk(t, 100) })
		atServer.mustShow(t, c.name+" at the server", "ttl 62 tos 0x00")
		atClient.mustShow(t, c.name+" at the client", "ttl 62 tos 0x00")
	}

	conn := udp.Conn.(*net.UDPConn)
	atServer := observeHeaders(t, w.Pod(2, 1), client.ip, unix.IPPROTO_UDP)
	send := func(times int) {
		for range times {
			conn.Write(make([]byte, 64))
			time.Sleep(time.Millisecond)
		}
	}
	for _, tos := range []int{0x01, 0x02, 0x03, 0x20, 0xb8, 0xba, 0xff} {
		if err := setOption(conn, unix.IPPROTO_IP, unix.IP_TOS, tos); err != nil {
			t.Fatal(err)
		}
		w.mustTake(t, everyEnd, func() { send(30) })
		atServer.mustShow(t, "sent with another TOS", fmt.Sprintf("ttl 62 tos 0x%02x", tos))
	}
	if err := setOption(conn, unix.IPPROTO_IP, unix.IP_TOS, 0); err != nil {
		t.Fatal(err)
	}
	// Congestion in the underlay.
	markOuter(t, w.Lab, "ce")
	atEnd(t, w.Underlay, "nft delete table bridge marks")
	if err := setOption(conn, unix.IPPROTO_IP, unix.IP_TOS, 2); err != nil {
		t.Fatal(err)
	}
	// The answers, which can't say so, are dropped: nothing comes to the client.
	send(30)
	atServer.mustShow(t, "congestion", "ttl 62 tos 0x03")
	t.Run(w.Underlay, "nft flush chain bridge marks forward")
	if err := setOption(conn, unix.IPPROTO_IP, unix.IP_TOS, 0); err != nil {
		t.Fatal(err)
	}
	// Traceroute, on a flow that takes express.
	errors.take()
	for ttl, want := range map[int]struct{ server, client string }{
		1: {"", fmt.Sprintf("type 11 code 0 from %s", w.Node(1).Gateway)},
		2: {"", fmt.Sprintf("type 11 code 0 from %s", w.Node(2).VTEP)},
		3: {"ttl 1 tos 0x00", ""},
		4: {"ttl 2 tos 0x00", ""},
	} {
		if err := setOption(conn, unix.IPPROTO_IP, unix.IP_TTL, ttl); err != nil {
			t.Fatal(err)
		}
		send(5)
		atServer.mustShow(t, fmt.Sprintf("TTL %d, at the server", ttl), want.server)
		errors.mustShow(t, fmt.Sprintf("TTL %d, at the client", ttl), want.client)
	}
}

// Rules that change packets are obeyed: express does not carry them.
func hostMarks(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	c := mustConnect(t, client, l, at(server, port))
	atServer := observeHeaders(t, w.Pod(2, 1), client.ip, unix.IPPROTO_TCP)
	c.mustAsk(t, 50)
	atServer.take()
	for _, rule := range []struct {
		node            int
		rule, see, take string
	}{
		{1, "ip saddr %s ip dscp set cs1", "ttl 62 tos 0x20", "n1 rx, n2 tx, n2 rx"},
		{2, "ip saddr %s ip dscp set cs1", "ttl 62 tos 0x20", "n1 tx, n1 rx, n2 tx"},
		{1, "ip saddr %s ip ttl set 9", "ttl 8 tos 0x00", "n1 rx, n2 tx, n2 rx"},
		{2, "ip saddr %s ip ttl set 9", "ttl 9 tos 0x00", "n1 tx, n1 rx, n2 tx"},
	} {
		n := w.Node(rule.node)
		mustNft(t, n, forwardTable+"; add rule ip scenario forward "+fmt.Sprintf(rule.rule, client.ip))
		time.Sleep(settled)
		w.mustComeToTake(t, rule.take, func() { c.mustAsk(t, 100) })
		atServer.take()
		c.mustAsk(t, 100)
		atServer.mustShow(t, fmt.Sprintf("%s on %s", rule.rule, n), rule.see)
		mustNft(t, n, "delete table ip scenario")
		w.mustComeToTake(t, everyEnd, func() { c.mustAsk(t, 100) })
		atServer.take()
	}
}

// A rule that counts packets has to see them all. Until the agent has read it,
// some pass by.
func hostLimits(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	c := mustConnect(t, client, l, at(server, port))
	w.mustTake(t, everyEnd, func() { c.mustAsk(t, 100) })
	mustRule(t, w.Node(1), fmt.Sprintf(forwardTable+"; add rule ip scenario forward ip saddr %s tcp dport %d limit rate over 100/second burst 5 packets drop", client.ip, port))
	time.Sleep(1500 * time.Millisecond)
	before := w.ledger(t)
	began, asked := time.Now(), 0
	for ; time.Since(began) < time.Second; asked++ {
		c.mustAsk(t, 1)
	}
	if asked > 150 {
		t.Errorf("%d questions got through in a second, where the host allows 100; carried were %s", asked, w.ledger(t).sub(before))
	}
}

// tooLong has a pod whose device takes longer packets than the overlay.
func tooLong(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	udp := mustConnectUDP(t, w, client, at(server, mustEchoUDP(t, server)))
	wide := func(mtu int) {
		t.Run(w.Node(1), fmt.Sprintf("ip link set veth1 mtu %d", mtu))
		t.Run(w.Node(1), fmt.Sprintf("ip link set cni0 mtu %d", mtu))
		t.Run(client, fmt.Sprintf("ip link set eth0 mtu %d", mtu))
	}
	wide(1500)
	defer wide(1450)
	w.mustComeToTake(t, everyEnd, func() { udp.mustAsk(t, 50) })
	errors := observeErrors(t, w.Pod(1, 1))
	conn := udp.Conn.(*net.UDPConn)
	if err := setOption(conn, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		conn.Write(make([]byte, 1460))
	}
	errors.mustShow(t, "too long, not to be fragmented", fmt.Sprintf("type 3 code 4 mtu 1450 from %s", w.Node(1).Gateway))
	if err := setOption(conn, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT); err != nil {
		t.Fatal(err)
	}
	conn.Write(nil) // takes away the error
	for _, size := range []int{1422, 1423, 1460, 1472, 1473, 4000, 9000} {
		if got := askUDP(conn, 20, size); got != "20 of 20 intact" {
			t.Errorf("datagrams of %d bytes: %s", size, got)
		}
	}
	errors.mustShow(t, "fragmented", "")
	w.mustTake(t, everyEnd, func() { udp.mustAsk(t, 50) })
}
