package flannel

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// netconfCase is a configuration and what flannel says to it.
type netconfCase struct {
	Name, Config string
	ParseError   string
	Parsed, Etcd *struct {
		EnableIPv4, EnableIPv6, EnableNFTables    bool
		BackendType                               string
		Network, SubnetMin, SubnetMax             string
		IPv6Network, IPv6SubnetMin, IPv6SubnetMax string
		SubnetLen, IPv6SubnetLen                  int
	}
	VXLAN *struct {
		VNI, Port, MTU               int
		GBP, Learning, DirectRouting bool
	}
}

// accepted tells whether a node with Kubernetes comes up with the
// configuration. A network that is missing or everything is refused by flannel
// when it looks for the node's podCIDR in it, two families off when it looks
// for an interface.
func (c netconfCase) accepted() bool {
	p := c.Parsed
	return p != nil && c.VXLAN != nil && strings.EqualFold(p.BackendType, "vxlan") && (p.EnableIPv4 || p.EnableIPv6) &&
		(!p.EnableIPv4 || p.Network != "") && (!p.EnableIPv6 || p.IPv6Network != "")
}

// config is what flannel makes of the configuration.
func (c netconfCase) config() Config {
	p := c.Parsed
	want := Config{
		EnableIPv4: p.EnableIPv4, EnableIPv6: p.EnableIPv6, EnableNFTables: p.EnableNFTables,
		VNI: uint32(c.VXLAN.VNI), Port: uint16(c.VXLAN.Port), MTU: c.VXLAN.MTU,
		GBP: c.VXLAN.GBP, Learning: c.VXLAN.Learning, DirectRouting: c.VXLAN.DirectRouting,
	}
	if p.EnableIPv4 {
		want.Network = prefix(p.Network)
	}
	if p.EnableIPv6 {
		want.IPv6Network = prefix(p.IPv6Network)
	}
	if e := c.Etcd; e != nil && e.EnableIPv4 {
		want.SubnetLen, want.SubnetMin, want.SubnetMax = e.SubnetLen, addr(e.SubnetMin), addr(e.SubnetMax)
	}
	if e := c.Etcd; e != nil && e.EnableIPv6 {
		want.IPv6SubnetLen, want.IPv6SubnetMin, want.IPv6SubnetMax = e.IPv6SubnetLen, addr(e.IPv6SubnetMin), addr(e.IPv6SubnetMax)
	}
	if want.Port == 0 {
		want.Port = 8472 // what the kernel then takes
	}
	// Flannel was told an uplink with MTU 1500, and we none.
	if want.MTU == 1500 && !strings.Contains(c.Config, "1500") {
		want.MTU = 0
	}
	return want
}

// What flannel accepts and we do not. Never the other way round.
var stricterConfig = differences{
	`Network "::ffff:10.0.0.0/104"`:     "flannel makes 10.0.0.0/104 of it",
	`Network "224.0.0.0/8"`:             "the kernel does not forward there",
	`Network "127.0.0.0/8"`:             "the kernel does not forward there",
	`IPv6Network "::ffff:10.0.0.0/104"`: "flannel makes 10.0.0.0/104 of it",
	`IPv6Network "10.0.0.0/16"`:         "flannel makes ::ffff:10.0.0.0/16 of it",
	`IPv6Network "ff00::/8"`:            "the kernel does not forward there",
	"Backend.VNI 0":                     "the device flannel.0 would work; 0 stands for unset here",
	"Backend.VNI 16777216":              "the kernel refuses the device",
	"Backend.VNI -1":                    "the kernel refuses the device",
	"Backend.VNI 4294967297":            "flannel cuts it to 1 in its leases, and the kernel refuses the device",
	"Backend.Port 65536":                "flannel cuts it to 16 bits",
	"Backend.Port -1":                   "flannel takes it for nothing",
	"Backend.MTU -1":                    "flannel writes FLANNEL_MTU=-51",
	"Backend.MTU 1":                     "flannel writes FLANNEL_MTU=-49",
	"Backend.MTU 117":                   "the kernel refuses the device",
	"Backend.MTU 65536":                 "no device has it",
	"Backend.MTU 1349 with IPv6":        "IPv6 is off on a device with less than 1280",
}

