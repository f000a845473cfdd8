//go:build linux

package ebpf

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/weft-net/weft/dataplane/state"
)

// maxPrefixLengths is PREFIX_LENGTHS of bpf/constants.h.
const maxPrefixLengths = len(weftInForce{}.PrefixBits)

// recoverSlots learns from the map nodes which slots are given, so that
// counters go on where a former agent left them.
func (a *Accelerator) recoverSlots() error {
	a.slots = newSlots(int(a.objects.PeerStates.MaxEntries()))
	have, err := readAll[uint32, weftNode](a.objects.Nodes)
	if err != nil {
		return fmt.Errorf("reading map nodes: %w", err)
	}
	for addr, node := range have {
		if addr == node.Remote {
			a.slots.adopt(fromBE32(addr), node.Slot)
		}
	}
	return nil
}

// syncPeers brings the maps peers and nodes to what is desired. What is new
// goes in before what is old goes out. It returns the peers that don't fit and
// the prefix lengths in use, longest first.
func (a *Accelerator) syncPeers(peers []state.Peer) (misfits []state.Peer, lengths []uint8, err error) {
	a.releaseSlots(peers)
	wantPeers, wantNodes, lengths, misfits, fresh := a.place(peers)
	for _, slot := range fresh {
		if err := a.clearSlot(slot); err != nil {
			return misfits, lengths, err
		}
	}
	stalePeers, err := put(a.objects.Peers, wantPeers)
	if err != nil {
		return misfits, lengths, fmt.Errorf("writing map peers: %w", err)
	}
	staleNodes, err := put(a.objects.Nodes, wantNodes)
	if err != nil {
		return misfits, lengths, fmt.Errorf("writing map nodes: %w", err)
	}
	if err := errors.Join(remove(a.objects.Peers, stalePeers), remove(a.objects.Nodes, staleNodes)); err != nil {
		return misfits, lengths, fmt.Errorf("removing stale peers: %w", err)
	}
	return misfits, lengths, nil
}

// releaseSlots frees the slots of nodes that are no longer peers.
func (a *Accelerator) releaseSlots(peers []state.Peer) {
	keep := map[netip.Addr]bool{}
	for _, p := range peers {
		keep[p.PublicIP] = true
	}
	a.slots.release(keep, time.Now())
}

// place gives every peer its map entries. Peers beyond the maps' size or with
// a prefix length too many are misfits.
func (a *Accelerator) place(peers []state.Peer) (
	wantPeers map[weftPrefix]weftPeer, wantNodes map[uint32]weftNode,
	lengths []uint8, misfits []state.Peer, fresh []uint32,
) {
	wantPeers, wantNodes = map[weftPrefix]weftPeer{}, map[uint32]weftNode{}
	lengths = commonLengths(peers)
	limit := int(a.objects.Peers.MaxEntries())
	for _, p := range peers {
		if len(wantPeers) >= limit || !slices.Contains(lengths, uint8(p.Prefix.Bits())) {
			misfits = append(misfits, p)
			continue
		}
		slot, isFresh, ok := a.slots.get(p.PublicIP, time.Now())
		if !ok {
			misfits = append(misfits, p)
			continue
		}
		if isFresh {
			fresh = append(fresh, slot)
		}
		wantPeers[toPrefix(p.Prefix)] = toPeer(p, slot)
		wantNodes[toBE32(p.PublicIP)] = weftNode{Remote: toBE32(p.PublicIP), Slot: slot}
	}
	return wantPeers, wantNodes, lengths, misfits, fresh
}

// commonLengths returns the prefix lengths that the programs look for: the
// most frequent maxPrefixLengths, longest first.
func commonLengths(peers []state.Peer) []uint8 {
	count := map[uint8]int{}
	for _, p := range peers {
		count[uint8(p.Prefix.Bits())]++
	}
	var lengths []uint8
	for bits := range count {
		lengths = append(lengths, bits)
	}
	slices.SortFunc(lengths, func(a, b uint8) int {
		return cmp.Or(cmp.Compare(count[b], count[a]), cmp.Compare(b, a))
	})
	lengths = lengths[:min(len(lengths), maxPrefixLengths)]
	slices.SortFunc(lengths, func(a, b uint8) int { return cmp.Compare(b, a) })
	return lengths
}

// clearSlot makes a slot as good as new for its next node.
func (a *Accelerator) clearSlot(slot uint32) error {
	if err := a.objects.PeerStates.Put(slot, weftPeerState{}); err != nil {
		return fmt.Errorf("clearing peer state %d: %w", slot, err)
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	if err := a.objects.PeerCounters.Put(slot, make([]weftCounters, cpus)); err != nil {
		return fmt.Errorf("clearing peer counters %d: %w", slot, err)
	}
	return nil
}

// put writes the wanted entries that are missing or different and returns the
// keys that nobody wants.
func put[K, V comparable](m *ebpf.Map, want map[K]V) (stale []K, err error) {
	have, err := readAll[K, V](m)
	if err != nil {
		return nil, err
	}
	for key := range have {
		if _, ok := want[key]; !ok {
			stale = append(stale, key)
		}
	}
	// A full map takes new entries only after old ones have gone.
	if len(stale) > 0 && len(have)+len(want) > int(m.MaxEntries()) {
		if err := remove(m, stale); err != nil {
			return nil, err
		}
		stale = nil
	}
	for key, value := range want {
		if old, ok := have[key]; ok && old == value {
			continue
		}
		if err := m.Put(key, value); err != nil {
			return stale, fmt.Errorf("entry %v: %w", key, err)
		}
	}
	return stale, nil
}

// remove deletes entries; one that is gone is no error.
func remove[K any](m *ebpf.Map, keys []K) error {
	var errs []error
	for _, key := range keys {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// readAll reads a hash map as a Go map. Nobody else writes while we hold the
// lock, so the iteration is complete.
func readAll[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	var (
		all   = map[K]V{}
		key   K
		value V
	)
	for it := m.Iterate(); ; {
		if !it.Next(&key, &value) {
			return all, it.Err()
		}
		all[key] = value
	}
}
