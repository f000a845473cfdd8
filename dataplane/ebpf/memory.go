package ebpf

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// hashOverhead is what an entry of a hash map costs beside key and value:
// struct htab_elem and its share of a bucket, in bytes.
const hashOverhead = 64

// mapBytes is the memory a map takes when full, as kernel/bpf/hashtab.c and
// arraymap.c lay it out: values are rounded up to 8 bytes, and per-CPU values
// exist once for every possible CPU.
func mapBytes(kind ebpf.MapType, key, value, entries uint32, cpus int) uint64 {
	round := func(n uint32) uint64 { return uint64(n+7) &^ 7 }
	switch kind {
	case ebpf.PerCPUArray:
		return uint64(entries) * round(value) * uint64(cpus)
	case ebpf.Array:
		return uint64(entries) * round(value)
	default:
		return uint64(entries) * (round(key) + round(value) + hashOverhead)
	}
}

// Memory is what all maps take together when full, in bytes, for a number of
// peers on a host with a number of possible CPUs, with IPv6 peers or without.
func Memory(maxPeers, cpus int, ipv6 bool) (uint64, error) {
	spec, err := loadWeft()
	if err != nil {
		return 0, fmt.Errorf("reading the compiled programs: %w", err)
	}
	size(spec, Options{MaxPeers: maxPeers, IPv6: ipv6})
	var bytes uint64
	for name, m := range spec.Maps {
		if !isData(name) {
			bytes += mapBytes(m.Type, m.KeySize, m.ValueSize, m.MaxEntries, cpus)
		}
	}
	return bytes, nil
}
