package ebpf

import (
	"iter"
	"net/netip"
	"time"
)

// slotRest is how long a freed slot is not given to another node: a program
// that looked it up before must be through with it. Far longer than any
// program runs.
const slotRest = time.Second

// slotsIn is how many slots there are up to the highest that somebody has.
func slotsIn[T any](all iter.Seq[T], slot func(T) uint32) int {
	n := 0
	for one := range all {
		if s := slot(one); s != noSlot {
			n = max(n, int(s)+1)
		}
	}
	return n
}

// slots gives every peer node a place in the per-peer arrays.
type slots struct {
	size  int
	byIP  map[netip.Addr]uint32
	taken map[uint32]bool
	freed map[uint32]time.Time
	next  uint32 // every slot below it was given at least once
}

func newSlots(size int) slots {
	return slots{
		size:  size,
		byIP:  map[netip.Addr]uint32{},
		taken: map[uint32]bool{},
		freed: map[uint32]time.Time{},
	}
}

// adopt records a slot that a former agent gave.
func (s *slots) adopt(node netip.Addr, slot uint32) {
	if int(slot) >= s.size || s.taken[slot] {
		return
	}
	s.byIP[node] = slot
	s.taken[slot] = true
}

// get returns the node's slot, or gives it a new one; fresh tells that it must
// be cleared. ok is false when all are taken.
func (s *slots) get(node netip.Addr, now time.Time) (slot uint32, fresh, ok bool) {
	if slot, ok := s.byIP[node]; ok {
		return slot, false, true
	}
	slot, ok = s.free(now)
	if !ok {
		return 0, false, false
	}
	s.byIP[node] = slot
	s.taken[slot] = true
	return slot, true, true
}

// free finds a slot that nobody has: one never used, else one that has rested.
func (s *slots) free(now time.Time) (uint32, bool) {
	for ; int(s.next) < s.size; s.next++ {
		if _, resting := s.freed[s.next]; !resting && !s.taken[s.next] {
			return s.next, true
		}
	}
	for slot, since := range s.freed {
		if now.Sub(since) >= slotRest {
			delete(s.freed, slot)
			return slot, true
		}
	}
	return 0, false
}

// hasFree tells whether free would find a slot.
func (s *slots) hasFree(now time.Time) bool {
	if len(s.taken)+len(s.freed) < s.size {
		return true
	}
	for _, since := range s.freed {
		if now.Sub(since) >= slotRest {
			return true
		}
	}
	return false
}

// release frees the slots of nodes that are not in keep.
func (s *slots) release(keep map[netip.Addr]bool, now time.Time) {
	for node, slot := range s.byIP {
		if keep[node] {
			continue
		}
		delete(s.byIP, node)
		delete(s.taken, slot)
		s.freed[slot] = now
	}
}
