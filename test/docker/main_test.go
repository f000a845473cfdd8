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

func TestMain(m *testing.M) {
	found, err := lab.Programs("flanneld", "etcd")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	flanneld, etcd = found["flanneld"], found["etcd"]
	os.Exit(lab.WithWeft(m, func(path string) { weft = path }))
}