func TestConfigAsFlannelReadsIt(t *testing.T) {
	names := map[string]bool{}
	for _, test := range mustCases[netconfCase](t, "netconf.json") {
		names[test.Name] = true
		got, err := ParseConfig([]byte(test.Config))
		if !stricterConfig.agree(t, test.Name, test.accepted(), err == nil, err) {
			if err != nil && got != (Config{}) {
				t.Errorf("%s: %+v beside an error", test.Name, got)
			}
			continue
		}
		want := test.config()
		if _, etcd := stricterEtcd[test.Name]; etcd {
			want.SubnetLen, want.SubnetMin, want.SubnetMax = 0, netip.Addr{}, netip.Addr{}
			want.IPv6SubnetLen, want.IPv6SubnetMin, want.IPv6SubnetMax = 0, netip.Addr{}, netip.Addr{}
		}
		if got != want {
			t.Errorf("%s:\n got %+v\nwant %+v", test.Name, got, want)
		}
	}
	stricterConfig.unused(t, names)
}

// What flannel accepts and we do not, of subnets that nodes choose.
var stricterEtcd = differences{
	"SubnetMin after SubnetMax":         "flannel runs out of subnets at once",
	"IPv6SubnetMin after IPv6SubnetMax": "flannel runs out of subnets at once",
	`SubnetMax "10.244.0.0"`:            "flannel runs out of subnets at once",
}

func TestSubnetsAsFlannelChecksThem(t *testing.T) {
	names := map[string]bool{}
	for _, test := range mustCases[netconfCase](t, "netconf.json") {
		names[test.Name] = true
		if _, skip := stricterConfig[test.Name]; skip {
			continue
		}
		got, err := ParseEtcdConfig([]byte(test.Config))
		if stricterEtcd.agree(t, test.Name, test.accepted() && test.Etcd != nil, err == nil, err) && got != test.config() {
			t.Errorf("%s:\n got %+v\nwant %+v", test.Name, got, test.config())
		}
	}
	stricterEtcd.unused(t, names)
}

