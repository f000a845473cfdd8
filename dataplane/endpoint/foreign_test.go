//go:build linux

package endpoint

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

func (n *node) index(t testing.TB, name string) (index int) {
	t.Helper()
	n.MustDo(t, func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	})
	return index
}

// program makes a tc program that does nothing.
func program(t testing.TB, name string) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return prog
}

// tcx attaches a program to a device, until detach.
func (n *node) tcx(t testing.TB, device string, prog *ebpf.Program, at ebpf.AttachType) (detach func()) {
	t.Helper()
	index := n.index(t, device)
	if _, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: at}); err != nil {
		t.Skip("this kernel has no tcx; newer ones run this")
	}
	var l link.Link
	n.MustDo(t, func() (err error) {
		l, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: at})
		return err
	})
	t.Cleanup(func() { l.Close() })
	return func() { l.Close() }
}

func TestForeignTCXPrograms(t *testing.T) {
	n := newNode(t)
	n.pod(t, "a", "10.244.1.2")
	n.pod(t, "b", "10.244.1.3")
	ours, theirs := program(t, "pod_in"), program(t, "stranger")
	n.tcx(t, "va", ours, ebpf.AttachTCXIngress)
	n.tcx(t, "vb", program(t, "pod_out"), ebpf.AttachTCXEgress)
	n.wants(t, foundA, foundB)

	detach := n.tcx(t, "va", theirs, ebpf.AttachTCXIngress)
	n.wants(t, foundB, "left va: tcx program stranger at ingress")
	detach()
	n.wants(t, foundA, foundB)

	// Our program, where we do not put it.
	detach = n.tcx(t, "va", ours, ebpf.AttachTCXEgress)
	n.wants(t, foundB, "left va: tcx program pod_in at egress")
	detach()

	t.Run("RecognisedByNumber", func(t *testing.T) {
		info, err := theirs.Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := info.ID()
		n.tcx(t, "va", theirs, ebpf.AttachTCXEgress)
		n.wants(t, foundB, "left va: tcx program stranger at egress")
		n.open(t, Options{Ours: func(p Program) bool { return p.ID == uint32(id) || p.Name == "pod_in" }})
		n.wants(t, foundA, "left vb: tcx program pod_out at egress")
	})
}

func TestForeignFilters(t *testing.T) {
	n := newNode(t)
	n.pod(t, "a", "10.244.1.2")
	n.Run(t, "tc qdisc add dev va clsact")
	n.wants(t, foundA) // without filters nothing happens there

	prog := program(t, "anything")
	filter := func(name string, priority uint16, parent uint32) *netlink.BpfFilter {
		return &netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: n.index(t, "va"), Parent: parent, Handle: 1, Priority: priority, Protocol: unix.ETH_P_ALL},
			Fd:          prog.FD(), Name: name, DirectAction: true,
		}
	}
	n.MustDo(t, func() error { return netlink.FilterAdd(filter("weft/pod_in", 50000, netlink.HANDLE_MIN_INGRESS)) })
	n.MustDo(t, func() error { return netlink.FilterAdd(filter("weft/pod_out", 50000, netlink.HANDLE_MIN_EGRESS)) })
	n.wants(t, foundA)

	theirs := filter("theirs", 7, netlink.HANDLE_MIN_EGRESS)
	n.MustDo(t, func() error { return netlink.FilterAdd(theirs) })
	n.wants(t, "left va: bpf filter theirs at egress")
	n.MustDo(t, func() error { return netlink.FilterDel(theirs) })
	n.wants(t, foundA)

	n.Run(t, "tc filter add dev va ingress protocol all u32 match u32 0 0 flowid 1:1")
	n.wants(t, "left va: u32 filter at ingress")
	n.Run(t, "tc qdisc del dev va clsact", "tc qdisc add dev va ingress_block 5 clsact")
	n.wants(t, "left va: filters in a block that devices share")
}

// As the CNI plugin bandwidth leaves it.
func TestShapedPods(t *testing.T) {
	n := newNode(t)
	n.pod(t, "a", "10.244.1.2")
	n.pod(t, "b", "10.244.1.3")
	n.Run(t, "tc qdisc add dev va root tbf rate 10mbit burst 100k latency 25ms")
	n.wants(t, foundB, "left va: the pod is shaped (qdisc tbf)")
	n.Run(t,
		"ip link add bwpb type ifb", "ip link set bwpb up",
		"tc qdisc add dev vb ingress",
		"tc filter add dev vb parent ffff: protocol all u32 match u32 0 0 flowid 1:1 action mirred egress redirect dev bwpb",
	)
	n.wants(t,
		"left va: the pod is shaped (qdisc tbf)",
		"left vb: u32 filter at ingress that redirects to bwpb (the pod is shaped)",
	)
	n.Run(t, "tc qdisc del dev va root", "tc qdisc del dev vb ingress")
	n.wants(t, foundA, foundB)
}

func TestPodWithXDP(t *testing.T) {
	n := newNode(t)
	a := n.pod(t, "a", "10.244.1.2")
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, // XDP_PASS
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	a.MustDo(t, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetXdpFd(eth0, prog.FD())
	})
	n.wants(t, "left va: the pod has an XDP program")
}

// FuzzParse: the kernel's own messages, and such with any damage, are read
// without harm.
func FuzzParse(f *testing.F) {
	f.Add(peerRequest(device{peer: 2, netns: 3}).Data())
	f.Add(rtnl.NewRequest(unix.RTM_NEWADDR, 0, ifaddrmsg(unix.AF_INET, 2)...).Attr(unix.IFA_LOCAL, []byte{10, 244, 1, 2}).Uint32(unix.IFA_TARGET_NETNSID, 1).Data())
	f.Add(rtnl.NewRequest(unix.RTM_NEWQDISC, 0, make([]byte, sizeofTcMsg)...).Attr(unix.TCA_KIND, []byte("clsact\x00")).Uint32(unix.TCA_INGRESS_BLOCK, 1).Data())
	f.Add(rtnl.NewRequest(unix.RTM_NEWNEIGH, 0, append([]byte{unix.AF_BRIDGE}, make([]byte, unix.SizeofNdMsg-1)...)...).Attr(unix.NDA_LLADDR, make([]byte, 6)).Data())
	f.Fuzz(func(_ *testing.T, data []byte) {
		l, _, _ := parseLink(data)
		parseLinkInfo(&l, data)
		_ = fmt.Sprint(l)
		a, _, _, _ := parseAddress(data)
		_ = a.prefix.String()
		_, dst, _ := parseRoute(data)
		_ = strings.ToUpper(dst.String())
		_, _ = parseQdisc(data)
		_, _ = parseFilter(data)
		_, _, _ = parseStation(data)
	})
}
