//go:build linux

package ebpf

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
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
	// IPv4 and IPv6 tell for which peers there are programs, or should be.
	IPv4, IPv6 bool
	Overlay6   int // interface index; the device may be gone
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
		// Before the first Sync neither is there: then it is IPv4 that is missing.
		IPv4:     now.Overlay != 0 || now.Overlay6 == 0,
		IPv6:     now.Overlay6 != 0,
		Overlay6: int(now.Overlay6),
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

// Peer is a peer node as the programs know it. One of IPv6 is counted and that is
// all: its packets ride the kernel path, and it has no switches.
type Peer struct {
	PublicIP netip.Addr
	Prefixes []netip.Prefix
	MAC      state.MAC
	// Carried is false for a peer that only the source check knows, or of IPv6
	// one that is not counted.
	Carried     bool
	On, Express bool // the switches
	Paths       [weftPacketPathPATH_COUNT]PathCounters
}

// PathCounters count inner packets and IP bytes over one path.
type PathCounters struct{ TxPackets, TxBytes, RxPackets, RxBytes uint64 }

// add adds what a CPU has counted.
func (c *PathCounters) add(cpu weftPathCounters) {
	c.TxPackets += cpu.TxPackets
	c.TxBytes += cpu.TxBytes
	c.RxPackets += cpu.RxPackets
	c.RxBytes += cpu.RxBytes
}

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
	entries6, err := readAll[weftPrefix6, weftPeer6](v.maps[weftMapPeers6])
	if err != nil {
		return nil, fmt.Errorf("reading map peers6: %w", err)
	}
	peers, err := v.join(convert(entries, fromPrefix, fromPeer))
	if err != nil {
		return nil, err
	}
	peers6, err := v.join6(convert(entries6, fromPrefix6, fromPeer6))
	return append(peers, peers6...), err // IPv4 compares less
}

// join makes a peer of all prefixes that lead to one node.
func (v *View) join(entries map[netip.Prefix]member) ([]Peer, error) {
	slots := slotsIn(maps.Values(entries), func(m member) uint32 { return m.slot })
	switches, err := readSwitches(v.maps[weftMapPeerStates], slots)
	if err != nil {
		return nil, err
	}
	counted, err := readPaths(v.maps[weftMapPeerCounters], slots, func(sum *paths, cpu weftCounters) {
		for i, c := range cpu.Path {
			sum[i].add(c)
		}
	})
	if err != nil {
		return nil, err
	}
	return joinPeers(entries, func(m member) (p Peer, err error) {
		var off uint32
		if int(m.slot) < min(len(switches), len(counted)) {
			p.Carried, p.Paths, off = true, counted[m.slot], switches[m.slot]
		} else if off, err = v.switchOf(m.remote); err != nil {
			return p, err
		}
		p.On, p.Express = off&Base == 0, off&Express == 0
		return p, nil
	})
}

// switchOf reads the switch of a peer that has no slot: it is kept for when it gets
// one.
func (v *View) switchOf(remote netip.Addr) (off uint32, err error) {
	if err := v.maps[weftMapSwitches].Lookup(toBE32(remote), &off); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, fmt.Errorf("reading map switches: %w", err)
	}
	return off, nil
}

// join6 is join for IPv6.
func (v *View) join6(entries map[netip.Prefix]member) ([]Peer, error) {
	slots := slotsIn(maps.Values(entries), func(m member) uint32 { return m.slot })
	counted, err := readPaths(v.maps[weftMapPeer6Counters], slots, func(sum *paths, cpu weftPathCounters) {
		sum[weftPacketPathPATH_KERNEL].add(cpu)
	})
	if err != nil {
		return nil, err
	}
	return joinPeers(entries, func(m member) (Peer, error) {
		p := Peer{On: true, Express: true}
		if int(m.slot) < len(counted) {
			p.Carried, p.Paths = true, counted[m.slot]
		}
		return p, nil
	})
}

// paths are the counters of one peer.
type paths = [weftPacketPathPATH_COUNT]PathCounters

