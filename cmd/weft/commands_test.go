package main

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
)

func TestHelp(t *testing.T) {
	d := newDesk(t)
	golden(t, "help.txt", d.must("help"))
	for _, args := range []string{"-h", "--help", "-help", "help help"} {
		if got, want := d.must(strings.Fields(args)...), d.must("help"); got != want {
			t.Errorf("weft %s differs from weft help", args)
		}
	}
}

func TestEveryCommandsHelp(t *testing.T) {
	for _, c := range commands() {
		if c.name == "help" {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			d := newDesk(t)
			got := d.must(c.name, "-h")
			golden(t, "help-"+c.name+".txt", got)
			if other := d.must("help", c.name); other != got {
				t.Errorf("weft help %s differs", c.name)
			}
			for line := range strings.Lines(got) {
				if strings.HasPrefix(line, "Usage") && len(line) > 100 {
					t.Errorf("a long line: %s", line)
				}
			}
		})
	}
}

func TestCommandLinesThatCannotBeUnderstood(t *testing.T) {
	for line, want := range map[string]string{
		"":                      `weft: no command given; "weft help" lists them`,
		"stauts":                `weft: there is no command "stauts"; there are agent, status, peers, accel, migrate, remove, cni-plugin, install, wait, mk-docker-opts, version, help`,
		"--wide peers":          `weft: flags come after a command, as in "weft status --wide"; "weft help" lists the commands`,
		"status --colour":       `weft: status: there is no flag --colour; "weft status -h" lists the flags`,
		"status now":            `weft: status: there is no use for "now"; "weft status -h" shows how to call it`,
		"status -o yaml":        `weft: status: -o is "yaml"; give text or json`,
		"status --vni 16777216": `weft: status: --vni is 16777216; give a number from 1 to 16777215`,
		"status --vni one":      `weft: status: invalid value "one" for flag -vni: parse error; "weft status -h" lists the flags`,
		"peers --pin-dir pins":  `weft: peers: --pin-dir is "pins"; give an absolute path`,
		"accel":                 `weft: accel: say "weft accel on" or "weft accel off"; "weft status" shows how it stands`,
		"migrate":               `weft: migrate: say "weft migrate check", with the arguments that flanneld has`,
		"migrate now":           `weft: migrate: say "weft migrate check", with the arguments that flanneld has`,
		"accel maybe":           `weft: accel: say "weft accel on" or "weft accel off"; "weft status" shows how it stands`,
		"accel express on":      `weft: accel: say "weft accel on" or "weft accel off"; "weft status" shows how it stands`,
		"accel on node-b":       `weft: accel: "node-b" is no path with a switch; say express or base, or neither for both, and name a peer with --peer`,
		"accel off kernel":      `weft: accel: "kernel" is no path with a switch; say express or base, or neither for both, and name a peer with --peer`,
		"accel on express base": `weft: accel: there is no use for "base"; "weft accel -h" shows how to call it`,
		"agent --config a.yaml --kube-subnet-mgr": `weft: agent: --config and --kube-subnet-mgr both say where the peers come from; give one of them`,
		"help stauts":             `weft: there is no command "stauts"; there are agent, status, peers, accel, migrate, remove, cni-plugin, install, wait, mk-docker-opts, version, help`,
		"version -o text --peers": `weft: version: there is no flag --peers; "weft version -h" lists the flags`,
	} {
		status, stdout, stderr := newDesk(t).call(strings.Fields(line)...)
		if status != 2 || stdout != "" || stderr != want+"\n" {
			t.Errorf("weft %s: status %d, stdout %q\ngot  %s\nwant %s", line, status, stdout, strings.TrimSpace(stderr), want)
		}
	}
}

