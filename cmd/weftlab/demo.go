//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// runDemo is "weftlab demo".
func runDemo(e *env, args []string) error {
	fs := newFlags(e, "demo", "[flags]", "Shows weft at work between three nodes of two pods each. Every claim is checked: the exit\n"+
		"status is not zero when one does not hold.")
	name := fs.String("name", defaultName, "`name` of the lab")
	keep := fs.Bool("keep", false, "leave the lab up and say how to play with it")
	weft := weftFlag(fs)
	if _, err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	binary, err := findWeft(*weft)
	if err != nil {
		return err
	}
	d := &demo{env: e}
	if err := d.build(lab.Options{
		Name: *name, Nodes: 3, Pods: 2, Kinds: []lab.Kind{lab.Weft}, Binary: binary, Netfilter: true, Keep: *keep,
	}); err != nil {
		return err
	}
	if err := d.show(); err != nil {
		e.remove(d.lab)
		return err
	}
	if *keep {
		d.heading("Yours to play with")
		fmt.Fprintln(e.stdout)
		printPlay(e, d.lab)
		return nil
	}
	return d.end()
}

// demo is a show that is being given.
type demo struct {
	*env
	lab   *lab.Lab
	steps int
}

// show runs the steps in order, and stops at the first claim that is not true.
func (d *demo) show() error {
	for _, step := range []func() error{
		d.ping, d.traceroute, d.peers, d.express, d.bulk, d.switchWhileTrafficRuns, d.bpftool,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) build(opts lab.Options) (err error) {
	d.heading("Three nodes, two pods each, an agent per node")
	began := time.Now()
	if d.lab, err = lab.New(d.ctx, opts); err != nil {
		return err
	}
	fmt.Fprintln(d.stdout)
	table := tabwriter.NewWriter(d.stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "  NODE\tETH0\tCNI0\t%s\tPODS\n", strings.ToUpper(d.lab.Node(1).Overlay()))
	for _, n := range d.lab.Nodes {
		var pods []string
		for _, p := range n.Pods {
			pods = append(pods, p.IP.String())
		}
		fmt.Fprintf(table, "  %s\t%s\t%s\t%s\t%s\n", n, n.IP, n.Gateway, n.VTEP, strings.Join(pods, ", "))
	}
	table.Flush()
	d.notice("Built, and every agent said that it is ready, within %s.", time.Since(began).Round(100*time.Millisecond))
	return nil
}

// ping shows that pods reach each other through two routers.
func (d *demo) ping() error {
	d.heading("A pod pings a pod on another node")
	out, err := d.shown(d.lab.Pod(1, 1), "ping -c 3 -i 0.2 -W 2 "+d.lab.Pod(2, 1).IP.String())
	if err != nil {
		return err
	}
	if !strings.Contains(out, "ttl=62") || !strings.Contains(out, " 0% packet loss") {
		return errors.New("the ping should lose nothing and arrive with a TTL of 62")
	}
	d.notice("TTL 62 is 64 less two routers, the two nodes: as it is with flannel.")
	return nil
}

// traceroute shows which routers these are.
func (d *demo) traceroute() error {
	d.heading("The way it went")
	node, peer := d.lab.Node(1), d.lab.Node(2)
	out, err := d.shown(d.lab.Pod(1, 1), "traceroute -n -q 1 -w 2 "+d.lab.Pod(2, 1).IP.String())
	if err != nil {
		return err
	}
	var hops []string
	for _, line := range strings.Split(strings.TrimSpace(out), "\n")[1:] {
		hops = append(hops, strings.Fields(line)[1])
	}
	want := []string{node.Gateway.String(), peer.VTEP.String(), d.lab.Pod(2, 1).IP.String()}
	if strings.Join(hops, " ") != strings.Join(want, " ") {
		return fmt.Errorf("the hops should be %s", strings.Join(want, ", "))
	}
	d.notice("The hops are cni0 of its own node, %s of the other, and the pod.", peer.Overlay())
	return nil
}

// peers shows that packets are counted by peer and path.
func (d *demo) peers() error {
	d.heading("Who sent what, and by which path")
	before, err := d.counters()
	if err != nil {
		return err
	}
	if _, err := d.shown(d.lab.Node(1), "weft peers"); err != nil {
		return err
	}
	if _, err := d.shown(d.lab.Pod(1, 1), "ping -q -c 500 -i 0.002 "+d.lab.Pod(2, 1).IP.String()); err != nil {
		return err
	}
	if _, err := d.shown(d.lab.Node(1), "weft peers"); err != nil {
		return err
	}
	after, err := d.counters()
	if err != nil {
		return err
	}
	rose := after.less(before)
	if rose.all() < 2*500 {
		return fmt.Errorf("500 pings and their answers should be counted, and %d packets were", rose.all())
	}
	if rose.accelerated() < 2*400 {
		return fmt.Errorf("most of the %d packets of the ping should be accelerated, and %d were", rose.all(), rose.accelerated())
	}
	d.notice("Of %d packets, %d were accelerated and %d took the kernel path; weft status says why.",
		rose.all(), rose.accelerated(), rose.kernel)
	return nil
}

// express shows a flow that goes past the hosts' stacks, and that the hosts'
// rules are obeyed all the same.
func (d *demo) express() error {
	d.heading("A flow on the express path, and a rule against it")
	from, to := d.lab.Pod(1, 1), d.lab.Pod(2, 1)
	probe, err := lab.StartProbe(from, to, lab.ProbeOptions{Interval: time.Millisecond})
	if err != nil {
		return err
	}
	defer func() { _, _ = probe.Stop() }()
	seen, err := d.watch(time.Second)
	if err != nil {
		return err
	}
	d.notice("%s asks %s over UDP, once a millisecond: of %d packets in a second %d took express.",
		from, to, seen.all(), seen.express)
	if seen.express < seen.all()/2 {
		return fmt.Errorf("most of the %d packets should take the express path, and %d did", seen.all(), seen.express)
	}

	rule := fmt.Sprintf("FORWARD -p udp -s %s -d %s -j DROP", from.IP, to.IP)
	if _, err := d.shown(d.lab.Node(1), "iptables -I "+rule); err != nil {
		return err
	}
	if _, err := d.watch(250 * time.Millisecond); err != nil {
		return err
	}
	denied, err := d.watch(time.Second)
	if err != nil {
		return err
	}
	if denied.all() > 0 {
		return fmt.Errorf("the rule should end the flow, and %d packets of it were carried", denied.all())
	}
	if _, err := d.shown(d.lab.Node(1), "iptables -D "+rule); err != nil {
		return err
	}
	again, err := d.watch(time.Second)
	if err != nil {
		return err
	}
	if again.express == 0 {
		return errors.New("without the rule the flow should take the express path again")
	}
	d.notice("With the rule %d packets in a second; without it %d, %d of them by express.", denied.all(), again.all(), again.express)
	return nil
}

// bulk shows a transfer and its rate.
func (d *demo) bulk() error {
	d.heading("A bulk transfer")
	before, err := d.counters()
	if err != nil {
		return err
	}
	server, err := d.lab.Pod(2, 2).Start("iperf3 -s -1 --forceflush")
	if err != nil {
		return err
	}
	if err := server.WaitOutput(d.ctx, "Server listening"); err != nil {
		return err
	}
	out, err := d.shown(d.lab.Pod(1, 2), "iperf3 -t 2 -i 0 -c "+d.lab.Pod(2, 2).IP.String())
	if err != nil {
		return err
	}
	if !strings.Contains(out, "receiver") {
		return errors.New("iperf3 should tell what the receiver got")
	}
	after, err := d.counters()
	if err != nil {
		return err
	}
	rose := after.less(before)
	const least = 10 << 20
	if rose.bytes < least {
		return fmt.Errorf("the transfer should be counted in the peer's bytes, and they rose by %d", rose.bytes)
	}
	d.notice("%d MiB in %d packets on the wire were counted, %d of them by express. What a\n"+
		"  sender's kernel keeps in one piece of up to 64 KB goes to the peer through its VXLAN driver, which cuts it best.",
		rose.bytes>>20, rose.all(), rose.express)
	return nil
}

// switchWhileTrafficRuns shows that acceleration can go and come at any time.
func (d *demo) switchWhileTrafficRuns() error {
	d.heading("Acceleration off and on, while a ping every 2 ms runs")
	from, to := d.lab.Pod(1, 1), d.lab.Pod(2, 1)
	probe, err := lab.StartProbe(from, to, lab.ProbeOptions{ICMP: true})
	if err != nil {
		return err
	}
	defer func() { _, _ = probe.Stop() }() // if a claim does not hold
	if _, err := d.shown(d.lab.Node(1), "weft accel off"); err != nil {
		return err
	}
	off, err := d.watch(time.Second)
	if err != nil {
		return err
	}
	if _, err := d.shown(d.lab.Node(1), "weft peers"); err != nil {
		return err
	}
	if off.accelerated() != 0 || off.kernel == 0 {
		return fmt.Errorf("with acceleration off all packets should take the kernel path, and %d did, %d not", off.kernel, off.accelerated())
	}
	d.notice("Off: within a second, %d packets took the kernel path and none was accelerated.", off.kernel)
	if _, err := d.shown(d.lab.Node(1), "weft accel on"); err != nil {
		return err
	}
	on, err := d.watch(time.Second)
	if err != nil {
		return err
	}
	if on.accelerated() == 0 {
		return errors.New("with acceleration on again some packets should be accelerated")
	}
	result, err := probe.Stop()
	if err != nil {
		return err
	}
	d.notice("On again: within a second, %d packets were accelerated, %d took the kernel path.", on.accelerated(), on.kernel)
	fmt.Fprintf(d.stdout, "\n  the ping all the while: %s\n", result)
	if result.Lost > 0 {
		return fmt.Errorf("no packet should be lost by turning acceleration off and on, and %d were", result.Lost)
	}
	d.notice("Nothing was lost: the kernel path is always complete, the programs only overtake it.")
	return nil
}

// bpftool shows that what the programs know can be read by anybody.
func (d *demo) bpftool() error {
	d.heading("Looking under the hood with bpftool")
	node := d.lab.Node(1)
	out, err := d.shown(node, "sh", "-c", "bpftool map dump pinned /sys/fs/bpf/weft/peers | head -12")
	if err != nil {
		return err
	}
	if !strings.Contains(out, `"key"`) {
		return errors.New("the map of peers should have an entry")
	}
	out, err = d.shown(node, "bpftool link show pinned /sys/fs/bpf/weft/links/uplink_in")
	if err != nil {
		return err
	}
	program := linkedProgram.FindStringSubmatch(out)
	if program == nil {
		return errors.New("the pinned link should name its program")
	}
	out, err = d.shown(node, "sh", "-c", "bpftool prog show id "+program[1]+" | head -2")
	if err != nil {
		return err
	}
	if !strings.Contains(out, "name uplink_in") {
		return fmt.Errorf("program %s should be uplink_in", program[1])
	}
	d.notice("Maps and programs carry their types, so any tool can read them, without weft.")
	return nil
}

// linkedProgram finds the program's number in what bpftool prints of a link.
var linkedProgram = regexp.MustCompile(`prog (\d+)`)

// end removes the lab and checks that it is gone.
func (d *demo) end() error {
	d.heading("All gone")
	if err := d.lab.Close(); err != nil {
		return err
	}
	if _, err := lab.Open(d.lab.Name()); !errors.Is(err, lab.ErrNotUp) {
		return fmt.Errorf("lab %s should be gone, and is not (%w)", d.lab.Name(), err)
	}
	fmt.Fprintf(d.stdout, "\n  Nodes, pods, agents and programs are removed. KEEP=1 leaves them up: make demo KEEP=1\n")
	return nil
}

// heading begins a step.
func (d *demo) heading(title string) {
	d.steps++
	fmt.Fprintf(d.stdout, "\n%d. %s\n", d.steps, title)
}

// notice says what to notice in what was shown.
func (d *demo) notice(format string, args ...any) {
	fmt.Fprintf(d.stdout, "\n  "+format+"\n", args...)
}

// shown runs a command, and shows it and what it printed.
func (d *demo) shown(where lab.Runner, command ...string) (string, error) {
	line := strings.TrimPrefix(strings.Join(command, " "), "sh -c ")
	fmt.Fprintf(d.stdout, "\n%s # %s\n", where, line)
	out, err := where.Output(d.ctx, command...)
	indent(d.stdout, out)
	if err != nil {
		return out, fmt.Errorf("%s: this should have worked: %w", line, err)
	}
	return out, nil
}

// indent prints a command's output below it, without empty lines.
func indent(w io.Writer, text string) {
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) != "" {
			fmt.Fprintf(w, "  %s\n", strings.TrimRight(strings.ReplaceAll(line, "\t", "    "), " \n"))
		}
	}
}

