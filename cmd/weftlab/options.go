//go:build linux

package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// benchOptions say what is measured.
type benchOptions struct {
	name      string
	rounds    []int // in the first setting, and in the others
	time      time.Duration
	warm      time.Duration
	modes     []mode
	baselines []string
	tests     []workload
	settings  []setting
	netfilter bool
	weft      string
	programs  peerPrograms
	cards     []string // of all settings, or none
	junkRate  int
	csv, svg  string
}

// parseBench reads the command line.
func parseBench(e *env, args []string) (o benchOptions, err error) {
	var about strings.Builder
	about.WriteString("Measures ways for packets to go between two nodes, side by side: within each round every\n" +
		"test is done in every mode, so that what else happens on the machine hits them all.\n\nModes:\n")
	for _, m := range modes() {
		fmt.Fprintf(&about, "  %-11s  %s\n", m.name, m.about)
	}
	about.WriteString("\nTests:\n")
	for _, w := range workloads() {
		fmt.Fprintf(&about, "  %-11s  %s\n", w.name, w.about)
	}
	about.WriteString("\nOf --underlay, --cpus, --peers, --to and --junk the first values are the base, and each other value is tried\n" +
		"with all else as in the base; --full tries all combinations. In mode host the nodes talk to each\n" +
		"other directly, whatever --to says.\n")
	fs := newFlags(e, "bench", "[flags]", strings.TrimSuffix(about.String(), "\n"))
	fs.StringVar(&o.name, "name", "bench", "`name` of the lab")
	rounds := fs.String("rounds", "5", "`number` of rounds; a second one, as in 11,5, is for all but the base")
	fs.DurationVar(&o.time, "time", time.Second, "`time` to measure each test and mode in a round")
	fs.DurationVar(&o.warm, "warm", 200*time.Millisecond, "`time` before that which is not counted; UDP_RR takes two seconds at least, after which conntrack trusts the flow")
	modeList := fs.String("modes", "host,kernel,base", "`list` of modes")
	testList := fs.String("tests", "", "`list` of tests; all by default")
	baselines := fs.String("baseline", "", "`list` of modes that the others are compared with; by default flanneld (else kernel) and host")
	underlays := fs.String("underlay", "virtual,wire", "`list` of underlays: virtual carries aggregates whole, wire cuts them as a network card does, summed also computes their checksums")
	cards := fs.String("cards", "", "two `cards` of this machine, as in eth1,eth2, that are cabled to each other and that nobody uses: the underlay, in place of --underlay; they are in namespaces for as long as it takes, and come back down, with an MTU of 1500")
	cpus := fs.String("cpus", "1", "`list` of numbers of CPUs for client and server: 1 shows the cost of a transaction, 2 its latency")
	peers := fs.String("peers", "1", "`list` of numbers of nodes that each node is told of")
	to := fs.String("to", "pod", "`list` of what clients in pods talk to: pod, or a ClusterIP by real kube-proxy in a mode and with a number of Services, as in iptables:1 or nftables:1000")
	junk := fs.String("junk", noJunk, "`list` of what a stranger sends to the VXLAN port of the server's node meanwhile: none, vni (a wrong one), source (an unknown one), malformed")
	fs.IntVar(&o.junkRate, "junk-rate", defaultJunkRate, "`number` of datagrams of that a second, on the CPU of the client")
	full := fs.Bool("full", false, "try all combinations")
	noNetfilter := fs.Bool("no-netfilter", false, "without the rules that kube-proxy and flannel leave on a node")
	fs.StringVar(&o.csv, "csv", "", "`file` to write every single result to")
	fs.StringVar(&o.svg, "svg", "", "`file` to draw the ratios to the first baseline in")
	programs := fs.String("programs", "", "`list` of paths of flanneld, etcd, kube-apiserver and kube-proxy, where the modes need them; `test/peers` prints it")
	weft := weftFlag(fs)
	if _, err := parseFlags(fs, args, 0); err != nil {
		return o, err
	}
	o.netfilter = !*noNetfilter
	var errs [5]error
	o.modes, errs[0] = parseModes(*modeList)
	o.tests, errs[1] = parseTests(*testList)
	f, err := parseFactors(*underlays, *cpus, *peers, *to, *junk)
	errs[2] = err
	if *cards != "" {
		f.underlays, o.cards = []lab.Underlay{lab.Cards}, strings.Split(*cards, ",")
	}
	o.rounds, errs[3] = parseRounds(*rounds)
	if o.time <= 0 {
		errs[4] = usagef("bench: --time must be more than nothing")
	}
	if err := errors.Join(errs[:]...); err != nil {
		return o, err
	}
	if o.baselines, err = o.findBaselines(*baselines); err != nil {
		return o, err
	}
	o.settings = f.oneByOne()
	if *full {
		o.settings = f.combinations()
	}
	if !o.netfilter && slices.ContainsFunc(o.settings, func(s setting) bool { return s.to.proxy != "" }) {
		return o, usagef("bench: --no-netfilter leaves no ClusterIP to talk to; --to must be pod")
	}
	if o.hosts() && slices.ContainsFunc(o.settings, func(s setting) bool { return s.junk != noJunk }) {
		return o, usagef("bench: --junk needs modes with an overlay; leave out host")
	}
	if err := o.cardsFit(); err != nil {
		return o, err
	}
	if o.needs(lab.Weft) {
		if o.weft, err = findWeft(*weft); err != nil {
			return o, err
		}
	}
	o.programs, err = findPrograms(*programs, o.neededPrograms())
	return o, err
}

