//go:build linux

package datapath_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// Services as kube-proxy makes them, and other NAT: conntrack's translation is
// applied by the programs.
func TestExpressTranslatesAsTheKernelDoes(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"ClusterIP by iptables", clusterIPByIptables},
		{"ClusterIP by nftables", clusterIPByNft},
		{"destination is translated by the node that receives", translatedByReceiver},
		{"source and destination are translated", masqueradedService},
		{"ports are translated both ways", translatedPorts},
		{"UDP service", udpService},
		{"UDP service without checksums", udpServiceWithoutChecksums},
		{"checksums are computed by software", softwareChecksums},
		{"UDP service loses its endpoint", replacedEndpoint},
		{"FTP through a service", ftpService},
		{"affinity", affinity},
		{"hairpin", hairpin},
		{"NodePort from outside", nodePort},
		{"host to pod of a peer", hostToPod},
		{"pod to host of a peer", podToHost},
		{"pod to another pod of its node", podToNeighbour},
	})
}

// serviceAddress is a new address for a service.
func serviceAddress() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 1, byte(services.Add(1))}), 80)
}

// natTable is a table with an empty chain at a hook of NAT.
func natTable(hook, priority, rule string) string {
	return fmt.Sprintf("add table ip scenario; add chain ip scenario %s { type nat hook %s priority %s; }; add rule ip scenario %s %s",
		hook, hook, priority, hook, rule)
}

// dnat is a rule of nftables.
func dnat(service, backend netip.AddrPort, proto string) string {
	return fmt.Sprintf("ip daddr %s %s dport %d dnat to %s", service.Addr(), proto, service.Port(), backend)
}

// mustRule loads rules of a table "scenario" and takes it away at the end.
func mustRule(t lab.Test, n *lab.Node, rules string) {
	t.Helper()
	mustNft(t, n, rules)
	atEnd(t, n, "nft delete table ip scenario")
}

// mustSee asks over a new connection and checks whom the server sees.
func mustSee(t lab.Test, w world, take string, from place, listener *net.TCPListener, to netip.AddrPort, client netip.Addr) {
	t.Helper()
	w.mustTake(t, take, func() {
		c := mustConnect(t, from, listener, to)
		c.mustAsk(t, 200)
		if c.peer.Addr() != client {
			t.Errorf("the server sees %s as its client, not %s", c.peer, client)
		}
		if seen := c.RemoteAddr().String(); seen != to.String() {
			t.Errorf("the client sees %s as its server, not %s", seen, to)
		}
	})
}

func clusterIPByIptables(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	service := serviceAddress()
	if err := w.Node(1).AddService(t.Context(), "tcp", service, at(server, port)); err != nil {
		t.Fatal(err)
	}
	mustSee(t, w, everyEnd, client, l, service, client.ip)
	if got := transferTCP(client, l, service, 4<<20); got != "intact" {
		t.Errorf("bulk: %s", got)
	}
}

func clusterIPByNft(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	service := serviceAddress()
	mustRule(t, w.Node(1), natTable("prerouting", "dstnat", dnat(service, at(server, port), "tcp")))
	mustSee(t, w, everyEnd, client, l, service, client.ip)
}

