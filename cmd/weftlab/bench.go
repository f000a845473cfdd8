//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// mode is a way for packets to go between two nodes.
type mode struct {
	name, about string
	// kind is that of the nodes it needs; empty means that any will do.
	kind lab.Kind
	// hosts tells that the nodes themselves talk, not their pods.
	hosts bool
	// enter brings the lab into the mode, if there is something to do.
	enter func(ctx context.Context, l *lab.Lab) error
}

// modes are all ways.
func modes() []mode {
	return []mode{
		{name: "host", about: "from node to node over the underlay, without overlay", hosts: true},
		{name: "plain", about: "pod to pod by the kernel, set up by ip commands: no agent, no programs", kind: lab.Kernel},
		{name: "kernel", about: "pod to pod, weft with acceleration off", kind: lab.Weft, enter: accel("off")},
		{name: "base", about: "pod to pod, weft with acceleration on", kind: lab.Weft, enter: accel("on")},
	}
}

// accel turns acceleration on or off on all nodes.
func accel(to string) func(context.Context, *lab.Lab) error {
	return func(ctx context.Context, l *lab.Lab) error {
		for _, n := range l.Nodes {
			if err := n.Run(ctx, "weft accel "+to); err != nil {
				return err
			}
		}
		return nil
	}
}

// benchOptions say what is measured.
type benchOptions struct {
	name      string
	rounds    int
	time      time.Duration
	warm      time.Duration
	modes     []mode
	baseline  string
	tests     []workload
	underlays []lab.Underlay
	cpus      []int
	netfilter bool
	weft      string
	csv       string
}

// runBench is "weftlab bench".
func runBench(e *env, args []string) error {
	o, err := parseBench(e, args)
	if err != nil {
		return err
	}
	b := &bench{env: e, options: o}
	if err := b.header(e.stdout); err != nil {
		return err
	}
	for _, underlay := range o.underlays {
		if err := b.measureUnderlay(underlay); err != nil {
			return err
		}
	}
	if o.csv == "" {
		return nil
	}
	return b.writeCSV(o.csv)
}

// parseBench reads the command line.
func parseBench(e *env, args []string) (o benchOptions, err error) {
	var about strings.Builder
	about.WriteString("Measures ways for packets to go between two nodes, side by side: within each round every\n" +
		"test is done in every mode, so that what else happens on the machine hits them all.\n\nModes:\n")
	for _, m := range modes() {
		fmt.Fprintf(&about, "  %-8s  %s\n", m.name, m.about)
	}
	about.WriteString("\nTests:\n")
	for _, w := range workloads() {
		fmt.Fprintf(&about, "  %-10s  %s\n", w.name, w.about)
	}
	fs := newFlags(e, "bench", "[flags]", strings.TrimSuffix(about.String(), "\n"))
	fs.StringVar(&o.name, "name", "bench", "`name` of the lab")
	fs.IntVar(&o.rounds, "rounds", 5, "`number` of rounds")
	fs.DurationVar(&o.time, "time", time.Second, "`time` to measure each test and mode in a round")
	fs.DurationVar(&o.warm, "warm", 200*time.Millisecond, "`time` before that which is not counted")
	modeList := fs.String("modes", "host,kernel,base", "`list` of modes")
	testList := fs.String("tests", "", "`list` of tests; all by default")
	fs.StringVar(&o.baseline, "baseline", "kernel", "`mode` that the others are compared with")
	underlay := fs.String("underlay", "both", "`kind` of underlay: virtual carries aggregates whole, wire cuts them as a network card does, or both")
	cpus := fs.String("cpus", "1", "`number` of CPUs for client and server: 1 shows the cost of a transaction, 2 its latency, or both")
	noNetfilter := fs.Bool("no-netfilter", false, "without the rules that kube-proxy and flannel leave on a node")
	fs.StringVar(&o.csv, "csv", "", "`file` to write every single result to")
	weft := weftFlag(fs)
	if _, err := parseFlags(fs, args, 0); err != nil {
		return o, err
	}
	o.netfilter = !*noNetfilter
	o.modes, err = parseModes(*modeList)
	errs := []error{err}
	o.tests, err = parseTests(*testList)
	errs = append(errs, err)
	switch *underlay {
	case "both":
		o.underlays = []lab.Underlay{lab.Virtual, lab.Wire}
	case string(lab.Virtual), string(lab.Wire):
		o.underlays = []lab.Underlay{lab.Underlay(*underlay)}
	default:
		errs = append(errs, usagef("bench: --underlay is %q; give virtual, wire or both", *underlay))
	}
	var ok bool
	if o.cpus, ok = map[string][]int{"1": {1}, "2": {2}, "both": {1, 2}}[*cpus]; !ok {
		errs = append(errs, usagef("bench: --cpus is %q; give 1, 2 or both", *cpus))
	}
	if o.rounds < 1 || o.time <= 0 {
		errs = append(errs, usagef("bench: --rounds and --time must be more than nothing"))
	}
	if err := errors.Join(errs...); err != nil {
		return o, err
	}
	if slices.ContainsFunc(o.modes, func(m mode) bool { return m.kind == lab.Weft }) {
		o.weft, err = findWeft(*weft)
	}
	return o, err
}

