package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
)

// runAgent is "weft agent".
func runAgent(e *env, args []string) error {
	var o agentOptions
	fs := newFlags(e, "agent", "[--config FILE | --kube-subnet-mgr | --etcd-endpoints URLS] [flags]", `Runs the dataplane of this node until SIGTERM or SIGINT. What it has set up keeps
carrying traffic after it has stopped; "weft remove" takes it away.

The peers come from a file (--config), from the Kubernetes API (--kube-subnet-mgr),
or else from etcd. Called as flanneld, weft is this command. A flag that is not
given is taken from the environment: FLANNELD_IP_MASQ is --ip-masq.`)
	o.register(fs.FlagSet)
	if _, err := parseFlags(fs, args); err != nil {
		return err
	}
	if err := usageFaults("agent", fromEnvironment(fs.FlagSet, e.getenv)); err != nil {
		return err
	}
	if o.Version {
		return runVersion(e, nil)
	}
	if o.Config != "" && o.SubnetFile == defaultSubnetFile {
		o.SubnetFile = "" // nobody waits for it
	}
	if err := o.Validate(); err != nil {
		return err
	}
	return serve(e, o, defaultTiming())
}

// agent keeps a node's kernel as the store wants it.
type agent struct {
	log     *slog.Logger
	timing  timing
	source  source
	path    datapath
	loop    *loop
	record  *record
	memory  *memory // nil where the source is always there
	subnet  subnetFile
	offer   *offer // nil until the store is there, or where it needs none
	metrics *loopMetrics
	// counters is nil when no metrics are served.
	counters *collector
	health   *failures
	getenv   func(string) string

	looking  sync.Mutex // guards what the last look at the dataplane found
	reported time.Time
	mode     string
	reason   string
	express  expressInfo
	noXDP    string

	// Of the loop's goroutine.
	retries  int
	ready    bool
	counting bool

	wanting sync.Mutex // guards what is wanted
	desired *state.State
}

// serve runs an agent from the lock to the last word.
func serve(e *env, o agentOptions, t timing) (err error) {
	log := o.logger(e)
	held, err := takeLock(o.RunDir)
	if errors.Is(err, errLocked) {
		return fmt.Errorf("another agent runs with --run-dir %s (%w); stop it, or give this one directories of its own", o.RunDir, err)
	}
	if err != nil {
		return err
	}
	defer held.Release()

	b := thisBuild()
	log.Info("weft agent starts", "version", b.Version, "pid", os.Getpid(), "kernel", b.Kernel)
	from, err := newSource(e, &o, log)
	if err != nil {
		return err
	}

	web, err := listenIfWanted(o.MetricsAddr, log)
	if err != nil {
		return err
	}
	if web != nil {
		defer web.Close()
	}

	path, err := e.node.Open(e.ctx, dataplane.Options{
		PinDir: o.PinDir, StateDir: o.StateDir,
		Accel: o.Accel, Express: o.Express, XDP: o.XDP, SourceCheck: o.SourceCheck, MaxPeers: o.MaxPeers,
		Rules: from.rules(&o), Log: log,
	})
	if err != nil {
		if e.ctx.Err() != nil {
			return nil // told to stop while starting
		}
		return fmt.Errorf("opening the dataplane: %w", err)
	}
	defer func() {
		if closing := path.Close(); closing != nil && err == nil {
			err = fmt.Errorf("closing the dataplane: %w", closing)
		}
	}()

	a := &agent{
		log: log, timing: t, source: from, path: path,
		subnet: subnetFile{path: o.SubnetFile, ipMasq: o.IPMasq, log: log},
		health: newFailures(log, "reading the peers"),
		getenv: e.getenv,
		record: newRecord(o.RunDir, runInfo{
			Version: b.Version, PID: os.Getpid(), StartedAt: e.now().UTC(),
			Store: storeInfo{Kind: from.kind, Config: from.place},
		}, log),
	}
	a.loop = newLoop(t, log, a.sync, path.Changed(), a.synced)
	if from.flannel {
		a.memory = newMemory(o.StateDir, from.kind, log, e.now)
	}
	a.publish(e, web, b, o.MetricsMaxPeers)
	defer a.unpublish(web) // before the dataplane that scrapes read is closed
	if o.HealthzPort > 0 {
		checks, err := listenHealthz(o.HealthzIP, o.HealthzPort, a.isReady, log)
		if err != nil {
			return err
		}
		defer checks.Close()
	}
	if err := a.record.Write(); err != nil {
		return err
	}
	return a.run(e)
}

