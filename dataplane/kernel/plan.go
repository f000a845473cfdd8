package kernel

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane/state"
)

// Plan is what has to be done so that the kernel holds what a state wants.
type Plan struct {
	// Uplink is the device that carries the underlay, as it is.
	Uplink Uplink
	// Steps are done in this order.
	Steps []Step
	// Failed are the peers that can't be served, and why.
	Failed map[netip.Prefix]error
	// Skipped are the peers that have not published a MAC yet.
	Skipped []netip.Prefix
	// Direct are the peers that are served by DirectRouting, Failed ones
	// excluded.
	Direct []netip.Prefix
	// Notes tell in words what was found and is left alone.
	Notes []string
}

// String gives the commands that an operator would type, one a line, and the
// notes as shell comments. An empty plan is "".
func (p Plan) String() string {
	var b strings.Builder
	for _, s := range p.Steps {
		b.WriteString(s.String() + "\n")
	}
	for _, n := range p.Notes {
		b.WriteString("# " + n + "\n")
	}
	return b.String()
}

// Op is one kind of change.
type Op uint8

// The kinds of change, in the order in which a plan has them.
const (
	DeleteDevice Op = iota
	AddDevice
	SetAcceptRA
	SetLearning
	SetMAC
	SetMTU
	AddAddress
	DeleteAddress
	SetUp
	SetFDB
	SetNeighbour
	SetGateway
	AddRoute
	ReplaceRoute
	DeleteGateway
	DeleteRoute
	DeleteNeighbour
	DeleteFDB
)

// Step is one change. Which fields count depends on Op.
type Step struct {
	Op Op
	// Device is the overlay device, or the one that a route of DirectRouting
	// leads to.
	Device string
	// index is Device's, where that is not the overlay device.
	index int
	// Prefix is an address with its length, or a route's destination.
	Prefix netip.Prefix
	// Addr is the address of a neighbour, a route's gateway, or the underlay
	// address of an FDB entry.
	Addr netip.Addr
	MAC  state.MAC
	// MTU is in bytes.
	MTU int
	// Learning is whether the device shall learn.
	Learning bool
	// Peer is the pod prefix that is served by the step; zero for steps that
	// serve all, or nobody any more.
	Peer netip.Prefix
	// After is the peer that has to be served by an earlier step before this one
	// may be done; most often zero.
	After netip.Prefix

	vxlan
}

// String gives the command that an operator would type for it.
func (s Step) String() string {
	switch s.Op {
	case DeleteDevice:
		return fmt.Sprintf("ip link del %s", s.Device)
	case AddDevice:
		text := fmt.Sprintf("ip link add %s address %s mtu %d type vxlan id %d local %s dev %s dstport %d %s udpcsum",
			s.Device, s.MAC, s.MTU, s.vni, s.local, s.uplink, s.port, learningWord(s.Learning))
		if s.gbp {
			text += " gbp"
		}
		return text
	case SetAcceptRA:
		return fmt.Sprintf("sysctl -w net/ipv6/conf/%s/accept_ra=0", s.Device)
	case SetLearning:
		return fmt.Sprintf("ip link set %s type vxlan %s", s.Device, learningWord(s.Learning))
	case SetMAC:
		return fmt.Sprintf("ip link set %s address %s", s.Device, s.MAC)
	case SetMTU:
		return fmt.Sprintf("ip link set %s mtu %d", s.Device, s.MTU)
	case AddAddress:
		return fmt.Sprintf("ip addr add %s dev %s", s.Prefix, s.Device)
	case DeleteAddress:
		return fmt.Sprintf("ip addr del %s dev %s", s.Prefix, s.Device)
	case SetUp:
		return fmt.Sprintf("ip link set %s up", s.Device)
	case SetFDB:
		return fmt.Sprintf("bridge fdb replace %s dev %s dst %s self permanent", s.MAC, s.Device, s.Addr)
	case SetNeighbour:
		return fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent", s.Addr, s.MAC, s.Device)
	case SetGateway:
		return fmt.Sprintf("ip route replace %s dev %s", s.Addr, s.Device)
	case DeleteGateway:
		return fmt.Sprintf("ip route del %s dev %s", s.Addr, s.Device)
	case AddRoute:
		return fmt.Sprintf("ip route add %s via %s dev %s%s", s.Prefix, s.Addr, s.Device, s.onlinkWord())
	case ReplaceRoute:
		return fmt.Sprintf("ip route replace %s via %s dev %s%s", s.Prefix, s.Addr, s.Device, s.onlinkWord())
	case DeleteRoute:
		return fmt.Sprintf("ip route del %s via %s dev %s", s.Prefix, s.Addr, s.Device)
	case DeleteNeighbour:
		return fmt.Sprintf("ip neigh del %s dev %s", s.Addr, s.Device)
	case DeleteFDB:
		return fmt.Sprintf("bridge fdb del %s dev %s dst %s self", s.MAC, s.Device, s.Addr)
	}
	return fmt.Sprintf("unknown step %d", s.Op)
}

