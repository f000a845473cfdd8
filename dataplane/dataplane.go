//go:build linux

// Package dataplane makes one node's kernel hold what a state.State says: the
// kernel path, always complete, and the accelerator over it where it can be.
package dataplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/endpoint"
	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/verdicts"
)

// Options say where the dataplane keeps its things and what it may do.
type Options struct {
	// PinDir is the directory for BPF pins, /sys/fs/bpf/weft on a host.
	PinDir string
	// StateDir is where the overlay device's MAC is remembered across reboots,
	// /var/lib/weft on a host.
	StateDir string
	// Accel is auto (programs where they can be loaded) or off (none).
	Accel string
	// Express is auto (express where it is possible), on (the same, and what is
	// in the way is an error of Sync) or off.
	Express string
	// XDP has packets stripped in the uplink's driver: auto (where that can be), on
	// (the same, and what is in the way is an error of Sync) or off.
	XDP string
	// SourceCheck is off, observe or enforce.
	SourceCheck string
	// MaxPeers is how many peer nodes fit the accelerator's maps. It counts public
	// IPs, of each address family as many: a node with both is one.
	MaxPeers int
	// Rules are what is kept in the host's firewall, as flannel does.
	Rules Rules
	Log   *slog.Logger
}

// Rules are the host's rules that come with an overlay network. The zero value
// leaves them alone, whatever they are.
type Rules struct {
	// Masquerade has packets that leave the network go by the node's address,
	// OrderedPorts without random source ports.
	Masquerade, OrderedPorts bool
	// Forward accepts forwarded packets from and to the network.
	Forward bool
	// Blackhole makes a blackhole route of the node's own prefix, for nodes
	// without a bridge that has it.
	Blackhole bool
	// Resync is how often the rules are looked at; 0 if they are left alone.
	Resync time.Duration
}

// Intervals of the dataplane.
const (
	// lookInterval is how often attachments are looked at: changes of tcx
	// programs send no event.
	lookInterval = time.Second
	// loadInterval is how long a failed load of the programs is not tried
	// again: what is missing (a capability, a mount) seldom comes by itself.
	loadInterval = time.Minute
	// probeInterval is how often it is looked whether the kernel has got what
	// express lacks.
	probeInterval = 10 * time.Second
)

// Dataplane is one node's dataplane. Sync is called from one goroutine; the
// other methods from any.
type Dataplane struct {
	opts      Options
	kernel    *kernel.Path
	finder    *endpoint.Finder
	verdicts  *verdicts.Watcher // nil where the host's rules can't be followed
	pulse     *pulse
	upkeep    *upkeep    // nil where the host's rules are left alone
	injection *injection // guarded by mu
	obstacles *obstacles
	changed   chan struct{}
	stop      context.CancelFunc
	stopped   sync.WaitGroup
	// prefixesChanged tells that pods are to be looked for anew.
	prefixesChanged chan struct{}
	// ours are the programs on pods' veths that are weft's, while pods are found.
	ours map[uint32]bool

	mu        sync.Mutex // guards what follows
	accel     *ebpf.Accelerator
	loaded    ebpf.Options // what accel was loaded with
	retry     time.Time    // not before this is a failed load tried again
	held      []string     // why acceleration is held back
	reason    string       // why the programs are not there; empty when they are
	vni       uint32
	wanted    []state.Peer // by the last Sync
	mtu       int          // of pods' interfaces
	lastLook  string
	misfits   ebpf.Misfits
	without   bool // the programs were taken away
	watch     sourceWatch
	prefixes  []netip.Prefix // this node's
	found     endpoint.Found
	podsFor   *ebpf.Accelerator // that knows or will know them
	probed    time.Time         // when it was last looked whether express can be done now
	toldAlone string
	noXDP     string // why packets are not stripped in the uplink's driver
}

