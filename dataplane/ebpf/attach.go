//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// site is a place where a program sits.
type site struct {
	program string // as bpftool shows it
	device  int    // interface index
	ingress bool
}

// pin is the name of the pinned link.
func (s site) pin() string {
	if s.perPod() {
		return fmt.Sprintf("%s-%d", s.program, s.device)
	}
	return s.program
}

// perPod tells the programs that sit on many devices.
func (s site) perPod() bool { return strings.HasPrefix(s.program, podPrefix) }

const podPrefix = "pod_"

func (s site) String() string { return fmt.Sprintf("%s on interface %d", s.program, s.device) }

// attachType is where tcx puts the program.
func (s site) attachType() ebpf.AttachType {
	if s.ingress {
		return ebpf.AttachTCXIngress
	}
	return ebpf.AttachTCXEgress
}

// attachment is a program at its place.
type attachment struct {
	site
	kind string // "tcx" or "clsact"
	id   ebpf.ProgramID
}

// sits tells that the program is where it was put. It asks of tcx alone, where the
// answer is one list of numbers; on a node with a hundred pods it is asked for all of
// them every other second.
func (at attachment) sits() bool {
	if at.kind != "tcx" {
		return false
	}
	there, err := link.QueryPrograms(link.QueryOptions{Target: at.device, Attach: at.attachType()})
	return err == nil && slices.ContainsFunc(there.Programs, func(p link.AttachedProgram) bool { return p.ID == at.id })
}

// sites lists where our programs sit, in the order in which they are attached:
// overlay_in refuses, in enforce, what uplink_in has not seen, so uplink_in
// comes first; overlay_out waits for the proof that uplink_out gives.
func sites(uplink, overlay int) []site {
	return []site{
		{"uplink_in", uplink, true},
		{"overlay_in", overlay, true},
		{"uplink_out", uplink, false},
		{"overlay_out", overlay, false},
	}
}

// sites6 lists where the programs sit that count IPv6.
func sites6(overlay int) []site {
	return []site{
		{"overlay6_in", overlay, true},
		{"overlay6_out", overlay, false},
	}
}

// podSites lists where our programs sit on a pod's veth.
func podSites(veth int) []site {
	return []site{
		{"pod_out", veth, false},
		{"pod_in", veth, true},
	}
}

// linksDir is where links are pinned, by program.
func linksDir(pinDir string) string { return filepath.Join(pinDir, "links") }

func (a *Accelerator) program(name string) *ebpf.Program {
	return map[string]*ebpf.Program{
		"uplink_in":    a.objects.UplinkIn,
		"overlay_in":   a.objects.OverlayIn,
		"uplink_out":   a.objects.UplinkOut,
		"overlay_out":  a.objects.OverlayOut,
		"overlay6_in":  a.objects.Overlay6In,
		"overlay6_out": a.objects.Overlay6Out,
		"pod_in":       a.objects.PodIn,
		"pod_out":      a.objects.PodOut,
	}[name]
}

// syncAttachments puts every program at its place and takes those away that are
// not wanted. One that is there already in another version is swapped without a
// gap.
func (a *Accelerator) syncAttachments(d Desired) error {
	if err := os.MkdirAll(linksDir(a.opts.PinDir), 0o700); err != nil {
		return fmt.Errorf("making directory for links: %w", err)
	}
	var wanted []site
	if d.Overlay != 0 && !a.opts.NoIPv4 {
		wanted = sites(d.Uplink, d.Overlay)
	}
	if d.Overlay6 != 0 && a.opts.IPv6 {
		wanted = append(wanted, sites6(d.Overlay6)...)
	}
	a.uplinkIn = attachment{}
	for _, s := range wanted {
		if err := a.attachAt(s); err != nil {
			return err
		}
	}
	return a.sweep()
}

// sweep takes the programs of a family that has none now off their places. Which
// ones that are is fixed, so one look is enough.
func (a *Accelerator) sweep() error {
	if a.swept {
		return nil
	}
	unwanted := map[string]bool{}
	for _, s := range sites(0, 0) {
		unwanted[s.program] = a.opts.NoIPv4
	}
	for _, s := range podSites(0) {
		unwanted[s.program] = a.opts.NoIPv4
	}
	for _, s := range sites6(0) {
		unwanted[s.program] = !a.opts.IPv6
	}
	_, err := detach(a.opts.PinDir, func(s site) bool { return unwanted[s.program] })
	a.swept = err == nil
	return err
}

