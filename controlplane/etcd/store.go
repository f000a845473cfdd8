package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// Store holds this node's lease and delivers the others'. See the package's
// documentation for what it does to that end.
type Store struct {
	options Options
	tls     *tls.Config
	log     *slog.Logger
	timing  timing
	// configKey and directory are where the configuration and the leases are.
	configKey, directory string

	// announced nudges when there is a new offer.
	announced chan struct{}
	mu        sync.Mutex
	offer     controlplane.Offer

	// The rest is Run's. It outlives a connection.

	config     *flannel.Config // once it was read
	configText string
	// mac and macV6 are ours once we have told them; peers send to them.
	mac, macV6 state.MAC
	// held is the lease that we had last.
	held entry
	// created is a key that we made and have not looked at again since.
	created string
	// before are prefixes to ask for again, the best first.
	before []netip.Prefix
	// listed are the leases as they were known last.
	listed *table
	// said is what the log has about other leases, by their keys.
	said map[string]string
	last state.State
}

var _ controlplane.Store = (*Store)(nil)

// timing says how long things take and are waited for.
type timing struct {
	// TTL is for how long a lease is granted, and Margin how much of it is left
	// when it is renewed.
	TTL, Margin time.Duration
	// Quiet is how long nothing must have changed before a state is delivered,
	// and Patience bounds the wait for that: nodes come in crowds.
	Quiet, Patience time.Duration
	// Answer is how long etcd has to answer a request, and List how long for
	// the list of all leases.
	Answer, List time.Duration
	// KeepAlive is how long a connection may be silent before it is tried.
	KeepAlive time.Duration
	// RetryMin and RetryMax are the first and the longest gap before something
	// that failed is tried again.
	RetryMin, RetryMax time.Duration
	// Config is how often a configuration that is missing or broken is looked
	// for.
	Config time.Duration
	// Settled is how long all must have gone well for the next failure to count
	// as the first.
	Settled time.Duration
}

// defaultTiming is for thousands of nodes that ask one etcd.
func defaultTiming() timing {
	return timing{
		TTL: leaseTTL, Margin: defaultRenewMargin,
		Quiet: 50 * time.Millisecond, Patience: 250 * time.Millisecond,
		Answer: 5 * time.Second, List: 20 * time.Second, KeepAlive: 20 * time.Second,
		RetryMin: time.Second, RetryMax: 20 * time.Second,
		Config: 2 * time.Second, Settled: time.Minute,
	}
}

// Retry is the gap after so many failures in a row. It doubles, and is cut by
// up to a half at random: nodes that fail together shall not retry together.
func (t timing) Retry(failures int) time.Duration {
	gap := t.RetryMin
	for i := 1; i < failures && gap < t.RetryMax; i++ {
		gap *= 2
	}
	return jitter(min(gap, t.RetryMax))
}

// jitter cuts a duration by up to a half at random.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// Open checks the options and reads the certificates. Nothing is asked of etcd,
// which may come later than its nodes: see Run.
func Open(o Options) (*Store, error) {
	o.Endpoints = slices.Clone(o.Endpoints)
	for i := range o.Endpoints {
		o.Endpoints[i] = strings.TrimSpace(o.Endpoints[i])
	}
	if err := o.Validate(); err != nil {
		return nil, err
	}
	config, err := o.tlsConfig()
	if err != nil {
		return nil, err
	}
	for _, warning := range o.warnings() {
		o.Log.Warn(warning)
	}
	s := &Store{
		options:   o,
		tls:       config,
		log:       o.Log,
		timing:    defaultTiming(),
		configKey: path.Join(o.Prefix, "config"),
		directory: path.Join(o.Prefix, "subnets") + "/",
		announced: make(chan struct{}, 1),
		before:    masked(o.Previous),
		said:      map[string]string{},
	}
	if o.RenewMargin != 0 {
		s.timing.Margin = o.RenewMargin
	}
	return s, nil
}

// masked returns the valid ones of some prefixes without host bits.
func masked(prefixes []netip.Prefix) []netip.Prefix {
	var list []netip.Prefix
	for _, p := range prefixes {
		if p.IsValid() {
			list = append(list, p.Masked())
		}
	}
	return list
}

// Kind implements controlplane.Store.
func (s *Store) Kind() string { return "etcd" }

// Announce implements controlplane.Store. The offer's MAC counts only until a
// MAC is told to the peers.
func (s *Store) Announce(o controlplane.Offer) {
	s.mu.Lock()
	s.offer = o
	s.mu.Unlock()
	select {
	case s.announced <- struct{}{}:
	default:
	}
}

// offered is the last offer.
func (s *Store) offered() controlplane.Offer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.offer
}

// Run implements controlplane.Store. It never gives up: an etcd that is away,
// refuses us or holds no usable configuration is waited for. The lease stays in
// etcd when Run returns, since pods go on without us.
func (s *Store) Run(ctx context.Context, sink controlplane.Sink) error {
	for failures := 1; ; failures++ {
		began := time.Now()
		err := s.session(ctx, sink)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > s.timing.Settled {
			failures = 1
		}
		sink.Health(err)
		select {
		case <-ctx.Done():
			return nil
		case <-s.announced: // what was missing may be there now
		case <-time.After(s.timing.Retry(failures)):
		}
	}
}

// session takes part in the network over one connection, until it fails or
// something has to be looked at from the start.
func (s *Store) session(ctx context.Context, sink controlplane.Sink) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client, err := s.connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := s.configure(ctx, client, sink); err != nil {
		return err
	}
	ss := &session{Store: s, client: client, sink: sink}
	if err := ss.acquire(ctx); err != nil {
		return err
	}
	ss.deliver()
	sink.Health(nil)
	return ss.follow(ctx)
}

// deliver hands over a state if it differs from the last.
func (s *Store) deliver(sink controlplane.Sink, next state.State) {
	if reflect.DeepEqual(next, s.last) {
		return
	}
	s.last = next
	// The last one is compared with, so whoever sorts theirs must not sort ours.
	next.Peers = slices.Clone(next.Peers)
	sink.Deliver(next)
}

// notice logs what is new about leases of which something is wrong.
func (s *Store) notice(faults map[string]error) {
	const most = 10 // lines at a time: one hand may have written thousands
	lines := 0
	for key := range s.said {
		if faults[key] == nil {
			delete(s.said, key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(faults)) {
		fault := faults[key]
		if s.said[key] == fault.Error() {
			continue
		}
		s.said[key] = fault.Error()
		if lines++; lines <= most {
			s.log.Warn("a lease in etcd is not as it should be", "key", s.directory+key, "error", oneLine(fault))
		}
	}
	if lines > most {
		s.log.Warn("more leases in etcd are not as they should be", "number", lines-most)
	}
}

// oneLine gives an error's text without line breaks, as a log line wants it.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// ending is an error after which a session can't go on: what it knows is no
// longer so.
type ending struct{ error }

// Unwrap returns what it is about.
func (e ending) Unwrap() error { return e.error }

// isEnding tells an ending from what may be tried again.
func isEnding(err error) bool { return errors.As(err, new(ending)) }