func learningWord(on bool) string {
	if on {
		return "learning"
	}
	return "nolearning"
}

// direct reports whether the step is about a route of DirectRouting.
func (s Step) direct() bool { return s.index != 0 }

// onlinkWord is for routes: a gateway on the overlay device is in no network of
// its.
func (s Step) onlinkWord() string {
	if s.direct() {
		return ""
	}
	return " onlink"
}

// makePlan compares what one overlay shall be with what the kernel holds of
// it. It looks at nothing else, so it can be tested without a kernel.
//
// The device comes first: routes, neighbours and FDB entries live on it. An
// error is about the device; without it no peer can be served.
func makePlan(want overlay, peers []state.Peer, have actual) (Plan, error) {
	plan := Plan{Failed: map[netip.Prefix]error{}}
	mac, err := planDevice(&plan, want, have.device)
	if err != nil {
		return plan, err
	}
	for _, s := range plan.Steps {
		switch s.Op {
		case AddDevice:
			// What was on the old device goes with it.
			have = actual{routes: routesElsewhere(want, have.routes), routers: have.routers}
		case SetMAC:
			// The kernel flushes a device's neighbours, permanent ones too,
			// when its MAC changes (neigh_changeaddr in net/core/neighbour.c).
			have.neighbours = nil
		}
	}
	chosen := choosePeers(want, mac, peers)
	plan.Failed, plan.Skipped = chosen.failed, chosen.skipped
	want.peers = chosen.served
	planPeers(&plan, newOwnership(want, peers, have), have)
	return plan, nil
}

// peerSteps are the steps behind those that make or change the device itself.
func (p Plan) peerSteps() []Step {
	i := slices.IndexFunc(p.Steps, func(s Step) bool { return s.Op > SetUp })
	if i < 0 {
		return nil
	}
	return p.Steps[i:]
}

// planDevice plans the device itself and returns the MAC it will have.
func planDevice(plan *Plan, want overlay, have *device) (state.MAC, error) {
	add := func(s Step) {
		s.Device = want.name
		plan.Steps = append(plan.Steps, s)
	}
	mac := want.mac
	if have != nil {
		if err := refuseForeign(*have); err != nil {
			return mac, err
		}
		if mac.IsZero() {
			mac = have.mac
		}
	}
	if mac.IsZero() {
		return mac, fmt.Errorf("overlay device %s does not exist, and no MAC is given to make it with", want.name)
	}

	// The parameters in vxlan can't be changed in place: a device that differs
	// is made anew. It keeps its MAC, so peers need not hear of it.
	if have != nil && (have.vxlan != want.vxlan || have.odd != "") {
		add(Step{Op: DeleteDevice})
		have = nil
	}
	fresh := have == nil
	if fresh {
		add(Step{Op: AddDevice, MAC: mac, MTU: want.mtu, Learning: want.learning, vxlan: want.vxlan})
		// The kernel's default, 1, and learning and MTU as just asked for.
		have = &device{mac: mac, mtu: want.mtu, learning: want.learning, acceptRA: 1}
	}
	// Before the device is up, or it may already have taken a router's word.
	if have.acceptRA > 0 {
		add(Step{Op: SetAcceptRA})
	}
	if have.learning != want.learning {
		add(Step{Op: SetLearning, Learning: want.learning})
	}
	if have.mac != mac {
		add(Step{Op: SetMAC, MAC: mac})
	}
	if have.mtu != want.mtu {
		add(Step{Op: SetMTU, MTU: want.mtu})
	}
	planAddresses(plan, want, have.addrs)
	// Last, when all is in place. The other way round the kernel would answer
	// on a half-made device.
	if !have.up {
		add(Step{Op: SetUp})
	}
	return mac, nil
}