// readPaths reads the counters of the first n slots, the sums over all CPUs.
func readPaths[V any](m *ebpf.Map, n int, add func(sum *paths, cpu V)) ([]paths, error) {
	var counted []paths
	err := readArray(m, n, func(cpus []V) {
		var sum paths
		for _, cpu := range cpus {
			add(&sum, cpu)
		}
		counted = append(counted, sum)
	})
	if err != nil {
		return nil, fmt.Errorf("reading counters of peers: %w", err)
	}
	return counted, nil
}

// joinPeers makes a peer of all prefixes that lead to one node, ordered by public IP.
// read tells the rest of it.
func joinPeers(entries map[netip.Prefix]member, read func(member) (Peer, error)) ([]Peer, error) {
	at := make(map[netip.Addr]int, len(entries))
	peers := make([]Peer, 0, len(entries))
	for prefix, m := range entries {
		i, there := at[m.remote]
		if !there {
			p, err := read(m)
			if err != nil {
				return nil, err
			}
			p.PublicIP, p.MAC = m.remote, m.mac
			i, at[m.remote] = len(peers), len(peers)
			peers = append(peers, p)
		}
		peers[i].Prefixes = append(peers[i].Prefixes, prefix)
	}
	for _, p := range peers {
		slices.SortFunc(p.Prefixes, netip.Prefix.Compare)
	}
	slices.SortFunc(peers, func(a, b Peer) int { return a.PublicIP.Compare(b.PublicIP) })
	return peers, nil
}

// ReasonCount counts packets for one reason.
type ReasonCount struct {
	Reason
	Passed, Dropped uint64
}

// ReasonCounts reads the counters of all reasons.
func (v *View) ReasonCounts() ([]ReasonCount, error) { return countReasons(v.maps[weftMapReasons]) }

func countReasons(m *ebpf.Map) ([]ReasonCount, error) {
	var counts []ReasonCount
	for i := range Reasons {
		if i == int(weftReasonREASON_NONE) {
			continue
		}
		count, err := countReason(m, i)
		if err != nil {
			return nil, err
		}
		counts = append(counts, count)
	}
	return counts, nil
}

// countReason adds up what the CPUs have counted of a reason.
func countReason(m *ebpf.Map, reason int) (ReasonCount, error) {
	count := ReasonCount{Reason: Reasons[reason]}
	var perCPU []weftReasonCounters
	if err := m.Lookup(uint32(reason), &perCPU); err != nil {
		return count, fmt.Errorf("reading counters of reason %s: %w", count.Name, err)
	}
	for _, cpu := range perCPU {
		count.Passed += cpu.Passed
		count.Dropped += cpu.Dropped
	}
	return count, nil
}

// SourceFailures counts the packets that failed the source check.
func (v *View) SourceFailures() (passed, dropped uint64, err error) {
	for i, reason := range Reasons {
		if !strings.HasPrefix(reason.Name, "source_") {
			continue
		}
		count, err := countReason(v.maps[weftMapReasons], i)
		if err != nil {
			return 0, 0, err
		}
		passed += count.Passed
		dropped += count.Dropped
	}
	return passed, dropped, nil
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
	Counts  bool     // it only counts IPv6 packets
	Behind  []string // what would not see the packets that the program takes
}

// Hooks looks where the programs sit.
func (v *View) Hooks() ([]Hook, error) {
	r, err := v.Runtime()
	if err != nil {
		return nil, err
	}
	var places []site
	if r.IPv4 {
		places = sites(r.Uplink, r.Overlay)
	}
	if r.IPv6 {
		places = append(places, sites6(r.Overlay6)...)
	}
	var hooks []Hook
	for _, s := range places {
		at, err := v.find(s)
		if err != nil {
			return nil, err
		}
		h := Hook{Program: s.program, Device: s.device, Ingress: s.ingress, Kind: at.kind, ID: uint32(at.id), Counts: slices.Contains(sites6(s.device), s)}
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