// listenIfWanted claims the metrics address, if there is one.
func listenIfWanted(address string, log *slog.Logger) (*server, error) {
	if address == "" {
		return nil, nil
	}
	return listen(address, log)
}

// publish serves the metrics, if there is a server.
func (a *agent) publish(e *env, web *server, b build, maxPeers int) {
	registry := newRegistry(b)
	a.metrics = newLoopMetrics(registry)
	if web == nil {
		return
	}
	a.counters = newCollector(a.log, a.path, func() names { return a.record.Info().Names }, maxPeers)
	registry.MustRegister(a.counters)
	web.Serve(prometheus.Gatherer(registry), checks{healthy: a.healthy(e.now), ready: a.isReady})
	a.record.Update(func(r *runInfo) { r.Metrics.Address = web.Address() })
	a.log.Info("metrics served", "address", web.Address())
}

// unpublish ends the serving of metrics, if there is a server.
func (a *agent) unpublish(web *server) {
	if web == nil {
		return
	}
	web.Close()
	a.counters.Stop()
}

// run runs the agent's parts until one of them cannot go on or the agent is
// told to stop. Traffic flows on either way.
func (a *agent) run(e *env) error {
	ctx, stop := context.WithCancelCause(e.ctx)
	defer stop(nil)
	var parts sync.WaitGroup
	parts.Go(func() { a.record.Run(ctx) })
	parts.Go(func() { a.loop.Run(ctx) })
	parts.Go(func() { a.lookNowAndThen(ctx) })
	if a.memory != nil {
		parts.Go(func() { a.memory.Run(ctx, a.timing.MemoryGap) })
		parts.Go(func() { a.startFromMemory(ctx) })
	}
	parts.Go(func() {
		if err := a.runStore(ctx, e.node, &parts); ctx.Err() == nil {
			if err == nil {
				err = errors.New("it ended")
			}
			stop(fmt.Errorf("reading the peers from the %s store: %w", a.source.kind, err))
		}
	})
	<-ctx.Done()
	if e.ctx.Err() != nil {
		a.log.Info("told to stop; traffic keeps flowing")
	}
	parts.Wait()

	a.record.Update(func(r *runInfo) { r.StoppedAt, r.Ready = e.now().UTC(), false })
	if err := a.record.Write(); err != nil {
		a.log.Warn("the run file still says that the agent runs", "error", err)
	}
	if e.ctx.Err() == nil {
		return context.Cause(ctx)
	}
	a.log.Info("weft agent stopped; \"weft remove\" takes away what it leaves behind")
	return nil
}

// Deliver implements controlplane.Sink.
func (a *agent) Deliver(s state.State) {
	if a.memory != nil {
		a.memory.Note(s)
	}
	a.want(s)
}

// want has the dataplane hold a state.
func (a *agent) want(s state.State) {
	a.wanting.Lock()
	defer a.wanting.Unlock()
	if a.desired != nil && reflect.DeepEqual(*a.desired, s) {
		a.loop.Want(s)
		return
	}
	if a.desired != nil {
		added, gone, changed := difference(a.desired.Peers, s.Peers)
		a.log.Info("the peers changed", "prefixes", len(s.Peers), "added", added, "gone", gone, "changed", changed)
	}
	a.desired = &s
	names := namesOf(s)
	a.record.Update(func(r *runInfo) {
		r.Node, r.VNI, r.Peers, r.Names = s.Local.Node, s.VNI, len(names), names
	})
	a.loop.Want(s)
}

// difference counts what became of the prefixes.
func difference(before, after []state.Peer) (added, gone, changed int) {
	old := map[any]state.Peer{}
	for _, p := range before {
		old[p.Prefix] = p
	}
	for _, p := range after {
		was, ok := old[p.Prefix]
		delete(old, p.Prefix)
		switch {
		case !ok:
			added++
		case was != p:
			changed++
		}
	}
	return added, len(old), changed
}

// Health implements controlplane.Sink.
func (a *agent) Health(err error) {
	a.metrics.Health(err)
	if err != nil {
		err = fmt.Errorf("keeping what was read last: %w", errors.New(oneLine(err)))
	}
	a.health.Note(err)
	a.record.Update(func(r *runInfo) { r.Store.Error = text(err) })
}

