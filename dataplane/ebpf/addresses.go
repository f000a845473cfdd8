//go:build linux

package ebpf

import (
	"fmt"
	"maps"

	"github.com/weft-net/weft/dataplane/state"
)

// peerAddresses are the addresses that peers answer on.
func peerAddresses(peers ...[]state.Peer) map[uint32]uint32 {
	all := map[uint32]uint32{}
	for _, list := range peers {
		for _, p := range list {
			all[toBE32(p.PublicIP)] = 1
			for _, addr := range state.NodeAddresses(p.Prefix) {
				all[toBE32(addr)] = 1
			}
		}
	}
	return all
}

// ownAddressesRoom is how many entries of the map node_addresses are kept free for
// this node's own addresses.
const ownAddressesRoom = 1024

// addAliasAddresses adds the further addresses that peers answer on, while there
// is room.
func (a *Accelerator) addAliasAddresses(aliases []state.Alias) {
	limit := int(a.objects.NodeAddresses.MaxEntries()) - ownAddressesRoom
	for _, alias := range aliases {
		if alias.Addr.Is4() && len(a.peerAddresses) < limit {
			a.peerAddresses[toBE32(alias.Addr)] = 1
		}
	}
}

// syncNodeAddresses writes the addresses that nodes answer on: pods must not send
// to the VXLAN port there. Those of the peers come with Sync, our own with
// SyncPods. The map is read once, when it is not known what it holds.
func (a *Accelerator) syncNodeAddresses() error {
	want := map[uint32]uint32{}
	maps.Copy(want, a.peerAddresses)
	for _, ip := range a.own {
		if ip.Is4() {
			want[toBE32(ip)] = 1
		}
	}
	have := a.nodeAddresses
	if maps.Equal(want, have) {
		return nil
	}
	a.nodeAddresses = nil
	err := a.writeNodeAddresses(have, want)
	if err != nil {
		return fmt.Errorf("writing map node_addresses: %w", err)
	}
	a.nodeAddresses = want
	return nil
}

// writeNodeAddresses makes the map hold what is wanted. Before our own addresses are
// known those of an agent before us stay, and are wanted from then on.
func (a *Accelerator) writeNodeAddresses(have, want map[uint32]uint32) (err error) {
	if have == nil {
		if have, err = readAll[uint32, uint32](a.objects.NodeAddresses); err != nil {
			return err
		}
	}
	stale, err := putOver(a.objects.NodeAddresses, have, want)
	if err != nil {
		return err
	}
	if a.own != nil {
		return remove(a.objects.NodeAddresses, stale)
	}
	for _, addr := range stale {
		want[addr] = 1
	}
	return nil
}
