//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// load makes the objects, with XDP if that is wanted and the kernel takes it.
func (a *Accelerator) load() error {
	types := btf.NewCache()
	err := a.loadMost(types)
	if err == nil || !a.opts.XDP {
		return err
	}
	a.opts.XDP, a.refusedXDP = false, fmt.Sprintf("the kernel refuses the programs with XDP (%v)", err)
	return a.loadMost(types)
}

// Try loads the programs and lets go of them again: what an agent would meet. It says
// what keeps them from express, and the error is what keeps all of them away.
func Try(vni uint32, port uint16) (noExpress string, err error) {
	dir, err := os.MkdirTemp("", "weft-try-") // nothing is pinned there
	if err != nil {
		return "", err
	}
	defer os.Remove(dir)
	a := newAccelerator(Options{PinDir: dir, MaxPeers: 1, VNI: vni, Port: port})
	if err := a.load(); err != nil {
		return "", explain(err)
	}
	return a.noExpress, a.objects.Close()
}

// loadMost makes the objects, with express if the kernel lets programs ask
// conntrack, else without.
func (a *Accelerator) loadMost(types *btf.Cache) error {
	a.noExpress = missingFunctions(types)
	a.missed = a.noExpress != ""
	if !a.missed {
		err := a.loadWith(true, types)
		if err == nil {
			return nil
		}
		a.noExpress = fmt.Sprintf("the kernel refuses the programs with express (%v)", err)
	}
	return a.loadWith(false, types)
}

// loadWith makes the objects: spec → adjust → take over pinned maps → load.
// types keeps what was read of the kernel's types, which takes long.
func (a *Accelerator) loadWith(express bool, types *btf.Cache) error {
	spec, err := a.spec()
	if err != nil {
		return fmt.Errorf("reading the compiled programs: %w", err)
	}
	if err := adjust(spec, a.opts, express); err != nil {
		return err
	}
	pinned, err := takeOver(spec, a.opts.PinDir)
	if err != nil {
		return err
	}
	defer closeAll(pinned)
	a.inherited = pinned[weftMapRuntime] != nil && pinned[weftMapNotesRead] != nil
	opts := ebpf.CollectionOptions{MapReplacements: pinned, Cache: types}
	if opts.Programs.KernelTypes, err = insteadOfNone(types); err != nil {
		return err
	}
	if err := spec.LoadAndAssign(&a.objects, &opts); err != nil {
		return fmt.Errorf("loading programs: %w", err)
	}
	return nil
}

// insteadOfNone is nil where the kernel tells its types, else it has none: only
// express needs to know them.
func insteadOfNone(types *btf.Cache) (*btf.Spec, error) {
	if _, err := types.Kernel(); err == nil {
		return nil, nil
	}
	empty, err := btf.NewBuilder(nil, nil)
	if err != nil {
		return nil, fmt.Errorf("making an empty BTF: %w", err)
	}
	return empty.Spec()
}

// conntrackFunctions are what express asks of the kernel.
var conntrackFunctions = []string{"bpf_skb_ct_lookup", "bpf_ct_release", "bpf_ct_change_timeout"}

// MissingFunctions says why the kernel can't be asked for conntrack entries, or
// nothing. That changes when a module is loaded.
func MissingFunctions() string { return missingFunctions(btf.NewCache()) }

func missingFunctions(types *btf.Cache) string {
	for _, name := range conntrackFunctions {
		if !hasFunction(types, name) {
			return fmt.Sprintf("the kernel has no function %s for BPF programs (Linux 6.0 and conntrack, loaded as a module or built in, with BTF)", name)
		}
	}
	return ""
}

// hasFunction looks for a function in the kernel and its modules.
func hasFunction(types *btf.Cache, name string) bool {
	var function *btf.Func
	if kernel, err := types.Kernel(); err == nil && kernel.TypeByName(name, &function) == nil {
		return true
	}
	modules, err := types.Modules()
	if err != nil {
		return false
	}
	for _, module := range modules {
		if spec, err := types.Module(module); err == nil && spec.TypeByName(name, &function) == nil {
			return true
		}
	}
	return false
}

// NoExpress says why the programs can't do express; empty when they can.
func (a *Accelerator) NoExpress() string { return a.noExpress }

// MissedFunctions tells that this is for what MissingFunctions said.
func (a *Accelerator) MissedFunctions() bool { return a.missed }

// adjust sets what is fixed for the life of the programs, and the map sizes.
func adjust(spec *ebpf.CollectionSpec, opts Options, express bool) error {
	if err := spec.Variables["express"].Set(express); err != nil {
		return fmt.Errorf("setting express: %w", err)
	}
	if err := spec.Variables["with_xdp"].Set(opts.XDP); err != nil {
		return fmt.Errorf("setting with_xdp: %w", err)
	}
	if err := spec.Variables["vni"].Set(opts.VNI); err != nil {
		return fmt.Errorf("setting the VNI: %w", err)
	}
	if err := spec.Variables["port"].Set(opts.Port); err != nil {
		return fmt.Errorf("setting the port: %w", err)
	}
	if !opts.XDP {
		passAll(spec.Programs[weftProgUplinkXdp])
	}
	size(spec, opts)
	return nil
}

