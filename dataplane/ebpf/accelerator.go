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
	// MaxPeers is how many peer nodes fit, and how many pod prefixes. One that
	// no longer fits rides the kernel path.
	MaxPeers int
	// VNI and Port are the overlay's.
	VNI  uint32
	Port uint16
}

// Accelerator holds the loaded programs and the maps of one node.
type Accelerator struct {
	opts    Options
	objects weftObjects
	slots   slots
	// noExpress says why the programs can't do express; empty when they can.
	noExpress string
	missed    bool
	// peerAddresses and own are the addresses that nodes answer on, and
	// nodeAddresses what the map holds, nil when that is not known.
	peerAddresses, nodeAddresses map[uint32]uint32
	own                          []netip.Addr
	// veths are those that SyncPods has last served.
	veths map[int]bool

	// attach puts a program at its place and pins the link; tests inject
	// failures.
	attach func(site, *ebpf.Program, string) (attachment, error)
}

// Desired is what the programs should know and where they should sit.
type Desired struct {
	// Uplink and Overlay are interface indexes in the current namespace.
	Uplink, Overlay int
	// OverlayMTU is the overlay device's.
	OverlayMTU int
	// Local is the underlay address that our packets are sent from and that
	// peers' packets arrive at, MAC our overlay device's address.
	Local netip.Addr
	MAC   state.MAC
	// SourceCheck is off, observe or enforce.
	SourceCheck string
	// RoutesByMark tells that the host has routing rules that look at marks.
	RoutesByMark bool
	// Held tells that acceleration must be held back.
	Held bool
	// Peers are the IPv4 peers that the kernel path serves.
	Peers []state.Peer
	// Known are IPv4 peers that it does not serve yet: their packets pass the
	// source check, and are left to the kernel.
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
	a := &Accelerator{opts: opts, attach: attachProgram}
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

	misfits, lengths, err := a.syncPeers(d)
	if err != nil {
		return misfits, err
	}
	a.peerAddresses = peerAddresses(d.Peers, d.Known)
	a.addAliasAddresses(d.Aliases)
	if err := a.syncNodeAddresses(); err != nil {
		return misfits, err
	}
	if err := a.syncDevices(d); err != nil {
		return misfits, err
	}
	if err := a.syncRuntime(d, lengths); err != nil {
		return misfits, err
	}
	if err := a.syncSwitches(); err != nil {
		return misfits, err
	}
	if err := a.syncAttachments(d); err != nil {
		return misfits, explain(err)
	}
	return misfits, a.pinMaps()
}

// View reads what the accelerator's programs and maps hold. It lives as long
// as the accelerator and need not be closed.
func (a *Accelerator) View() *View { return &View{a.opts.PinDir, a.namedMaps()} }

// Close lets go of handles. Pinned programs and maps stay, and traffic flows.
func (a *Accelerator) Close() error { return a.objects.Close() }

// syncDevices writes the redirect targets that are no pods.
func (a *Accelerator) syncDevices(d Desired) error {
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