// Conntrack's helper on n1 reads the answers of a control connection, and writes the
// service's address where the pod has said its own; the connection for the data, to
// which they lead, is translated as the control connection is. n2 knows of no helper.
func ftpService(t lab.Test, w world) {
	// Nothing loads the half that translates, where it is a module; else it is there.
	_ = exec.CommandContext(t.Context(), "modprobe", "--quiet", "nf_nat_ftp").Run()
	client, server := w.pod(1, 1), w.pod(2, 1)
	control, controlPort := mustListenTCP(t, server)
	data, dataPort := mustListenTCP(t, server)
	service := serviceAddress()
	mustRule(t, w.Node(1), natTable("prerouting", "dstnat", dnat(service, at(server, controlPort), "tcp"))+
		`; add ct helper ip scenario ftp { type "ftp" protocol tcp; }`+
		"; add chain ip scenario helpers { type filter hook prerouting priority mangle; }"+
		fmt.Sprintf(`; add rule ip scenario helpers ip daddr %s tcp dport %d ct helper set "ftp"`, service.Addr(), service.Port()))
	w.mustTake(t, "n2 tx, n2 rx", func() {
		c := mustConnect(t, client, control, service)
		c.mustAsk(t, 200)
		mustHear(t, c, "220 ready\r\n", "220 ready\r\n") // the helper looks at whole lines
		said, want := passiveMode(at(server, dataPort)), passiveMode(netip.AddrPortFrom(service.Addr(), dataPort))
		for range 3 { // they have not the same length: numbers of bytes are translated too
			mustHear(t, c, said, want)
		}
		c.mustAsk(t, 200)
	})
	transfer := mustConnect(t, client, data, netip.AddrPortFrom(service.Addr(), dataPort))
	transfer.mustAsk(t, 200)
	if transfer.peer.Addr() != client.ip {
		t.Errorf("the server sees %s as its client, not %s", transfer.peer, client.ip)
	}
}

// passiveMode is how a server of FTP tells where it waits (RFC 959, 4.1.2).
func passiveMode(a netip.AddrPort) string {
	ip := strings.ReplaceAll(a.Addr().String(), ".", ",")
	return fmt.Sprintf("227 Entering Passive Mode (%s,%d,%d).\r\n", ip, a.Port()>>8, a.Port()&0xff)
}

// mustHear tells a server something that it repeats, and checks what comes back.
func mustHear(t lab.Test, c *talk, said, want string) {
	t.Helper()
	if _, err := io.WriteString(c.Conn, said); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(answerTime))
	answer := make([]byte, len(want))
	if _, err := io.ReadFull(c.Conn, answer); err != nil || string(answer) != want {
		t.Fatalf("to %q the client hears %q, %v, not %q", said, answer, err, want)
	}
}

// The address is n2's, and no pod has it.
func translatedByReceiver(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	virtual := netip.MustParseAddrPort("10.244.2.200:80")
	mustRule(t, w.Node(2), natTable("prerouting", "dstnat", dnat(virtual, at(server, port), "tcp")))
	mustSee(t, w, everyEnd, client, l, virtual, client.ip)
}

// What kube-proxy does with KUBE-MARK-MASQ: the server sees flannel.1's address.
func masqueradedService(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	service := serviceAddress()
	mustRule(t, w.Node(1), natTable("prerouting", "dstnat", dnat(service, at(server, port), "tcp"))+";"+
		natTable("postrouting", "srcnat", fmt.Sprintf("ip daddr %s tcp dport %d masquerade random", server.ip, port)))
	mustSee(t, w, everyEnd, client, l, service, w.Node(1).VTEP)
}

// Either node changes the ports of its own pod.
func translatedPorts(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	mustRule(t, w.Node(1), natTable("postrouting", "srcnat",
		fmt.Sprintf("ip saddr %s ip daddr %s tcp dport 81 snat to %s:20000-30000", client.ip, server.ip, client.ip)))
	mustRule(t, w.Node(2), natTable("prerouting", "dstnat",
		fmt.Sprintf("ip daddr %s tcp dport 81 dnat to :%d", server.ip, port)))
	w.mustTake(t, everyEnd, func() {
		c := mustConnect(t, client, l, at(server, 81))
		c.mustAsk(t, 200)
		if p := c.peer.Port(); p < 20000 || p > 30000 {
			t.Errorf("the server sees port %d", p)
		}
	})
}

func udpService(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	service := serviceAddress()
	if err := w.Node(1).AddService(t.Context(), "udp", service, at(server, mustEchoUDP(t, server))); err != nil {
		t.Fatal(err)
	}
	c := mustConnectUDP(t, w, client, service)
	w.mustTake(t, everyEnd, func() { c.mustAsk(t, 200) })
}

