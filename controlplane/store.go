// Package controlplane says where peers come from.
//
// A Store reads one source of peers: a file, the Kubernetes API, etcd. It knows
// that source's formats and nothing of netlink or BPF: all it shares with the
// dataplane is the value state.State.
package controlplane

import (
	"context"
	"net/netip"

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
	// Announce says what this node brings into the overlay, for the store to
	// publish. It is called once before Run, and again, from any goroutine,
	// when something of it changes; the last Offer is in force. It returns at
	// once. A store whose source says all of it itself ignores it.
	Announce(o Offer)
	// Run hands states to sink until ctx is done, and then returns nil. An
	// error means that the store cannot go on; a source that is away or broken
	// for a while is not such an error, but Health.
	Run(ctx context.Context, sink Sink) error
}

// Offer is what a node brings into the overlay. Values are comparable.
type Offer struct {
	// Uplink is the name of the network interface that carries the underlay.
	Uplink string
	// UplinkMTU is its MTU in bytes.
	UplinkMTU int
	// Address and AddressV6 are the uplink's addresses that packets are sent
	// from. A family that is not in use has the zero Addr.
	Address, AddressV6 netip.Addr
	// PublicIP and PublicIPv6 are the addresses that peers shall send to. They
	// differ from the uplink's behind NAT.
	PublicIP, PublicIPv6 netip.Addr
	// MAC and MACv6 are those that the overlay devices have, or last had; zero
	// when nothing is known. What the node has published before comes first,
	// since its peers use that; without either the store makes one up.
	MAC, MACv6 state.MAC
	// Carrying says that the node carries traffic. It is told to whoever waits
	// for that.
	Carrying bool
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