func TestAgentOptionsReportEveryFaultAtOnce(t *testing.T) {
	_, _, stderr := newDesk(t).call(strings.Fields("agent --accel on --express off,auto --source-check strict --max-peers 0 --metrics-addr 9273 --metrics-max-peers -1 --log-level loud --log-format xml --state-dir x --healthz-port 99999 --iface-regex [ --public-ip none --subnet-lease-renew-margin 1440 --iptables-resync 0 --etcd-endpoints nowhere://x --etcd-certfile c --subnet-file s")...)
	want := `weft: agent:
  --state-dir is "x"; give an absolute path
  --iptables-resync is 0; give a number from 1 to 86400
  --subnet-lease-renew-margin is 1440; give a number from 1 to 1439
  --healthz-port is 99999; give a number from 0 to 65535
  --iface-regex "[" is not a regular expression: error parsing regexp: missing closing ]: ` + "`[`" + `
  --public-ip "none" is not an IPv4 address
  --etcd-endpoints has "nowhere://x", which is neither http nor https; give URLs as in http://127.0.0.1:2379
  --etcd-certfile is "c" and --etcd-keyfile ""; give both, or none if etcd asks for no certificate
  --accel is "on"; give auto or off
  --express is "off,auto"; give auto, on or off
  --source-check is "strict"; give off, observe or enforce
  --max-peers is 0; give a number from 1 to 100000
  --metrics-addr is "9273"; give host:port or :port, as in :9273
  --metrics-max-peers is -1; give a number from 0 to 100000
  --log-level is "loud"; give debug, info, warn or error
  --log-format is "xml"; give text or json
`
	if stderr != want {
		t.Errorf("got:\n%s\nwant:\n%s", stderr, want)
	}
}

func TestExpressOnWithoutAcceleration(t *testing.T) {
	for _, test := range []struct {
		accel, express string
		refused        bool
	}{
		{"off", "on", true},
		{"off", "off", false},
		{"off", "auto", false},
		{"auto", "on", false},
	} {
		status, _, stderr := newDesk(t).call("agent", "--config", "/does/not/exist", "--accel", test.accel, "--express", test.express)
		want := `weft: agent: --express is "on", but --accel=off leaves nothing but the kernel path; give auto or off` + "\n"
		if refused := status == 2 && stderr == want; refused != test.refused {
			t.Errorf("--accel %s --express %s: status %d, %s", test.accel, test.express, status, stderr)
		}
	}
}

func TestScreens(t *testing.T) {
	type screen struct {
		name string
		args string
		set  func(d *desk)
	}
	ebpf := func(d *desk) { d.node.report = ebpfReport() }
	all := func(fs ...func(*desk)) func(*desk) {
		return func(d *desk) {
			for _, f := range fs {
				f(d)
			}
		}
	}
	ran := func(d *desk) { d.ran(nil) }
	running := all(ran, (*desk).runs)
	for _, s := range []screen{
		{"status-running.txt", "status", all(ebpf, running)},
		{"status-running.json", "status -o json", all(ebpf, running)},
		{"status-never.txt", "status", func(d *desk) {
			d.node.report = dataplane.Report{Mode: "kernel", Reason: "weft has not run here"}
		}},
		{"status-never.json", "status -o json", func(d *desk) {
			d.node.report = dataplane.Report{Mode: "kernel", Reason: "weft has not run here"}
		}},
		{"status-dead.txt", "status", all(ebpf, noExpress, ran)},
		{"status-stopped-kernel.txt", "status", func(d *desk) {
			d.node.report = kernelReport()
			d.ran(func(r *runInfo) { r.StoppedAt = noon.Add(-3 * time.Minute) })
		}},
		{"status-failing.txt", "status", all(ebpf, (*desk).runs, func(d *desk) {
			d.ran(func(r *runInfo) {
				r.Store.Error = "keeping what was read last: /etc/weft/weft.yaml:3: vni"
				r.Sync = syncInfo{Error: "adding route: no such device\x1b[2J", Failures: 4}
			})
		})},
		{"peers.txt", "peers", all(ebpf, running)},
		{"peers-wide.txt", "peers --wide", all(ebpf, running)},
		{"peers.json", "peers -o json", all(ebpf, running)},
		{"peers-dead.txt", "peers", all(ebpf, ran)},
		{"peers-never.txt", "peers", ebpf},
		{"peers-kernel.txt", "peers", all(running, func(d *desk) { d.node.report = kernelReport() })},
		{"peers-none.txt", "peers", all(running, func(d *desk) { d.node.report = dataplane.Report{Mode: "ebpf"} })},
	} {
		t.Run(s.name, func(t *testing.T) {
			d := newDesk(t)
			s.set(d)
			got := d.must(strings.Fields(s.args)...)
			golden(t, s.name, got)
			if strings.HasSuffix(s.name, ".json") {
				var v struct{ SchemaVersion int }
				if err := json.Unmarshal([]byte(got), &v); err != nil || v.SchemaVersion != outputSchema {
					t.Errorf("schemaVersion %d, %v", v.SchemaVersion, err)
				}
			}
			if strings.ContainsRune(got, 0x1b) {
				t.Error("an escape sequence reached the terminal")
			}
		})
	}
}

