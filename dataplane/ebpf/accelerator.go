//go:build linux

// Package ebpf is the accelerator: BPF programs over the kernel path that
// encapsulate and strip what they fully understand, and count all of it.
package ebpf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"

	"github.com/weft-net/weft/dataplane/state"
)

// Options are fixed for the life of an Accelerator.
type Options struct {
	// PinDir is the directory for pins, on a bpffs: maps lie in it, links in
	// its subdirectory links.
	PinDir string
	// MaxPeers is how many peer nodes fit, of each address family as many. An
	// IPv4 one that no longer fits rides the kernel path, an IPv6 one is not
	// counted.
	MaxPeers int
	// VNI and Port are the overlay's.
	VNI  uint32
	Port uint16
	// IPv6 has the packets of IPv6 peers counted; they ride the kernel path.
	IPv6 bool
	// NoIPv4 leaves IPv4 without programs. Those of an agent before us go.
	NoIPv4 bool
	// XDP has packets stripped in the uplink's driver, where that can be.
	XDP bool
}

// Accelerator holds the loaded programs and the maps of one node.
type Accelerator struct {
	opts    Options
	objects weftObjects
	// slots are those of IPv4 peers, slots6 of IPv6 ones.
	slots, slots6 slots
	// noExpress says why the programs can't do express; empty when they can.
	noExpress string
	missed    bool
	// peerAddresses and own are the addresses that nodes answer on, and
	// nodeAddresses what the map holds, nil when that is not known.
	peerAddresses, nodeAddresses map[uint32]uint32
	own                          []netip.Addr
	// veths are those that SyncPods has last served.
	veths map[int]bool
	// inherited tells that an uplink_xdp that is attached has our maps, noXDP why
	// there is none, refusedXDP if that is the kernel's doing, and uplinkIn where
	// uplink_in sits, if the last Sync attached it.
	inherited         bool
	noXDP, refusedXDP string
	uplinkIn          attachment
	// placed are the programs that were put at their places.
	placed map[site]attachment
	// xdpSeen is what the last Sync found that matters to uplink_xdp.
	xdpSeen string
	// swept tells that programs that are not wanted were looked for on all
	// devices.
	swept bool

	// spec reads the compiled programs, attach puts one at its place and pins the
	// link; tests inject failures.
	spec   func() (*ebpf.CollectionSpec, error)
	attach func(site, *ebpf.Program, string) (attachment, error)
}

func newAccelerator(opts Options) *Accelerator {
	return &Accelerator{opts: opts, placed: map[site]attachment{}, spec: loadWeft, attach: attachProgram}
}

// Desired is what the programs should know and where they should sit.
type Desired struct {
	// Uplink, Overlay and Overlay6 are interface indexes in the current
	// namespace; the latter two are the overlay devices of IPv4 and IPv6. While
	// there is none all that concerns its family is left as it is.
	Uplink, Overlay, Overlay6 int
	// OverlayMTU is the IPv4 overlay device's.
	OverlayMTU int
	// Local is the IPv4 underlay address that our packets are sent from and that
	// peers' packets arrive at, MAC our IPv4 overlay device's address.
	Local netip.Addr
	MAC   state.MAC
	// SourceCheck is off, observe or enforce.
	SourceCheck string
	// RoutesByMark tells that the host has routing rules that look at marks.
	RoutesByMark bool
	// Held tells that acceleration must be held back.
	Held bool
	// Peers are the peers that the kernel path serves.
	Peers []state.Peer
	// Known are peers that it does not serve yet: their packets pass the source
	// check, are left to the kernel and not counted.
	Known []state.Peer
	// Aliases are further addresses of nodes among these, from which their
	// packets may come too.
	Aliases []state.Alias
}

