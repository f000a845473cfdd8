//go:build linux

package dataplane

import (
	"log/slog"
	"net/netip"
	"os"
	"testing"

	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// bareDataplane is one without programs and loops, in a namespace of its own.
func bareDataplane(t *testing.T, ns *netns.NS) *Dataplane {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	d := &Dataplane{opts: Options{StateDir: t.TempDir(), Log: log}}
	ns.MustDo(t, func() (err error) {
		d.kernel, err = kernel.Open(log)
		return err
	})
	t.Cleanup(func() { d.kernel.Close() })
	return d
}

func (d *Dataplane) mustChooseMAC(t *testing.T, given state.MAC) state.MAC {
	t.Helper()
	s := state.State{VNI: 1, Local: state.Local{PublicIP: netip.MustParseAddr("192.0.2.11"), MAC: given}}
	if err := d.chooseMAC(&s); err != nil {
		t.Fatal(err)
	}
	if s.Local.MAC.IsZero() {
		t.Fatal("no MAC was chosen")
	}
	if !s.Local.MACv6.IsZero() {
		t.Errorf("a MAC was chosen for an IPv6 overlay that nobody wants: %v", s.Local.MACv6)
	}
	return s.Local.MAC
}

func TestMACIsMadeOnceAndKept(t *testing.T) {
	ns := netns.New(t)
	d := bareDataplane(t, ns)
	first := d.mustChooseMAC(t, state.MAC{})
	if first[0]&3 != 2 {
		t.Errorf("%v is not a locally administered unicast address", first)
	}
	if again := d.mustChooseMAC(t, state.MAC{}); again != first {
		t.Errorf("the MAC changed from %v to %v although it was remembered", first, again)
	}
}

func TestMACOfTheExistingDeviceComesBeforeTheRemembered(t *testing.T) {
	ns := netns.New(t)
	d := bareDataplane(t, ns)
	d.mustChooseMAC(t, state.MAC{})
	ns.Run(t, "ip link add flannel.1 address 0a:58:0a:f4:01:00 type vxlan id 1 dstport 8472")
	if got := d.mustChooseMAC(t, state.MAC{}); got.String() != "0a:58:0a:f4:01:00" {
		t.Errorf("chose %v, not the device's", got)
	}
	given := state.MAC{2, 0, 0, 0, 0, 9}
	if got := d.mustChooseMAC(t, given); got != given {
		t.Errorf("chose %v, not the one that was given", got)
	}
	ns.Run(t, "ip link del flannel.1")
	if got := d.mustChooseMAC(t, state.MAC{}); got != given {
		t.Errorf("chose %v, not the one that was last in use", got)
	}
}

func TestMACFileThatIsDamagedIsReplaced(t *testing.T) {
	ns := netns.New(t)
	d := bareDataplane(t, ns)
	if err := os.WriteFile(macFile(d.opts.StateDir, "flannel.1"), []byte("ff:ff:ff:ff:ff:ff\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	made := d.mustChooseMAC(t, state.MAC{})
	if kept, err := recallMAC(d.opts.StateDir, "flannel.1"); err != nil || kept != made {
		t.Errorf("the file holds %v (%v), want %v", kept, err, made)
	}
}
