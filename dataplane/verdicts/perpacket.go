//go:build linux

package verdicts

import (
	"fmt"
	"runtime"
	"slices"
)

// PerPacketRules names the rules of the calling thread's network namespace that
// treat the packets of one established flow differently from one another: by
// rate, by chance, by size, by content. No witness of an earlier verdict stands
// for the next of theirs. Each text says where the rule is, and what is in it:
// "ip filter FORWARD: limit", "ip filter FORWARD (legacy): limit".
//
// A packet of an established flow here is one of TCP without SYN, FIN and RST,
// or of UDP, neither fragmented nor with options: others go through the kernel
// anyway. Only rules that it can meet on its way through this machine are named,
// and only those that do something with it, not those that log and count.
func PerPacketRules() ([]string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	found, err := nftablesPerPacket()
	if err != nil {
		return nil, fmt.Errorf("reading nftables: %w", err)
	}
	legacy, err := legacyPerPacket()
	if err != nil {
		return nil, fmt.Errorf("reading legacy tables: %w", err)
	}
	found = append(found, legacy...)
	slices.Sort(found)
	return found, nil
}
