package flannel

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// What net-conf.json may leave out.
const (
	defaultVNI  = 1
	defaultPort = 8472 // the kernel's, which flannel leaves it to
)

// Bounds of what is read.
const (
	// maxConfig is the size of a configuration in bytes: what a ConfigMap can
	// hold.
	maxConfig = 1 << 20
	maxVNI    = 1<<24 - 1
)

// What VXLAN adds to a packet, in bytes, over IPv4 and over IPv6.
const (
	overheadV4 = 50
	overheadV6 = 70
)

// Config is what net-conf.json says about the network, defaults filled in.
type Config struct {
	EnableIPv4, EnableIPv6 bool
	// EnableNFTables has masquerading and forwarding rules written by nftables.
	EnableNFTables bool
	// Network and IPv6Network hold all pods. The zero Prefix when the family is
	// off.
	Network, IPv6Network netip.Prefix
	// SubnetLen and IPv6SubnetLen are the lengths of the nodes' own prefixes,
	// where nodes choose them (etcd).
	SubnetLen, IPv6SubnetLen int
	// SubnetMin and SubnetMax are the base addresses of the first and the last
	// of them, both included.
	SubnetMin, SubnetMax         netip.Addr
	IPv6SubnetMin, IPv6SubnetMax netip.Addr
	// VNI is the VXLAN network identifier, 1 to 2^24-1.
	VNI uint32
	// Port is the UDP port of the outer packets.
	Port uint16
	// MTU is the underlay's in bytes; the overlay's is smaller by the
	// encapsulation overhead. 0 means that of the uplink.
	MTU int
	// GBP, Learning and DirectRouting are those of state.State.
	GBP, Learning, DirectRouting bool
}

// ParseConfig reads net-conf.json. The subnet fields are filled in if they make
// sense and are zero if not, which is no fault: with Kubernetes somebody else
// chooses the nodes' prefixes. All faults come back together.
func ParseConfig(data []byte) (Config, error) {
	c, f, _ := parseConfig(data)
	if err := f.err(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// ParseEtcdConfig reads the configuration as ParseConfig does, and has the
// subnet fields right too: with etcd the nodes choose their prefixes by them.
func ParseEtcdConfig(data []byte) (Config, error) {
	c, f, subnets := parseConfig(data)
	f = append(f, subnets...)
	if err := f.err(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// parseConfig reads a configuration. What is wrong with the subnet fields alone
// is returned apart.
func parseConfig(data []byte) (c Config, f, subnets faults) {
	d, f := readNetConf(data)
	if len(f) > 0 {
		return Config{}, f, nil
	}
	c.EnableIPv4 = d.EnableIPv4.boolean(&f, "EnableIPv4", true)
	c.EnableIPv6 = d.EnableIPv6.boolean(&f, "EnableIPv6", false)
	c.EnableNFTables = d.EnableNFTables.boolean(&f, "EnableNFTables", false)
	if !c.EnableIPv4 && !c.EnableIPv6 {
		f.add("EnableIPv4 and EnableIPv6 are both false; turn one of them on")
	}
	v4 := d.readFamily(&f, false)
	v6 := d.readFamily(&f, true)
	if c.EnableIPv4 {
		c.Network = v4.network
		f.network("Network", v4, "10.244.0.0/16")
		v4.chooseSubnets(&subnets)
		c.SubnetLen, c.SubnetMin, c.SubnetMax = v4.length, v4.first, v4.last
	}
	if c.EnableIPv6 {
		c.IPv6Network = v6.network
		f.network("IPv6Network", v6, "fd00:10:244::/48")
		v6.chooseSubnets(&subnets)
		c.IPv6SubnetLen, c.IPv6SubnetMin, c.IPv6SubnetMax = v6.length, v6.first, v6.last
	}
	c.backend(&f, d.Backend)
	return c, f, subnets
}

// Networks lists the networks of the families in use, IPv4 first.
func (c Config) Networks() []netip.Prefix {
	var networks []netip.Prefix
	for _, n := range []netip.Prefix{c.Network, c.IPv6Network} {
		if n.IsValid() {
			networks = append(networks, n)
		}
	}
	return networks
}

// State is what the configuration says of a node's state: everything but the
// node itself and its peers. In an IPv4 network the overlay's MTU is for
// packets over IPv4, beside which those over IPv6 take 20 bytes more.
func (c Config) State() state.State {
	s := state.State{
		Networks: c.Networks(), VNI: c.VNI, Port: c.Port,
		DirectRouting: c.DirectRouting, Learning: c.Learning, GBP: c.GBP, NFTables: c.EnableNFTables,
	}
	switch {
	case c.MTU == 0:
	case c.EnableIPv4:
		s.Local.MTU = c.MTU - overheadV4
	default:
		s.Local.MTU = c.MTU - overheadV6
	}
	return s
}