// attachAt puts a program at its place, if it does not sit there.
func (a *Accelerator) attachAt(s site) (err error) {
	at, known := a.placed[s]
	if !known || !at.sits() {
		delete(a.placed, s)
		at, err = a.attach(s, a.program(s.program), filepath.Join(linksDir(a.opts.PinDir), s.pin()))
		if err != nil {
			return fmt.Errorf("attaching %v: %w", s, err)
		}
		a.placed[s] = at
	}
	if s.program == "uplink_in" {
		a.uplinkIn = at
	}
	return nil
}

// attachProgram attaches prog at s: as a pinned tcx link where the kernel has
// them (6.6), else as a clsact filter. What the other way, or another device,
// holds of an earlier attachment is cleared after the new one works.
func attachProgram(s site, prog *ebpf.Program, pin string) (attachment, error) {
	id, err := programID(prog)
	if err != nil {
		return attachment{}, err
	}
	err = attachTCX(s, prog, pin)
	if err == nil {
		return attachment{s, "tcx", id}, removeFilter(s)
	}
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return attachment{}, err
	}
	if err := replaceFilter(s, prog); err != nil {
		return attachment{}, err
	}
	return attachment{s, "clsact", id}, nil
}

// attachTCX swaps prog into the pinned link if it still holds its place, else
// makes a link and pins it instead. It goes to the end of the chain: programs
// behind ours would not see the packets that we take.
func attachTCX(s site, prog *ebpf.Program, pin string) error {
	old, err := link.LoadPinnedLink(pin, nil)
	if err == nil {
		defer old.Close()
		if held, current := holds(old, s, prog); held {
			if current {
				return nil
			}
			// The one moment of an upgrade: the kernel swaps the pointer,
			// and no packet sees neither program.
			return old.Update(prog)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("opening pinned link: %w", err)
	}

	fresh, err := link.AttachTCX(link.TCXOptions{
		Interface: s.device,
		Program:   prog,
		Attach:    s.attachType(),
		Anchor:    link.Tail(),
	})
	if err != nil {
		return err
	}
	defer fresh.Close()
	if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the pin of a link that is defunct: %w", err)
	}
	if err := fresh.Pin(pin); err != nil {
		return fmt.Errorf("pinning link: %w", err)
	}
	return nil
}

// holds tells whether a link sits at s, and whether it runs prog. The link of
// a device that is gone has interface index 0.
func holds(l link.Link, s site, prog *ebpf.Program) (held, current bool) {
	info, err := l.Info()
	if err != nil {
		return false, false
	}
	tcx := info.TCX()
	if tcx == nil || int(tcx.Ifindex) != s.device {
		return false, false
	}
	id, err := programID(prog)
	return true, err == nil && info.Program == id
}

func programID(prog *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := prog.Info()
	if err != nil {
		return 0, fmt.Errorf("asking for a program's number: %w", err)
	}
	id, _ := info.ID()
	return id, nil
}

// Detach takes all programs of the pins under dir off their places, those
// first that hand packets to others; the kernel path carries on. The maps stay.
// It needs no BPF capability: with its pin a link loses its last reference, and
// the kernel detaches the program. It returns what it removed, in words.
func Detach(dir string) (removed []string, err error) {
	return detach(dir, func(site) bool { return true })
}

// detach is Detach for the programs that unwanted says.
func detach(dir string, unwanted func(site) bool) (removed []string, err error) {
	if unwanted(site{program: "uplink_in"}) {
		gone, err := unpinXDP(dir)
		if err != nil {
			return nil, err
		}
		if gone {
			removed = append(removed, "program "+uplinkXDP)
		}
	}
	pods, err := detachPods(dir, unwanted)
	removed = append(removed, pods...)
	if err != nil {
		return removed, err
	}
	order := append(sites6(0), sites(0, 0)...)
	slices.Reverse(order)
	for _, s := range order {
		if !unwanted(s) {
			continue
		}
		gone, err := unpin(dir, s)
		if err != nil {
			return removed, err
		}
		if gone {
			removed = append(removed, "program "+s.program)
		}
	}
	filters, err := removeOurFilters(unwanted)
	return append(removed, filters...), err
}

// unpin takes the program at s off its place, if it is held by a link.
func unpin(dir string, s site) (gone bool, err error) {
	err = os.Remove(filepath.Join(linksDir(dir), s.pin()))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("unpinning link %s: %w", s.pin(), err)
	}
	return err == nil, nil
}
