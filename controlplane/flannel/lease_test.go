package flannel

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// network is the configuration that leases are read in.
var network = Config{
	EnableIPv4: true, Network: prefix("10.244.0.0/16"),
	EnableIPv6: true, IPv6Network: prefix("fd00:10:244::/48"),
	VNI: 1, Port: 8472,
}

// mac reads a MAC address; "" is the zero value.
func mac(s string) (m state.MAC) {
	if err := m.UnmarshalText([]byte(s)); err != nil {
		panic(err)
	}
	return m
}

// writtenCase is what a node publishes, and what flannel writes of it.
type writtenCase struct {
	Name                                string
	Prefix, PrefixV6                    string
	PublicIP, PublicIPv6                string
	MAC, MACv6                          string
	VNI                                 uint32
	Network, IPv6Network                string
	MTU                                 int
	IPMasq                              bool
	Key, Value, Data, DataV6, SubnetEnv string
}

// lease is the node's.
func (w writtenCase) lease() Lease {
	l := Lease{
		Prefix: prefix(w.Prefix), PrefixV6: prefix(w.PrefixV6), PublicIP: addr(w.PublicIP), PublicIPv6: addr(w.PublicIPv6),
		MAC: mac(w.MAC), MACv6: mac(w.MACv6), BackendType: "vxlan",
	}
	if l.PublicIP.IsValid() {
		l.VNI = w.VNI
	}
	if l.PublicIPv6.IsValid() {
		l.VNIv6 = w.VNI
	}
	return l
}

func TestWhatIsWrittenIsFlannelsByteForByte(t *testing.T) {
	keys, err := NewAnnotationKeys(DefaultAnnotationPrefix)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range mustCases[writtenCase](t, "written.json") {
		l := w.lease()
		if got := LeaseKey(l); got != w.Key {
			t.Errorf("%s: key %s, want %s", w.Name, got, w.Key)
		}
		value, err := MarshalLease(l)
		if err != nil || string(value) != w.Value {
			t.Errorf("%s: %v\n got %s\nwant %s", w.Name, err, value, w.Value)
		}
		if back, err := ParseLease(w.Key, []byte(w.Value)); err != nil || back != l {
			t.Errorf("%s: came back from etcd as\n%+v, want\n%+v (%v)", w.Name, back, l, err)
		}

		want := map[string]string{
			keys.Managed: "true", keys.BackendType: "vxlan", keys.BackendData: w.Data, keys.BackendV6Data: w.DataV6,
			keys.PublicIP: w.PublicIP, keys.PublicIPv6: w.PublicIPv6,
		}
		var absent []string
		for key, value := range want {
			if value == "" {
				absent = append(absent, key)
				delete(want, key)
			}
		}
		set, remove := keys.Marshal(l)
		slices.Sort(absent)
		slices.Sort(remove)
		if !maps.Equal(set, want) || !slices.Equal(remove, absent) {
			t.Errorf("%s: annotations %v without %v, want %v without %v", w.Name, set, remove, want, absent)
		}
		back, err := keys.Parse(set)
		back.Prefix, back.PrefixV6 = l.Prefix, l.PrefixV6
		if err != nil || back != l {
			t.Errorf("%s: came back from annotations as\n%+v, want\n%+v (%v)", w.Name, back, l, err)
		}

		c := Config{Network: prefix(w.Network), IPv6Network: prefix(w.IPv6Network)}
		env := NewSubnetEnv(c, l, w.MTU, w.IPMasq)
		if got := string(env.Marshal()); got != w.SubnetEnv {
			t.Errorf("%s: subnet.env\n%s, want\n%s", w.Name, got, w.SubnetEnv)
		}
		if back, err := ParseSubnetEnv([]byte(w.SubnetEnv)); err != nil || back != env {
			t.Errorf("%s: subnet.env came back as %+v, want %+v (%v)", w.Name, back, env, err)
		}
	}
}

