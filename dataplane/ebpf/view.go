//go:build linux

package ebpf

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/weft-net/weft/dataplane/state"
)

// ErrNoPins says that no accelerator was ever loaded, or that it was removed.
var ErrNoPins = errors.New("no pins")

// View reads the pins of an accelerator, with or without an agent.
type View struct {
	dir  string
	maps map[string]*ebpf.Map
}

// OpenView opens the pins under dir. Without pins the error is ErrNoPins.
func OpenView(dir string) (*View, error) {
	spec, err := loadWeft()
	if err != nil {
		return nil, fmt.Errorf("reading the compiled programs: %w", err)
	}
	v := &View{dir: dir, maps: map[string]*ebpf.Map{}}
	for name := range spec.Maps {
		if isData(name) {
			continue
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if errors.Is(err, os.ErrNotExist) {
			v.Close()
			return nil, fmt.Errorf("%w: %s has no map %s", ErrNoPins, dir, name)
		}
		if err != nil {
			v.Close()
			return nil, explain(fmt.Errorf("opening pinned map %s: %w", name, err))
		}
		if m.ValueSize() != spec.Maps[name].ValueSize || m.KeySize() != spec.Maps[name].KeySize {
			m.Close()
			v.Close()
			return nil, fmt.Errorf("map %s was made by another version of weft; use that version's commands", name)
		}
		v.maps[name] = m
	}
	return v, nil
}

// Close lets go of the pins.
func (v *View) Close() { closeAll(v.maps) }

// Runtime is what is in force.
type Runtime struct {
	Local           netip.Addr
	MAC             state.MAC
	On, Express     bool // the switches
	Held            bool
	SourceCheck     string
	Uplink, Overlay int // interface indexes; 0 when the device is gone
}

// Runtime reads what is in force.
func (v *View) Runtime() (Runtime, error) {
	var now weftInForce
	if err := v.maps[weftMapRuntime].Lookup(uint32(0), &now); err != nil {
		return Runtime{}, fmt.Errorf("reading map runtime: %w", err)
	}
	r := Runtime{
		Local:   fromBE32(now.Local),
		MAC:     now.Mac,
		On:      now.Off&Base == 0,
		Express: now.Off&Express == 0,
		Held:    now.Held != 0,
	}
	if int(now.SourceCheck) < len(SourceChecks) {
		r.SourceCheck = SourceChecks[now.SourceCheck]
	}
	r.Uplink = v.device(weftDeviceDEVICE_UPLINK)
	r.Overlay = v.device(weftDeviceDEVICE_OVERLAY)
	return r, nil
}

func (v *View) device(key weftDevice) int {
	var index uint32
	if v.maps[weftMapDevices].Lookup(uint32(key), &index) != nil {
		return 0
	}
	return int(index)
}

// PulseView is what the agent has last told the programs.
type PulseView struct {
	Pulse
	// Age is how long ago; negative when there was none.
	Age time.Duration
}

// Pulse reads the agent's last sign of life.
func (v *View) Pulse() (PulseView, error) {
	var have weftPulse
	if err := v.maps[weftMapHeartbeat].Lookup(uint32(0), &have); err != nil {
		return PulseView{}, fmt.Errorf("reading map heartbeat: %w", err)
	}
	p := PulseView{Pulse: Pulse{Epoch: have.Epoch, Held: have.Held != 0}, Age: -1}
	if have.Beat != 0 {
		p.Age = time.Duration(coarseNow() - have.Beat)
	}
	return p, nil
}

// Pods reads how many addresses of pods on this node are served.
func (v *View) Pods() (int, error) {
	n, err := countEntries(v.maps[weftMapEndpoints])
	if err != nil {
		return 0, fmt.Errorf("reading map endpoints: %w", err)
	}
	return n, nil
}

// Peer is a peer node as the programs know it.
type Peer struct {
	PublicIP netip.Addr
	Prefixes []netip.Prefix
	MAC      state.MAC
	// Carried is false for a peer that only the source check knows.
	Carried     bool
	On, Express bool // the switches
	Paths       [weftPacketPathPATH_COUNT]PathCounters
}

// PathCounters count inner packets and IP bytes over one path.
type PathCounters struct{ TxPackets, TxBytes, RxPackets, RxBytes uint64 }

// PathNames are the names of the paths, by index into Peer.Paths.
var PathNames = [weftPacketPathPATH_COUNT]string{
	weftPacketPathPATH_EXPRESS: "express",
	weftPacketPathPATH_BASE:    "base",
	weftPacketPathPATH_KERNEL:  "kernel",
}

// Peers reads all peers with their counters, ordered by public IP.
func (v *View) Peers() ([]Peer, error) {
	entries, err := readAll[weftPrefix, weftPeer](v.maps[weftMapPeers])
	if err != nil {
		return nil, fmt.Errorf("reading map peers: %w", err)
	}
	byIP := map[uint32]*Peer{}
	for key, value := range entries {
		peer := byIP[value.Remote]
		if peer == nil {
			if peer, err = v.peer(value); err != nil {
				return nil, err
			}
			byIP[value.Remote] = peer
		}
		peer.Prefixes = append(peer.Prefixes, fromPrefix(key))
	}
	peers := make([]Peer, 0, len(byIP))
	for _, p := range byIP {
		slices.SortFunc(p.Prefixes, func(a, b netip.Prefix) int {
			return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
		})
		peers = append(peers, *p)
	}
	slices.SortFunc(peers, func(a, b Peer) int { return a.PublicIP.Compare(b.PublicIP) })
	return peers, nil
}

func (v *View) peer(value weftPeer) (*Peer, error) {
	if value.Slot == noSlot {
		var off uint32 // kept for when it gets a slot
		if err := v.maps[weftMapSwitches].Lookup(value.Remote, &off); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil, fmt.Errorf("reading map switches: %w", err)
		}
		return &Peer{PublicIP: fromBE32(value.Remote), MAC: value.Mac, On: off&Base == 0, Express: off&Express == 0}, nil
	}
	var (
		status weftPeerState
		perCPU []weftCounters
	)
	if err := v.maps[weftMapPeerStates].Lookup(value.Slot, &status); err != nil {
		return nil, fmt.Errorf("reading peer state %d: %w", value.Slot, err)
	}
	if err := v.maps[weftMapPeerCounters].Lookup(value.Slot, &perCPU); err != nil {
		return nil, fmt.Errorf("reading peer counters %d: %w", value.Slot, err)
	}
	p := &Peer{
		PublicIP: fromBE32(value.Remote),
		MAC:      value.Mac,
		Carried:  true,
		On:       status.Off&Base == 0,
		Express:  status.Off&Express == 0,
	}
	for _, cpu := range perCPU {
		for i, c := range cpu.Path {
			p.Paths[i].TxPackets += c.TxPackets
			p.Paths[i].TxBytes += c.TxBytes
			p.Paths[i].RxPackets += c.RxPackets
			p.Paths[i].RxBytes += c.RxBytes
		}
	}
	return p, nil
}

