package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// example is the documented config file.
func example(tb testing.TB) string {
	tb.Helper()
	data, err := os.ReadFile("../../controlplane/static/testdata/example.yaml")
	if err != nil {
		tb.Fatal(err)
	}
	return string(data)
}

// runningAgent is an agent in the background.
type runningAgent struct {
	*desk
	config string
	stop   func()
	done   chan struct{}
	status int
	errs   *syncBuffer
}

// startAgent runs an agent on the example, with more flags if given.
func (d *desk) startAgent(args ...string) *runningAgent {
	d.tb.Helper()
	return d.startAgentBy(args, run)
}

// startAgentWith is startAgent with other intervals.
func (d *desk) startAgentWith(t timing) *runningAgent {
	d.tb.Helper()
	return d.startAgentBy(nil, func(e *env, args []string) int {
		var o agentOptions
		fs := newFlags(e, "agent", "", "")
		o.register(fs.FlagSet)
		if _, err := parseFlags(fs, args[1:]); err != nil {
			d.tb.Error(err)
		}
		if err := serve(e, o, t); err != nil {
			d.tb.Error(err)
			return 1
		}
		return 0
	})
}

// startAgentBy has an agent run in the background.
func (d *desk) startAgentBy(args []string, run func(*env, []string) int) *runningAgent {
	d.tb.Helper()
	a := &runningAgent{desk: d, config: filepath.Join(d.tb.TempDir(), "weft.yaml"), done: make(chan struct{}), errs: &syncBuffer{}}
	a.write(example(d.tb))
	ctx, stop := context.WithCancel(d.tb.Context())
	a.stop = stop
	args = append([]string{"agent", "--config", a.config, "--run-dir", d.runDir, "--metrics-addr", "127.0.0.1:0"}, args...)
	go func() {
		defer close(a.done)
		a.status = run(&env{ctx: ctx, stdout: io.Discard, stderr: a.errs, node: d.node, now: time.Now, getenv: d.getenv}, args)
	}()
	d.tb.Cleanup(func() { a.end() })
	return a
}

// write replaces the config.
func (a *runningAgent) write(text string) {
	a.tb.Helper()
	if err := os.WriteFile(a.config+".tmp", []byte(text), 0o600); err != nil {
		a.tb.Fatal(err)
	}
	if err := os.Rename(a.config+".tmp", a.config); err != nil {
		a.tb.Fatal(err)
	}
}

// end stops the agent and returns its exit status.
func (a *runningAgent) end() int {
	a.stop()
	<-a.done
	return a.status
}

// info is the run file as it is.
func (a *runningAgent) info() runInfo {
	info, _ := readRunInfo(a.runDir)
	return info
}

// eventually waits for ok in real time.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	tb.Fatalf("not within ten seconds: %s", what)
}

// story is a log without what differs from run to run.
func (a *runningAgent) story() string {
	s := strings.ReplaceAll(a.errs.String(), a.config, "CONFIG")
	for pattern, with := range map[string]string{
		`(?m)^time=\S+ `:   "",
		`version=\S+`:      "version=V",
		`pid=\d+`:          "pid=N",
		`kernel=\S+`:       "kernel=K",
		`address=\S+`:      "address=A",
		`(took|after)=\S+`: "$1=T",
	} {
		s = regexp.MustCompile(pattern).ReplaceAllString(s, with)
	}
	return s
}

func TestAgentStory(t *testing.T) {
	d := newDesk(t)
	d.node.report = agentReport()
	a := d.startAgent("--source-check", "enforce", "--express", "on", "--max-peers", "9", "--pin-dir", "/p", "--state-dir", "/s")
	eventually(t, "ready", func() bool { return a.info().Ready && a.info().Mode == "ebpf" })

	info := a.info()
	if info.Node != "node-a" || info.VNI != 1 || info.Peers != 1 || info.PID != os.Getpid() || info.Store.Kind != "static" ||
		info.Store.Config != a.config || info.Sync.LastSuccess.IsZero() || info.Metrics.Address == "" ||
		info.Names[netip.MustParseAddr("192.0.2.2")] != "node-b" || len(info.Express.LeftAlone) != 2 {
		t.Errorf("run file %+v", info)
	}
	if stat, err := os.Stat(runPath(d.runDir)); err != nil || stat.Mode().Perm() != 0o644 {
		t.Errorf("run file %v, %v", stat.Mode(), err)
	}
	d.node.locked(func() {
		o := d.node.opened
		if o.SourceCheck != "enforce" || o.MaxPeers != 9 || o.PinDir != "/p" || o.StateDir != "/s" || o.Accel != "auto" || o.Express != "on" {
			t.Errorf("opened with %+v", o)
		}
	})

	if status := a.end(); status != 0 {
		t.Errorf("exit status %d", status)
	}
	golden(t, "agent-story.txt", a.story())
	if !d.node.closed {
		t.Error("the dataplane was not closed")
	}
	view, err := viewAgent(d.runDir)
	if err != nil || view.Life != stopped || view.Info.Ready {
		t.Errorf("afterwards: %+v, %v", view, err)
	}
}

