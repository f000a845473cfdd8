package endpoint

import (
	"cmp"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// prefixes are the node's own in all tests.
var prefixes = []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}

// text shows what was found in a stable form, without interface indexes.
func (f Found) text() string {
	var b strings.Builder
	for _, e := range f.Endpoints {
		fmt.Fprintf(&b, "%v %s %v via %v mtu %d %s\n", e.IP, e.Name, e.MAC, e.Gateway, e.MTU, cmp.Or(e.Bridge, "ptp"))
	}
	for _, l := range f.LeftAlone {
		fmt.Fprintf(&b, "left %s", l.Name)
		if l.IP.IsValid() {
			fmt.Fprintf(&b, " %v", l.IP)
		}
		fmt.Fprintf(&b, ": %s\n", l.Reason)
	}
	for _, n := range f.Notes {
		fmt.Fprintf(&b, "note %s\n", n)
	}
	return b.String()
}

func lines(want []string) string {
	if len(want) == 0 {
		return ""
	}
	return strings.Join(want, "\n") + "\n"
}

// The node of these tests has a bridge with pods a and b, and pod p at a veth
// without a bridge:
//
//	2 cni0  10.244.1.1/24   10 va → a 10.244.1.10    12 vp → p 10.244.1.12
//	                        11 vb → b 10.244.1.11
const (
	lineA = "10.244.1.10 va 0a:00:00:00:00:0a via 0a:00:00:00:01:02 mtu 1450 cni0"
	lineB = "10.244.1.11 vb 0a:00:00:00:00:0b via 0a:00:00:00:01:02 mtu 1450 cni0"
	lineP = "10.244.1.12 vp 0a:00:00:00:00:0c via 0a:00:00:00:01:0c mtu 1450 ptp"
)

func addr(last byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, 1, last}) }

// sight is a seen that tests change.
type sight struct{ seen }

func usualSight() *sight {
	s := &sight{seen{pods: map[int]pod{}, routes: map[netip.Addr]route{}, foreign: map[int][]string{}}}
	s.links = []device{
		{index: 1, name: "lo", kind: "", up: true, carrier: true, mtu: 65536, netns: noNamespace},
		{index: 2, name: "cni0", kind: "bridge", mac: state.MAC{0x0a, 0, 0, 0, 1, 2}, mtu: 1450, up: true, carrier: true, netns: noNamespace},
		{index: 3, name: "eth0", kind: "veth", mac: state.MAC{0x0a, 0, 0, 0, 1, 3}, mtu: 1500, up: true, carrier: true, qdisc: "noqueue", peer: 3, netns: 99},
	}
	s.addrs = []address{{index: 2, prefix: netip.MustParsePrefix("10.244.1.1/24")}, {index: 3, prefix: netip.MustParsePrefix("192.0.2.11/24")}}
	s.addPod("a", 10, 2)
	s.addPod("b", 11, 2)
	s.addPod("p", 12, 0)
	return s
}

// addPod adds a pod with the index as number of everything.
func (s *sight) addPod(name string, index, bridge int) {
	n := byte(index)
	veth := device{
		index: index, name: "v" + name, kind: "veth", mac: state.MAC{0x0a, 0, 0, 0, 1, n}, mtu: 1450,
		up: true, carrier: true, master: bridge, qdisc: "noqueue", peer: 2, netns: index,
	}
	if bridge != 0 {
		veth.port = port{is: true}
	}
	s.links = append(s.links, veth)
	s.pods[index] = pod{
		end:   device{index: 2, name: "eth0", kind: "veth", mac: state.MAC{0x0a, 0, 0, 0, 0, n}, mtu: 1450, up: true, carrier: true, peer: index},
		addrs: []netip.Addr{addr(n)},
	}
	s.routes[addr(n)] = route{device: 2, bits: 24}
	if bridge == 0 {
		s.routes[addr(n)] = route{device: index, bits: 32}
	}
}

func (s *sight) link(name string) *device {
	for i := range s.links {
		if s.links[i].name == name {
			return &s.links[i]
		}
	}
	panic("no link " + name)
}

// pod changes what the namespace of a veth says.
func (s *sight) pod(name string, change func(*pod)) {
	index := s.link("v" + name).index
	p := s.pods[index]
	change(&p)
	s.pods[index] = p
}

