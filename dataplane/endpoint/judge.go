package endpoint

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane/state"
)

// seen is what was read of a node, in our words.
type seen struct {
	links []device
	addrs []address
	// pods are what the namespaces at the other ends say, by index of the veth.
	pods map[int]pod
	// routes are where the kernel sends packets for an address.
	routes map[netip.Addr]route
	// foreign names, by index of the veth, what others have attached to it and
	// what packets that go past the host's stack would not meet.
	foreign map[int][]string
}

// device is a network device, of this namespace or of a pod's.
type device struct {
	index   int
	name    string
	kind    string
	mac     state.MAC
	mtu     int
	up      bool
	carrier bool
	master  int
	qdisc   string // the root's
	xdp     bool
	// peer is the index of a veth's other end, and netns the number of the
	// namespace it is in, noNamespace where it is in the same.
	peer  int
	netns int
	// vlanFiltering is a bridge's.
	vlanFiltering bool
	port          port
}

// noNamespace is the netns of a link that leads to none: its peer, if it has
// one, is in its own. unknownNamespace is the kernel's word for a namespace
// that it can't number, because it is going.
const (
	noNamespace      = -2
	unknownNamespace = -1
)

// port is what makes a link the port of a bridge.
type port struct {
	is         bool
	blocked    bool // by STP
	locked     bool
	unlearning bool
	hairpin    bool
	isolated   bool
}

// address is an address of a device.
type address struct {
	index  int
	prefix netip.Prefix
}

// pod is the other end of a veth.
type pod struct {
	// problem says why nothing is known of it.
	problem string
	end     device
	addrs   []netip.Addr
	// cni is set when it is the CNI plugin that says so.
	cni bool
}

// Why nothing is known of a pod.
const (
	problemGone     = "the pod's end is not there any more"
	problemRestless = "the pod's addresses keep changing"
	problemRefused  = "the kernel refuses to show the pod's namespace (CAP_NET_ADMIN is needed there)"
)

// route is where the kernel sends packets for an address.
type route struct {
	device int
	// bits is the length of the prefix in the routing table.
	bits int
	// odd says what keeps it from being a plain route to a device.
	odd string
}

// candidate is a veth that may be a pod's: a port of a bridge that has our
// gateway, or one without any bridge that a route may lead to.
type candidate struct {
	veth   device
	bridge device // index 0 without
}

// candidates lists them by index of the veth.
func candidates(s seen, prefixes []netip.Prefix) []candidate {
	gateways := map[int]bool{}
	for _, a := range s.addrs {
		if inside(prefixes, a.prefix.Addr()) {
			gateways[a.index] = true
		}
	}
	byIndex := map[int]device{}
	for _, l := range s.links {
		byIndex[l.index] = l
	}
	var out []candidate
	for _, l := range s.links {
		if l.kind != "veth" || l.netns == noNamespace {
			continue
		}
		master := byIndex[l.master]
		switch {
		case l.master == 0:
			out = append(out, candidate{veth: l})
		case master.kind == "bridge" && gateways[master.index]:
			out = append(out, candidate{veth: l, bridge: master})
		}
	}
	slices.SortFunc(out, func(a, b candidate) int { return cmp.Compare(a.veth.index, b.veth.index) })
	return out
}