func TestLeaseThatPeersCouldDoNothingWith(t *testing.T) {
	whole := Lease{Prefix: prefix("10.244.1.0/24"), PublicIP: addr("192.0.2.1"), MAC: mac("0a:58:0a:f4:01:00"), VNI: 1}
	if _, err := MarshalLease(whole); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Lease){
		"nothing":      func(l *Lease) { *l = Lease{} },
		"no MAC":       func(l *Lease) { l.MAC = state.MAC{} },
		"no VNI":       func(l *Lease) { l.VNI = 0 },
		"no public IP": func(l *Lease) { l.PublicIP = netip.Addr{} },
		"half an IPv6": func(l *Lease) { l.PublicIPv6 = addr("2001:db8::1") },
		"IPv6 MAC":     func(l *Lease) { l.MACv6 = l.MAC },
	} {
		l := whole
		change(&l)
		if value, err := MarshalLease(l); err == nil {
			t.Errorf("%s: written as %s", name, value)
		}
	}
}

// readPeer is what flannel makes of one family of a lease.
type readPeer struct {
	Prefix, PublicIP, DataError, MAC string
	VNI                              uint32
}

// accepted tells whether flannel then has entries in the kernel.
func (p *readPeer) accepted(backend string) bool {
	return p != nil && p.DataError == "" && backend == "vxlan"
}

// sameAs compares it with ours.
func (p *readPeer) sameAs(got state.Peer) bool {
	return got == state.Peer{Node: "n", Prefix: prefix(p.Prefix), PublicIP: addr(p.PublicIP), MAC: mac(p.MAC)}
}

// peerOf finds the peer of a family.
func peerOf(peers []state.Peer, v6 bool) (state.Peer, bool) {
	i := slices.IndexFunc(peers, func(p state.Peer) bool { return p.Prefix.Addr().Is6() == v6 })
	if i < 0 {
		return state.Peer{}, false
	}
	return peers[i], true
}

// comparePeers compares our peers with flannel's, family by family. One whose data
// are broken is no peer in that sense: it has no entries in the kernel.
func comparePeers(t *testing.T, d differences, name, backend string, v4, v6 *readPeer, peers []state.Peer, err error) {
	t.Helper()
	for i, theirs := range []*readPeer{v4, v6} {
		ours, ok := peerOf(peers, i == 1)
		broken := err != nil && ours.MAC.IsZero()
		if d.agree(t, name+", "+family(i == 1), theirs.accepted(backend), ok && !broken, err) && !theirs.sameAs(ours) {
			t.Errorf("%s: %+v, flannel has %+v", name, ours, *theirs)
		}
	}
}

// Where our reading of leases differs from flannel's: a node that has not told
// its MAC yet is known already, a family that is wrong does not harm the other,
// and what can't work is refused.
var leaseDifferences = differences{
	"data: MAC empty, IPv4": "not told yet",
	"data: MAC null, IPv4":  "not told yet",
	"data missing, IPv4":    "not told yet",

	`PublicIPv6 "nonsense", IPv4`:     "IPv6 is wrong, IPv4 is not",
	`PublicIPv6 "", IPv4`:             "IPv6 is wrong, IPv4 is not",
	`PublicIPv6 "fe80::1%eth0", IPv4`: "IPv6 is wrong, IPv4 is not",

	"data: MAC zero, IPv4":       "no device has it",
	"data: MAC of a group, IPv4": "no device has it",
	"data: MAC of 8 bytes, IPv4": "no device has it",
	"data: VNI large, IPv4":      "no device has it",

	"of flannel's documentation, IPv4": "outside the network",
	"outside the network, IPv4":        "every pod prefix lies inside Network",
	"wider than the network, IPv4":     "every pod prefix lies inside Network",

	`PublicIP "0.0.0.0", IPv4`:            "not one host",
	`PublicIP "127.0.0.1", IPv4`:          "not one host",
	`PublicIP "224.0.0.1", IPv4`:          "not one host",
	`PublicIP "255.255.255.255", IPv4`:    "not one host",
	`PublicIP "0.1.2.3", IPv4`:            "not one host",
	`PublicIP "10.244.25.7", IPv4`:        "behind itself",
	`PublicIP "::ffff:192.0.2.11", IPv4`:  "no flannel writes it so",
	`PublicIPv6 "::", IPv6`:               "not one host",
	`PublicIPv6 "::1", IPv6`:              "not one host",
	`PublicIPv6 "ff02::1", IPv6`:          "not one host",
	`PublicIPv6 "fe80::1", IPv6`:          "means nothing on other nodes",
	`PublicIPv6 "fd00:10:244:1::7", IPv6`: "behind itself",
	`PublicIPv6 "192.0.2.11", IPv6`:       "not IPv6",

	"key 10.244.25.7-24, IPv4":            "the kernel refuses the route",
	"key 10.244.25.0-24&fd00::1-64, IPv4": "the kernel refuses the route",
	"key x10.244.25.0-24, IPv4":           "no flannel writes it",
	"key 10.244.25.0-031, IPv4":           "no flannel writes it",
	"key 10.244.25.0-24&10.0.0.0-8, IPv4": "no flannel writes it",
	"key 10.244.25.0-24&::-0, IPv4":       "no flannel writes it",
	"key 10.244.25.0-0, IPv4":             "every pod prefix lies inside Network",
	"key 0.0.0.0-0, IPv4":                 "every pod prefix lies inside Network",
	"key 0.0.0.0-1, IPv4":                 "every pod prefix lies inside Network",
}