// parseModes reads a list of modes.
func parseModes(list string) (chosen []mode, err error) {
	for _, name := range strings.Split(list, ",") {
		i := slices.IndexFunc(modes(), func(m mode) bool { return m.name == name })
		if i < 0 {
			return nil, usagef(`bench: there is no mode %q; "weftlab bench -h" lists them`, name)
		}
		chosen = append(chosen, modes()[i])
	}
	return chosen, nil
}

// parseTests reads a list of tests; none means all.
func parseTests(list string) (chosen []workload, err error) {
	if list == "" {
		return workloads(), nil
	}
	for _, name := range strings.Split(list, ",") {
		w, err := findWorkload(name)
		if err != nil {
			return nil, err
		}
		chosen = append(chosen, w)
	}
	return chosen, nil
}

// bench is a measurement that is going on.
type bench struct {
	*env
	options benchOptions
	samples []sample
}

// sample is one result.
type sample struct {
	underlay lab.Underlay
	cpus     int
	test     workload
	mode     string
	round    int
	rate     float64
	lost     uint64
	// accelerated is the share of packets that did not take the kernel path
	// on the client's node; negative where nobody counts.
	accelerated float64
}

// header says what was measured on.
func (b *bench) header(w io.Writer) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	o := b.options
	fmt.Fprintf(w, "date       %s\n", time.Now().UTC().Format("2006-01-02 15:04 MST"))
	fmt.Fprintf(w, "kernel     %s\n", unix.ByteSliceToString(name.Release[:]))
	fmt.Fprintf(w, "CPU        %s\n", cpuModel())
	if o.weft != "" {
		version, err := exec.CommandContext(b.ctx, o.weft, "version").Output()
		if err != nil {
			return fmt.Errorf("asking %s for its version: %w", o.weft, err)
		}
		first, _, _ := strings.Cut(string(version), "\n")
		fmt.Fprintf(w, "weft       %s\n", strings.TrimPrefix(first, "weft "))
	}
	netfilter := "as kube-proxy and flannel leave it, conntrack on"
	if !o.netfilter {
		netfilter = "without kube-proxy's rules"
	}
	fmt.Fprintf(w, "netfilter  %s\n", netfilter)
	fmt.Fprintf(w, "rounds     %d of %s for each test and mode, in alternating order\n", o.rounds, o.time)
	return nil
}

// cpuModel tells what CPUs there are.
func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	var model string
	cpus := 0
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "processor":
			cpus++
		case "model name":
			model = strings.TrimSpace(value)
		}
	}
	return fmt.Sprintf("%d x %s", cpus, model)
}

// measureUnderlay measures all that is asked for on one underlay.
func (b *bench) measureUnderlay(underlay lab.Underlay) error {
	labs, err := b.build(underlay)
	defer func() {
		for _, l := range labs {
			b.remove(l)
		}
	}()
	if err != nil {
		return err
	}
	for _, cpus := range b.options.cpus {
		for round := 1; round <= b.options.rounds; round++ {
			fmt.Fprintf(b.stderr, "%s underlay, %d CPU: round %d of %d\n", underlay, cpus, round, b.options.rounds)
			if err := b.measureRound(labs, underlay, cpus, round); err != nil {
				return err
			}
		}
		b.writeTable(b.stdout, underlay, cpus)
	}
	return nil
}

// build makes a lab for every kind of node that is needed.
func (b *bench) build(underlay lab.Underlay) (labs []*lab.Lab, err error) {
	kinds := map[lab.Kind]bool{}
	for _, m := range b.options.modes {
		if m.kind != "" {
			kinds[m.kind] = true
		}
	}
	if len(kinds) == 0 {
		kinds[lab.Bare] = true
	}
	for kind := range kinds {
		l, err := lab.New(b.ctx, lab.Options{
			Name: b.options.name + string(kind[0]), Kinds: []lab.Kind{kind}, Binary: b.options.weft,
			Underlay: underlay, Netfilter: b.options.netfilter,
		})
		if err != nil {
			return labs, err
		}
		labs = append(labs, l)
		if err := prepare(l); err != nil {
			return labs, err
		}
	}
	return labs, nil
}

