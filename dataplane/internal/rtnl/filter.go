//go:build linux

package rtnl

import (
	"encoding/binary"
	"math/bits"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Match is a field of a netlink message and what is in it.
type Match struct {
	// Offset and Size, 1, 2 or 4, say where the field is, in bytes from the header on.
	Offset, Size uint32
	// Value is what the bits of Mask are.
	Mask, Value uint32
}

// Kind matches messages of a kind.
func Kind(kind uint16) Match { return Match{4, 2, 0xffff, uint32(kind)} }

// CausedBy matches messages about what was asked for through a port.
func CausedBy(port uint32) Match { return Match{12, 4, ^uint32(0), port} }

// DropFilter makes a socket filter by which the kernel drops the messages of which
// all matches of one of drops hold, before it queues them and wakes anybody. Of a
// datagram of several messages the first is looked at. One that has not got all
// fields up to the first that does not match is dropped too.
func DropFilter(drops ...[]Match) []unix.SockFilter {
	var filter []unix.SockFilter
	for _, all := range drops {
		left := 3 * len(all) // instructions to the one that drops
		for _, m := range all {
			left -= 3
			filter = append(filter,
				unix.SockFilter{Code: unix.BPF_LD | loadSizes[m.Size] | unix.BPF_ABS, K: m.Offset},
				unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: m.loaded(m.Mask)},
				unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: m.loaded(m.Value), Jf: uint8(left + 1)},
			)
		}
		filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
	}
	return append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: ^uint32(0)})
}

// loadSizes are the sizes of fields as instructions have them.
var loadSizes = map[uint32]uint16{1: unix.BPF_B, 2: unix.BPF_H, 4: unix.BPF_W}

// loaded is what a filter gets when it loads a field that has this value: it takes
// for network byte order what is in the machine's.
func (m Match) loaded(value uint32) uint32 {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return value
	}
	return bits.ReverseBytes32(value) >> (32 - 8*m.Size)
}

// SetFilter has the kernel drop what need not be heard. Where that can't be there
// is more to read, and that is all.
func SetFilter(fd int, filter []unix.SockFilter) {
	_ = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: unsafe.SliceData(filter)})
}