func TestLeasesAsFlannelReadsThem(t *testing.T) {
	names := map[string]bool{}
	for _, test := range mustCases[struct {
		Name, Key, Value, Error, Type string
		V4, V6                        *readPeer
	}](t, "leases.json") {
		names[test.Name+", IPv4"], names[test.Name+", IPv6"] = true, true
		l, err := ParseLease(test.Key, []byte(test.Value))
		peers, peersErr := l.Peers("n", network)
		if err == nil {
			err = peersErr
		}
		comparePeers(t, leaseDifferences, test.Name, test.Type, test.V4, test.V6, peers, err)
	}
	leaseDifferences.unused(t, names)
}

func TestKeysOfLeases(t *testing.T) {
	for key, want := range map[string]string{
		"10.244.25.0-24":                              "10.244.25.0/24 invalid Prefix",
		"10.244.25.0-24&fd00:10:244:1::-64":           "10.244.25.0/24 fd00:10:244:1::/64",
		"0.0.0.0-0&fd00:10:244:1::-64":                "invalid Prefix fd00:10:244:1::/64",
		"0.0.0.0-0":                                   "",
		"fd00:10:244:1::-64":                          "",
		"fd00:10:244:1::-64&10.244.25.0-24":           "",
		"10.244.25.0-24&":                             "",
		"10.244.25.0-24&10.244.26.0-24":               "",
		"10.244.25.0-24&::ffff:10.244.0.0-112":        "",
		"10.244.25.0-24&fd00::%lo-64":                 "",
		"10.244.25.0/24-24":                           "",
		"10.244.25.0-24-24":                           "",
		"10.244.25.0-32":                              "",
		"config":                                      "",
		"10.244.25.0-24" + strings.Repeat("&", 1<<20): "",
	} {
		v4, v6, err := ParseLeaseKey(key)
		if got := v4.String() + " " + v6.String(); (err == nil) != (want != "") || (err == nil && got != want) {
			t.Errorf("%s: %s, %v, want %q", key, got, err, want)
		}
		if err != nil && (v4.IsValid() || v6.IsValid()) {
			t.Errorf("%s: %s and %s beside an error", key, v4, v6)
		}
	}
}

