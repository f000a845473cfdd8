//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"slices"

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

// removeUnless deletes the entries that keep does not want, and returns the others.
func removeUnless[K comparable, V any](m *ebpf.Map, keep func(K, V) bool) (kept map[K]V, err error) {
	if kept, err = readAll[K, V](m); err != nil {
		return nil, fmt.Errorf("reading what there is: %w", err)
	}
	var gone []K
	for key, value := range kept {
		if !keep(key, value) {
			gone = append(gone, key)
			delete(kept, key)
		}
	}
	return kept, remove(m, gone)
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

// readArray reads the first n entries of an array, in order, and hands take the value
// of each, or of a per-CPU array those of all CPUs; they are valid until take returns.
func readArray[V any](m *ebpf.Map, n int, take func(values []V)) error {
	size, each, err := arrayBatch(m)
	if err != nil {
		return err
	}
	n = min(n, int(m.MaxEntries()))
	var (
		keys   = make([]uint32, min(size, n))
		values = make([]V, len(keys)*each)
		cursor ebpf.MapBatchCursor
	)
	for begin := 0; begin < n; {
		some := min(size, n-begin)
		read, err := m.BatchLookup(&cursor, keys[:some], values[:some*each], nil)
		if err != nil {
			return err
		}
		for i := range read {
			take(values[i*each : (i+1)*each])
		}
		begin += read
	}
	return nil
}

// clearArray sets entries of an array to zero, on all CPUs.
func clearArray[V any](m *ebpf.Map, entries []uint32) error {
	size, each, err := arrayBatch(m)
	if err != nil {
		return err
	}
	zero := make([]V, min(size, len(entries))*each)
	for some := range slices.Chunk(entries, size) {
		if err := write(m, some, zero[:len(some)*each]); err != nil {
			return err
		}
	}
	return nil
}

// arrayBatch is how many entries of an array to read or write at once, and how many
// values each has: of a per-CPU array one for each CPU, of which there may be hundreds.
func arrayBatch(m *ebpf.Map) (size, each int, err error) {
	if m.Type() != ebpf.PerCPUArray {
		return batchSize, 1, nil
	}
	each, err = ebpf.PossibleCPU()
	return max(1, batchSize/max(1, each)), each, err
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
