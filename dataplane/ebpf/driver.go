//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// uplinkXDP strips packets in the uplink's driver, before there is an skb, for
// uplink_in to hand on. It is there only while uplink_in is: attached after it,
// taken off before it.
const uplinkXDP = weftProgUplinkXdp

// proofLife is how long uplink_in is believed to get what uplink_xdp says:
// PROOF_LIFE of bpf/constants.h.
const proofLife = 2 * time.Second

// drainTime is longer than a packet takes from uplink_xdp to uplink_in.
const drainTime = 20 * time.Millisecond

// NoXDP says why packets can't be stripped in the uplink's driver; empty when they
// can, or when nobody wants it.
func (a *Accelerator) NoXDP() string { return a.noXDP }

// syncXDP attaches uplink_xdp if it is wanted and nothing is in the way.
func (a *Accelerator) syncXDP(d Desired) (err error) {
	a.noXDP = a.refusedXDP
	if !a.opts.XDP {
		return nil
	}
	if a.noXDP, err = a.hindersXDP(); err == nil && a.noXDP == "" {
		// The card takes the tags off, and what is left could be for us.
		a.noXDP, err = vlanOn(d.Uplink)
	}
	if err != nil || a.noXDP != "" {
		err = errors.Join(err, a.withdrawXDP())
		a.xdpSeen = a.lookXDP()
		return err
	}
	if err := attachXDP(d.Uplink, a.objects.UplinkXdp, a.xdpPin()); err != nil {
		a.noXDP = fmt.Sprintf("the uplink's driver takes no XDP program, or not with the device's MTU and offloads (%v)", err)
	}
	a.xdpSeen = a.lookXDP()
	return nil
}

// XDPChanged tells whether something came to be in the way of uplink_xdp, or went,
// since Sync looked.
func (a *Accelerator) XDPChanged() bool { return a.opts.XDP && a.lookXDP() != a.xdpSeen }

// lookXDP is what a look comes to, as a text to compare.
func (a *Accelerator) lookXDP() string {
	why, err := a.hindersXDP()
	device, deviceErr := xdpDevice(a.xdpPin())
	return fmt.Sprint(why, err, device, deviceErr)
}

func (a *Accelerator) xdpPin() string { return filepath.Join(linksDir(a.opts.PinDir), uplinkXDP) }

// hindersXDP says what is in the way of XDP at the uplink, or nothing.
func (a *Accelerator) hindersXDP() (string, error) {
	switch a.uplinkIn.kind {
	case "":
		return "there is no IPv4 overlay device on an uplink", nil
	case "tcx":
	default: // a filter is not pinned, and anybody may take it away
		return "uplink_in is no tcx link, which needs Linux 6.6", nil
	}
	front, err := programsInFront(a.uplinkIn)
	if err != nil {
		return "", err
	}
	if len(front) > 0 {
		return fmt.Sprintf("%s would see stripped packets before uplink_in does", front[0]), nil
	}
	return "", nil
}

// vlanOn names a VLAN device on a device, in a sentence.
func vlanOn(device int) (string, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return "", fmt.Errorf("listing devices: %w", err)
	}
	for _, l := range links {
		if l.Type() == "vlan" && l.Attrs().ParentIndex == device {
			return fmt.Sprintf("the uplink has the VLAN device %s, whose packets could not be told from its own", l.Attrs().Name), nil
		}
	}
	return "", nil
}

// attachXDP swaps prog into the pinned link if it is on the device still, else makes
// a link and pins it. It never runs in the stack (generic XDP): there it would come
// after GRO, and copy.
func attachXDP(device int, prog *ebpf.Program, pin string) error {
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		return updateXDP(old, prog)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("opening pinned link: %w", err)
	}
	fresh, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: device, Flags: link.XDPDriverMode})
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
		return errors.New("another XDP program is there")
	}
	if err != nil {
		return err
	}
	defer fresh.Close()
	if err := fresh.Pin(pin); err != nil {
		return fmt.Errorf("pinning link: %w", err)
	}
	return nil
}

func updateXDP(l link.Link, prog *ebpf.Program) error {
	info, err := l.Info()
	if err != nil {
		return fmt.Errorf("asking for the link: %w", err)
	}
	id, err := programID(prog)
	if err != nil || info.Program == id {
		return err
	}
	return l.Update(prog)
}

// withdrawStaleXDP takes uplink_xdp off its place before uplink_in changes, where
// the next uplink_in would not know what it has stripped: that is at another
// device, has other maps, or is not made for it.
func (a *Accelerator) withdrawStaleXDP(d Desired) error {
	device, err := xdpDevice(a.xdpPin())
	if err != nil || device < 0 {
		return err
	}
	if a.opts.XDP && !a.opts.NoIPv4 && a.inherited && device == d.Uplink {
		return nil
	}
	return a.withdrawXDP()
}

// withdrawXDP takes uplink_xdp off its place, and waits until uplink_in has got
// what it had stripped.
func (a *Accelerator) withdrawXDP() error {
	_, err := unpinXDP(a.opts.PinDir)
	a.inherited = true // what is attached from now on has our maps
	return err
}

func unpinXDP(dir string) (gone bool, err error) {
	if gone, err = unpin(dir, site{program: uplinkXDP, ingress: true}); gone {
		time.Sleep(drainTime)
	}
	return gone, err
}

// xdpDevice is the interface index where a pinned link sits, 0 when its device is
// gone, -1 without a pin.
func xdpDevice(pin string) (int, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("opening pinned link: %w", err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return -1, fmt.Errorf("asking for the link: %w", err)
	}
	if xdp := info.XDP(); xdp != nil {
		return int(xdp.Ifindex), nil
	}
	return 0, nil
}

// XDP is what strips packets in the uplink's driver.
type XDP struct {
	// Attached tells that uplink_xdp is at the uplink, and Heard that uplink_in was
	// lately seen to get what it says: only then packets are stripped.
	Attached, Heard bool
	// Stripped counts packets; Reasons those that were left as they were (Passed)
	// and dropped.
	Stripped uint64
	Reasons  []ReasonCount
}

// XDP reads how packets fare in the uplink's driver.
func (v *View) XDP() (XDP, error) {
	device, err := xdpDevice(filepath.Join(linksDir(v.dir), uplinkXDP))
	if err != nil {
		return XDP{}, err
	}
	x := XDP{Attached: device > 0 && device == v.device(weftDeviceDEVICE_UPLINK)}
	var read uint64
	if err := v.maps[weftMapNotesRead].Lookup(uint32(0), &read); err != nil {
		return XDP{}, fmt.Errorf("reading map notes_read: %w", err)
	}
	x.Heard = read != 0 && time.Duration(coarseNow()-read) < proofLife
	none, err := countReason(v.maps[weftMapDriverReasons], int(weftReasonREASON_NONE))
	if err != nil {
		return XDP{}, err
	}
	x.Stripped = none.Passed
	x.Reasons, err = countReasons(v.maps[weftMapDriverReasons])
	return x, err
}
