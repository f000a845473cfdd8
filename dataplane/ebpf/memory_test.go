//go:build linux

package ebpf

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
)

// What --max-peers costs: the README has this table.
func ExampleMemory() {
	row := func(peers int, ipv6 bool) {
		fmt.Printf("%5d", peers)
		for _, cpus := range []int{2, 16, 128} {
			bytes, err := Memory(peers, cpus, ipv6)
			if err != nil {
				panic(err)
			}
			fmt.Printf("  %5.1f MiB", float64(bytes)/(1<<20))
		}
		fmt.Println()
	}
	fmt.Println("peers     2 CPUs    16 CPUs   128 CPUs")
	for _, peers := range []int{100, 1000, 5120, 20000} {
		row(peers, false)
	}
	fmt.Println("with IPv6 too:")
	row(5120, true)
	// Output:
	// peers     2 CPUs    16 CPUs   128 CPUs
	//   100   19.2 MiB   19.4 MiB   21.5 MiB
	//  1000   19.4 MiB   20.8 MiB   32.1 MiB
	//  5120   20.3 MiB   27.0 MiB   80.6 MiB
	// 20000   23.6 MiB   49.3 MiB  255.5 MiB
	// with IPv6 too:
	//  5120   24.1 MiB   33.0 MiB  104.1 MiB
}

func TestMemoryIsWhatTheKernelSays(t *testing.T) {
	h := newHost(t)
	a := h.openWith(t, Options{MaxPeers: 1000, IPv6: true})
	cpus := ebpf.MustPossibleCPU()
	for name, m := range map[string]*ebpf.Map{
		// Before 6.4 the kernel says nothing of use about hash maps.
		"peer_states": a.objects.PeerStates, "peer_counters": a.objects.PeerCounters, "peer6_counters": a.objects.Peer6Counters,
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
