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

// noSlot is NO_SLOT of bpf/structs.h: a peer that only the source check knows.
const noSlot = ^uint32(0)

// Misfits are the peers that the accelerator can't carry; they ride the kernel
// path.
type Misfits struct {
	// NoRoom are those beyond MaxPeers. They come in when others go.
	NoRoom []state.Peer
	// Unknown are those that the source check does not know either: with a
	// prefix length too many (the programs look for the most frequent ones), or
	// beyond MAX_KNOWN prefixes.
	Unknown []state.Peer
}

// Len is the number of all misfits.
func (m Misfits) Len() int { return len(m.NoRoom) + len(m.Unknown) }

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
func (a *Accelerator) syncPeers(d Desired) (misfits Misfits, lengths []uint8, err error) {
	a.releaseSlots(d.Peers)
	want := a.place(d.Peers, d.Known)
	want.addAliases(d.Aliases, int(a.objects.Nodes.MaxEntries()))
	for _, slot := range want.fresh {
		if err := a.clearSlot(slot); err != nil {
			return want.misfits, want.lengths, err
		}
	}
	stalePeers, err := put(a.objects.Peers, want.peers)
	if err != nil {
		return want.misfits, want.lengths, fmt.Errorf("writing map peers: %w", err)
	}
	staleNodes, err := put(a.objects.Nodes, want.nodes)
	if err != nil {
		return want.misfits, want.lengths, fmt.Errorf("writing map nodes: %w", err)
	}
	err = errors.Join(remove(a.objects.Peers, stalePeers), remove(a.objects.Nodes, staleNodes))
	if err != nil {
		err = fmt.Errorf("removing stale peers: %w", err)
	}
	return want.misfits, want.lengths, err
}

// releaseSlots frees the slots of nodes that are no longer peers.
func (a *Accelerator) releaseSlots(peers []state.Peer) {
	keep := map[netip.Addr]bool{}
	for _, p := range peers {
		keep[p.PublicIP] = true
	}
	a.slots.release(keep, time.Now())
}

// placement is what the maps should hold.
type placement struct {
	peers   map[weftPrefix]weftPeer
	nodes   map[uint32]weftNode
	lengths []uint8  // of prefixes, longest first
	fresh   []uint32 // slots that change hands
	misfits Misfits
}

// place gives every peer its map entries, and a slot while there are any. Known
// ones get no slot.
func (a *Accelerator) place(peers, known []state.Peer) placement {
	want := placement{
		peers:   map[weftPrefix]weftPeer{},
		nodes:   map[uint32]weftNode{},
		lengths: commonLengths(slices.Concat(peers, known)),
	}
	limit := int(a.objects.Peers.MaxEntries())
	for _, p := range peers {
		if !want.finds(p) || len(want.peers) >= limit {
			want.misfits.Unknown = append(want.misfits.Unknown, p)
			continue
		}
		slot, fresh, ok := a.slots.get(p.PublicIP, time.Now())
		if !ok {
			slot = noSlot
			want.misfits.NoRoom = append(want.misfits.NoRoom, p)
		}
		if fresh {
			want.fresh = append(want.fresh, slot)
		}
		want.add(p, slot)
	}
	for _, p := range known {
		if _, taken := want.peers[toPrefix(p.Prefix)]; !taken && want.finds(p) && len(want.peers) < limit {
			want.add(p, noSlot)
		}
	}
	return want
}

func (w *placement) finds(p state.Peer) bool {
	return slices.Contains(w.lengths, uint8(p.Prefix.Bits()))
}

// add enters a peer. A node that has a slot for one of its prefixes keeps it.
func (w *placement) add(p state.Peer, slot uint32) {
	w.peers[toPrefix(p.Prefix)] = toPeer(p, slot)
	remote := toBE32(p.PublicIP)
	if have, ok := w.nodes[remote]; !ok || have.Slot == noSlot {
		w.nodes[remote] = weftNode{Remote: remote, Slot: slot}
	}
}

// addAliases enters further addresses of nodes, up to limit entries. A node can't
// claim what may be another's: a public IP, an address in somebody's pod prefix,
// or one that two nodes claim.
func (w *placement) addAliases(aliases []state.Alias, limit int) {
	claims := make(map[uint32]uint32, len(aliases)) // address → public IP; 0 when contested
	for _, alias := range aliases {
		if !alias.Addr.Is4() || !alias.PublicIP.Is4() || w.inPrefix(alias.Addr) {
			continue
		}
		addr, remote := toBE32(alias.Addr), toBE32(alias.PublicIP)
		if other, claimed := claims[addr]; claimed && other != remote {
			remote = 0
		}
		claims[addr] = remote
	}
	for _, alias := range aliases { // in order, so that the same ones find room each time
		if !alias.Addr.Is4() || len(w.nodes) >= limit {
			continue
		}
		addr := toBE32(alias.Addr)
		node, known := w.nodes[claims[addr]]
		if _, taken := w.nodes[addr]; known && !taken && node.Remote == claims[addr] {
			w.nodes[addr] = node
		}
	}
}

// inPrefix reports whether an address lies in a peer's pod prefix.
func (w *placement) inPrefix(addr netip.Addr) bool {
	for _, bits := range w.lengths {
		if prefix, err := addr.Prefix(int(bits)); err == nil {
			if _, ok := w.peers[toPrefix(prefix)]; ok {
				return true
			}
		}
	}
	return false
}

// HasRoom tells that a peer that found no slot would find one now.
func (a *Accelerator) HasRoom() bool { return a.slots.hasFree(time.Now()) }

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
