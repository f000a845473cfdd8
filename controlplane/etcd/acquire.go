package etcd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
)

// session is what is known over one connection.
type session struct {
	*Store
	client *clientv3.Client
	sink   controlplane.Sink

	// offer is the one that own is made of.
	offer controlplane.Offer
	// table has all leases as of revision, in the history of cluster.
	table    *table
	revision int64
	cluster  uint64
	// own is our lease.
	own entry
	// renew is when its etcd lease is to be renewed.
	renew   deadline
	changes changes
	tasks   tasks
}

// acquire lists the leases until ours is among them and as it should be. What
// it finds amiss it mends by one write, and looks again: so whatever others do
// meanwhile, the last look is how it is.
func (ss *session) acquire(ctx context.Context) error {
	const most = 20 // looks: some races may be lost
	for try := range most {
		if err := ss.list(ctx); err != nil {
			return err
		}
		done, err := ss.mend(ctx, try)
		if err != nil || done {
			return err
		}
		if try > 0 && !sleep(ctx, rand.N(100*time.Millisecond)) {
			return ctx.Err()
		}
	}
	return fmt.Errorf("acquiring a lease in etcd below %s: others were faster %d times; trying again", ss.directory, most)
}

// list reads all leases.
func (ss *session) list(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ss.timing.List)
	defer cancel()
	answer, err := ss.client.Get(ctx, ss.directory, clientv3.WithPrefix())
	if err != nil {
		return ss.explain("listing the leases in etcd below "+ss.directory, err)
	}
	ss.table = newTable(*ss.config)
	for _, kv := range answer.Kvs {
		ss.table.Put(strings.TrimPrefix(string(kv.Key), ss.directory), kv)
	}
	if ss.listed != nil {
		ss.table.After(ss.listed)
	}
	ss.listed = ss.table
	ss.revision, ss.cluster = answer.Header.Revision, answer.Header.ClusterId
	return nil
}

// mend does the first thing that is to be done about our lease, or finds
// nothing and has ss.own say what it is.
func (ss *session) mend(ctx context.Context, try int) (done bool, err error) {
	ss.offer = ss.offered()
	if err := ss.complete(ss.offer); err != nil {
		return false, err
	}
	own, found := ss.find()
	if !found {
		return false, ss.create(ctx, window<<min(try, 10))
	}
	ss.settleMACs(own.lease, ss.offer)
	if !ss.fits(own) {
		ss.log.Warn("our lease does not fit the network's configuration and is given up", "key", ss.directory+own.key)
		ss.before = append(slices.Clone(own.prefixes), ss.before...)
		return false, ss.remove(ctx, own)
	}
	if older, ok := ss.older(own); ok && own.key == ss.created {
		ss.log.Info("another node took an overlapping prefix a moment earlier; choosing again", "key", ss.directory+own.key, "theirs", ss.directory+older.key)
		err := ss.remove(ctx, own)
		ss.revoke(own.bound)
		return false, err
	}
	bound, err := ss.extend(ctx, own.bound)
	if err != nil {
		return false, err
	}
	own.lease = ss.ourLease(ss.offer, own.prefixes)
	value, err := flannel.MarshalLease(own.lease)
	if err != nil {
		return false, fmt.Errorf("writing our lease: %w", err)
	}
	if own.value != string(value) || own.bound != bound {
		own.value, own.bound = string(value), bound
		_, err := ss.write(ctx, own)
		return false, err
	}
	ss.hold(own)
	return true, nil
}

// find looks for our lease: the one that we held last, else one with our public
// IP, as flannel does. Of several one that fits counts, and of those one with a
// prefix that we had.
func (ss *session) find() (entry, bool) {
	ours := ss.ourLease(ss.offer, nil)
	if held, ok := ss.table.entries[ss.held.key]; ok && ss.held.key != "" {
		if held.modified == ss.held.modified || sameNode(held.lease, ours) || sameNode(held.lease, ss.held.lease) {
			return held, true
		}
	}
	var best entry
	found := false
	for _, e := range ss.table.entries {
		if sameNode(e.lease, ours) && (!found || ss.better(e, best)) {
			best, found = e, true
		}
	}
	return best, found
}

// better tells which of two leases of ours is kept.
func (ss *session) better(a, b entry) bool {
	if fa, fb := ss.fits(a), ss.fits(b); fa != fb {
		return fa
	}
	had := func(e entry) bool {
		return slices.ContainsFunc(e.prefixes, func(p netip.Prefix) bool { return slices.Contains(ss.before, p) })
	}
	if ha, hb := had(a), had(b); ha != hb {
		return ha
	}
	return a.key < b.key
}

// fits tells whether a lease has just the prefixes that the configuration asks
// for.
func (ss *session) fits(e entry) bool {
	want := spans(*ss.config)
	if len(e.prefixes) != len(want) {
		return false
	}
	for i, s := range want {
		if !s.Allows(e.prefixes[i]) {
			return false
		}
	}
	// With IPv6 gone the key still has its prefix.
	return e.key == flannel.LeaseKey(ss.ourLease(ss.offer, e.prefixes))
}

