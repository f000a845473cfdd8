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
	"github.com/weft-net/weft/dataplane/state"
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

// What several nodes claim is ours, and then the oldest lease's: a prefix, a MAC,
// and that an address is a node's and not a pod's.
func TestWhatTwoLeasesClaim(t *testing.T) {
	config, err := flannel.ParseEtcdConfig([]byte(`{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}`))
	must(t, err)
	own := entry{key: "10.244.1.0-24", prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}}
	own.lease = flannel.Lease{PublicIP: netip.MustParseAddr("10.9.0.1"), MAC: state.MAC{2, 0, 0, 0, 0, 1}}
	lease := func(ip string, mac int) string {
		return fmt.Sprintf(`{"PublicIP":%q,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:%02x"}}`, ip, mac)
	}
	for what, c := range map[string]struct{ older, younger, want string }{
		"another's MAC":            {"10.244.3.0-24=" + lease("10.9.0.3", 3), "10.244.2.0-24=" + lease("10.9.0.2", 3), "10.244.2.0/24 00, 10.244.3.0/24 03"},
		"our MAC":                  {"10.244.3.0-24=" + lease("10.9.0.3", 1), "10.244.2.0-24=" + lease("10.9.0.2", 2), "10.244.2.0/24 02, 10.244.3.0/24 00"},
		"a node in another's pods": {"10.244.3.0-24=" + lease("10.9.0.3", 3), "10.244.2.0-24=" + lease("10.244.3.7", 2), "10.244.3.0/24 03"},
		"pods around another node": {"10.244.3.0-24=" + lease("10.9.0.3", 3), "10.9.0.0-24=" + lease("10.8.0.2", 2), "10.244.3.0/24 03"},
		"a node in our pods":       {"10.244.3.0-24=" + lease("10.9.0.3", 3), "10.244.2.0-24=" + lease("10.244.1.7", 2), "10.244.3.0/24 03"},
		"half of another's prefix": {"10.244.3.0-24=" + lease("10.9.0.3", 3), "10.244.3.128-25=" + lease("10.9.0.2", 2), "10.244.3.0/24 03"},
	} {
		table := newTable(config)
		for i, text := range []string{c.younger, c.older} {
			key, value, _ := strings.Cut(text, "=")
			table.Put(key, &mvccpb.KeyValue{Value: []byte(value), CreateRevision: int64(9 - i)})
		}
		peers, faults := table.Peers(own)
		slices.SortFunc(peers, func(a, b state.Peer) int { return a.Prefix.Addr().Compare(b.Prefix.Addr()) })
		var got []string
		for _, p := range peers {
			got = append(got, fmt.Sprintf("%s %02x", p.Prefix, p.MAC[5]))
		}
		if strings.Join(got, ", ") != c.want || len(faults) != 1 {
			t.Errorf("%s: %v, want %s; faults %v", what, got, c.want, faults)
		}
	}
}

// A lease that can't be understood any more is gone by as it was, as flannel does;
// not beyond its deletion.
func TestLeaseThatTurnsToNonsense(t *testing.T) {
	config, err := flannel.ParseEtcdConfig([]byte(network))
	must(t, err)
	const key = "10.244.2.0-24"
	own := entry{key: "10.244.1.0-24", prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}}
	own.lease = flannel.Lease{PublicIP: netip.MustParseAddr("192.0.2.1")}
	for _, nonsense := range []string{
		"", "{", `{"PublicIP":"x","BackendType":"vxlan"}`, `{"PublicIP":"192.0.2.2","BackendType":"udp"}`,
		strings.Replace(value(2), "02:00", "ff:ff", 1), value(2) + strings.Repeat(" ", maxValue),
	} {
		table := newTable(config)
		see := func(created int64, value string, want bool, faults int) {
			t.Helper()
			table.Put(key, &mvccpb.KeyValue{Value: []byte(value), CreateRevision: created})
			for _, how := range []string{"a watch", "a list"} {
				peers, wrong := table.Peers(own)
				reached := len(peers) == 1 && !peers[0].MAC.IsZero()
				if reached != want || len(wrong) != faults {
					t.Errorf("%.80q, by %s: %v, %v", nonsense, how, peers, wrong)
				}
				listed := newTable(config)
				listed.Put(key, &mvccpb.KeyValue{Value: []byte(value), CreateRevision: created})
				listed.After(table)
				table = listed
			}
		}
		see(1, nonsense, false, 1)
		see(1, value(2), true, 0)
		see(1, nonsense, true, 1)
		see(1, nonsense, true, 1)
		table.Delete(key)
		see(3, nonsense, false, 1)
		see(3, value(2), true, 0)
		see(4, nonsense, false, 1) // it was deleted and made again unseen
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
