//go:build linux && peers

package docker_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// prefix is where these clusters have their keys in etcd: not where all others do.
const prefix = "/docker/network"

// Containers of two Docker hosts reach each other over what runs on the hosts: weft
// on both, or weft on one and stock flanneld on the other.
func TestDockerHosts(t *testing.T) {
	for _, c := range []struct {
		name  string
		setup setup
	}{
		{"weft and weft", setup{kinds: [2]lab.Kind{lab.Weft, lab.Weft}, masquerade: true}},
		{"weft and flanneld", setup{kinds: [2]lab.Kind{lab.Weft, lab.Flanneld}, masquerade: true}},
		{"weft and weft, Docker masquerades", setup{kinds: [2]lab.Kind{lab.Weft, lab.Weft}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHosts(t, c.setup)
			t.Run("containers reach each other", func(t *testing.T) { h.reachEachOther(t) })
			t.Run("the way there is gateway, flannel.1, container", func(t *testing.T) { h.traceroute(t) })
			t.Run("established flows take express", func(t *testing.T) { h.express(t) })
			t.Run("the world sees the host", func(t *testing.T) { h.reachWorld(t) })
			t.Run("the world reaches a published port", func(t *testing.T) { h.published(t) })
			t.Run("hosts do not share a link", func(t *testing.T) { h.arping(t) })
			t.Run("rules stand as under flanneld", func(t *testing.T) { h.rules(t) })
		})
	}
}

// In nftables mode there is no chain in iptables' FORWARD, where Docker has all
// dropped that no rule accepts, and what another table accepts is dropped there
// all the same: under flanneld as under weft. The operator adds a rule.
func TestDockerHostsWithNFTables(t *testing.T) {
	h := newHosts(t, setup{kinds: [2]lab.Kind{lab.Weft, lab.Flanneld}, masquerade: true, nftables: true})
	for i, from := range h.containers {
		if out, err := from.Output(t.Context(), "ping", "-c", "2", "-i", "0.2", "-W", "1", h.containers[1-i].ip); err == nil {
			t.Fatalf("%s reaches %s: Docker does not drop any more, and the manual has a step too many:\n%s", from, h.containers[1-i], out)
		}
	}
	for _, n := range h.lab.Nodes {
		lab.T(t).Run(n, "iptables -I DOCKER-USER -i flannel.1 -o docker0 -j ACCEPT")
	}
	h.reachEachOther(t)
	h.express(t)
}

// setup is what two hosts are made of.
type setup struct {
	kinds [2]lab.Kind
	// masquerade has the daemons masquerade; else Docker does it, also what goes to
	// containers of other hosts.
	masquerade bool
	// nftables is flannel's EnableNFTables.
	nftables bool
}

// hosts are two nodes with a container each.
type hosts struct {
	setup
	lab        *lab.Lab
	engines    [2]*engine
	containers [2]*container
	daemons    [2]*lab.Process
}

// publishedPort is where a host serves what its container has at port 80.
const publishedPort = "8080"

// newHosts makes two hosts as their operator would: etcd, configuration, the
// daemons, and then Docker.
func newHosts(tb testing.TB, s setup) *hosts {
	tb.Helper()
	l := lab.T(tb).New(lab.Options{Store: lab.StoreEtcd, Pods: lab.NoPods, Binary: weft, Etcd: etcd})
	h := &hosts{setup: s, lab: l}
	must(tb, l.Etcd.Delete(tb.Context(), lab.FlannelPrefix))
	must(tb, l.Etcd.Put(tb.Context(), map[string]string{
		prefix + "/config": fmt.Sprintf(`{"Network":"10.244.0.0/16","EnableNFTables":%t,"Backend":{"Type":"vxlan"}}`, s.nftables),
	}))
	for i, n := range l.Nodes {
		must(tb, n.Run(tb.Context(), "ip link delete cni0"))
		must(tb, os.Remove(n.Path(lab.SubnetFile)))
		// Docker is the first to turn it on, and then has FORWARD drop what no
		// rule accepts.
		must(tb, n.Sysctl("net/ipv4/ip_forward", "0"))
		h.startDaemon(tb, i)
	}
	for i, n := range l.Nodes {
		h.engines[i] = startDocker(tb, n)
		h.containers[i] = h.engines[i].run(tb, fmt.Sprintf("c%d", i+1), []string{"--publish", publishedPort + ":80"}, "httpd", "-f", "-h", "/www")
	}
	return h
}

