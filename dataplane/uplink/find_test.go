//go:build linux

package uplink

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/netns"
)

// The node of these tests has three interfaces and default routes by the first:
//
//	eth0  192.0.2.11/24 (and a second, 192.0.2.111), 2001:db8::11/64
//	eth1  198.51.100.11/24, 2001:db8:1::11/64
//	eth2  203.0.113.11/24, without IPv6
//	lo    198.51.100.200/32
const hostOfTests = `
	link set lo up
	addr add 198.51.100.200/32 dev lo
	link add eth0 type veth peer name wire0
	link add eth1 mtu 1400 type veth peer name wire1
	link add eth2 type veth peer name wire2
	link set eth2 addrgenmode none
	link set eth0 up
	link set eth1 up
	link set eth2 up
	link set wire0 up
	link set wire1 up
	link set wire2 up
	addr add 192.0.2.11/24 dev eth0
	addr add 192.0.2.111/24 dev eth0
	addr add 2001:db8::11/64 dev eth0
	addr add 198.51.100.11/24 dev eth1
	addr add 2001:db8:1::11/64 dev eth1
	addr add 203.0.113.11/24 dev eth2
	route add default via 192.0.2.1
	route add default via 2001:db8::1 dev eth0
`

// newFinder is a Finder on a node that was set up by lines for ip. What it logs
// goes to log.
func newFinder(t *testing.T, log *bytes.Buffer, setUp string) (*Finder, *netns.NS) {
	t.Helper()
	ns := netns.New(t)
	file := filepath.Join(t.TempDir(), "ip")
	if err := os.WriteFile(file, []byte(setUp), 0o600); err != nil {
		t.Fatal(err)
	}
	// Without duplicate address detection, whose end a second later is an event.
	ns.Run(t, "sysctl -q -w net/ipv6/conf/default/accept_dad=0 net/ipv6/conf/all/accept_dad=0", "ip -batch "+file)
	var f *Finder
	ns.MustDo(t, func() (err error) {
		f, err = Open(slog.New(slog.NewTextHandler(log, nil)))
		return err
	})
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f, ns
}

// text is an uplink as these tests say it: name, and of each family the address,
// and the public IP where that differs.
func text(u Uplink) string {
	words := []string{u.Name}
	for _, pair := range [][2]netip.Addr{{u.Address, u.PublicIP}, {u.AddressV6, u.PublicIPv6}} {
		switch {
		case pair[0] == pair[1] && pair[0].IsValid():
			words = append(words, pair[0].String())
		case pair[0] != pair[1]:
			words = append(words, pair[0].String()+" as "+pair[1].String())
		}
	}
	return strings.Join(words, " ")
}

var (
	v4   = Options{IPv4: true}
	v6   = Options{IPv6: true}
	dual = Options{IPv4: true, IPv6: true}
)

// with are options with some changed.
func (o Options) with(change func(*Options)) Options {
	change(&o)
	return o
}

func iface(names ...string) func(*Options) { return func(o *Options) { o.Interfaces = names } }
func expr(exprs ...string) func(*Options)  { return func(o *Options) { o.Regexps = exprs } }
func reach(addr string) func(*Options)     { return func(o *Options) { o.CanReach = addr } }
func public(v4, v6 string) func(*Options) {
	return func(o *Options) { o.PublicIP, o.PublicIPv6 = v4, v6 }
}

func all(cs ...func(*Options)) func(*Options) {
	return func(o *Options) {
		for _, c := range cs {
			c(o)
		}
	}
}

