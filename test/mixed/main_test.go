//go:build linux && peers

// Package mixed_test runs weft among stock flannel nodes, over flannel's own
// stores: real flanneld on some nodes and weft on the others, with a real etcd or a
// real Kubernetes API server between them. `make interop` builds these programs
// and runs it.
//
// Most labs have three nodes: n1 is the one that is compared, taken over and
// damaged, n2 and n3 are its peers, one of them with flanneld, the other with weft.
package mixed_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// The program under test, built once for all tests, and those it is tried with.
var weft, flanneld, etcd, apiServer string

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run builds the programs and runs the tests.
func run(m *testing.M) int {
	if err := findPeers(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "weft-mixed")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	weft = filepath.Join(dir, "weft")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", weft, "github.com/weft-net/weft/cmd/weft")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building weft: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// findPeers finds the real programs where WEFT_PEERS says, else has test/peers
// build them, which is done once.
func findPeers() error {
	names := []string{"flanneld", "etcd", "kube-apiserver"}
	paths := os.Getenv("WEFT_PEERS")
	if paths == "" {
		cmd := exec.Command("../peers", names...)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("test/peers: %w", err)
		}
		paths = string(out)
	}
	found := map[string]string{}
	for _, path := range strings.Fields(paths) {
		found[filepath.Base(path)] = path
	}
	for _, name := range names {
		if found[name] == "" {
			return fmt.Errorf("WEFT_PEERS has no %s: give it what `test/peers %s` prints", name, strings.Join(names, " "))
		}
	}
	flanneld, etcd, apiServer = found["flanneld"], found["etcd"], found["kube-apiserver"]
	return nil
}

// newLab makes a lab with the programs, and with the rules of kube-proxy.
func newLab(tb testing.TB, opts lab.Options) (lab.Test, *lab.Lab) {
	tb.Helper()
	t := lab.T(tb)
	opts.Binary, opts.Flanneld, opts.Etcd, opts.APIServer = weft, flanneld, etcd, apiServer
	opts.Netfilter = true
	return t, t.New(opts)
}
