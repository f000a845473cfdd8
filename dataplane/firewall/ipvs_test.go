//go:build linux

package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// IPVS translates addresses in hook input, and sends on what is not for this
// node through hook output.
func TestInjectionThroughIPVSIsStopped(t *testing.T) {
	l := lab.T(t).New(lab.Options{Nodes: 2, Pods: 2, Kinds: []lab.Kind{lab.Kernel}, Netfilter: true})
	n1, n2 := l.Node(1), l.Node(2)
	victims := map[*lab.Pod]*server{}
	for _, pod := range []*lab.Pod{l.Pod(1, 2), l.Pod(2, 1)} {
		victims[pod] = serve(t, pod, ":5300", nil)
	}
	fw := open(t, n1)
	for i, a := range []attack{
		{name: "ToPeer", node: n2, victim: l.Pod(2, 1)},
		{name: "ToOwnNode", node: n1, victim: l.Pod(1, 2)},
	} {
		t.Run(a.name, func(t *testing.T) {
			service := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(20 + i)}), 53)
			lab.T(t).Run(n1, fmt.Sprintf("ip addr add %s/32 dev lo", service.Addr()))
			if err := n1.Do(func() error { return addIPVSService(service, netip.AddrPortFrom(a.node.IP, 8472)) }); errors.Is(err, unix.ENOENT) {
				t.Skipf("this kernel has no IPVS (%v)", err)
			} else if err != nil {
				t.Fatal(err)
			}
			a.send = func(payload []byte) error { return send(l.Pod(1, 1), 0, service, payload) }
			if !a.arrived(t, victims, true) {
				t.Fatal("the attack does not work even without the table, so it proves nothing")
			}
			mustSync(t, fw, rulesOf(n1))
			before := dropped(t, fw)
			if a.arrived(t, victims, false) {
				t.Error("a forged packet was delivered")
			}
			if n := dropped(t, fw) - before; n != 1 {
				t.Errorf("%d packets were counted as dropped, want 1", n)
			}
			if _, err := fw.Remove(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// addIPVSService makes an IPVS service for UDP with one backend, which is
// reached by translating addresses (linux/ip_vs.h). The error is ENOENT when the
// kernel has no IPVS.
func addIPVSService(service, backend netip.AddrPort) error {
	conn, err := netlink.Dial(unix.NETLINK_GENERIC, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	family, err := genericFamily(conn, "IPVS")
	if err != nil {
		return err
	}
	const (
		newService, newDest     = 1, 5
		aboutService, aboutDest = 1, 2
	)
	about := func(e *netlink.AttributeEncoder) {
		e.Nested(aboutService, func(e *netlink.AttributeEncoder) error {
			e.Uint16(1, unix.AF_INET)
			e.Uint16(2, unix.IPPROTO_UDP)
			e.Bytes(3, append(service.Addr().AsSlice(), make([]byte, 12)...))
			e.Bytes(4, binary.BigEndian.AppendUint16(nil, service.Port()))
			e.String(6, "rr")
			e.Bytes(7, make([]byte, 8)) // flags and their mask
			e.Uint32(8, 0)              // no timeout
			e.Uint32(9, 0xffffffff)     // one client, one entry
			return nil
		})
	}
	for _, command := range []struct {
		number byte
		attrs  func(*netlink.AttributeEncoder)
	}{
		{newService, about},
		{newDest, func(e *netlink.AttributeEncoder) {
			about(e)
			e.Nested(aboutDest, func(e *netlink.AttributeEncoder) error {
				e.Bytes(1, append(backend.Addr().AsSlice(), make([]byte, 12)...))
				e.Bytes(2, binary.BigEndian.AppendUint16(nil, backend.Port()))
				e.Uint32(3, 0) // by translation
				e.Uint32(4, 1) // weight
				e.Uint32(5, 0) // no thresholds
				e.Uint32(6, 0)
				e.Uint16(11, unix.AF_INET)
				return nil
			})
		}},
	} {
		if err := askGeneric(conn, family, command.number, command.attrs); err != nil {
			return fmt.Errorf("IPVS command %d: %w", command.number, err)
		}
	}
	return nil
}

// genericFamily is the number of a generic netlink family.
func genericFamily(conn *netlink.Conn, name string) (uint16, error) {
	e := netlink.NewAttributeEncoder()
	e.String(unix.CTRL_ATTR_FAMILY_NAME, name)
	attrs, err := e.Encode()
	if err != nil {
		return 0, err
	}
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.GENL_ID_CTRL, Flags: netlink.Request},
		Data:   append([]byte{unix.CTRL_CMD_GETFAMILY, 1, 0, 0}, attrs...),
	})
	if err != nil {
		return 0, err
	}
	for _, reply := range replies {
		d, err := netlink.NewAttributeDecoder(reply.Data[4:])
		if err != nil {
			return 0, err
		}
		for d.Next() {
			if d.Type() == unix.CTRL_ATTR_FAMILY_ID {
				return d.Uint16(), d.Err()
			}
		}
	}
	return 0, fmt.Errorf("no number of generic netlink family %s", name)
}

// askGeneric sends a command and waits until it is acknowledged.
func askGeneric(conn *netlink.Conn, family uint16, command byte, attrs func(*netlink.AttributeEncoder)) error {
	e := netlink.NewAttributeEncoder()
	attrs(e)
	b, err := e.Encode()
	if err != nil {
		return err
	}
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(family), Flags: netlink.Request | netlink.Acknowledge},
		Data:   append([]byte{command, 1, 0, 0}, b...),
	})
	return err
}
