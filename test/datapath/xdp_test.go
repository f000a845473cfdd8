//go:build linux

package datapath_test

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/test/lab"
)

// stripping is the agent's flag.
const stripping = "--xdp=on"

// withXDP has nodes strip packets in their uplinks' drivers.
func withXDP(opts lab.Options) lab.Options {
	opts.AgentFlags = []string{stripping}
	return opts.OnCards()
}

// wires are the underlays, and one where drivers strip, by name.
func wires() map[string]lab.Options {
	all := map[string]lab.Options{"XDP": withXDP(lab.Options{})}
	for _, underlay := range underlays {
		all[string(underlay)] = lab.Options{Underlay: underlay}
	}
	return all
}

// mustHaveStripped fails the test unless the drivers of weft nodes stripped packets,
// where they should.
func mustHaveStripped(t lab.Test, l *lab.Lab) {
	t.Helper()
	for _, n := range l.Nodes {
		if n.Kind != lab.Weft || !slices.Contains(l.Options.AgentFlags, stripping) {
			continue
		}
		stripped := mustStatus(t, n).XDP.Stripped
		t.Logf("%s: %d packets were stripped in the driver", n, stripped)
		if stripped < 50 {
			t.Errorf("%s: only %d packets were stripped in the driver", n, stripped)
		}
	}
}

// mustBeHeard waits until the drivers of all weft nodes strip.
func mustBeHeard(t lab.Test, l *lab.Lab, ask func()) {
	t.Helper()
	t.Eventually(5*time.Second, func() error {
		ask()
		for _, n := range l.Nodes {
			if x := mustStatus(t, n).XDP; n.Kind == lab.Weft && !(x.Attached && x.Heard) {
				return fmt.Errorf("%s does not strip in the driver: %+v", n, x)
			}
		}
		return nil
	})
}

// mustStrip fails the test unless most of what comes to the nodes while f runs is
// stripped in their drivers, or nothing.
func mustStrip(t lab.Test, l *lab.Lab, most bool, f func()) {
	t.Helper()
	read := func() (out []dataplane.XDP, came []uint64) {
		for i, n := range l.Nodes {
			out = append(out, mustStatus(t, n).XDP)
			came = append(came, mustCarried(t, n, l.Nodes[1-i]).total().RxPackets)
		}
		return out, came
	}
	before, had := read()
	f()
	after, have := read()
	for i, n := range l.Nodes {
		stripped, came := after[i].Stripped-before[i].Stripped, have[i]-had[i]
		t.Logf("%s: %d packets came, %d were stripped in the driver", n, came, stripped)
		if came < 100 || most && stripped*10 < came*8 || !most && stripped > 0 {
			t.Errorf("%s: of %d packets %d were stripped in the driver; want most: %v", n, came, stripped, most)
			for j, r := range after[i].Reasons {
				if left := r.Passed - before[i].Reasons[j].Passed; left > 0 {
					t.Logf("%s: %d left: %s", n, left, r.Name)
				}
			}
		}
	}
}

// The driver strips what comes, by express and without it; what arrives is what was
// sent, and nothing is lost while acceleration goes off and on, the agent is killed
// and started again, or weft is removed.
func TestXDPStripsTraffic(t *testing.T) {
	w := newWorld(t, withXDP(lab.Options{Pods: 1}))
	lt := lab.T(t)
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(lt, server)
	c := mustConnect(lt, client, l, at(server, port))
	udp := &talk{Conn: mustDialUDP(t, client, at(server, mustEchoUDP(lt, server)))}
	ask := func() { c.mustAsk(lt, 50); udp.mustAsk(lt, 50) }
	mustBeHeard(lt, w.Lab, ask)
	w.mustComeToTake(lt, everyEnd, ask)

	mustStrip(lt, w.Lab, true, func() { w.mustTake(lt, everyEnd, func() { ask(); ask(); ask() }) })
	for _, way := range [][2]place{{client, server}, {server, client}} {
		bulk, to := mustListenTCP(lt, way[1])
		mustStrip(lt, w.Lab, true, func() {
			if got := transferTCP(way[0], bulk, at(way[1], to), 16<<20); got != "intact" {
				t.Errorf("bulk from %s: %s", way[0], got)
			}
		})
	}
	big := mustDialUDP(t, client, at(server, mustEchoUDP(lt, server)))
	if got := askUDP(big, 20, 8000); got != "20 of 20 intact" {
		t.Errorf("datagrams in fragments: %s", got)
	}

	s := c.stream()
	defer s.cancel()
	for _, n := range w.Nodes {
		mustWeft(t, n, "accel", "off", "express")
	}
	time.Sleep(settled)
	mustStrip(lt, w.Lab, true, func() { time.Sleep(time.Second) })
	for _, n := range w.Nodes {
		mustWeft(t, n, "accel", "off")
	}
	time.Sleep(settled)
	mustStrip(lt, w.Lab, false, func() { time.Sleep(time.Second) })
	for _, n := range w.Nodes {
		mustWeft(t, n, "accel", "on")
	}
	w.mustComeToTake(lt, everyEnd, func() { time.Sleep(200 * time.Millisecond) })
	for _, n := range w.Nodes {
		if err := n.StopAgent(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		mustStrip(lt, w.Lab, true, func() { time.Sleep(time.Second) })
		if err := n.StartAgent(t.Context(), weft, stripping); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range w.Nodes {
		if err := n.StopAgent(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		mustWeft(t, n, "remove")
		if x := mustStatus(t, n).XDP; x.Attached {
			t.Errorf("%s: there is a program in the driver after weft remove", n)
		}
		time.Sleep(200 * time.Millisecond)
	}
	s.mustLive(lt, time.Second)
	if lost, err := s.stop(); lost > 0 || err != nil {
		t.Errorf("%d answers are missing: %v", lost, err)
	}
}
