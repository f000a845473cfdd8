package etcd

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// ourLease is what this node publishes when it has these prefixes.
func (s *Store) ourLease(o controlplane.Offer, prefixes []netip.Prefix) flannel.Lease {
	l := flannel.Lease{BackendType: flannel.BackendType}
	if s.config.EnableIPv4 {
		l.PublicIP, l.MAC, l.VNI = o.PublicIP, s.mac, s.config.VNI
	}
	if s.config.EnableIPv6 {
		l.PublicIPv6, l.MACv6, l.VNIv6 = o.PublicIPv6, s.macV6, s.config.VNI
	}
	for _, p := range prefixes {
		if p.Addr().Is4() {
			l.Prefix = p
		} else {
			l.PrefixV6 = p
		}
	}
	return l
}

// complete says what an offer lacks in the network.
func (s *Store) complete(o controlplane.Offer) error {
	if s.config.EnableIPv4 && !o.PublicIP.Is4() {
		return fmt.Errorf("the network has IPv4 but this node has no IPv4 address that peers can send to; give uplink %q one, or --public-ip", o.Uplink)
	}
	if s.config.EnableIPv6 && !o.PublicIPv6.Is6() {
		return fmt.Errorf("the network has IPv6 but this node has no IPv6 address that peers can send to; give uplink %q one, or --public-ipv6", o.Uplink)
	}
	return nil
}

// settleMACs fixes our MACs when that has not been done: what the node has
// published before, what its devices have, or new ones.
func (s *Store) settleMACs(published flannel.Lease, o controlplane.Offer) {
	if s.mac.IsZero() {
		s.mac = firstMAC(published.MAC, o.MAC)
	}
	if s.macV6.IsZero() {
		s.macV6 = firstMAC(published.MACv6, o.MACv6)
	}
}

// firstMAC returns the first of the addresses that a device can have, else a
// new one.
func firstMAC(macs ...state.MAC) state.MAC {
	for _, mac := range macs {
		if !mac.IsZero() && mac[0]&1 == 0 {
			return mac
		}
	}
	return state.RandomMAC()
}

// state is what the node holds with a lease and these peers.
func (s *Store) state(o controlplane.Offer, own flannel.Lease, prefixes []netip.Prefix, peers []state.Peer) state.State {
	st := s.config.State()
	st.Local.Node = s.options.Node
	if st.Local.Node == "" {
		st.Local.Node = nodeName(own)
	}
	st.Local.Prefixes = prefixes
	st.Local.Uplink = o.Uplink
	if s.config.EnableIPv4 {
		st.Local.Address, st.Local.PublicIP, st.Local.MAC = o.Address, own.PublicIP, own.MAC
	}
	if s.config.EnableIPv6 {
		st.Local.AddressV6, st.Local.PublicIPv6, st.Local.MACv6 = o.AddressV6, own.PublicIPv6, own.MACv6
	}
	st.Peers = peers
	st.Sort()
	return st
}

// deadline is when a lease is to be renewed. The time since boot stands still
// while a machine sleeps, and the time of day may be set back: whichever comes
// first counts.
type deadline struct {
	set   bool
	since time.Time
	after time.Duration
}

// renewal is the deadline of a lease that was renewed now.
func (t timing) renewal(now time.Time, ttl time.Duration) deadline {
	after := ttl - t.Margin
	if after <= 0 {
		after = ttl / 2
	}
	// Nodes that were started together shall not renew together.
	early := min(after, ttl-after) / 10
	return deadline{set: true, since: now, after: after - rand.N(early+1)}
}

// Left is how long it is until the deadline; without one, very long.
func (d deadline) Left(now time.Time) time.Duration {
	if !d.set {
		return 1<<63 - 1
	}
	return d.after - max(now.Sub(d.since), now.Round(0).Sub(d.since.Round(0)))
}