// Whatever the value is, the prefixes are taken.
func TestLeaseWithABadValueStillTakesItsPrefixes(t *testing.T) {
	const good = `{"PublicIP":"192.0.2.11"}`
	largest := good + strings.Repeat(" ", maxLeaseValue-len(good))
	if _, err := ParseLease("10.244.25.0-24", []byte(largest)); err != nil {
		t.Error(err)
	}
	for value, brokenV6 := range map[string]bool{"": true, "{": true, `{"PublicIP":"x"}`: false, largest + " ": true} {
		l, err := ParseLease("10.244.25.0-24&fd00:10:244:1::-64", []byte(value))
		want := Lease{Prefix: prefix("10.244.25.0/24"), PrefixV6: prefix("fd00:10:244:1::/64"), Broken: true, BrokenV6: brokenV6}
		if err == nil || l != want {
			t.Errorf("%.30q: %+v, %v", value, l, err)
		}
	}
}

// Flannel knows a node by its public IP, whatever its data are: so it finds its own
// lease again. And such a node may send to us, although we can't to it.
func TestLeaseWithBrokenDataIsSomebodys(t *testing.T) {
	for _, data := range []string{`"x"`, "7", `{"VNI":16777216}`, `{"VNI":5,"VtepMAC":"x"}`, strings.Repeat(" ", maxBackendData) + `"x"`} {
		value := `{"PublicIP":"192.0.2.11","BackendType":"vxlan","BackendData":` + data + `}`
		l, err := ParseLease("10.244.25.0-24", []byte(value))
		want := Lease{Prefix: prefix("10.244.25.0/24"), PublicIP: addr("192.0.2.11"), BackendType: "vxlan", Broken: true}
		if err == nil || l != want {
			t.Errorf("%.60q: %+v, %v", data, l, err)
		}
		peers, err := l.Peers("n", network)
		if want := []state.Peer{{Node: "n", Prefix: want.Prefix, PublicIP: want.PublicIP}}; err != nil || !slices.Equal(peers, want) {
			t.Errorf("%.60q: peers %+v, %v", data, peers, err)
		}
		// Without the tunnel it could be reached; flannel does not.
		direct := network
		direct.DirectRouting = true
		if peers, err := l.Peers("n", direct); err != nil || len(peers) > 0 {
			t.Errorf("%.60q: with DirectRouting peers %+v, %v", data, peers, err)
		}
	}
}

// What a node says that can't be used is told from what it does not say.
func TestPrefixesOfWhichNothingUsefulIsSaid(t *testing.T) {
	onlyV4 := network
	onlyV4.IPv6Network = netip.Prefix{}
	const v4, v6 = "10.244.25.0/24", "fd00:10:244:1::/64"
	for value, want := range map[string]string{
		`{"PublicIP":"192.0.2.11","PublicIPv6":"2001:db8::11","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:58:0a:f4:01:00"},"BackendV6Data":null}`: "[]",
		`{"PublicIP":"192.0.2.11","PublicIPv6":"x","BackendType":"vxlan"}`:                                                                                       "[" + v6 + "]",
		`{"PublicIP":"192.0.2.11","PublicIPv6":null,"BackendType":"vxlan","BackendData":"x"}`:                                                                    "[" + v4 + "]",
		`{"PublicIP":"","PublicIPv6":null,"BackendType":"vxlan","BackendData":"x"}`:                                                                              "[]",
		`{"PublicIP":"192.0.2.11","PublicIPv6":null,"BackendType":"host-gw"}`:                                                                                    "[" + v4 + "]",
		`{"PublicIP":"192.0.2.11","PublicIPv6":"2001:db8::11","BackendType":"host-gw"}`:                                                                          "[" + v4 + " " + v6 + "]",
		`{`: "[" + v4 + " " + v6 + "]",
	} {
		l, _ := ParseLease("10.244.25.0-24&fd00:10:244:1::-64", []byte(value))
		if got := fmt.Sprint(l.Unread(network)); got != want {
			t.Errorf("%s: %s, want %s", value, got, want)
		}
		if got := l.Unread(onlyV4); len(got) > 0 && got[len(got)-1].Addr().Is6() {
			t.Errorf("%s: %s in a network of IPv4", value, got)
		}
	}
}