// ReasonCount counts packets for one reason.
type ReasonCount struct {
	Reason
	Passed, Dropped uint64
}

// ReasonCounts reads the counters of all reasons.
func (v *View) ReasonCounts() ([]ReasonCount, error) {
	var counts []ReasonCount
	for i, reason := range Reasons {
		if i == int(weftReasonREASON_NONE) {
			continue
		}
		var perCPU []weftReasonCounters
		if err := v.maps[weftMapReasons].Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("reading counters of reason %s: %w", reason.Name, err)
		}
		count := ReasonCount{Reason: reason}
		for _, cpu := range perCPU {
			count.Passed += cpu.Passed
			count.Dropped += cpu.Dropped
		}
		counts = append(counts, count)
	}
	return counts, nil
}

// Suspect is a sender that failed the source check.
type Suspect struct {
	Outer, Inner netip.Addr
	Reason       string
	Packets      uint64
}

// Suspects reads the latest senders that failed the source check, those with
// most packets first.
func (v *View) Suspects() ([]Suspect, error) {
	entries, err := readAll[weftSuspect, uint64](v.maps[weftMapSuspects])
	if err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, fmt.Errorf("reading map suspects: %w", err)
	}
	var suspects []Suspect
	for key, packets := range entries {
		s := Suspect{Outer: fromBE32(key.Outer), Inner: fromBE32(key.Inner), Packets: packets}
		if int(key.Reason) < len(Reasons) {
			s.Reason = Reasons[key.Reason].Name
		}
		suspects = append(suspects, s)
	}
	slices.SortFunc(suspects, func(a, b Suspect) int {
		return cmp.Or(cmp.Compare(b.Packets, a.Packets), a.Outer.Compare(b.Outer), a.Inner.Compare(b.Inner))
	})
	return suspects, nil
}