// synced takes the outcome of a sync.
func (a *agent) synced(o outcome) {
	if a.counters != nil && !a.counting {
		a.counters.Start()
		a.counting = true
	}
	if o.err != nil {
		a.retries++
	} else {
		a.retries = 0
	}
	first := o.err == nil && !a.ready
	if first {
		a.ready = true
		a.log.Info("the node is ready", "peers", len(namesOf(o.state)), "prefixes", len(o.state.Peers), "took", o.duration.Round(time.Millisecond))
	}
	a.look(o.at)
	if o.err == nil {
		a.carries(o.state, first)
	}
	a.record.Update(func(r *runInfo) {
		r.Ready = a.ready
		r.Sync.Last, r.Sync.Error, r.Sync.Failures = o.at.UTC(), text(o.err), a.retries
		if o.err == nil {
			r.Sync.LastSuccess = o.at.UTC()
		}
	})
	if first {
		// Who hears from /readyz finds the peers' names.
		if err := a.record.Write(); err != nil {
			a.log.Warn("the run file can't be written; other commands know less", "error", err)
		}
	}
	a.metrics.Synced(o)
}

// lookNowAndThen finds out what changes without a sync.
func (a *agent) lookNowAndThen(ctx context.Context) {
	ticks := time.NewTicker(a.timing.LookGap)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticks.C:
			a.look(now)
		}
	}
}

// look finds out how packets travel and what only the agent knows of it, unless
// that was just done, and says so when the mode changed.
func (a *agent) look(now time.Time) {
	a.looking.Lock()
	defer a.looking.Unlock()
	if !a.reported.IsZero() && now.Sub(a.reported) < a.timing.ReportGap {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	report, err := a.path.Brief(ctx)
	if err != nil {
		a.log.Debug("reading the dataplane's mode", "error", err)
		return
	}
	a.reported = now
	express := expressInfo{Reasons: report.Express.Reasons, LeftAlone: report.Express.LeftAlone}
	if report.Mode == a.mode && report.Reason == a.reason && reflect.DeepEqual(express, a.express) && report.XDP.Reason == a.noXDP {
		return
	}
	way := wayToPrograms(a.getenv, report)
	if report.Mode != a.mode || report.Reason != a.reason {
		a.tellMode(report, way)
	}
	a.mode, a.reason, a.express, a.noXDP = report.Mode, report.Reason, express, report.XDP.Reason
	a.record.Update(func(r *runInfo) {
		r.Mode, r.Reason, r.Express, r.NoXDP, r.WayToPrograms = a.mode, a.reason, a.express, a.noXDP, way
	})
}

// tellMode logs how packets travel, and what would have them travel faster.
func (a *agent) tellMode(r dataplane.Report, way string) {
	why := []any{"mode", r.Mode}
	if r.Reason != "" {
		why = append(why, "reason", r.Reason)
	}
	a.log.Info("packets take the "+modeInWords(r.Mode), why...)
	if way != "" {
		a.log.Warn("eBPF is off, since this pod lacks what it needs; this turns it on", "command", way)
	}
}

// modeInWords completes "packets take the".
func modeInWords(mode string) string {
	if mode == "ebpf" {
		return "accelerated path where they can"
	}
	return "kernel path"
}

// healthy makes the check that the loop is not stuck.
func (a *agent) healthy(now func() time.Time) func() error {
	return func() error {
		if overdue, stuck := a.loop.Stuck(now()); stuck {
			return fmt.Errorf("the sync loop is stuck, overdue by %s", overdue.Round(time.Second))
		}
		return nil
	}
}

// isReady checks that the first sync has been done. It stays done when the
// store breaks later: the node carries traffic all the same.
func (a *agent) isReady() error {
	info := a.record.Info()
	switch {
	case info.Ready:
		return nil
	case info.Sync.Error != "":
		return fmt.Errorf("the first sync failed and is tried again: %s", info.Sync.Error)
	case info.Store.Error != "":
		return errors.New(info.Store.Error)
	}
	return errors.New("the first sync is not done yet")
}

// text is an error's text on one line, or nothing.
func text(err error) string {
	const most = 4096 // thousands of peers can fail at once
	if err == nil {
		return ""
	}
	s := oneLine(err)
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}
