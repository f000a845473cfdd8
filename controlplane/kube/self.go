package kube

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// self is this node's part of the network: what its Node and its Offer come to.
type self struct {
	local state.Local
	lease flannel.Lease
}

// macs are the overlay devices' addresses. A family's is chosen once and kept.
type macs struct {
	v4, v6 state.MAC
}

// self joins what the API says of this node with what the node itself offers.
// An error says what is waited for, or what an operator has to change. What an
// operator's annotations have wrong comes as ignored, and stands for nothing.
func (r reader) self(o own, offer controlplane.Offer, m *macs) (me self, ignored, err error) {
	if me.lease, err = r.prefixes(o); err != nil {
		return self{}, nil, err
	}
	overrides, ignored := r.keys.ParseOverrides(o.annotations)
	c := r.config
	me.local = c.State().Local // its MTU
	me.local.Node, me.local.Uplink = r.node, offer.Uplink
	published := r.publishedMACs(o.annotations)
	if c.EnableIPv4 {
		ip := cmp.Or(overrides.NodePublicIP, offer.PublicIP)
		me.local.Address = cmp.Or(offer.Address, ip)
		me.lease.PublicIP = cmp.Or(overrides.PublicIPOverwrite, ip)
		m.v4 = chooseMAC(m.v4, published.v4, offer.MAC)
		me.lease.MAC, me.lease.VNI = m.v4, c.VNI
		me.local.Prefixes = append(me.local.Prefixes, me.lease.Prefix)
	}
	if c.EnableIPv6 {
		ip := cmp.Or(overrides.NodePublicIPv6, offer.PublicIPv6)
		me.local.AddressV6 = cmp.Or(offer.AddressV6, ip)
		me.lease.PublicIPv6 = cmp.Or(overrides.PublicIPv6Overwrite, ip)
		m.v6 = chooseMAC(m.v6, published.v6, offer.MACv6)
		me.lease.MACv6, me.lease.VNIv6 = m.v6, c.VNI
		me.local.Prefixes = append(me.local.Prefixes, me.lease.PrefixV6)
	}
	me.lease.BackendType = flannel.BackendType
	me.local.PublicIP, me.local.PublicIPv6 = me.lease.PublicIP, me.lease.PublicIPv6
	me.local.MAC, me.local.MACv6 = me.lease.MAC, me.lease.MACv6
	return me, ignored, me.complete(c)
}

// publishedMACs are those that the node told its peers before; what can't be
// read is none. They are kept even when everything else was taken from the
// Node, as flannel does, so addresses stand in for what may be missing.
func (r reader) publishedMACs(annotations map[string]string) macs {
	k := r.keys
	lease, _ := k.Parse(map[string]string{
		k.BackendType: flannel.BackendType,
		k.PublicIP:    "192.0.2.1", k.BackendData: annotations[k.BackendData],
		k.PublicIPv6: "2001:db8::1", k.BackendV6Data: annotations[k.BackendV6Data],
	})
	return macs{lease.MAC, lease.MACv6}
}

// prefixes reads the own Node's podCIDRs.
func (r reader) prefixes(o own) (flannel.Lease, error) {
	if !o.found {
		return flannel.Lease{}, fmt.Errorf("node %q is not in the Kubernetes API; waiting for its kubelet to register it (if the node has another name, set NODE_NAME)", r.node)
	}
	v4, v6, err := flannel.ParsePodCIDRs(o.podCIDR, o.podCIDRs)
	if err != nil {
		return flannel.Lease{}, fmt.Errorf("reading the podCIDRs of node %q: %w", r.node, err)
	}
	var faults []error
	lease := flannel.Lease{}
	if r.config.EnableIPv4 {
		lease.Prefix = v4
		faults = append(faults, r.inside("podCIDR", v4, "Network", r.config.Network))
	}
	if r.config.EnableIPv6 {
		lease.PrefixV6 = v6
		faults = append(faults, r.inside("IPv6 podCIDR", v6, "IPv6Network", r.config.IPv6Network))
	}
	return lease, errors.Join(faults...)
}

// inside checks the own prefix of one family.
func (r reader) inside(what string, p netip.Prefix, key string, network netip.Prefix) error {
	switch {
	case !p.IsValid():
		return fmt.Errorf("node %q has no %s yet; waiting for one: kube-controller-manager gives them out when it runs with --allocate-node-cidrs=true and a --cluster-cidr of that family, which should be %s", r.node, what, network)
	case network.Bits() > p.Bits() || !network.Contains(p.Addr()):
		return fmt.Errorf("%s %s of node %q lies outside %s %s of net-conf.json; make --cluster-cidr of kube-controller-manager and %s the same", what, p, r.node, key, network, key)
	}
	return nil
}

// complete checks that there is what peers have to be told.
func (s self) complete(c flannel.Config) error {
	var faults []error
	if c.EnableIPv4 && !s.lease.PublicIP.Is4() {
		faults = append(faults, fmt.Errorf("node %q has no IPv4 address for its peers to send to; give --iface or --public-ip", s.local.Node))
	}
	if c.EnableIPv6 && !s.lease.PublicIPv6.Is6() {
		faults = append(faults, fmt.Errorf("node %q has no IPv6 address for its peers to send to; give --iface or --public-ipv6", s.local.Node))
	}
	return errors.Join(faults...)
}

// chooseMAC keeps the MAC that was chosen. The first is what the peers were told
// before, else what the device has, else a new one.
func chooseMAC(chosen, published, offered state.MAC) state.MAC {
	if chosen = cmp.Or(chosen, published, offered); !chosen.IsZero() {
		return chosen
	}
	return state.RandomMAC()
}