// watch returns how the counters rise within a while.
func (d *demo) watch(while time.Duration) (counters, error) {
	before, err := d.counters()
	if err != nil {
		return counters{}, err
	}
	select {
	case <-time.After(while):
	case <-d.ctx.Done():
		return counters{}, d.ctx.Err()
	}
	after, err := d.counters()
	return after.less(before), err
}

// counters are the packets between node 1 and node 2 as node 1 counts them, in
// both directions, and their bytes.
type counters struct {
	express, base, kernel uint64
	bytes                 uint64
}

func (c counters) accelerated() uint64 { return c.express + c.base }
func (c counters) all() uint64         { return c.accelerated() + c.kernel }

func (c counters) less(d counters) counters {
	return counters{c.express - d.express, c.base - d.base, c.kernel - d.kernel, c.bytes - d.bytes}
}

// counters reads them with `weft peers`.
func (d *demo) counters() (counters, error) {
	text, err := d.lab.Node(1).Output(d.ctx, "weft peers -o json")
	if err != nil {
		return counters{}, err
	}
	return parseCounters(text, d.lab.Node(2).IP.String())
}

// parseCounters finds one peer's counters in what `weft peers -o json` printed.
func parseCounters(text, publicIP string) (counters, error) {
	var answer struct {
		Peers []struct {
			PublicIP string
			Counters []struct {
				Path                                   string
				TxPackets, RxPackets, TxBytes, RxBytes uint64
			}
		}
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return counters{}, fmt.Errorf("reading `weft peers -o json`: %w", err)
	}
	for _, p := range answer.Peers {
		if p.PublicIP != publicIP {
			continue
		}
		var c counters
		by := map[string]*uint64{"express": &c.express, "base": &c.base, "kernel": &c.kernel}
		for _, path := range p.Counters {
			if by[path.Path] == nil {
				return counters{}, fmt.Errorf("weft counts packets by a path %q", path.Path)
			}
			*by[path.Path] += path.TxPackets + path.RxPackets
			c.bytes += path.TxBytes + path.RxBytes
		}
		if len(p.Counters) == 0 {
			return counters{}, fmt.Errorf("weft has no counters for %s: are its programs attached?", publicIP)
		}
		return c, nil
	}
	return counters{}, fmt.Errorf("weft knows no peer %s", publicIP)
}
