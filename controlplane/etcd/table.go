package etcd

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/weft-net/weft/controlplane/claims"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// maxValue is the size of the greatest value that is looked at, in bytes. That
// of a lease of both families is below 300.
const maxValue = 4096

// table has the leases of all nodes, ours too, as etcd has them.
type table struct {
	config  flannel.Config
	entries map[string]entry
}

// entry is one lease.
type entry struct {
	// key is its last part.
	key   string
	value string
	// created and modified are revisions; a lease that was there first was
	// created by the lower one.
	created, modified int64
	// bound is the etcd lease that it expires with; a reservation has none.
	bound clientv3.LeaseID
	// prefixes are those of the key, IPv4 first. They are taken, whatever the
	// value says; none if it is not the key of a lease.
	prefixes []netip.Prefix
	// lease is what key and value say, as far as that can be read.
	lease flannel.Lease
	// peers is what that makes of the node, and fault why it makes no more.
	peers []state.Peer
	fault error
}

// newTable makes an empty table.
func newTable(c flannel.Config) *table {
	return &table{config: c, entries: map[string]entry{}}
}

// Put takes what etcd has below the last part of a key.
func (t *table) Put(key string, kv *mvccpb.KeyValue) {
	e := entry{key: key, created: kv.CreateRevision, modified: kv.ModRevision, bound: clientv3.LeaseID(kv.Lease)}
	v4, v6, err := flannel.ParseLeaseKey(key)
	if err != nil {
		e.fault = err
		t.entries[key] = e
		return
	}
	// A node without IPv4 has 0.0.0.0/0 in its key.
	if v4.IsValid() && t.config.EnableIPv4 {
		e.prefixes = append(e.prefixes, v4)
	}
	if v6.IsValid() && t.config.EnableIPv6 {
		e.prefixes = append(e.prefixes, v6)
	}
	if len(kv.Value) > maxValue {
		e.lease = flannel.Lease{Prefix: v4, PrefixV6: v6, Broken: true, BrokenV6: true}
		e.fault = fmt.Errorf("its value has %d bytes, and more than %d are not looked at", len(kv.Value), maxValue)
	} else {
		e.value = string(kv.Value)
		e.lease, err = flannel.ParseLease(key, kv.Value)
		// What is wrong with one family does not harm the other.
		e.peers, e.fault = e.lease.Peers(nodeName(e.lease), t.config)
		e.fault = errors.Join(err, e.fault)
	}
	t.entries[key] = e.after(t.entries[key], t.config)
}

// After fills in what was known before of leases that are still there and say
// nothing now that can be used.
func (t *table) After(before *table) {
	for key, e := range t.entries {
		t.entries[key] = e.after(before.entries[key], t.config)
	}
}

// after fills in what the same lease said before, of prefixes of which it now says
// nothing that can be used: as flannel does, we go by that until it says something
// better, or is deleted.
func (e entry) after(old entry, c flannel.Config) entry {
	if old.created != e.created {
		return e // another lease of that key
	}
	for _, prefix := range e.lease.Unread(c) {
		of := func(p state.Peer) bool { return p.Prefix == prefix }
		i := slices.IndexFunc(old.peers, of)
		if i < 0 || old.peers[i].MAC.IsZero() {
			continue // nothing sound before
		}
		e.peers = append(slices.DeleteFunc(slices.Clone(e.peers), of), old.peers[i])
		e.fault = fmt.Errorf("going by what it said before of %s: %w", prefix, e.fault)
	}
	return e
}

// Delete forgets a key.
func (t *table) Delete(key string) { delete(t.entries, key) }

// Taken lists the prefixes that somebody has.
func (t *table) Taken() []netip.Prefix {
	var list []netip.Prefix
	for _, e := range t.entries {
		list = append(list, e.prefixes...)
	}
	return list
}

// Peers lists the peers of the node with the lease own, in no order, and says
// by the keys of their leases what is wrong with those that are left out. What
// several claim is ours (see claims.Judgement), and then that of the lease that is
// oldest.
func (t *table) Peers(own entry) ([]state.Peer, map[string]error) {
	others := slices.SortedFunc(maps.Values(t.entries), func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.created, b.created), cmp.Compare(a.key, b.key))
	})
	var prefixes claims.Lengths
	for _, e := range others {
		for _, p := range e.peers {
			prefixes.Note(p.Prefix)
		}
	}
	l := own.lease
	judgement := claims.NewJudgement(state.Local{
		Node: nodeName(l), Prefixes: own.prefixes, PublicIP: l.PublicIP, PublicIPv6: l.PublicIPv6, MAC: l.MAC, MACv6: l.MACv6,
	}, prefixes)
	peers := make([]state.Peer, 0, len(others))
	faults := map[string]error{}
	for _, e := range others {
		if e.key == own.key || sameNode(e.lease, own.lease) {
			continue // ours, or left behind by us: there is nothing to send ourselves
		}
		if e.fault != nil {
			faults[e.key] = e.fault
		}
		for _, p := range e.peers {
			p, why := judgement.Peer(p)
			if why != "" {
				faults[e.key] = errors.Join(faults[e.key], errors.New(why))
			}
			if p.Prefix.IsValid() {
				peers = append(peers, p)
			}
		}
	}
	return peers, faults
}

// sameNode tells whether two leases are those of one node, which flannel knows
// by its public IP.
func sameNode(a, b flannel.Lease) bool {
	if a.PublicIP.IsValid() || b.PublicIP.IsValid() {
		return a.PublicIP == b.PublicIP
	}
	return a.PublicIPv6.IsValid() && a.PublicIPv6 == b.PublicIPv6
}

// nodeName is what a node is called by its peers: nothing in etcd names it.
func nodeName(l flannel.Lease) string {
	switch {
	case l.PublicIP.IsValid():
		return l.PublicIP.String()
	case l.PublicIPv6.IsValid():
		return l.PublicIPv6.String()
	}
	return "nobody"
}
