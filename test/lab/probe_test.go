//go:build linux

package lab

import (
	"testing"
	"time"
)

func TestProbeCountsWhatIsLost(t *testing.T) {
	for name, o := range map[string]ProbeOptions{"UDP": {}, "ICMP": {ICMP: true}, "small": {Size: 1, Interval: 5 * time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lt := T(t)
			l := lt.New(Options{Kinds: []Kind{Kernel}})
			from, to := l.Pod(1, 1), l.Pod(2, 1)
			lt.MustLoseNothing(from, to, o, func() { time.Sleep(300 * time.Millisecond) })

			r := lt.Probe(from, to, o, func() {
				time.Sleep(100 * time.Millisecond)
				lt.Run(l.Node(2), "ip link set eth0 down")
				time.Sleep(100 * time.Millisecond)
				lt.Run(l.Node(2), "ip link set eth0 up")
				time.Sleep(200 * time.Millisecond)
			})
			if r.Lost == 0 || r.Received == 0 || r.Sent != r.Received+r.Lost || r.LongestGap < 80*time.Millisecond {
				t.Errorf("the uplink was down for 100 of 400 ms: %s", r)
			}
			t.Log(r)
		})
	}
}

func TestProbeWithoutAnOverlayGetsNoAnswer(t *testing.T) {
	lt := T(t)
	l := lt.New(Options{})
	if _, err := StartProbe(l.Pod(1, 1), l.Pod(2, 1), ProbeOptions{ICMP: true}); err == nil {
		t.Error("a probe between bare nodes should get no answer")
	}
}

func TestProbeSumsUp(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	p := &Probe{
		sent:    []time.Duration{ms(0), ms(2), ms(4), ms(6), ms(8), ms(10)},
		answers: []uint8{1, 0, 0, 2, 0, 1},
		arrived: []time.Duration{ms(1), ms(7), ms(7), ms(11)},
	}
	want := "6 sent, 3 answered, 3 lost, longest gap 6ms; 2 lost at 2ms; 1 lost at 8ms"
	if r := p.result(); r.String() != want || r.Duplicates != 1 {
		t.Errorf("got  %s (%d duplicates)\nwant %s (1 duplicate)", r, r.Duplicates, want)
	}
}