// inside tells whether an address is in one of the prefixes.
func inside(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// claims are the addresses inside our prefixes that a pod has, sorted.
func (p pod) claims(prefixes []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, a := range p.addrs {
		if inside(prefixes, a) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// judge tells what is certain of what was seen.
func judge(s seen, prefixes []netip.Prefix) Found {
	j := judgement{
		seen:     s,
		prefixes: prefixes,
		claims:   map[netip.Addr][]string{},
		macs:     map[station][]string{},
		hosts:    map[netip.Addr]string{},
		notes:    map[string]bool{},
	}
	cands := candidates(s, prefixes)
	j.survey(cands)
	for _, c := range cands {
		j.candidate(c)
	}
	slices.SortFunc(j.found.Endpoints, func(a, b Endpoint) int { return a.IP.Compare(b.IP) })
	slices.SortStableFunc(j.found.LeftAlone, func(a, b LeftAlone) int {
		return cmp.Or(cmp.Compare(a.Veth, b.Veth), a.IP.Compare(b.IP))
	})
	j.found.Notes = slices.Sorted(maps.Keys(j.notes))
	return j.found
}

// station is a MAC on a bridge; without a bridge everybody is alone.
type station struct {
	bridge int
	mac    state.MAC
}

type judgement struct {
	seen
	prefixes []netip.Prefix
	// claims are the names of the veths whose pods have an address; macs those
	// on which a bridge finds a MAC, its own and its ports' included.
	claims map[netip.Addr][]string
	macs   map[station][]string
	// hosts are addresses that no pod can have, and what they are.
	hosts map[netip.Addr]string
	notes map[string]bool
	found Found
}

// survey looks at what one veth can't tell: who else has the address or MAC.
// Those left alone count too: theirs is the address as much as anybody's.
func (j *judgement) survey(cands []candidate) {
	for _, c := range cands {
		pod := j.pods[c.veth.index]
		for _, a := range pod.claims(j.prefixes) {
			j.claims[a] = append(j.claims[a], c.veth.name)
		}
		if c.bridge.index != 0 && pod.problem == "" {
			at := station{c.bridge.index, pod.end.mac}
			j.macs[at] = append(j.macs[at], c.veth.name)
		}
	}
	for _, l := range j.links {
		bridge := l.master
		if l.kind == "bridge" {
			bridge = l.index
		}
		at := station{bridge, l.mac}
		if bridge != 0 && len(j.macs[at]) > 0 {
			j.macs[at] = append(j.macs[at], l.name+" itself")
		}
	}
	for _, p := range j.prefixes {
		j.reserve(p)
	}
	for _, a := range j.addrs {
		if inside(j.prefixes, a.prefix.Addr()) {
			j.reserve(a.prefix)
			j.hosts[a.prefix.Addr()] = "is an address of this host"
		}
	}
	for ip, names := range j.claims {
		if len(names) > 1 {
			j.notes[fmt.Sprintf("%v is claimed by the pods of %s: none of them is accelerated", ip, strings.Join(names, ", "))] = true
		}
	}
}

// reserve takes the ends of a subnet out.
func (j *judgement) reserve(p netip.Prefix) {
	p = p.Masked()
	if p.Addr().BitLen()-p.Bits() < 2 {
		return // RFC 3021, RFC 6164: both addresses are hosts'
	}
	j.hosts[p.Addr()] = fmt.Sprintf("is the network address of %v", p)
	if p.Addr().Is4() {
		j.hosts[last(p)] = fmt.Sprintf("is the broadcast address of %v", p)
	}
}

// last is the last address of an IPv4 prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		b[bit/8] |= 1 << (7 - bit%8)
	}
	return netip.AddrFrom4(b)
}

// candidate judges one veth, and if nothing is wrong with it each of its
// addresses.
func (j *judgement) candidate(c candidate) {
	pod := j.pods[c.veth.index]
	claims := pod.claims(j.prefixes)
	if len(claims) == 0 && c.bridge.index == 0 {
		return // not a pod of ours, for all we know
	}
	if c.bridge.index != 0 {
		j.notePort(c)
	}
	var reasons []string
	switch {
	case pod.problem != "":
		reasons = append(reasons, pod.problem)
	case len(claims) == 0:
		reasons = append(reasons, "the pod has no address inside this node's prefixes")
	default:
		reasons = append(podReasons(pod), j.stationReasons(c, pod)...)
	}
	reasons = append(reasons, vethReasons(c)...)
	reasons = append(reasons, j.foreign[c.veth.index]...)
	if len(reasons) > 0 {
		j.leave(c, netip.Addr{}, strings.Join(reasons, "; "))
		return
	}
	for _, ip := range claims {
		if reason := j.addressReason(c, ip); reason != "" {
			j.leave(c, ip, reason)
			continue
		}
		j.found.Endpoints = append(j.found.Endpoints, newEndpoint(c, pod, ip))
	}
	if pod.cni {
		j.notes["the kernel refuses to show pods' namespaces; the CNI plugin's results are believed instead"] = true
	}
}

func newEndpoint(c candidate, pod pod, ip netip.Addr) Endpoint {
	e := Endpoint{
		IP: ip, Veth: c.veth.index, Name: c.veth.name, MAC: pod.end.mac,
		Gateway: c.veth.mac, MTU: min(c.veth.mtu, pod.end.mtu),
	}
	if c.bridge.index != 0 {
		e.Bridge, e.Gateway, e.MTU = c.bridge.name, c.bridge.mac, min(e.MTU, c.bridge.mtu)
	}
	return e
}

func (j *judgement) leave(c candidate, ip netip.Addr, reason string) {
	j.found.LeftAlone = append(j.found.LeftAlone, LeftAlone{IP: ip, Veth: c.veth.index, Name: c.veth.name, Reason: reason})
}

// notePort notes settings of a port that concern packets between pods of the
// node, and none that are routed.
func (j *judgement) notePort(c candidate) {
	if c.veth.port.hairpin {
		j.notes[fmt.Sprintf("bridge %s has ports in hairpin mode, which does not concern routed packets", c.bridge.name)] = true
	}
	if c.veth.port.isolated {
		j.notes[fmt.Sprintf("bridge %s has isolated ports, which does not concern routed packets", c.bridge.name)] = true
	}
}

// vethReasons say what is in the way on the host's side.
func vethReasons(c candidate) (reasons []string) {
	add := func(is bool, reason string) {
		if is {
			reasons = append(reasons, reason)
		}
	}
	add(!c.veth.up || !c.veth.carrier, "the veth is down")
	switch c.veth.qdisc {
	case "noqueue":
	case "tbf":
		add(true, "the pod is shaped (qdisc tbf)")
	default:
		add(true, "qdisc "+cmp.Or(c.veth.qdisc, "unknown"))
	}
	if c.bridge.index == 0 {
		return reasons
	}
	add(!c.bridge.up, fmt.Sprintf("bridge %s is down", c.bridge.name))
	add(c.bridge.master != 0, fmt.Sprintf("bridge %s is part of another device", c.bridge.name))
	add(c.bridge.vlanFiltering, fmt.Sprintf("bridge %s filters VLANs", c.bridge.name))
	p := c.veth.port
	add(!p.is, "the bridge does not say how it treats the port")
	add(p.blocked, "the bridge does not forward on the port")
	add(p.locked, "the bridge port is locked")
	add(p.unlearning, "the bridge port does not learn")
	return reasons
}

// podReasons say what is in the way in the pod.
func podReasons(p pod) (reasons []string) {
	if p.cni {
		return nil // more than addresses and MAC it does not know
	}
	if !p.end.up || !p.end.carrier {
		reasons = append(reasons, "the pod's end is down")
	}
	if p.end.master != 0 {
		reasons = append(reasons, "the pod's end is part of another device in the pod")
	}
	if p.end.xdp {
		// Packets handed to the pod's end skip the driver, and with it XDP.
		reasons = append(reasons, "the pod has an XDP program")
	}
	return reasons
}

// stationReasons say whether the MAC is one pod's alone.
func (j *judgement) stationReasons(c candidate, p pod) []string {
	mac := p.end.mac
	if mac.IsZero() || mac[0]&1 != 0 {
		return []string{fmt.Sprintf("MAC %v is not that of one device", mac)}
	}
	if c.bridge.index == 0 {
		if mac == c.veth.mac {
			return []string{fmt.Sprintf("MAC %v is the veth's own too", mac)}
		}
		return nil
	}
	if names := j.macs[station{c.bridge.index, mac}]; len(names) > 1 {
		return []string{fmt.Sprintf("MAC %v is on bridge %s more than once (%s)", mac, c.bridge.name, strings.Join(names, ", "))}
	}
	return nil
}

// addressReason says what is in the way of one address.
func (j *judgement) addressReason(c candidate, ip netip.Addr) string {
	if what := j.hosts[ip]; what != "" {
		return what
	}
	if names := j.claims[ip]; len(names) > 1 {
		return fmt.Sprintf("is claimed by the pods of %s", strings.Join(names, ", "))
	}
	r, ok := j.routes[ip]
	switch {
	case !ok:
		return "the host has no route to it"
	case r.odd != "":
		return "the host's route to it is " + r.odd
	case c.bridge.index != 0 && r.device != c.bridge.index:
		return fmt.Sprintf("the host's route to it does not lead to bridge %s", c.bridge.name)
	case c.bridge.index == 0 && (r.device != c.veth.index || r.bits != ip.BitLen()):
		return "the host has no route for it alone that leads to the veth"
	}
	return ""
}
