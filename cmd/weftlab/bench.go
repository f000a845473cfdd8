//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// mode is a way for packets to go between two nodes.
type mode struct {
	name, about string
	// kind is that of the nodes it needs, and agent what their weft agent is
	// told. Modes that are alike in both share their nodes.
	kind  lab.Kind
	agent []string
	// hosts tells that the nodes themselves talk, not their pods.
	hosts bool
	// enter brings the lab into the mode, if there is something to do.
	enter func(ctx context.Context, l *lab.Lab) error
}

// modes are all ways.
func modes() []mode {
	return []mode{
		{name: "host", about: "from node to node over the underlay, without overlay", kind: lab.Bare, hosts: true},
		{name: "plain", about: "pod to pod by the kernel, set up by ip commands: no agent, no programs", kind: lab.Kernel},
		{name: "flanneld", about: "pod to pod, stock flanneld over etcd", kind: lab.Flanneld},
		{name: "kernel", about: "pod to pod, weft with acceleration off", kind: lab.Weft, enter: accel("off")},
		{name: "base", about: "pod to pod, weft with the base path alone", kind: lab.Weft, enter: accel("on base", "off express")},
		{name: "express", about: "pod to pod, weft with all it has", kind: lab.Weft, enter: accel("on")},
		{name: "xdp", about: "express, and packets stripped in the uplink's driver where checksums are whole (--underlay summed)", kind: lab.Weft, agent: []string{"--xdp=on"}, enter: accel("on")},
		{name: "enforce", about: "express, and packets from who is no peer dropped", kind: lab.Weft, agent: []string{enforce}, enter: accel("on")},
		{name: "xdp-enforce", about: "the same, in the uplink's driver (--underlay summed)", kind: lab.Weft, agent: []string{"--xdp=on", enforce}, enter: accel("on")},
	}
}

const enforce = "--source-check=enforce"

// nodes tells modes apart that can't share their nodes.
func (m mode) nodes() string { return fmt.Sprint(m.kind, m.agent) }

