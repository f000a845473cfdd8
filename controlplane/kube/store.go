package kube

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// Store delivers what the Nodes of a cluster say, and publishes this node in
// its own.
type Store struct {
	options Options
	log     *slog.Logger
	reader  reader
	client  *client
	timing  timing
	// nudged says that something may have changed.
	nudged chan struct{}

	mu    sync.Mutex
	offer *controlplane.Offer
}

var _ controlplane.Store = (*Store)(nil)

// timing says how events become looks and looks become deliveries.
type timing struct {
	// Quiet is how long nothing must have happened before there is a look:
	// changes come in bursts. Patience bounds the wait for quiet.
	Quiet, Patience time.Duration
	// Gap is the least time between two deliveries of changed peers. At each of
	// them all peers are put in order, and compared with what the kernel has.
	Gap time.Duration
	// Backoff is the time between two tries to watch the Nodes while the API is
	// away.
	Backoff wait.Backoff
}

// defaultTiming has a single change acted on at once, as a person sees it, and
// thousands of changes in a few steps. A node that was cut off comes back some
// seconds after a short outage, and within a minute after a long one; thousands
// that were cut off together come back one after the other, as with every
// client of Kubernetes.
func defaultTiming() timing {
	return timing{
		Quiet: 50 * time.Millisecond, Patience: 100 * time.Millisecond, Gap: 500 * time.Millisecond,
		Backoff: wait.Backoff{Duration: 800 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 100, Cap: 30 * time.Second},
	}
}

// Open makes a store. The API is not asked yet, and may be away.
func Open(o Options) (*Store, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	keys, err := o.keys()
	if err != nil {
		return nil, err
	}
	c, err := newClient(o)
	if err != nil {
		return nil, err
	}
	return &Store{
		options: o, log: o.Log, client: c, timing: defaultTiming(),
		reader: reader{keys: keys, config: o.Config, node: o.Node},
		nudged: make(chan struct{}, 1),
	}, nil
}

// Kind implements controlplane.Store.
func (s *Store) Kind() string { return "kube" }

// Announce implements controlplane.Store.
func (s *Store) Announce(o controlplane.Offer) {
	s.mu.Lock()
	s.offer = &o
	s.mu.Unlock()
	s.nudge()
}

// Overrides asks the API what an operator has annotated this node with. It is
// for who chooses the uplink, before the first Announce; the store itself
// follows what the annotations say about public IPs. A node that is not
// registered yet has none. What is wrong with one annotation comes as an error
// beside the others; an API that does not answer gives an *Away.
func (s *Store) Overrides(ctx context.Context) (flannel.Overrides, error) {
	began := time.Now()
	node, err := s.client.node(ctx, s.options.Node)
	switch {
	case apierrors.IsNotFound(err):
		return flannel.Overrides{}, nil
	case err != nil:
		return flannel.Overrides{}, &Away{Host: s.client.host, Since: began, Err: err}
	}
	return s.reader.keys.ParseOverrides(node.Annotations)
}

// Run implements controlplane.Store. It is called once.
//
// Nothing is delivered before all Nodes were seen once, this node's own has its
// podCIDRs, and Announce was called. While the own Node is missing or its
// podCIDRs are not usable, what was delivered last stays in force as a whole: a
// cluster that does not know this node any more is not one to take its peers'
// departure from.
func (s *Store) Run(ctx context.Context, sink controlplane.Sink) error {
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	r := &run{
		Store: s, sink: sink, background: &background,
		nodes:     newNodes(s.reader, s.nudge),
		answers:   &answers{host: s.client.host, nudge: s.nudge},
		publisher: newPublisher(s.log),
		replies:   make(chan reply, 1),
		leftOut:   newLeftOut(s.log),
	}
	defer r.stopAlarm()
	background.Go(func() { follow(ctx, s.client, r.nodes, r.answers, s.timing.Backoff) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case answer := <-r.replies:
			r.publisher.Answer(answer.node, answer.err, time.Now())
		case <-s.nudged:
			s.settle(ctx)
		}
		if ctx.Err() == nil {
			r.look(ctx)
		}
	}
}

// nudge has Run look again.
func (s *Store) nudge() {
	select {
	case s.nudged <- struct{}{}:
	default: // it will anyway
	}
}

