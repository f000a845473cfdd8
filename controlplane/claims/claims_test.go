package claims

import (
	"net/netip"
	"strings"
	"testing"
)

func TestOverlapping(t *testing.T) {
	for name, c := range map[string]struct{ members, asked, want string }{
		"empty":                    {"", "10.244.1.0/24", ""},
		"the same":                 {"10.244.1.0/24", "10.244.1.0/24", "10.244.1.0/24"},
		"beside it":                {"10.244.1.0/24", "10.244.2.0/24", ""},
		"a part of it":             {"10.244.1.0/24", "10.244.1.128/25", "10.244.1.0/24"},
		"all of it":                {"10.244.1.0/24", "10.244.0.0/16", "10.244.1.0/24"},
		"half of it free":          {"10.244.0.0/25", "10.244.0.128/25", ""},
		"the other family":         {"10.244.1.0/24", "fd00::/24", ""},
		"everything":               {"10.244.1.0/24", "0.0.0.0/0", "10.244.1.0/24"},
		"IPv6":                     {"fd00:1::/64 fd00:2::/64", "fd00:2::/48", "fd00:2::/64"},
		"the same before the wide": {"10.0.0.0/8 10.244.1.0/24", "10.244.1.0/24", "10.244.1.0/24"},
		"in a wide one":            {"10.0.0.0/8 10.244.1.0/24", "10.244.2.0/24", "10.0.0.0/8"},
	} {
		var set Set[netip.Prefix]
		asked := netip.MustParsePrefix(c.asked)
		set.Expect(asked)
		for _, text := range strings.Fields(c.members) {
			set.Expect(netip.MustParsePrefix(text))
		}
		for _, text := range strings.Fields(c.members) {
			set.Add(netip.MustParsePrefix(text), netip.MustParsePrefix(text))
		}
		who, overlaps := set.Overlapping(asked)
		if overlaps != (c.want != "") || overlaps && who.String() != c.want {
			t.Errorf("%s: %s, %t; want %q", name, who, overlaps, c.want)
		}
	}
}

// The look-ups find what comparing with each would.
func FuzzOverlapping(f *testing.F) {
	f.Add([]byte{10, 244, 1, 0, 24, 10, 244, 0, 0, 16, 10, 244, 1, 128, 25})
	f.Fuzz(func(t *testing.T, data []byte) {
		var all []netip.Prefix
		for ; len(data) >= 5 && len(all) < 50; data = data[5:] {
			all = append(all, netip.PrefixFrom(netip.AddrFrom4([4]byte(data)), int(data[4])%33).Masked())
		}
		var set Set[netip.Prefix]
		for _, p := range all {
			set.Expect(p)
		}
		for i, p := range all {
			want := false
			for _, other := range all[:i] {
				want = want || other.Overlaps(p)
			}
			who, got := set.Overlapping(p)
			if got != want || got && !who.Overlaps(p) {
				t.Fatalf("%s among %v: %s, %t", p, all[:i], who, got)
			}
			set.Add(p, p)
		}
	})
}