// facts picks the lines of one fact from weft status.
func (d *desk) facts(name string) string {
	d.tb.Helper()
	_, rest, found := strings.Cut("\n"+d.must("status"), "\n"+name+" ")
	if !found {
		return ""
	}
	var lines []string
	for line := range strings.Lines(rest) {
		if len(lines) > 0 && !strings.HasPrefix(line, " ") {
			break
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	return strings.Join(lines, "\n")
}

func TestExpressOnTheScreen(t *testing.T) {
	held := []string{"the agent holds it back"}
	shaped := someLeftAlone[:1]
	for _, test := range []struct {
		name    string
		life    life
		express dataplane.Express
		agent   expressInfo
		set     func(*dataplane.Report)
		want    string
	}{
		{"On", running, dataplane.Express{On: true, Pods: 3}, expressInfo{}, nil, "on, 3 pods served"},
		{"OnePod", running, dataplane.Express{On: true, Pods: 1}, expressInfo{}, nil, "on, 1 pod served"},
		{
			"OneLeftAlone", running,
			dataplane.Express{On: true, Pods: 3},
			expressInfo{LeftAlone: shaped},
			nil,
			"on, 3 pods served, 1 left alone\nveth3c5e: the pod is shaped (qdisc tbf)",
		},
		{
			"AnAddressLeftAlone", running,
			dataplane.Express{On: true},
			expressInfo{LeftAlone: someLeftAlone[1:]},
			nil,
			"on, 0 pods served, 1 left alone\nveth9a10 (10.244.1.9): the host has no route to it",
		},
		{
			"SeveralLeftAlone", running,
			dataplane.Express{On: true, Pods: 3},
			expressInfo{LeftAlone: someLeftAlone},
			nil,
			"on, 3 pods served, 2 left alone (-o json has all)\nveth3c5e: the pod is shaped (qdisc tbf)",
		},
		{
			"HeldByTheAgentWhichSaysWhy", running,
			dataplane.Express{Pods: 3, Reasons: held},
			expressInfo{Reasons: []string{"express packets would bypass qdisc tbf on cni0", "the pods of this node can't be found: EPERM"}, LeftAlone: shaped},
			nil,
			"off: express packets would bypass qdisc tbf on cni0; the pods of this node\n" +
				"can't be found: EPERM\n" +
				"3 pods to serve, 1 left alone\nveth3c5e: the pod is shaped (qdisc tbf)",
		},
		{"HeldByTheAgentWhichHasNotWrittenYet", running, dataplane.Express{Pods: 3, Reasons: held}, expressInfo{}, nil, "off: the agent holds it back\n3 pods to serve"},
		{"OnAgainWhichTheAgentHasNotWrittenYet", running, dataplane.Express{On: true, Pods: 3}, expressInfo{Reasons: held}, nil, "on, 3 pods served"},
		{
			// What a dead agent wrote is not true any more.
			"SilentSinceTheAgentIsDead", dead,
			dataplane.Express{Pods: 3, Reasons: []string{"no agent follows the host's rules"}},
			expressInfo{Reasons: held, LeftAlone: shaped},
			nil,
			"off: no agent follows the host's rules\n3 pods to serve",
		},
		{
			"SilentSinceTheAgentWasStopped", stopped,
			dataplane.Express{Reasons: []string{"no agent follows the host's rules"}},
			expressInfo{LeftAlone: shaped},
			nil,
			"off: no agent follows the host's rules",
		},
		{
			"SwitchedOff", running,
			dataplane.Express{Pods: 3},
			expressInfo{LeftAlone: shaped},
			func(r *dataplane.Report) { r.Switches = baseOnly },
			"off: switched off (weft accel on express)\n3 pods to serve, 1 left alone\nveth3c5e: the pod is shaped (qdisc tbf)",
		},
		{
			"SwitchedOffAndHeld", running,
			dataplane.Express{Reasons: held},
			expressInfo{},
			func(r *dataplane.Report) { r.Switches = baseOnly },
			"off: switched off (weft accel on express); the agent holds it back",
		},
		{"OnWhileBaseIsOff", running, dataplane.Express{On: true, Pods: 3}, expressInfo{}, func(r *dataplane.Report) { r.Switches = expressOnly }, "on, 3 pods served"},
		{
			"WithoutPrograms", running,
			dataplane.Express{},
			expressInfo{},
			func(r *dataplane.Report) { r.Mode, r.Reason = "kernel", "not attached: uplink_in" },
			"off: the programs are not attached",
		},
		{"ForNoReason", running, dataplane.Express{}, expressInfo{}, nil, "off"},
		{
			"AReasonFromTheNetwork", running,
			dataplane.Express{Reasons: []string{"no\x1b[2J\nway"}},
			expressInfo{},
			nil,
			"off: no·[2J way",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDesk(t)
			d.node.report = ebpfReport()
			d.node.report.Express = test.express
			if test.set != nil {
				test.set(&d.node.report)
			}
			d.ran(func(r *runInfo) {
				r.Express = test.agent
				if test.life == stopped {
					r.StoppedAt = noon
				}
			})
			if test.life == running {
				d.runs()
			}
			if got := d.facts("express"); got != test.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, test.want)
			}
		})
	}
}

