package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// maxAddresses bounds how many of a Node's status addresses are looked at.
// Kubelets and cloud providers write a handful.
const maxAddresses = 16

// reader reads Nodes, and keeps what is needed of them.
type reader struct {
	keys   flannel.AnnotationKeys
	config flannel.Config
	// node is the own Node's name.
	node string
}

// neighbor is another node: what its Node says of it.
type neighbor struct {
	name string
	// created is when its Node was, in seconds since 1970.
	created int64
	// peers are its pod prefixes, one at most in each family.
	peers []state.Peer
	// addresses are its Node's status addresses, in their order.
	addresses []netip.Addr
	// unread are its pod prefixes of which it says something that can't be used.
	unread []netip.Prefix
	// fault says what of the Node can't be used.
	fault string
}

// says tells whether there is anything to it.
func (n neighbor) says() bool { return len(n.peers) > 0 || n.fault != "" }

// equal tells whether the two say the same.
func (n neighbor) equal(o neighbor) bool {
	return n.name == o.name && n.created == o.created && n.fault == o.fault &&
		slices.Equal(n.peers, o.peers) && slices.Equal(n.addresses, o.addresses)
}

// after fills in what the same Node said before, of prefixes of which it now says
// nothing that can be used: as flannel does, we go by that until it says something
// better, or is deleted.
func (n neighbor) after(old neighbor) neighbor {
	if old.created != n.created {
		return n // another Node of that name
	}
	for _, prefix := range n.unread {
		of := func(p state.Peer) bool { return p.Prefix == prefix }
		i := slices.IndexFunc(old.peers, of)
		if i < 0 || old.peers[i].MAC.IsZero() {
			continue // nothing sound before
		}
		n.peers = append(slices.DeleteFunc(slices.Clone(n.peers), of), old.peers[i])
		n.fault = shorten(fmt.Sprintf("going by what it said before of %s: %s", prefix, n.fault))
	}
	return n
}

// own is this node's own Node: what is read of it, as it is there.
type own struct {
	// found says that there is one.
	found bool
	// version orders what is seen of it.
	version     string
	annotations map[string]string
	podCIDR     string
	podCIDRs    []string
	network     condition
}

// condition is the Node's condition NetworkUnavailable. It is zero when there
// is none.
type condition struct {
	status, reason, message string
}

// equal tells whether both say the same. Their versions may differ: kubelets
// write to their Nodes all the time.
func (o own) equal(p own) bool {
	return o.found == p.found && o.podCIDR == p.podCIDR && o.network == p.network &&
		slices.Equal(o.podCIDRs, p.podCIDRs) && maps.Equal(o.annotations, p.annotations)
}

// trim returns a Node with nothing in it but what is read here: of the tens of
// kilobytes that a Node has, most are the names of images.
func (r reader) trim(object any) (any, error) {
	node, ok := object.(*corev1.Node)
	if !ok {
		return object, nil
	}
	small := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion, CreationTimestamp: node.CreationTimestamp,
		Annotations: r.ours(node.Annotations),
	}}
	small.Spec.PodCIDR, small.Spec.PodCIDRs = node.Spec.PodCIDR, node.Spec.PodCIDRs
	small.Status.Addresses = node.Status.Addresses[:min(len(node.Status.Addresses), maxAddresses)]
	if node.Name == r.node {
		small.Status.Conditions = node.Status.Conditions
	}
	return small, nil
}

// ours are the annotations that mean something here.
func (r reader) ours(all map[string]string) map[string]string {
	some := map[string]string{}
	for _, key := range r.keys.All() {
		if value, ok := all[key]; ok {
			some[key] = value
		}
	}
	return some
}

// neighbor reads another node's Node. A node that takes no part has no peers.
func (r reader) neighbor(node *corev1.Node) neighbor {
	n := neighbor{name: node.Name, created: node.CreationTimestamp.Unix()}
	if !r.keys.IsManaged(node.Annotations) {
		return n
	}
	lease, err := r.lease(node)
	peers, peersErr := lease.Peers(node.Name, r.config)
	if err = cmp.Or(peersErr, err); err != nil {
		n.fault = short(err)
	}
	n.unread = lease.Unread(r.config)
	if len(peers) > 0 || len(n.unread) > 0 {
		n.peers, n.addresses = peers, r.addresses(node.Status.Addresses)
	}
	return n
}

// lease reads a node's lease. What can be used comes beside the error.
func (r reader) lease(node *corev1.Node) (flannel.Lease, error) {
	v4, v6, err := flannel.ParsePodCIDRs(node.Spec.PodCIDR, node.Spec.PodCIDRs)
	if err != nil || !v4.IsValid() && !v6.IsValid() {
		return flannel.Lease{}, err // or it has annotated itself before it was given a prefix
	}
	lease, err := r.keys.Parse(node.Annotations)
	lease.Prefix, lease.PrefixV6 = v4, v6
	return lease, err
}

// addresses reads the status addresses from which a node's packets may come.
func (r reader) addresses(all []corev1.NodeAddress) []netip.Addr {
	var addresses []netip.Addr
	for _, a := range all[:min(len(all), maxAddresses)] {
		if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
			continue
		}
		addr, err := netip.ParseAddr(a.Address)
		if err != nil || addr.Zone() != "" || !addr.Unmap().IsGlobalUnicast() || r.isPod(addr.Unmap()) {
			continue
		}
		if addr = addr.Unmap(); !slices.Contains(addresses, addr) {
			addresses = append(addresses, addr)
		}
	}
	return addresses
}

// isPod tells whether an address belongs to a pod of some node, and so can't be
// a node's own.
func (r reader) isPod(addr netip.Addr) bool {
	return slices.ContainsFunc(r.config.Networks(), func(n netip.Prefix) bool { return n.Contains(addr) })
}

// own reads the own Node.
func (r reader) own(node *corev1.Node) own {
	o := own{
		found: true, version: node.ResourceVersion, annotations: r.ours(node.Annotations),
		podCIDR: node.Spec.PodCIDR, podCIDRs: node.Spec.PodCIDRs,
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable {
			o.network = condition{string(c.Status), c.Reason, c.Message}
		}
	}
	return o
}

// short is an error's text in a line of bounded length: it may cite what a
// stranger has written.
func short(err error) string { return shorten(oneLine(err)) }

// shorten bounds a line.
func shorten(text string) string {
	const limit = 300
	if len(text) > limit {
		text = fmt.Sprintf("%.*s…", limit, text)
	}
	return text
}