// What another backend has to tell is not looked at, be it whatever it may.
func TestLeaseOfAnotherBackend(t *testing.T) {
	l, err := ParseLease("10.244.25.0-24", []byte(`{"PublicIP":"192.0.2.11","BackendType":"extension","BackendData":"x"}`))
	want := Lease{Prefix: prefix("10.244.25.0/24"), PublicIP: addr("192.0.2.11"), BackendType: "extension"}
	if err != nil || l != want {
		t.Errorf("%+v, %v", l, err)
	}
}

func TestOneFamilyThatIsWrongDoesNotHarmTheOther(t *testing.T) {
	const v4, v6 = `"PublicIP":"192.0.2.11","BackendData":{"VNI":1,"VtepMAC":"fa:61:a7:e2:b4:cb"}`, `"PublicIPv6":"2001:db8::11","BackendV6Data":{"VNI":1,"VtepMAC":"22:7f:88:29:30:c4"}`
	for value, want := range map[string]string{
		v4 + "," + v6: "10.244.25.0/24 fd00:10:244:1::/64 ",
		v4 + `,"PublicIPv6":"x"`: "10.244.25.0/24 " +
			`lease 10.244.25.0-24&fd00:10:244:1::-64: IPv6: "x" is no IPv6 address`,
		v4 + `,"PublicIPv6":"2001:db8::11","BackendV6Data":7`: "10.244.25.0/24 fd00:10:244:1::/64 (no MAC) " +
			`lease 10.244.25.0-24&fd00:10:244:1::-64: IPv6: backend data is "7", not of the form {"VNI":1,"VtepMAC":"0a:58:0a:f4:01:00"}`,
		v6 + `,"PublicIP":"192.0.2.11","BackendData":{"VtepMAC":"ff:ff:ff:ff:ff:ff"}`: "10.244.25.0/24 (no MAC) fd00:10:244:1::/64 " +
			`lease 10.244.25.0-24&fd00:10:244:1::-64: IPv4: VtepMAC: "ff:ff:ff:ff:ff:ff" is not the MAC address of one device`,
		v6 + `,"PublicIP":"224.0.0.1"`: "fd00:10:244:1::/64 " +
			`lease 10.244.25.0-24&fd00:10:244:1::-64: IPv4: public IP 224.0.0.1 is not the address of one host`,
		v6 + `,"PublicIP":"10.244.25.7"`: "fd00:10:244:1::/64 " +
			`node "n": public IP 10.244.25.7 lies in the node's own pod prefix 10.244.25.0/24: packets would never get there`,
		// Both, at once.
		`"PublicIP":"10.244.25.7","PublicIPv6":"fd00:10:244:1::7"`: "" +
			`node "n": public IP 10.244.25.7 lies in the node's own pod prefix 10.244.25.0/24: packets would never get there` + "\n" +
			`node "n": public IP fd00:10:244:1::7 lies in the node's own pod prefix fd00:10:244:1::/64: packets would never get there`,
	} {
		l, err := ParseLease("10.244.25.0-24&fd00:10:244:1::-64", []byte(`{"BackendType":"vxlan",`+value+`}`))
		peers, peersErr := l.Peers("n", network)
		if err == nil {
			err = peersErr
		}
		got := ""
		for _, p := range peers {
			got += p.Prefix.String() + " "
			if p.MAC.IsZero() {
				got += "(no MAC) "
			}
		}
		if err != nil {
			got += err.Error()
		}
		if got != want {
			t.Errorf("%s:\n got %s\nwant %s", value, got, want)
		}
	}
}