func TestDaysOfANode(t *testing.T) {
	const twice = "note 10.244.1.11 is claimed by the pods of va, vb: none of them is accelerated"
	for name, test := range map[string]struct {
		change func(*sight)
		want   []string
	}{
		"AllIsWell": {func(*sight) {}, []string{lineA, lineB, lineP}},
		"NoPods":    {func(s *sight) { s.links, s.pods = s.links[:3], nil }, nil},
		"NoGateway": {
			func(s *sight) { s.addrs = s.addrs[1:] },
			[]string{lineP},
		},
		"PodDeleted":         {func(s *sight) { s.links = append(s.links[:4:4], s.links[5:]...) }, []string{lineA, lineP}},
		"DumpInAnotherOrder": {func(s *sight) { s.links[3], s.links[4] = s.links[4], s.links[3] }, []string{lineA, lineB, lineP}},
		"NamespaceIsGoing":   {func(s *sight) { s.pods[10] = pod{problem: problemGone} }, []string{lineB, lineP, "left va: the pod's end is not there any more"}},
		"TwoPodsOneAddressInAnotherOrder": {
			func(s *sight) {
				s.links[3], s.links[4] = s.links[4], s.links[3]
				s.pod("a", func(p *pod) { p.addrs = []netip.Addr{addr(11)} })
			},
			[]string{lineP, "left va 10.244.1.11: is claimed by the pods of va, vb", "left vb 10.244.1.11: is claimed by the pods of va, vb", twice},
		},
		"UplinkIsAVethToo":    {func(s *sight) { s.pods[3] = pod{addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}} }, []string{lineA, lineB, lineP}},
		"PeerInTheSameSpace":  {func(s *sight) { s.link("va").netns = noNamespace }, []string{lineB, lineP}},
		"PortOfAnotherBridge": {func(s *sight) { s.link("va").master = 7 }, []string{lineB, lineP}},
		"VethInAVRF":          {func(s *sight) { s.link("vp").master = 7 }, []string{lineA, lineB}},
		"PodIsYetWithout":     {func(s *sight) { s.pod("a", func(p *pod) { p.addrs = nil }) }, []string{lineB, lineP, "left va: the pod has no address inside this node's prefixes"}},
		"PodOfAnotherNetwork": {func(s *sight) {
			s.pod("a", func(p *pod) { p.addrs = []netip.Addr{netip.MustParseAddr("10.245.1.10")} })
		}, []string{lineB, lineP, "left va: the pod has no address inside this node's prefixes"}},
		"NotOurPtpPod":         {func(s *sight) { s.pod("p", func(p *pod) { p.addrs = nil }) }, []string{lineA, lineB}},
		"TwoAddresses":         {twoAddresses, []string{lineA, lineB, lineP, "10.244.1.20 va 0a:00:00:00:00:0a via 0a:00:00:00:01:02 mtu 1450 cni0"}},
		"OneOutsideOneInside":  {func(s *sight) { s.pod("a", func(p *pod) { p.addrs = append(p.addrs, netip.MustParseAddr("fe80::1")) }) }, []string{lineA, lineB, lineP}},
		"TwoInterfacesOfAPod":  {twoInterfaces, []string{lineA, lineB, lineP, "10.244.1.21 va2 0a:00:00:00:00:15 via 0a:00:00:00:01:02 mtu 1450 cni0"}},
		"SmallMTUInThePod":     {func(s *sight) { s.pod("a", func(p *pod) { p.end.mtu = 1400 }) }, []string{strings.Replace(lineA, "1450", "1400", 1), lineB, lineP}},
		"SmallMTUOfTheVeth":    {func(s *sight) { s.link("vp").mtu = 1300 }, []string{lineA, lineB, strings.Replace(lineP, "1450", "1300", 1)}},
		"SmallMTUOfTheBridge":  {func(s *sight) { s.link("cni0").mtu = 1280 }, []string{strings.Replace(lineA, "1450", "1280", 1), strings.Replace(lineB, "1450", "1280", 1), lineP}},
		"GatewayMACChanged":    {func(s *sight) { s.link("cni0").mac = state.MAC{2, 2, 2, 2, 2, 2} }, []string{strings.Replace(lineA, "0a:00:00:00:01:02", "02:02:02:02:02:02", 1), strings.Replace(lineB, "0a:00:00:00:01:02", "02:02:02:02:02:02", 1), lineP}},
		"PodHasGatewayAddress": {func(s *sight) { s.pod("a", func(p *pod) { p.addrs = []netip.Addr{addr(1)} }) }, []string{lineB, lineP, "left va 10.244.1.1: is an address of this host"}},
		"PodHasNetworkAddress": {func(s *sight) { s.pod("a", func(p *pod) { p.addrs = []netip.Addr{addr(0)} }) }, []string{lineB, lineP, "left va 10.244.1.0: is the network address of 10.244.1.0/24"}},
		"PodHasBroadcast":      {func(s *sight) { s.pod("a", func(p *pod) { p.addrs = []netip.Addr{addr(255)} }) }, []string{lineB, lineP, "left va 10.244.1.255: is the broadcast address of 10.244.1.0/24"}},
		"BridgeHasASmallerNet": {func(s *sight) {
			s.addrs[0].prefix = netip.MustParsePrefix("10.244.1.1/29")
			s.pod("a", func(p *pod) { p.addrs = []netip.Addr{addr(7)} })
		}, []string{lineB, lineP, "left va 10.244.1.7: is the broadcast address of 10.244.1.0/29"}},
		"TwoPodsOneAddress": {func(s *sight) { s.pod("a", func(p *pod) { p.addrs = []netip.Addr{addr(11)} }) }, []string{lineP, "left va 10.244.1.11: is claimed by the pods of va, vb", "left vb 10.244.1.11: is claimed by the pods of va, vb", twice}},
		"ClaimedByALeftAlone": {func(s *sight) {
			s.link("va").qdisc = "tbf"
			s.pod("a", func(p *pod) { p.addrs = []netip.Addr{addr(11)} })
		}, []string{lineP, "left va: the pod is shaped (qdisc tbf)", "left vb 10.244.1.11: is claimed by the pods of va, vb", twice}},
		"TwoPodsOneMAC":        {func(s *sight) { s.pod("a", func(p *pod) { p.end.mac[5] = 0x0b }) }, []string{lineP, "left va: MAC 0a:00:00:00:00:0b is on bridge cni0 more than once (va, vb)", "left vb: MAC 0a:00:00:00:00:0b is on bridge cni0 more than once (va, vb)"}},
		"PodHasTheBridgesMAC":  {func(s *sight) { s.pod("a", func(p *pod) { p.end.mac = state.MAC{0x0a, 0, 0, 0, 1, 2} }) }, []string{lineB, lineP, "left va: MAC 0a:00:00:00:01:02 is on bridge cni0 more than once (va, cni0 itself)"}},
		"PodHasAPortsMAC":      {func(s *sight) { s.pod("a", func(p *pod) { p.end.mac = state.MAC{0x0a, 0, 0, 0, 1, 11} }) }, []string{lineB, lineP, "left va: MAC 0a:00:00:00:01:0b is on bridge cni0 more than once (va, vb itself)"}},
		"PtpPodHasTheVethsMAC": {func(s *sight) { s.pod("p", func(p *pod) { p.end.mac = s.link("vp").mac }) }, []string{lineA, lineB, "left vp: MAC 0a:00:00:00:01:0c is the veth's own too"}},
		"SameMACElsewhere":     {func(s *sight) { s.pod("p", func(p *pod) { p.end.mac = state.MAC{0x0a, 0, 0, 0, 0, 10} }) }, []string{lineA, lineB, strings.Replace(lineP, "00:0c via", "00:0a via", 1)}},
		"PodWithoutMAC":        {func(s *sight) { s.pod("a", func(p *pod) { p.end.mac = state.MAC{} }) }, []string{lineB, lineP, "left va: MAC 00:00:00:00:00:00 is not that of one device"}},
		"PodsEndDown":          {func(s *sight) { s.pod("a", func(p *pod) { p.end.up = false }) }, []string{lineB, lineP, "left va: the pod's end is down"}},
		"PodsEndOnABridge":     {func(s *sight) { s.pod("a", func(p *pod) { p.end.master = 5 }) }, []string{lineB, lineP, "left va: the pod's end is part of another device in the pod"}},
		"PodWithXDP":           {func(s *sight) { s.pod("a", func(p *pod) { p.end.xdp = true }) }, []string{lineB, lineP, "left va: the pod has an XDP program"}},
		"VethDown":             {func(s *sight) { s.link("va").up = false }, []string{lineB, lineP, "left va: the veth is down"}},
		"VethWithoutCarrier":   {func(s *sight) { s.link("va").carrier = false }, []string{lineB, lineP, "left va: the veth is down"}},
		"Shaped":               {func(s *sight) { s.link("va").qdisc = "tbf" }, []string{lineB, lineP, "left va: the pod is shaped (qdisc tbf)"}},
		"QueuesFairly":         {func(s *sight) { s.link("vp").qdisc = "fq_codel" }, []string{lineA, lineB, "left vp: qdisc fq_codel"}},
		"ForeignPrograms":      {func(s *sight) { s.foreign[10] = []string{"tcx program x at ingress", "u32 filter at egress"} }, []string{lineB, lineP, "left va: tcx program x at ingress; u32 filter at egress"}},
		"BridgeDown":           {func(s *sight) { s.link("cni0").up = false }, []string{lineP, "left va: bridge cni0 is down", "left vb: bridge cni0 is down"}},
		"BridgeFiltersVLANs":   {func(s *sight) { s.link("cni0").vlanFiltering = true }, []string{lineP, "left va: bridge cni0 filters VLANs", "left vb: bridge cni0 filters VLANs"}},
		"BridgeInAVRF":         {func(s *sight) { s.link("cni0").master = 9 }, []string{lineP, "left va: bridge cni0 is part of another device", "left vb: bridge cni0 is part of another device"}},
		"PortBlocked":          {func(s *sight) { s.link("va").port.blocked = true }, []string{lineB, lineP, "left va: the bridge does not forward on the port"}},
		"PortLocked":           {func(s *sight) { s.link("va").port.locked = true }, []string{lineB, lineP, "left va: the bridge port is locked"}},
		"PortDoesNotLearn":     {func(s *sight) { s.link("va").port.unlearning = true }, []string{lineB, lineP, "left va: the bridge port does not learn"}},
		"PortUnknown":          {func(s *sight) { s.link("va").port = port{} }, []string{lineB, lineP, "left va: the bridge does not say how it treats the port"}},
		"HairpinPorts":         {func(s *sight) { s.link("va").port.hairpin, s.link("vb").port.hairpin = true, true }, []string{lineA, lineB, lineP, "note bridge cni0 has ports in hairpin mode, which does not concern routed packets"}},
		"IsolatedPort":         {func(s *sight) { s.link("va").port.isolated = true }, []string{lineA, lineB, lineP, "note bridge cni0 has isolated ports, which does not concern routed packets"}},
		"NoRoute":              {func(s *sight) { delete(s.routes, addr(10)) }, []string{lineB, lineP, "left va 10.244.1.10: the host has no route to it"}},
		"RouteElsewhere":       {func(s *sight) { s.routes[addr(10)] = route{device: 3, bits: 32} }, []string{lineB, lineP, "left va 10.244.1.10: the host's route to it does not lead to bridge cni0"}},
		"RouteByGateway":       {func(s *sight) { s.routes[addr(10)] = route{device: 2, bits: 24, odd: "by way of a gateway"} }, []string{lineB, lineP, "left va 10.244.1.10: the host's route to it is by way of a gateway"}},
		"PtpRouteElsewhere":    {func(s *sight) { s.routes[addr(12)] = route{device: 11, bits: 32} }, []string{lineA, lineB, "left vp 10.244.1.12: the host has no route for it alone that leads to the veth"}},
		"PtpRouteTooWide":      {func(s *sight) { s.routes[addr(12)] = route{device: 12, bits: 24} }, []string{lineA, lineB, "left vp 10.244.1.12: the host has no route for it alone that leads to the veth"}},
		"KernelRefusesOnePod":  {func(s *sight) { s.pods[10] = pod{problem: problemRefused} }, []string{lineB, lineP, "left va: " + problemRefused}},
		"OnlyTheCNIPluginSays": {func(s *sight) { s.pod("a", func(p *pod) { p.cni = true }) }, []string{lineA, lineB, lineP, "note the kernel refuses to show pods' namespaces; the CNI plugin's results are believed instead"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := usualSight()
			test.change(s)
			found := judge(s.seen, prefixes)
			if got := found.text(); got != lines(test.want) {
				t.Errorf("found:\n%swant:\n%s", got, lines(test.want))
			}
			if again := judge(s.seen, prefixes); !reflect.DeepEqual(again, found) {
				t.Errorf("the same was judged otherwise: %+v, then %+v", found, again)
			}
		})
	}
}

