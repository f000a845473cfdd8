//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// foreign is somebody else's program: it counts what it sees and lets it go on.
type foreign struct {
	program *ebpf.Program
	count   *ebpf.Map
}

// mustForeign loads one.
func mustForeign(tb testing.TB, name string) *foreign {
	tb.Helper()
	count, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { count.Close() })
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, count.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.Mov.Imm(asm.R1, 1),
			asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
			asm.Mov.Imm(asm.R0, -1).WithSymbol("out"),
			asm.Return(),
		},
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { program.Close() })
	return &foreign{program, count}
}

// mustSeen is how many packets the program has seen.
func (f *foreign) mustSeen(tb testing.TB) (seen uint64) {
	tb.Helper()
	if err := f.count.Lookup(uint32(0), &seen); err != nil {
		tb.Fatal(err)
	}
	return seen
}

// mustAttachTCX puts a program at an end of a device's chain until the test
// ends or somebody closes it.
func mustAttachTCX(tb testing.TB, n *lab.Node, device string, at ebpf.AttachType, anchor link.Anchor, program *ebpf.Program) link.Link {
	tb.Helper()
	var l link.Link
	err := n.Do(func() error {
		i, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		l, err = link.AttachTCX(link.TCXOptions{Interface: i.Index, Program: program, Attach: at, Anchor: anchor})
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	return l
}

// dropByMark and dropByPriority are commands of a hostChange: a clsact filter
// on a device's egress that drops packets with a mark, or a priority.
const (
	dropByMark     = "drop-by-mark "
	dropByPriority = "drop-by-priority "
)

// skbMark and skbPriority are offsets in struct __sk_buff.
const (
	skbMark     = 8
	skbPriority = 32
)

// dropper makes the program of dropByMark and dropByPriority.
func dropper(offset int16, value uint32) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "dropper", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R1, asm.R1, offset, asm.Word),
			asm.Mov.Imm(asm.R0, -1),
			asm.JNE.Imm(asm.R1, int32(value), "out"),
			asm.Mov.Imm(asm.R0, 2),
			asm.Return().WithSymbol("out"),
		},
	})
}

// attachDropper runs such a command; every value gets a filter of its own.
func attachDropper(offset int16, words []string) error {
	var value uint32
	if _, err := fmt.Sscanf(words[1], "0x%x", &value); err != nil {
		return err
	}
	program, err := dropper(offset, value)
	if err != nil {
		return err
	}
	defer program.Close()
	return addFilter(words[0], netlink.HANDLE_MIN_EGRESS, uint16(value&0x7ff), "dropper", program.FD())
}

// addFilter adds a clsact filter that runs a program.
func addFilter(device string, parent uint32, priority uint16, name string, fd int) error {
	i, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	err = netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: i.Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: i.Index, Parent: parent, Handle: 1, Priority: priority, Protocol: unix.ETH_P_ALL,
		},
		Fd: fd, Name: name, DirectAction: true,
	})
}

// hostCommandOfOurs runs commands for which no program need be installed; ok
// tells that line is one.
func hostCommandOfOurs(line string) (ok bool, err error) {
	for prefix, run := range map[string]func(words []string) error{
		ipsetPrefix:    func(words []string) error { return ipset(words[0], words[1], words[2:]...) },
		dropByMark:     func(words []string) error { return attachDropper(skbMark, words) },
		dropByPriority: func(words []string) error { return attachDropper(skbPriority, words) },
	} {
		if rest, ok := strings.CutPrefix(line, prefix); ok {
			return true, run(strings.Fields(rest))
		}
	}
	return false, nil
}
