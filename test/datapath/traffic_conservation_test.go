//go:build linux

package datapath_test

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/test/lab"
)

// What one node counts as sent to the other is what the other counts as
// received from it, in packets and bytes on the wire, over all paths: for
// aggregates, fragments and single packets, while acceleration goes on and off.
func TestWhatOneNodeCountsAsSentTheOtherCountsAsReceived(t *testing.T) {
	for name, opts := range wires() {
		t.Run(name, func(t *testing.T) {
			opts.Pods = 2
			lt, l := newTrafficLab(t, opts)
			n1, n2 := l.Node(1), l.Node(2)
			r := between(l.Pod(1, 1), l.Pod(2, 1))
			mustRideBase(lt, r)

			for _, load := range []struct {
				name string
				run  func()
			}{
				{"TCP bulk both ways", func() { startIperf(lt, r, "--bidir -t 1 -b 300M").mustEnd() }},
				{"small UDP", func() { startIperf(lt, r, "-u -l 64 -b 8M -t 1").mustEnd() }},
				{"UDP in fragments both ways", func() { startIperf(lt, r, "--bidir -u -l 8000 -b 100M -t 1").mustEnd() }}, // the base path's
				{"UDP aggregates", func() { disorderUDP(lt, r) }},
				{"TCP with small segments", func() { tcpSmallSegments(lt, r) }},
				{"all at once, acceleration on and off", func() { everything(lt, l) }},
			} {
				var c1, c2 ebpf.PathCounters
				for try := 1; ; try++ {
					b1, b2 := mustCarried(t, n1, n2), mustCarried(t, n2, n1)
					drops := mustDrops(lt, l)
					load.run()
					err := eventually(2*time.Second, func() error { // what is still under way arrives
						c1, c2 = mustCarried(t, n1, n2).sub(b1).total(), mustCarried(t, n2, n1).sub(b2).total()
						return conserved(c1, c2)
					})
					dropped := mustDrops(lt, l) - drops
					if err == nil {
						break
					}
					if dropped == 0 || try == 5 {
						t.Errorf("%s: %v (devices on the way have dropped %d skbs)", load.name, err, dropped)
						break
					}
				}
				if c1.TxPackets < 500 {
					t.Errorf("%s: there was no traffic: %+v %+v", load.name, c1, c2)
				}
				t.Logf("%s: %d packets, %d bytes there, %d packets, %d bytes back", load.name, c1.TxPackets, c1.TxBytes, c2.TxPackets, c2.TxBytes)
			}
			least := uint64(100) // of the kernel path, which is in use while acceleration is off
			if name == "XDP" {
				least = 10 // the driver leaves the kernel little to receive
			}
			for _, n := range l.Nodes {
				if c := mustCarried(t, n, n.Peers()[0]); min(c.base.TxPackets, c.base.RxPackets) < 1000 || min(c.kernel.TxPackets, c.kernel.RxPackets) < least {
					t.Errorf("%s did not use both paths both ways: %+v", n, c)
				}
			}
		})
	}
}

// conserved compares what two nodes count of each other.
func conserved(a, b ebpf.PathCounters) error {
	var errs []error
	for _, c := range []struct {
		what       string
		sent, came uint64
	}{
		{"packets there", a.TxPackets, b.RxPackets},
		{"bytes there", a.TxBytes, b.RxBytes},
		{"packets back", b.TxPackets, a.RxPackets},
		{"bytes back", b.TxBytes, a.RxBytes},
	} {
		if c.sent != c.came {
			errs = append(errs, fmt.Errorf("%s: %d sent, %d received", c.what, c.sent, c.came))
		}
	}
	return errors.Join(errs...)
}

// everything runs all kinds of traffic at once, while somebody plays with the
// switch.
func everything(t lab.Test, l *lab.Lab) {
	t.Helper()
	there, back := between(l.Pod(1, 1), l.Pod(2, 1)), between(l.Pod(2, 2), l.Pod(1, 2))
	runs := []iperf{
		startIperf(t, there, "--bidir -t 3 -b 150M"),
		startIperf(t, back, "-t 3 -b 100M"),
		startIperf(t, there, "-u -l 64 -b 3M -t 3"),
		startIperf(t, back, "-u -l 5000 -b 20M -t 3"),
	}
	done := make(chan struct{})
	var toggling sync.WaitGroup
	toggling.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-time.After(60 * time.Millisecond):
			}
			if err := l.Nodes[i%2].Run(t.Context(), weft, "accel", []string{"off", "off", "on", "on"}[i%4]); err != nil {
				t.Error(err)
			}
		}
	})
	pingSees(t, there, "-c 100")
	for _, r := range runs {
		r.mustEnd()
	}
	close(done)
	toggling.Wait()
	for _, n := range l.Nodes {
		mustWeft(t, n, "accel", "on")
	}
}

// mustDrops is what the devices between two overlay devices have dropped.
func mustDrops(t lab.Test, l *lab.Lab) (sum int) {
	t.Helper()
	devices := map[*lab.Space][]string{}
	for _, n := range l.Nodes {
		devices[&n.Space] = []string{"eth0"}
		devices[l.Underlay] = append(devices[l.Underlay], n.String())
	}
	for space, names := range devices {
		for _, name := range names {
			m := deviceDrops.FindAllStringSubmatch(t.Run(space, "ip -s -s link show dev "+name), -1)
			if len(m) != 2 {
				t.Fatalf("%s: no statistics of %s", space, name)
			}
			for _, counted := range m {
				n, _ := strconv.Atoi(counted[1])
				sum += n
			}
		}
	}
	return sum
}

// deviceDrops finds the column of dropped packets.
var deviceDrops = regexp.MustCompile(`(?m)^ *[RT]X: +bytes +packets +errors +dropped.*\n *\d+ +\d+ +\d+ +(\d+)`)

// eventually is lab.Test's Eventually for what may also end in a finding.
func eventually(within time.Duration, f func() error) (err error) {
	for deadline := time.Now().Add(within); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return nil
		}
	}
	return err
}