func TestConfigThatIsRefused(t *testing.T) {
	const vxlan = `"Backend":{"Type":"vxlan"}`
	for config, want := range map[string]string{
		`{`:                             `the network's configuration is not JSON: line 1: unexpected end of JSON input`,
		"{\n\"Network\": x}":            `the network's configuration is not JSON: line 2: invalid character 'x' looking for beginning of value`,
		`[1]`:                           `the network's configuration is not a JSON object; write it as {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}`,
		`{` + vxlan + `}`:               `Network is missing; give the network that holds all pods, as in "10.244.0.0/16"`,
		`{"Network":"10.0.0.0/8"}`:      `Backend is missing, which flannel takes for its backend udp; set it to {"Type": "vxlan"} on all nodes, or run flanneld on these nodes`,
		`{"Network":"x",` + vxlan + `}`: `Network is "x"; write an IPv4 prefix, as in 10.244.0.0/16`,
		`{"Network":"10.0.0.0/8","Backend":{"Type":"host-gw"}}`: `Backend.Type is "host-gw", and weft speaks vxlan only; run flanneld on these nodes, or set it to "vxlan" on all nodes: ` +
			`with "DirectRouting": true nodes of one subnet have host-gw's routes`,
		`{"Network":"10.0.0.0/8","Backend":{"Type":"wireguard"}}`: `Backend.Type is "wireguard", and weft speaks vxlan only; run flanneld on these nodes, which encrypts; weft does not`,
		`{"Network":"10.0.0.0/8","Backend":{"Type":"vlan"}}`:      `Backend.Type is "vlan", which flannel does not know; set it to "vxlan", which is what weft speaks`,
		`{"Network":"10.0.0.0/8","Backend":{}}`:                   `Backend has no Type; set it to "vxlan", which is what weft speaks`,
		`{"Network":"10.0.0.0/8","Backend":"vxlan"}`:              `Backend is "vxlan"; write an object, as in {"Type": "vxlan"}`,
		`{"EnableIPv4":false,` + vxlan + `}`:                      `EnableIPv4 and EnableIPv6 are both false; turn one of them on`,
		`{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan","MTU":100}}`: `Backend.MTU is 100; it is the underlay's, which must carry IPv4 packets of 68 bytes in VXLAN: ` +
			`give 118 or more, or 0 for the uplink's`,
		`{"Network":"10.0.0.0/8","SubnetLen":9,` + vxlan + `}`:  `SubnetLen is 9, but Network 10.0.0.0/8 must hold four of them; give 10 or more, or a larger network`,
		`{"Network":"10.0.0.0/30",` + vxlan + `}`:               `Network is 10.0.0.0/30; give /28 or shorter, which holds four nodes with four addresses each`,
		`{"Network":"10.0.0.0/8","SubnetLen":31,` + vxlan + `}`: `SubnetLen is 31; a node needs four addresses: give 30 or less`,
		`{"Network":"10.0.0.0/8","SubnetMin":"10.0.0.9","SubnetMax":"11.0.0.0",` + vxlan + `}`: "SubnetMin is 10.0.0.9, which is not the base of a /24; give 10.0.0.0\n" +
			"SubnetMax is 11.0.0.0, which is outside Network 10.0.0.0/8; give the base of a /24 inside",
		// Everything that is wrong, at once.
		`{"Network":"x","EnableIPv6":true,"IPv6Network":7,"EnableNFTables":1,"SubnetLen":-3,"SubnetMin":"y","IPv6SubnetLen":127,` +
			`"Backend":{"Type":"vxlan","VNI":0,"Port":70000,"MTU":-4,"GBP":1,"Learning":"no"}}`: strings.Join([]string{
			`EnableNFTables is 1; write true or false, without quotes`,
			`Network is "x"; write an IPv4 prefix, as in 10.244.0.0/16`,
			`SubnetLen is -3; give the length of a node's prefix, as in 24, without quotes`,
			`SubnetMin is "y"; write an IPv4 address`,
			`IPv6Network is 7; write an IPv6 prefix, as in fd00:10:244::/48`,
			`Backend.VNI is 0; give a number from 1 to 16777215, without quotes: flannel's default is 1`,
			`Backend.Port is 70000; give a number from 0 to 65535, without quotes: flannel's default is 8472`,
			`Backend.MTU is -4; give a number from 0 to 65535, without quotes: the underlay's, in bytes; 0 or nothing is the uplink's`,
			`Backend.GBP is 1; write true or false, without quotes`,
			`Backend.Learning is "no"; write true or false, without quotes`,
		}, "\n"),
		`{"EnableIPv6":true,"Network":"10.0.0.0/30","IPv6Network":"fd00::/125",` + vxlan + `}`: "Network is 10.0.0.0/30; give /28 or shorter, which holds four nodes with four addresses each\n" +
			"IPv6Network is fd00::/125; give /124 or shorter, which holds four nodes with four addresses each",
	} {
		_, err := ParseEtcdConfig([]byte(config))
		if err == nil || err.Error() != want {
			t.Errorf("%s:\n got %v\nwant %s", config, err, want)
		}
	}
}

