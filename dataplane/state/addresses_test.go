package state

import (
	"net/netip"
	"slices"
	"testing"
)

func TestAddressesThatANodeAnswersOn(t *testing.T) {
	for prefix, want := range map[string][]string{
		"10.244.2.0/24":   {"10.244.2.0", "10.244.2.1", "10.244.2.255"},
		"10.244.2.128/26": {"10.244.2.128", "10.244.2.129", "10.244.2.191"},
		"10.244.2.4/31":   {"10.244.2.4", "10.244.2.5"},
		"10.244.2.4/32":   {"10.244.2.4"},
		"fd00:10:2::/64":  {"fd00:10:2::", "fd00:10:2::1"}, // IPv6 has no broadcast
	} {
		var got []string
		for _, a := range NodeAddresses(netip.MustParsePrefix(prefix)) {
			got = append(got, a.String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", prefix, got, want)
		}
	}
}
