//go:build linux

package datapath_test

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/weft-net/weft/test/lab"
)

// More offsets in struct __sk_buff.
const (
	skbTCIndex = 44
	skbCB      = 48
)

// mustScribbler loads somebody's program that writes a field of every packet
// and lets it go on.
func mustScribbler(tb testing.TB, field int16, value int32) *ebpf.Program {
	tb.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "scribbler", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, value),
			asm.StoreMem(asm.R1, field, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, -1),
			asm.Return(),
		},
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { program.Close() })
	return program
}

// Other people's programs and rules use the scratch fields of a packet for
// themselves. In enforce that must not make packets of a peer look like
// somebody else's.
func TestScratchFieldsAreWrittenByOthers(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, n *lab.Node)
	}{
		{"a program in front writes the control buffer", func(t *testing.T, n *lab.Node) {
			mustAttachTCX(t, n, "flannel.1", ebpf.AttachTCXIngress, link.Head(), mustScribbler(t, skbCB, 1))
		}},
		{"a rule gives what comes in a priority", func(t *testing.T, n *lab.Node) {
			lt := lab.T(t)
			lt.Run(n, "nft add table inet qos")
			lt.Run(n, "nft add chain inet qos c { type filter hook prerouting priority -150 ; }")
			lt.Run(n, "nft add rule inet qos c udp dport 8472 meta priority set 0:7")
		}},
		{"a program in front classifies by tc index", func(t *testing.T, n *lab.Node) {
			mustAttachTCX(t, n, "eth0", ebpf.AttachTCXIngress, link.Head(), mustScribbler(t, skbTCIndex, 3))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			lt, l := newLab(t, lab.Options{Kinds: []lab.Kind{lab.Weft, lab.Kernel}, AgentFlags: []string{"--source-check", "enforce"}})
			mustUseBase(t, l.Pod(1, 1), l.Pod(2, 1))
			c.do(t, l.Node(1))
			lt.MustLoseNothing(l.Pod(2, 1), l.Pod(1, 1), lab.ProbeOptions{Interval: 5 * time.Millisecond}, func() {
				time.Sleep(3 * time.Second)
			})
			if _, dropped := mustReason(t, l.Node(1), "source_unseen"); dropped > 0 {
				t.Errorf("%d packets of a peer were dropped as unseen", dropped)
			}
		})
	}
}

// Our own packets must not pass for the kernel's on the uplink, whatever others
// write into them: else they prove for ever that the host lets VXLAN out.
func TestProgramOnTheUplinkClearsOurStamp(t *testing.T) {
	t.Parallel()
	lt, l := newLab(t, lab.Options{Kinds: []lab.Kind{lab.Weft, lab.Kernel}})
	n1 := l.Node(1)
	mustUseBase(t, l.Pod(1, 1), l.Pod(2, 1))
	mustAttachTCX(t, n1, "eth0", ebpf.AttachTCXEgress, link.Head(), mustScribbler(t, skbTCIndex, 0))
	mustUseBase(t, l.Pod(1, 1), l.Pod(2, 1))
	probe, err := lab.StartProbe(l.Pod(1, 1), l.Pod(2, 1), lab.ProbeOptions{Interval: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = probe.Stop() }()
	lt.Run(n1, "iptables-nft -w -I OUTPUT -p udp --dport 8472 -j DROP")
	time.Sleep(proofLife + slack)
	if err := pings(t, l.Pod(1, 1), l.Pod(2, 1).IP); err == nil {
		t.Errorf("pings are answered %s after the host forbade VXLAN", proofLife+slack)
	}
}