func twoAddresses(s *sight) {
	s.pod("a", func(p *pod) { p.addrs = append(p.addrs, addr(20)) })
	s.routes[addr(20)] = route{device: 2, bits: 24}
}

// twoInterfaces gives pod a a second veth, with an address of its own.
func twoInterfaces(s *sight) {
	s.addPod("a2", 21, 2)
	s.link("va2").netns = s.link("va").netns
}

func TestIPv6Prefixes(t *testing.T) {
	s := usualSight()
	v6 := netip.MustParsePrefix("fd00:10:244:1::/64")
	s.addrs = append(s.addrs, address{index: 2, prefix: netip.MustParsePrefix("fd00:10:244:1::1/64")})
	ip, network := netip.MustParseAddr("fd00:10:244:1::a"), v6.Addr()
	s.pod("a", func(p *pod) { p.addrs = append(p.addrs, ip, network) })
	s.routes[ip], s.routes[network] = route{device: 2, bits: 64}, route{device: 2, bits: 64}
	got := judge(s.seen, append(prefixes, v6)).text()
	want := lines([]string{
		lineA, lineB, lineP, strings.Replace(lineA, "10.244.1.10", ip.String(), 1),
		"left va fd00:10:244:1::: is the network address of fd00:10:244:1::/64",
	})
	if got != want {
		t.Errorf("found:\n%swant:\n%s", got, want)
	}
}

