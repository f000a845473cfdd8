//go:build linux

package dataplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
)

// The values of Report.Mode.
const (
	ModeEBPF   = "ebpf"
	ModeKernel = "kernel"
)

// Report reads the present, and adds why the programs are not there, if they
// are not. It tells nothing of Maps.
func (d *Dataplane) Report(context.Context) (Report, error) { return d.report((*reading).counts) }

// Brief is a Report without Peers, Reasons, Suspects and Maps, which take the longer the
// more there are: it tells how packets travel, and what is in the way.
func (d *Dataplane) Brief(context.Context) (Report, error) { return d.report(nil) }

// PeerCounters is a Brief with the counters of Peers, and nothing else of them but who
// they are.
func (d *Dataplane) PeerCounters(context.Context) (Report, error) {
	return d.report((*reading).peerCounters)
}

// report reads a report as far as more does, and adds what only the agent knows.
func (d *Dataplane) report(more func(*reading) error) (Report, error) {
	d.mu.Lock()
	reason, vni, found, firewall, wanted, noXDP := d.reason, d.vni, d.found, d.injection.reason, d.wanted, d.noXDP
	d.mu.Unlock()

	r, err := inspect(d.opts.PinDir, vni, wanted, more)
	if reason != "" {
		r.Reason = reason
	}
	if r.Mode == ModeKernel && d.opts.Accel != "off" {
		r.MissingCapabilities = ebpf.MissingCapabilities()
	}
	if firewall != "" {
		r.Firewall.Reason = firewall
	}
	if !r.XDP.Attached {
		r.XDP.Reason = noXDP
	}
	if found := d.obstacles.List(); len(found) > 0 {
		r.Express.Reasons, r.Express.On = found, false
	}
	for _, l := range found.LeftAlone {
		r.Express.LeftAlone = append(r.Express.LeftAlone, LeftAlone{Veth: l.Name, IP: l.IP, Reason: l.Reason})
	}
	if d.pulse != nil {
		r.Express.Moves = d.pulse.Moves()
	}
	return r, err
}

// Inspect reads a node's dataplane from the pins and the kernel; it needs no
// agent. A vni of 0 is flannel's 1. Where there are no pins, told are the peers that
// DirectRouting may serve: their routes lie past the overlay and bear no mark.
func Inspect(_ context.Context, pinDir string, vni uint32, told []state.Peer) (Report, error) {
	return inspect(pinDir, vni, told, func(r *reading) error { return errors.Join(r.counts(), r.maps()) })
}

// reading is a report that is being read.
type reading struct {
	Report
	told []state.Peer
	path *kernel.Path
	// view is nil where there are no pins that can be read.
	view  *ebpf.View
	now   ebpf.Runtime
	hooks []ebpf.Hook
}

// inspect reads how packets travel, and more, if there is to be more.
func inspect(pinDir string, vni uint32, told []state.Peer, more func(*reading) error) (Report, error) {
	r := &reading{told: told, Report: Report{
		Mode: ModeKernel, Switches: Switches{true, true}, VNI: cmp.Or(vni, 1),
	}}
	r.Overlay, r.OverlayV6 = device(kernel.DeviceName(r.VNI, false)), device(kernel.DeviceName(r.VNI, true))
	r.Port = cmp.Or(vxlanPort(r.Overlay.Name), vxlanPort(r.OverlayV6.Name))

	var err error
	if r.path, err = kernel.Open(slog.New(slog.DiscardHandler)); err != nil {
		return r.Report, err
	}
	defer r.path.Close()
	if r.Firewall, err = inspectFirewall(); err != nil {
		return r.Report, err
	}
	r.view, err = ebpf.OpenView(pinDir)
	switch {
	case err == nil:
		defer r.view.Close()
		err = r.standing()
	case errors.Is(err, ebpf.ErrNoPins):
		r.Reason, err = "no programs are loaded", nil
	default:
		r.Reason = err.Error()
	}
	if more != nil && (err == nil || r.view == nil) {
		err = errors.Join(more(r), err)
	}
	return r.Report, err
}

