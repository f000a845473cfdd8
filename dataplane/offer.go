//go:build linux

package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
)

// What has to be known of this node before a control plane can say what it should
// hold, and what waits for it to hold that.

// MACs are those that the overlay devices of a VNI have, had last, or, where
// neither is known, would be given.
func (d *Dataplane) MACs(vni uint32) (v4, v6 state.MAC, err error) {
	v4, err = d.findMAC(kernel.DeviceName(vni, false))
	if err != nil {
		return v4, v6, err
	}
	v6, err = d.findMAC(kernel.DeviceName(vni, true))
	return v4, v6, err
}

// MTU is what pods' interfaces should have, in bytes: the overlay device's after
// the last Sync, the IPv4 one's if there are two; 0 while there is none.
func (d *Dataplane) MTU() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mtu
}

// podMTU chooses it. With both families it is flannel's choice, and that of IPv4:
// IPv6 finds out by itself that its packets may be 20 bytes less.
func podMTU(overlays []kernel.Overlay) int {
	mtu := 0
	for _, o := range overlays {
		if mtu == 0 || o.Address.Is4() {
			mtu = o.MTU
		}
	}
	return mtu
}

// BridgeFault tells what the host lacks for its rules to see packets between pods
// of the same node; nil when it is there. Flannel refuses to start without.
func (d *Dataplane) BridgeFault(s state.State) error {
	var faults []error
	for _, n := range s.Networks {
		file := "/proc/sys/net/bridge/bridge-nf-call-iptables"
		if n.Addr().Is6() {
			file = "/proc/sys/net/bridge/bridge-nf-call-ip6tables"
		}
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			faults = append(faults, fmt.Errorf("%s is missing, so services between pods of one node would not work; load the module br_netfilter (modprobe br_netfilter)", file))
		}
	}
	return errors.Join(faults...)
}
