package flannel

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// SubnetEnv is what subnet.env tells the CNI plugin, Docker and the next start.
// A family that is not in use has zero values.
type SubnetEnv struct {
	Network, IPv6Network netip.Prefix
	// Subnet and IPv6Subnet are the first pod address, which is the bridge's,
	// and the length of the node's prefix; Masked gives the prefix.
	Subnet, IPv6Subnet netip.Prefix
	// MTU is the overlay's, in bytes.
	MTU    int
	IPMasq bool
}

// The keys of subnet.env.
const (
	keyNetwork     = "FLANNEL_NETWORK"
	keySubnet      = "FLANNEL_SUBNET"
	keyIPv6Network = "FLANNEL_IPV6_NETWORK"
	keyIPv6Subnet  = "FLANNEL_IPV6_SUBNET"
	keyMTU         = "FLANNEL_MTU"
	keyIPMasq      = "FLANNEL_IPMASQ"
)

// NewSubnetEnv says what a node with the lease l in the network c tells. mtu is
// the overlay's. A family without network or without prefix is left out.
func NewSubnetEnv(c Config, l Lease, mtu int, ipMasq bool) SubnetEnv {
	e := SubnetEnv{MTU: mtu, IPMasq: ipMasq}
	if c.Network.IsValid() && l.Prefix.IsValid() {
		e.Network, e.Subnet = c.Network, gateway(l.Prefix)
	}
	if c.IPv6Network.IsValid() && l.PrefixV6.IsValid() {
		e.IPv6Network, e.IPv6Subnet = c.IPv6Network, gateway(l.PrefixV6)
	}
	return e
}

// gateway is the first address of a prefix after its base, with its length.
func gateway(p netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(p.Masked().Addr().Next(), p.Bits())
}

// Marshal returns the file's content, byte for byte as flannel writes it.
func (e SubnetEnv) Marshal() []byte {
	var b []byte
	if e.Subnet.IsValid() {
		b = fmt.Appendf(b, "%s=%s\n%s=%s\n", keyNetwork, e.Network, keySubnet, e.Subnet)
	}
	if e.IPv6Subnet.IsValid() {
		b = fmt.Appendf(b, "%s=%s\n%s=%s\n", keyIPv6Network, e.IPv6Network, keyIPv6Subnet, e.IPv6Subnet)
	}
	return fmt.Appendf(b, "%s=%d\n%s=%t\n", keyMTU, e.MTU, keyIPMasq, e.IPMasq)
}

// ParseSubnetEnv reads a file's content. Keys that are missing leave their
// fields zero, others are ignored; what is sound is returned beside the error.
func ParseSubnetEnv(data []byte) (SubnetEnv, error) {
	values, err := ParseEnvFile(data)
	var f faults
	if err != nil {
		f.add("%w", err)
	}
	e := SubnetEnv{
		Network:     envPrefix(&f, values, keyNetwork, false).Masked(),
		Subnet:      envPrefix(&f, values, keySubnet, false),
		IPv6Network: envPrefix(&f, values, keyIPv6Network, true).Masked(),
		IPv6Subnet:  envPrefix(&f, values, keyIPv6Subnet, true),
	}
	e.MTU = envMTU(&f, values)
	e.IPMasq = envIPMasq(&f, values)
	return e, f.err()
}

// envPrefix reads the value of a key that is an address with a prefix length.
func envPrefix(f *faults, values map[string]string, key string, v6 bool) netip.Prefix {
	text, ok := values[key]
	if !ok {
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Addr().Is6() != v6 || p.Addr().Is4In6() {
		f.add("%s=%s is not one %s prefix", key, quote(text), family(v6))
		return netip.Prefix{}
	}
	return p
}

// WriteFile replaces the file at path by e at once: readers see the old file or
// the new one, also after a power cut. Its mode is 0644 whatever the umask;
// missing directories are made.
func WriteFile(path string, e SubnetEnv) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("making the directory of %s: %w", path, err)
	}
	if err := renameio.WriteFile(path, e.Marshal(), 0o644, renameio.IgnoreUmask()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
