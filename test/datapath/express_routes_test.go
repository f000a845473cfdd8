//go:build linux

package datapath_test

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// Packets that have to take another way than the overlay's, or to pass somebody
// before they get there.
func TestExpressBypassesNobody(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"a pod routes for another", firewallPod},
		{"route by source", func(t lab.Test, w world) {
			routedOtherwise(t, w, fmt.Sprintf("ip rule add from %s lookup 100", w.pod(1, 1).ip), "ip rule delete lookup 100")
		}},
		{"route by mark", func(t lab.Test, w world) {
			mustRule(t, w.Node(1), fmt.Sprintf("add table ip scenario; add chain ip scenario c { type filter hook prerouting priority mangle; }; "+
				"add rule ip scenario c ip saddr %s meta mark set 0x77", w.pod(1, 1).ip))
			routedOtherwise(t, w, "ip rule add fwmark 0x77 lookup 100", "ip rule delete lookup 100")
		}},
		{"a tunnel between pods", tunnelOfPods},
	})
}

// A node with weft and a stock one, whose VXLAN device computes no checksums: it
// leaves those of inner packets to its uplink.
func TestExpressWithAStockPeer(t *testing.T) {
	playExpress(t, lab.Options{Kinds: []lab.Kind{lab.Weft, lab.Kernel}}, []expressScenario{
		{"as it comes", stockPeer},
		{"checksums are not computed by its overlay device", func(t lab.Test, w world) {
			t.Run(w.Node(2), "ethtool -K flannel.1 tx off")
			stockPeer(t, w)
		}},
	})
}

// stockPeer has both nodes' pods be client and server.
func stockPeer(t lab.Test, w world) {
	for _, n := range []struct{ client, server int }{{1, 2}, {2, 1}} {
		client, server := w.pod(n.client, 1), w.pod(n.server, 1)
		l, port := mustListenTCP(t, server)
		service := serviceAddress()
		if err := client.node.AddService(t.Context(), "tcp", service, at(server, port)); err != nil {
			t.Fatal(err)
		}
		for _, to := range []netip.AddrPort{service, at(server, port)} {
			mustSee(t, w, everyEnd, client, l, to, client.ip)
			if got := transferTCP(client, l, to, 4<<20); got != "intact" {
				t.Errorf("%s to %s: bulk: %s", client, to, got)
			}
		}
		udp := serviceAddress()
		if err := client.node.AddService(t.Context(), "udp", udp, at(server, mustEchoUDP(t, server))); err != nil {
			t.Fatal(err)
		}
		c := mustConnectUDP(t, w, client, udp)
		w.mustTake(t, everyEnd, func() { c.mustAsk(t, 100) })
	}
}

// What p1 of n1 sends goes through p2, which is a firewall, and so does what it
// gets from the second half on. The firewall has to see every packet.
func firewallPod(t lab.Test, w world) {
	client, firewall, server := w.pod(1, 1), w.pod(1, 2), w.pod(2, 1)
	for _, setting := range []string{"ip_forward=1", "conf.all.send_redirects=0", "conf.eth0.send_redirects=0"} {
		t.Run(firewall, "sysctl -qw net.ipv4."+setting)
	}
	mustNft(t, firewall, "add table ip scenario; add chain ip scenario c { type filter hook forward priority 0; }; add rule ip scenario c counter")
	atEnd(t, firewall, "nft delete table ip scenario")
	t.Run(client, fmt.Sprintf("ip route replace default via %s", firewall.ip))
	atEnd(t, client, fmt.Sprintf("ip route replace default via %s", w.Node(1).Gateway))
	seen := func() int {
		out := t.Run(firewall, "nft list chain ip scenario c")
		_, rest, _ := strings.Cut(out, "counter packets ")
		n, err := strconv.Atoi(strings.Fields(rest)[0])
		if err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		return n
	}
	l, port := mustListenTCP(t, server)
	c := mustConnect(t, client, l, at(server, port))
	before := seen()
	w.mustTake(t, "n1 rx, n2 tx, n2 rx", func() { c.mustAsk(t, 200) })
	if now := seen() - before; now < 200 {
		t.Errorf("the firewall saw %d packets of 200 questions", now)
	}

	t.Run(w.Node(1), fmt.Sprintf("ip route add %s via %s dev cni0", client.ip, firewall.ip))
	atEnd(t, w.Node(1), fmt.Sprintf("ip route delete %s via %s dev cni0", client.ip, firewall.ip))
	time.Sleep(settled)
	before = seen()
	w.mustTake(t, "n2 tx, n2 rx", func() { c.mustAsk(t, 200) })
	if now := seen() - before; now < 400 {
		t.Errorf("the firewall saw %d packets of 200 questions and answers", now)
	}
	mustNft(t, firewall, "add rule ip scenario c drop")
	if err := c.askOnce(100 * time.Millisecond); err == nil {
		t.Error("the firewall drops all, and an answer came")
	}
}