// planAddresses gives the device its own address and takes away those of a
// past pod prefix: they have the form that only an overlay address has, a
// whole-length prefix. An address of another form is somebody's purpose and
// stays.
//
// The new address is added before the old one is removed: with the last
// address of a device the kernel drops all its routes and neighbours
// (fib_del_ifaddr in net/ipv4/fib_frontend.c).
func planAddresses(plan *Plan, want overlay, have []netip.Prefix) {
	found := false
	var stale []netip.Prefix
	for _, a := range have {
		switch {
		case a == want.address():
			found = true
		case a.IsSingleIP():
			stale = append(stale, a)
		default:
			plan.Notes = append(plan.Notes, fmt.Sprintf("%s has the address %s, which is not ours; left alone", want.name, a))
		}
	}
	if !found {
		plan.Steps = append(plan.Steps, Step{Op: AddAddress, Device: want.name, Prefix: want.address()})
	}
	for _, a := range stale {
		plan.Steps = append(plan.Steps, Step{Op: DeleteAddress, Device: want.name, Prefix: a})
	}
}

// refuseForeign says that a device with an overlay device's name is none.
func refuseForeign(d device) error {
	if d.kind == "vxlan" {
		return nil
	}
	return fmt.Errorf("a device named %s exists, but it is of type %q, not vxlan; it is not touched: "+
		"rename it (ip link set %s down name NEW) or remove it (ip link del %s)", d.name, d.kind, d.name, d.name)
}

