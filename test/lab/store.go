//go:build linux

package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	// FlannelPrefix is where flannel has its keys in etcd by default.
	FlannelPrefix = "/coreos.com/network"
	// SubnetFile is where a node's part of the network is written for the CNI
	// plugin and Docker, as the node sees it.
	SubnetFile = "/run/flannel/subnet.env"
	// NetConfFile is where flannel's configuration lies with a Kubernetes store, as
	// the node sees it.
	NetConfFile = "/run/kube-flannel/net-conf.json"
	// KubeconfigFile is where it lies how flannel's service account speaks to the
	// API, as the node sees it.
	KubeconfigFile = "/run/kube-flannel/kubeconfig"
)

// joins reports whether a node tells a store of itself and hears from it of
// others.
func (n *Node) joins() bool {
	return n.Kind == Flanneld || n.Kind == Weft && n.lab.Options.Store != StoreFiles
}

// buildStore starts what the nodes hear of each other by.
func (l *Lab) buildStore(ctx context.Context) error {
	switch {
	case l.Options.Store == StoreKube:
		return l.buildKubeStore(ctx)
	case l.Options.Store == StoreEtcd, slices.ContainsFunc(l.Nodes, (*Node).joins):
		return l.buildEtcdStore(ctx)
	}
	return nil
}

// buildEtcdStore starts etcd and writes flannel's configuration, and the
// strangers as if each had its flanneld. The nodes get the subnets of the lab's
// plan, as flanneld asks for that which its subnet file says it had.
func (l *Lab) buildEtcdStore(ctx context.Context) (err error) {
	l.logf("etcd")
	if l.Etcd, err = l.StartEtcd(ctx, l.Options.Etcd); err != nil {
		return err
	}
	pairs := map[string]string{FlannelPrefix + "/config": l.NetConf()}
	for _, s := range l.strangers() {
		key := FlannelPrefix + "/subnets/" + strings.ReplaceAll(s.prefix.String(), "/", "-")
		pairs[key] = mustJSON(map[string]any{"PublicIP": s.ip, "BackendType": "vxlan", "BackendData": l.backendData(s)})
	}
	if err := l.Etcd.Put(ctx, pairs); err != nil {
		return err
	}
	for _, n := range l.Nodes {
		if err := n.WriteSubnetFile(); err != nil {
			return err
		}
	}
	return nil
}

// WriteSubnetFile writes what the node's subnet file would say. Over etcd a node
// asks for the subnet that it says.
func (n *Node) WriteSubnetFile() error { return n.writeFile(SubnetFile, n.subnetFile()) }

// NetConf is flannel's configuration of the network.
func (l *Lab) NetConf() string {
	o := l.Options
	backend := map[string]any{"Type": "vxlan", "VNI": o.VNI, "Port": o.Port, "DirectRouting": o.DirectRouting}
	if o.BackendMTU > 0 {
		backend["MTU"] = o.BackendMTU
	}
	conf := map[string]any{
		"Network":        l.Network(),
		"SubnetLen":      podPrefix(1).Bits(),
		"EnableNFTables": o.NFTables,
		"Backend":        backend,
	}
	if o.Families.Has6() {
		conf["EnableIPv6"], conf["IPv6Network"] = true, NetworkV6
	}
	if !o.Families.Has4() {
		conf["EnableIPv4"] = false
		delete(conf, "Network")
		delete(conf, "SubnetLen")
	}
	return mustJSON(conf)
}

// backendData is what a stranger's flanneld would say of its overlay.
func (l *Lab) backendData(s stranger) any {
	return struct {
		VNI     uint32
		VtepMAC string
	}{l.Options.VNI, s.mac.String()}
}

// mustJSON is for values that have a JSON form.
func mustJSON(value any) string {
	text, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// subnetFile is what the node's subnet file would say.
func (n *Node) subnetFile() string {
	var b strings.Builder
	write := func(family string, network, prefix netip.Prefix, gateway netip.Addr) {
		fmt.Fprintf(&b, "FLANNEL_%sNETWORK=%s\nFLANNEL_%sSUBNET=%s/%d\n", family, network, family, gateway, prefix.Bits())
	}
	if n.lab.Options.Families.Has4() {
		write("", n.lab.Network(), n.Prefix, n.Gateway)
	}
	if n.lab.Options.Families.Has6() {
		write("IPV6_", NetworkV6, n.PrefixV6, n.GatewayV6)
	}
	fmt.Fprintf(&b, "FLANNEL_MTU=%d\nFLANNEL_IPMASQ=%t\n", n.lab.overlayMTU(), n.lab.Options.Netfilter)
	return b.String()
}

// writeFile writes a file of the node, whole or not at all.
func (n *Node) writeFile(path, text string) error {
	path = n.Path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// FlannelFlags are what flanneld is told on the node, and an agent that stands in
// its place.
func (n *Node) FlannelFlags() []string {
	o := n.lab.Options
	rules := fmt.Sprint(o.Netfilter)
	flags := []string{"--iface", "eth0", "--ip-masq=" + rules, "--iptables-forward-rules=" + rules}
	if n.lab.Kube != nil {
		flags = append(flags, "--kube-subnet-mgr", "--kubeconfig-file", KubeconfigFile, "--net-config-path", NetConfFile)
	} else {
		flags = append(flags, "--etcd-endpoints", n.lab.Etcd.URL)
	}
	return append(flags, o.FlannelFlags...)
}

// flannelEnvironment says by which name the API knows the node.
func (n *Node) flannelEnvironment() []string { return []string{"NODE_NAME=" + n.name} }
