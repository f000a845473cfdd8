package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"github.com/weft-net/weft/controlplane/flannel"
)

// follow watches the leases and keeps ours, until one of the two can't be done
// from where we are.
func (ss *session) follow(ctx context.Context) error {
	events, err := ss.watch(ctx)
	if err != nil {
		return err
	}
	connection := watchConnection(ctx, ss.client.ActiveConnection())
	for {
		select {
		case <-ctx.Done():
			return nil
		case answer, open := <-events:
			if err := ss.take(answer, open); err != nil {
				return err
			}
		case <-ss.announced:
			ss.changes.Note(time.Now())
			ss.tasks.Soon(0)
		case up := <-connection:
			ss.doubt(up)
		case <-time.After(ss.wait(time.Now())):
		}
		if ss.changes.Due(ss.timing, time.Now()) {
			ss.changes = changes{}
			ss.deliver()
		}
		if err := ss.work(ctx); err != nil {
			return err
		}
	}
}

// watch asks for everything that has happened below the directory since it was
// listed. The client asks again by itself when a connection fails.
func (ss *session) watch(ctx context.Context) (clientv3.WatchChan, error) {
	// It returns when etcd has answered, and asks for as long as its context is
	// not done.
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	limit := time.AfterFunc(ss.timing.Answer, cancel)
	events := ss.client.Watch(ctx, ss.directory, clientv3.WithPrefix(), clientv3.WithRev(ss.revision+1),
		clientv3.WithProgressNotify()) // so that it can ask again for what has not been compacted, when nothing happens for long
	if !limit.Stop() {
		return nil, ss.explain("watching the leases in etcd below "+ss.directory, context.DeadlineExceeded)
	}
	return events, nil
}

// take enters an answer of the watch into the table.
func (ss *session) take(answer clientv3.WatchResponse, open bool) error {
	doing := "watching the leases in etcd below " + ss.directory
	if !open {
		return ending{fmt.Errorf("%s: the watch has ended; listing them again", doing)}
	}
	if err := answer.Err(); err != nil {
		if answer.CompactRevision != 0 || errors.Is(err, rpctypes.ErrCompacted) {
			ss.log.Info("etcd has compacted what the watch would tell next; listing the leases again", "revision", answer.CompactRevision)
		}
		return ending{ss.explain(doing, err)}
	}
	for _, event := range answer.Events {
		key := strings.TrimPrefix(string(event.Kv.Key), ss.directory)
		if event.Type == clientv3.EventTypeDelete {
			ss.table.Delete(key)
		} else {
			ss.table.Put(key, event.Kv)
		}
		if key == ss.own.key {
			if err := ss.ownChanged(event); err != nil {
				return err
			}
			continue
		}
		ss.changes.Note(time.Now())
	}
	ss.revision = max(ss.revision, answer.Header.Revision)
	return nil
}

// ownChanged judges an event about our lease. What we wrote ourselves comes
// back too.
func (ss *session) ownChanged(event *clientv3.Event) error {
	key := ss.directory + ss.own.key
	switch {
	case event.Kv.ModRevision <= ss.own.modified:
		return nil
	case event.Type == clientv3.EventTypeDelete:
		return ending{fmt.Errorf("our lease in etcd, key %s, has been deleted or has expired; acquiring one again", key)}
	case string(event.Kv.Value) != ss.own.value:
		return ending{fmt.Errorf("our lease in etcd, key %s, has been rewritten by somebody else: %s; looking again", key, clip(string(event.Kv.Value)))}
	}
	// It says the same, but may expire with another etcd lease: a flanneld that
	// is to take our place writes it so.
	ss.own.modified, ss.own.bound = event.Kv.ModRevision, clientv3.LeaseID(event.Kv.Lease)
	ss.held = ss.own
	ss.renew = deadline{}
	if ss.own.bound != 0 {
		ss.renew = deadline{set: true} // long past: renew it now
	}
	ss.tasks.Soon(0)
	return nil
}

// clip cuts a text to what a log line can bear.
func clip(text string) string {
	const most = 300
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}

// deliver hands over what the table says.
func (ss *session) deliver() {
	offer := ss.offered()
	if ss.complete(offer) != nil {
		offer = ss.offer // the task that publishes it complains
	}
	own := ss.own
	own.lease = ss.ourLease(offer, own.prefixes)
	peers, faults := ss.table.Peers(own)
	ss.notice(faults)
	ss.Store.deliver(ss.sink, ss.state(offer, own.lease, own.prefixes, peers))
}

// changes remembers when something has changed that is not delivered yet.
type changes struct{ first, last time.Time }

// Note takes a change.
func (c *changes) Note(now time.Time) {
	if c.first.IsZero() {
		c.first = now
	}
	c.last = now
}

// Left is how long it is until the changes are to be delivered.
func (c *changes) Left(t timing, now time.Time) time.Duration {
	if c.first.IsZero() {
		return 1<<63 - 1
	}
	return min(c.last.Add(t.Quiet).Sub(now), c.first.Add(t.Patience).Sub(now))
}

// Due tells that they are to be delivered now.
func (c *changes) Due(t timing, now time.Time) bool { return c.Left(t, now) <= 0 }