// planPeers plans the three entries of each peer, and the removal of those
// that no peer wants. The plan is made before it is broken: whatever a packet
// leans on is in place before the packet is sent that way, and stays until no
// packet is.
//
//   - FDB entry, neighbour, route, when adding: a packet that takes the route
//     finds the neighbour, and one that has the neighbour's MAC finds the FDB
//     entry. (The other way round the kernel would begin to ask for the
//     neighbour, and broadcast into nothing.)
//   - All additions before all removals: when a peer's MAC changes, the new
//     FDB entry is there, then the neighbour is turned to it, then the old FDB
//     entry goes.
//   - Route, neighbour, FDB entry, when removing: the mirror image.
//
// IPv6 takes no gateway on the overlay device that a route leads to elsewhere
// (ip6_route_check_nh_onlink in net/ipv6/route.c), be it the very route that is to
// be replaced. Then the gateway gets a route of its own for the moment.
//
// A peer that DirectRouting begins or ceases to serve fits in: its route is put
// in the place of the other in one step, after the tunnel's entries have come, or
// before they go.
func planPeers(plan *Plan, want ownership, have actual) {
	routes := make(map[netip.Prefix][]route, len(have.routes))
	for _, r := range have.routes {
		routes[r.prefix] = append(routes[r.prefix], r)
	}
	neighbours := make(map[netip.Addr]neighbour, len(have.neighbours))
	for _, n := range have.neighbours {
		neighbours[n.ip] = n
	}
	fdb := make(map[state.MAC]fdbEntry, len(have.fdb))
	for _, f := range have.fdb {
		fdb[f.mac] = f
	}

	wantedRoutes := make(map[netip.Prefix]route, len(want.peers))
	wantedNeighbours := make(map[netip.Addr]bool, len(want.peers))
	wantedFDB := make(map[state.MAC]bool, len(want.peers))
	// What is left on the overlay device of peers that DirectRouting serves.
	leftNeighbours := map[netip.Addr]netip.Prefix{}
	leftFDB := map[state.MAC]netip.Prefix{}
	missing := max(0, len(want.peers)-len(have.routes)) // many, at the start
	setFDB, setNeighbours, setRoutes := make([]Step, 0, missing), make([]Step, 0, missing), make([]Step, 0, missing)
	var setGateways, deleteGateways []Step
	misled := misleading(want.overlay, have.routes)
	for _, p := range want.peers {
		gateway := p.Prefix.Addr()
		verb, needed, err := planRoute(want, p, routes[p.Prefix])
		if err != nil {
			plan.Failed[p.Prefix] = err
			continue
		}
		target := want.routeTo(p)
		wantedRoutes[p.Prefix] = target
		if needed {
			setRoutes = append(setRoutes, Step{
				Op: verb, Device: target.device, index: target.index, Prefix: p.Prefix, Addr: target.gateway, Peer: p.Prefix,
			})
		}
		if needed && !want.isDirect(p) && misled(p, routes[p.Prefix]) {
			setGateways = append(setGateways, Step{Op: SetGateway, Device: want.name, Addr: gateway, Peer: p.Prefix})
			deleteGateways = append(deleteGateways, Step{Op: DeleteGateway, Device: want.name, Addr: gateway})
		}
		if want.isDirect(p) {
			plan.Direct = append(plan.Direct, p.Prefix)
			leftNeighbours[gateway], leftFDB[neighbours[gateway].mac] = p.Prefix, p.Prefix
			continue
		}
		if (neighbours[gateway] != neighbour{ip: gateway, mac: p.MAC, permanent: true}) {
			setNeighbours = append(setNeighbours, Step{Op: SetNeighbour, Device: want.name, Addr: gateway, MAC: p.MAC, Peer: p.Prefix})
		}
		// A node with several prefixes has one FDB entry, set for each: a peer's
		// steps then do not lean on another peer's.
		if (fdb[p.MAC] != fdbEntry{mac: p.MAC, dst: p.PublicIP, permanent: true}) {
			setFDB = append(setFDB, Step{Op: SetFDB, Device: want.name, MAC: p.MAC, Addr: p.PublicIP, Peer: p.Prefix})
		}
		wantedNeighbours[gateway], wantedFDB[p.MAC] = true, true
	}
	plan.Steps = slices.Concat(plan.Steps, setFDB, setNeighbours, setGateways, setRoutes, deleteGateways)

	// What only we or flannel could have made, and nobody wants any more.
	for _, r := range have.routes {
		if _, wanted := wantedRoutes[r.prefix]; wanted {
			continue
		}
		switch {
		case r.isGateway(want):
			plan.Steps = append(plan.Steps, Step{Op: DeleteGateway, Device: r.device, Addr: r.prefix.Addr()})
		case r.isOurs(want.overlay):
			plan.Steps = append(plan.Steps, Step{Op: DeleteRoute, Device: r.device, Prefix: r.prefix, Addr: r.gateway})
		case r.device != want.name && want.removable(r):
			plan.Steps = append(plan.Steps, Step{Op: DeleteRoute, Device: r.device, index: r.index, Prefix: r.prefix, Addr: r.gateway})
		}
	}
	for _, n := range have.neighbours {
		if !wantedNeighbours[n.ip] && n.permanent && !n.foreign {
			plan.Steps = append(plan.Steps, Step{Op: DeleteNeighbour, Device: want.name, Addr: n.ip, After: leftNeighbours[n.ip]})
		}
	}
	for _, f := range have.fdb {
		if !wantedFDB[f.mac] && f.isOurs() {
			plan.Steps = append(plan.Steps, Step{Op: DeleteFDB, Device: want.name, MAC: f.mac, Addr: f.dst, After: leftFDB[f.mac]})
		}
	}
}

// mayMislead reports whether IPv6 may find a peer's gateway by the route, instead
// of on the overlay device. The default route does not count.
func (o overlay) mayMislead(r route) bool {
	return o.v6 && r.device != o.name && r.prefix.Bits() > 0 && !r.prefix.IsSingleIP() &&
		o.network.IsValid() && r.prefix.Overlaps(o.network)
}

// misleading tells of a peer, and of the routes to its prefix, whether the kernel
// would refuse the peer's gateway on the overlay device.
func misleading(o overlay, routes []route) func(p state.Peer, exact []route) bool {
	wanted := make(map[netip.Prefix]bool, len(o.peers))
	for _, p := range o.peers {
		wanted[p.Prefix] = true
	}
	var wide []route
	for _, r := range routes {
		if !wanted[r.prefix] && o.mayMislead(r) {
			wide = append(wide, r)
		}
	}
	return func(p state.Peer, exact []route) bool {
		return slices.ContainsFunc(exact, o.mayMislead) ||
			slices.ContainsFunc(wide, func(r route) bool { return r.prefix.Contains(p.Prefix.Addr()) })
	}
}

