//go:build linux

package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
	"github.com/weft-net/weft/dataplane/internal/sysctl"
	"github.com/weft-net/weft/dataplane/state"
)

// Path is the kernel path of one node, bound to the network namespace of the
// thread that called Open. Its methods may be called from any goroutine.
type Path struct {
	log *slog.Logger
	// namespace is the network namespace, for what has no netlink: sysctls and
	// new sockets.
	namespace *rtnl.Namespace

	// mu makes one reading or change happen at a time, so that what was read
	// is not changed by ourselves in between.
	mu sync.Mutex
	// links is for links and addresses, of which there are few, socket for
	// routes, neighbours and FDB entries.
	links  *netlink.Handle
	socket *rtnl.Socket
	// noted are the notes of the last plan, so each is logged once.
	noted map[string]bool
	// made are the routes that DirectRouting has given peers, by the name of the
	// family's overlay device.
	made map[string]map[madeRoute]bool
	// raRefused are devices whose accept_ra could not be set: /proc/sys is
	// read-only in most containers. It is not tried again.
	raRefused map[string]bool
	// setting finds a sysctl's file.
	setting func(name string) string

	// end ends all watches, with life.
	life context.Context
	end  context.CancelFunc
	// interest is what Watch nudges about, as of the last Sync.
	interest atomic.Pointer[interest]
}

// Open opens the kernel path of the calling thread's network namespace.
// Nothing is changed yet.
func Open(log *slog.Logger) (_ *Path, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	p := &Path{log: log, made: map[string]map[madeRoute]bool{}, raRefused: map[string]bool{}, setting: sysctl.Path}
	p.life, p.end = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			_ = p.Close()
		}
	}()
	p.interest.Store(&interest{})
	if p.namespace, err = rtnl.OpenNamespace(); err != nil {
		return nil, err
	}
	if p.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	if p.socket, err = rtnl.Open(); err != nil {
		return nil, err
	}
	return p, nil
}

// Close lets go of the sockets and ends all watches. What is in the kernel stays, and traffic
// flows. Remove takes it away.
func (p *Path) Close() error {
	p.end()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.socket != nil {
		p.socket.Close()
	}
	if p.links != nil {
		p.links.Close()
	}
	if p.namespace != nil {
		if err := p.namespace.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			return fmt.Errorf("closing the network namespace: %w", err)
		}
	}
	return nil
}

// begin begins one reading or change; the caller defers end. A path that was
// closed must not be used: without its sockets netlink would open new ones, in
// whatever namespace the thread is in.
func (p *Path) begin() (end func(), err error) {
	p.mu.Lock()
	if p.life.Err() != nil {
		p.mu.Unlock()
		return nil, fmt.Errorf("kernel path: %w", os.ErrClosed)
	}
	return p.mu.Unlock, nil
}

// maxRounds is how often one Sync looks at an overlay: once to put the device
// right, once for what is on it, and twice more for what changed meanwhile
// under our hands. What fails then is left to the caller's next Sync.
const maxRounds = 4

// Sync makes the kernel hold what the state wants and is idempotent: with
// nothing to do it only reads. The Result is filled as far as it got. The
// error joins what is wrong with the devices and, in one bounded text, what is
// wrong with peers; the others are served nevertheless.
//
// The caller puts the devices' MACs into the state (see DeviceMAC); a zero MAC
// means that of the existing device, and is an error when there is none.
func (p *Path) Sync(ctx context.Context, s state.State) (Result, error) {
	end, err := p.begin()
	if err != nil {
		return Result{}, err
	}
	defer end()

	res := Result{Failed: map[netip.Prefix]error{}}
	p.interest.Store(newInterest(s, 0))
	found, err := p.look(s)
	res.Uplink = found.uplink
	p.interest.Store(newInterest(s, found.uplink.Index))

	errs := []error{err}
	notes := map[string]bool{}
	for _, o := range found.overlays {
		errs = append(errs, p.syncOverlay(ctx, o, s.Peers, found.wanted, &res, notes))
	}
	for note := range notes {
		if !p.noted[note] {
			p.log.Warn("left alone", "what", note)
		}
	}
	p.noted = notes
	if len(res.Failed) > 0 {
		errs = append(errs, &peersError{failed: res.Failed, total: len(s.Peers)})
	}
	return res, errors.Join(errs...)
}

