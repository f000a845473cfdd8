//go:build linux

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// flannelPrefix is where flannel has its keys by default.
	flannelPrefix = "/coreos.com/network"
	// subnetFile is where flanneld says which part of the network a node has.
	subnetFile = "/run/flannel/subnet.env"
	// flanneldTimeout is how long one may take to know all peers: it asks for
	// the lease of each.
	flanneldTimeout = 60 * time.Second
)

// buildFlannelStore starts etcd and writes flannel's configuration, and the
// strangers as if each had its flanneld.
func (l *Lab) buildFlannelStore(ctx context.Context) (err error) {
	if l.etcd, err = l.StartEtcd(ctx, l.Options.Etcd); err != nil {
		return err
	}
	o := l.Options
	pairs := map[string]string{
		flannelPrefix + "/config": fmt.Sprintf(`{"Network": %q, "SubnetLen": %d, "Backend": {"Type": "vxlan", "VNI": %d, "Port": %d}}`,
			l.Network(), podPrefix(1).Bits(), o.VNI, o.Port),
	}
	for _, s := range l.strangers() {
		key := flannelPrefix + "/subnets/" + strings.ReplaceAll(s.prefix.String(), "/", "-")
		text, err := json.Marshal(flannelLease{s.ip, "vxlan", flannelVXLAN{o.VNI, s.mac.String()}})
		if err != nil {
			return err
		}
		pairs[key] = string(text)
	}
	return l.etcd.Put(ctx, pairs)
}

// flannelLease is what a node writes about itself.
type flannelLease struct {
	PublicIP    netip.Addr
	BackendType string
	BackendData flannelVXLAN
}

type flannelVXLAN struct {
	VNI     uint32
	VtepMAC string
}

// startFlanneld starts flanneld on a node, which then asks for the subnet that
// its subnet file says it had.
func (n *Node) startFlanneld() (err error) {
	file := n.Path(subnetFile)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	had := fmt.Sprintf("FLANNEL_NETWORK=%s\nFLANNEL_SUBNET=%s/%d\n", n.lab.Network(), n.Gateway, n.Prefix.Bits())
	if err := os.WriteFile(file, []byte(had), 0o644); err != nil {
		return err
	}
	rules := fmt.Sprint(n.lab.Options.Netfilter)
	n.flanneld, err = n.Start(n.lab.Options.Flanneld, "--etcd-endpoints", n.lab.etcd.URL, "--iface", "eth0",
		"--ip-masq="+rules, "--iptables-forward-rules="+rules,
		// It looks after its rules by starting a dozen programs, every five
		// seconds by default: noise to those who measure.
		"--iptables-resync", "3600")
	return err
}

// waitForFlanneld waits until all Flanneld nodes have a route to each peer.
func (l *Lab) waitForFlanneld(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, flanneldTimeout, errors.New("no routes to all peers"))
	defer cancel()
	for _, n := range l.Nodes {
		for n.Kind == Flanneld {
			routes, err := n.Output(ctx, "ip -4 route show dev "+n.Overlay())
			if err == nil && strings.Count(routes, " via ") >= len(n.Peers())+l.Options.Strangers {
				break
			}
			if !n.flanneld.Running() || sleep(ctx, 50*time.Millisecond) != nil {
				return fmt.Errorf("%s: waiting for flanneld: %w\n%s", n, errors.Join(context.Cause(ctx), err), n.flanneld.Output())
			}
		}
	}
	return nil
}
