//go:build linux

package dataplane

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// A device that flannel has made is taken over as it is; one of another make is not.
func TestSurveyOfAFlannelNode(t *testing.T) {
	ns, peer := netns.New(t), netns.New(t)
	netns.Connect(t, ns, "eth0", peer, "eth0")
	ns.Run(t, "ip address add 192.0.2.11/24 dev eth0")
	s := state.State{
		Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, VNI: 1, Port: 8472,
		Local: state.Local{
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, Uplink: "eth0",
			Address: netip.MustParseAddr("192.0.2.11"), PublicIP: netip.MustParseAddr("192.0.2.11"),
		},
	}
	look := func() (found Survey) { // but not at programs, which takes long
		ns.MustDo(t, func() (err error) {
			found, _, err = lookAtDevices(s)
			return err
		})
		return found
	}
	lookAtAll := func() (found Survey) {
		ns.MustDo(t, func() (err error) {
			found, err = Look(s)
			return err
		})
		return found
	}
	if found := look(); !slices.Equal(found.Missing, []string{"flannel.1"}) {
		t.Errorf("without a device: %+v", found)
	}

	// As flanneld does (flannel's pkg/backend/vxlan/device.go).
	ns.Run(t, "ip link add flannel.1 mtu 1450 type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning udpcsum",
		"sysctl -qw net.ipv6.conf.flannel/1.accept_ra=0", "ip address add 10.244.1.0/32 dev flannel.1", "ip link set flannel.1 up")
	found := lookAtAll()
	if len(found.Missing)+len(found.Changes)+len(found.NoPrograms) > 0 || found.Remade {
		t.Errorf("a device of flannel's: %+v", found)
	}
	// Of IPv6 the kernel adds link-local addresses and routes when it likes.
	held := func() string {
		return ns.Run(t, "ip -d link show flannel.1") + ns.Run(t, "ip -4 address show flannel.1") + ns.Run(t, "ip -4 route show table all")
	}
	before := held()

	ns.Run(t, "ip link set flannel.1 mtu 1400")
	if found := look(); found.Remade || len(found.Changes) != 1 || !strings.Contains(found.Changes[0], "mtu 1450") {
		t.Errorf("a device with another MTU: %+v", found)
	}
	ns.Run(t, "ip link set flannel.1 mtu 1450")
	if after := held(); after != before {
		t.Errorf("a look has changed\n%s\ninto\n%s", before, after)
	}
	ns.Run(t, "ip address del 10.244.1.0/32 dev flannel.1")
	if found := look(); found.Remade || len(found.Changes) != 1 || !strings.Contains(found.Changes[0], "10.244.1.0/32") {
		t.Errorf("a device without its address: %+v", found)
	}
	s.Port = 4789
	if found := look(); !found.Remade || len(found.Changes) < 2 {
		t.Errorf("a device with another port: %+v", found)
	}

	ns.Run(t, "ip link add br0 type bridge", "ip link set eth0 master br0")
	if found := lookAtAll(); len(found.NoPrograms) != 1 || !strings.Contains(found.NoPrograms[0], "part of br0") {
		t.Errorf("an uplink in a bridge: %+v", found)
	}
}