// standing fills in what is in force, and where the programs sit.
func (r *reading) standing() (err error) {
	if r.now, err = r.view.Runtime(); err != nil {
		return err
	}
	r.Switches, r.SourceCheck = Switches{Express: r.now.Express, Base: r.now.On}, r.now.SourceCheck
	r.Uplink = deviceByIndex(r.now.Uplink)
	r.Uplink.Address = r.now.Local

	if r.hooks, err = r.view.Hooks(); err != nil {
		return err
	}
	r.Hooks = reportHooks(r.hooks)
	r.Mode, r.Reason = judge(r.hooks)
	xdp, err := r.view.XDP()
	if err != nil {
		return err
	}
	r.XDP = XDP{Attached: xdp.Attached, Heard: xdp.Heard, Stripped: xdp.Stripped, Reasons: reportReasons(xdp.Reasons)}
	return r.readExpress()
}

// counts fills in the peers, and what was counted.
func (r *reading) counts() error {
	if r.view == nil {
		entries, err := r.path.Entries(r.VNI, prefixesOf(r.told)...)
		r.Peers = comparePeers(servedDirectly(r.told, entries), entries, families{})
		return err
	}
	if err := r.readPeers(); err != nil {
		return err
	}
	counts, err := r.view.ReasonCounts()
	if err != nil {
		return err
	}
	r.Reasons = reportReasons(counts)
	r.Suspects, err = reportSuspects(r.view)
	return err
}

// readPeers fills in the peers as the programs and the kernel path have them.
func (r *reading) readPeers() error {
	peers, err := r.view.Peers()
	if err != nil {
		return err
	}
	var prefixes []netip.Prefix
	for _, p := range peers {
		prefixes = append(prefixes, p.Prefixes...)
	}
	entries, err := r.path.Entries(r.VNI, prefixes...)
	if err != nil {
		return err
	}
	r.Peers = comparePeers(peers, entries, families{r.now.IPv4, r.now.IPv6})
	r.dropUncounted()
	return nil
}

// peerCounters fills in the peers' counters, and of peers who they are.
func (r *reading) peerCounters() error {
	if r.view == nil {
		return nil
	}
	peers, err := r.view.Peers()
	if err != nil {
		return err
	}
	r.Peers = make([]PeerReport, 0, len(peers))
	for _, p := range peers {
		r.Peers = append(r.Peers, PeerReport{PublicIP: p.PublicIP, Counters: counters(p)})
	}
	r.dropUncounted()
	return nil
}

// dropUncounted leaves out counters where no program is that would count.
func (r *reading) dropUncounted() {
	four, six := attached(r.hooks)
	for i, p := range r.Peers {
		if p.PublicIP.Is4() && !four || !p.PublicIP.Is4() && !six {
			r.Peers[i].Counters = nil
		}
	}
}

// maps fills in what the maps cost.
func (r *reading) maps() (err error) {
	if r.view != nil {
		r.Maps, err = reportMaps(r.view)
	}
	return err
}

// readExpress fills in how the express path stands.
func (r *reading) readExpress() error {
	pulse, err := r.view.Pulse()
	if err != nil {
		return err
	}
	r.Express.Epoch = pulse.Epoch
	if r.Express.Pods, err = r.view.Pods(); err != nil {
		return err
	}
	switch {
	case r.Mode != ModeEBPF:
		r.Express.Reasons = []string{"the programs are not attached"}
	case pulse.Age < 0 || pulse.Age > ebpf.PulseLife:
		r.Express.Reasons = []string{"no agent follows the host's rules"}
	case r.now.Held:
		r.Express.Reasons = []string{"acceleration is held back"}
	case pulse.Held:
		r.Express.Reasons = []string{"the agent holds it back"}
	}
	r.Express.On = r.now.Express && len(r.Express.Reasons) == 0
	return nil
}