// Without a checksum only the kernel can tell how a packet is to be translated.
func udpServiceWithoutChecksums(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	service := serviceAddress()
	if err := w.Node(1).AddService(t.Context(), "udp", service, at(server, mustEchoUDP(t, server))); err != nil {
		t.Fatal(err)
	}
	c := mustConnectUDP(t, w, client, service, option(unix.SOL_SOCKET, unix.SO_NO_CHECK, 1))
	w.mustTake(t, "n1 rx, n2 tx, n2 rx", func() { c.mustAsk(t, 200) })
}

// Over a veth pair nobody computes checksums unless it is told to: wrong ones would
// not show.
func softwareChecksums(t lab.Test, w world) {
	for _, n := range w.Nodes {
		t.Run(n, "ethtool -K eth0 tx off")
		atEnd(t, n, "ethtool -K eth0 tx on")
	}
	clusterIPByIptables(t, w)
	udpService(t, w)
	masqueradedService(t, w)
}

// conntrackAsked is how long express may go by what conntrack said last, a tick of
// the kernel's coarse clock (10 ms at most), and what a machine that is busy takes
// to deliver a packet.
const conntrackAsked = 20 * time.Millisecond

// kube-proxy changes the rules, and then deletes conntrack's entries to the
// endpoint that is gone: from then on no packet may go there.
func replacedEndpoint(t lab.Test, w world) {
	client, old, fresh := w.pod(1, 1), w.pod(2, 1), w.pod(2, 2)
	n := w.Node(1)
	service := serviceAddress()
	conn := mustListenUDP(t, old)
	port := uint16(conn.LocalAddr().(*net.UDPAddr).Port)
	oldSeen := echoAndStamp(conn)
	freshConn := mustListenUDP(t, fresh)
	freshPort := uint16(freshConn.LocalAddr().(*net.UDPAddr).Port)
	freshSeen := echoAndStamp(freshConn)
	mustRule(t, n, natTable("prerouting", "dstnat", dnat(service, at(old, port), "udp")))
	c := mustConnectUDP(t, w, client, service)
	w.mustTake(t, everyEnd, func() { c.mustAsk(t, 100) })

	mustNft(t, n, "flush chain ip scenario prerouting; add rule ip scenario prerouting "+dnat(service, at(fresh, freshPort), "udp"))
	c.mustAsk(t, 50) // conntrack still knows the old one
	if first, _ := freshSeen(); !first.IsZero() {
		t.Error("the new endpoint is served while conntrack has the entry of the old one")
	}
	s := c.stream()
	time.Sleep(50 * time.Millisecond)
	began := time.Now()
	t.Run(n, fmt.Sprintf("conntrack -D -p udp --orig-src %s --orig-dst %s", client.ip, service.Addr()))
	done := time.Now()
	time.Sleep(300 * time.Millisecond)
	if _, err := s.stop(); err != nil {
		t.Error(err)
	}
	_, last := oldSeen()
	if last.After(done.Add(conntrackAsked)) {
		t.Errorf("the old endpoint got a packet %s after conntrack's entry was deleted", last.Sub(done))
	}
	if first, _ := freshSeen(); first.Before(began) || first.After(done.Add(100*time.Millisecond)) {
		t.Errorf("the new endpoint got its first packet %s after conntrack's entry was deleted", first.Sub(began))
	}
}

// echoAndStamp answers what comes to a socket, and tells when the first packet
// came and when the last.
func echoAndStamp(conn *net.UDPConn) (seen func() (first, last time.Time)) {
	stamps := make(chan [2]time.Time, 1)
	stamps <- [2]time.Time{}
	go func() {
		buffer := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			s := <-stamps
			if s[1] = time.Now(); s[0].IsZero() {
				s[0] = s[1]
			}
			stamps <- s
			conn.WriteTo(buffer[:n], from)
		}
	}()
	return func() (time.Time, time.Time) {
		s := <-stamps
		stamps <- s
		return s[0], s[1]
	}
}