// startDaemon starts weft or flanneld on a node with the flags of flannel's manual
// for Docker, and waits for its subnet file.
func (h *hosts) startDaemon(tb testing.TB, i int) {
	tb.Helper()
	n := h.lab.Nodes[i]
	command := []string{weft, "agent"}
	if h.kinds[i] == lab.Flanneld {
		command = []string{flanneld}
	}
	command = append(command, "-etcd-endpoints", h.lab.Etcd.URL, "-iface", "eth0", "-etcd-prefix", prefix)
	if h.masquerade {
		command = append(command, "-ip-masq")
	}
	h.daemons[i] = lab.T(tb).Start(n, command...)
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("%s of %s:\n%s", h.kinds[i], n, h.daemons[i].Output())
		}
	})
	lab.T(tb).Eventually(20*time.Second, func() error {
		_, err := os.Stat(n.Path(lab.SubnetFile))
		if errors.Is(err, fs.ErrNotExist) && !h.daemons[i].Running() {
			tb.Fatalf("%s: %s has ended:\n%s", n, h.kinds[i], h.daemons[i].Output())
		}
		return err
	})
}

// reachEachOther pings from either container to the other, with small packets and
// with such as are cut into pieces.
func (h *hosts) reachEachOther(t *testing.T) {
	for i, from := range h.containers {
		to := h.containers[1-i]
		lab.T(t).Eventually(10*time.Second, func() error { // the daemon may hear of its peer only now
			_, err := from.Output(t.Context(), "ping", "-c", "1", "-W", "1", to.ip)
			return err
		})
		for _, size := range []string{"56", "4000"} {
			out := lab.T(t).Run(from, "ping", "-c", "3", "-i", "0.1", "-W", "2", "-s", size, to.ip)
			if !strings.Contains(out, " 0% packet loss") || strings.Count(out, " ttl=62 ") != 3 {
				t.Errorf("%s to %s: want three answers with ttl=62:\n%s", from, to, out)
			}
		}
	}
}

// traceroute wants three hops: the own bridge, the overlay device of the other
// host, its container.
func (h *hosts) traceroute(t *testing.T) {
	for i, from := range h.containers {
		to := h.containers[1-i]
		out := lab.T(t).Run(from, "traceroute", "-n", "-q", "1", "-w", "2", "-m", "5", to.ip)
		var hops []string
		for line := range strings.Lines(out) {
			if words := strings.Fields(line); len(words) > 1 && regexp.MustCompile(`^\d+$`).MatchString(words[0]) {
				hops = append(hops, words[1])
			}
		}
		want := []string{gateway(from.ip).String(), gateway(to.ip).Prev().String(), to.ip}
		if strings.Join(hops, " ") != strings.Join(want, " ") {
			t.Errorf("%s to %s: hops %v, want %v:\n%s", from, to, hops, want, out)
		}
	}
}

// gateway is the bridge's address for a container, whose subnet has 24 bits.
func gateway(ip string) netip.Addr {
	prefix, err := netip.MustParseAddr(ip).Prefix(24)
	if err != nil {
		panic(err) // not of containers in this network
	}
	return prefix.Addr().Next()
}

// express sends small packets back and forth on a TCP connection, and wants most of
// them to have taken express on each host that weft runs on.
func (h *hosts) express(t *testing.T) {
	client, server := h.containers[0], h.containers[1]
	lab.T(t).Start(server, "nc", "-ll", "-p", "7", "-e", "cat")
	lab.T(t).Eventually(5*time.Second, func() error {
		_, err := client.Output(t.Context(), "sh", "-c", "echo | nc -w 1 "+server.ip+" 7")
		return err
	})
	before := [2]map[string]float64{h.packets(t, 0), h.packets(t, 1)}
	const lines = 400
	out := lab.T(t).Run(client, "sh", "-c", fmt.Sprintf("for i in $(seq %d); do echo $i; usleep 5000; done | nc %s 7", lines, server.ip))
	if got := strings.Count(out, "\n"); got != lines {
		t.Fatalf("%d lines came back, want %d:\n%s", got, lines, out)
	}
	for i := range h.kinds {
		if h.kinds[i] != lab.Weft {
			continue
		}
		after := h.packets(t, i)
		for _, direction := range []string{"transmit", "receive"} {
			var all float64
			for _, path := range []string{"express", "base", "kernel"} {
				all += after[direction+" "+path] - before[i][direction+" "+path]
			}
			express := after[direction+" express"] - before[i][direction+" express"]
			t.Logf("%s: %s: %.0f of %.0f packets by express", h.lab.Nodes[i], direction, express, all)
			if all < lines/2 || express < all/2 {
				t.Errorf("%s: %s: %.0f of %.0f packets by express, want most of %d or more", h.lab.Nodes[i], direction, express, all, lines/2)
			}
		}
	}
}

var packetsMetric = regexp.MustCompile(`(?m)^weft_peer_(transmit|receive)_packets_total\{path="(\w+)",peer="[^"]*"\} (\S+)$`)

// packets reads a weft node's counters, by direction and path.
func (h *hosts) packets(t *testing.T, i int) map[string]float64 {
	t.Helper()
	counts := map[string]float64{}
	if h.kinds[i] != lab.Weft {
		return counts
	}
	text, err := h.lab.Nodes[i].Metrics(t.Context())
	must(t, err)
	for _, match := range packetsMetric.FindAllStringSubmatch(text, -1) {
		count, err := strconv.ParseFloat(match[3], 64)
		must(t, err)
		counts[match[1]+" "+match[2]] += count
	}
	return counts
}

