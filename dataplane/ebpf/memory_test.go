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
	//   100   18.7 MiB   18.9 MiB   20.9 MiB
	//  1000   18.9 MiB   20.3 MiB   31.5 MiB
	//  5120   19.8 MiB   26.5 MiB   79.9 MiB
	// 20000   23.1 MiB   48.8 MiB  254.9 MiB
	// with IPv6 too:
	//  5120   23.6 MiB   32.5 MiB  103.4 MiB
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