// settle returns when no nudge has come for a while, or none of that helps.
func (s *Store) settle(ctx context.Context) {
	patience := time.NewTimer(s.timing.Patience)
	defer patience.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-patience.C:
			return
		case <-s.nudged:
		case <-time.After(s.timing.Quiet):
			return
		}
	}
}

// offered is what was announced last, or nil.
func (s *Store) offered() *controlplane.Offer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.offer
}

// run is what one Run knows. It belongs to its goroutine.
type run struct {
	*Store
	sink       controlplane.Sink
	background *sync.WaitGroup
	nodes      *nodes
	answers    *answers
	publisher  *publisher
	replies    chan reply
	leftOut    *leftOut

	macs macs
	// generation of the nodes and local are what last was made of.
	generation uint64
	last       state.State
	// delivered is when last was.
	delivered time.Time
	// told is the Health told last, if healthTold, or empty when all was well.
	told       string
	healthTold bool
	// away says that the API was at the last look.
	away bool
	// alarm nudges when it is time for what a look found to be too early.
	alarm *time.Timer
	due   time.Time
}

// reply is what became of a patch.
type reply struct {
	node *corev1.Node
	err  error
}

// look compares what is known with what was delivered and published, and does
// what is to be done.
func (r *run) look(ctx context.Context) {
	var away error
	if a := r.answers.Away(); a != nil {
		away = a
	}
	if away == nil && r.away {
		r.publisher.Hurry()
	}
	r.away = away != nil
	node, generation := r.nodes.Own()
	offer := r.offered()
	if generation == 0 || offer == nil {
		if away != nil {
			r.health(away)
		}
		return
	}
	me, ignored, err := r.reader.self(node, *offer, &r.macs)
	if err != nil {
		r.health(errors.Join(away, err))
		return
	}
	r.stopAlarm()
	r.publish(ctx, me, node, offer.Carrying)
	r.health(errors.Join(away, ignored, r.publisher.fault))
	r.deliver(me.local, generation)
}

// deliver hands over the state if it is new.
func (r *run) deliver(local state.Local, generation uint64) {
	moved := !reflect.DeepEqual(local, r.last.Local) // as it is the first time: then last has no name
	if generation == r.generation && !moved {
		return
	}
	if early := r.timing.Gap - time.Since(r.delivered); early > 0 && !moved {
		r.setAlarm(early)
		return
	}
	others, generation := r.nodes.Others()
	m := judge(local, others)
	r.leftOut.Note(m.faults)
	next := r.reader.config.State()
	next.Local, next.Peers, next.Aliases = local, m.peers, m.aliases
	next.Sort()
	r.generation = generation
	if !moved && slices.Equal(next.Peers, r.last.Peers) && slices.Equal(next.Aliases, r.last.Aliases) {
		return
	}
	r.last, r.delivered = next, time.Now()
	r.sink.Deliver(next)
}

// publish asks the API for what the own Node should say, if it says something
// else. The answer comes as a reply.
func (r *run) publish(ctx context.Context, me self, o own, carrying bool) {
	body, wait := r.publisher.Patch(r.reader.keys, me, o, carrying && r.options.SetNodeNetworkUnavailable, time.Now())
	if wait > 0 {
		r.setAlarm(wait)
	}
	if body == nil {
		return
	}
	r.background.Go(func() {
		node, err := r.client.patch(ctx, r.options.Node, body)
		r.replies <- reply{node, err} // has room: there is one patch at a time
	})
}

// setAlarm has Run look again after a while, at the latest.
func (r *run) setAlarm(after time.Duration) {
	if due := time.Now().Add(after); r.due.IsZero() || due.Before(r.due) {
		r.stopAlarm()
		r.alarm, r.due = time.AfterFunc(after, r.nudge), due
	}
}

// stopAlarm takes the alarm back.
func (r *run) stopAlarm() {
	if r.alarm != nil {
		r.alarm.Stop()
	}
	r.due = time.Time{}
}

// health tells the sink how things are, if that is new.
func (r *run) health(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if r.healthTold && text == r.told {
		return
	}
	r.healthTold, r.told = true, text
	r.sink.Health(err)
}
