package kernel

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weft-net/weft/dataplane/state"
)

// choice is what became of the peers of one family.
type choice struct {
	served  []state.Peer
	failed  map[netip.Prefix]error
	skipped []netip.Prefix
}

// choosePeers says which of the peers the overlay o can serve, in the order
// of their prefixes. What a peer says of itself comes from a hostile world: a
// peer that cannot be right, or that would take another's traffic or ours, is
// refused with the reason, and the others are served.
//
// Where two peers exclude each other, the outcome depends on the peers alone,
// not on what was there before, so that all nodes and every restart agree:
//   - the same prefix, or the same MAC behind two underlay addresses: the first
//     in the order of prefix, then node, then underlay address, is served;
//   - a prefix inside another one: the wider is refused, since one peer that
//     claims a whole network must not take it from all the others.
//
// One MAC and underlay address behind several prefixes is one node with
// several prefixes, and fine. The MAC of a peer that is served by DirectRouting
// is not looked at.
func choosePeers(o overlay, own state.MAC, peers []state.Peer) choice {
	c := choice{failed: map[netip.Prefix]error{}}
	refuse := func(p state.Peer, format string, args ...any) {
		c.failed[p.Prefix] = fmt.Errorf("peer %s: %w", peerName(p), fmt.Errorf(format, args...))
	}

	// What can be seen from the peer alone.
	sound := make([]state.Peer, 0, len(peers))
	for _, p := range peers {
		switch {
		case !o.owns(p.Prefix.Addr()):
			// Another family's, or none at all.
			if !p.Prefix.IsValid() {
				refuse(p, "its pod prefix is not valid")
			}
		case p.MAC.IsZero() && !o.isDirect(p):
			c.skipped = append(c.skipped, p.Prefix)
		default:
			if err := checkPeer(o, own, p); err != nil {
				refuse(p, "%w", err)
				continue
			}
			sound = append(sound, p)
		}
	}
	slices.SortFunc(sound, comparePeers)

	// What can be seen from a peer and its neighbours in that order.
	kept := sound[:0]
	for _, p := range sound {
		if n := len(kept); n > 0 && kept[n-1].Prefix == p.Prefix {
			refuse(p, "peer %s has the same pod prefix and comes first", peerName(kept[n-1]))
			continue
		}
		kept = append(kept, p)
	}
	narrow := kept[:0]
	for i, p := range kept {
		// A prefix that holds others comes right before the first it holds.
		if i+1 < len(kept) && p.Prefix.Overlaps(kept[i+1].Prefix) {
			refuse(p, "its pod prefix holds that of peer %s", peerName(kept[i+1]))
			continue
		}
		narrow = append(narrow, p)
	}

	// What can be seen from all peers.
	byMAC := make(map[state.MAC]state.Peer, len(narrow))
	for _, p := range refuseUnderlay(narrow, refuse) {
		if o.isDirect(p) {
			c.served = append(c.served, p) // its MAC is not used
			continue
		}
		first, ok := byMAC[p.MAC]
		if ok && first.PublicIP != p.PublicIP {
			refuse(p, "its MAC %s, at %s, is also that of peer %s at %s, which comes first",
				p.MAC, p.PublicIP, peerName(first), first.PublicIP)
			continue
		}
		if !ok {
			byMAC[p.MAC] = p
		}
		c.served = append(c.served, p)
	}
	return c
}

// checkPeer tells what is wrong with one peer, whatever the others are.
func checkPeer(o overlay, own state.MAC, p state.Peer) error {
	switch {
	case p.Prefix != p.Prefix.Masked():
		return fmt.Errorf("its pod prefix has host bits set; it should be %s", p.Prefix.Masked())
	case o.network.IsValid() && !holds(o.network, p.Prefix):
		return fmt.Errorf("its pod prefix is not inside the overlay's network %s", o.network)
	case p.Prefix.Overlaps(o.prefix):
		return fmt.Errorf("its pod prefix overlaps this node's own, %s", o.prefix)
	case p.Prefix.Contains(o.local):
		return fmt.Errorf("its pod prefix holds this node's underlay address %s", o.local)
	case !p.PublicIP.IsValid():
		return errors.New("it has no public IP")
	case !o.owns(p.PublicIP):
		return fmt.Errorf("its public IP %s is of another family than its pod prefix", p.PublicIP)
	case !isUnicast(p.PublicIP):
		return fmt.Errorf("its public IP %s is not the address of one host", p.PublicIP)
	case p.PublicIP == o.local || p.PublicIP == o.publicIP:
		return fmt.Errorf("its public IP %s is this node's own", p.PublicIP)
	case o.isDirect(p):
		return nil
	case p.MAC[0]&1 != 0:
		return fmt.Errorf("its MAC %s is a group address", p.MAC)
	case p.MAC == own:
		return fmt.Errorf("its MAC %s is that of this node's %s", p.MAC, o.name)
	}
	return nil
}

// refuseUnderlay refuses peers whose pod prefix holds the underlay address of
// a peer: packets to that address would go into the overlay instead of
// carrying it. The peers are sorted and their prefixes do not overlap.
func refuseUnderlay(peers []state.Peer, refuse func(state.Peer, string, ...any)) []state.Peer {
	holding := map[int]state.Peer{} // index of the refused → whose address it holds
	for _, p := range peers {
		i, found := slices.BinarySearchFunc(peers, p.PublicIP, func(q state.Peer, a netip.Addr) int {
			return q.Prefix.Addr().Compare(a)
		})
		if !found {
			i-- // the last prefix that begins before the address
		}
		if i >= 0 && peers[i].Prefix.Contains(p.PublicIP) {
			if _, ok := holding[i]; !ok {
				holding[i] = p
			}
		}
	}
	if len(holding) == 0 {
		return peers
	}
	kept := make([]state.Peer, 0, len(peers))
	for i, p := range peers {
		if other, ok := holding[i]; ok {
			refuse(p, "its pod prefix holds the public IP %s of peer %s", other.PublicIP, peerName(other))
			continue
		}
		kept = append(kept, p)
	}
	return kept
}

// comparePeers is the order in which peers that exclude each other win.
func comparePeers(a, b state.Peer) int {
	return cmp.Or(
		a.Prefix.Addr().Compare(b.Prefix.Addr()),
		cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()),
		cmp.Compare(a.Node, b.Node),
		a.PublicIP.Compare(b.PublicIP),
		slices.Compare(a.MAC[:], b.MAC[:]),
	)
}

// peerName names a peer in errors. The node's name is foreign input: quoted.
func peerName(p state.Peer) string {
	if p.Node == "" {
		return p.Prefix.String()
	}
	return fmt.Sprintf("%s (node %q)", p.Prefix, p.Node)
}

// holds reports whether inner lies inside outer.
func holds(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// isUnicast reports whether an underlay address can be that of one other host.
func isUnicast(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() &&
		a.Zone() == "" && !a.Is4In6() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}
