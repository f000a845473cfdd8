//go:build linux

package main

import (
	"math"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   float64
	}{{[]float64{3, 1, 2}, 2}, {[]float64{4, 1, 2, 3}, 2.5}, {[]float64{7}, 7}} {
		if got := median(c.values); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.values, got, c.want)
		}
	}
}

func TestPairedRatioKnowsItsInterval(t *testing.T) {
	// Ratios 1, 2, 4: logarithms of mean ln 2 and standard deviation ln 2, so
	// the bounds are 2 * 2^(±4.303/√3).
	r := pairedRatio([]float64{10, 20, 40}, []float64{10, 10, 10})
	spread := math.Pow(2, 4.303/math.Sqrt(3))
	for _, c := range []struct{ got, want float64 }{{r.mean, 2}, {r.low, 2 / spread}, {r.high, 2 * spread}} {
		if math.Abs(c.got/c.want-1) > 1e-9 {
			t.Errorf("got %v, want %v (%+v)", c.got, c.want, r)
		}
	}
	if r := pairedRatio([]float64{20}, []float64{10}); r.mean != 2 || !math.IsNaN(r.low) {
		t.Errorf("one pair has a ratio and no interval, got %+v", r)
	}
	if r := pairedRatio([]float64{20}, nil); !math.IsNaN(r.mean) {
		t.Errorf("without a base there is no ratio, got %+v", r)
	}
}

func TestStudentBeyondTheTable(t *testing.T) {
	for degrees, want := range map[int]float64{1: 12.706, 10: 2.228, 20: 2.086, 21: 2.080, 30: 2.042, 60: 2.000, 120: 1.980} {
		if got := student(degrees); math.Abs(got-want) > 0.0006 {
			t.Errorf("student(%d) = %.4f, want %.3f", degrees, got, want)
		}
	}
}

func TestMeterCountsAfterTheWarmUp(t *testing.T) {
	m := meter{every: 64, warm: time.Millisecond, begun: time.Now()}
	for range 64 {
		m.add(1000)
	}
	time.Sleep(2 * time.Millisecond)
	for range 64 {
		m.add(1000) // the last of these ends the warm-up
	}
	for range 128 {
		m.add(10)
	}
	if c := m.result(); c.Transactions != 128 || c.Bytes != 1280 {
		t.Errorf("counted %+v, want the 128 after the warm-up", c)
	}
}

func TestParseCounters(t *testing.T) {
	text := `{"peers": [{"publicIP": "192.0.2.13"}, {"publicIP": "192.0.2.12", "counters": [
		{"path": "express", "txPackets": 1, "rxPackets": 2, "txBytes": 10, "rxBytes": 20},
		{"path": "base", "txPackets": 3, "rxPackets": 4, "txBytes": 30, "rxBytes": 40},
		{"path": "kernel", "txPackets": 5, "rxPackets": 6, "txBytes": 50, "rxBytes": 60}]}]}`
	got, err := parseCounters(text, "192.0.2.12")
	if want := (counters{express: 3, base: 7, kernel: 11, bytes: 210}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, ip := range []string{"192.0.2.13", "192.0.2.14"} {
		if got, err := parseCounters(text, ip); err == nil {
			t.Errorf("%s has no counters, got %+v", ip, got)
		}
	}
}