func TestConfigThatIsTooLarge(t *testing.T) {
	config := `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`
	if _, err := ParseConfig([]byte(config + strings.Repeat(" ", maxConfig-len(config)))); err != nil {
		t.Error(err)
	}
	if _, err := ParseConfig([]byte(config + strings.Repeat(" ", maxConfig-len(config)+1))); err == nil {
		t.Error("one byte more is accepted")
	}
	// A long value is not repeated as a whole, nor a fault a million times.
	_, err := ParseConfig([]byte(`{"Network":"` + strings.Repeat("x", 1000) + `","Backend":{"Type":"vxlan"}}`))
	if err == nil || len(err.Error()) > 300 {
		t.Errorf("%v", err)
	}
	_, err = ParseConfig([]byte(`{` + strings.Repeat(`"Network":"x",`, 10000) + `"Backend":{"Type":"vxlan"}}`))
	if err == nil || !strings.HasSuffix(err.Error(), "\nand 9950 more faults") {
		t.Errorf("%.200s", err)
	}
}

func TestStateThatAConfigAsksFor(t *testing.T) {
	for config, want := range map[string]state.State{
		`{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}`: {
			Networks: []netip.Prefix{prefix("10.244.0.0/16")}, VNI: 1, Port: 8472,
		},
		`{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","EnableNFTables":true,` +
			`"Backend":{"Type":"vxlan","VNI":5,"Port":4789,"MTU":1400,"GBP":true,"Learning":true,"DirectRouting":true}}`: {
			Networks: []netip.Prefix{prefix("10.244.0.0/16"), prefix("fd00::/48")}, VNI: 5, Port: 4789,
			DirectRouting: true, Learning: true, GBP: true, NFTables: true, Local: state.Local{MTU: 1350},
		},
		`{"Network":"10.244.0.0/16","EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","MTU":1400}}`: {
			Networks: []netip.Prefix{prefix("fd00::/48")}, VNI: 1, Port: 8472, Local: state.Local{MTU: 1330},
		},
	} {
		c, err := ParseConfig([]byte(config))
		if got := c.State(); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n got %+v\nwant %+v", config, err, got, want)
		}
	}
}

func FuzzConfig(f *testing.F) {
	for _, c := range mustCases[netconfCase](f, "netconf.json") {
		f.Add([]byte(c.Config))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		kube, err := ParseConfig(data)
		etcd, etcdErr := ParseEtcdConfig(data)
		if err != nil {
			if etcdErr == nil || kube != (Config{}) {
				t.Fatalf("%v, but %+v and %v", err, kube, etcdErr)
			}
			return
		}
		if kube.VNI < 1 || kube.VNI > maxVNI || kube.Port == 0 || kube.MTU < 0 || len(kube.Networks()) == 0 {
			t.Fatalf("%+v", kube)
		}
		for _, n := range kube.Networks() {
			if n != n.Masked() || n.Bits() == 0 {
				t.Fatalf("network %s", n)
			}
		}
		if etcdErr != nil {
			return
		}
		if kube != etcd {
			t.Fatalf("%+v with Kubernetes, %+v with etcd", kube, etcd)
		}
		mustHaveSubnets(t, etcd.EnableIPv4, etcd.Network, etcd.SubnetLen, etcd.SubnetMin, etcd.SubnetMax)
		mustHaveSubnets(t, etcd.EnableIPv6, etcd.IPv6Network, etcd.IPv6SubnetLen, etcd.IPv6SubnetMin, etcd.IPv6SubnetMax)
	})
}

// mustHaveSubnets checks that the first and the last prefix lie in the network.
func mustHaveSubnets(t *testing.T, on bool, network netip.Prefix, length int, first, last netip.Addr) {
	t.Helper()
	if !on {
		if network.IsValid() || length != 0 || first.IsValid() || last.IsValid() {
			t.Fatalf("off, but %s /%d from %s to %s", network, length, first, last)
		}
		return
	}
	for _, a := range []netip.Addr{first, last} {
		p := netip.PrefixFrom(a, length)
		if !network.Contains(a) || p.Masked() != p || !network.Contains(state.Last(p)) || last.Less(first) {
			t.Fatalf("%s /%d from %s to %s", network, length, first, last)
		}
	}
}
