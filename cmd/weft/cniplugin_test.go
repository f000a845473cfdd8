package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/weft-net/weft/test/netns"
)

// The test program is weft when it is called as the CNI plugin, as the image's is,
// and a plugin that writes down its calls when it is called so.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "flannel":
		os.Exit(weft(os.Args))
	case "recorder":
		os.Exit(recordCall())
	}
	os.Exit(m.Run())
}

// recorded is a call of the plugin "recorder".
type recorded struct {
	Command, Container, IfName, Netns string
	Conf                              map[string]any
}

// recordCall is the plugin "recorder": it adds its call to the file that "log" in
// its configuration names, and does what "fail" and "result" say.
func recordCall() int {
	input, _ := io.ReadAll(os.Stdin)
	call := recorded{
		Command: os.Getenv("CNI_COMMAND"), Container: os.Getenv("CNI_CONTAINERID"),
		IfName: os.Getenv("CNI_IFNAME"), Netns: os.Getenv("CNI_NETNS"),
	}
	if call.Command == "VERSION" {
		fmt.Println(`{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}`)
		return 0
	}
	if err := json.Unmarshal(input, &call.Conf); err != nil {
		panic(err)
	}
	log, err := os.OpenFile(call.Conf["log"].(string), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	defer log.Close()
	if err := json.NewEncoder(log).Encode(call); err != nil {
		panic(err)
	}
	if fail, _ := call.Conf["fail"].(string); strings.Contains(fail, call.Command) {
		fmt.Printf(`{"cniVersion":%q,"code":107,"msg":"told to fail"}`, call.Conf["cniVersion"])
		return 1
	}
	if call.Command == "ADD" {
		fmt.Printf(`{"cniVersion":%q,"ips":[{"version":"4","address":"10.244.1.2/24"}]}`, call.Conf["cniVersion"])
	}
	return 0
}

// pluginDesk is where a test calls the plugin: directories, and two namespaces.
type pluginDesk struct {
	dir       string
	host, pod *netns.NS
}

func newPluginDesk(t *testing.T) *pluginDesk {
	t.Helper()
	p := &pluginDesk{dir: t.TempDir()}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"flannel", "recorder"} {
		if err := os.Symlink(self, filepath.Join(p.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	p.write(t, "subnet.env", "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n")
	return p
}

func (p *pluginDesk) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// kept lists what is in the directory where the plugin keeps what it delegated.
func (p *pluginDesk) kept(t *testing.T) []string { return p.list(t, "kept") }

func (p *pluginDesk) list(t *testing.T, name string) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(p.dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// conf is a network's configuration, with more fields to follow.
func (p *pluginDesk) conf(version, more string) string {
	return fmt.Sprintf(`{"name":"cbr0","cniVersion":%q,"type":"flannel","subnetFile":%q,"dataDir":%q%s}`,
		version, filepath.Join(p.dir, "subnet.env"), filepath.Join(p.dir, "kept"), more)
}

// call calls the plugin as a runtime does, and returns its exit status and what it
// printed.
func (p *pluginDesk) call(t *testing.T, command, container, ifName, conf string) (int, string) {
	t.Helper()
	c := exec.Command(filepath.Join(p.dir, "flannel"))
	c.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+container, "CNI_IFNAME="+ifName,
		"CNI_PATH="+p.dir+":/usr/lib/cni")
	if p.pod != nil {
		c.Env = append(c.Env, "CNI_NETNS="+p.pod.Path())
	} else {
		c.Env = append(c.Env, "CNI_NETNS=/proc/self/ns/net", "CNI_NETNS_OVERRIDE=1")
	}
	var out, errs bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(conf), &out, &errs
	err := c.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if errs.Len() > 0 {
		t.Logf("%s says: %s", command, errs.String())
	}
	return c.ProcessState.ExitCode(), out.String()
}

// mustCall is call that must work.
func (p *pluginDesk) mustCall(t *testing.T, command, container, ifName, conf string) string {
	t.Helper()
	status, out := p.call(t, command, container, ifName, conf)
	if status != 0 {
		t.Fatalf("%s of %s %s: status %d, %s", command, container, ifName, status, out)
	}
	return out
}

// mustFail is call that must fail with a code of the specification, and words.
func (p *pluginDesk) mustFail(t *testing.T, code uint, words, command, conf string) {
	t.Helper()
	status, out := p.call(t, command, "one", "eth0", conf)
	var failure struct {
		CNIVersion string
		Code       uint
		Msg        string
	}
	if err := json.Unmarshal([]byte(out), &failure); err != nil {
		t.Fatalf("%s: status %d, %q: %v", command, status, out, err)
	}
	if status == 0 || failure.Code != code || !strings.Contains(failure.Msg, words) || failure.CNIVersion == "" {
		t.Errorf("%s: status %d, %+v; want code %d, %q", command, status, failure, code, words)
	}
}

// calls reads what the plugin "recorder" has noted since it was last read.
func (p *pluginDesk) calls(t *testing.T) []recorded {
	t.Helper()
	path := filepath.Join(p.dir, "log")
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	os.Remove(path)
	var calls []recorded
	for line := range strings.Lines(string(text)) {
		var call recorded
		if err := json.Unmarshal([]byte(line), &call); err != nil {
			t.Fatal(err)
		}
		calls = append(calls, call)
	}
	return calls
}

// recording is the part of a configuration that delegates to the plugin "recorder".
func (p *pluginDesk) recording(fail string) string {
	return fmt.Sprintf(`,"delegate":{"type":"recorder","log":%q,"fail":%q}`, filepath.Join(p.dir, "log"), fail)
}

func TestPluginSaysItsVersions(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	out := p.mustCall(t, "VERSION", "", "", "")
	if want := `"supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]`; !strings.Contains(out, want) {
		t.Errorf("VERSION: %s, want %s", out, want)
	}
}

func TestPluginDelegatesEveryCall(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	conf := p.conf("1.1.0", p.recording(""))
	for _, command := range []string{"STATUS", "ADD", "CHECK", "DEL"} {
		p.mustCall(t, command, "one", "eth0", conf)
		calls := p.calls(t)
		if len(calls) != 1 || calls[0].Command != command || calls[0].Conf["mtu"] != 1450.0 || calls[0].Conf["name"] != "cbr0" || calls[0].Conf["cniVersion"] != "1.1.0" {
			t.Errorf("%s: calls %+v", command, calls)
		}
		if kept := p.kept(t); (command == "ADD" || command == "CHECK") != slices.Equal(kept, []string{"one"}) {
			t.Errorf("after %s %v is kept", command, kept)
		}
	}
	// Detaching again is success, and asks nobody.
	p.mustCall(t, "DEL", "one", "eth0", conf)
	if calls := p.calls(t); len(calls) > 0 {
		t.Errorf("DEL of a container that is gone: calls %+v", calls)
	}
}

// What was delegated counts, not what the configuration has become since.
func TestPluginDetachesAsItAttached(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	p.mustCall(t, "ADD", "one", "eth0", p.conf("1.0.0", p.recording("")))
	p.calls(t)
	os.Remove(filepath.Join(p.dir, "subnet.env"))
	p.mustCall(t, "DEL", "one", "eth0", p.conf("1.0.0", `,"delegate":{"type":"nothing"},"runtimeConfig":null,"prevResult":null`))
	calls := p.calls(t)
	if len(calls) != 1 || calls[0].Command != "DEL" || calls[0].Conf["mtu"] != 1450.0 || calls[0].Conf["prevResult"] != nil {
		t.Errorf("calls %+v", calls)
	}
}

// A container may have more than one interface of this network.
func TestPluginKeepsInterfacesApart(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	conf := p.conf("1.0.0", p.recording(""))
	for _, ifName := range []string{"eth0", "net1", "net2"} {
		p.mustCall(t, "ADD", "one", ifName, conf)
	}
	if kept := p.kept(t); !slices.Equal(kept, []string{"one", "one:net1", "one:net2"}) {
		t.Errorf("%v is kept", kept)
	}
	for _, ifName := range []string{"net1", "eth0", "net2"} {
		p.mustCall(t, "DEL", "one", ifName, conf)
	}
	if kept := p.kept(t); len(kept) > 0 {
		t.Errorf("%v is still kept", kept)
	}
	var said []string
	for _, call := range p.calls(t) {
		said = append(said, call.Command+" "+call.IfName)
	}
	if want := []string{"ADD eth0", "ADD net1", "ADD net2", "DEL net1", "DEL eth0", "DEL net2"}; !slices.Equal(said, want) {
		t.Errorf("calls %q, want %q", said, want)
	}
}

// Flannel's plugin has one file per container, whatever the interface.
func TestPluginTakesOverFromFlannels(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	conf := p.conf("1.0.0", p.recording(""))
	p.mustCall(t, "ADD", "one", "eth0", conf)
	p.calls(t)
	p.mustCall(t, "DEL", "one", "net1", conf)
	if calls := p.calls(t); len(calls) != 1 || calls[0].IfName != "net1" {
		t.Errorf("calls %+v", calls)
	}
}

func TestPluginUndoesAnAttachmentThatFails(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	p.mustFail(t, 107, "told to fail", "ADD", p.conf("1.0.0", p.recording("ADD")))
	if calls := p.calls(t); len(calls) != 2 || calls[1].Command != "DEL" {
		t.Errorf("calls %+v, want ADD and DEL", calls)
	}
	if kept := p.kept(t); len(kept) > 0 {
		t.Errorf("%v is kept", kept)
	}
	// What can't be undone now is kept for the runtime's own DEL.
	p.mustFail(t, 107, "told to fail", "ADD", p.conf("1.0.0", p.recording("ADD DEL")))
	if kept := p.kept(t); len(kept) != 1 {
		t.Errorf("%v is kept", kept)
	}
	p.mustFail(t, 107, "told to fail", "DEL", p.conf("1.0.0", ""))
}

func TestPluginFailures(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	none := p.conf("1.1.0", `,"delegate":{"type":"nothing-there"}`)
	p.mustFail(t, types.ErrInvalidNetworkConfig, `"name" in "delegate" is "x"`, "ADD", p.conf("1.0.0", `,"delegate":{"name":"x"}`))
	p.mustFail(t, types.ErrDecodingFailure, "cannot unmarshal", "ADD", p.conf("1.0.0", `,"delegate":7`))
	p.mustFail(t, types.ErrInternal, "calling the plugin nothing-there", "ADD", none)
	p.mustFail(t, types.ErrInternal, "calling the plugin nothing-there", "STATUS", none)
	p.mustFail(t, types.ErrUnknownContainer, "has no interface eth0 in network cbr0", "CHECK", p.conf("1.0.0", ""))
	p.mustFail(t, types.ErrIncompatibleCNIVersion, "incompatible CNI versions", "ADD", p.conf("9.9.9", ""))
	p.mustFail(t, types.ErrInvalidEnvironmentVariables, "unknown CNI_COMMAND", "DANCE", p.conf("1.0.0", ""))
	p.mustFail(t, types.ErrIncompatibleCNIVersion, "does not allow STATUS", "STATUS", p.conf("1.0.0", ""))

	p.write(t, "subnet.env", "")
	p.mustFail(t, types.ErrTryAgainLater, "is not there yet", "ADD", p.conf("1.0.0", ""))
	os.Remove(filepath.Join(p.dir, "subnet.env"))
	p.mustFail(t, types.ErrTryAgainLater, "is not there yet", "ADD", p.conf("1.0.0", ""))
	p.mustFail(t, types.ErrPluginNotAvailable, "is not there yet", "STATUS", p.conf("1.1.0", ""))
	p.write(t, "subnet.env", "FLANNEL_MTU=1450\n")
	p.mustFail(t, types.ErrInvalidNetworkConfig, "FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET is missing", "ADD", p.conf("1.0.0", ""))

	// What is kept but makes no sense keeps no pod from going.
	os.Mkdir(filepath.Join(p.dir, "kept"), 0o700)
	p.write(t, "kept/one", "{")
	p.mustFail(t, types.ErrDecodingFailure, "unexpected end", "CHECK", p.conf("1.0.0", ""))
	p.mustCall(t, "DEL", "one", "eth0", p.conf("1.0.0", ""))
	if kept := p.kept(t); len(kept) > 0 {
		t.Errorf("%v is still kept", kept)
	}
}

// Garbage is what the runtime does not call valid, of this network. Where it says
// nothing, everything stays.
func TestPluginCollectsGarbage(t *testing.T) {
	t.Parallel()
	p := newPluginDesk(t)
	conf := p.conf("1.1.0", p.recording(""))
	for _, a := range [][2]string{{"used", "eth0"}, {"used", "net1"}, {"gone", "eth0"}, {"gone", "net1"}} {
		p.mustCall(t, "ADD", a[0], a[1], conf)
	}
	p.mustCall(t, "ADD", "other", "eth0", strings.Replace(conf, "cbr0", "another", 1))
	p.write(t, "kept/foreign", "not of ours")
	p.calls(t)
	all := p.kept(t)

	for _, said := range []string{``, `,"cni.dev/valid-attachments":null`, `,"cni.dev/attachments":[]`} {
		p.mustFail(t, types.ErrInvalidNetworkConfig, `"cni.dev/valid-attachments" is missing`, "GC", p.conf("1.1.0", p.recording("")+said))
		if calls := p.calls(t); len(calls) > 0 || !slices.Equal(p.kept(t), all) {
			t.Errorf("GC without a list: calls %+v, %v is kept", calls, p.kept(t))
		}
	}

	valid := `[{"containerID":"used","ifname":"eth0"}]`
	p.mustCall(t, "GC", "", "", p.conf("1.1.0", p.recording("")+`,"cni.dev/valid-attachments":`+valid))
	var said []string
	for _, call := range p.calls(t) {
		said = append(said, strings.TrimSpace(call.Command+" "+call.Container+" "+call.IfName))
		if call.Netns != "" && call.Command == "DEL" {
			t.Errorf("DEL of a stale attachment names the network namespace %s, which is the runtime's", call.Netns)
		}
		if list, _ := json.Marshal(call.Conf["cni.dev/valid-attachments"]); call.Command == "GC" && string(list) != valid {
			t.Errorf("GC is delegated with %s", list)
		}
	}
	if want := []string{"DEL gone eth0", "DEL gone net1", "DEL used net1", "GC"}; !slices.Equal(said, want) {
		t.Errorf("calls %q, want %q", said, want)
	}
	if kept := p.kept(t); !slices.Equal(kept, []string{"foreign", "other", "used"}) {
		t.Errorf("%v is kept", kept)
	}

	// What can't be detached is tried again next time.
	p.mustCall(t, "ADD", "stuck", "eth0", p.conf("1.1.0", p.recording("DEL")))
	p.mustFail(t, types.ErrInternal, "container stuck, interface eth0: told to fail", "GC",
		p.conf("1.1.0", p.recording("")+`,"cni.dev/valid-attachments":`+valid))
	if kept := p.kept(t); !slices.Contains(kept, "stuck") {
		t.Errorf("%v is kept", kept)
	}
}

// debianPlugins is where Debian's containernetworking-plugins are, which are of
// version 1.0.0 of the specification.
const debianPlugins = "/usr/lib/cni"

// A runtime's own library (containerd's and CRI-O's) attaches, checks and detaches a
// container through weft's plugin and the reference ones, with flannel's own list of
// plugins, in each version of the specification that these know.
func TestPluginWithReferencePlugins(t *testing.T) {
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			tryPlugins(t, version, debianPlugins, `{"type":"portmap","capabilities":{"portMappings":true}}`)
		})
	}
}