// Open prepares the dataplane of the current network namespace. Nothing is
// changed before the first Sync.
func Open(ctx context.Context, o Options) (_ *Dataplane, err error) {
	d := &Dataplane{
		opts:            o,
		changed:         make(chan struct{}, 1),
		prefixesChanged: make(chan struct{}, 1),
		obstacles:       &obstacles{log: o.Log, quiet: o.Accel == "off" || o.Express == "off"},
	}
	ctx, d.stop = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			_ = d.Close()
		}
	}()
	if d.kernel, err = kernel.Open(o.Log); err != nil {
		return nil, err
	}
	events, err := d.kernel.Watch(ctx)
	if err != nil {
		return nil, err
	}
	d.stopped.Go(func() { d.follow(ctx, events) })
	if d.upkeep, err = openUpkeep(o); err != nil {
		return nil, err
	}
	if d.upkeep != nil {
		d.stopped.Go(func() { d.upkeep.follow(ctx) })
	}
	d.injection = openInjection(o.Log)
	return d, d.openExpress(ctx)
}

// openExpress prepares what programs and firewall need beside a Sync: finding the
// pods on this node, and following what decides how the host judges packets.
func (d *Dataplane) openExpress(ctx context.Context) (err error) {
	d.finder, err = endpoint.Open(endpoint.Options{
		Log: d.opts.Log, Ours: d.isOurs, ResultsDir: endpoint.ResultsDir, Ignore: d.kernel.Caused(),
	})
	if err != nil {
		return err
	}
	nudges, err := d.finder.Watch(ctx)
	if err != nil {
		return err
	}
	rules := make(chan verdicts.Changes, 1)
	d.pulse = newPulse(d.opts.Log, d.obstacles, rules)
	d.obstacles.changed = d.pulse.beat
	d.stopped.Go(func() { d.followPods(ctx, nudges) })
	if d.opts.Accel == "off" || d.opts.Express == "off" {
		d.obstacles.set(findsProgram, "express is off (--express=off)")
		return nil
	}
	if d.verdicts, err = verdicts.Open(verdicts.Options{Log: d.opts.Log}); err != nil {
		d.pulse.watches(err)
		return nil
	}
	d.injection.unheardBy(d.verdicts)
	d.stopped.Go(func() { d.pulse.follow(ctx, d.verdicts) })
	d.stopped.Go(func() { d.followRules(ctx, rules) })
	return nil
}

