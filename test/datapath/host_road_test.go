//go:build linux

package datapath_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// The host forgets the link-layer address of a peer while traffic flows: a
// plain kernel node keeps packets until it is resolved again, and loses none.
func TestNeighbourOfPeerIsForgotten(t *testing.T) {
	for _, node := range hostNodes[:2] {
		t.Run(node.name, func(t *testing.T) {
			t.Parallel()
			lt, l := newLab(t, lab.Options{Kinds: []lab.Kind{node.kind, lab.Kernel}})
			n1, n2 := l.Node(1), l.Node(2)
			if node.kind == lab.Weft {
				mustUseBase(t, l.Pod(1, 1), l.Pod(2, 1))
			}
			lt.MustLoseNothing(l.Pod(1, 1), l.Pod(2, 1), lab.ProbeOptions{Interval: 2 * time.Millisecond}, func() {
				for range 10 {
					time.Sleep(150 * time.Millisecond)
					lt.Run(n1, fmt.Sprintf("ip neighbour delete %s dev eth0", n2.IP))
				}
			})
			if node.kind == lab.Weft {
				mustUseBase(t, l.Pod(1, 1), l.Pod(2, 1))
			}
		})
	}
}