// isGateway reports whether the route is one to a gateway that was left behind:
// to the first address of a pod prefix alone, on the overlay device.
func (r route) isGateway(want ownership) bool {
	return want.v6 && want.plain(route{
		kind: r.kind, proto: r.proto, metric: r.metric, onlink: r.onlink, more: r.more, gateway: r.prefix.Addr(),
	}) && r.device == want.name && !r.gateway.IsValid() && r.prefix.IsSingleIP() && want.gateways[r.prefix.Addr()]
}

// planRoute says whether a peer needs its route to be made, and how: added
// where there is none, so that nothing that appears meanwhile is run over, or
// put in place of one that is recognisably ours. Any other route for the same
// prefix that would win over ours is a conflict.
func planRoute(want ownership, p state.Peer, have []route) (verb Op, needed bool, err error) {
	verb, needed = AddRoute, true
	target := want.routeTo(p)
	for _, r := range have {
		switch {
		case r.leadsAs(target) && r.metric == target.metric:
			needed = false
		case r.metric > target.metric:
			// It loses against ours: somebody's fallback.
		case r.isReplaceable(want, p) && r.metric == target.metric:
			verb = ReplaceRoute
		default:
			return 0, false, fmt.Errorf("peer %s: a route that is not ours leads elsewhere: %s; remove it for the peer to be served",
				peerName(p), r)
		}
	}
	return verb, needed, nil
}

// leadsAs reports whether the route carries its prefix's packets as target does,
// whoever made it.
func (r route) leadsAs(target route) bool {
	return r.kind == "" && r.device == target.device && r.gateway == target.gateway && (r.onlink || !target.onlink)
}

// isOurs reports whether only we, or flannel, could have made the route:
// through its own first address on our device, without anything else said.
// Somebody's route through one of our gateways is not.
func (r route) isOurs(o overlay) bool {
	return r.kind == "" && r.device == o.name && r.onlink && r.gateway == r.prefix.Addr() &&
		r.proto == protoBoot && r.metric == o.metric()
}

// isReplaceable reports whether a route that leads to a wanted prefix by
// another way is recognisably ours or flannel's: through the gateway on an
// overlay device, be it of another VNI; or past it, as DirectRouting does.
func (r route) isReplaceable(want ownership, p state.Peer) bool {
	if r.kind != "" || r.proto != protoBoot {
		return false
	}
	return isDeviceName(r.device) && r.gateway == r.prefix.Addr() ||
		r.device == want.uplink && r.gateway == p.PublicIP ||
		want.replaceable(r)
}

// isOurs reports whether only we, or flannel, could have made the entry:
// permanent, to one underlay address, for one device's MAC. The entry of MAC
// zero (where frames to unknown MACs go) and those of group MACs are never
// made by either: somebody wants broadcasts.
func (f fdbEntry) isOurs() bool {
	return f.permanent && !f.foreign && f.dst.IsValid() && !f.mac.IsZero() && f.mac[0]&1 == 0
}

// String is the route as `ip route` shows it.
func (r route) String() string {
	var b strings.Builder
	if r.kind != "" {
		b.WriteString(r.kind + " ")
	}
	b.WriteString(r.prefix.String())
	if r.gateway.IsValid() {
		fmt.Fprintf(&b, " via %s", r.gateway)
	}
	if r.device != "" {
		fmt.Fprintf(&b, " dev %s", r.device)
	}
	if r.proto != protoBoot {
		fmt.Fprintf(&b, " proto %s", protoName(r.proto))
	}
	if r.metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.metric)
	}
	if r.onlink {
		b.WriteString(" onlink")
	}
	return b.String()
}

// protoName names the commonest of /etc/iproute2/rt_protos.
func protoName(proto uint8) string {
	switch proto {
	case 2:
		return "kernel"
	case protoBoot:
		return "boot"
	case 4:
		return "static"
	}
	return fmt.Sprint(proto)
}

// routesElsewhere are the routes that do not lead to the overlay's device.
func routesElsewhere(o overlay, routes []route) []route {
	var left []route
	for _, r := range routes {
		if r.device != o.name {
			left = append(left, r)
		}
	}
	return left
}
