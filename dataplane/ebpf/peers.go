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

// Misfits are the peers that there is no room for. The IPv4 ones ride the kernel
// path, the IPv6 ones are not counted.
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

func (m *Misfits) add(other Misfits) {
	m.NoRoom = append(m.NoRoom, other.NoRoom...)
	m.Unknown = append(m.Unknown, other.Unknown...)
}

// maxPrefixLengths is PREFIX_LENGTHS of bpf/constants.h.
const maxPrefixLengths = len(weftInForce{}.PrefixBits)

// recoverSlots learns from the maps of nodes which slots are given, so that
// counters go on where a former agent left them.
func (a *Accelerator) recoverSlots() (err error) {
	if a.slots, err = readSlots(a.objects.PeerCounters, a.objects.Nodes, fromBE32, fromNode); err != nil {
		return fmt.Errorf("reading map nodes: %w", err)
	}
	if a.slots6, err = readSlots(a.objects.Peer6Counters, a.objects.Nodes6, fromAddress6, fromNode6); err != nil {
		return fmt.Errorf("reading map nodes6: %w", err)
	}
	return nil
}

// readSlots reads a map of nodes; a map of counters says how many slots there are.
func readSlots[K comparable, V any](counters, nodes *ebpf.Map, addr func(K) netip.Addr, node func(V) member) (slots, error) {
	s := newSlots(int(counters.MaxEntries()))
	have, err := readAll[K, V](nodes)
	for key, value := range have {
		if n := node(value); addr(key) == n.remote {
			s.adopt(n.remote, n.slot)
		}
	}
	return s, err
}

// syncPeers brings the maps of IPv4 peers and nodes to what is desired.
func (a *Accelerator) syncPeers(d Desired) (placement, error) {
	want := place(&a.slots, int(a.objects.Peers.MaxEntries()), ofFamily(d.Peers, netip.Addr.Is4), ofFamily(d.Known, netip.Addr.Is4))
	want.addAliases(d.Aliases, int(a.objects.Nodes.MaxEntries()), netip.Addr.Is4)
	if err := a.clearSlots(want.fresh); err != nil {
		return want, err
	}
	return want, writePeers(
		a.objects.Peers, convert(want.peers, toPrefix, toPeer),
		a.objects.Nodes, convert(want.nodes, toBE32, toNode),
	)
}

// syncPeers6 is syncPeers for IPv6.
func (a *Accelerator) syncPeers6(d Desired) (placement, error) {
	want := place(&a.slots6, int(a.objects.Peers6.MaxEntries()), ofFamily(d.Peers, netip.Addr.Is6), ofFamily(d.Known, netip.Addr.Is6))
	want.addAliases(d.Aliases, int(a.objects.Nodes6.MaxEntries()), netip.Addr.Is6)
	if err := clearArray[weftPathCounters](a.objects.Peer6Counters, want.fresh); err != nil {
		return want, fmt.Errorf("clearing what other nodes have left: %w", err)
	}
	return want, writePeers(
		a.objects.Peers6, convert(want.peers, toPrefix6, toPeer6),
		a.objects.Nodes6, convert(want.nodes, toAddress6, toNode6),
	)
}

// ofFamily are the peers of one address family.
func ofFamily(peers []state.Peer, is func(netip.Addr) bool) []state.Peer {
	var of []state.Peer
	for _, p := range peers {
		if is(p.Prefix.Addr()) && is(p.PublicIP) {
			of = append(of, p)
		}
	}
	return of
}

// convert makes of what is to be in a map the map's keys and values.
func convert[K1, V1, K2, V2 comparable](m map[K1]V1, key func(K1) K2, value func(V1) V2) map[K2]V2 {
	out := make(map[K2]V2, len(m))
	for k, v := range m {
		out[key(k)] = value(v)
	}
	return out
}

// member is the node that a pod prefix or an address belongs to. The MAC is only
// kept with prefixes.
type member struct {
	remote netip.Addr // its public IP
	slot   uint32
	mac    state.MAC
}

// placement is what the maps of one address family should hold.
type placement struct {
	peers   map[netip.Prefix]member
	nodes   map[netip.Addr]member
	lengths []uint8  // of prefixes, longest first
	fresh   []uint32 // slots that change hands
	misfits Misfits
}

