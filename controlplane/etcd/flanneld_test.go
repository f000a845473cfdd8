//go:build linux && peers

package etcd

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/weft-net/weft/test/lab"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// host is a network namespace with an uplink, 192.0.2.11, and etcd on its
// loopback.
type host struct {
	*netns.NS
	env string // subnet.env
}

// mustHost makes a host.
func mustHost(tb testing.TB, s *server) *host {
	tb.Helper()
	h := &host{NS: netns.New(tb), env: filepath.Join(tb.TempDir(), "subnet.env")}
	h.Run(tb, "ip link set lo up", "ip link add eth0 type veth peer name other", "ip link set other up", "ip link set eth0 up",
		"ip address add 192.0.2.11/24 dev eth0", "ip route add default via 192.0.2.1")
	var l net.Listener
	h.MustDo(tb, func() (err error) {
		l, err = new(net.ListenConfig).Listen(tb.Context(), "tcp", "127.0.0.1:2379")
		return err
	})
	tb.Cleanup(func() { l.Close() })
	r := &relay{}
	tb.Cleanup(r.sever)
	go r.serve(l, s.client)
	return h
}

// flanneld runs one there until stop is called, and waits for its subnet.env.
func (h *host) flanneld(tb testing.TB, prefix string) (stop func(), log *bytes.Buffer) {
	tb.Helper()
	found, err := lab.Programs("flanneld")
	must(tb, err)
	ctx, cancel := context.WithCancel(context.Background()) // kills it: asked to stop, it does not always
	log = &bytes.Buffer{}
	cmd := exec.CommandContext(ctx, found["flanneld"], "--etcd-endpoints", "http://127.0.0.1:2379", "--etcd-prefix", prefix,
		"--iface", "eth0", "--subnet-file", h.env, "--iptables-forward-rules=false")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // with the thread that starts it
	written := modified(h.env)
	ended := make(chan struct{})
	go func() {
		if err := h.Do(cmd.Run); err != nil {
			fmt.Fprintln(log, err)
		}
		close(ended)
	}()
	stop = func() {
		cancel()
		<-ended
	}
	tb.Cleanup(stop)
	eventually(tb, func() string {
		select {
		case <-ended:
			tb.Fatalf("flanneld has ended:\n%s", log)
		default:
		}
		if modified(h.env) == written {
			return "flanneld has not written subnet.env"
		}
		return ""
	})
	return stop, log
}

// modified tells a file's versions apart.
func modified(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return ""
	}
	return info.ModTime().String()
}

// subnet is the prefix in subnet.env.
func (h *host) subnet(tb testing.TB) netip.Prefix {
	tb.Helper()
	text, err := os.ReadFile(h.env)
	must(tb, err)
	_, rest, _ := strings.Cut(string(text), "FLANNEL_SUBNET=")
	line, _, _ := strings.Cut(rest, "\n")
	p, err := netip.ParsePrefix(line)
	must(tb, err)
	return p.Masked()
}

// A node that runs flanneld and one that runs this store see each other, and
// each takes the other's place with what it finds.
func TestBesideFlanneld(t *testing.T) {
	t.Parallel()
	s := sharedEtcd(t)
	h := mustHand(t, s, network)
	host := mustHost(t, s)
	other := offer(1)
	other.MAC = state.MAC{2, 0, 0, 0, 0, 1}
	n := start(t, s, other)
	ours := n.state().Local.Prefixes[0]

	stop, _ := host.flanneld(t, h.prefix)
	prefix := host.subnet(t)
	n.hasPeers(t, prefix.String())
	peer := n.state().Peers[0]
	link := host.Run(t, "ip link show flannel.1")
	if peer.PublicIP.String() != "192.0.2.11" || !strings.Contains(link, peer.MAC.String()) {
		t.Errorf("peer %v; its device is %s", peer, link)
	}
	wants := func() string {
		route := fmt.Sprintf("%s via %s dev flannel.1 onlink", ours, ours.Addr())
		if routes := host.Run(t, "ip route"); !strings.Contains(routes, route) {
			return fmt.Sprintf("flanneld has no route %s:\n%s", route, routes)
		}
		entry := "02:00:00:00:00:01 dst 192.0.2.1 self permanent"
		if fdb := host.Run(t, "bridge fdb show dev flannel.1"); !strings.Contains(fdb, entry) {
			return fmt.Sprintf("flanneld has no entry %s:\n%s", entry, fdb)
		}
		return ""
	}
	eventually(t, wants)

	// This store in flanneld's place: the same prefix and MAC, and nothing is
	// written.
	stop()
	key := strings.Replace(prefix.String(), "/", "-", 1)
	before := h.leases()[key]
	offer := offer(11)
	instead := start(t, s, offer)
	if got := instead.state().Local; got.Prefixes[0] != prefix || got.MAC != peer.MAC || h.leases()[key] != before {
		t.Errorf("took over %+v, lease %v, was %v", got, h.leases()[key], before)
	}

	// And flanneld again, while the store still runs.
	host.flanneld(t, h.prefix)
	if got := host.subnet(t); got != prefix {
		t.Errorf("flanneld had %s and has %s", prefix, got)
	}
	after := h.leases()[key]
	if after.value != before.value {
		t.Errorf("flanneld wrote %s, was %s", after.value, before.value)
	}
	eventually(t, wants)
	if len(n.everBroken()) > 0 || len(instead.everBroken()) > 0 || n.count() != 2 {
		t.Errorf("%d states, health %q and %q", n.count(), n.everBroken(), instead.everBroken())
	}
}