// Sync makes the kernel hold s. What can be done is done; the errors of the
// rest are joined. That programs can't be loaded is no error: the kernel path
// carries everything, and Report says so.
func (d *Dataplane) Sync(ctx context.Context, s state.State) error {
	if err := d.chooseMAC(&s); err != nil {
		return err
	}
	result, err := d.kernel.Sync(ctx, s)
	err = errors.Join(err, d.upkeep.sync(ctx, s))
	if ctx.Err() != nil {
		return err // what was not looked at is not gone
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	d.vni, d.wanted = s.VNI, s.Peers
	if mtu := podMTU(result.Overlays); mtu > 0 {
		d.mtu = mtu
	}
	err = errors.Join(err, d.syncAccelerator(s, result))
	d.injection.syncState(s, aliases(s, result.Uplink), result.Overlays)
	d.lookForPods(s.Local.Prefixes)
	if found := d.obstacles.List(); d.opts.Express == "on" && len(found) > 0 {
		err = errors.Join(err, fmt.Errorf("express: %s", strings.Join(found, "; ")))
	}
	if why := cmp.Or(d.noXDP, d.reason); d.opts.XDP == "on" && why != "" {
		err = errors.Join(err, fmt.Errorf("XDP: %s", why))
	}
	return err
}

// lookForPods has pods looked for where they may be now.
func (d *Dataplane) lookForPods(prefixes []netip.Prefix) {
	if slices.Equal(prefixes, d.prefixes) && d.podsFor == d.accel {
		return
	}
	d.prefixes, d.podsFor = prefixes, d.accel
	select {
	case d.prefixesChanged <- struct{}{}:
	default:
	}
}

// syncAccelerator loads, feeds and attaches the programs, or takes them away
// when the kernel path has to carry everything and there is nobody to count.
func (d *Dataplane) syncAccelerator(s state.State, result kernel.Result) error {
	hopeless := d.hopeless(s, result.Uplink)
	if hopeless != "" && !d.counts(s) {
		return d.goWithout(hopeless)
	}
	if err := d.loadAccelerator(ebpf.Options{
		PinDir: d.opts.PinDir, MaxPeers: d.opts.MaxPeers, VNI: s.VNI, Port: s.Port,
		IPv6: d.counts(s), NoIPv4: hopeless != "", XDP: hopeless == "" && (d.opts.XDP == "auto" || d.opts.XDP == "on"),
	}); err != nil {
		// No error of the sync, Report tells it. Programs of an agent before
		// us, or of another VNI, would go stale: nobody would tell them about
		// peers any more. Maps and switches stay.
		return d.goWithout(d.reason)
	}
	desired := d.desired(s, result)
	misfits, err := d.accel.Sync(desired)
	if err != nil {
		d.setReason(err.Error())
		return fmt.Errorf("accelerator: %w", err)
	}
	d.tellMisfits(misfits)
	if hopeless == "" && desired.Overlay == 0 {
		// It may be back in a moment. Programs that are there leave all
		// packets to the kernel meanwhile: their devices are gone.
		hopeless = "there is no IPv4 overlay device on an uplink now"
	}
	d.setReason(hopeless)
	if hopeless != "" {
		d.noXDP = ""
		return nil
	}
	d.tellXDP()
	return d.holdBack(desired)
}

// tellXDP logs what is in the way of stripping packets in the uplink's driver.
func (d *Dataplane) tellXDP() {
	now := d.accel.NoXDP()
	switch {
	case now == d.noXDP:
	case now == "":
		d.opts.Log.Info("packets may be stripped in the uplink's driver")
	default:
		d.opts.Log.Warn("packets are not stripped in the uplink's driver", "reason", now)
	}
	d.noXDP = now
}

// desired is what the accelerator should do.
func (d *Dataplane) desired(s state.State, result kernel.Result) ebpf.Desired {
	overlay, overlay6 := overlayOf(result.Overlays, netip.Addr.Is4), overlayOf(result.Overlays, netip.Addr.Is6)
	desired := ebpf.Desired{
		Uplink:       result.Uplink.Index,
		Overlay:      overlay.Index,
		Overlay6:     overlay6.Index,
		OverlayMTU:   overlay.MTU,
		Local:        overlay.Local,
		MAC:          overlay.MAC,
		SourceCheck:  d.opts.SourceCheck,
		RoutesByMark: routesByMark(),
		Held:         len(d.held) > 0,
		Aliases:      aliases(s, result.Uplink),
	}
	desired.Peers, desired.Known = served(s.Peers, result)
	return desired
}

// hopeless says why programs can't carry packets here, or nothing. IPv6 rides the
// kernel path always.
func (d *Dataplane) hopeless(s state.State, uplink kernel.Uplink) string {
	switch {
	case d.opts.Accel == "off":
		return "acceleration is off (--accel=off)"
	case !s.Local.PublicIP.IsValid():
		return "there is no IPv4 overlay network; IPv6 rides the kernel path"
	case s.GBP:
		return "the overlay carries packets' marks (GBP), which programs do not write"
	case s.Learning:
		return "the overlay device learns from the packets that it receives (Learning)"
	}
	return unsuitable(uplink)
}

// counts tells whether there are IPv6 peers' packets to be counted, by programs
// that do nothing else.
func (d *Dataplane) counts(s state.State) bool {
	return d.opts.Accel != "off" && s.Local.PublicIPv6.IsValid()
}

// overlayOf finds the overlay device of an address family; the zero Overlay is
// none.
func overlayOf(overlays []kernel.Overlay, is func(netip.Addr) bool) kernel.Overlay {
	for _, o := range overlays {
		if is(o.Local) {
			return o
		}
	}
	return kernel.Overlay{}
}

// goWithout takes the programs off their places and remembers why. Where they
// are off already, nothing is to be done. The maps stay, for the switches.
func (d *Dataplane) goWithout(reason string) error {
	d.setReason(reason)
	if d.without {
		return nil
	}
	d.closeAccelerator()
	d.held, d.noXDP = nil, ""
	removed, err := ebpf.Detach(d.opts.PinDir)
	d.without = err == nil
	for _, r := range removed {
		d.opts.Log.Info("removed "+r, "reason", reason)
	}
	return err
}

// loadAccelerator loads the programs unless they are loaded as wanted already.
func (d *Dataplane) loadAccelerator(want ebpf.Options) error {
	if d.accel != nil && d.loaded == want {
		return nil
	}
	if d.accel == nil && time.Now().Before(d.retry) {
		return errors.New(d.reason)
	}
	accel, err := ebpf.Open(want)
	if err != nil {
		d.retry = time.Now().Add(loadInterval)
		d.setReason(err.Error())
		return err
	}
	d.closeAccelerator()
	d.accel, d.loaded, d.without = accel, want, false
	d.tellMemory()
	if want.NoIPv4 {
		d.held = nil
		return nil
	}
	return d.startExpress()
}

// startExpress lets the programs do express, if they can.
func (d *Dataplane) startExpress() error {
	if d.opts.Express == "off" {
		return nil
	}
	d.obstacles.set(findsProgram, d.accel.NoExpress())
	heartbeat, err := d.accel.Heartbeat()
	if err != nil {
		return err
	}
	if d.verdicts == nil {
		return heartbeat.Close()
	}
	d.pulse.use(heartbeat)
	return nil
}

// expressCame tells that the kernel has become able to do express: conntrack is
// a module in most of them, loaded by the first rule that needs it.
func (d *Dataplane) expressCame() bool {
	if d.opts.Express == "off" || d.loaded.NoIPv4 || d.accel.NoExpress() == "" || time.Since(d.probed) < probeInterval {
		return false
	}
	d.probed = time.Now()
	return d.accel.MissedFunctions() && ebpf.MissingFunctions() == ""
}

func (d *Dataplane) closeAccelerator() {
	if d.accel == nil {
		return
	}
	d.pulse.use(nil)
	if err := d.accel.Close(); err != nil {
		d.opts.Log.Warn("closing the accelerator", "err", err)
	}
	d.accel = nil
}

// holdBack looks for what sits behind our programs and would not see the
// packets that they take; while there is anything, nothing is taken.
func (d *Dataplane) holdBack(desired ebpf.Desired) error {
	hooks, err := d.accel.View().Hooks()
	if err != nil {
		return fmt.Errorf("looking at attachments: %w", err)
	}
	// What a sync has acted upon is what the next look compares with: something
	// that came and went between two looks would leave what it did in force.
	d.lastLook = seen(hooks, nil)
	held := heldBy(hooks)
	if (len(held) > 0) == desired.Held {
		d.held = held
		return nil
	}
	d.held = held
	if len(held) > 0 {
		d.opts.Log.Warn("acceleration is held back", "reason", holdReason(held))
	} else {
		d.opts.Log.Info("acceleration is no longer held back")
	}
	desired.Held = len(held) > 0
	_, err = d.accel.Sync(desired)
	return err
}

// setReason remembers why the programs are not there, and logs a change.
func (d *Dataplane) setReason(reason string) {
	switch {
	case reason == d.reason:
	case reason == "":
		d.opts.Log.Info("the programs are attached again")
	default:
		d.opts.Log.Warn("the kernel path carries everything", "reason", reason)
	}
	d.reason = reason
}

func (d *Dataplane) tellMemory() {
	maps, err := d.accel.View().Maps()
	if err != nil {
		return
	}
	var bytes uint64
	for _, m := range maps {
		bytes += m.Bytes
	}
	d.opts.Log.Info("programs loaded", "maxPeers", d.opts.MaxPeers, "mapMemoryKiB", bytes>>10)
}

func (d *Dataplane) tellMisfits(misfits ebpf.Misfits) {
	changed := misfits.Len() != d.misfits.Len()
	d.misfits = misfits
	if peers := misfits.NoRoom; changed && len(peers) > 0 {
		d.opts.Log.Warn("no room for all peers; some ride the kernel path, or of IPv6 are not counted (raise --max-peers)",
			"peers", len(peers), "first", peers[0].Prefix, "maxPeers", d.opts.MaxPeers)
	}
	if peers := misfits.Unknown; changed && len(peers) > 0 {
		d.opts.Log.Warn("peers have too many prefixes, or prefixes of too many lengths; some ride the kernel path and fail the source check, or of IPv6 are not counted",
			"peers", len(peers), "first", peers[0].Prefix)
	}
}

// served are the peers that the kernel path carries: only where the
// kernel's own route points at the overlay device may a program do its work.
// Known are those that it does not carry yet, or past the overlay device
// (DirectRouting); one that is refused is neither.
func served(peers []state.Peer, result kernel.Result) (carried, known []state.Peer) {
	aside := map[netip.Prefix]bool{}
	for _, p := range slices.Concat(result.Skipped, result.Direct) {
		aside[p] = true
	}
	for _, p := range peers {
		switch {
		case result.Failed[p.Prefix] != nil:
		case aside[p.Prefix]:
			known = append(known, p)
		default:
			carried = append(carried, p)
		}
	}
	return carried, known
}

// Changed delivers a nudge when the kernel changed and Sync should look again.
func (d *Dataplane) Changed() <-chan struct{} { return d.changed }

func (d *Dataplane) nudge() {
	select {
	case d.changed <- struct{}{}:
	default: // one is waiting already
	}
}

// follow turns kernel events, and what is found by looking, into nudges.
func (d *Dataplane) follow(ctx context.Context, events <-chan struct{}) {
	ticks := time.NewTicker(lookInterval)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-events:
			if !ok {
				return
			}
			d.nudge()
		case <-ticks.C:
			if d.look() {
				d.nudge()
			}
		}
	}
}