// tasks says when there is something to be asked of etcd or told to it.
type tasks struct {
	// doubt is set while the connection may have failed.
	doubt bool
	// failures counts those in a row, and not before is when to try again.
	failures  int
	notBefore time.Time
}

// Soon has what is to be done tried within a while.
func (t *tasks) Soon(within time.Duration) {
	t.notBefore = time.Now().Add(jitter(within))
}

// doubt notes that the connection has failed, or is there again: was the watch
// resumed, is that still our etcd, what is wrong?
func (ss *session) doubt(up bool) {
	ss.tasks.doubt = true
	// A restarted etcd is asked by all nodes at once. One that is gone may be
	// back before anybody needs to know.
	if up || ss.tasks.failures == 0 {
		ss.tasks.Soon(ss.timing.RetryMin)
	}
}

// wait is how long there is nothing to do, if nothing happens.
func (ss *session) wait(now time.Time) time.Duration {
	left := ss.renew.Left(now)
	if ss.tasks.doubt || !ss.published() {
		left = 0
	}
	left = min(max(left, ss.tasks.notBefore.Sub(now)), ss.changes.Left(ss.timing, now))
	// A timer stands still while the machine sleeps.
	return max(0, min(left, time.Minute))
}

// published tells whether our lease says what was offered last.
func (ss *session) published() bool { return ss.offered() == ss.offer }

// work does one thing that is to be done, and says how that went. The errors it
// returns end the session.
func (ss *session) work(ctx context.Context) error {
	now := time.Now()
	if now.Before(ss.tasks.notBefore) {
		return nil
	}
	var err error
	switch {
	case ss.tasks.doubt:
		err = ss.check(ctx)
	case ss.renew.Left(now) <= 0:
		err = ss.renewLease(ctx)
	case !ss.published():
		err = ss.publish(ctx)
	case ss.tasks.failures == 0:
		return nil
	default: // what failed has come to nothing
	}
	switch {
	case ctx.Err() != nil, isEnding(err):
		return err
	case err != nil:
		ss.tasks.failures++
		ss.tasks.notBefore = time.Now().Add(ss.timing.Retry(ss.tasks.failures))
		ss.sink.Health(err)
	default:
		ss.tasks = tasks{doubt: ss.tasks.doubt}
		ss.sink.Health(nil)
	}
	return nil
}

// check asks whether etcd is there, is the one that we watch, and has our
// lease.
func (ss *session) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ss.timing.Answer)
	defer cancel()
	key := ss.directory + ss.own.key
	answer, err := ss.client.Get(ctx, key)
	if err != nil {
		return ss.explain("reading our lease in etcd, key "+key, err)
	}
	ss.tasks.doubt = false
	// An etcd that was set up anew, or from a backup, would say nothing until it
	// has come to the revision that we wait for.
	if answer.Header.ClusterId != ss.cluster || answer.Header.Revision < ss.revision {
		return ending{errors.New("etcd is not the one it was, or has lost what it knew; listing the leases again")}
	}
	if len(answer.Kvs) == 0 {
		return ending{fmt.Errorf("our lease in etcd, key %s, is gone; acquiring one again", key)}
	}
	return nil
}

// renewLease extends the etcd lease that our key is bound to.
func (ss *session) renewLease(ctx context.Context) error {
	// Asked for a renewal by an etcd that is not ready, the client would ask
	// without pause.
	if err := ss.check(ctx); err != nil {
		return err
	}
	key := ss.directory + ss.own.key
	_, err := ss.keepAlive(ctx, ss.own.bound)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return ending{fmt.Errorf("our lease in etcd, key %s, has expired; acquiring one again", key)}
	}
	if err != nil {
		return ss.explain("renewing our lease in etcd, key "+key, err)
	}
	ss.log.Debug("renewed our lease in etcd", "key", key)
	return nil
}

// publish rewrites our lease for the last offer, if it says anything else in
// it.
func (ss *session) publish(ctx context.Context) error {
	offer := ss.offered()
	if err := ss.complete(offer); err != nil {
		return err
	}
	own := ss.own
	own.lease = ss.ourLease(offer, own.prefixes)
	value, err := flannel.MarshalLease(own.lease)
	if err != nil {
		return fmt.Errorf("writing our lease: %w", err)
	}
	if own.value == string(value) {
		ss.offer = offer
		return nil
	}
	own.value = string(value)
	revision, err := ss.write(ctx, own)
	if err != nil {
		return err
	}
	if revision == 0 {
		return ending{fmt.Errorf("our lease in etcd, key %s, is not as we wrote it; looking again", ss.directory+own.key)}
	}
	own.modified = revision
	ss.own, ss.held, ss.offer = own, own, offer
	ss.log.Info("rewrote our lease in etcd", "key", ss.directory+own.key, "public-ip", nodeName(own.lease))
	return nil
}

// watchConnection tells when a connection is made or lost.
func watchConnection(ctx context.Context, conn *grpc.ClientConn) <-chan bool {
	states := make(chan bool)
	go func() {
		for state := conn.GetState(); conn.WaitForStateChange(ctx, state); {
			state = conn.GetState()
			select {
			case states <- state == connectivity.Ready:
			case <-ctx.Done():
				return
			}
		}
	}()
	return states
}
