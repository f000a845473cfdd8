//go:build linux

package dataplane

import (
	"fmt"
	"strings"

	"github.com/weft-net/weft/dataplane/ebpf"
	"github.com/weft-net/weft/dataplane/kernel"
)

// understoodUplinks are the kinds of device whose tc hooks see exactly what
// the wire brings: physical and paravirtual network cards ("device") and veth.
// Bonds, bridges, VLANs, tunnels and the like hand packets on to others, or
// have no Ethernet header.
var understoodUplinks = map[string]bool{"device": true, "veth": true}

// unsuitable says why programs can't work on an uplink, or nothing.
func unsuitable(u kernel.Uplink) string {
	switch {
	case u.Index == 0:
		return "" // not there now; what comes will be looked at
	case u.EncapType != "ether":
		return fmt.Sprintf("uplink %s has no Ethernet header (%s)", u.Name, u.EncapType)
	case u.Master != "":
		return fmt.Sprintf("uplink %s is part of %s", u.Name, u.Master)
	case !understoodUplinks[u.Kind]:
		return fmt.Sprintf("uplink %s is of kind %s; programs work on network cards and veth", u.Name, u.Kind)
	}
	return ""
}

// heldBy lists what sits behind our programs.
func heldBy(hooks []ebpf.Hook) []string {
	var held []string
	for _, h := range hooks {
		for _, b := range h.Behind {
			held = append(held, fmt.Sprintf("%s behind %s", b, h.Program))
		}
	}
	return held
}

func holdReason(held []string) string {
	return "accelerated packets would bypass " + strings.Join(held, ", ")
}
