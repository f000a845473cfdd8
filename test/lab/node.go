//go:build linux

package lab

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/weft-net/weft/dataplane/state"
)

// Node is one machine of the cluster.
type Node struct {
	Space
	// Index counts from 1.
	Index int
	Kind  Kind
	// IP is the address of eth0, peers' public IP.
	IP netip.Addr
	// Prefix holds the pods. Gateway is cni0's address in it, and VTEP the
	// overlay device's.
	Prefix  netip.Prefix
	Gateway netip.Addr
	VTEP    netip.Addr
	// MAC is the overlay device's.
	MAC  state.MAC
	Pods []*Pod

	agent    *agent
	flanneld *Process
}

// newNode makes the Go side of a node.
func newNode(l *Lab, index int) *Node {
	n := &Node{
		Index:   index,
		Kind:    l.Options.kind(index),
		IP:      uplinkAddress(index),
		Prefix:  podPrefix(index),
		Gateway: inPrefix(index, 1),
		VTEP:    inPrefix(index, 0),
		MAC:     macOf(inPrefix(index, 0)),
	}
	name := "n" + strconv.Itoa(index)
	n.Space = Space{lab: l, name: name, netns: l.Name() + "-" + name}
	n.holder = func() pid { return l.record.holder(index) }
	for i := 1; i <= l.Options.Pods; i++ {
		n.Pods = append(n.Pods, newPod(n, i))
	}
	return n
}

// build makes the node as its operator would hand it over to Kubernetes: an
// uplink, forwarding, a bridge with pods on it, and netfilter.
func (n *Node) build(ctx context.Context) error {
	if err := n.hold(ctx); err != nil {
		return err
	}
	if err := n.ip(ctx, "link set lo up"); err != nil {
		return err
	}
	if err := n.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if err := n.plugIn(ctx); err != nil {
		return err
	}
	if err := n.buildBridge(ctx); err != nil {
		return err
	}
	for _, p := range n.Pods {
		if err := p.build(ctx); err != nil {
			return fmt.Errorf("pod %s: %w", p, err)
		}
	}
	if n.lab.Options.Netfilter && !n.lab.Options.KubeProxy {
		return n.loadNetfilter(ctx)
	}
	return nil
}

// buildOverlay makes the overlay, when all nodes are there.
func (n *Node) buildOverlay(ctx context.Context) error {
	switch n.Kind {
	case Kernel:
		return n.buildKernelOverlay(ctx)
	case Weft:
		return n.StartAgent(ctx, n.lab.Options.Binary, n.lab.Options.AgentFlags...)
	case Flanneld:
		return n.startFlanneld()
	default:
		return nil
	}
}

// holderScript gives a node its own mounts and name, says so, and sleeps. What
// the machine mounts and unmounts later still arrives (rslave), so that a node
// holds nothing of the machine open, but nothing goes the other way.
const holderScript = `set -e
echo "$0" >/proc/sys/kernel/hostname
mount --make-rslave /
umount -l /run/netns/* 2>/dev/null || true
mount -t tmpfs -o mode=755 weftlab /run
mount -t tmpfs -o mode=755 weftlab /var/lib/weft
mount -t bpf -o mode=700 weftlab /sys/fs/bpf
mkdir /run/lock /run/netns
echo ready
exec sleep infinity >/dev/null 2>&1`

// hold starts the process that holds the node's namespaces open, and names the
// network namespace.
func (n *Node) hold(ctx context.Context) error {
	cmd := exec.Command("/bin/sh", "-c", holderScript, n.name)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS}
	p, err := n.lab.start(cmd, n.name+" holder")
	if err != nil {
		return err
	}
	if err := p.WaitOutput(ctx, "ready\n"); err != nil {
		return err
	}
	if err := n.lab.record.setHolder(n.Index, p.pid); err != nil {
		return err
	}
	return nameNamespace(n.netns, fmt.Sprintf("/proc/%d/ns/net", p.PID()))
}

// buildBridge makes cni0 as the CNI bridge plugin makes it for flannel.
func (n *Node) buildBridge(ctx context.Context) error {
	return n.ip(ctx,
		fmt.Sprintf("link add cni0 address %s mtu %d type bridge", macOf(n.Gateway), n.lab.overlayMTU()),
		"link set cni0 up",
		fmt.Sprintf("address add %s/%d dev cni0", n.Gateway, n.Prefix.Bits()),
	)
}

// overlayMTU is what the underlay leaves to the pods: less the outer IPv4, UDP,
// VXLAN and inner Ethernet headers.
func (l *Lab) overlayMTU() int { return l.Options.MTU - 20 - 8 - 8 - 14 }

// Overlay is the name of the overlay device.
func (n *Node) Overlay() string { return fmt.Sprintf("flannel.%d", n.lab.Options.VNI) }

// Path returns where the machine sees a file of the node, for example
// n.Path("/run/flannel/subnet.env") or n.Path("/sys/fs/bpf/weft/peers").
func (n *Node) Path(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", n.holder().ID, path)
}

// Peers are the other nodes of the lab.
func (n *Node) Peers() []*Node {
	var peers []*Node
	for _, other := range n.lab.Nodes {
		if other != n {
			peers = append(peers, other)
		}
	}
	return peers
}

// Counter reads one of the counters that `ip -s link` shows of a device of the
// space, by its name in /proc/net/dev: rx or tx, bytes or packets.
func (s *Space) Counter(device, direction, unit string) (count uint64, err error) {
	column := map[string]int{"rx bytes": 0, "rx packets": 1, "tx bytes": 8, "tx packets": 9}
	i, ok := column[direction+" "+unit]
	if !ok {
		return 0, fmt.Errorf("no counter %s %s", direction, unit)
	}
	err = s.Do(func() error {
		f, err := os.Open("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			name, values, _ := strings.Cut(lines.Text(), ":")
			if strings.TrimSpace(name) != device {
				continue
			}
			count, err = strconv.ParseUint(strings.Fields(values)[i], 10, 64)
			return err
		}
		return fmt.Errorf("%s has no device %s", s, device)
	})
	return count, err
}
