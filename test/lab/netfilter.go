//go:build linux

package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// kubeRules are what kube-proxy in iptables mode leaves on a node without any
// Service but the API server's. They make conntrack follow every flow. The
// rule that drops INVALID packets is the one that finds out who lets
// conntrack's view of a connection go stale.
const kubeRules = `*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A INPUT -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
`

// loadNetfilter loads kube-proxy's rules.
func (n *Node) loadNetfilter(ctx context.Context) error {
	return n.restoreRules(ctx, kubeRules)
}

// LoadFlannelRules loads what flannel adds: pods may be forwarded, and keep
// their address among each other but not towards the world. (Weft nodes get
// these rules from the agent.)
func (n *Node) LoadFlannelRules(ctx context.Context) error {
	return n.restoreRules(ctx, strings.NewReplacer("NET", n.lab.Network().String(), "NODE", n.Prefix.String()).Replace(`*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s NET -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d NET -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s NODE -d NET -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s NET -d NODE -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s NET -d NODE -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s NET ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s NET -d NET -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
`))
}

// AddService makes a ClusterIP on the node as kube-proxy does, with one
// backend, for proto tcp or udp. The lab needs Options.Netfilter.
func (n *Node) AddService(ctx context.Context, proto string, service, backend netip.AddrPort) error {
	chain := fmt.Sprintf("KUBE-SVC-%08X%04X", service.Addr().As4(), service.Port())
	return n.restoreRules(ctx, strings.NewReplacer(
		"CHAIN", chain, "PROTO", proto, "BACKEND", backend.String(), "POD", backend.Addr().String(), "NET", Network.String(),
		"IP", service.Addr().String(), "PORT", fmt.Sprint(service.Port()),
	).Replace(`*nat
:CHAIN - [0:0]
-A KUBE-SERVICES -d IP/32 -p PROTO -m PROTO --dport PORT -j CHAIN
-A CHAIN ! -s NET -d IP/32 -p PROTO -m PROTO --dport PORT -j KUBE-MARK-MASQ
-A CHAIN -s POD/32 -j KUBE-MARK-MASQ
-A CHAIN -p PROTO -m PROTO -j DNAT --to-destination BACKEND
COMMIT
`))
}

// legacyTables is a directory of a node with programs that come before all others.
const legacyTables = "/run/legacy-tables"

// linkLegacyTables makes that directory.
func (n *Node) linkLegacyTables() error {
	dir := n.Path(legacyTables)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, program := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"", "-save", "-restore"} {
			path, err := exec.LookPath(program + "-legacy" + what)
			if err != nil {
				return err
			}
			if err := os.Symlink(path, filepath.Join(dir, program+what)); err != nil {
				return err
			}
		}
	}
	return nil
}

// restoreRules adds rules to those that are there.
func (n *Node) restoreRules(ctx context.Context, rules string) error {
	program := "iptables-restore"
	if n.lab.Options.LegacyTables {
		program = "iptables-legacy-restore"
	} else if _, err := exec.LookPath("iptables-nft-restore"); err == nil {
		program = "iptables-nft-restore"
	}
	_, err := n.input(ctx, rules, program, "--noflush")
	return err
}