// Open loads the programs and maps. Maps of an agent before us are taken over
// where they are of the same make, so that counters and switches go on. Nothing
// is attached and no pin is touched before the first Sync.
func Open(opts Options) (*Accelerator, error) {
	if err := EnsureBPFFS(opts.PinDir); err != nil {
		return nil, err
	}
	a := newAccelerator(opts)
	if err := a.load(); err != nil {
		return nil, explain(err)
	}
	if err := a.recoverSlots(); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// Sync brings maps and attachments to what is desired. It returns the peers
// that did not fit; they ride the kernel path. The order is: what the programs
// need to know, then the programs, then the pins that let others find them.
func (a *Accelerator) Sync(d Desired) (misfits Misfits, err error) {
	unlock, err := lock(a.opts.PinDir)
	if err != nil {
		return misfits, err
	}
	defer unlock()

	if d.Overlay != 0 || a.opts.NoIPv4 {
		if misfits, err = a.syncIPv4(d); err != nil {
			return misfits, err
		}
	}
	if d.Overlay6 != 0 || !a.opts.IPv6 {
		uncounted, err := a.syncIPv6(d)
		misfits.add(uncounted)
		if err != nil {
			return misfits, err
		}
	}
	if err := a.withdrawStaleXDP(d); err != nil {
		return misfits, err
	}
	if err := a.syncAttachments(d); err != nil {
		return misfits, explain(err)
	}
	return misfits, errors.Join(a.syncXDP(d), a.pinMaps())
}

// syncIPv4 tells the programs what they need to know. With NoIPv4 there is
// nothing to know, and the maps are emptied.
func (a *Accelerator) syncIPv4(d Desired) (Misfits, error) {
	if a.opts.NoIPv4 {
		d = Desired{}
	}
	placed, err := a.syncPeers(d)
	if err != nil {
		return placed.misfits, err
	}
	a.peerAddresses = peerAddresses(ofFamily(d.Peers, netip.Addr.Is4), ofFamily(d.Known, netip.Addr.Is4))
	a.addAliasAddresses(d.Aliases)
	if err := a.syncNodeAddresses(); err != nil {
		return placed.misfits, err
	}
	if err := a.syncDevices(d); err != nil {
		return placed.misfits, err
	}
	if err := a.syncRuntime(func(f *weftInForce) { f.setIPv4(d, placed.lengths) }); err != nil {
		return placed.misfits, err
	}
	return placed.misfits, a.syncSwitches()
}

// syncIPv6 tells the programs whom to count. Without IPv6 that is nobody.
func (a *Accelerator) syncIPv6(d Desired) (Misfits, error) {
	if !a.opts.IPv6 {
		d = Desired{}
	}
	placed, err := a.syncPeers6(d)
	if err != nil {
		return placed.misfits, err
	}
	return placed.misfits, a.syncRuntime(func(f *weftInForce) { f.setIPv6(d, placed.lengths) })
}

// View reads what the accelerator's programs and maps hold. It lives as long
// as the accelerator and need not be closed.
func (a *Accelerator) View() *View { return &View{a.opts.PinDir, a.namedMaps()} }

// Close lets go of handles. Pinned programs and maps stay, and traffic flows.
func (a *Accelerator) Close() error { return a.objects.Close() }

// syncDevices writes the redirect targets that are no pods.
func (a *Accelerator) syncDevices(d Desired) error {
	if a.opts.NoIPv4 {
		return remove(a.objects.Devices, []uint32{uint32(weftDeviceDEVICE_OVERLAY), uint32(weftDeviceDEVICE_UPLINK)})
	}
	return errors.Join(
		a.syncDevice(uint32(weftDeviceDEVICE_OVERLAY), d.Overlay),
		a.syncDevice(uint32(weftDeviceDEVICE_UPLINK), d.Uplink),
	)
}

// Remove detaches all programs and deletes all pins under dir. It returns what
// it removed, in words; nothing there is no error.
func Remove(dir string) ([]string, error) {
	removed, err := Detach(dir)
	if err != nil {
		return removed, err
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return removed, nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return removed, fmt.Errorf("removing pins: %w", err)
	}
	return append(removed, "pins in "+dir), nil
}
