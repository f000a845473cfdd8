//go:build linux

package endpoint

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// ResultsDir is where CNI plugins leave their results on a host.
const ResultsDir = "/var/lib/cni/results"

// Options say how a Finder looks. The zero value will do.
type Options struct {
	Log *slog.Logger
	// Ours recognises our own programs on pods' veths; those of others mean
	// that a pod is left alone. By default it is OursByName.
	Ours func(Program) bool
	// ResultsDir is where the results of CNI plugins lie. They are believed
	// only for pods that the kernel refuses to show. Empty means nowhere.
	ResultsDir string
	// Ignore matches events that have to do with no pod, for Watch not to be woken.
	Ignore [][]rtnl.Match
}

// OursByName recognises weft's programs by their names. A tcx program's name is
// known only with CAP_SYS_ADMIN: without, recognise it by its number.
func OursByName(p Program) bool {
	if p.Filter {
		return strings.HasPrefix(p.Name, "weft/")
	}
	return p.Name == "pod_in" && p.Ingress || p.Name == "pod_out" && !p.Ingress
}

// Finder finds the endpoints of one node, in the network namespace of the
// thread that called Open. Its methods may be called from any goroutine.
type Finder struct {
	opts Options
	// namespace is the network namespace, for what has no netlink: bpf(2) and
	// new sockets.
	namespace *rtnl.Namespace

	// mu makes one reading happen at a time.
	mu     sync.Mutex
	socket *rtnl.Socket
	tc     *netlink.Handle
	// self is the number of our namespace in itself, noNamespace before it is
	// known. It never changes.
	self int
	// names are those of tcx programs, by number, as of the last Find.
	names map[uint32]string

	// end ends all watches, with life.
	life context.Context
	end  context.CancelFunc
	// interest is what Watch nudges about, as of the last Find.
	interest atomic.Pointer[interest]

	// How watches work; tests have them work otherwise.
	poll      time.Duration
	looks     []time.Duration
	listenAll func(*rtnl.Socket) error
}

// Open opens a Finder in the calling thread's network namespace. Nothing is
// changed, then or later; but to be asked for a veth whose other end is in
// another namespace makes the kernel number that one (`ip netns list-id`).
func Open(opts Options) (_ *Finder, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Ours == nil {
		opts.Ours = OursByName
	}
	f := &Finder{opts: opts, self: noNamespace, poll: pollInterval, looks: newVethLooks, listenAll: listenAll}
	f.life, f.end = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	if f.namespace, err = rtnl.OpenNamespace(); err != nil {
		return nil, err
	}
	if f.socket, err = rtnl.Open(); err != nil {
		return nil, err
	}
	if f.tc, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return f, nil
}

// Close lets go of the sockets and ends all watches.
func (f *Finder) Close() error {
	f.end()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.socket != nil {
		f.socket.Close()
	}
	if f.tc != nil {
		f.tc.Close()
	}
	if f.namespace != nil {
		return f.namespace.Close()
	}
	return nil
}

// Find tells what endpoints there are now. prefixes are this node's own
// (state.Local.Prefixes); addresses outside are nobody's.
//
// With an error nothing is known, and what was found before may be true no
// longer.
func (f *Finder) Find(prefixes []netip.Prefix) (Found, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s, err := f.read(prefixes)
	if err != nil {
		return Found{}, fmt.Errorf("finding endpoints: %w", err)
	}
	found := judge(s, prefixes)
	f.interest.Store(newInterest(s, prefixes))
	return found, nil
}
