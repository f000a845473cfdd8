//go:build linux

package ebpf

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
)

// What --max-peers costs: the README has this table.
func ExampleMemory() {
	fmt.Println("peers    2 CPUs   16 CPUs  128 CPUs")
	for _, peers := range []int{100, 1000, 5120, 20000} {
		fmt.Printf("%5d", peers)
		for _, cpus := range []int{2, 16, 128} {
			bytes, err := Memory(peers, cpus)
			if err != nil {
				panic(err)
			}
			fmt.Printf("  %4.1f MiB", float64(bytes)/(1<<20))
		}
		fmt.Println()
	}
	// Output:
	// peers    2 CPUs   16 CPUs  128 CPUs
	//   100   2.9 MiB   3.0 MiB   4.1 MiB
	//  1000   3.1 MiB   4.4 MiB  14.7 MiB
	//  5120   4.0 MiB  10.6 MiB  63.1 MiB
	// 20000   7.3 MiB  32.9 MiB  238.1 MiB
}

func TestMemoryIsWhatTheKernelSays(t *testing.T) {
	h := newHost(t)
	a := h.open(t, 1000)
	cpus := ebpf.MustPossibleCPU()
	for name, m := range map[string]*ebpf.Map{
		// Before 6.4 the kernel says nothing of use about hash maps.
		"peer_states": a.objects.PeerStates, "peer_counters": a.objects.PeerCounters,
	} {
		info, err := m.Info()
		if err != nil {
			t.Fatal(err)
		}
		kernel, ok := info.Memlock()
		if !ok {
			t.Fatalf("the kernel does not say what map %s takes", name)
		}
		ours := mapBytes(m.Type(), m.KeySize(), m.ValueSize(), m.MaxEntries(), cpus)
		if ratio := float64(ours) / float64(kernel); ratio < 0.7 || ratio > 1.3 {
			t.Errorf("map %s: we say %d bytes, the kernel %d", name, ours, kernel)
		}
	}
}