// look tells whether attachments have changed since it or a Sync last looked,
// settings since the last Sync, or there is room now for peers that found none, and reports
// senders that fail the source check.
func (d *Dataplane) look() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.accel == nil {
		return false
	}
	if d.expressCame() {
		d.loaded = ebpf.Options{} // the next Sync loads the programs anew
		return true
	}
	view := d.accel.View()
	d.watch.report(d.opts.Log, view)
	hooks, err := view.Hooks()
	now := seen(hooks, err)
	changed := now != d.lastLook
	d.lastLook = now
	return changed || d.accel.SettingsChanged() || d.accel.XDPChanged() || d.accel.HasRoom(d.misfits)
}

// seen is what a look at the attachments comes to, as a text to compare.
func seen(hooks []ebpf.Hook, err error) string { return fmt.Sprint(hooks, err) }

// Close lets go of handles and leaves traffic flowing; Remove takes everything
// away. Express ends: nobody follows the host's rules any more.
func (d *Dataplane) Close() error {
	d.stop()
	d.stopped.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closeAccelerator()
	var errs []error
	if d.verdicts != nil {
		errs = append(errs, d.verdicts.Close())
	}
	if d.finder != nil {
		errs = append(errs, d.finder.Close())
	}
	if d.injection != nil {
		errs = append(errs, d.injection.close())
	}
	errs = append(errs, d.upkeep.close())
	if d.kernel != nil {
		errs = append(errs, d.kernel.Close())
	}
	return errors.Join(errs...)
}