// place gives every peer its map entries, of which prefixes may have so many, and
// a slot while there are any; nodes that are no longer peers lose theirs. Known
// ones get no slot.
func place(s *slots, limit int, peers, known []state.Peer) placement {
	want := placement{
		peers:   map[netip.Prefix]member{},
		nodes:   map[netip.Addr]member{},
		lengths: commonLengths(slices.Concat(peers, known)),
	}
	now := time.Now()
	s.release(publicIPs(peers), now)
	for _, p := range peers {
		if !want.finds(p) || len(want.peers) >= limit {
			want.misfits.Unknown = append(want.misfits.Unknown, p)
			continue
		}
		slot, fresh, ok := s.get(p.PublicIP, now)
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
		if _, taken := want.peers[p.Prefix]; !taken && want.finds(p) && len(want.peers) < limit {
			want.add(p, noSlot)
		}
	}
	return want
}

func publicIPs(peers []state.Peer) map[netip.Addr]bool {
	ips := map[netip.Addr]bool{}
	for _, p := range peers {
		ips[p.PublicIP] = true
	}
	return ips
}

func (w *placement) finds(p state.Peer) bool {
	return slices.Contains(w.lengths, uint8(p.Prefix.Bits()))
}

// add enters a peer. A node that has a slot for one of its prefixes keeps it.
func (w *placement) add(p state.Peer, slot uint32) {
	w.peers[p.Prefix] = member{remote: p.PublicIP, slot: slot, mac: p.MAC}
	if have, ok := w.nodes[p.PublicIP]; !ok || have.slot == noSlot {
		w.nodes[p.PublicIP] = member{remote: p.PublicIP, slot: slot}
	}
}

// addAliases enters further addresses of nodes, of one address family, up to limit
// entries. A node can't claim what may be another's: a public IP, an address in
// somebody's pod prefix, or one that two nodes claim.
func (w *placement) addAliases(aliases []state.Alias, limit int, is func(netip.Addr) bool) {
	claims := make(map[netip.Addr]netip.Addr, len(aliases)) // address → public IP; invalid when contested
	for _, alias := range aliases {
		if !is(alias.Addr) || !is(alias.PublicIP) || w.inPrefix(alias.Addr) {
			continue
		}
		remote := alias.PublicIP
		if other, claimed := claims[alias.Addr]; claimed && other != remote {
			remote = netip.Addr{}
		}
		claims[alias.Addr] = remote
	}
	for _, alias := range aliases { // in order, so that the same ones find room each time
		if len(w.nodes) >= limit {
			return
		}
		node, known := w.nodes[claims[alias.Addr]]
		if _, taken := w.nodes[alias.Addr]; known && !taken && node.remote == claims[alias.Addr] {
			w.nodes[alias.Addr] = node
		}
	}
}

// inPrefix reports whether an address lies in a peer's pod prefix.
func (w *placement) inPrefix(addr netip.Addr) bool {
	for _, bits := range w.lengths {
		if prefix, err := addr.Prefix(int(bits)); err == nil {
			if _, ok := w.peers[prefix]; ok {
				return true
			}
		}
	}
	return false
}

// HasRoom tells that one of the peers that found no slot would find one now.
func (a *Accelerator) HasRoom(m Misfits) bool {
	now := time.Now()
	return a.slots.hasFree(now) && len(ofFamily(m.NoRoom, netip.Addr.Is4)) > 0 ||
		a.slots6.hasFree(now) && len(ofFamily(m.NoRoom, netip.Addr.Is6)) > 0
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

// clearSlots makes slots as good as new for their next nodes.
func (a *Accelerator) clearSlots(slots []uint32) error {
	err := errors.Join(
		clearArray[weftPeerState](a.objects.PeerStates, slots),
		clearArray[weftCounters](a.objects.PeerCounters, slots),
	)
	if err != nil {
		return fmt.Errorf("clearing what other nodes have left: %w", err)
	}
	return nil
}

// writePeers makes the maps of peers and nodes hold what is wanted and nothing
// else. What is new goes in before what is old goes out.
func writePeers[P, PV, N, NV comparable](peers *ebpf.Map, wantPeers map[P]PV, nodes *ebpf.Map, wantNodes map[N]NV) error {
	stalePeers, err := put(peers, wantPeers)
	if err != nil {
		return fmt.Errorf("writing the map of peers: %w", err)
	}
	staleNodes, err := put(nodes, wantNodes)
	if err != nil {
		return fmt.Errorf("writing the map of nodes: %w", err)
	}
	if err := errors.Join(remove(peers, stalePeers), remove(nodes, staleNodes)); err != nil {
		return fmt.Errorf("removing stale peers: %w", err)
	}
	return nil
}