// judge tells the mode from what is attached, and why it is not all it should
// be. Programs that only count make no difference.
func judge(hooks []ebpf.Hook) (mode, reason string) {
	var missing []string
	carries := false
	for _, h := range hooks {
		if h.Counts {
			continue
		}
		carries = true
		if h.Kind == "" {
			missing = append(missing, h.Program)
		}
	}
	switch held := heldBy(hooks); {
	case !carries:
		return ModeKernel, "no program carries packets; IPv6 rides the kernel path"
	case len(missing) > 0:
		return ModeKernel, "not attached: " + strings.Join(missing, ", ")
	case len(held) > 0:
		return ModeEBPF, holdReason(held)
	}
	return ModeEBPF, ""
}

// attached tells for which families a program is at its place.
func attached(hooks []ebpf.Hook) (ipv4, ipv6 bool) {
	for _, h := range hooks {
		there := h.Kind != ""
		ipv4, ipv6 = ipv4 || there && !h.Counts, ipv6 || there && h.Counts
	}
	return ipv4, ipv6
}

func reportHooks(hooks []ebpf.Hook) []Hook {
	out := make([]Hook, len(hooks))
	for i, h := range hooks {
		out[i] = Hook{
			Program: h.Program, Device: deviceName(h.Device), Direction: "egress",
			Attached: h.Kind, ID: h.ID, Behind: h.Behind,
		}
		if h.Ingress {
			out[i].Direction = "ingress"
		}
	}
	return out
}

func reportReasons(counts []ebpf.ReasonCount) []ReasonCount {
	out := make([]ReasonCount, len(counts))
	for i, c := range counts {
		out[i] = ReasonCount{Name: c.Name, Help: c.Help, Passed: c.Passed, Dropped: c.Dropped}
	}
	return out
}

func reportSuspects(view *ebpf.View) ([]Suspect, error) {
	suspects, err := view.Suspects()
	out := make([]Suspect, len(suspects))
	for i, s := range suspects {
		out[i] = Suspect{OuterSource: s.Outer, InnerSource: s.Inner, Reason: s.Reason, Packets: s.Packets}
	}
	return out, err
}

func reportMaps(view *ebpf.View) ([]MapInfo, error) {
	maps, err := view.Maps()
	out := make([]MapInfo, len(maps))
	for i, m := range maps {
		out[i] = MapInfo{Name: m.Name, Type: m.Type, Entries: m.Entries, MaxEntries: m.MaxEntries, Bytes: m.Bytes}
	}
	return out, err
}

// prefixesOf lists the peers' prefixes.
func prefixesOf(peers []state.Peer) []netip.Prefix {
	prefixes := make([]netip.Prefix, len(peers))
	for i, p := range peers {
		prefixes[i] = p.Prefix
	}
	return prefixes
}

// servedDirectly are those of the peers that routes past the overlay lead to, as if
// the maps knew them.
func servedDirectly(peers []state.Peer, entries []kernel.Entry) (direct []ebpf.Peer) {
	leads := map[netip.Prefix]netip.Addr{}
	for _, e := range entries {
		if e.Direct {
			leads[e.Prefix] = e.PublicIP
		}
	}
	at := map[netip.Addr]int{}
	for _, p := range peers {
		if leads[p.Prefix] != p.PublicIP || !p.PublicIP.IsValid() {
			continue
		}
		i, ok := at[p.PublicIP]
		if !ok {
			i = len(direct)
			at[p.PublicIP] = i
			direct = append(direct, ebpf.Peer{PublicIP: p.PublicIP, MAC: p.MAC, On: true, Express: true})
		}
		direct[i].Prefixes = append(direct[i].Prefixes, p.Prefix)
	}
	return direct
}

// families are those that programs know peers of.
type families struct{ ipv4, ipv6 bool }

func (f families) has(a netip.Addr) bool { return a.Is4() && f.ipv4 || a.Is6() && f.ipv6 }