// Hook is a place where a program sits or should sit.
type Hook struct {
	Program string
	Device  int // interface index; 0 when unknown
	Ingress bool
	Kind    string // tcx, clsact; empty when the program is not there
	ID      uint32
	Behind  []string // what would not see the packets that the program takes
}

// Hooks looks where the programs sit.
func (v *View) Hooks() ([]Hook, error) {
	r, err := v.Runtime()
	if err != nil {
		return nil, err
	}
	var hooks []Hook
	for _, s := range sites(r.Uplink, r.Overlay) {
		at, err := v.find(s)
		if err != nil {
			return nil, err
		}
		h := Hook{Program: s.program, Device: s.device, Ingress: s.ingress, Kind: at.kind, ID: uint32(at.id)}
		if at.kind != "" && takesPackets(s) {
			if h.Behind, err = behind(at); err != nil {
				return nil, err
			}
		}
		hooks = append(hooks, h)
	}
	return hooks, nil
}

// takesPackets tells the programs that redirect, so that whoever sits behind
// them at the same place doesn't see those packets.
func takesPackets(s site) bool { return s.program == "uplink_in" || s.program == "overlay_out" }

// find looks for our program at s; kind is empty when it isn't there.
func (v *View) find(s site) (attachment, error) {
	if s.device == 0 {
		return attachment{site: s}, nil
	}
	l, err := link.LoadPinnedLink(filepath.Join(linksDir(v.dir), s.program), nil)
	if err == nil {
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return attachment{}, fmt.Errorf("asking for link %s: %w", s.program, err)
		}
		if tcx := info.TCX(); tcx != nil && int(tcx.Ifindex) == s.device {
			return attachment{s, "tcx", info.Program}, nil
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return attachment{}, fmt.Errorf("opening pinned link %s: %w", s.program, err)
	}
	filter, err := ourFilter(s)
	if err != nil || filter == nil {
		return attachment{site: s}, err
	}
	return attachment{s, "clsact", ebpf.ProgramID(filter.Id)}, nil
}

// MapInfo is one map and what it costs.
type MapInfo struct {
	Name       string
	Type       string
	Entries    int
	MaxEntries uint32
	Bytes      uint64 // when full
}

// Maps lists the maps, the largest first.
func (v *View) Maps() ([]MapInfo, error) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, err
	}
	var infos []MapInfo
	for name, m := range v.maps {
		entries, err := countEntries(m)
		if err != nil {
			return nil, fmt.Errorf("counting the entries of map %s: %w", name, err)
		}
		infos = append(infos, MapInfo{
			Name: name, Type: m.Type().String(), Entries: entries, MaxEntries: m.MaxEntries(),
			Bytes: mapBytes(m.Type(), m.KeySize(), m.ValueSize(), m.MaxEntries(), cpus),
		})
	}
	slices.SortFunc(infos, func(a, b MapInfo) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.Name, b.Name))
	})
	return infos, nil
}

// countEntries counts what is in a map. An array always has all its entries.
func countEntries(m *ebpf.Map) (int, error) {
	if m.Type() == ebpf.Array || m.Type() == ebpf.PerCPUArray {
		return int(m.MaxEntries()), nil
	}
	entries := 0
	for key := any(nil); ; entries++ {
		next, err := m.NextKeyBytes(key)
		if err != nil || next == nil || entries == int(m.MaxEntries()) {
			return entries, err
		}
		key = next
	}
}
