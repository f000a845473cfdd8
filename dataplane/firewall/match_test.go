//go:build linux

package firewall

import (
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weft-net/weft/test/netns"
)

// host is a node without an overlay, on which something else listens at the
// VXLAN port, and two neighbours that it can't tell apart but by their devices
// and addresses:
//
//	pod   10.244.1.2 ---- veth1  node  eth0 192.0.2.11 ---- 192.0.2.12  peer
type host struct {
	*netns.NS
	pod, peer *netns.NS
	fw        *Firewall
	server    *server
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{NS: netns.New(t), pod: netns.New(t), peer: netns.New(t)}
	h.Run(t, "ip link set lo up", "sysctl -q -w net.ipv4.conf.all.rp_filter=0", "sysctl -q -w net.ipv4.conf.default.rp_filter=0")
	netns.Connect(t, h.NS, "eth0", h.peer, "eth0")
	h.Run(t, "ip addr add 192.0.2.11/24 dev eth0", "ip route add 10.244.9.0/24 via 192.0.2.12")
	h.peer.Run(t, "ip link set lo up", "ip addr add 192.0.2.12/24 dev eth0", "ip addr add 10.244.1.77/32 dev lo")
	h.connectPod(t)
	h.fw = open(t, h)
	h.server = serve(t, h, ":8472", nil)
	return h
}

// connectPod makes the pod's veth, without a bridge.
func (h *host) connectPod(t *testing.T) {
	t.Helper()
	netns.Connect(t, h.NS, "veth1", h.pod, "eth0")
	h.Run(t, "ip route add 10.244.1.2 dev veth1", "ip addr add 10.244.1.1/32 dev veth1")
	h.pod.Run(t, "ip link set lo up", "ip addr add 10.244.1.2/32 dev eth0", "ip addr add 203.0.113.9/32 dev eth0",
		"ip route add 192.0.2.11 dev eth0", "ip neigh replace 192.0.2.11 lladdr "+h.mac(t, "veth1")+" dev eth0")
}

// mac is the address of a device of the node.
func (h *host) mac(t *testing.T, device string) (mac string) {
	t.Helper()
	h.MustDo(t, func() error {
		d, err := net.InterfaceByName(device)
		if err == nil {
			mac = d.HardwareAddr.String()
		}
		return err
	})
	return mac
}

// received sends from an address of a place and reports whether the node's
// server got it.
func (h *host) received(t *testing.T, from place, source, to string, wanted bool) bool {
	t.Helper()
	within := stays
	if wanted {
		within = arrives
	}
	text := newText()
	if err := from.Do(func() error {
		conn, err := net.DialUDP("udp4",
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(source), 0)),
			net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte(text))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return h.server.received(text, within)
}

func TestWhoIsAPod(t *testing.T) {
	h := newHost(t)
	prefix := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}
	for _, c := range []struct {
		name   string
		rules  Rules
		from   place
		source string
		passes bool
	}{
		{"ByDeviceAndSource", Rules{Prefixes: prefix, Devices: []string{"veth1"}}, h.pod, "10.244.1.2", false},
		{"ByDeviceWithAForgedSource", Rules{Prefixes: prefix, Devices: []string{"veth1"}}, h.pod, "203.0.113.9", false},
		{"BySourceBehindAnUnknownDevice", Rules{Prefixes: prefix, Devices: []string{"cni0"}}, h.pod, "10.244.1.2", false},
		{"BySourceThroughTheUplink", Rules{Prefixes: prefix, Devices: []string{"cni0"}}, h.peer, "10.244.1.77", false},
		{"NeitherByDeviceNorBySource", Rules{Prefixes: prefix, Devices: []string{"cni0"}}, h.pod, "203.0.113.9", true},
		{"AnotherPrefix", Rules{Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24")}}, h.pod, "10.244.1.2", true},
		{"DeviceWhoseNameBeginsAlike", Rules{Devices: []string{"veth", "veth10"}}, h.pod, "10.244.1.2", true},
		{"PeersVXLAN", Rules{Prefixes: prefix, Devices: []string{"veth1"}}, h.peer, "192.0.2.12", true},
		{"TheNodeItself", Rules{Prefixes: append(prefix, netip.MustParsePrefix("192.0.2.0/24")), Devices: []string{"lo"}}, h, "192.0.2.11", true},
		{"Nobody", Rules{}, h.pod, "10.244.1.2", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.rules.Port = 8472
			mustSync(t, h.fw, c.rules)
			before := dropped(t, h.fw)
			passed := h.received(t, c.from, c.source, "192.0.2.11:8472", c.passes)
			if passed != c.passes {
				t.Errorf("passed: %v, want %v", passed, c.passes)
			}
			if counted := dropped(t, h.fw) > before; counted == c.passes {
				t.Errorf("counted as dropped: %v", counted)
			}
		})
	}
}

