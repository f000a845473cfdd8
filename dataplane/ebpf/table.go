//go:build linux

package ebpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// batchSize is how many entries of a map one system call reads or writes. One that
// reads takes whole buckets of a hash map, which are not that full.
const batchSize = 1024

// put writes the wanted entries that are missing or different and returns the
// keys that nobody wants.
func put[K, V comparable](m *ebpf.Map, want map[K]V) (stale []K, err error) {
	have, err := readAll[K, V](m)
	if err != nil {
		return nil, err
	}
	return putOver(m, have, want)
}

// putOver is put where it is known what the map has.
func putOver[K, V comparable](m *ebpf.Map, have, want map[K]V) (stale []K, err error) {
	for key := range have {
		if _, ok := want[key]; !ok {
			stale = append(stale, key)
		}
	}
	// A full map takes new entries only after old ones have gone.
	if len(stale) > 0 && len(have)+len(want) > int(m.MaxEntries()) {
		if err := remove(m, stale); err != nil {
			return nil, err
		}
		stale = nil
	}
	var newKeys []K
	var newValues []V
	for key, value := range want {
		if old, ok := have[key]; !ok || old != value {
			newKeys, newValues = append(newKeys, key), append(newValues, value)
		}
	}
	return stale, write(m, newKeys, newValues)
}

// write writes entries. Of a per-CPU map an entry's values are those of all CPUs.
func write[K, V any](m *ebpf.Map, keys []K, values []V) error {
	for begin := 0; begin < len(keys); begin += batchSize {
		end := min(begin+batchSize, len(keys))
		each := len(values) / len(keys)
		n, err := m.BatchUpdate(keys[begin:end], values[begin*each:end*each], nil)
		if err != nil {
			return fmt.Errorf("entry %v: %w", keys[min(begin+n, end-1)], err)
		}
	}
	return nil
}

// remove deletes entries; one that is gone is no error.
func remove[K any](m *ebpf.Map, keys []K) error {
	var errs []error
	for _, key := range keys {
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// readAll reads a hash map as a Go map. Nobody else writes while we hold the
// lock, so that it is complete; of a map that programs write, some entries may be
// missing.
func readAll[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	all, err := readBatches[K, V](m)
	// Maps of devices have no batches, and a bucket could be too full for one.
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENOSPC) {
		return iterate[K, V](m)
	}
	return all, err
}

func readBatches[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	var (
		all    = map[K]V{}
		size   = min(batchSize, int(m.MaxEntries()))
		keys   = make([]K, size)
		values = make([]V, size)
		cursor ebpf.MapBatchCursor
	)
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, err
		}
		for i, key := range keys[:n] {
			all[key] = values[i]
		}
		if err != nil { // that was the last of them
			return all, nil
		}
	}
}

// array is what was read of an array: of each entry a value, or of a per-CPU array
// those of all CPUs.
type array[V any] struct {
	values []V
	each   int
}

// at returns the values of an entry, nil if it was not read.
func (a array[V]) at(entry uint32) []V {
	if int(entry) >= len(a.values)/max(a.each, 1) {
		return nil
	}
	return a.values[int(entry)*a.each : (int(entry)+1)*a.each]
}

// readArray reads the first n entries of an array.
func readArray[V any](m *ebpf.Map, n int) (a array[V], err error) {
	if a.each, err = valuesPerEntry(m); err != nil {
		return a, err
	}
	n = min(n, int(m.MaxEntries()))
	var (
		values = make([]V, n*a.each)
		keys   = make([]uint32, min(n, batchSize))
		cursor ebpf.MapBatchCursor
	)
	for begin := 0; begin < n; {
		end := min(begin+batchSize, n)
		read, err := m.BatchLookup(&cursor, keys[:end-begin], values[begin*a.each:end*a.each], nil)
		begin += read
		if err != nil && !(errors.Is(err, ebpf.ErrKeyNotExist) && begin == int(m.MaxEntries())) { // at its end
			return a, err
		}
	}
	a.values = values
	return a, nil
}

// valuesPerEntry is how many values an entry of a map has.
func valuesPerEntry(m *ebpf.Map) (int, error) {
	if m.Type() == ebpf.PerCPUArray {
		return ebpf.PossibleCPU()
	}
	return 1, nil
}

func iterate[K comparable, V any](m *ebpf.Map) (map[K]V, error) {
	var (
		all   = map[K]V{}
		key   K
		value V
	)
	for it := m.Iterate(); ; {
		if !it.Next(&key, &value) {
			return all, it.Err()
		}
		all[key] = value
	}
}

// countEntries counts what is in a map. An array always has all its entries.
func countEntries(m *ebpf.Map) (int, error) {
	if m.Type() == ebpf.Array || m.Type() == ebpf.PerCPUArray {
		return int(m.MaxEntries()), nil
	}
	entries := 0
	for key := any(nil); ; entries++ {
		next, err := m.NextKeyBytes(key)
		if err != nil || next == nil || entries == int(m.MaxEntries()) {
			return entries, err
		}
		key = next
	}
}
