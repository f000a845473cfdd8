//go:build linux && scale

package datapath_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// Conntrack's table with more in it than the other tests have time for:
//
//	go test -tags scale -run ConntracksTable -timeout 1h -v ./test/datapath
func TestExpressAndConntracksTable(t *testing.T) {
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"a hundred thousand short connections", manyConnections},
		{"the table is full", fullTable},
	})
}

// manyConnections leave one entry each, of a connection that has been closed, as they
// do without express. Each has ports of its own: one of the same ports would take over
// an entry.
func manyConnections(t lab.Test, w world) {
	const connections, firstPort = 25000, 10000
	// All of them, as conntrack calls what it has not seen acknowledged so.
	mustSet(t, w, "tcp_timeout_time_wait=3600", "tcp_timeout_unacknowledged=3600", "tcp_timeout_max_retrans=3600")
	server := w.pod(2, 1)
	var ports []uint16
	withoutInvalid(t, w, func() {
		w.mustSome(t, func() {
			var group sync.WaitGroup
			for i := range 4 {
				client, port := w.pod(1, 1+i/2), mustAnswer(t, server)
				ports = append(ports, port)
				group.Go(func() {
					if err := connectShortly(client, at(server, port), connections, firstPort+i%2*connections); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
		})
	})
	for _, port := range ports {
		mustBeTracked(t, w, port, fmt.Sprintf("%d TIME_WAIT", connections))
	}
	for _, n := range w.Nodes {
		t.Logf("%s: %s entries", n, strings.TrimSpace(t.Run(n, "conntrack -C")))
		t.Run(n, "sh", "-c", "conntrack -F 2>&1")
	}
}

// In a full table there is room for no other flow, and those that are in it go on.
func fullTable(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	old := mustConnect(t, client, l, at(server, port))
	datagrams := mustConnectUDP(t, w, client, at(server, mustEchoUDP(t, server)))
	both := func() {
		old.mustAsk(t, 200)
		datagrams.mustAsk(t, 200)
	}
	w.mustTake(t, everyEnd, both)

	filled := w.Node(2)
	mustFill(t, filled)
	w.mustComeToTake(t, everyEnd, both)
	if c, err := connectTCP(client, l, at(server, port)); err == nil {
		c.close()
		t.Errorf("a new connection has come about, with %s entries", strings.TrimSpace(t.Run(filled, "conntrack -C")))
	}
	w.mustTake(t, everyEnd, both)

	t.Run(filled, "sh", "-c", "conntrack -D --proto udp --src 172.31.0.0/16 >/dev/null 2>&1")
	w.mustTake(t, everyEnd, func() { mustConnect(t, client, l, at(server, port)).mustAsk(t, 200) })
	w.mustComeToTake(t, everyEnd, both)
}

// mustFill fills a node's table with flows that conntrack expects to last: it throws
// out others to make room.
func mustFill(t lab.Test, n *lab.Node) {
	t.Helper()
	number := func(name string) int {
		value, err := strconv.Atoi(strings.TrimSpace(t.Run(n, "sysctl -n net.netfilter.nf_conntrack_"+name)))
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
	room := number("max") - number("count")
	var flows strings.Builder
	for i := range room + 1000 {
		fmt.Fprintf(&flows, "--create --proto udp --src 172.31.%d.%d --dst 172.30.0.1 --sport %d --dport 9 --timeout 3600 --status SEEN_REPLY,ASSURED\n",
			i>>8&0xff, i&0xff, 1+i>>16)
	}
	path := filepath.Join(t.TempDir(), "flows")
	if err := os.WriteFile(path, []byte(flows.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	t.Run(n, "sh", "-c", "conntrack --load-file "+path+" >/dev/null 2>&1 || true") // the last ones find no room
	if count, limit := number("count"), number("max"); count < limit {
		t.Fatalf("conntrack of %s has %d entries, and room for %d", n, count, limit)
	}
	t.Logf("%s: %d entries made in %s", n, room, time.Since(began).Round(time.Second))
}