// passAll makes an XDP program that nobody wants cost nothing.
func passAll(program *ebpf.ProgramSpec) {
	const xdpPass = 2
	first := program.Instructions[0]
	program.Instructions = asm.Instructions{asm.Mov.Imm(asm.R0, xdpPass).WithMetadata(first.Metadata), asm.Return()}
}

// size sets the sizes of the maps that have an entry per slot, and of those that
// have nothing to hold.
func size(spec *ebpf.CollectionSpec, opts Options) {
	slots, slots6 := uint32(opts.MaxPeers), uint32(opts.MaxPeers)
	if opts.NoIPv4 {
		slots = 1
		spec.Maps[weftMapWitnesses].MaxEntries = 1
	}
	if !opts.XDP {
		spec.Maps[weftMapLeftFlows].MaxEntries = 1
	}
	if !opts.IPv6 {
		slots6 = 1
		spec.Maps[weftMapPeers6].MaxEntries = 1
		spec.Maps[weftMapNodes6].MaxEntries = 1
	}
	spec.Maps[weftMapPeerStates].MaxEntries = slots
	spec.Maps[weftMapPeerCounters].MaxEntries = slots
	spec.Maps[weftMapPeer6Counters].MaxEntries = slots6
}

// takeOver opens the pinned maps that are as spec wants them. Others are left
// behind: new ones take their pins once the new programs are attached.
func takeOver(spec *ebpf.CollectionSpec, dir string) (map[string]*ebpf.Map, error) {
	pinned := map[string]*ebpf.Map{}
	for name, want := range spec.Maps {
		if isData(name) {
			continue
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			closeAll(pinned)
			return nil, fmt.Errorf("opening pinned map %s: %w", name, err)
		}
		if want.Compatible(m) != nil {
			m.Close()
			continue
		}
		pinned[name] = m
	}
	return pinned, nil
}

// isData tells the sections of global variables, which are never pinned.
func isData(name string) bool { return name[0] == '.' }

func closeAll(ms map[string]*ebpf.Map) {
	for m := range maps.Values(ms) {
		m.Close()
	}
}

// pinMaps makes the maps findable by name. A map of an older make is replaced
// by rename, so that the name always leads to one.
func (a *Accelerator) pinMaps() error {
	for name, m := range a.namedMaps() {
		path := filepath.Join(a.opts.PinDir, name)
		if samePin(path, m) {
			continue
		}
		clone, err := m.Clone() // a Map remembers where it is pinned; ours shall not move
		if err != nil {
			return fmt.Errorf("pinning map %s: %w", name, err)
		}
		err = errors.Join(replacePin(clone, path), clone.Close())
		if err != nil {
			return fmt.Errorf("pinning map %s: %w", name, err)
		}
	}
	return nil
}

// replacePin pins m at path, in one step with the removal of what was there.
func replacePin(m *ebpf.Map, path string) error {
	fresh := path + "-new" // a bpffs takes no names with a dot
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := m.Pin(fresh); err != nil {
		return err
	}
	return os.Rename(fresh, path)
}

// samePin tells whether path leads to m.
func samePin(path string, m *ebpf.Map) bool {
	have, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return false
	}
	defer have.Close()
	a, errA := have.Info()
	b, errB := m.Info()
	if errA != nil || errB != nil {
		return false
	}
	idA, okA := a.ID()
	idB, okB := b.ID()
	return okA && okB && idA == idB
}

// namedMaps are the maps by the name of their pin.
func (a *Accelerator) namedMaps() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		weftMapDevices:       a.objects.Devices,
		weftMapDriverReasons: a.objects.DriverReasons,
		weftMapEndpoints:     a.objects.Endpoints,
		weftMapHeartbeat:     a.objects.Heartbeat,
		weftMapLeftFlows:     a.objects.LeftFlows,
		weftMapNewcomers:     a.objects.Newcomers,
		weftMapNodes:         a.objects.Nodes,
		weftMapNodeAddresses: a.objects.NodeAddresses,
		weftMapNodes6:        a.objects.Nodes6,
		weftMapNotesRead:     a.objects.NotesRead,
		weftMapPeer6Counters: a.objects.Peer6Counters,
		weftMapPeers6:        a.objects.Peers6,
		weftMapPeerCounters:  a.objects.PeerCounters,
		weftMapPeerStates:    a.objects.PeerStates,
		weftMapPeers:         a.objects.Peers,
		weftMapReasons:       a.objects.Reasons,
		weftMapRoutes:        a.objects.Routes,
		weftMapRuntime:       a.objects.Runtime,
		weftMapRxAggregates:  a.objects.RxAggregates,
		weftMapSuspects:      a.objects.Suspects,
		weftMapSwitches:      a.objects.Switches,
		weftMapTxAggregates:  a.objects.TxAggregates,
		weftMapWitnesses:     a.objects.Witnesses,
	}
}