// cardsFit reports what can't be measured by cards: those are in one lab at a time.
func (o benchOptions) cardsFit() error {
	for _, s := range o.settings {
		switch {
		case s.underlay != lab.Cards:
		case len(o.cards) != 2:
			return usagef("bench: --cards has %q; give two, as in eth1,eth2", strings.Join(o.cards, ","))
		case s.to.proxy != "" || s.junk != noJunk:
			return usagef("bench: with --cards only pods are talked to, and nobody sends junk; leave out --to and --junk")
		}
	}
	return nil
}

// needs reports whether a mode needs nodes of a kind.
func (o benchOptions) needs(kind lab.Kind) bool {
	return slices.ContainsFunc(o.modes, func(m mode) bool { return m.kind == kind })
}

// hosts reports whether the nodes themselves talk in a mode.
func (o benchOptions) hosts() bool {
	return slices.ContainsFunc(o.modes, func(m mode) bool { return m.hosts })
}

// neededPrograms are those that modes and settings lean on.
func (o benchOptions) neededPrograms() (names []string) {
	proxy := slices.ContainsFunc(o.settings, func(s setting) bool { return s.to.proxy != "" })
	if o.needs(lab.Flanneld) {
		names = append(names, flanneldName)
	}
	if o.needs(lab.Flanneld) || proxy {
		names = append(names, etcdName)
	}
	if proxy {
		names = append(names, apiServerName, proxyName)
	}
	return names
}

// findBaselines reads a list of modes that are measured, or chooses.
func (o benchOptions) findBaselines(list string) (chosen []string, err error) {
	measured := func(name string) bool {
		return slices.ContainsFunc(o.modes, func(m mode) bool { return m.name == name })
	}
	if list != "" {
		for _, name := range strings.Split(list, ",") {
			if !measured(name) {
				return nil, usagef("bench: --baseline has %q, which is not among the modes", name)
			}
			chosen = append(chosen, name)
		}
		return chosen, nil
	}
	for _, name := range []string{"flanneld", "kernel", "host"} {
		if measured(name) && !(name == "kernel" && len(chosen) > 0) {
			chosen = append(chosen, name)
		}
	}
	if len(chosen) == 0 {
		chosen = []string{o.modes[0].name}
	}
	return chosen, nil
}

// roundsOf is the number of rounds in a setting, counted from 0.
func (o benchOptions) roundsOf(setting int) int { return o.rounds[min(setting, len(o.rounds)-1)] }

// estimate is about how long it will all take.
func (o benchOptions) estimate() time.Duration {
	const overhead = 250 * time.Millisecond // of a single measurement: programs start and end
	var sum time.Duration
	for i, s := range o.settings {
		for _, test := range o.tests {
			sum += time.Duration(o.roundsOf(i)*len(o.modes)) * (o.time + o.warmUp(test) + overhead)
		}
		if s.underlay == lab.Cards {
			sum += time.Duration(o.roundsOf(i)*len(o.modes)) * 5 * time.Second
		} else if i == 0 || s.world() != o.settings[i-1].world() {
			sum += 10 * time.Second
		}
	}
	return sum
}

// warmUp is the time before a test counts.
func (o benchOptions) warmUp(test workload) time.Duration { return max(o.warm, test.settle) }

// parseRounds reads one number or two.
func parseRounds(list string) (rounds []int, err error) {
	for _, word := range strings.Split(list, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 || len(rounds) == 2 {
			return nil, usagef("bench: --rounds is %q; give a number, or one for the base and one for the rest, as in 11,5", list)
		}
		rounds = append(rounds, n)
	}
	return rounds, nil
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