// settled is when the agent has followed a change.
const settled = 250 * time.Millisecond

// A rule sends what p1 of n1 sends past the overlay, by the underlay as it is,
// while a connection is in use.
func routedOtherwise(t lab.Test, w world, do, undo string) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	n1, n2 := w.Node(1), w.Node(2)
	t.Run(n1, fmt.Sprintf("ip route add %s via %s dev eth0 table 100", n2.Prefix, n2.IP))
	atEnd(t, n1, "ip route flush table 100")
	l, port := mustListenTCP(t, server)
	s := mustConnect(t, client, l, at(server, port)).stream()
	defer s.cancel()
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	t.Run(n1, do)
	time.Sleep(settled)
	w.mustTake(t, "n1 rx, n2 tx", func() { time.Sleep(200 * time.Millisecond) })
	s.mustLive(t, time.Second)
	t.Run(n1, undo)
	w.mustComeToTake(t, everyEnd, func() { time.Sleep(100 * time.Millisecond) })
	if lost, err := s.stop(); lost > 0 || err != nil {
		t.Errorf("%d answers are missing: %v", lost, err)
	}
}

// Pods may have a network of their own over ours, on the same port. Its packets
// are encapsulated once already, and the kernel may refuse us to do it again.
func tunnelOfPods(t lab.Test, w world) {
	var tunnel [2]place
	for i, pods := range [][2]place{{w.pod(1, 1), w.pod(2, 1)}, {w.pod(2, 1), w.pod(1, 1)}} {
		own, other := pods[0], pods[1]
		tunnel[i] = place{own.Space, own.node, netip.AddrFrom4([4]byte{172, 20, 0, byte(i + 1)})}
		t.Run(own, fmt.Sprintf("ip link add tunnel mtu 1400 type vxlan id 77 dstport 8472 remote %s", other.ip))
		atEnd(t, own, "ip link delete tunnel")
		t.Run(own, fmt.Sprintf("ip address add %s/24 dev tunnel", tunnel[i].ip))
		t.Run(own, "ip link set tunnel up")
	}
	// Both directions of a tunnel are flows of their own that nobody answers. The
	// kernel lets a program encapsulate a packet once, so they leave by its own
	// device; they are delivered by express.
	l, port := mustListenTCP(t, tunnel[1])
	w.mustTake(t, "n1 rx, n2 rx", func() {
		c := mustConnect(t, tunnel[0], l, at(tunnel[1], port))
		if err := c.askFor(2*time.Second, 5*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		udp := &talk{Conn: mustDialUDP(t, tunnel[0], at(tunnel[1], mustEchoUDP(t, tunnel[1])))}
		udp.mustAsk(t, 50)
	})
	// Bulk makes aggregates of UDP, which keep their flow off express for a while.
	if got := transferTCP(tunnel[0], l, at(tunnel[1], port), 4<<20); got != "intact" {
		t.Errorf("bulk: %s", got)
	}
}