func TestFind(t *testing.T) {
	var log bytes.Buffer
	f, _ := newFinder(t, &log, hostOfTests)
	for _, test := range []struct {
		name    string
		options Options
		want    string // or part of the error
		note    string // part of what is logged
	}{
		{name: "DefaultRoute", options: v4, want: "eth0 192.0.2.11"},
		{name: "DefaultRouteIPv6", options: v6, want: "eth0 2001:db8::11"},
		{name: "DefaultRouteDual", options: dual, want: "eth0 192.0.2.11 2001:db8::11"},

		{name: "Name", options: v4.with(iface("eth1")), want: "eth1 198.51.100.11"},
		{name: "NameDual", options: dual.with(iface("eth1")), want: "eth1 198.51.100.11 2001:db8:1::11"},
		{name: "NameWithoutTheFamily", options: dual.with(iface("eth2")), want: "--iface eth2: interface eth2 has no usable IPv6 address; interfaces here are: lo (198.51.100.200), "},
		{name: "NoSuchName", options: v4.with(iface("eth7")), want: "--iface eth7: there is no such interface; interfaces here are: lo (198.51.100.200), "},
		{name: "FirstThatFits", options: v4.with(iface("eth7", "eth2", "eth1")), want: "eth2 203.0.113.11", note: "--iface eth7: there is no such interface"},
		{name: "NoneFits", options: v4.with(all(iface("eth7"), expr("^ens"))), want: "--iface eth7: there is no such interface; --iface-regex ^ens: no interface has a name or an address that matches; interfaces here are"},
		{name: "EmptyNameIsTheDefaultRoutes", options: v4.with(iface("")), want: "eth0 192.0.2.11"},

		{name: "Address", options: v4.with(iface("198.51.100.11")), want: "eth1 198.51.100.11"},
		{name: "SecondAddress", options: v4.with(iface("192.0.2.111")), want: "eth0 192.0.2.111"},
		{name: "AddressDual", options: dual.with(iface("192.0.2.111")), want: "eth0 192.0.2.111 2001:db8::11"},
		{name: "AddressIPv6Only", options: v6.with(iface("2001:db8:1::11")), want: "eth1 2001:db8:1::11"},
		{name: "IPv6AddressDual", options: dual.with(iface("2001:db8:1::11")), want: "eth1 198.51.100.11 2001:db8:1::11"},
		{name: "AddressOfNobody", options: v4.with(iface("192.0.2.99")), want: "--iface 192.0.2.99: no interface has this address"},
		{name: "AddressOfTheOtherFamily", options: v4.with(iface("2001:db8::11")), want: "--iface 2001:db8::11: the overlay has no addresses of this family"},
		{name: "AddressAndPublicIPv6OnOneInterface", options: dual.with(all(iface("192.0.2.11"), public("", "2001:db8::11"))), want: "eth0 192.0.2.11 2001:db8::11"},
		{name: "AddressAndPublicIPv6OnTwoInterfaces", options: dual.with(all(iface("192.0.2.11"), public("", "2001:db8:1::11"))), want: "the address is on eth0, but that of --public-ipv6 2001:db8:1::11 on eth1"},
		{name: "AddressAndPublicIPv6OfNobody", options: dual.with(all(iface("192.0.2.11"), public("", "2001:db8:9::9"))), want: "no interface has the address of --public-ipv6 2001:db8:9::9"},
		{name: "Loopback", options: v4.with(iface("198.51.100.200")), want: "lo is the loopback interface"},

		{name: "RegexpForAnAddress", options: v4.with(expr(`^198\.51\.100\.1`)), want: "eth1 198.51.100.11"},
		{name: "RegexpForASecondAddress", options: v4.with(expr(`\.111$`)), want: "eth0 192.0.2.111"},
		{name: "RegexpForAName", options: v4.with(expr(`th2$`)), want: "eth2 203.0.113.11"},
		{name: "AddressesComeBeforeNames", options: v4.with(expr(`eth2|^198\.51\.100\.11`)), want: "eth1 198.51.100.11"},
		{name: "RegexpForAddressesOfBothFamilies", options: dual.with(expr(`^(198\.51\.100\.|2001:db8:1:)`)), want: "eth1 198.51.100.11 2001:db8:1::11"},
		{name: "RegexpForOneFamilyOfTwo", options: dual.with(expr(`^198\.51\.100\.`)), want: "no interface has a name or an address that matches"},
		{name: "RegexpWithAnAddressElsewhere", options: dual.with(expr(`eth0|198`)), want: "eth0 192.0.2.11 2001:db8::11"},
		{name: "RegexpIPv6Only", options: v6.with(expr(`^2001:db8:1:`)), want: "eth1 2001:db8:1::11"},
		{name: "SecondRegexp", options: v4.with(expr("^ens", "^eth1")), want: "eth1 198.51.100.11", note: "--iface-regex ^ens: no interface"},
		{name: "EmptyRegexpIsTheDefaultRoutes", options: v4.with(expr("")), want: "eth0 192.0.2.11"},
		{name: "InterfacesComeBeforeRegexps", options: v4.with(all(iface("eth2"), expr("eth1"))), want: "eth2 203.0.113.11"},

		{name: "CanReach", options: v4.with(reach("198.51.100.77")), want: "eth1 198.51.100.11"},
		{name: "CanReachByTheDefaultRoute", options: v4.with(reach("8.8.8.8")), want: "eth0 192.0.2.11"},
		{name: "CanReachDual", options: dual.with(reach("198.51.100.77")), want: "eth1 198.51.100.11 2001:db8:1::11"},
		{name: "CanReachIPv6", options: v6.with(reach("2001:db8:1::77")), want: "eth1 2001:db8:1::11"},
		{name: "CanReachIPv6Dual", options: dual.with(reach("2001:db8:1::77")), want: "eth1 198.51.100.11 2001:db8:1::11"},
		{name: "CanReachItself", options: v4.with(reach("192.0.2.11")), want: "--iface-can-reach 192.0.2.11: lo is the loopback interface"},
		{name: "RegexpsComeBeforeCanReach", options: v4.with(all(expr("eth2"), reach("198.51.100.77"))), want: "eth2 203.0.113.11"},
		{name: "CanReachWhenNothingElseFits", options: v4.with(all(expr("^ens"), reach("198.51.100.77"))), want: "eth1 198.51.100.11", note: "^ens"},

		{name: "PublicIPSaysTheInterface", options: v4.with(public("198.51.100.11", "")), want: "eth1 198.51.100.11"},
		{name: "PublicIPv6SaysTheInterface", options: dual.with(public("", "2001:db8:1::11")), want: "eth1 198.51.100.11 2001:db8:1::11"},
		{name: "PublicIPs", options: dual.with(public("198.51.100.11", "2001:db8:1::11")), want: "eth1 198.51.100.11 2001:db8:1::11"},
		{name: "PublicIPsOnTwoInterfaces", options: dual.with(public("192.0.2.11", "2001:db8:1::11")), want: "the address is on eth0, but that of --public-ipv6 2001:db8:1::11 on eth1"},
		{name: "PublicIPOfNobody", options: v4.with(public("203.0.113.99", "")), want: "--public-ip 203.0.113.99: no interface has this address; behind NAT, name the interface"},
		{name: "PublicIPBehindNAT", options: v4.with(all(iface("eth0"), public("203.0.113.99", ""))), want: "eth0 192.0.2.11 as 203.0.113.99"},
		{name: "PublicIPsBehindNAT", options: dual.with(all(iface("eth0"), public("203.0.113.99", "2001:db8:9::9"))), want: "eth0 192.0.2.11 as 203.0.113.99 2001:db8::11 as 2001:db8:9::9"},
		{name: "PublicIPIsTheSecondAddress", options: v4.with(all(iface("eth0"), public("192.0.2.111", ""))), want: "eth0 192.0.2.111"},
		{name: "PublicIPIsOnLoopback", options: v4.with(all(iface("eth0"), public("198.51.100.200", ""))), want: "eth0 198.51.100.200"},
		{name: "PublicIPOfAFamilyThatIsNotWanted", options: v4.with(public("", "2001:db8:1::11")), want: "eth0 192.0.2.11"},
	} {
		t.Run(test.name, func(t *testing.T) {
			log.Reset()
			up, err := f.Find(test.options)
			switch {
			case err != nil && !strings.Contains(err.Error(), test.want):
				t.Errorf("error is %v, want %s", err, test.want)
			case err == nil && text(up) != test.want:
				t.Errorf("found %s, want %s", text(up), test.want)
			}
			if !strings.Contains(log.String(), test.note) || (log.Len() > 0) != (test.note != "") {
				t.Errorf("logged is %q, want %q", log.String(), test.note)
			}
			if want := map[string]int{"eth0": 1500, "eth1": 1400, "eth2": 1500}[up.Name]; err == nil && (up.MTU != want || up.Index == 0) {
				t.Errorf("found %+v, want MTU %d", up, want)
			}
		})
	}
}