func TestTheNodeItselfMaySendFromAPodPrefix(t *testing.T) {
	h := newHost(t)
	h.server = serve(t, h.peer, ":8472", nil)
	h.peer.Run(t, "sysctl -q -w net.ipv4.conf.all.rp_filter=0", "sysctl -q -w net.ipv4.conf.eth0.rp_filter=0", "ip route add default via 192.0.2.11")
	mustSync(t, h.fw, Rules{
		Port:     8472,
		Nodes:    []netip.Addr{netip.MustParseAddr("192.0.2.12")},
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
		Devices:  []string{"veth1"},
	})
	if !h.received(t, h, "10.244.1.1", "192.0.2.12:8472", true) {
		t.Error("a packet of the node itself was dropped")
	}
}

func TestAnotherPortIsNotOurs(t *testing.T) {
	h := newHost(t)
	mustSync(t, h.fw, Rules{Port: 4789, Devices: []string{"veth1"}})
	if !h.received(t, h.pod, "10.244.1.2", "192.0.2.11:8472", true) {
		t.Error("a packet to another port was dropped")
	}
}

func TestDeviceThatComesLater(t *testing.T) {
	h := newHost(t)
	h.Run(t, "ip link del veth1")
	r := Rules{Port: 8472, Devices: []string{"veth1"}}
	mustSync(t, h.fw, r)
	for range 2 { // it may go and come again
		h.connectPod(t)
		if h.received(t, h.pod, "203.0.113.9", "192.0.2.11:8472", false) {
			t.Error("a forged packet was delivered")
		}
		h.Run(t, "ip link del veth1")
	}
	if n := dropped(t, h.fw); n != 2 {
		t.Errorf("%d packets were counted as dropped, want 2", n)
	}
}

// A pod sends without pause while the table changes in every way. Nothing may
// slip through a moment without rules.
func TestNoMomentWithoutRules(t *testing.T) {
	h := newHost(t)
	r := Rules{Port: 8472, Devices: []string{"veth1"}, Nodes: crowd(100).Nodes}
	mustSync(t, h.fw, r)
	stop, done := make(chan struct{}), make(chan error, 1)
	var sent atomic.Int64
	go func() {
		done <- h.pod.Do(func() error {
			conn, err := net.Dial("udp4", "192.0.2.11:8472")
			if err != nil {
				return err
			}
			defer conn.Close()
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				if _, err := conn.Write([]byte("slipped through")); err != nil {
					return err
				}
				sent.Add(1)
			}
		})
	}()
	for i := range 15 {
		// Elements, then rules, then all that can't be changed in place.
		r.Devices = []string{"veth1", fmt.Sprintf("veth%d", 10+i)}
		r.Prefixes = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i)}), 16)}
		r.Nodes = crowd(100 + i%2).Nodes
		mustSync(t, h.fw, r)
		nft(t, h.NS, "insert rule inet weft input counter")
		mustSync(t, h.fw, r)
		nft(t, h.NS, "add set inet weft mine { type ipv4_addr; }\nadd chain inet weft mine { type filter hook output priority 3; }")
		mustSync(t, h.fw, r)
		want, err := r.table()
		if err != nil {
			t.Fatal(err)
		}
		if err := h.fw.with(func(s *socket) error { return s.rebuild(want) }); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if h.server.received("slipped through", 50*time.Millisecond) {
		t.Errorf("of %d packets %d slipped through", sent.Load(), len(h.server.got))
	}
	if sent.Load() < 1000 {
		t.Errorf("only %d packets were sent", sent.Load())
	}
	if _, err := h.fw.Remove(); err != nil {
		t.Fatal(err)
	}
	if !h.received(t, h.pod, "10.244.1.2", "192.0.2.11:8472", true) {
		t.Error("it was not the table that stopped them")
	}
}