func TestPeersOfALease(t *testing.T) {
	whole := Lease{
		Prefix: prefix("10.244.1.0/24"), PublicIP: addr("192.0.2.1"), MAC: mac("0a:58:0a:f4:01:00"), VNI: 1,
		PrefixV6: prefix("fd00:10:244:1::/64"), PublicIPv6: addr("2001:db8::1"), MACv6: mac("0a:58:0a:f4:01:01"), VNIv6: 1,
		BackendType: "vxlan",
	}
	v4 := state.Peer{Node: "n", Prefix: whole.Prefix, PublicIP: whole.PublicIP, MAC: whole.MAC}
	v6 := state.Peer{Node: "n", Prefix: whole.PrefixV6, PublicIP: whole.PublicIPv6, MAC: whole.MACv6}
	unknown := v4
	unknown.MAC = state.MAC{}
	for _, test := range []struct {
		name   string
		lease  func(*Lease)
		config func(*Config)
		want   []state.Peer
		err    string
	}{
		{"both families", nil, nil, []state.Peer{v4, v6}, ""},
		{"an IPv4 network", nil, func(c *Config) { c.IPv6Network = netip.Prefix{} }, []state.Peer{v4}, ""},
		{"an IPv6 network", nil, func(c *Config) { c.Network = netip.Prefix{} }, []state.Peer{v6}, ""},
		{"no podCIDR of one family", func(l *Lease) { l.PrefixV6 = netip.Prefix{} }, nil, []state.Peer{v4}, ""},
		{"no public IP of one family yet", func(l *Lease) { l.PublicIPv6 = netip.Addr{} }, nil, []state.Peer{v4}, ""},
		{"nothing told yet", func(l *Lease) { *l = Lease{Prefix: l.Prefix} }, nil, nil, ""},
		{"MAC not told yet", func(l *Lease) { *l = Lease{Prefix: l.Prefix, PublicIP: l.PublicIP, BackendType: "vxlan"} }, nil, []state.Peer{unknown}, ""},
		{"VNI not told", func(l *Lease) { l.VNI, l.VNIv6 = 0, 0 }, nil, []state.Peer{v4, v6}, ""},
		{
			"link-local public IP", func(l *Lease) { l.PublicIP = addr("169.254.1.1") }, func(c *Config) { c.IPv6Network = netip.Prefix{} },
			[]state.Peer{{Node: "n", Prefix: whole.Prefix, PublicIP: addr("169.254.1.1"), MAC: whole.MAC}},
			"",
		},
		{
			"another VNI", func(l *Lease) { l.VNI = 7 }, nil,
			[]state.Peer{v4, v6},
			`node "n" has the VNI 7, and this network 1: it drops what is sent to 10.244.1.0/24; start its flanneld or weft again`,
		},
		{"another backend", func(l *Lease) { l.BackendType = "host-gw" }, nil, nil, `node "n" runs the backend "host-gw", not vxlan, and can't be reached`},
		{"no backend", func(l *Lease) { l.BackendType = "" }, nil, nil, `node "n" runs the backend "", not vxlan, and can't be reached`},
		{
			"outside the network", func(l *Lease) { l.Prefix = prefix("10.99.1.0/24") }, nil,
			[]state.Peer{v6},
			`node "n": pod prefix 10.99.1.0/24 lies outside the network 10.244.0.0/16`,
		},
		{
			"wider than the network", func(l *Lease) { l.Prefix = prefix("10.0.0.0/8") }, nil,
			[]state.Peer{v6},
			`node "n": pod prefix 10.0.0.0/8 lies outside the network 10.244.0.0/16`,
		},
		{
			"wider than the network, same base", func(l *Lease) { l.Prefix = prefix("10.244.0.0/15") }, nil,
			[]state.Peer{v6},
			`node "n": pod prefix 10.244.0.0/15 lies outside the network 10.244.0.0/16`,
		},
		{
			"an interface in an address", func(l *Lease) { l.PublicIPv6 = addr("2001:db8::1%eth0") }, nil,
			[]state.Peer{v4},
			`node "n": public IP 2001:db8::1%eth0 is no plain IPv6 address`,
		},
		{
			"host bits set", func(l *Lease) { l.Prefix = prefix("10.244.1.7/24") }, nil,
			[]state.Peer{v6},
			`node "n": 10.244.1.7/24 is no masked IPv4 prefix`,
		},
		{
			"public IP of the other family", func(l *Lease) { l.PublicIP = l.PublicIPv6 }, nil,
			[]state.Peer{v6},
			`node "n": public IP 2001:db8::1 is no plain IPv4 address`,
		},
	} {
		l, c := whole, network
		if test.lease != nil {
			test.lease(&l)
		}
		if test.config != nil {
			test.config(&c)
		}
		got, err := l.Peers("n", c)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if !slices.Equal(got, test.want) || text != test.err {
			t.Errorf("%s: %v, %s\nwant %v, %s", test.name, got, text, test.want, test.err)
		}
	}
}