func TestTwoInterfacesThatMatch(t *testing.T) {
	var log bytes.Buffer
	f, _ := newFinder(t, &log, hostOfTests)
	first := ""
	for _, o := range []Options{v4.with(expr(`\.11$`)), v4.with(expr("^eth[12]$")), dual.with(expr("11$"))} {
		for range 2 {
			up, err := f.Find(o)
			if err != nil {
				t.Fatal(err)
			}
			first += up.Name + " "
		}
	}
	// As `ip link` lists them.
	if want := "eth0 eth0 eth1 eth1 eth0 eth0 "; first != want {
		t.Errorf("found %s, want %s", first, want)
	}
	for _, part := range []string{
		`--iface-regex \\.11$ matches eth0, which comes first, and also eth1 (198.51.100.11, 2001:db8:1::11, fe80::`, `), eth2 (203.0.113.11)"`,
		"--iface-regex ^eth[12]$ matches eth1, which comes first, and also eth2",
		"--iface-regex 11$ matches eth0, which comes first, and also eth1",
	} {
		if strings.Count(log.String(), part) != 1 {
			t.Errorf("%q is not logged once:\n%s", part, &log)
		}
	}
}

func TestAddressesOfAnInterface(t *testing.T) {
	for _, test := range []struct {
		name    string
		lines   []string
		options Options
		want    string
	}{
		{
			"LinkLocalComesLast",
			[]string{"ip addr add 169.254.7.7/16 dev eth0", "ip addr add 192.0.2.7/24 dev eth0"},
			v4, "eth0 192.0.2.7",
		},
		{
			"LinkLocalAlone",
			[]string{"ip addr add 169.254.7.7/16 dev eth0"},
			v4, "eth0 169.254.7.7",
		},
		{
			"PermanentComesFirst",
			[]string{"ip addr add 192.0.2.7/24 dev eth0 valid_lft 1000 preferred_lft 1000", "ip addr add 198.51.100.7/24 dev eth0"},
			v4, "eth0 198.51.100.7",
		},
		{
			"TemporaryComesLast",
			[]string{"sysctl -q -w net/ipv6/conf/eth0/use_tempaddr=2", "ip addr add 2001:db8::7/64 dev eth0 valid_lft 90000 preferred_lft 90000 mngtmpaddr"},
			v6, "eth0 2001:db8::7",
		},
		{
			"DeprecatedNever",
			[]string{"ip addr add 192.0.2.7/24 dev eth0 valid_lft 1000 preferred_lft 0"},
			v4, "interface eth0 has no usable IPv4 address",
		},
		{
			"DeprecatedIPv6Never",
			[]string{"ip addr add 2001:db8::7/64 dev eth0 preferred_lft 0", "ip addr add 2001:db8::8/64 dev eth0"},
			v6, "eth0 2001:db8::8",
		},
		{
			"PointToPoint",
			[]string{"ip addr add 192.0.2.7 peer 192.0.2.8 dev eth0"},
			v4, "eth0 192.0.2.7",
		},
		{
			"PeersAddressOfAPointToPointLinkIsNotOurs",
			[]string{"ip addr add 192.0.2.7 peer 192.0.2.8 dev eth0"},
			v4.with(iface("192.0.2.8")), "no interface has this address",
		},
		{
			"PointToPointByItsOwnAddress",
			[]string{"ip addr add 192.0.2.7 peer 192.0.2.8 dev eth0"},
			v4.with(iface("192.0.2.7")), "eth0 192.0.2.7",
		},
		{"NoAddress", nil, v4, "interface eth0 has no usable IPv4 address"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f, ns := newFinder(t, &bytes.Buffer{}, "link add eth0 type veth peer name wire0\n link set eth0 up\n link set wire0 up")
			ns.Run(t, test.lines...)
			ns.Run(t, "ip route add default dev eth0", "ip -6 route add default dev eth0")
			up, err := f.Find(test.options)
			if got := text(up); err == nil && got != test.want || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("found %s (%v), want %s", got, err, test.want)
			}
		})
	}
}

