//go:build linux

package hostrules

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// Options are what Open needs.
type Options struct {
	// Log is told of each change.
	Log *slog.Logger
}

// Rules keeps the rules of one network namespace: that of the thread that called
// Open. Its methods may be called from any goroutine.
type Rules struct {
	log       *slog.Logger
	namespace *rtnl.Namespace
	// mu makes one reading or change happen at a time.
	mu sync.Mutex
	// detected is the host's flavour of iptables; "" before it was asked for.
	detected flavour
	// known is what was found to be as wanted; nil when we don't know.
	known *known
	// settled has the chains that were as wanted once, by their place: flannel
	// has started with them.
	settled map[string]bool
	// written are the rules that were last wanted of each chain in nftables
	// mode, by table and chain: what is ours when others are wanted.
	written map[string]map[string][]rule
	// current is the mode of the last Sync.
	current mode
	// cleaned is whether the other modes were cleaned since it is the current one.
	cleaned  bool
	programs programs
	// blackholes are the routes that we have added.
	blackholes map[netip.Prefix]bool
}

// known is what was wanted and found in a generation of nf_tables.
type known struct {
	wanted     wanted
	generation uint32
	// sum is of the rules of iptables-nft that were looked at, as the kernel has
	// them: to ask for those again takes a hundredth of what programs take.
	sum [sha256.Size]byte
}

// mode is where rules are.
type mode string

// The modes. Those of iptables are called as its programs are.
const (
	inNFTables mode = "nftables"
	inNft      mode = "iptables-nft"
	inLegacy   mode = "iptables-legacy"
)

// modeOf is the mode of a flavour.
func modeOf(f flavour) mode { return mode("iptables-" + f) }

// Open binds to the calling thread's network namespace. Nothing is looked at
// yet.
func Open(o Options) (*Rules, error) {
	namespace, err := rtnl.OpenNamespace()
	if err != nil {
		return nil, err
	}
	return &Rules{
		log: o.Log, namespace: namespace, programs: programs{},
		settled: map[string]bool{}, written: map[string]map[string][]rule{}, blackholes: map[netip.Prefix]bool{},
	}, nil
}

// Close lets go of the namespace. The rules stay: connections lean on them.
// Remove takes them away.
func (r *Rules) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.namespace.Close()
}

// Mode tells where the rules are: nftables, iptables-nft or iptables-legacy; ""
// before the first Sync that got that far.
func (r *Rules) Mode() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return string(r.current)
}

