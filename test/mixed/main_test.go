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
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// The program under test, built once for all tests, and those it is tried with.
var weft, flanneld, etcd, apiServer string

func TestMain(m *testing.M) {
	found, err := lab.Programs("flanneld", "etcd", "kube-apiserver")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	flanneld, etcd, apiServer = found["flanneld"], found["etcd"], found["kube-apiserver"]
	os.Exit(lab.WithWeft(m, func(path string) { weft = path }))
}

// newLab makes a lab with the programs, and with the rules of kube-proxy.
func newLab(tb testing.TB, opts lab.Options) (lab.Test, *lab.Lab) {
	tb.Helper()
	t := lab.T(tb)
	opts.Binary, opts.Flanneld, opts.Etcd, opts.APIServer = weft, flanneld, etcd, apiServer
	opts.Netfilter = true
	return t, t.New(opts)
}
