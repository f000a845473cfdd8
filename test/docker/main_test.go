//go:build linux && peers

// Package docker_test runs weft under Docker, as those use flannel who have no
// Kubernetes: the network's configuration is put into etcd, each node has a weft
// agent or a stock flanneld that takes a subnet there, and a dockerd that gets its
// bridge's address and MTU from what mk-docker-opts makes of that.
//
//	         n1                                       n2
//	+------------------------+              +------------------------+
//	| c1: first of n1's      |              | c2: first of n2's      |
//	|     subnet, .2         |              |     subnet, .2         |
//	|      eth0              |              |      eth0              |
//	|        |               |              |        |               |
//	|     docker0 .1         |              |     docker0 .1         |
//	|        |               |              |        |               |
//	|     flannel.1 .0       |              |     flannel.1 .0       |
//	|        |               |              |        |               |
//	|  eth0 192.0.2.11       |              |  eth0 192.0.2.12       |
//	+--------|---------------+              +--------|---------------+
//	         +------- underlay 192.0.2.1, etcd ------+
//
// Which subnet a node gets is between the nodes and etcd.
package docker_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// The program under test, built once for all tests, and those it is tried with.
var weft, flanneld, etcd string

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run builds the programs and runs the tests.
func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "weft-docker")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := findPrograms(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// findPrograms finds what was built, and builds weft in a directory.
func findPrograms(dir string) (err error) {
	found, err := lab.Programs("flanneld", "etcd")
	if err != nil {
		return err
	}
	flanneld, etcd = found["flanneld"], found["etcd"]
	weft, err = lab.BuildWeft(dir)
	return err
}
