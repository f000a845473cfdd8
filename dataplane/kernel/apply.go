//go:build linux

package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
	"github.com/weft-net/weft/dataplane/internal/sysctl"
)

// applyDevice does one step on a device itself.
func (p *Path) applyDevice(s Step) error {
	if s.Op == AddDevice {
		p.log.Info("making overlay device", "device", s.Device, "do", s.String())
		return p.addDevice(s)
	}
	p.log.Info("changing overlay device", "device", s.Device, "do", s.String())
	link, err := p.links.LinkByName(s.Device)
	if errors.As(err, &netlink.LinkNotFoundError{}) && s.Op == DeleteDevice {
		return nil // gone already
	}
	if err != nil {
		return err
	}
	switch s.Op {
	case DeleteDevice:
		return unlessGone(p.links.LinkDel(link))
	case SetAcceptRA:
		p.setAcceptRA(s.Device)
		return nil
	case SetLearning:
		return p.setLearning(link.Attrs().Index, s.Learning)
	case SetMAC:
		return p.links.LinkSetHardwareAddr(link, s.MAC.HardwareAddr())
	case SetMTU:
		return p.links.LinkSetMTU(link, s.MTU)
	case AddAddress:
		err := unlessExists(p.links.AddrAdd(link, &netlink.Addr{IPNet: ipNet(s.Prefix)}))
		if errors.Is(err, unix.EACCES) && s.Prefix.Addr().Is6() {
			return fmt.Errorf("%w: IPv6 is off on the device (sysctl net/ipv6/conf/%s/disable_ipv6)", err, s.Device)
		}
		return err
	case DeleteAddress:
		return unlessGone(p.links.AddrDel(link, &netlink.Addr{IPNet: ipNet(s.Prefix)}))
	case SetUp:
		return p.links.LinkSetUp(link)
	}
	return fmt.Errorf("not a step on a device: %s", s)
}

// addDevice makes the overlay device, down.
func (p *Path) addDevice(s Step) error {
	err := p.links.LinkAdd(&netlink.Vxlan{
		// A transmit queue length of 0, as flannel's device has it: the device
		// has no queue.
		LinkAttrs:    netlink.LinkAttrs{Name: s.Device, HardwareAddr: s.MAC.HardwareAddr(), MTU: s.MTU},
		VxlanId:      int(s.vni),
		VtepDevIndex: s.uplinkIndex,
		SrcAddr:      s.local.AsSlice(),
		Port:         int(s.port),
		Learning:     s.Learning,
		GBP:          s.gbp,
		UDPCSum:      true,
	})
	if errors.Is(err, unix.EEXIST) {
		other := p.vxlanInTheWay(s)
		if other == s.Device {
			return nil // it came meanwhile; the next look sees whether it is right
		}
		if other != "" {
			return fmt.Errorf("%w: the vxlan device %s has VNI %d and port %d already; remove it or choose another VNI",
				err, other, s.vni, s.port)
		}
	}
	return err
}

// vxlanInTheWay names a device that has the VNI and port: two such devices
// could not tell whose packet is whose, so the kernel refuses the second.
func (p *Path) vxlanInTheWay(s Step) string {
	links, err := p.links.LinkList()
	if err != nil {
		return ""
	}
	for _, link := range links {
		v, ok := link.(*netlink.Vxlan)
		if ok && uint32(v.VxlanId) == s.vni && uint16(v.Port) == s.port &&
			addrOf(v.SrcAddr).Is6() == s.local.Is6() {
			return v.Name
		}
	}
	return ""
}

// setLearning turns learning on or off on an existing device. It says nothing
// else of the device: what is said of a flag that can't be changed is refused,
// even when it is the same.
func (p *Path) setLearning(index int, on bool) error {
	value := []byte{0}
	if on {
		value[0] = 1
	}
	fixed := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(fixed[4:], uint32(index))
	r := rtnl.NewRequest(unix.RTM_NEWLINK, 0, fixed...).Nested(unix.IFLA_LINKINFO, func(r *rtnl.Request) {
		r.Attr(unix.IFLA_INFO_KIND, []byte("vxlan"))
		r.Nested(unix.IFLA_INFO_DATA, func(r *rtnl.Request) {
			r.Attr(unix.IFLA_VXLAN_LEARNING, value)
		})
	})
	return p.socket.Batch([]*rtnl.Request{r})[0]
}

// setAcceptRA keeps router advertisements that come through the overlay from
// giving the node addresses and routes. Where the sysctl can't be written the
// overlay works all the same.
func (p *Path) setAcceptRA(device string) {
	err := p.namespace.Do(func() error {
		return os.WriteFile(p.acceptRAPath(device), []byte("0"), 0)
	})
	if err != nil && !p.raRefused[device] {
		p.raRefused[device] = true
		p.log.Warn("can't set accept_ra; "+sysctl.Remedy, "device", device, "err", err)
	}
}

// outcome is what became of the steps on an overlay's peers.
type outcome struct {
	// done is how many changes were made.
	done int
	// failed are the peers of which a step failed. Their later steps were left
	// out: a route without its neighbour would be a black hole.
	failed map[netip.Prefix]error
	// stale are failures to remove what nobody wants.
	stale []error
}

