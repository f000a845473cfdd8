// Package controlplane says where peers come from.
//
// A Store reads one source of peers: a file, the Kubernetes API, etcd. It knows
// that source's formats and nothing of netlink or BPF: all it shares with the
// dataplane is the value state.State.
package controlplane

import (
	"context"

	"github.com/weft-net/weft/dataplane/state"
)

// Store is a source of peers.
//
// Every event of the source is only a nudge to look again; what a store hands
// over is always the whole desired state. Whoever misses one hand-over misses
// nothing once the next one comes.
type Store interface {
	// Kind is the store's name in logs and on screens: static, kube, etcd.
	Kind() string
	// Run hands states to sink until ctx is done, and then returns nil. An
	// error means that the store cannot go on; a source that is away or broken
	// for a while is not such an error, but Health.
	Run(ctx context.Context, sink Sink) error
}

// Sink takes what a store has found. A store calls it from one goroutine; its
// methods return at once and never wait for the dataplane.
type Sink interface {
	// Deliver hands over the whole desired state. The same state twice is
	// harmless. The store does not touch the state's slices afterwards.
	Deliver(s state.State)
	// Health says how the last look at the source went. While it is an error
	// the state delivered last stays in force: a source that is away never
	// takes peers away.
	Health(err error)
}