func TestSmallPrefixesHaveNoNetworkAddress(t *testing.T) {
	s := usualSight()
	if got := judge(s.seen, []netip.Prefix{netip.MustParsePrefix("10.244.1.10/31"), netip.MustParsePrefix("10.244.1.12/32")}).text(); got != lineP+"\n" {
		t.Errorf("found:\n%s", got) // cni0's address is no gateway of these
	}
	s.addrs[0].prefix = netip.MustParsePrefix("10.244.1.11/31")
	s.pods[11] = pod{problem: problemGone}
	if got := judge(s.seen, []netip.Prefix{netip.MustParsePrefix("10.244.1.10/31")}).text(); !strings.HasPrefix(got, lineA+"\n") {
		t.Errorf("found:\n%swant the first of two addresses", got)
	}
}

func TestInterest(t *testing.T) {
	in := newInterest(usualSight().seen, prefixes)
	other := netip.MustParsePrefix("10.244.2.0/24")
	for name, test := range map[string]struct{ got, want bool }{
		"OwnAddress":     {in.inAddress(addr(9)), true},
		"OthersAddress":  {in.inAddress(other.Addr()), false},
		"PtpRoute":       {in.inRoute(netip.MustParsePrefix("10.244.1.12/32")), true},
		"WiderRoute":     {in.inRoute(netip.MustParsePrefix("10.244.0.0/16")), true},
		"PeersRoute":     {in.inRoute(other), false},
		"DefaultRoute":   {in.inRoute(netip.MustParsePrefix("0.0.0.0/0")), false},
		"PodsVeth":       {in.inVeth(10), true},
		"AnotherDevice":  {in.inVeth(2), false},
		"KnownMAC":       {in.inStation(10, state.MAC{0x0a, 0, 0, 0, 0, 10}), false},
		"NewMAC":         {in.inStation(10, state.MAC{0x0a, 0, 0, 0, 0, 11}), true},
		"MACElsewhere":   {in.inStation(2, state.MAC{0x0a, 0, 0, 0, 0, 11}), false},
		"SettledVeth":    {in.open(10), false},
		"UnknownVeth":    {in.open(77), true},
		"AllAtTheOutset": {(*interest)(nil).inVeth(2) && (*interest)(nil).inRoute(other) && (*interest)(nil).open(10), true},
	} {
		if test.got != test.want {
			t.Errorf("%s: %v, want %v", name, test.got, test.want)
		}
	}
}
