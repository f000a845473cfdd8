//go:build linux

package dataplane

import (
	"context"
	"fmt"
	"time"

	"github.com/weft-net/weft/dataplane/verdicts"
)

// The host's rulesets are read at most once in rulesGap, and for a twentieth of a
// processor: 5,000 rules by iptables-nft take a quarter of a second.
const (
	rulesGap   = time.Second
	rulesShare = 20
)

// followRules looks whether the host has rules that treat packets of one flow
// differently, at first and whenever rulesets have changed, until ctx is done.
// No witness can stand for those.
func (d *Dataplane) followRules(ctx context.Context, changes <-chan verdicts.Changes) {
	for {
		began := time.Now()
		d.checkRules()
		gap := max(rulesGap, rulesShare*time.Since(began))
		for {
			select {
			case <-ctx.Done():
				return
			case change := <-changes:
				if change&(verdicts.Nftables|verdicts.Iptables|verdicts.Rules|verdicts.Overrun) == 0 {
					continue
				}
			}
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(gap):
		}
	}
}

func (d *Dataplane) checkRules() {
	rules, err := verdicts.PerPacketRules()
	if err != nil {
		d.obstacles.set(findsRules, fmt.Sprintf("the host's rules can't be read: %v", err))
		return
	}
	var found []string
	for _, rule := range rules {
		found = append(found, "the host judges packets of one flow differently ("+rule+")")
	}
	if routesByTOS() {
		found = append(found, "the host has routing rules that look at the TOS of a packet")
	}
	d.obstacles.set(findsRules, found...)
}