// prepare lets TCP_CRR have enough ports: every connection leaves one in
// TIME_WAIT, for a minute if nothing is done.
func prepare(l *lab.Lab) error {
	for _, n := range l.Nodes {
		for _, s := range []*lab.Space{&n.Space, &n.Pods[0].Space} {
			if err := s.Sysctl("net/ipv4/tcp_tw_reuse", "1"); err != nil {
				return err
			}
			// Since Linux 6.14; before, it is one second.
			if err := s.Sysctl("net/ipv4/tcp_tw_reuse_delay", "100"); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		// Not on the nodes: VXLAN takes its source ports from the same range.
		if err := n.Pods[0].Sysctl("net/ipv4/ip_local_port_range", "1024 65000"); err != nil {
			return err
		}
	}
	return nil
}

// measureRound does each test in each mode once. Each round begins with
// another mode, so that none always follows the same one.
func (b *bench) measureRound(labs []*lab.Lab, underlay lab.Underlay, cpus, round int) error {
	for _, test := range b.options.tests {
		for i := range b.options.modes {
			m := b.options.modes[(i+round)%len(b.options.modes)]
			s, err := b.measure(labFor(labs, m), m, test, cpus)
			if err != nil {
				return fmt.Errorf("%s, mode %s, %s underlay: %w", test.name, m.name, underlay, err)
			}
			s.underlay, s.cpus, s.round = underlay, cpus, round
			b.samples = append(b.samples, s)
		}
	}
	return nil
}

// labFor finds the lab whose nodes a mode needs.
func labFor(labs []*lab.Lab, m mode) *lab.Lab {
	for _, l := range labs {
		if l.Node(1).Kind == m.kind {
			return l
		}
	}
	return labs[0]
}

// measure does one test in one mode.
func (b *bench) measure(l *lab.Lab, m mode, test workload, cpus int) (sample, error) {
	if m.enter != nil {
		if err := m.enter(b.ctx, l); err != nil {
			return sample{}, err
		}
	}
	if err := b.flushConntrack(l); err != nil {
		return sample{}, err
	}
	before, err := b.counters(l, m)
	if err != nil {
		return sample{}, err
	}
	c, err := b.load(l, m, test, cpus)
	if err != nil {
		return sample{}, err
	}
	after, err := b.counters(l, m)
	if err != nil {
		return sample{}, err
	}
	s := sample{test: test, mode: m.name, rate: c.rate(test), lost: c.Lost, accelerated: -1}
	if s.rate == 0 {
		return sample{}, errors.New("nothing arrived")
	}
	if rose := after.less(before); rose.all() > 0 {
		s.accelerated = float64(rose.accelerated()) / float64(rose.all())
	}
	return s, nil
}

// flushConntrack forgets the connections of earlier tests, of which TCP_CRR
// leaves tens of thousands, so that no test pays for another.
func (b *bench) flushConntrack(l *lab.Lab) error {
	if _, err := exec.LookPath("conntrack"); err != nil {
		return nil // then all modes pay alike
	}
	for _, n := range l.Nodes {
		if err := n.Run(b.ctx, "conntrack -F"); err != nil {
			return err
		}
	}
	return nil
}

// counters are those of the client's node, where weft counts.
func (b *bench) counters(l *lab.Lab, m mode) (counters, error) {
	if m.kind != lab.Weft {
		return counters{}, nil
	}
	text, err := l.Node(1).Output(b.ctx, "weft peers -o json")
	if err != nil {
		return counters{}, err
	}
	return parseCounters(text, l.Node(2).IP.String())
}

// load runs both sides of a test and returns the count that matters.
func (b *bench) load(l *lab.Lab, m mode, test workload, cpus int) (count, error) {
	client, server, at := lab.Runner(l.Pod(1, 1)), lab.Runner(l.Pod(2, 1)), l.Pod(2, 1).IP
	if m.hosts {
		client, server, at = l.Node(1), l.Node(2), l.Node(2).IP
	}
	ctx, cancel := context.WithTimeout(b.ctx, b.options.time+b.options.warm+20*time.Second)
	defer cancel()
	command := func(side string, cpu int) ([]string, error) {
		self, err := os.Executable()
		return []string{
			// Go would interrupt a thread that runs for long.
			"env", "GODEBUG=asyncpreemptoff=1", "taskset", "-c", fmt.Sprint(cpu), self, "load",
			"--time", b.options.time.String(), "--warm", b.options.warm.String(),
			side, test.name, fmt.Sprintf("%s:%d", at, 7000),
		}, err
	}
	serverCommand, err := command("server", cpus-1)
	if err != nil {
		return count{}, err
	}
	clientCommand, err := command("client", 0)
	if err != nil {
		return count{}, err
	}
	p, err := server.Start(serverCommand...)
	if err != nil {
		return count{}, err
	}
	defer func() { _ = p.Stop(unix.SIGKILL) }() // most have ended by then
	if err := p.WaitOutput(ctx, serverReady+"\n"); err != nil {
		return count{}, err
	}
	text, err := client.Output(ctx, clientCommand...)
	if err != nil {
		return count{}, fmt.Errorf("%w\nserver: %s", err, p.Output())
	}
	if test.serverCounts {
		if err := p.Wait(ctx); err != nil {
			return count{}, err
		}
		text = strings.TrimPrefix(p.Output(), serverReady+"\n")
	}
	var c count
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return count{}, fmt.Errorf("reading the count %q: %w", text, err)
	}
	return c, nil
}