// Sync makes the rules what they shall be, whatever they were, and is idempotent:
// with nothing to do it only reads. It is to be called when Desired changes, and
// every --iptables-resync seconds. With iptables it may wait some seconds for
// that program's lock (ErrLocked), and gives up when ctx is done.
//
// A chain that can't be written keeps none of the others from it.
func (r *Rules) Sync(ctx context.Context, d Desired) error {
	w, refused := d.check()
	if refused != nil {
		return refused
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.namespace.Do(func() error {
		s, err := openSocket()
		if err != nil {
			return err
		}
		defer s.Close()
		return errors.Join(r.syncRules(ctx, s, w), r.syncBlackholes(w))
	})
}

// syncRules syncs the wanted mode, then cleans the others: in this order, since
// with the last rule that needs conntrack the kernel ends that, and masqueraded
// connections with it.
func (r *Rules) syncRules(ctx context.Context, s *socket, w wanted) error {
	m, err := r.mode(ctx, s, w)
	if errors.Is(err, ErrNoProgram) && !w.anything() {
		return nil
	}
	if err != nil {
		return err
	}
	if m != r.current {
		r.current, r.cleaned, r.known = m, false, nil
		clear(r.settled)
	}
	if r.cleaned && r.stillKnown(s, m, w) {
		return nil
	}
	r.known = nil
	if err := r.syncMode(ctx, s, m, w); err != nil {
		return err
	}
	if !r.cleaned {
		if _, err := r.clean(ctx, s, m); err != nil {
			return err
		}
		r.cleaned = true
	}
	return nil
}

// anything tells whether there are rules to make.
func (w wanted) anything() bool {
	return slices.ContainsFunc(w.tables(), table.used)
}

// mode is the mode in which the rules are wanted.
func (r *Rules) mode(ctx context.Context, s *socket, w wanted) (mode, error) {
	if w.nftables {
		return inNFTables, nil
	}
	if r.detected == "" {
		f, why, err := r.programs.detect(ctx, s)
		if err != nil {
			return "", err
		}
		r.log.Info("iptables of this host", "flavour", f, "because", why)
		r.detected = f
	}
	return modeOf(r.detected), nil
}

// stillKnown tells that all is as it was when it was as wanted.
func (r *Rules) stillKnown(s *socket, m mode, w wanted) bool {
	if r.known == nil || r.known.wanted != w {
		return false
	}
	now, err := s.generation()
	if err != nil || now == r.known.generation {
		return err == nil
	}
	if m != inNft {
		return false
	}
	sum, err := s.sum(w)
	if err != nil || sum != r.known.sum {
		return false
	}
	r.known.generation = now // asked for before the rules, so it is not too new
	return true
}

// sum is of all rules of iptables-nft that are looked at.
func (s *socket) sum(w wanted) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	for _, c := range w.chains() {
		for _, name := range []string{c.name, c.hook} {
			if err := s.sumRules(h, c.family, c.table, name); err != nil && !errors.Is(err, ErrUnsupported) {
				return sum, err
			}
		}
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// syncMode syncs one mode. If nothing had to be written, and nobody else has
// written anything meanwhile, it is known what is as wanted.
func (r *Rules) syncMode(ctx context.Context, s *socket, m mode, w wanted) error {
	if m == inLegacy {
		return r.syncChains(ctx, s, w)
	}
	before, err := s.generation()
	if err != nil {
		return err
	}
	if m == inNFTables {
		err = r.syncTables(s, w)
	} else {
		err = r.syncChains(ctx, s, w)
	}
	if err != nil {
		return err
	}
	now := known{wanted: w, generation: before}
	if m == inNft {
		if now.sum, err = s.sum(w); err != nil {
			r.log.Debug("the rules can't be summed up", "err", err)
			return nil
		}
	}
	if after, err := s.generation(); err == nil && after == before {
		r.known = &now
	}
	return nil
}

// clean takes away what flannel, or we, have left in other modes than keep, and
// tells whether there was something.
func (r *Rules) clean(ctx context.Context, s *socket, keep mode) (cleaned bool, err error) {
	var errs []error
	if keep != inNFTables {
		for _, t := range (wanted{}).tables() {
			found, err := r.cleanTable(s, t)
			cleaned = cleaned || found
			errs = append(errs, err)
		}
	}
	for _, f := range flavours {
		if keep == modeOf(f) {
			continue
		}
		for _, c := range (wanted{}).chains() {
			found, err := r.syncChain(ctx, s, f, c)
			if f == legacy && errors.Is(err, ErrNoProgram) {
				// There are tables, but whether they have anything of flannel's
				// nobody can tell. Most likely not: who put it there had the program.
				r.log.Warn("can't look for flannel's old rules", "table", c.table, "err", err)
				err = nil
			}
			cleaned = cleaned || found
			errs = append(errs, err)
		}
	}
	return cleaned, errors.Join(errs...)
}

// Remove takes the rules away in all modes, whoever made them: flannel's are the
// same. It also deletes the blackhole routes for the prefixes given. It tells
// whether there was anything.
//
// Connections that are masqueraded go on as long as any other rule of the host
// needs conntrack; with the last one the kernel ends it.
func (r *Rules) Remove(ctx context.Context, prefixes ...netip.Prefix) (removed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known, r.current, r.cleaned = nil, "", false
	clear(r.settled)
	err = r.namespace.Do(func() error {
		s, err := openSocket()
		if err != nil {
			return err
		}
		defer s.Close()
		var rulesErr error
		removed, rulesErr = r.clean(ctx, s, "")
		return errors.Join(rulesErr, withRoutes(func(h *netlink.Handle) error {
			var errs []error
			for _, p := range prefixes {
				deleted, err := deleteBlackhole(h, p.Masked())
				removed = removed || deleted
				delete(r.blackholes, p.Masked())
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		}))
	})
	return removed, err
}