// older finds a lease of another node that overlaps ours and was there first.
func (ss *session) older(own entry) (entry, bool) {
	for _, e := range ss.table.entries {
		if e.key == own.key || e.created >= own.created {
			continue
		}
		for _, theirs := range e.prefixes {
			if slices.ContainsFunc(own.prefixes, theirs.Overlaps) {
				return e, true
			}
		}
	}
	return entry{}, false
}

// create takes a free prefix, unless somebody else is faster.
func (ss *session) create(ctx context.Context, most int) error {
	prefixes, err := choose(spans(*ss.config), ss.table.Taken(), ss.before, most, rand.IntN)
	if err != nil {
		return fmt.Errorf("acquiring a lease in etcd below %s: %w", ss.directory, err)
	}
	ss.settleMACs(flannel.Lease{}, ss.offer)
	own := entry{prefixes: prefixes, lease: ss.ourLease(ss.offer, prefixes)}
	own.key = flannel.LeaseKey(own.lease)
	value, err := flannel.MarshalLease(own.lease)
	if err != nil {
		return fmt.Errorf("writing our lease: %w", err)
	}
	own.value = string(value)
	if own.bound, err = ss.grant(ctx); err != nil {
		return err
	}
	revision, err := ss.write(ctx, own)
	if revision != 0 {
		ss.created = own.key
		ss.log.Info("acquired a lease in etcd", "key", ss.directory+own.key)
		return nil
	}
	ss.revoke(own.bound) // and with it the key, in case it was written after all
	return err
}

// write puts a lease of ours, if nobody has touched the key since it was last
// seen. It returns the revision that this made, 0 if somebody has.
func (ss *session) write(ctx context.Context, own entry) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, ss.timing.Answer)
	defer cancel()
	key := ss.directory + own.key
	var options []clientv3.OpOption
	if own.bound != 0 {
		options = append(options, clientv3.WithLease(own.bound))
	}
	answer, err := ss.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", own.modified)).
		Then(clientv3.OpPut(key, own.value, options...)).
		Commit()
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return 0, nil // it expired just now: look again
	}
	if err != nil {
		return 0, ss.explain("writing our lease to etcd, key "+key, err)
	}
	if !answer.Succeeded {
		return 0, nil
	}
	return answer.Header.Revision, nil
}

// remove deletes a lease of ours, if nobody has touched it since it was last
// seen.
func (ss *session) remove(ctx context.Context, own entry) error {
	ctx, cancel := context.WithTimeout(ctx, ss.timing.Answer)
	defer cancel()
	key := ss.directory + own.key
	_, err := ss.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", own.modified)).
		Then(clientv3.OpDelete(key)).
		Commit()
	if err != nil {
		return ss.explain("deleting our old lease in etcd, key "+key, err)
	}
	return nil
}

// grant makes a new etcd lease.
func (ss *session) grant(ctx context.Context) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, ss.timing.Answer)
	defer cancel()
	answer, err := ss.client.Grant(ctx, int64(ss.timing.TTL/time.Second))
	if err != nil {
		return 0, ss.explain("asking etcd for a lease", err)
	}
	ss.renew = ss.timing.renewal(time.Now(), time.Duration(answer.TTL)*time.Second)
	return answer.ID, nil
}

// revoke gives an etcd lease back that is not needed. If that fails it expires.
func (ss *session) revoke(id clientv3.LeaseID) {
	if id == 0 {
		return
	}
	// Also when we are told to stop just now.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ss.client.Ctx()), ss.timing.Answer)
	defer cancel()
	if _, err := ss.client.Revoke(ctx, id); err != nil {
		ss.log.Debug("giving a lease back to etcd", "error", err)
	}
}

// extend renews the etcd lease that our key is bound to, and returns the one
// that it should be bound to: a new one if it has been granted for less time
// than ours are. A reservation is bound to none.
func (ss *session) extend(ctx context.Context, id clientv3.LeaseID) (clientv3.LeaseID, error) {
	if id == 0 {
		ss.renew = deadline{}
		return 0, nil
	}
	ttl, err := ss.keepAlive(ctx, id)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) || err == nil && ttl < ss.timing.TTL {
		return ss.grant(ctx)
	}
	if err != nil {
		return 0, ss.explain("renewing our lease in etcd", err)
	}
	return id, nil
}

// keepAlive renews an etcd lease.
func (ss *session) keepAlive(ctx context.Context, id clientv3.LeaseID) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, ss.timing.Answer)
	defer cancel()
	answer, err := ss.client.KeepAliveOnce(ctx, id)
	if err != nil {
		return 0, err
	}
	ttl := time.Duration(answer.TTL) * time.Second
	ss.renew = ss.timing.renewal(time.Now(), ttl)
	return ttl, nil
}

// hold takes a lease as ours, for this session and for the next one to find.
func (ss *session) hold(own entry) {
	if before := ss.held.key; before != "" && before != own.key {
		ss.log.Warn("the node has another prefix than before; its pods have to be started again", "key", ss.directory+own.key,
			"before", ss.directory+before, "taken-by", nodeName(ss.table.entries[before].lease))
	}
	ss.own, ss.held, ss.created = own, own, ""
	ss.before = append(slices.Clone(own.prefixes), masked(ss.options.Previous)...)
}
