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
		"":                        `weft: no command given; "weft help" lists them`,
		"stauts":                  `weft: there is no command "stauts"; there are agent, status, peers, accel, remove, version, help`,
		"--wide peers":            `weft: flags come after a command, as in "weft status --wide"; "weft help" lists the commands`,
		"status --colour":         `weft: status: there is no flag --colour; "weft status -h" lists the flags`,
		"status now":              `weft: status: there is no use for "now"; "weft status -h" shows how to call it`,
		"status -o yaml":          `weft: status: -o is "yaml"; give text or json`,
		"status --vni 16777216":   `weft: status: --vni is 16777216; give a number from 1 to 16777215`,
		"status --vni one":        `weft: status: invalid value "one" for flag -vni: parse error; "weft status -h" lists the flags`,
		"peers --pin-dir pins":    `weft: peers: --pin-dir is "pins"; give an absolute path`,
		"accel":                   `weft: accel: say "weft accel on" or "weft accel off"; "weft status" shows how it stands`,
		"accel maybe":             `weft: accel: say "weft accel on" or "weft accel off"; "weft status" shows how it stands`,
		"accel on node-b":         `weft: accel: there is no use for "node-b"; "weft accel -h" shows how to call it`,
		"agent":                   `weft: agent: --config is missing; give the YAML file that names this node and its peers`,
		"help stauts":             `weft: there is no command "stauts"; there are agent, status, peers, accel, remove, version, help`,
		"version -o text --peers": `weft: version: there is no flag --peers; "weft version -h" lists the flags`,
	} {
		status, stdout, stderr := newDesk(t).call(strings.Fields(line)...)
		if status != 2 || stdout != "" || stderr != want+"\n" {
			t.Errorf("weft %s: status %d, stdout %q\ngot  %s\nwant %s", line, status, stdout, strings.TrimSpace(stderr), want)
		}
	}
}

func TestAgentOptionsReportEveryFaultAtOnce(t *testing.T) {
	_, _, stderr := newDesk(t).call(strings.Fields("agent --accel on --source-check strict --max-peers 0 --metrics-addr 9273 --metrics-max-peers -1 --log-level loud --log-format xml --state-dir x")...)
	want := `weft: agent:
  --state-dir is "x"; give an absolute path
  --config is missing; give the YAML file that names this node and its peers
  --accel is "on"; give auto or off
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
		{"status-dead.txt", "status", all(ebpf, ran)},
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
				if err := json.Unmarshal([]byte(got), &v); err != nil || v.SchemaVersion != 1 {
					t.Errorf("schemaVersion %d, %v", v.SchemaVersion, err)
				}
			}
			if strings.ContainsRune(got, 0x1b) {
				t.Error("an escape sequence reached the terminal")
			}
		})
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
	for _, test := range []struct {
		args   string
		set    func(d *desk)
		want   string
		change []dataplane.Switch
	}{
		{"accel off", nil, "Acceleration is now off for this node.\n", []dataplane.Switch{{On: false}}},
		{"accel on", nil, "Acceleration is already on for this node.\n", nil},
		{
			"accel on", func(d *desk) { d.node.report = kernelReport() },
			"Acceleration is now on for this node.\nPackets still take the kernel path: kernel 5.4.0 has no TCX and no clsact\n",
			[]dataplane.Switch{{On: true}},
		},
		{"accel off --peer node-b", nil, "Acceleration is now off for node-b (192.0.2.2).\n", []dataplane.Switch{{Peers: []netip.Addr{b}}}},
		{"accel --peer 10.244.4.0/24 on", nil, "Acceleration is now on for node-c (192.0.2.3).\n", []dataplane.Switch{{On: true, Peers: []netip.Addr{c}}}},
		{
			"accel on --peer 192.0.2.2 --peer node-c --peer node-b", nil,
			"Acceleration is already on for node-b (192.0.2.2).\nAcceleration is now on for node-c (192.0.2.3).\n",
			[]dataplane.Switch{{On: true, Peers: []netip.Addr{c}}},
		},
		{
			"accel on --peer node-c", func(d *desk) { d.node.report.Accel = false },
			"Acceleration is now on for node-c (192.0.2.3).\nIt has no effect while it is off for the node; \"weft accel on\" turns that on.\n",
			[]dataplane.Switch{{On: true, Peers: []netip.Addr{c}}},
		},
		{
			"accel off -o json --peer node-b --peer node-c", nil,
			`{
  "schemaVersion": 1,
  "accel": "off",
  "scope": "peers",
  "changed": [
    "192.0.2.2"
  ],
  "already": [
    "192.0.2.3"
  ],
  "nodeChanged": false
}
`,
			[]dataplane.Switch{{Peers: []netip.Addr{b}}},
		},
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
	if got := d.must("remove"); got != "removed program uplink_in from eth0\nremoved pins in /sys/fs/bpf/weft\n" {
		t.Errorf("remove:\n%s", got)
	}
	if got := d.must("remove"); got != "There is nothing to remove.\n" {
		t.Errorf("remove again:\n%s", got)
	}
	if got := d.must("remove", "-o", "json"); got != "{\n  \"schemaVersion\": 1,\n  \"removed\": []\n}\n" {
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
	if v.SchemaVersion != 1 || v.Version != "v1.2.3" || v.Commit != "abcdef" || v.Go == "" || v.Kernel == "" {
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