func TestSecondAgentIsTurnedAway(t *testing.T) {
	d := newDesk(t)
	a := d.startAgent()
	eventually(t, "ready", func() bool { return a.info().Ready })
	status, _, stderr := d.call("agent", "--config", a.config, "--metrics-addr", "")
	want := regexp.MustCompile(`^weft: another agent runs with --run-dir RUN \(process \d+ holds the lock RUN/agent.lock\); stop it, or give this one directories of its own\n$`)
	if status != 1 || !want.MatchString(stderr) {
		t.Errorf("status %d, %s", status, stderr)
	}
	if view, _ := viewAgent(d.runDir); view.Life != running {
		t.Errorf("the first one is %s", view.Life)
	}
}

func TestAgentWithABrokenFileAtStart(t *testing.T) {
	d := newDesk(t)
	path := filepath.Join(t.TempDir(), "weft.yaml")
	if err := os.WriteFile(path, []byte(strings.Replace(example(t), "vni: 1 ", "vni: 0 ", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	status, _, stderr := d.call("agent", "--config", path)
	if status != 1 || !strings.Contains(stderr, "weft: the config file cannot be used:\n"+path+":3: vni: \"0\"") {
		t.Errorf("status %d, %s", status, stderr)
	}
	if d.node.opened.PinDir != "" {
		t.Error("the dataplane was opened all the same")
	}
}

func TestAgentWhoseDataplaneDoesNotOpen(t *testing.T) {
	d := newDesk(t)
	d.node.err = errors.New("not root")
	a := d.startAgent()
	<-a.done
	if a.status != 1 || !strings.Contains(a.errs.String(), "weft: opening the dataplane: not root\n") {
		t.Errorf("status %d, %s", a.status, a.errs)
	}
}

func TestBrokenFileAtReloadKeepsPeersAndReadiness(t *testing.T) {
	d := newDesk(t)
	d.node.report = ebpfReport()
	a := d.startAgent()
	eventually(t, "ready", func() bool { return a.info().Ready })
	good := example(t)

	a.write(strings.Replace(good, "vni: 1 ", "vni: 0 ", 1))
	eventually(t, "the fault in the run file", func() bool {
		return strings.Contains(a.info().Store.Error, "CONFIG") || strings.Contains(a.info().Store.Error, ":3: vni")
	})
	if code, _ := a.get("/readyz"); code != 200 {
		t.Errorf("/readyz %d", code)
	}
	if _, body := a.get("/metrics"); !strings.Contains(body, "weft_store_failures_total 1\n") || !strings.Contains(body, "weft_store_up 0\n") {
		t.Error("the metrics do not tell")
	}

	a.write(good + "  - {name: node-c, prefixes: [10.244.3.0/24], publicIP: 192.0.2.3, mac: 0a:58:0a:f4:03:00}\n")
	eventually(t, "both peers", func() (ok bool) {
		d.node.locked(func() { ok = len(d.node.state.Peers) == 2 })
		return ok
	})
	eventually(t, "a healthy run file", func() bool { return a.info().Store.Error == "" && a.info().Peers == 2 })
	a.end()
	golden(t, "agent-reload.txt", a.story())
}

func TestFailingSyncsAreToldAndRetried(t *testing.T) {
	d := newDesk(t)
	d.node.report = kernelReport()
	d.node.syncErr = errors.New("adding route: no such device")
	a := d.startAgent()
	eventually(t, "two failures", func() bool { return a.info().Sync.Failures >= 2 })
	if code, body := a.get("/readyz"); code != 503 || !strings.Contains(body, "the first sync failed and is tried again: adding route: no such device") {
		t.Errorf("/readyz %d %s", code, body)
	}
	if code, _ := a.get("/healthz"); code != 200 {
		t.Errorf("/healthz %d", code)
	}
	d.node.locked(func() { d.node.syncErr = nil })
	eventually(t, "ready", func() bool { return a.info().Ready && a.info().Sync.Error == "" })
	if code, body := a.get("/readyz"); code != 200 || body != "ok\n" {
		t.Errorf("/readyz %d %s", code, body)
	}
}

func TestAKernelChangeIsSynced(t *testing.T) {
	d := newDesk(t)
	a := d.startAgent()
	eventually(t, "ready", func() bool { return a.info().Ready })
	var before int
	d.node.locked(func() { before = d.node.syncs })
	d.node.changes <- struct{}{}
	eventually(t, "another sync", func() (ok bool) {
		d.node.locked(func() { ok = d.node.syncs > before })
		return ok
	})
}

// Pods come and go, and express is held back and let go, without a sync.
func TestWhatTheAgentKnowsIsWrittenWithoutASync(t *testing.T) {
	d := newDesk(t)
	d.node.report = ebpfReport()
	gaps := defaultTiming()
	gaps.LookGap, gaps.ReportGap = time.Millisecond, 0
	a := d.startAgentWith(gaps)
	eventually(t, "ready", func() bool { return a.info().Ready && a.info().Mode == "ebpf" })
	var before int
	d.node.locked(func() { before = d.node.syncs })
	if info := a.info(); info.Express.Reasons != nil || info.Express.LeftAlone != nil {
		t.Errorf("before: %+v", info.Express)
	}

	d.node.locked(func() {
		d.node.report = agentReport()
		d.node.report.Express.Reasons = []string{"express packets would bypass qdisc tbf on cni0"}
	})
	eventually(t, "what is in the way", func() bool { return len(a.info().Express.Reasons) == 1 && len(a.info().Express.LeftAlone) == 2 })
	d.node.locked(func() { d.node.report = ebpfReport() })
	eventually(t, "that nothing is", func() bool { return a.info().Express.Reasons == nil && a.info().Express.LeftAlone == nil })
	d.node.locked(func() {
		if d.node.syncs != before {
			t.Errorf("%d syncs, %d before", d.node.syncs, before)
		}
	})
	a.end()
	if n := strings.Count(a.errs.String(), "packets take the"); n != 1 {
		t.Errorf("the mode is told %d times:\n%s", n, a.errs)
	}
}

func TestAgentWithoutMetrics(t *testing.T) {
	d := newDesk(t)
	a := d.startAgent("--metrics-addr", "", "--log-format", "json")
	eventually(t, "ready", func() bool { return a.info().Ready })
	if a.info().Metrics.Address != "" {
		t.Error("metrics are served")
	}
	a.end()
	for line := range strings.Lines(a.errs.String()) {
		if !json.Valid([]byte(line)) {
			t.Errorf("no JSON: %s", line)
		}
	}
}

// get asks the agent's server.
func (a *runningAgent) get(path string) (int, string) {
	a.tb.Helper()
	response, err := http.Get("http://" + a.info().Metrics.Address + path)
	if err != nil {
		a.tb.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		a.tb.Fatal(err)
	}
	return response.StatusCode, string(body)
}

func TestLives(t *testing.T) {
	d := newDesk(t)
	expect := func(want life) {
		t.Helper()
		view, err := viewAgent(d.runDir)
		if err != nil || view.Life != want {
			t.Errorf("%s, %v; want %s", view.Life, err, want)
		}
	}
	expect(never)
	d.ran(nil)
	expect(dead)
	held, err := takeLock(d.runDir)
	if err != nil {
		t.Fatal(err)
	}
	expect(running)
	if _, err := takeLock(d.runDir); !errors.Is(err, errLocked) {
		t.Errorf("a second lock: %v", err)
	}
	held.Release()
	expect(dead)
	d.ran(func(r *runInfo) { r.StoppedAt = noon })
	expect(stopped)
}

// An agent that is killed cannot say so; the kernel does.
func TestKilledAgentIsDead(t *testing.T) {
	const variable = "WEFT_TEST_RUN_DIR"
	if dir := os.Getenv(variable); dir != "" {
		if _, err := takeLock(dir); err != nil {
			t.Fatal(err)
		}
		fmt.Println("locked")
		time.Sleep(time.Minute)
		return
	}
	d := newDesk(t)
	d.ran(nil)
	agent := exec.Command(os.Args[0], "-test.run=^TestKilledAgentIsDead$")
	agent.Env = append(os.Environ(), variable+"="+d.runDir)
	stdout, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "locked\n" {
		t.Fatalf("%q, %v", line, err)
	}
	view, err := viewAgent(d.runDir)
	if want := fmt.Sprintf("process %d", agent.Process.Pid); err != nil || view.Life != running || view.Holder != want {
		t.Errorf("%s by %s, %v; want %s", view.Life, view.Holder, err, want)
	}
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = agent.Wait()
	if view, err := viewAgent(d.runDir); err != nil || view.Life != dead {
		t.Errorf("%s, %v", view.Life, err)
	}
	held, err := takeLock(d.runDir)
	if err != nil {
		t.Fatal(err)
	}
	held.Release()
}

func TestRunFileLeavesNothingBehind(t *testing.T) {
	d := newDesk(t)
	d.ran(nil)
	d.ran(nil)
	entries, err := os.ReadDir(d.runDir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "agent.json" {
		t.Errorf("%v, %v", entries, err)
	}
}
