package state

import (
	"net/netip"
	"testing"
)

func TestParseMAC(t *testing.T) {
	for text, ok := range map[string]bool{
		"0a:58:0a:f4:01:00":       true,
		"0A-58-0A-F4-01-00":       true,
		"":                        false,
		"0a:58:0a:f4:01":          false,
		"00:00:00:00:00:00":       false,
		"ff:ff:ff:ff:ff:ff":       false,
		"01:00:5e:00:00:01":       false,
		"00:00:5e:00:53:00:00:01": false,
	} {
		mac, err := ParseMAC(text)
		if (err == nil) != ok {
			t.Errorf("ParseMAC(%q) = %v, %v", text, mac, err)
		}
		if err != nil {
			continue
		}
		var back MAC
		out, _ := mac.MarshalText()
		if err := back.UnmarshalText(out); err != nil || back != mac {
			t.Errorf("%q came back as %v (%v)", text, back, err)
		}
	}
}

func TestSortOrdersPeersByPrefix(t *testing.T) {
	peer := func(prefix, node string) Peer {
		return Peer{Prefix: netip.MustParsePrefix(prefix), Node: node}
	}
	s := State{Peers: []Peer{
		peer("10.244.10.0/24", "c"), peer("fd00::/64", "a"), peer("10.244.9.0/24", "b"), peer("10.244.9.0/25", "a"),
	}}
	s.Sort()
	want := []string{"10.244.9.0/24", "10.244.9.0/25", "10.244.10.0/24", "fd00::/64"}
	for i, w := range want {
		if got := s.Peers[i].Prefix.String(); got != w {
			t.Errorf("peer %d is %s, want %s", i, got, w)
		}
	}
}

func TestRandomMACIsOneThatADeviceCanHave(t *testing.T) {
	seen := map[MAC]bool{}
	for range 1000 {
		mac := RandomMAC()
		if mac[0]&3 != 2 {
			t.Fatalf("%s is not a locally administered address of one device", mac)
		}
		if seen[mac] {
			t.Fatalf("%s came twice", mac)
		}
		seen[mac] = true
	}
}
