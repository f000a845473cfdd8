//go:build linux

package lab

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

// weft builds the weft program.
func weft(t *testing.T) string {
	t.Helper()
	path, err := buildWeft(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAgentsBesidePlainKernels(t *testing.T) {
	lt := T(t)
	l := lt.New(Options{Nodes: 3, Kinds: []Kind{Weft, Kernel, Bare}, Binary: weft(t), Netfilter: true, Underlay: Wire})
	n := l.Node(1)
	if metrics, err := n.Metrics(t.Context()); err != nil || !strings.Contains(metrics, "weft_peers") {
		t.Errorf("the agent's metrics: %v\n%s", err, metrics)
	}
	if out := lt.Run(n, "weft status"); !strings.Contains(out, "running") {
		t.Errorf("weft status on the node:\n%s", out)
	}
	lt.MustLoseNothing(l.Pod(1, 1), l.Pod(2, 1), ProbeOptions{}, func() {
		if err := n.RestartAgent(t.Context(), syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	})
	if err := n.StartAgent(t.Context(), l.Options.Binary); err == nil {
		t.Error("a second agent was started on the node")
	}
	if err := n.StopAgent(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := l.Node(3).StartAgent(t.Context(), l.Options.Binary, "--accel", "off"); err != nil {
		t.Error(err)
	}
	lt.Run(l.Pod(3, 1), "ping -c 1 -W 2 "+l.Pod(1, 1).IP.String())
}

func TestAgentThatCannotRunIsTold(t *testing.T) {
	lt := T(t)
	l := lt.New(Options{})
	err := l.Node(1).StartAgent(t.Context(), weft(t), "--accel", "sideways")
	if err == nil || !strings.Contains(err.Error(), "sideways") {
		t.Errorf("StartAgent should show what the agent said: %v", err)
	}
}

func TestServiceLeadsToItsBackend(t *testing.T) {
	lt := T(t)
	l := lt.New(Options{Kinds: []Kind{Kernel}, Netfilter: true})
	service := netip.MustParseAddrPort("10.96.0.10:80")
	if err := l.Node(1).AddService(t.Context(), "tcp", service, netip.AddrPortFrom(l.Pod(2, 1).IP, 8080)); err != nil {
		t.Fatal(err)
	}
	var listener net.Listener
	if err := l.Pod(2, 1).Do(func() (err error) {
		listener, err = net.Listen("tcp4", ":8080")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := l.Pod(1, 1).Dial("tcp4", service.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	served, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	if from := served.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); from != l.Pod(1, 1).IP {
		t.Errorf("the backend sees %s, want the pod's own address %s", from, l.Pod(1, 1).IP)
	}
}

func TestPodCanBeDestroyedAndRebuilt(t *testing.T) {
	lt := T(t)
	l := lt.New(Options{Kinds: []Kind{Kernel}, Pods: 2})
	p := l.Pod(2, 2)
	if err := p.Destroy(); err != nil {
		t.Fatal(err)
	}
	lt.Eventually(5*time.Second, func() error {
		if l.Node(2).Run(t.Context(), "ip link show "+p.Veth) != nil {
			return nil
		}
		return fmt.Errorf("%s is still there", p.Veth)
	})
	if err := p.Rebuild(t.Context()); err != nil {
		t.Fatal(err)
	}
	lt.Run(l.Pod(1, 1), "ping -c 1 -W 2 "+p.IP.String())
}
