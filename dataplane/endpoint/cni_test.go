package endpoint

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/weft-net/weft/dataplane/state"
)

// usualResult is what containerd keeps of a pod that the plugins flannel and
// bridge have connected.
func usualResult(tb testing.TB) string {
	tb.Helper()
	text, err := os.ReadFile("testdata/cbr0-9f3c-eth0")
	if err != nil {
		tb.Fatal(err)
	}
	return string(text)
}

func TestResultsOfCNIPlugins(t *testing.T) {
	for name, test := range map[string]struct {
		old, new string
		addrs    []string // nil: the result is unclear
	}{
		"BridgePlugin": {addrs: []string{"10.244.1.2"}},
		"TwoAddresses": {
			`"routes"`, `"ips":[{"address":"10.244.1.2/24","interface":2},{"address":"fd00::2/64","interface":2}],"routes"`,
			[]string{"10.244.1.2", "fd00::2"},
		},
		"AddressOfNoInterface":   {`"interface":2,`, ``, nil},
		"AddressOfTheHost":       {`"interface":2,`, `"interface":0,`, nil},
		"AddressOfNothing":       {`"interface":2,`, `"interface":-1,`, nil},
		"NotAnAddress":           {`10.244.1.2/24`, `10.244.1.2`, nil},
		"VersionWithoutDevices":  {`"interfaces"`, `"others"`, nil},
		"NotJSON":                {`{"kind"`, `kind`, nil},
		"TwoInterfacesOfThePod":  {`"name":"cni0"`, `"name":"net1","sandbox":"/var/run/netns/cni-1c2d"`, nil},
		"PodWithoutMAC":          {`fa:16:3e:00:00:02`, ``, nil},
		"PodWithAGroupMAC":       {`fa:16:3e:00:00:02`, `ff:ff:ff:ff:ff:ff`, nil},
		"NothingOnTheHostsSide":  {`"interfaces":[{"mac":"0a:58:0a:f4:01:01","name":"cni0"},{"mac":"1e:2f:3a:4b:5c:6d","name":"veth8d1f2a3b"},`, `"interfaces":[`, nil},
		"InterfaceNumberTooHigh": {`"interface":2,`, `"interface":7,`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.Replace(usualResult(t), test.old, test.new, 1)
			hosts, err := parseResult([]byte(text))
			if test.addrs == nil {
				if err == nil {
					t.Errorf("it says %+v", hosts)
				}
				return
			}
			if err != nil || len(hosts) != 2 {
				t.Fatalf("it says %+v (%v), want the bridge and the veth", hosts, err)
			}
			veth := hosts[1]
			if veth.veth != "veth8d1f2a3b" || veth.vethMAC.String() != "1e:2f:3a:4b:5c:6d" || veth.mac.String() != "fa:16:3e:00:00:02" {
				t.Errorf("it says %+v", veth)
			}
			var addrs []string
			for _, a := range veth.addrs {
				addrs = append(addrs, a.String())
			}
			if !slices.Equal(addrs, test.addrs) {
				t.Errorf("addresses are %q, want %q", addrs, test.addrs)
			}
		})
	}
}

func TestWhichResultIsBelieved(t *testing.T) {
	usual := usualResult(t)
	veth := device{name: "veth8d1f2a3b", mac: state.MAC{0x1e, 0x2f, 0x3a, 0x4b, 0x5c, 0x6d}, mtu: 1450, carrier: true}
	another := veth
	another.mac[5]++
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	for name, test := range map[string]struct {
		dir  fstest.MapFS
		veth device
		want bool
	}{
		"OfThisVeth":       {fstest.MapFS{"a": file(usual)}, veth, true},
		"BesideBrokenOnes": {fstest.MapFS{"a": file(usual), "b": file("{"), "c": file("")}, veth, true},
		"NoResults":        {fstest.MapFS{}, veth, false},
		"NameUsedAgain":    {fstest.MapFS{"a": file(usual)}, another, false},
		"TwoOfOneVeth":     {fstest.MapFS{"a": file(usual), "b": file(strings.Replace(usual, "1.2/24", "1.3/24", 1))}, veth, false},
		"TooLarge":         {fstest.MapFS{"a": file(usual + strings.Repeat(" ", maxResultSize))}, veth, false},
		"NotAFile":         {fstest.MapFS{"a": &fstest.MapFile{Data: []byte(usual), Mode: os.ModeNamedPipe}}, veth, false},
	} {
		t.Run(name, func(t *testing.T) {
			results, err := readResults(test.dir)
			if err != nil {
				t.Fatal(err)
			}
			p, ok := podOf(test.veth, results)
			if ok != test.want {
				t.Fatalf("believed: %v (%+v)", ok, p)
			}
			if ok && (!p.cni || p.end.mac.String() != "fa:16:3e:00:00:02" || p.end.mtu != 1450 || p.addrs[0] != netip.MustParseAddr("10.244.1.2")) {
				t.Errorf("the pod is %+v", p)
			}
		})
	}
	crowd := fstest.MapFS{}
	for i := range maxResults + 1 {
		crowd[string(rune('一'+i))] = file("")
	}
	if _, err := readResults(crowd); err == nil {
		t.Error("more results are read than there is a bound on")
	}
}

func FuzzResult(f *testing.F) {
	f.Add([]byte(usualResult(f)))
	f.Add([]byte(`{"result":{"interfaces":[{"sandbox":"x"}],"ips":[{"interface":0}]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		hosts, err := parseResult(text)
		if (err == nil) == (len(hosts) == 0) {
			t.Errorf("%d hosts with error %v", len(hosts), err)
		}
		for _, h := range hosts {
			if h.mac.IsZero() || h.vethMAC.IsZero() || len(h.addrs) == 0 || errors.Is(err, errUnclear) {
				t.Errorf("an unclear host: %+v", h)
			}
		}
	})
}
