//go:build linux

package rtnl

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// addRoute adds 172.22.x/24 by lo.
func addRoute(i byte) *Request {
	fixed := []byte{unix.AF_INET, 24, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_LINK, unix.RTN_UNICAST, 0, 0, 0, 0}
	return NewRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, fixed...).
		Attr(unix.RTA_DST, []byte{172, 22, i, 0}).Uint32(unix.RTA_OIF, loopback)
}

// Of two who change routes and addresses, what is dropped is not heard, and all else
// is.
func TestDroppedEvents(t *testing.T) {
	ns := netns.New(t)
	ns.Run(t, "ip link set lo up")
	one, other := mustOpen(t, ns), mustOpen(t, ns)
	const table = unix.NLMSG_HDRLEN + 4 // in struct rtmsg
	for name, test := range map[string]struct {
		drops [][]Match
		want  int // of the events: a local and a main route by each, and an address of each
	}{
		"nothing":          {nil, 6},
		"a kind":           {[][]Match{{Kind(unix.RTM_NEWROUTE)}}, 2},
		"what one does":    {[][]Match{{CausedBy(one.Port())}}, 4},
		"two kinds":        {[][]Match{{Kind(unix.RTM_NEWROUTE)}, {Kind(unix.RTM_NEWADDR)}}, 0},
		"a kind by one":    {[][]Match{{Kind(unix.RTM_NEWROUTE), CausedBy(one.Port())}}, 5},
		"another kind":     {[][]Match{{Kind(unix.RTM_DELROUTE)}}, 6},
		"by nobody":        {[][]Match{{Kind(unix.RTM_NEWROUTE), CausedBy(4711)}}, 6},
		"a byte":           {[][]Match{{Kind(unix.RTM_NEWROUTE), {table, 1, 0xff, unix.RT_TABLE_LOCAL}}}, 4},
		"a bit that is":    {[][]Match{{Kind(unix.RTM_NEWROUTE), {table, 1, 1, unix.RT_TABLE_LOCAL & 1}}}, 4},
		"a bit that isn't": {[][]Match{{Kind(unix.RTM_NEWROUTE), {table, 1, 1, unix.RT_TABLE_MAIN & 1}}}, 4},
	} {
		t.Run(name, func(t *testing.T) {
			listener := mustOpen(t, ns, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_IFADDR)
			listener.Drop(test.drops...)
			for i, s := range []*Socket{one, other} {
				for _, err := range s.Batch([]*Request{addAddress(i), addRoute(byte(i))}) {
					if err != nil {
						t.Fatal(err)
					}
				}
			}
			if heard := listener.heard(t); heard != test.want {
				t.Errorf("heard %d events, want %d", heard, test.want)
			}
			ns.Run(t, "ip addr flush dev lo", "ip route flush dev lo")
		})
	}
}

// heard counts what lies in the queue.
func (s *Socket) heard(t *testing.T) (n int) {
	t.Helper()
	for {
		received, err := s.receive(time.Now().Add(50*time.Millisecond), func() {})
		if err != nil {
			return n // nothing more
		}
		for range received {
			n++
		}
	}
}