// network is a list of plugins, as runtimes read it.
func (p *pluginDesk) network(t *testing.T, version string, plugins ...string) *libcni.NetworkConfigList {
	t.Helper()
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"name":"cbr0","cniVersion":%q,"plugins":[%s]}`, version, strings.Join(plugins, ",")))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// tryPlugins has a container come and go, by weft's plugin and those chained to it.
func tryPlugins(t *testing.T, version, plugins string, chained ...string) {
	p := newPluginDesk(t)
	p.host, p.pod = netns.New(t), netns.New(t)
	p.host.Run(t, "ip link set lo up")
	flannel := p.conf(version, fmt.Sprintf(`,"ipam":{"dataDir":%q},"delegate":{"hairpinMode":true,"isDefaultGateway":true}`, filepath.Join(p.dir, "leases")))
	list := p.network(t, version, append([]string{flannel}, chained...)...)
	// Debian 12's portmap looks for rules of IPv6 where there is none.
	checked := p.network(t, version, flannel)
	runtime := libcni.NewCNIConfigWithCacheDir([]string{p.dir, plugins}, filepath.Join(p.dir, "cache"), nil)
	container := &libcni.RuntimeConf{
		ContainerID: "one", NetNS: p.pod.Path(), IfName: "eth0",
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}},
	}
	ctx := t.Context()
	if version >= "1.1.0" {
		p.host.MustDo(t, func() error { return runtime.GetStatusNetworkList(ctx, list) })
	}
	p.host.MustDo(t, func() error {
		result, err := runtime.AddNetworkList(ctx, list, container)
		if err != nil {
			return err
		}
		got, err := current.NewResultFromResult(result)
		if err != nil {
			return err
		}
		if result.Version() != version || len(got.IPs) != 1 || got.IPs[0].Address.String() != "10.244.1.2/24" || !got.IPs[0].Gateway.Equal(net.IPv4(10, 244, 1, 1)) {
			t.Errorf("result %+v", result)
		}
		return nil
	})
	for _, want := range []string{"default via 10.244.1.1 dev eth0", "10.244.0.0/16 via 10.244.1.1 dev eth0"} {
		if routes := p.pod.Run(t, "ip route"); !strings.Contains(routes, want) {
			t.Errorf("routes of the container:\n%swithout %s", routes, want)
		}
	}
	if link := p.pod.Run(t, "ip link show eth0"); !strings.Contains(link, "mtu 1450") {
		t.Errorf("device of the container: %s", link)
	}
	if link := p.host.Run(t, "ip -d link show master cni0"); !strings.Contains(link, "hairpin on") {
		t.Errorf("port of the bridge: %s", link)
	}
	p.pod.Run(t, "ping -c 1 -W 5 10.244.1.1")
	if version >= "0.4.0" {
		p.host.MustDo(t, func() error { return runtime.CheckNetworkList(ctx, checked, container) })
		p.pod.Run(t, "ip addr flush dev eth0")
		if err := p.host.Do(func() error { return runtime.CheckNetworkList(ctx, checked, container) }); err == nil {
			t.Error("CHECK finds nothing wrong with an interface without its address")
		}
	}
	if version >= "1.1.0" {
		tryGarbage(ctx, t, p, runtime, list)
	}

	p.host.MustDo(t, func() error { return runtime.DelNetworkList(ctx, list, container) })
	p.host.MustDo(t, func() error { return runtime.DelNetworkList(ctx, list, container) }) // again: nothing to do
	if links := p.pod.Run(t, "ip -o link"); strings.Contains(links, "eth0") {
		t.Errorf("the container still has %s", links)
	}
	if leases := p.list(t, "leases/cbr0"); slices.Contains(leases, "10.244.1.2") {
		t.Errorf("leases: %v", leases)
	}
	if kept := p.kept(t); len(kept) > 0 {
		t.Errorf("%v is still kept", kept)
	}
	if rules := p.host.Run(t, "iptables -w -t nat -S"); strings.Contains(rules, "8080") {
		t.Errorf("portmap was not told:\n%s", rules)
	}
}

// tryGarbage has a container vanish without a DEL, unknown to the runtime too, and
// its address come back.
func tryGarbage(ctx context.Context, t *testing.T, p *pluginDesk, runtime *libcni.CNIConfig, list *libcni.NetworkConfigList) {
	lost := netns.New(t)
	p.host.MustDo(t, func() error {
		_, err := runtime.AddNetworkList(ctx, list, &libcni.RuntimeConf{ContainerID: "lost", NetNS: lost.Path(), IfName: "eth0"})
		return err
	})
	os.RemoveAll(filepath.Join(p.dir, "cache"))
	if leases := p.list(t, "leases/cbr0"); !slices.Contains(leases, "10.244.1.3") {
		t.Fatalf("leases: %v", leases)
	}
	p.host.MustDo(t, func() error {
		return runtime.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "one", IfName: "eth0"}}})
	})
	if leases := p.list(t, "leases/cbr0"); slices.Contains(leases, "10.244.1.3") || !slices.Contains(leases, "10.244.1.2") {
		t.Errorf("leases after the collection: %v, want 10.244.1.2 alone", leases)
	}
	if err := p.host.Do(func() error { return runtime.GCNetworkList(ctx, list, nil) }); err == nil || !strings.Contains(err.Error(), "valid-attachments") {
		t.Errorf("a collection that does not say what is in use: %v", err)
	}
}