// accel turns paths on and off on all nodes.
func accel(steps ...string) func(context.Context, *lab.Lab) error {
	return func(ctx context.Context, l *lab.Lab) error {
		for _, n := range l.Nodes {
			for _, step := range steps {
				if err := n.Run(ctx, "weft accel "+step); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

// runBench is "weftlab bench".
func runBench(e *env, args []string) error {
	o, err := parseBench(e, args)
	if err != nil {
		return err
	}
	b := &bench{env: e, options: o}
	if b.facts, err = b.findFacts(); err != nil {
		return err
	}
	b.writeFacts(e.stdout)
	fmt.Fprintf(e.stderr, "%d settings, about %s\n", len(o.settings), o.estimate().Round(10*time.Second))
	err = b.measureAll()
	return errors.Join(err, b.writeFiles())
}

// bench is a measurement that is going on.
type bench struct {
	*env
	options benchOptions
	facts   []fact
	samples []sample
}

// sample is one result.
type sample struct {
	setting setting
	test    workload
	mode    string
	round   int
	rate    float64
	lost    uint64
	// junk is how many datagrams of it were sent a second.
	junk float64
	// counted is how the packets went on the client's node, where weft counts.
	counted counters
}

// fact is something a reader of the results has to know.
type fact struct{ name, value string }

// findFacts tells what is measured, and on what.
func (b *bench) findFacts() ([]fact, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	o := b.options
	facts := []fact{
		{"date", time.Now().UTC().Format("2006-01-02 15:04 MST")},
		{"kernel", unix.ByteSliceToString(name.Release[:])},
		{"CPU", cpuModel()},
	}
	for _, card := range o.cards {
		facts = append(facts, fact{"card " + card, "driver " + driverOf(card)})
	}
	if o.weft != "" {
		version, err := exec.CommandContext(b.ctx, o.weft, "version").Output()
		if err != nil {
			return nil, fmt.Errorf("asking %s for its version: %w", o.weft, err)
		}
		first, _, _ := strings.Cut(string(version), "\n")
		facts = append(facts, fact{"weft", strings.TrimPrefix(first, "weft ")})
	}
	for _, name := range []string{flanneldName, proxyName} {
		if o.programs[name] == "" {
			continue
		}
		version, err := o.programs.version(b.ctx, name)
		if err != nil {
			return nil, err
		}
		facts = append(facts, fact{name, version})
	}
	netfilter := "as kube-proxy and flannel leave it, conntrack on"
	if !o.netfilter {
		netfilter = "without the rules of kube-proxy and flannel"
	}
	rounds := strconv.Itoa(o.rounds[0])
	if len(o.rounds) > 1 {
		rounds += fmt.Sprintf(" in the base and %d in the rest,", o.rounds[1])
	}
	if slices.ContainsFunc(o.settings, func(s setting) bool { return s.junk != noJunk }) {
		facts = append(facts, fact{"junk", fmt.Sprintf("%d datagrams a second, sent on the client's CPU", o.junkRate)})
	}
	return append(facts,
		fact{"netfilter", netfilter},
		fact{"rounds", fmt.Sprintf("%s of %s for each test and mode, in alternating order", rounds, o.time)}), nil
}

// driverOf names the driver of a device, which virtual ones lack.
func driverOf(device string) string {
	link, err := os.Readlink(filepath.Join("/sys/class/net", device, "device/driver"))
	if err != nil {
		return "none"
	}
	return filepath.Base(link)
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

// measureAll measures setting after setting, and prints a table after each.
func (b *bench) measureAll() error {
	var labs testbed
	defer func() { b.removeAll(labs) }()
	for i, s := range b.options.settings {
		if i == 0 || s.world() != b.options.settings[i-1].world() {
			b.removeAll(labs)
			var err error
			if s.underlay == lab.Cards {
				labs = testbed{} // see labFor
			} else if labs, err = b.build(s); err != nil {
				return fmt.Errorf("%s: %w", s, err)
			}
		}
		for round := 1; round <= b.options.roundsOf(i); round++ {
			fmt.Fprintf(b.stderr, "%s: round %d of %d\n", s, round, b.options.roundsOf(i))
			if err := b.measureRound(labs, s, round); err != nil {
				return err
			}
		}
		b.writeTable(b.stdout, s)
	}
	return nil
}

// testbed is the labs of one world, by mode.nodes.
type testbed map[string]*lab.Lab

// removeAll removes the labs. Those that are gone do not matter.
func (b *bench) removeAll(labs testbed) {
	for nodes, l := range labs {
		b.remove(l)
		delete(labs, nodes)
	}
}

// build makes a lab for all kinds of nodes that the modes need. What it has
// made it returns also when it fails.
func (b *bench) build(s setting) (testbed, error) {
	labs := testbed{}
	var inOrder []*lab.Lab
	for _, m := range b.options.modes {
		if labs[m.nodes()] != nil {
			continue
		}
		l, err := b.buildLab(s, m, fmt.Sprint(b.options.name, len(labs)+1))
		if err != nil {
			return labs, err
		}
		labs[m.nodes()] = l
		inOrder = append(inOrder, l)
	}
	if s.to.proxy == "" {
		return labs, nil
	}
	return labs, b.makeServices(inOrder, s.to)
}

// buildLab makes the nodes for a mode, and for all that share them.
func (b *bench) buildLab(s setting, m mode, name string) (*lab.Lab, error) {
	o := b.options
	l, err := lab.New(b.ctx, lab.Options{
		Name: name, Kinds: []lab.Kind{m.kind}, Underlay: s.underlay, Cards: o.cards, Strangers: s.peers - 1,
		Netfilter: o.netfilter, KubeProxy: s.to.proxy != "",
		Binary: o.weft, AgentFlags: m.agent, Flanneld: o.programs[flanneldName], Etcd: o.programs[etcdName],
	})
	if err != nil {
		return nil, err
	}
	err = prepare(l)
	if m.kind == lab.Weft && o.netfilter { // flanneld makes its rules by itself
		for _, n := range l.Nodes {
			err = errors.Join(err, n.LoadFlannelRules(b.ctx))
		}
	}
	if err != nil {
		b.remove(l)
		return nil, err
	}
	return l, nil
}

// makeServices gives all labs the rules of real kube-proxies.
func (b *bench) makeServices(labs []*lab.Lab, to target) error {
	k, err := startKube(b.ctx, b.options.name+"k", b.options.programs)
	if err != nil {
		return err
	}
	defer b.remove(k.lab)
	if err := k.create(b.ctx, labs[0], to.services); err != nil {
		return err
	}
	return k.proxies(b.ctx, labs, to)
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

// turn is one measurement of a round.
type turn struct {
	test workload
	mode mode
}

// turns are those of a round, in order: each test in each mode once. Each round
// begins with another mode, so that none always follows the same one. With cards a mode
// does all its tests before the next one gets the cards.
func (b *bench) turns(s setting, round int) (all []turn) {
	modes := slices.Concat(b.options.modes, b.options.modes)[round%len(b.options.modes):][:len(b.options.modes)]
	if s.underlay == lab.Cards {
		for _, m := range modes {
			for _, test := range b.options.tests {
				all = append(all, turn{test, m})
			}
		}
		return all
	}
	for _, test := range b.options.tests {
		for _, m := range modes {
			all = append(all, turn{test, m})
		}
	}
	return all
}

// measureRound takes all turns of a round.
func (b *bench) measureRound(labs testbed, s setting, round int) error {
	for _, t := range b.turns(s, round) {
		l, err := b.labFor(labs, s, t.mode)
		if err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
		result, err := b.measure(l, s, t.mode, t.test)
		if err != nil {
			return fmt.Errorf("%s, mode %s, %s: %w", t.test.name, t.mode.name, s, err)
		}
		result.round = round
		b.samples = append(b.samples, result)
	}
	return nil
}

// labFor returns the lab of a mode. Cards are in one lab at a time, so it is built
// where another one has them.
func (b *bench) labFor(labs testbed, s setting, m mode) (*lab.Lab, error) {
	if l := labs[m.nodes()]; l != nil {
		return l, nil
	}
	b.removeAll(labs)
	l, err := b.buildLab(s, m, b.options.name)
	if err == nil {
		labs[m.nodes()] = l
	}
	return l, err
}

// measure does one test in one mode.
func (b *bench) measure(l *lab.Lab, at setting, m mode, test workload) (sample, error) {
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
	c, err := b.load(l, at, m, test)
	if err != nil {
		return sample{}, err
	}
	after, err := b.counters(l, m)
	if err != nil {
		return sample{}, err
	}
	s := sample{setting: at, test: test, mode: m.name, rate: c.rate(test), lost: c.Lost, junk: c.junk, counted: after.less(before)}
	if s.rate == 0 {
		return sample{}, errors.New("nothing arrived")
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
func (b *bench) load(l *lab.Lab, s setting, m mode, test workload) (c count, err error) {
	client, server, at := lab.Runner(l.Pod(1, 1)), lab.Runner(l.Pod(2, 1)), l.Pod(2, 1).IP
	to := at
	switch {
	case m.hosts:
		client, server, at = l.Node(1), l.Node(2), l.Node(2).IP
		to = at
	case s.to.proxy != "":
		to = serviceIP(0)
	}
	ctx, cancel := context.WithTimeout(b.ctx, b.options.time+b.options.warmUp(test)+20*time.Second)
	defer cancel()
	options := []string{"--time", b.options.time.String(), "--warm", b.options.warmUp(test).String()}
	serverCommand, err := loadCommand(s.cpus-1, "server", test.name, netip.AddrPortFrom(at, testPort), options...)
	if err != nil {
		return count{}, err
	}
	clientCommand, err := loadCommand(0, "client", test.name, netip.AddrPortFrom(to, testPort), options...)
	if err != nil {
		return count{}, err
	}
	stopJunk, err := b.startJunk(l, s)
	if err != nil {
		return count{}, err
	}
	defer func() {
		rate, stopErr := stopJunk()
		c.junk, err = rate, errors.Join(err, stopErr)
	}()
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
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return count{}, fmt.Errorf("reading the count %q: %w", text, err)
	}
	return c, nil
}

// loadCommand is the command of one side of a test, or of who sends junk, on a CPU.
func loadCommand(cpu int, side, what string, at netip.AddrPort, options ...string) ([]string, error) {
	self, err := os.Executable()
	// Go would interrupt a thread that runs for long.
	command := []string{"env", "GODEBUG=asyncpreemptoff=1", "taskset", "-c", strconv.Itoa(cpu), self, "load"}
	return append(append(command, options...), side, what, at.String()), err
}