// reachWorld connects to the world outside, which must see the host's address.
func (h *hosts) reachWorld(t *testing.T) {
	for i, from := range h.containers {
		var listener net.Listener
		must(t, h.lab.Underlay.Do(func() (err error) {
			listener, err = net.Listen("tcp", net.JoinHostPort(lab.Gateway.String(), "0"))
			return err
		}))
		defer listener.Close()
		host, port, _ := net.SplitHostPort(listener.Addr().String())
		lab.T(t).Start(from, "nc", "-w", "5", host, port)
		must(t, listener.(*net.TCPListener).SetDeadline(time.Now().Add(10*time.Second)))
		conn, err := listener.Accept()
		if err != nil {
			t.Errorf("%s to the world: %v", from, err)
			continue
		}
		defer conn.Close()
		if seen := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); seen != h.lab.Nodes[i].IP {
			t.Errorf("%s to the world: it is seen as %s, want its host's %s", from, seen, h.lab.Nodes[i].IP)
		}
	}
}

// published gets a page of each container by its host's address, from outside and
// from the other host's container.
func (h *hosts) published(t *testing.T) {
	for i, n := range h.lab.Nodes {
		answer, err := h.lab.Underlay.HTTP().Get("http://" + net.JoinHostPort(n.IP.String(), publishedPort) + "/index.html")
		must(t, err)
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if err != nil || string(body) != page {
			t.Errorf("%s has published %q, %v", n, body, err)
		}
		other := h.containers[1-i]
		out := lab.T(t).Run(other, "sh", "-c", `printf 'GET /index.html HTTP/1.0\r\n\r\n' | nc -w 5 `+n.IP.String()+" "+publishedPort)
		if !strings.Contains(out, page) {
			t.Errorf("%s has got from %s:\n%s", other, n, out)
		}
	}
}

// arping asks for the other container's MAC address, which nobody may answer: the
// hosts are different networks. The own gateway answers.
func (h *hosts) arping(t *testing.T) {
	ask := func(from *container, ip string) string {
		out, _ := from.Output(t.Context(), "arping", "-f", "-c", "2", "-w", "2", "-I", "eth0", ip) // fails without an answer
		return out
	}
	for i, from := range h.containers {
		if out := ask(from, gateway(from.ip).String()); !strings.Contains(out, "Unicast reply") {
			t.Errorf("%s: no answer of its gateway:\n%s", from, out)
		}
		to := h.containers[1-i]
		if out := ask(from, to.ip); !strings.Contains(out, "Received 0 response(s)") {
			t.Errorf("%s: an answer from %s:\n%s", from, to, out)
		}
	}
}

// rules compares the iptables of both hosts: FORWARD drops what no rule accepts,
// and the rules of flannel's stand where flanneld puts them, also when the daemons
// come again after Docker, or when somebody takes out the way to them.
func (h *hosts) rules(t *testing.T) {
	same := func(when string) {
		t.Helper()
		lab.T(t).Eventually(20*time.Second, func() error {
			first, second := h.ruleset(t, 0), h.ruleset(t, 1)
			if first != second {
				return fmt.Errorf("%s: rules of %s (-) and %s (+) differ:\n%s", when, h.kinds[0], h.kinds[1], lab.Diff(first, second))
			}
			if !strings.Contains(first, "\n:FORWARD DROP ") || strings.Count(first, "\n"+forwardJump+"\n") != 1 {
				return fmt.Errorf("%s: FORWARD does not drop, or not once %q:\n%s", when, forwardJump, first)
			}
			return nil
		})
	}
	same("daemons before Docker")
	for i := range h.daemons {
		must(t, h.daemons[i].Stop(syscall.SIGTERM))
		h.startDaemon(t, i)
	}
	same("daemons after Docker")
	for _, n := range h.lab.Nodes {
		lab.T(t).Run(n, "sh", "-c", "iptables "+strings.Replace(forwardJump, "-A", "-D", 1))
	}
	same("after the way to flannel's rules was taken out")
	h.reachEachOther(t)
}

// forwardJump is the rule by which FORWARD gets to flannel's.
const forwardJump = `-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD`

// ruleset is a host's iptables, with its addresses named.
func (h *hosts) ruleset(t *testing.T, i int) string {
	t.Helper()
	text := lab.T(t).Run(h.lab.Nodes[i], "sh", "-c", "iptables-save -t filter; iptables-save -t nat")
	subnet := strings.TrimSuffix(gateway(h.containers[i].ip).String(), ".1")
	text = strings.ReplaceAll(text, subnet+".", "SUBNET.")
	var lines []string
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "#") {
			lines = append(lines, regexp.MustCompile(`\[\d+:\d+\]`).ReplaceAllString(line, "[0:0]"))
		}
	}
	return strings.Join(lines, "")
}

// must ends the test on an error.
func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