// TestCapturedLeases reads what two stock flannelds had in etcd, as etcdctl get
// --prefix prints it: the configuration, then keys and values in turn.
func TestCapturedLeases(t *testing.T) {
	for name, want := range map[string]string{
		"captured/etcd-keys.txt":               "10.244.25.0/24 192.0.2.11 fa:61:a7:e2:b4:cb; 10.244.4.0/24 192.0.2.12 02:e4:47:4b:ce:3b; ",
		"captured/etcd-keys-directrouting.txt": "10.244.25.0/24 192.0.2.12 ea:da:d1:d6:2c:a2; 10.244.60.0/24 192.0.2.11 26:f5:75:5b:9a:37; ",
	} {
		lines := strings.Split(strings.TrimSpace(string(mustRead(t, name))), "\n")
		config, err := ParseEtcdConfig([]byte(lines[1]))
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for i := 2; i < len(lines); i += 2 {
			key := lines[i][strings.LastIndex(lines[i], "/")+1:]
			l, err := ParseLease(key, []byte(lines[i+1]))
			if err != nil {
				t.Fatal(err)
			}
			peers, err := l.Peers("n", config)
			if err != nil {
				t.Fatal(err)
			}
			got += peers[0].Prefix.String() + " " + peers[0].PublicIP.String() + " " + peers[0].MAC.String() + "; "
			value, err := MarshalLease(l)
			if err != nil || string(value) != lines[i+1] || LeaseKey(l) != key {
				t.Errorf("%s %s came back as %s %s (%v)", key, lines[i+1], LeaseKey(l), value, err)
			}
		}
		if got != want {
			t.Errorf("%s: %s\nwant %s", name, got, want)
		}
	}
}

func FuzzLease(f *testing.F) {
	for _, c := range mustCases[struct{ Key, Value string }](f, "leases.json") {
		f.Add(c.Key, []byte(c.Value))
	}
	for _, c := range mustCases[writtenCase](f, "written.json") {
		f.Add(c.Key, []byte(c.Value))
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		l, err := ParseLease(key, value)
		if l.Prefix.IsValid() || l.PrefixV6.IsValid() {
			if LeaseKey(l) != key {
				t.Fatalf("%q is the key of %+v", key, l)
			}
		}
		mustBeSoundPeers(t, l)
		if err != nil {
			return
		}
		written, err := MarshalLease(l)
		if err != nil {
			return // it has not told all yet
		}
		if back, err := ParseLease(key, written); err == nil && l.BackendType == BackendType && back != l {
			t.Fatalf("%+v came back as %+v", l, back)
		} else if err != nil {
			t.Fatalf("%s: %v", written, err)
		}
	})
}

// mustBeSoundPeers checks what a dataplane relies on.
func mustBeSoundPeers(t *testing.T, l Lease) {
	t.Helper()
	peers, _ := l.Peers("n", network)
	for _, p := range peers {
		inside := network.Network
		if p.Prefix.Addr().Is6() {
			inside = network.IPv6Network
		}
		if !inside.Contains(p.Prefix.Addr()) || p.Prefix.Bits() < inside.Bits() || p.Prefix != p.Prefix.Masked() ||
			p.PublicIP.Is4() != p.Prefix.Addr().Is4() || p.Prefix.Contains(p.PublicIP) || p.PublicIP.Zone() != "" ||
			p.PublicIP.IsMulticast() || p.PublicIP.IsLoopback() || p.PublicIP.IsUnspecified() || p.MAC[0]&1 != 0 {
			t.Fatalf("peer %+v", p)
		}
	}
}