func TestDefaultRoutes(t *testing.T) {
	for _, test := range []struct {
		name    string
		lines   []string
		options Options
		want    string
	}{
		{"None", []string{"ip route del default"}, v4, "there is no IPv4 default route; name the interface with --iface"},
		{"NoneIPv6", []string{"ip -6 route del default"}, dual, "there is no IPv6 default route"},
		{"BestMetric", []string{"ip route add default via 198.51.100.1 metric 50", "ip route del default via 192.0.2.1", "ip route add default via 192.0.2.1 metric 100"}, v4, "eth1 198.51.100.11"},
		{"TwoInterfaces", []string{"ip -6 route replace default via 2001:db8:1::1"}, dual, "the IPv4 default route leads to eth0, the IPv6 one to eth1; name one of them with --iface"},
		{"SeveralNextHops", []string{"ip route replace default nexthop via 192.0.2.1 nexthop via 198.51.100.1"}, v4, "the IPv4 default route has several next hops"},
		{"OtherTable", []string{"ip route del default", "ip route add default via 198.51.100.1 table 100"}, v4, "there is no IPv4 default route"},
		{"Unreachable", []string{"ip route del default", "ip route add unreachable default"}, v4, "there is no IPv4 default route"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f, ns := newFinder(t, &bytes.Buffer{}, hostOfTests)
			ns.Run(t, test.lines...)
			up, err := f.Find(test.options)
			if got := text(up); err == nil && got != test.want || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("found %s (%v), want %s", got, err, test.want)
			}
		})
	}
}