// The overlay's line is as wide as weft status was before express had one.
func TestExpressMakesTheScreenNoWider(t *testing.T) {
	d := newDesk(t)
	d.node.report = ebpfReport()
	d.node.report.Express = dataplane.Express{Pods: 110, Reasons: []string{"held"}}
	long := strings.TrimSpace(strings.Repeat("net.netfilter.nf_conntrack_tcp_be_liberal is not 1 ", 9))
	d.ran(func(r *runInfo) {
		r.Express = expressInfo{Reasons: []string{long, long}, LeftAlone: []dataplane.LeftAlone{
			{Veth: "veth0123456789", IP: netip.MustParseAddr("10.244.255.255"), Reason: long}, {Veth: "veth1"},
		}}
	})
	d.runs()
	head, _, _ := strings.Cut(d.must("status"), "\n\n")
	_, overlay, _ := strings.Cut(head, "\noverlay ")
	overlay, _, _ = strings.Cut("overlay "+overlay, "\n")
	for line := range strings.Lines(head) {
		if line = strings.TrimRight(line, "\n"); width(line) > width(overlay) {
			t.Errorf("wider than the overlay's line: %s", line)
		}
	}
	if words := strings.Count(strings.Join(strings.Fields(head), " "), long); words != 3 {
		t.Errorf("%d of 3 reasons are there:\n%s", words, head)
	}
}

func TestExpressForPrograms(t *testing.T) {
	d := newDesk(t)
	d.node.report = ebpfReport()
	d.node.report.Express = dataplane.Express{Pods: 3, Reasons: []string{"the agent holds it back"}, Epoch: 7}
	d.ran(func(r *runInfo) { r.Express.Reasons = []string{"because"} })
	d.runs()
	var v struct {
		Agent  map[string]any
		Report struct{ Express map[string]any }
	}
	if err := json.Unmarshal([]byte(d.must("status", "-o", "json")), &v); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"on": false, "pods": 3., "epoch": 7., "reasons": []any{"because"},
		"leftAlone": []any{
			map[string]any{"veth": "veth3c5e", "reason": "the pod is shaped (qdisc tbf)"},
			map[string]any{"veth": "veth9a10", "ip": "10.244.1.9", "reason": "the host has no route to it"},
		},
	}
	if !reflect.DeepEqual(v.Report.Express, want) {
		t.Errorf("got %v\nwant %v", v.Report.Express, want)
	}
	if v.Agent["express"] != nil {
		t.Error("it is told twice")
	}
}

