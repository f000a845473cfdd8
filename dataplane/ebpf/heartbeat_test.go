//go:build linux

package ebpf

import (
	"testing"
	"time"
)

func TestHeartbeat(t *testing.T) {
	n := newPodNode(t)
	raw := func() (p weftPulse) {
		t.Helper()
		if err := n.accel.objects.Heartbeat.Lookup(uint32(0), &p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, p := range []Pulse{{Epoch: 3}, {Epoch: 4, Held: true}, {Epoch: ^uint32(0)}} {
		started := coarseNow()
		if err := n.heart.Beat(p); err != nil {
			t.Fatal(err)
		}
		have := raw()
		if have.Beat < started || have.Beat > coarseNow() || have.Epoch != p.Epoch || have.Held != boolean(p.Held) {
			t.Errorf("%+v was written as %+v", p, have)
		}
		if got, err := n.heart.Read(); err != nil || got != p {
			t.Errorf("%+v is read as %+v (%v)", p, got, err)
		}
	}
	if err := n.heart.Stop(); err != nil {
		t.Fatal(err)
	}
	if have := raw(); have.Beat != 0 || have.Epoch != ^uint32(0) {
		t.Errorf("stopped, it is %+v", have)
	}
}

// A beat outlives the accelerator that it is from, and another agent reads it.
func TestHeartbeatOutlivesItsAgent(t *testing.T) {
	h := newHost(t)
	old := h.open(t, 16)
	h.sync(t, old)
	heart, err := old.Heartbeat()
	if err != nil {
		t.Fatal(err)
	}
	defer heart.Close()
	old.Close()
	if err := heart.Beat(Pulse{Epoch: 9}); err != nil {
		t.Fatal(err)
	}
	fresh, err := h.open(t, 16).Heartbeat()
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	if p, err := fresh.Read(); err != nil || p != (Pulse{Epoch: 9}) {
		t.Errorf("the next agent reads %+v (%v)", p, err)
	}
}

// The life of a beat is what the programs take it for.
func TestPulseLifeIsThePrograms(t *testing.T) {
	n := newPodNode(t)
	for age, taken := range map[time.Duration]bool{PulseLife - 300*time.Millisecond: true, PulseLife + 20*time.Millisecond: false} {
		n.reset()
		established(these(ourTCP), beat(func(p *weftPulse) { p.Beat = ago(age) }))(n)
		got := n.run(podIn, fromPod(ourTCP, 100).bytes(t))
		if (got.verdict == redirected) != taken || (got.passed["agent_silent"] == 1) == taken {
			t.Errorf("%v after a beat: verdict %d, passed %v", age, got.verdict, got.passed)
		}
	}
}
