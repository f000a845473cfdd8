//go:build linux

package lab

import (
	"bufio"
	"cmp"
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
	// MAC is the overlay device's, where the lab or its files say so: flanneld
	// and stores choose one by themselves.
	MAC state.MAC
	// The same for IPv6. All of these are the plan's: they are on devices if the
	// lab has their family.
	IPv6      netip.Addr
	PrefixV6  netip.Prefix
	GatewayV6 netip.Addr
	VTEPv6    netip.Addr
	MACv6     state.MAC
	Pods      []*Pod

	agent    *agent
	flanneld *Process
}

// newNode makes the Go side of a node.
func newNode(l *Lab, index int) *Node {
	n := &Node{Index: index, Kind: l.Options.kind(index), IP: uplinkAddress(index), IPv6: uplinkAddressV6(index)}
	n.usePrefixes(index)
	name := "n" + strconv.Itoa(index)
	n.Space = Space{lab: l, name: name, netns: l.Name() + "-" + name}
	n.holder = func() pid { return l.record.holder(index) }
	for i := 1; i <= l.Options.Pods; i++ {
		n.Pods = append(n.Pods, newPod(n, i))
	}
	return n
}

// usePrefixes gives the node the plan's pod prefixes of a number, and what hangs
// on them.
func (n *Node) usePrefixes(number int) {
	n.Prefix, n.PrefixV6 = podPrefix(number), podPrefixV6(number)
	n.VTEP, n.VTEPv6 = inPrefix(n.Prefix, 0), inPrefix(n.PrefixV6, 0)
	n.Gateway, n.GatewayV6 = inPrefix(n.Prefix, 1), inPrefix(n.PrefixV6, 1)
	n.MAC, n.MACv6 = macOf(n.VTEP), v6MAC(macOf(n.VTEP))
}

// Addresses are those of eth0, IPv4 first.
func (n *Node) Addresses() []netip.Addr { return choose(n.lab.Options.Families, n.IP, n.IPv6) }

// Prefixes are those that hold the pods, IPv4 first.
func (n *Node) Prefixes() []netip.Prefix {
	return choose(n.lab.Options.Families, n.Prefix, n.PrefixV6)
}

// choose lists what there is in a lab of some families.
func choose[T any](f Families, v4, v6 T) (all []T) {
	if f.Has4() {
		all = append(all, v4)
	}
	if f.Has6() {
		all = append(all, v6)
	}
	return all
}

// build makes the node as its operator would hand it over to Kubernetes: an
// uplink, forwarding, a bridge with pods on it, and netfilter.
func (n *Node) build(ctx context.Context) error {
	if err := n.hold(ctx); err != nil {
		return err
	}
	if n.lab.Options.LegacyTables {
		if err := n.linkLegacyTables(); err != nil {
			return err
		}
	}
	if err := n.ip(ctx, "link set lo up"); err != nil {
		return err
	}
	if err := n.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if n.lab.Options.Families.Has6() {
		if err := n.Sysctl("net/ipv6/conf/all/forwarding", "1"); err != nil {
			return err
		}
	}
	if err := n.plugIn(ctx); err != nil {
		return err
	}
	if err := n.buildPods(ctx); err != nil {
		return err
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
		return n.StartFlanneld()
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

// buildPods makes the bridge and the pods on it.
func (n *Node) buildPods(ctx context.Context) error {
	if err := n.buildBridge(ctx); err != nil {
		return err
	}
	for _, p := range n.Pods {
		if err := p.build(ctx); err != nil {
			return fmt.Errorf("pod %s: %w", p, err)
		}
	}
	return nil
}

// buildBridge makes cni0 as the CNI bridge plugin makes it for flannel.
func (n *Node) buildBridge(ctx context.Context) error {
	commands := []string{
		fmt.Sprintf("link add cni0 address %s mtu %d type bridge", macOf(n.Gateway), n.lab.overlayMTU()),
		"link set cni0 up",
	}
	if n.lab.Options.Families.Has4() {
		commands = append(commands, fmt.Sprintf("address add %s/%d dev cni0", n.Gateway, n.Prefix.Bits()))
	}
	if n.lab.Options.Families.Has6() {
		commands = append(commands, fmt.Sprintf("address add %s/%d dev cni0 nodad", n.GatewayV6, n.PrefixV6.Bits()))
	}
	return n.ip(ctx, commands...)
}

// MovePods gives the node the pod prefixes that the node of another number would
// have, as if it had been installed anew: cni0 and the pods are made again. The
// caller ends what runs the overlay before, and starts it again.
func (n *Node) MovePods(ctx context.Context, number int) error {
	for _, p := range n.Pods {
		if err := p.Destroy(); err != nil {
			return err
		}
	}
	if err := n.ip(ctx, "link delete cni0"); err != nil {
		return err
	}
	n.usePrefixes(number)
	for _, p := range n.Pods {
		p.useAddresses()
	}
	return n.buildPods(ctx)
}

// MoveUplink gives the node the underlay addresses that the node of another
// number would have. The caller ends what runs the overlay before, and starts it
// again.
func (n *Node) MoveUplink(ctx context.Context, number int) error {
	if err := n.ip(ctx, "address flush dev eth0 scope global"); err != nil {
		return err
	}
	n.IP, n.IPv6 = uplinkAddress(number), uplinkAddressV6(number)
	return n.ip(ctx, n.uplinkAddresses()...)
}

// overlayMTU is what the underlay leaves to the pods: less the outer IPv4, UDP,
// VXLAN and inner Ethernet headers.
func (l *Lab) overlayMTU() int { return cmp.Or(l.Options.BackendMTU, l.Options.MTU) - 20 - 8 - 8 - 14 }

// Overlay is the name of the overlay device.
func (n *Node) Overlay() string { return fmt.Sprintf("flannel.%d", n.lab.Options.VNI) }

// OverlayV6 is the name of the overlay device for IPv6.
func (n *Node) OverlayV6() string { return fmt.Sprintf("flannel-v6.%d", n.lab.Options.VNI) }

// Overlays are the names of the overlay devices that the lab's families need,
// IPv4 first.
func (n *Node) Overlays() []string {
	return choose(n.lab.Options.Families, n.Overlay(), n.OverlayV6())
}

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
