//go:build linux

package datapath_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/weft-net/weft/test/lab"
)

// Any pod can send UDP, without any capability, and UDP to a node's VXLAN port
// is a frame into another node's pods, from whomever it says. That this is so on
// the kernel path shows that the test would notice.
func TestPodInjectsIntoTheOverlay(t *testing.T) {
	opts := lab.Options{Pods: 2}
	t.Run("express", func(t *testing.T) {
		w := newWorld(t, opts)
		t.Run("express is on", func(t *testing.T) { inject(lab.T(t), w, false) })
		t.Run("express is off", func(t *testing.T) {
			lt := lab.T(t)
			for _, n := range w.Nodes {
				mustStop(lt, n, syscall.SIGTERM)
				mustStart(lt, n, weft, "--express=off")
				lt.Eventually(5*time.Second, func() error {
					if e := mustStatus(lt, n).Express; e.On || e.Pods != len(n.Pods) {
						return fmt.Errorf("%+v", e)
					}
					return nil
				})
			}
			inject(lt, w, false)
		})
	})
	t.Run("kernel", func(t *testing.T) {
		opts.Kinds = []lab.Kind{lab.Kernel}
		inject(lab.T(t), newWorld(t, opts), true)
	})
}

// podInjection is where a pod of n1 sends to.
type podInjection struct {
	name   string
	to     netip.AddrPort
	victim int // the node whose pod is to get the frame
	size   int
	direct bool // the program on the pod's veth sees what it is
}

func podInjections(w world) []podInjection {
	n1, n2 := w.Node(1), w.Node(2)
	port := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 8472) }
	return []podInjection{
		{"own node's public IP", port(n1.IP), 1, 20, true},
		{"own node's bridge", port(n1.Gateway), 1, 20, true},
		{"own node's overlay device", port(n1.VTEP), 1, 20, true},
		{"peer's public IP", port(n2.IP), 2, 20, true},
		{"peer's bridge", port(n2.Gateway), 2, 20, true},
		{"peer's overlay device", port(n2.VTEP), 2, 20, true},
		{"own node, in fragments", port(n1.IP), 1, 2000, true},
		{"peer, in fragments", port(n2.IP), 2, 2000, true},
		{"service before the own node", netip.MustParseAddrPort("10.96.9.1:53"), 1, 20, false},
		{"service before the peer", netip.MustParseAddrPort("10.96.9.2:53"), 2, 20, false},
	}
}

// forgery is a VXLAN packet with a datagram in it that says it is from an address
// of nobody's.
func forgery(w world, node int, size int) []byte {
	victim := w.Pod(node, 2)
	mac := w.Node(node).MAC
	ip := &layers.IPv4{
		Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP,
		SrcIP: []byte{10, 244, 99, 99}, DstIP: victim.IP.AsSlice(),
	}
	udp := &layers.UDP{SrcPort: 4444, DstPort: 4444}
	_ = udp.SetNetworkLayerForChecksum(ip) // it is one
	return serialized(
		&layers.VXLAN{ValidIDFlag: true, VNI: 1},
		&layers.Ethernet{SrcMAC: []byte{2, 0, 0, 0, 0, 1}, DstMAC: mac[:], EthernetType: layers.EthernetTypeIPv4},
		ip, udp, gopacket.Payload(bytes.Repeat([]byte("forged"), (size+5)/6)))
}

func inject(t lab.Test, w world, succeeds bool) {
	t.Helper()
	attacker := w.pod(1, 1)
	var arrived [3]atomic.Int64
	for _, n := range w.Nodes {
		tapped(t, n.Pods[1], func(ip []byte) {
			if bytes.Contains(ip, []byte("forged")) {
				arrived[n.Index].Add(1)
			}
		})
	}
	mustRule(t, w.Node(1), natTable("prerouting", "dstnat",
		fmt.Sprintf("ip daddr 10.96.9.1 udp dport 53 dnat to %s:8472", w.Node(1).IP))+
		fmt.Sprintf("; add rule ip scenario prerouting ip daddr 10.96.9.2 udp dport 53 dnat to %s:8472", w.Node(2).IP))
	for _, i := range podInjections(w) {
		counter := func() (dropped uint64) {
			if !succeeds {
				_, dropped = mustReason(t, w.Node(1), "pod_vxlan_injection")
			}
			return dropped
		}
		before, came := counter(), arrived[i.victim].Load()
		conn := mustDialUDP(t, attacker, i.to)
		packet := forgery(w, i.victim, i.size)
		const packets = 5
		for range packets {
			conn.Write(packet)
		}
		time.Sleep(60 * time.Millisecond)
		came = arrived[i.victim].Load() - came
		switch dropped := counter() - before; {
		case succeeds && came == 0:
			t.Errorf("%s: the kernel delivers no forged packet, so this shows nothing", i.name)
		case !succeeds && came > 0:
			t.Errorf("%s: %d forged packets were delivered", i.name, came)
		case !succeeds && i.direct && dropped != packets:
			t.Errorf("%s: %d packets of %d were counted", i.name, dropped, packets)
		}
	}
	if succeeds {
		return
	}
	metrics, err := w.Node(1).Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(metrics, `weft_dropped_packets_total{reason="pod_vxlan_injection"} `)
	if count, _, _ := strings.Cut(rest, "\n"); !found || count == "0" {
		t.Errorf("the metrics tell of no injection: %q", count)
	}
}