// Plan is what Sync would do now. Nothing is changed.
func (p *Path) Plan(s state.State) (Plan, error) {
	end, err := p.begin()
	if err != nil {
		return Plan{}, err
	}
	defer end()

	all := Plan{Failed: map[netip.Prefix]error{}}
	found, err := p.look(s)
	errs := []error{err}
	all.Uplink = found.uplink
	for _, o := range found.overlays {
		have, err := p.read(o, found.wanted)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		plan, err := makePlan(o, s.Peers, have)
		all.Steps = append(all.Steps, plan.Steps...)
		all.Skipped = append(all.Skipped, plan.Skipped...)
		all.Direct = append(all.Direct, plan.Direct...)
		all.Notes = append(all.Notes, plan.Notes...)
		maps.Copy(all.Failed, plan.Failed)
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}

// surroundings are what a state and its uplink say before any overlay is
// looked at.
type surroundings struct {
	uplink   Uplink
	overlays []overlay
	// wanted are all peers' prefixes.
	wanted map[netip.Prefix]bool
}

// look reads the uplink and derives the overlays from it.
func (p *Path) look(s state.State) (surroundings, error) {
	var found surroundings
	var err error
	if found.uplink, err = p.readUplink(s.Local.Uplink); err != nil {
		return found, err
	}
	addrs, err := p.readAddresses()
	if err != nil {
		return found, err
	}
	for index, list := range addrs {
		if index == found.uplink.Index {
			found.uplink.Addrs = list
		} else {
			found.uplink.Others = append(found.uplink.Others, list...)
		}
	}
	found.wanted = make(map[netip.Prefix]bool, len(s.Peers))
	for _, peer := range s.Peers {
		found.wanted[peer.Prefix] = true
	}
	overlays, err := overlays(s, found.uplink)
	for i := range overlays {
		o := &overlays[i]
		o.direct.made = p.made[o.name]
		if !o.direct.on {
			continue
		}
		var onLinkErr error
		if o.direct.onLink, onLinkErr = p.readOnLink(publicIPs(s.Peers, *o), o.uplinkIndex); onLinkErr != nil {
			return found, errors.Join(err, onLinkErr) // peers stay as they are
		}
	}
	found.overlays = overlays
	return found, err
}

// publicIPs are those of the overlay's peers, each once.
func publicIPs(peers []state.Peer, o overlay) []netip.Addr {
	seen := make(map[netip.Addr]bool, len(peers))
	var addrs []netip.Addr
	for _, p := range peers {
		if a := p.PublicIP; o.owns(p.Prefix.Addr()) && a.IsValid() && o.owns(a) && isUnicast(a) && !seen[a] {
			seen[a] = true
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// read reads what the kernel holds of an overlay.
func (p *Path) read(o overlay, wanted map[netip.Prefix]bool) (actual, error) {
	addrs, err := p.readAddresses()
	if err != nil {
		return actual{}, err
	}
	return p.readActual(o, wanted, addrs)
}

// syncOverlay makes one family's overlay so: first the device, then, read
// again because a changed device has lost some of it, what is on the device.
func (p *Path) syncOverlay(ctx context.Context, o overlay, peers []state.Peer, wanted map[netip.Prefix]bool, res *Result, notes map[string]bool) error {
	refused := map[Step]error{} // steps on the device that failed
	for round := 1; ; round++ {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("overlay device %s: %w", o.name, err)
		}
		have, err := p.read(o, wanted)
		if err != nil {
			return err
		}
		var device Plan
		if _, err := planDevice(&device, o, have.device); err != nil {
			return err
		}
		steps := slices.DeleteFunc(device.Steps, func(s Step) bool { return refused[s] != nil })
		if len(steps) > 0 {
			if round == maxRounds {
				return fmt.Errorf("overlay device %s: somebody keeps changing it; still to be done: %s", o.name, steps[0])
			}
			for _, step := range steps {
				if err := p.applyDevice(step); err != nil {
					err = fmt.Errorf("overlay device %s: %s: %w", o.name, step, err)
					if step.Op == DeleteDevice || step.Op == AddDevice {
						return err
					}
					// A device with a wrong MTU still serves peers.
					refused[step] = err
					continue
				}
				res.Steps++
			}
			continue
		}
		plan, err := makePlan(o, peers, have)
		if err != nil {
			return err
		}
		outcome := p.applyPeers(ctx, plan.peerSteps(), have.device.index)
		res.Steps += outcome.done
		if len(outcome.failed)+len(outcome.stale) > 0 && round < maxRounds && ctx.Err() == nil {
			p.log.Debug("looking again", "device", o.name, "failed", len(outcome.failed), "stale", len(outcome.stale))
			continue // the kernel changed under our hands: look again
		}

		res.Overlays = append(res.Overlays, Overlay{
			Name:    o.name,
			Index:   have.device.index,
			MAC:     have.device.mac,
			MTU:     have.device.mtu,
			Address: o.address().Addr(),
			Local:   o.local,
		})
		maps.Copy(res.Failed, plan.Failed)
		maps.Copy(res.Failed, outcome.failed)
		for _, prefix := range plan.Direct {
			if outcome.failed[prefix] == nil {
				res.Direct = append(res.Direct, prefix)
			}
		}
		p.made[o.name] = madeRoutes(o, peers, plan, have)
		res.Skipped = append(res.Skipped, plan.Skipped...)
		for _, note := range plan.Notes {
			notes[note] = true
		}
		if outcome.done > 0 {
			p.log.Info("peers synced", "device", o.name, "steps", outcome.done, "failed", len(plan.Failed)+len(outcome.failed))
		}
		return errors.Join(errors.Join(slices.Collect(maps.Values(refused))...), joinBounded(outcome.stale))
	}
}

// madeRoutes are the routes of DirectRouting that are certain to be so from now
// on: those of the peers that it serves, and those known before that could not
// be removed.
func madeRoutes(o overlay, peers []state.Peer, plan Plan, have actual) map[madeRoute]bool {
	made := map[madeRoute]bool{}
	for _, r := range have.routes {
		if key := (madeRoute{r.prefix, r.gateway, r.device}); o.direct.made[key] {
			made[key] = true
		}
	}
	direct := make(map[netip.Prefix]bool, len(plan.Direct))
	for _, prefix := range plan.Direct {
		direct[prefix] = true
	}
	for _, p := range peers {
		if direct[p.Prefix] && o.isDirect(p) {
			made[madeRoute{p.Prefix, p.PublicIP, o.uplink}] = true
		}
	}
	return made
}

// joinBounded joins errors, of which there may be thousands alike.
func joinBounded(errs []error) error {
	if n := len(errs); n > maxErrorsInText {
		errs = append(slices.Clone(errs[:maxErrorsInText]), fmt.Errorf("and %d more", n-maxErrorsInText))
	}
	return errors.Join(errs...)
}

// DeviceMAC is the MAC of the overlay device of that name in the calling
// thread's network namespace; false when there is no such device.
func DeviceMAC(name string) (state.MAC, bool, error) {
	p, err := Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return state.MAC{}, false, err
	}
	defer func() { _ = p.Close() }() // nothing was changed
	return p.DeviceMAC(name)
}

// DeviceMAC is the same in the path's namespace.
func (p *Path) DeviceMAC(name string) (state.MAC, bool, error) {
	end, err := p.begin()
	if err != nil {
		return state.MAC{}, false, err
	}
	defer end()
	d, err := p.readDevice(name)
	if err != nil || d == nil {
		return state.MAC{}, false, err
	}
	if err := refuseForeign(*d); err != nil {
		return state.MAC{}, false, err
	}
	return d.mac, true, nil
}

// RemoveDirect removes the routes that DirectRouting has given to peers, and
// returns how many there were.
func (p *Path) RemoveDirect(peers []state.Peer) (removed int, err error) {
	end, err := p.begin()
	if err != nil {
		return 0, err
	}
	defer end()
	remotes := map[netip.Prefix]netip.Addr{}
	wanted := map[netip.Prefix]bool{}
	for _, peer := range peers {
		remotes[peer.Prefix], wanted[peer.Prefix] = peer.PublicIP, true
	}
	var errs []error
	for _, v6 := range []bool{false, true} {
		o := overlay{v6: v6}
		routes, _, err := p.readRoutes(o, nil, wanted)
		if err != nil {
			errs = append(errs, err)
		}
		var steps []Step
		for _, r := range routes {
			if (ownership{overlay: o}).plain(r) && !isDeviceName(r.device) && r.gateway == remotes[r.prefix] {
				steps = append(steps, Step{Op: DeleteRoute, Device: r.device, index: r.index, Prefix: r.prefix, Addr: r.gateway})
			}
		}
		outcome := p.applyPeers(context.Background(), steps, 0)
		removed += outcome.done
		errs = append(errs, joinBounded(outcome.stale))
	}
	return removed, errors.Join(errs...)
}

// Remove removes the overlay devices of a VNI, and with them their routes,
// neighbours and FDB entries, and returns the names of those that were there.
// A device of such a name that is not vxlan is an error and stays.
func (p *Path) Remove(vni uint32) (removed []string, err error) {
	end, err := p.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	var errs []error
	for _, v6 := range []bool{false, true} {
		d, err := p.readDevice(DeviceName(vni, v6))
		if err == nil && d != nil {
			err = refuseForeign(*d)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if d == nil {
			continue
		}
		if err := p.applyDevice(Step{Op: DeleteDevice, Device: d.name}); err != nil {
			errs = append(errs, fmt.Errorf("removing overlay device %s: %w", d.name, err))
			continue
		}
		removed = append(removed, d.name)
	}
	return removed, errors.Join(errs...)
}

// Entries is what the kernel holds for a VNI's overlay devices, whatever is
// desired, IPv4 first, and what leads past them to one of the prefixes. Without a
// device there is none.
func (p *Path) Entries(vni uint32, prefixes ...netip.Prefix) ([]Entry, error) {
	end, err := p.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	wanted := make(map[netip.Prefix]bool, len(prefixes))
	for _, prefix := range prefixes {
		wanted[prefix] = true
	}
	var entries []Entry
	for _, v6 := range []bool{false, true} {
		d, err := p.readDevice(DeviceName(vni, v6))
		if err != nil {
			return entries, err
		}
		if d == nil || d.kind != "vxlan" {
			continue
		}
		have := actual{device: d}
		if have.routes, _, err = p.readRoutes(overlay{v6: v6}, d, wanted); err != nil {
			return entries, err
		}
		if have.neighbours, err = p.readNeighbours(v6, d); err != nil {
			return entries, err
		}
		if have.fdb, err = p.readFDB(d); err != nil {
			return entries, err
		}
		entries = append(entries, joinEntries(have)...)
	}
	return entries, nil
}
