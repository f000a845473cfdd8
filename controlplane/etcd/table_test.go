//go:build linux && peers

package etcd

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/weft-net/weft/controlplane/claims"
	"github.com/weft-net/weft/controlplane/flannel"
)

func TestFreePrefixes(t *testing.T) {
	v4 := span{netip.MustParseAddr("10.244.1.0"), netip.MustParseAddr("10.244.5.0"), 24}
	v6 := span{netip.MustParseAddr("fd00:10:244:1::"), netip.MustParseAddr("fd00:10:244:ffff::"), 64}
	wide := span{netip.MustParseAddr("fd00:0:0:1::"), netip.MustParseAddr("fd00:ffff:ffff:ffff::"), 64}
	end := span{netip.MustParseAddr("255.255.254.0"), netip.MustParseAddr("255.255.255.0"), 24}
	for name, c := range map[string]struct {
		span  span
		taken string
		most  int
		want  string
	}{
		"nothing taken":               {v4, "", 9, "10.244.1.0/24 10.244.2.0/24 10.244.3.0/24 10.244.4.0/24 10.244.5.0/24"},
		"as many as asked for":        {v4, "10.244.2.0/24", 2, "10.244.1.0/24 10.244.3.0/24"},
		"all taken":                   {v4, "10.244.1.0/24 10.244.2.0/24 10.244.3.0/24 10.244.4.0/24 10.244.5.0/24", 9, ""},
		"some within a longer one":    {v4, "10.244.2.128/25 10.244.4.4/30", 9, "10.244.1.0/24 10.244.3.0/24 10.244.5.0/24"},
		"some within a shorter one":   {v4, "10.244.2.0/23", 9, "10.244.1.0/24 10.244.4.0/24 10.244.5.0/24"},
		"shorter and longer together": {v4, "10.244.2.0/23 10.244.3.0/24 10.244.3.7/32", 9, "10.244.1.0/24 10.244.4.0/24 10.244.5.0/24"},
		"one has everything":          {v4, "0.0.0.0/1", 9, ""},
		"one has half of IPv6":        {v6, "fd00:10:244::/49 fd00:10:244:8000::/64", 2, "fd00:10:244:8001::/64 fd00:10:244:8002::/64"},
		"one has 2^47 of IPv6":        {wide, "fd00::/17", 1, "fd00:8000::/64"},
		"the other family":            {v6, "10.244.1.0/24", 1, "fd00:10:244:1::/64"},
		"up to the last address":      {end, "255.255.254.0/24", 9, "255.255.255.0/24"},
	} {
		var set claims.Set[netip.Prefix]
		set.Expect(netip.PrefixFrom(c.span.first, c.span.bits))
		var taken []netip.Prefix
		for _, text := range strings.Fields(c.taken) {
			taken = append(taken, netip.MustParsePrefix(text))
			set.Expect(taken[len(taken)-1])
		}
		for _, p := range taken {
			set.Add(p, p)
		}
		var got []string
		for _, p := range c.span.Free(&set, c.most) {
			got = append(got, p.String())
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", name, got, c.want)
		}
	}
}

func TestChoosingAmongTheFirstFree(t *testing.T) {
	config, err := flannel.ParseEtcdConfig([]byte(dualNetwork))
	must(t, err)
	last := func(n int) int { return n - 1 }
	chosen, err := choose(spans(config), []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, nil, 3, last)
	must(t, err)
	if fmt.Sprint(chosen) != "[10.244.4.0/24 fd00:10:244:3::/64]" {
		t.Errorf("%v", chosen)
	}
	// One family's prefix from before is kept although the other's is taken.
	chosen, err = choose(spans(config), []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
		[]netip.Prefix{netip.MustParsePrefix("fd00:10:244:77::/64"), netip.MustParsePrefix("10.244.1.0/24")}, 1, last)
	must(t, err)
	if fmt.Sprint(chosen) != "[10.244.2.0/24 fd00:10:244:77::/64]" {
		t.Errorf("%v", chosen)
	}
}

// Whatever lies in etcd, no two peers share addresses, none shares ours, and
// none is ourselves.
func FuzzTable(f *testing.F) {
	for _, seed := range []string{
		"10.244.2.0-24=" + value(2) + "\n10.244.3.0-24=" + value(3),
		"10.244.0.0-16=" + value(2) + "\n10.244.3.0-24=" + value(3) + "\n10.244.3.128-25=" + value(4),
		"10.244.2.0-24&fd00:10:244:2::-64=" + strings.Replace(value(2), "null", `"2001:db8::2"`, 1),
		"10.244.1.0-24=" + value(1) + "\n10.244.4.0-24=" + value(1),
		"0.0.0.0-0&fd00:10:244:2::-64=" + `{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}}`,
		"10.244.2.0-24&fd00:10:244:2::-64=" + strings.Replace(value(2), "null", `"2001:db8::1"`, 1),
		"x=y\n=\n../..=" + value(9),
	} {
		f.Add([]byte(seed))
	}
	config, err := flannel.ParseEtcdConfig([]byte(dualNetwork))
	must(f, err)
	own := entry{key: "10.244.1.0-24&fd00:10:244:1::-64", prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")}}
	own.lease = flannel.Lease{PublicIP: netip.MustParseAddr("192.0.2.1"), PublicIPv6: netip.MustParseAddr("2001:db8::1")}
	f.Fuzz(func(t *testing.T, data []byte) {
		table := newTable(config)
		for i, line := range strings.Split(string(data), "\n") {
			key, value, _ := strings.Cut(line, "=")
			table.Put(key, &mvccpb.KeyValue{Value: []byte(value), CreateRevision: int64(i % 7), ModRevision: int64(i)})
		}
		peers, faults := table.Peers(own)
		for i, p := range peers {
			if p.PublicIP == own.lease.PublicIP || p.PublicIP == own.lease.PublicIPv6 {
				t.Errorf("peer %v is ourselves", p)
			}
			for _, other := range own.prefixes {
				if p.Prefix.Overlaps(other) {
					t.Errorf("peer %v has our %s", p, other)
				}
			}
			for _, other := range peers[:i] {
				if p.Prefix.Overlaps(other.Prefix) {
					t.Errorf("peers %v and %v", p, other)
				}
			}
		}
		for key, e := range table.entries {
			if faults[key] != nil || key == own.key || sameNode(e.lease, own.lease) {
				continue
			}
			for _, p := range e.peers {
				if !slices.Contains(peers, p) {
					t.Errorf("peer %v of lease %s is left out without a word", p, key)
				}
			}
		}
		for _, p := range table.Taken() {
			if p != p.Masked() || !p.IsValid() {
				t.Errorf("%s is taken", p)
			}
		}
	})
}