// comparePeers joins the peers of the maps with those of the kernel, by public
// IP, and says in words where they differ.
func comparePeers(peers []ebpf.Peer, entries []kernel.Entry, withMap families) []PeerReport {
	byIP, inMap := map[netip.Addr]*PeerReport{}, map[netip.Addr]bool{}
	for _, p := range peers {
		byIP[p.PublicIP] = &PeerReport{
			PublicIP: p.PublicIP, Prefixes: p.Prefixes, MAC: p.MAC, Switches: Switches{Express: p.Express, Base: p.On},
			InMap: p.Carried && p.PublicIP.Is4(), Counters: counters(p),
		}
		inMap[p.PublicIP] = p.Carried
	}
	seen := map[netip.Prefix]bool{}
	for _, e := range entries {
		r := byIP[e.PublicIP]
		if e.Direct {
			// Else it leads somewhere else.
			if r != nil && slices.Contains(r.Prefixes, e.Prefix) {
				seen[e.Prefix] = true
				r.Direct = append(r.Direct, e.Prefix)
			}
			continue
		}
		if r == nil {
			r = &PeerReport{PublicIP: e.PublicIP, MAC: e.MAC, Switches: Switches{true, true}}
			byIP[e.PublicIP] = r
		}
		seen[e.Prefix] = true
		if !slices.Contains(r.Prefixes, e.Prefix) {
			r.Prefixes = append(r.Prefixes, e.Prefix)
			if withMap.has(e.Prefix.Addr()) {
				r.Divergence = append(r.Divergence, fmt.Sprintf("%v is in the kernel but not in the peers map", e.Prefix))
			}
		}
		if inMap[e.PublicIP] && e.MAC != r.MAC {
			r.Divergence = append(r.Divergence, fmt.Sprintf("%v: the kernel has MAC %v, the peers map %v", e.Prefix, e.MAC, r.MAC))
		}
	}
	for _, p := range peers {
		r := byIP[p.PublicIP]
		if !p.Carried && len(r.Direct) < len(p.Prefixes) {
			r.Divergence = append(r.Divergence, noRoom(p))
		}
		for _, prefix := range p.Prefixes {
			if !seen[prefix] {
				r.Divergence = append(r.Divergence, fmt.Sprintf("%v is in the peers map but the kernel has no complete route, neighbour and FDB entry for it", prefix))
			}
		}
	}
	out := make([]PeerReport, 0, len(byIP))
	for _, r := range byIP {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b PeerReport) int { return a.PublicIP.Compare(b.PublicIP) })
	return out
}

// noRoom says what becomes of a peer that the maps have no room for.
func noRoom(p ebpf.Peer) string {
	if p.PublicIP.Is4() {
		return "the accelerator has no room for it; it rides the kernel path"
	}
	return "the accelerator has no room for it; its packets are not counted"
}

func counters(p ebpf.Peer) []PathCounters {
	if !p.Carried {
		return nil
	}
	out := make([]PathCounters, len(p.Paths))
	for i, c := range p.Paths {
		out[i] = PathCounters{
			Path:      ebpf.PathNames[i],
			TxPackets: c.TxPackets, TxBytes: c.TxBytes, RxPackets: c.RxPackets, RxBytes: c.RxBytes,
		}
	}
	return out
}

// device describes a network device, by name; a missing one has no name.
func device(name string) Device { return describe(netlink.LinkByName(name)) }

// vxlanPort is the UDP destination port of a VXLAN device, 0 when there is no
// such device.
func vxlanPort(name string) uint16 {
	link, err := netlink.LinkByName(name)
	if vxlan, ok := link.(*netlink.Vxlan); ok && err == nil {
		return uint16(vxlan.Port)
	}
	return 0
}

func deviceByIndex(index int) Device { return describe(netlink.LinkByIndex(index)) }

func deviceName(index int) string {
	link, err := netlink.LinkByIndex(index)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}

func describe(link netlink.Link, err error) Device {
	if err != nil {
		return Device{}
	}
	a := link.Attrs()
	d := Device{Name: a.Name, Index: a.Index, MTU: a.MTU}
	if len(a.HardwareAddr) == len(d.MAC) {
		d.MAC = state.MAC(a.HardwareAddr)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil || len(addrs) == 0 {
		return d
	}
	if addr, ok := netip.AddrFromSlice(addrs[0].IP); ok {
		d.Address = addr.Unmap()
	}
	return d
}
