//go:build linux

package dataplane

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/internal/sysctl"
	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
)

// Survey is what weft would find on a node that it does not serve yet.
type Survey struct {
	// Missing are the overlay devices that are not there.
	Missing []string
	// Changes are the commands, as an operator would type them, that the others need
	// to be as the state wants them. What flannel has made with the same configuration
	// needs none.
	Changes []string
	// Remade tells that a device can't be changed into what it has to be, but has to be
	// made anew, which interrupts the traffic.
	Remade bool
	// NoPrograms are the reasons why packets would ride the kernel path, NoExpress
	// those why they would not take express. The programs were loaded to find out;
	// what the uplink or a pod's interface says to them was not tried.
	NoPrograms, NoExpress []string
}

// Look surveys the node for a state without peers. It changes nothing.
func Look(s state.State) (Survey, error) {
	found, uplink, err := lookAtDevices(s)
	if err != nil {
		return found, err
	}
	found.NoExpress = noConntrack()
	noExpress, err := ebpf.Try(s.VNI, s.Port)
	for _, reason := range []string{unsuitable(uplink), text(err)} {
		if reason != "" {
			found.NoPrograms = append(found.NoPrograms, reason)
		}
	}
	if noExpress != "" {
		found.NoExpress = append(found.NoExpress, noExpress)
	}
	return found, nil
}

// lookAtDevices surveys the overlay devices, and says what the uplink is.
func lookAtDevices(s state.State) (found Survey, uplink kernel.Uplink, err error) {
	for _, prefix := range s.Local.Prefixes {
		name := kernel.DeviceName(s.VNI, prefix.Addr().Is6())
		if _, there, err := kernel.DeviceMAC(name); err != nil {
			return found, uplink, err
		} else if !there {
			found.Missing = append(found.Missing, name)
		}
	}
	path, err := kernel.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		return found, uplink, err
	}
	defer path.Close()
	plan, err := path.Plan(s)
	if err != nil && len(found.Missing) == 0 {
		return found, uplink, err
	}
	for _, step := range plan.Steps {
		if step.Op > kernel.SetUp {
			continue // of peers that the state does not know
		}
		found.Remade = found.Remade || step.Op == kernel.DeleteDevice
		found.Changes = append(found.Changes, step.String())
	}
	return found, plan.Uplink, nil
}

// text is an error's, or nothing.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// noConntrack says which settings of conntrack express could not have.
func noConntrack() (reasons []string) {
	for _, name := range conntrackSettings {
		path := sysctlPath(name)
		now, err := os.ReadFile(path)
		switch {
		case errors.Is(err, os.ErrNotExist):
			reasons = append(reasons, settingMissing(name))
		case strings.TrimSpace(string(now)) != "1" && unix.Access(path, unix.W_OK) != nil:
			reasons = append(reasons, fmt.Sprintf("%s is not 1 and can't be set: %s", dotted(name), sysctl.Remedy))
		}
	}
	return reasons
}
