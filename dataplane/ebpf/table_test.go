//go:build linux

package ebpf

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/weft-net/weft/test/netns"
)

// mustMap makes a map of numbers.
func mustMap(t *testing.T, kind ebpf.MapType, entries uint32) *ebpf.Map {
	t.Helper()
	netns.RequireRoot(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: kind, KeySize: 4, ValueSize: 4, MaxEntries: entries})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// mustHold checks what is read of a map.
func mustHold(t *testing.T, m *ebpf.Map, want map[uint32]uint32) {
	t.Helper()
	have, err := readAll[uint32, uint32](m)
	if err != nil || !maps.Equal(have, want) {
		t.Fatalf("%d entries (%v), want %d", len(have), err, len(want))
	}
	if n, err := countEntries(m); err != nil || n != len(want) {
		t.Fatalf("%d entries were counted (%v), want %d", n, err, len(want))
	}
}

// A map that is full takes several batches, or one that holds a single entry.
func TestTablesAreMadeToHoldWhatIsWanted(t *testing.T) {
	for name, entries := range map[string]uint32{"many batches": 2*batchSize + 7, "one entry": 1} {
		t.Run(name, func(t *testing.T) {
			m := mustMap(t, ebpf.Hash, entries)
			all, other := map[uint32]uint32{}, map[uint32]uint32{}
			for i := range entries {
				all[i] = i
				other[i+i%2*entries] = i % 3
			}
			for _, want := range []map[uint32]uint32{nil, all, other, all, nil} {
				stale, err := put(m, want)
				if err == nil {
					err = remove(m, stale)
				}
				if err != nil {
					t.Fatal(err)
				}
				mustHold(t, m, want)
			}
		})
	}
}

func TestATableThatKnowsNoBatchesIsRead(t *testing.T) {
	m := mustMap(t, ebpf.DevMapHash, 8)
	want := map[uint32]uint32{3: 1, 5: 1, 7: 1} // the loopback device
	for key, device := range want {
		if err := m.Put(key, device); err != nil {
			t.Fatal(err)
		}
	}
	mustHold(t, m, want)
}

// What is written to an array is read of it again, of all CPUs, as far as is asked.
func TestArraysAreReadAndWritten(t *testing.T) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		t.Fatal(err)
	}
	const entries = 2*batchSize + 7
	for kind, each := range map[ebpf.MapType]int{ebpf.Array: 1, ebpf.PerCPUArray: cpus} {
		for _, n := range []int{0, 1, batchSize, batchSize + 1, entries, entries + 1} {
			t.Run(fmt.Sprint(kind, " ", n), func(t *testing.T) {
				m := mustMap(t, kind, entries)
				var keys, values []uint32
				for key := range uint32(entries) {
					keys = append(keys, key)
					for cpu := range each {
						values = append(values, key<<8|uint32(cpu))
					}
				}
				if err := write(m, keys, values); err != nil {
					t.Fatal(err)
				}
				mustRead := func(n int, want []uint32) {
					t.Helper()
					var read []uint32
					err := readArray(m, n, func(values []uint32) {
						if len(values) != each {
							t.Fatalf("%d values of an entry, want %d", len(values), each)
						}
						read = append(read, values...)
					})
					if err != nil || !slices.Equal(read, want) {
						t.Fatalf("read %d values (%v), want %d, or others", len(read), err, len(want))
					}
				}
				mustRead(n, values[:min(n, entries)*each])
				if err := clearArray[uint32](m, keys[1:]); err != nil {
					t.Fatal(err)
				}
				clear(values[each:])
				mustRead(entries, values)
			})
		}
	}
}