func TestValidateReportsAllFaults(t *testing.T) {
	err := Options{
		Regexps: []string{"[", "eth0", "(", ""}, CanReach: "somewhere",
		PublicIP: "2001:db8::1", PublicIPv6: "192.0.2.1",
	}.Validate()
	for _, part := range []string{
		"neither IPv4 nor IPv6 is wanted", `--iface-regex "[" is not a regular expression`, `--iface-regex "(" is not`,
		`--iface-can-reach "somewhere" is not an IP address`,
		`--public-ip "2001:db8::1" is not an IPv4 address`, `--public-ipv6 "192.0.2.1" is not an IPv6 address`,
	} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error is %v, want %s", err, part)
		}
	}
	if got := len(strings.Split(fmt.Sprint(err), "\n")); got != 6 {
		t.Errorf("%d faults, want 6: %v", got, err)
	}
	for _, o := range []Options{v4, v6, dual, v4.with(public("::ffff:192.0.2.1", "")), v6.with(reach("192.0.2.1"))} {
		if err := o.Validate(); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestClosedFinder(t *testing.T) {
	f, _ := newFinder(t, &bytes.Buffer{}, hostOfTests)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Find(v4); !errors.Is(err, os.ErrClosed) {
		t.Errorf("find: %v", err)
	}
	if _, err := f.Watch(t.Context()); err == nil {
		t.Error("a closed Finder watches")
	}
}
