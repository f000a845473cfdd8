package kernel

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestChoosePeers(t *testing.T) {
	for _, test := range []struct {
		name    string
		peers   string
		served  string // prefixes
		failed  map[string]string
		skipped string
	}{
		{name: "TwoPeers", peers: peerB + peerC, served: "10.244.4.0/24 10.244.7.0/24"},
		{name: "NoMACYet", peers: peerB + "c 10.244.7.0/24 192.0.2.13 -", served: "10.244.4.0/24", skipped: "10.244.7.0/24"},
		{name: "OtherFamily", peers: peerB + "b fd00::/64 2001:db8::12 0a:00:00:00:00:0b", served: "10.244.4.0/24"},
		{
			name: "SamePrefixFirstNodeWins", peers: "z 10.244.4.0/24 192.0.2.26 0a:00:00:00:00:1a\n" + peerB,
			served: "10.244.4.0/24", failed: map[string]string{"10.244.4.0/24": `(node "z"): peer 10.244.4.0/24 (node "b") has the same pod prefix`},
		},
		{
			name: "SameMACElsewhere", peers: peerB + "c 10.244.7.0/24 192.0.2.13 0a:00:00:00:00:0b",
			served: "10.244.4.0/24", failed: map[string]string{"10.244.7.0/24": `its MAC 0a:00:00:00:00:0b, at 192.0.2.13, is also that of peer 10.244.4.0/24 (node "b") at 192.0.2.12`},
		},
		{name: "SameMACSameNode", peers: peerB + "b 10.244.5.0/24 192.0.2.12 0a:00:00:00:00:0b", served: "10.244.4.0/24 10.244.5.0/24"},
		{
			name: "WholeNetworkClaimed", peers: peerB + peerC + "evil 10.244.0.0/20 192.0.2.66 0a:00:00:00:00:66",
			served: "10.244.4.0/24 10.244.7.0/24", failed: map[string]string{"10.244.0.0/20": `holds that of peer 10.244.4.0/24 (node "b")`},
		},
		{
			name:   "RefusedWideClaimDoesNotTakeAMACWithIt",
			peers:  peerB + "evil 10.244.0.0/20 192.0.2.66 0a:00:00:00:00:0b",
			served: "10.244.4.0/24", failed: map[string]string{"10.244.0.0/20": "holds that of"},
		},
		{
			name: "WrongInItself",
			peers: peerB + `
				own      10.244.25.0/24  192.0.2.31   0a:00:00:00:00:31
				within   10.244.25.64/26 192.0.2.32   0a:00:00:00:00:32
				outside  10.99.0.0/24    192.0.2.33   0a:00:00:00:00:33
				hostbits 10.244.34.1/24  192.0.2.34   0a:00:00:00:00:34
				us       10.244.35.0/24  192.0.2.11   0a:00:00:00:00:35
				group    10.244.36.0/24  239.1.1.1    0a:00:00:00:00:36
				nowhere  10.244.37.0/24  0.0.0.0      0a:00:00:00:00:37
				loop     10.244.38.0/24  127.0.0.1    0a:00:00:00:00:38
				family   10.244.39.0/24  2001:db8::39 0a:00:00:00:00:39
				ourmac   10.244.40.0/24  192.0.2.40   0a:00:00:00:00:0a
				groupmac 10.244.41.0/24  192.0.2.41   01:00:5e:00:00:01
				all      0.0.0.0/0       192.0.2.42   0a:00:00:00:00:42
			`,
			served: "10.244.4.0/24",
			failed: map[string]string{
				"10.244.25.0/24":  "overlaps this node's own, 10.244.25.0/24",
				"10.244.25.64/26": "overlaps this node's own",
				"10.99.0.0/24":    "not inside the overlay's network 10.244.0.0/16",
				"10.244.34.1/24":  "host bits set; it should be 10.244.34.0/24",
				"10.244.35.0/24":  "public IP 192.0.2.11 is this node's own",
				"10.244.36.0/24":  "239.1.1.1 is not the address of one host",
				"10.244.37.0/24":  "0.0.0.0 is not the address of one host",
				"10.244.38.0/24":  "127.0.0.1 is not the address of one host",
				"10.244.39.0/24":  "of another family",
				"10.244.40.0/24":  "MAC 0a:00:00:00:00:0a is that of this node's flannel.1",
				"10.244.41.0/24":  "group address",
				"0.0.0.0/0":       "not inside",
			},
		},
		{
			name: "PrefixHoldsAnUnderlayAddress", peers: "b 10.244.4.0/24 10.244.7.12 0a:00:00:00:00:0b\n" + peerC,
			served: "10.244.4.0/24", failed: map[string]string{"10.244.7.0/24": `holds the public IP 10.244.7.12 of peer 10.244.4.0/24 (node "b")`},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := testState(t, test.peers)
			wants, err := overlays(s, testUplink())
			if err != nil {
				t.Fatal(err)
			}
			// In any order of the peers the outcome is the same.
			for range 2 {
				c := choosePeers(wants[0], s.Local.MAC, s.Peers)
				var served []string
				for _, p := range c.served {
					served = append(served, p.Prefix.String())
				}
				if got := strings.Join(served, " "); got != test.served {
					t.Errorf("served are %s, want %s", got, test.served)
				}
				if got := strings.Trim(strings.ReplaceAll(listPrefixes(c.skipped), "none", ""), ", "); got != test.skipped {
					t.Errorf("skipped are %s, want %s", got, test.skipped)
				}
				checkFailed(t, c.failed, test.failed)
				slices.Reverse(s.Peers)
			}
		})
	}
}

// checkFailed compares errors by prefix with parts of their text.
func checkFailed(t *testing.T, failed map[netip.Prefix]error, want map[string]string) {
	t.Helper()
	for prefix, err := range failed {
		if part, ok := want[prefix.String()]; !ok || !strings.Contains(err.Error(), part) {
			t.Errorf("peer %s failed with %q, want %q", prefix, err, part)
		}
	}
	for prefix := range want {
		if failed[netip.MustParsePrefix(prefix)] == nil {
			t.Errorf("peer %s did not fail", prefix)
		}
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func itoa(n int) string { return strconv.Itoa(n) }
