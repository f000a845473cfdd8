//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
)

// wholeNode is the key of the node's own switch in the map switches.
var wholeNode = netip.IPv4Unspecified()

// syncSwitches carries the switches, which are kept by public IP, to where the
// programs look: the node's into runtime, a peer's into its slot.
func (a *Accelerator) syncSwitches() error {
	return carrySwitches(a.objects.Switches, a.objects.Runtime, a.objects.Nodes, a.objects.PeerStates)
}

func carrySwitches(switches, runtime, nodes, states *ebpf.Map) error {
	off, err := readAll[uint32, uint32](switches)
	if err != nil {
		return fmt.Errorf("reading map switches: %w", err)
	}
	if err := carryNodeSwitch(runtime, off[toBE32(wholeNode)]); err != nil {
		return err
	}
	peers, err := readAll[uint32, weftNode](nodes)
	if err != nil {
		return fmt.Errorf("reading map nodes: %w", err)
	}
	slots := slotsIn(maps.Values(peers), func(n weftNode) uint32 { return n.Slot })
	now, err := readSwitches(states, slots)
	if err != nil {
		return err
	}
	for _, node := range peers {
		if int(node.Slot) >= len(now) || now[node.Slot] == off[node.Remote] {
			continue // it has no slot, or the right switch
		}
		if err := carryPeerSwitch(states, node.Slot, off[node.Remote]); err != nil {
			return err
		}
	}
	return nil
}

// readSwitches reads what is off in the first n slots.
func readSwitches(states *ebpf.Map, n int) ([]uint32, error) {
	var off []uint32
	err := readArray(states, n, func(state []weftPeerState) { off = append(off, state[0].Off) })
	if err != nil {
		return nil, fmt.Errorf("reading map peer_states: %w", err)
	}
	return off, nil
}

func carryNodeSwitch(runtime *ebpf.Map, off uint32) error {
	var now weftInForce
	if err := runtime.Lookup(uint32(0), &now); err != nil {
		return fmt.Errorf("reading map runtime: %w", err)
	}
	if now.Off == off {
		return nil
	}
	now.Off = off
	if err := runtime.Put(uint32(0), now); err != nil {
		return fmt.Errorf("writing map runtime: %w", err)
	}
	return nil
}

// carryPeerSwitch writes a whole peer state back. The times in it may be some
// microseconds old by then, which costs at most one proof.
func carryPeerSwitch(states *ebpf.Map, slot, off uint32) error {
	var now weftPeerState
	if err := states.Lookup(slot, &now); err != nil {
		return fmt.Errorf("reading peer state %d: %w", slot, err)
	}
	now.Off = off
	if err := states.Put(slot, now); err != nil {
		return fmt.Errorf("writing peer state %d: %w", slot, err)
	}
	return nil
}

// The paths that can be switched off, as bits of what SetAccel is given.
const (
	Base    = uint32(weftOffOFF_BASE)
	Express = uint32(weftOffOFF_EXPRESS)
)

// SetAccel switches the paths on or off: for the nodes with these public IPs, or
// for the whole node when there are none. It is effective on the next packet and
// kept in the pins, so it outlives the agent. A node need not be a peer yet. IPv6
// peers are left out.
func SetAccel(dir string, paths uint32, on bool, peers []netip.Addr) error {
	peers, err := switchable(peers)
	if err != nil {
		return err
	}
	unlock, err := lock(dir)
	if err != nil {
		return err
	}
	defer unlock()

	m := map[string]*ebpf.Map{}
	defer func() { closeAll(m) }()
	for _, name := range []string{weftMapSwitches, weftMapRuntime, weftMapNodes, weftMapPeerStates} {
		if m[name], err = ebpf.LoadPinnedMap(filepath.Join(dir, name), nil); err != nil {
			delete(m, name)
			return fmt.Errorf("opening pinned map %s: %w", name, err)
		}
	}
	for _, peer := range peers {
		if err := setSwitch(m[weftMapSwitches], peer, paths, on); err != nil {
			return err
		}
	}
	return carrySwitches(m[weftMapSwitches], m[weftMapRuntime], m[weftMapNodes], m[weftMapPeerStates])
}

// switchable are those peers that have switches: the whole node if none was named.
// IPv6 rides the kernel path in any case, so that its public IPs have none.
func switchable(peers []netip.Addr) ([]netip.Addr, error) {
	if len(peers) == 0 {
		return []netip.Addr{wholeNode}, nil
	}
	have := slices.DeleteFunc(slices.Clone(peers), netip.Addr.Is6)
	if len(have) == 0 {
		return nil, fmt.Errorf("IPv6 rides the kernel path always: there is nothing to switch for %v", peers[0])
	}
	return have, nil
}

func setSwitch(switches *ebpf.Map, peer netip.Addr, paths uint32, on bool) error {
	var off uint32
	if err := switches.Lookup(toBE32(peer), &off); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("reading the switch of %v: %w", peer, err)
	}
	if on {
		off &^= paths
	} else {
		off |= paths
	}
	if off == 0 {
		return remove(switches, []uint32{toBE32(peer)})
	}
	if err := switches.Put(toBE32(peer), off); err != nil {
		return fmt.Errorf("switching off %v: %w", peer, err)
	}
	return nil
}