// A client stays with its endpoint, by a set that rules add to (as kube-proxy
// has it in nftables mode).
func affinity(t lab.Test, w world) {
	client, one, two := w.pod(1, 1), w.pod(2, 1), w.pod(2, 2)
	service := serviceAddress()
	l, port := mustListenTCP(t, one)
	var other *net.TCPListener
	if err := two.Do(func() (err error) {
		other, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: two.ip.AsSlice(), Port: int(port)})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	mustRule(t, w.Node(1), fmt.Sprintf(`add table ip scenario
		add set ip scenario one { type ipv4_addr; flags dynamic, timeout; timeout 10s; }
		add set ip scenario two { type ipv4_addr; flags dynamic, timeout; timeout 10s; }
		add chain ip scenario to-one
		add rule ip scenario to-one meta l4proto tcp update @one { ip saddr } dnat to %[2]s
		add chain ip scenario to-two
		add rule ip scenario to-two meta l4proto tcp update @two { ip saddr } dnat to %[3]s
		add chain ip scenario service
		add rule ip scenario service ip saddr @one goto to-one
		add rule ip scenario service ip saddr @two goto to-two
		add rule ip scenario service numgen random mod 2 vmap { 0 : goto to-one, 1 : goto to-two }
		add chain ip scenario prerouting { type nat hook prerouting priority dstnat; }
		add rule ip scenario prerouting ip daddr %[1]s tcp dport 80 goto service`,
		service.Addr(), at(one, port), at(two, port)))
	served := map[string]int{}
	for _, listener := range []*net.TCPListener{l, other} {
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(conn, "%-40s", listener.Addr())
				conn.Close()
			}
		}()
	}
	for range 8 {
		conn, err := client.Dial("tcp4", service.String())
		if err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 40)
		conn.SetDeadline(time.Now().Add(answerTime))
		if _, err := conn.Read(answer); err != nil {
			t.Error(err)
		}
		conn.Close()
		served[strings.TrimSpace(string(answer))]++
	}
	if len(served) != 1 {
		t.Errorf("the client was served by %v", served)
	}
}

// A pod asks its own service and is served by itself.
func hairpin(t lab.Test, w world) {
	pod := w.pod(1, 1)
	l, port := mustListenTCP(t, pod)
	service := serviceAddress()
	if err := w.Node(1).AddService(t.Context(), "tcp", service, at(pod, port)); err != nil {
		t.Fatal(err)
	}
	mustSee(t, w, "", pod, l, service, w.Node(1).Gateway)
}

// n1 forwards for a host outside: it does no express for it, n2 does.
func nodePort(t lab.Test, w world) {
	server := w.pod(2, 1)
	outside := place{w.Underlay, w.Node(1), lab.Gateway}
	l, port := mustListenTCP(t, server)
	mustRule(t, w.Node(1), natTable("prerouting", "dstnat", fmt.Sprintf("tcp dport 30080 fib daddr type local dnat to %s", at(server, port)))+";"+
		natTable("postrouting", "srcnat", fmt.Sprintf("ip daddr %s tcp dport %d masquerade", server.ip, port)))
	mustSee(t, w, "n2 tx, n2 rx", outside, l, netip.AddrPortFrom(w.Node(1).IP, 30080), w.Node(1).VTEP)
}

func hostToPod(t lab.Test, w world) {
	server := w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	mustSee(t, w, "n2 tx, n2 rx", hostPlace(w.Node(1)), l, at(server, port), w.Node(1).VTEP)
}

func podToHost(t lab.Test, w world) {
	host := place{&w.Node(2).Space, w.Node(2), w.Node(2).VTEP}
	client := w.pod(1, 1)
	l, port := mustListenTCP(t, host)
	mustSee(t, w, "n1 tx, n1 rx", client, l, at(host, port), client.ip)
}

func podToNeighbour(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(1, 2)
	l, port := mustListenTCP(t, server)
	mustSee(t, w, "", client, l, at(server, port), client.ip)
}