// applyPeers does the steps for peers on the device with that index. Steps of
// one kind go to the kernel together.
func (p *Path) applyPeers(ctx context.Context, steps []Step, index int) outcome {
	o := outcome{failed: map[netip.Prefix]error{}}
	debug := p.log.Enabled(ctx, slog.LevelDebug)
	var group []Step
	var requests []*rtnl.Request
	for len(steps) > 0 {
		group, requests = group[:0], requests[:0]
		next := 0
		for next < len(steps) && steps[next].Op == steps[0].Op && len(group) < rtnl.BatchSize {
			s := steps[next]
			next++
			if o.failed[s.Peer] != nil || o.failed[s.After] != nil {
				continue
			}
			group = append(group, s)
			requests = append(requests, peerRequest(s, index))
		}
		errs := p.batchUnlessDone(ctx, requests)
		for i, s := range group {
			if debug { // printing thousands of steps costs more than making them
				p.log.Debug("step", "do", s.String(), "err", errs[i])
			}
			o.add(s, errs[i])
		}
		steps = steps[next:]
	}
	return o
}

// add counts one step.
func (o *outcome) add(s Step, err error) {
	switch s.Op {
	case DeleteRoute, DeleteGateway, DeleteNeighbour, DeleteFDB:
		err = unlessGone(err)
	}
	switch {
	case err == nil:
		o.done++
	case s.Peer.IsValid():
		o.failed[s.Peer] = fmt.Errorf("peer %s: %s: %w", s.Peer, s, err)
	default:
		o.stale = append(o.stale, fmt.Errorf("removing what no peer wants: %s: %w", s, err))
	}
}

// batchUnlessDone sends requests, unless ctx is done.
func (p *Path) batchUnlessDone(ctx context.Context, requests []*rtnl.Request) []error {
	if err := ctx.Err(); err != nil {
		errs := make([]error, len(requests))
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	return p.socket.Batch(requests)
}

// peerRequest is a step as a message to the kernel.
func peerRequest(s Step, index int) *rtnl.Request {
	const set = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	v6 := s.Addr.Is6()
	switch s.Op {
	case SetFDB:
		return rtnl.NewRequest(unix.RTM_NEWNEIGH, set, ndmsg(unix.AF_BRIDGE, index, unix.NUD_PERMANENT, unix.NTF_SELF)...).
			Attr(unix.NDA_LLADDR, s.MAC[:]).Attr(unix.NDA_DST, s.Addr.AsSlice())
	case DeleteFDB:
		return rtnl.NewRequest(unix.RTM_DELNEIGH, 0, ndmsg(unix.AF_BRIDGE, index, unix.NUD_PERMANENT, unix.NTF_SELF)...).
			Attr(unix.NDA_LLADDR, s.MAC[:]).Attr(unix.NDA_DST, s.Addr.AsSlice())
	case SetNeighbour:
		return rtnl.NewRequest(unix.RTM_NEWNEIGH, set, ndmsg(family(v6), index, unix.NUD_PERMANENT, 0)...).
			Attr(unix.NDA_DST, s.Addr.AsSlice()).Attr(unix.NDA_LLADDR, s.MAC[:])
	case DeleteNeighbour:
		return rtnl.NewRequest(unix.RTM_DELNEIGH, 0, ndmsg(family(v6), index, 0, 0)...).
			Attr(unix.NDA_DST, s.Addr.AsSlice())
	case SetGateway:
		return gatewayRequest(s, index, unix.RTM_NEWROUTE, set)
	case DeleteGateway:
		return gatewayRequest(s, index, unix.RTM_DELROUTE, 0)
	case AddRoute:
		return routeRequest(s, index, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, unix.RT_SCOPE_UNIVERSE)
	case ReplaceRoute:
		return routeRequest(s, index, unix.RTM_NEWROUTE, set, unix.RT_SCOPE_UNIVERSE)
	case DeleteRoute:
		return routeRequest(s, index, unix.RTM_DELROUTE, 0, unix.RT_SCOPE_NOWHERE)
	}
	panic("not a step for a peer: " + s.String())
}

// routeRequest is a message about a peer's route. Who made it (proto) is not
// said, as flannel does not: boot.
func routeRequest(s Step, index int, kind, flags uint16, scope byte) *rtnl.Request {
	var hopFlags uint32 = unix.RTNH_F_ONLINK
	if s.direct() {
		index, hopFlags = s.index, 0
	}
	// struct rtmsg of linux/rtnetlink.h
	fixed := []byte{family(s.Addr.Is6()), byte(s.Prefix.Bits()), 0, 0, unix.RT_TABLE_MAIN, protoBoot, scope, unix.RTN_UNICAST}
	fixed = binary.NativeEndian.AppendUint32(fixed, hopFlags)
	return rtnl.NewRequest(kind, flags, fixed...).
		Attr(unix.RTA_DST, s.Prefix.Addr().AsSlice()).
		Attr(unix.RTA_GATEWAY, s.Addr.AsSlice()).
		Uint32(unix.RTA_OIF, uint32(index))
}

// gatewayRequest is a message about the route to a gateway alone.
func gatewayRequest(s Step, index int, kind, flags uint16) *rtnl.Request {
	fixed := []byte{
		family(s.Addr.Is6()), byte(s.Addr.BitLen()), 0, 0, unix.RT_TABLE_MAIN, protoBoot, unix.RT_SCOPE_LINK, unix.RTN_UNICAST,
		0, 0, 0, 0, // flags
	}
	return rtnl.NewRequest(kind, flags, fixed...).
		Attr(unix.RTA_DST, s.Addr.AsSlice()).
		Uint32(unix.RTA_OIF, uint32(index))
}

// unlessGone makes success of an error that says that what was to be removed
// is not there.
func unlessGone(err error) error {
	for _, gone := range []error{unix.ENOENT, unix.ESRCH, unix.ENODEV, unix.ENXIO, unix.EADDRNOTAVAIL} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	return err
}

// unlessExists makes success of an error that says that what was to be added
// is there.
func unlessExists(err error) error {
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
