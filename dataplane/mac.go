//go:build linux

package dataplane

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
)

// chooseMAC fills in the overlay devices' MACs that s leaves open, and
// remembers all of them: peers know a node by its MAC, so it has to stay the
// same across restarts and reboots.
func (d *Dataplane) chooseMAC(s *state.State) error {
	for _, family := range []struct {
		wanted bool
		v6     bool
		mac    *state.MAC
	}{
		{s.Local.PublicIP.IsValid(), false, &s.Local.MAC},
		{s.Local.PublicIPv6.IsValid(), true, &s.Local.MACv6},
	} {
		if !family.wanted {
			continue
		}
		name := kernel.DeviceName(s.VNI, family.v6)
		if family.mac.IsZero() {
			mac, err := d.findMAC(name)
			if err != nil {
				return err
			}
			*family.mac = mac
		}
		if err := rememberMAC(d.opts.StateDir, name, *family.mac); err != nil {
			d.opts.Log.Warn("the overlay device's MAC is not remembered; a reboot will change it", "device", name, "err", err)
		}
	}
	return nil
}

// findMAC is the existing device's, else the remembered one, else a new one.
func (d *Dataplane) findMAC(device string) (state.MAC, error) {
	mac, ok, err := d.kernel.DeviceMAC(device)
	if err != nil || ok {
		return mac, err
	}
	mac, err = recallMAC(d.opts.StateDir, device)
	if err == nil {
		return mac, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		d.opts.Log.Warn("making a new MAC for the overlay device", "device", device, "err", err)
	}
	return state.RandomMAC(), nil
}

func macFile(dir, device string) string { return filepath.Join(dir, "mac-"+device) }

func recallMAC(dir, device string) (state.MAC, error) {
	text, err := os.ReadFile(macFile(dir, device))
	if err != nil {
		return state.MAC{}, err
	}
	mac, err := state.ParseMAC(strings.TrimSpace(string(text)))
	if err != nil {
		return state.MAC{}, fmt.Errorf("reading %s: %w", macFile(dir, device), err)
	}
	return mac, nil
}

func rememberMAC(dir, device string, mac state.MAC) error {
	if have, err := recallMAC(dir, device); err == nil && have == mac {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return renameio.WriteFile(macFile(dir, device), []byte(mac.String()+"\n"), 0o644)
}