// What the agent wrote some seconds ago gives way to what the pins say now.
func TestExpressIsOnWhileTheRunFileSaysOtherwise(t *testing.T) {
	d := newDesk(t)
	d.node.report = ebpfReport()
	d.ran(func(r *runInfo) { r.Express.Reasons = []string{"because"} })
	d.runs()
	if got := d.must("status", "-o", "json"); strings.Contains(got, "because") {
		t.Error(got)
	}
	if got := d.must("accel", "on", "express"); got != "The express path is already on for this node.\n" {
		t.Error(got)
	}
	d.node.report.Express = dataplane.Express{Reasons: []string{"the agent holds it back"}}
	if got := d.must("accel", "on", "express"); got != "The express path is already on for this node.\nPackets still take the other paths: because\n" {
		t.Error(got)
	}
}

func TestSwitchesOnTheScreens(t *testing.T) {
	for _, test := range []struct {
		node, peer dataplane.Switches
		status     string // of the node and that peer
		peers      string // the peer's column ACCEL
	}{
		{allOn, allOn, "on", "on"},
		{allOn, baseOnly, "on, partly off for 1 peer", "base only"},
		{allOn, expressOnly, "on, partly off for 1 peer", "express only"},
		{allOn, allOff, "on, off for 1 peer", "off"},
		{baseOnly, allOn, "base only", "base only (node)"},
		{baseOnly, baseOnly, "base only, partly off for 1 peer", "base only"},
		{baseOnly, expressOnly, "base only, partly off for 1 peer", "off (node)"},
		{expressOnly, allOn, "express only", "express only (node)"},
		{expressOnly, baseOnly, "express only, partly off for 1 peer", "off (node)"},
		{expressOnly, allOff, "express only, off for 1 peer", "off"},
		{allOff, allOn, "off", "off (node)"},
		{allOff, allOff, "off, off for 1 peer", "off"},
	} {
		d := newDesk(t)
		d.node.report = ebpfReport()
		d.node.report.Switches = test.node
		d.node.report.Peers = d.node.report.Peers[:1]
		d.node.report.Peers[0].Switches = test.peer
		if got := d.facts("accel"); got != test.status {
			t.Errorf("node %+v, peer %+v: status says %q, want %q", test.node, test.peer, got, test.status)
		}
		if got := d.must("peers"); !strings.Contains(got, "  10.244.2.0/24  "+test.peers+"  ") {
			t.Errorf("node %+v, peer %+v: peers says %q, want %q", test.node, test.peer, got, test.peers)
		}
	}
	d := newDesk(t)
	d.node.report = ebpfReport()
	d.node.report.Peers = append(d.node.report.Peers, dataplane.PeerReport{Switches: baseOnly}, dataplane.PeerReport{Switches: expressOnly})
	if got, want := d.facts("accel"), "on, off for 1 peer, partly off for 2 peers"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestScreensAskForTheAgentsOverlay(t *testing.T) {
	d := newDesk(t)
	for _, test := range []struct{ ran, args, want string }{
		{"", "status", "/sys/fs/bpf/weft 1"},
		{"7", "status", "/sys/fs/bpf/weft 7"},
		{"7", "peers --vni 9 --pin-dir /p", "/p 9"},
	} {
		if test.ran != "" {
			d.ran(func(r *runInfo) { r.VNI = 7 })
		}
		d.must(strings.Fields(test.args)...)
		if d.node.inspected != test.want {
			t.Errorf("weft %s looked at %q, want %q", test.args, d.node.inspected, test.want)
		}
	}
}

func TestUnreadableDataplane(t *testing.T) {
	for _, command := range []string{"status", "peers", "accel on", "remove"} {
		d := newDesk(t)
		d.node.err = errors.New("permission denied")
		status, _, stderr := d.call(strings.Fields(command)...)
		if status != 1 || !strings.Contains(stderr, "permission denied") {
			t.Errorf("weft %s: status %d, %s", command, status, stderr)
		}
	}
}

func TestRunFileOfAnotherVersion(t *testing.T) {
	d := newDesk(t)
	d.ran(func(r *runInfo) { r.SchemaVersion = 2 })
	status, _, stderr := d.call("status")
	want := "weft: RUN/agent.json has schema version 2, this weft knows 1; use the weft that the agent runs\n"
	if status != 1 || stderr != want {
		t.Errorf("status %d, %s", status, stderr)
	}
}

func TestAccel(t *testing.T) {
	b, c := netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3")
	kernel := func(d *desk) {
		d.node.report = kernelReport()
		d.node.report.Switches = allOff
	}
	node := func(s dataplane.Switches) func(*desk) {
		return func(d *desk) { d.node.report.Switches = s }
	}
	peerB := func(s dataplane.Switches) func(*desk) {
		return func(d *desk) { d.node.report.Peers[0].Switches = s }
	}
	express, base := []string{"express"}, []string{"base"}
	for _, test := range []struct {
		args   string
		set    func(d *desk)
		want   string
		change []dataplane.Switch
	}{
		{"accel off", nil, "Acceleration is now off for this node.\n", []dataplane.Switch{{On: false}}},
		{"accel on", nil, "Acceleration is already on for this node.\n", nil},
		{"accel off", node(allOff), "Acceleration is already off for this node.\n", nil},
		{"accel on", node(baseOnly), "Acceleration is now on for this node.\n", []dataplane.Switch{{On: true}}},
		{"accel off", node(expressOnly), "Acceleration is now off for this node.\n", []dataplane.Switch{{On: false}}},
		{
			"accel on", kernel,
			"Acceleration is now on for this node.\nPackets still take the kernel path: kernel 5.4.0 has no TCX and no clsact\n",
			[]dataplane.Switch{{On: true}},
		},

		{"accel off express", nil, "The express path is now off for this node.\n", []dataplane.Switch{{Paths: express}}},
		{"accel off base", nil, "The base path is now off for this node.\n", []dataplane.Switch{{Paths: base}}},
		{"accel off express", node(baseOnly), "The express path is already off for this node.\n", nil},
		{"accel on base", node(baseOnly), "The base path is already on for this node.\n", nil},
		{"accel on express", node(baseOnly), "The express path is now on for this node.\n", []dataplane.Switch{{On: true, Paths: express}}},
		{"accel on express", node(allOff), "The express path is now on for this node.\n", []dataplane.Switch{{On: true, Paths: express}}},
		{
			"accel on express", kernel,
			"The express path is now on for this node.\nPackets still take the kernel path: kernel 5.4.0 has no TCX and no clsact\n",
			[]dataplane.Switch{{On: true, Paths: express}},
		},
		{
			"accel on express", noExpress,
			"The express path is already on for this node.\nPackets still take the other paths: no agent follows the host's rules\n",
			nil,
		},
		{"accel on", noExpress, "Acceleration is already on for this node.\n", nil},
		{"accel off express", noExpress, "The express path is now off for this node.\n", []dataplane.Switch{{Paths: express}}},

		{"accel off --peer node-b", nil, "Acceleration is now off for node-b (192.0.2.2).\n", []dataplane.Switch{{Peers: []netip.Addr{b}}}},
		{"accel --peer 10.244.4.0/24 on", nil, "Acceleration is now on for node-c (192.0.2.3).\n", []dataplane.Switch{{On: true, Peers: []netip.Addr{c}}}},
		{
			"accel on --peer 192.0.2.2 --peer node-c --peer node-b", nil,
			"Acceleration is already on for node-b (192.0.2.2).\nAcceleration is now on for node-c (192.0.2.3).\n",
			[]dataplane.Switch{{On: true, Peers: []netip.Addr{c}}},
		},
		{"accel on --peer node-b", peerB(baseOnly), "Acceleration is now on for node-b (192.0.2.2).\n", []dataplane.Switch{{On: true, Peers: []netip.Addr{b}}}},
		{"accel off --peer node-b", peerB(baseOnly), "Acceleration is now off for node-b (192.0.2.2).\n", []dataplane.Switch{{Peers: []netip.Addr{b}}}},
		{
			"accel off express --peer node-b --peer node-c", nil,
			"The express path is now off for node-b (192.0.2.2).\nThe express path is already off for node-c (192.0.2.3).\n",
			[]dataplane.Switch{{Paths: express, Peers: []netip.Addr{b}}},
		},
		{"accel off express --peer node-b", peerB(baseOnly), "The express path is already off for node-b (192.0.2.2).\n", nil},
		{"accel off --peer node-b base", peerB(baseOnly), "The base path is now off for node-b (192.0.2.2).\n", []dataplane.Switch{{Paths: base, Peers: []netip.Addr{b}}}},

		{
			"accel on --peer node-c", node(allOff),
			"Acceleration is now on for node-c (192.0.2.3).\nIt has no effect while it is off for the node; \"weft accel on\" turns that on.\n",
			[]dataplane.Switch{{On: true, Peers: []netip.Addr{c}}},
		},
		{
			"accel on --peer node-c", node(baseOnly),
			"Acceleration is now on for node-c (192.0.2.3).\nThe express path stays off for the node; \"weft accel on express\" turns that on.\n",
			[]dataplane.Switch{{On: true, Peers: []netip.Addr{c}}},
		},
		{
			"accel on express --peer node-c", node(baseOnly),
			"The express path is now on for node-c (192.0.2.3).\nIt has no effect while it is off for the node; \"weft accel on express\" turns that on.\n",
			[]dataplane.Switch{{On: true, Paths: express, Peers: []netip.Addr{c}}},
		},
		{"accel on base --peer node-b", node(baseOnly), "The base path is already on for node-b (192.0.2.2).\n", nil},
		{"accel off --peer node-b", node(allOff), "Acceleration is now off for node-b (192.0.2.2).\n", []dataplane.Switch{{Peers: []netip.Addr{b}}}},

		{"accel on express -o json", noExpress, `{
  "schemaVersion": 2,
  "accel": "on",
  "paths": [
    "express"
  ],
  "scope": "node",
  "nodeChanged": false
}
`, nil},
		{"accel off -o json", node(baseOnly), `{
  "schemaVersion": 2,
  "accel": "off",
  "paths": [
    "express",
    "base"
  ],
  "scope": "node",
  "nodeChanged": true
}
`, []dataplane.Switch{{}}},
		{"accel off base -o json --peer node-b --peer node-c", nil, `{
  "schemaVersion": 2,
  "accel": "off",
  "paths": [
    "base"
  ],
  "scope": "peers",
  "changed": [
    "192.0.2.2"
  ],
  "already": [
    "192.0.2.3"
  ],
  "nodeChanged": false
}
`, []dataplane.Switch{{Paths: base, Peers: []netip.Addr{b}}}},
	} {
		d := newDesk(t)
		d.node.report = ebpfReport()
		d.ran(nil)
		if test.set != nil {
			test.set(d)
		}
		if got := d.must(strings.Fields(test.args)...); got != test.want {
			t.Errorf("weft %s:\n%s\nwant:\n%s", test.args, got, test.want)
		}
		if !reflect.DeepEqual(d.node.switches, test.change) {
			t.Errorf("weft %s switched %v, want %v", test.args, d.node.switches, test.change)
		}
	}
}

// noExpress is a node whose agent is gone.
func noExpress(d *desk) {
	d.node.report.Express.On = false
	d.node.report.Express.Reasons = []string{"no agent follows the host's rules"}
}

// What cannot be switched is named with what was to be switched.
func TestAccelThatFails(t *testing.T) {
	for args, want := range map[string]string{
		"accel off":                       "weft: turning acceleration off: read-only file system\n",
		"accel off express":               "weft: turning the express path off: read-only file system\n",
		"accel off base --peer 192.0.2.2": "weft: turning the base path off: read-only file system\n",
	} {
		d := newDesk(t)
		d.node.report = ebpfReport()
		d.node.switchErr = errors.New("read-only file system")
		if status, stdout, stderr := d.call(strings.Fields(args)...); status != 1 || stdout != "" || stderr != want {
			t.Errorf("weft %s: status %d, %s%s", args, status, stdout, stderr)
		}
	}
}

func TestAccelOfUnknownPeersChangesNothing(t *testing.T) {
	d := newDesk(t)
	d.node.report = ebpfReport()
	status, _, stderr := d.call("accel", "off", "--peer", "node-x", "--peer", "192.0.2.2", "--peer", "10.9.0.0/24")
	want := `weft: no peer has the name, public IP or pod prefix "node-x", "10.9.0.0/24"; "weft peers" lists them` + "\n"
	if status != 1 || stderr != want || d.node.switches != nil {
		t.Errorf("status %d, switches %v, %s", status, d.node.switches, stderr)
	}
}

func TestRemove(t *testing.T) {
	d := newDesk(t)
	d.ran(func(r *runInfo) { r.VNI = 7 })
	d.node.removals = []string{"program uplink_in from eth0", "pins in /sys/fs/bpf/weft"}
	d.node.left = []string{"net.netfilter.x = 1"}
	if got := d.must("remove"); got != "removed program uplink_in from eth0\nremoved pins in /sys/fs/bpf/weft\nleft net.netfilter.x = 1\n" {
		t.Errorf("remove:\n%s", got)
	}
	if got := d.must("remove"); got != "There is nothing to remove.\n" {
		t.Errorf("remove again:\n%s", got)
	}
	if got := d.must("remove", "-o", "json"); got != "{\n  \"schemaVersion\": 2,\n  \"removed\": []\n}\n" {
		t.Errorf("remove -o json:\n%s", got)
	}
	// The VNI of the agent's is still known.
	if got := d.must("remove", "--all"); got != "removed device flannel.7\nremoved run file RUN/agent.json\n" {
		t.Errorf("remove --all:\n%s", got)
	}
	if view, err := viewAgent(d.runDir); err != nil || view.Life != never {
		t.Errorf("after remove --all: %v, %v", view.Life, err)
	}
}

func TestRemoveMakesNoRunDirectory(t *testing.T) {
	d := newDesk(t)
	d.must("remove")
	if _, err := os.Stat(d.runDir); !os.IsNotExist(err) {
		t.Errorf("the run directory was made: %v", err)
	}
}

func TestRemoveWhileAnAgentRuns(t *testing.T) {
	d := newDesk(t)
	d.ran(nil)
	d.runs()
	d.node.removals = []string{"everything"}
	status, stdout, stderr := d.call("remove")
	want := "weft: an agent runs (process 4242 holds the lock RUN/agent.lock) and would put everything back; stop it first, with kill and its number or by stopping its service or DaemonSet, then remove again\n"
	if status != 1 || stdout != "" || stderr != want || d.node.removals == nil {
		t.Errorf("status %d, %s%s", status, stdout, stderr)
	}
}

func TestVersion(t *testing.T) {
	version, commit = "v1.2.3", "abcdef"
	defer func() { version, commit = "", "" }()
	d := newDesk(t)
	got := d.must("version")
	if !strings.HasPrefix(got, "weft v1.2.3\ncommit abcdef\ngo1.") || !strings.Contains(got, "\nkernel ") {
		t.Error(got)
	}
	var v struct {
		SchemaVersion               int
		Version, Commit, Go, Kernel string
	}
	if err := json.Unmarshal([]byte(d.must("version", "-o", "json")), &v); err != nil {
		t.Fatal(err)
	}
	if v.SchemaVersion != outputSchema || v.Version != "v1.2.3" || v.Commit != "abcdef" || v.Go == "" || v.Kernel == "" {
		t.Errorf("%+v", v)
	}
}

func TestUnits(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0", 999: "999", 1000: "1.00k", 1234: "1.23k", 12345: "12.3k", 999499: "999k", 999999: "1.00M", 1 << 63: "9.22E",
	} {
		if got := count(n); got != want {
			t.Errorf("count(%d) = %s, want %s", n, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 1536: "1.50 KiB", 1 << 20: "1.00 MiB", 1<<20 - 1: "1.00 MiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{0: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m1s", 26 * time.Hour: "1d2h", -time.Hour: "0s"} {
		if got := age(noon, noon.Add(-d)); got != want {
			t.Errorf("age %v is %s, want %s", d, got, want)
		}
	}
}
