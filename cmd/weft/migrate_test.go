package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/uplink"
)

// flannelNode is a node as flannel leaves it, and the arguments that find it.
func flannelNode(t *testing.T) (d *desk, args []string) {
	t.Helper()
	d = newDesk(t)
	d.node.uplink = uplink.Uplink{Name: "eth0", MTU: 1500, Address: netip.MustParseAddr("192.0.2.11"), PublicIP: netip.MustParseAddr("192.0.2.11")}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"net-conf.json": `{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`,
		"subnet.env":    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return d, []string{
		"migrate", "check", "--ip-masq", "--kube-subnet-mgr", "--subnet-file", filepath.Join(dir, "subnet.env"), "--net-config-path", filepath.Join(dir, "net-conf.json"),
	}
}

func TestMigrateCheck(t *testing.T) {
	d, args := flannelNode(t)
	out := d.must(args...)
	golden(t, "migrate-check.txt", strings.ReplaceAll(out, filepath.Dir(args[len(args)-1]), "DIR"))
	want := state.State{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, VNI: 1, Port: 8472,
		Local: state.Local{
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, Uplink: "eth0",
			Address: netip.MustParseAddr("192.0.2.11"), PublicIP: netip.MustParseAddr("192.0.2.11"),
		},
	}
	if got := d.node.wanted; !reflect.DeepEqual(got, want) {
		t.Errorf("the kernel was compared with\n%+v, want\n%+v", got, want)
	}
}

// What is in weft's way is told, and only a fault is a failure.
func TestMigrateCheckFindsWhatIsInTheWay(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, d *desk, dir string)
		status int
		want   string
	}{
		"no conntrack": {func(_ *testing.T, d *desk, _ string) { d.node.survey.NoExpress = []string{"no conntrack"} }, 0, "note  express        packets would take the base path: no conntrack\n"},
		"no programs":  {func(_ *testing.T, d *desk, _ string) { d.node.survey.NoPrograms = []string{"a", "b"} }, 0, "note  eBPF           the kernel would carry all packets, as with flannel: a; b\n"},
		"learning":     {func(_ *testing.T, d *desk, _ string) { d.node.survey.Changes = []string{"ip link set x"} }, 0, "ok  devices        they are taken over, and changed in place:\n                   ip link set x\n"},
		"another VNI": {func(_ *testing.T, d *desk, _ string) {
			d.node.survey = dataplane.Survey{Remade: true, Changes: []string{"ip link del flannel.1"}}
		}, 1, "FAULT  devices        flannel has made them with another configuration"},
		"no device": {func(_ *testing.T, d *desk, _ string) {
			d.node.survey = dataplane.Survey{Missing: []string{"flannel.1"}}
		}, 1, "FAULT  devices        flannel.1 missing"},
		"kernel fails": {func(_ *testing.T, d *desk, _ string) { d.node.err = errors.New("no netlink") }, 1, "FAULT  devices        no netlink\n"},
		"another backend": {func(t *testing.T, _ *desk, dir string) {
			write(t, dir, "net-conf.json", `{"Network": "10.244.0.0/16", "Backend": {"Type": "host-gw"}}`)
		}, 1, "FAULT  configuration"},
		"no configuration":  {func(t *testing.T, _ *desk, dir string) { remove(t, dir, "net-conf.json") }, 1, "give --net-config-path and a copy of net-conf.json from the ConfigMap"},
		"broken subnet.env": {func(t *testing.T, _ *desk, dir string) { write(t, dir, "subnet.env", "FLANNEL_SUBNET=x\n") }, 1, "FAULT  subnet"},
		"no subnet.env":     {func(t *testing.T, _ *desk, dir string) { remove(t, dir, "subnet.env") }, 1, "flannel writes it when it runs"},
		"one family of two": {func(t *testing.T, _ *desk, dir string) {
			write(t, dir, "net-conf.json", `{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00::/48", "Backend": {"Type": "vxlan"}}`)
		}, 1, "FAULT  subnet         the configuration has the networks 10.244.0.0/16 and fd00::/48\n"},
	} {
		t.Run(name, func(t *testing.T) {
			d, args := flannelNode(t)
			c.change(t, d, filepath.Dir(args[len(args)-1]))
			status, stdout, stderr := d.call(args...)
			if status != c.status || stderr != "" || !strings.Contains(stdout, c.want) {
				t.Errorf("status %d\n%s%s\nwant status %d and %q", status, stdout, stderr, c.status, c.want)
			}
		})
	}
}

// A container that waits ends when it is told to.
func TestWait(t *testing.T) {
	d := newDesk(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int)
	go func() {
		status, _, _ := d.callUntil(ctx, "wait")
		ended <- status
	}()
	select {
	case <-ended:
		t.Fatal("it has not waited")
	case <-time.After(100 * time.Millisecond):
	}
	stop()
	if status := <-ended; status != 0 {
		t.Errorf("status %d", status)
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}
