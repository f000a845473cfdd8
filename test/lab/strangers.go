//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"

	"github.com/weft-net/weft/dataplane/state"
)

// maxStrangers keeps the strangers' pods out of the way of Network.
const maxStrangers = 20000

// wideNetwork holds Network and the strangers' pods.
var wideNetwork = netip.MustParsePrefix("10.128.0.0/9")

// stranger is a peer that the nodes are told of and that does not exist.
type stranger struct {
	name   string
	prefix netip.Prefix
	ip     netip.Addr
	mac    state.MAC
}

// strangers are those of the lab: with pods in 10.128.0.0/24, 10.128.1.0/24 and
// so on, behind 198.18.0.0, 198.18.0.1 and so on.
func (l *Lab) strangers() []stranger {
	all := make([]stranger, l.Options.Strangers)
	for i := range all {
		vtep := netip.AddrFrom4([4]byte{10, byte(128 + i>>8), byte(i), 0})
		all[i] = stranger{
			name:   fmt.Sprintf("stranger%d", i+1),
			prefix: netip.PrefixFrom(vtep, 24),
			ip:     netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}),
			mac:    macOf(vtep),
		}
	}
	return all
}

// Network holds the pods of all nodes, strangers included.
func (l *Lab) Network() netip.Prefix {
	if l.Options.Strangers > 0 || l.Options.Room {
		return wideNetwork
	}
	return Network
}

// addStrangers does for the strangers what AddKernelPeer does for a node.
func (n *Node) addStrangers(ctx context.Context) error {
	var forwarding, others []string
	for _, s := range n.lab.strangers() {
		dev, vtep := n.Overlay(), s.prefix.Addr()
		forwarding = append(forwarding, fmt.Sprintf("fdb replace %s dev %s dst %s self permanent", s.mac, dev, s.ip))
		others = append(others,
			fmt.Sprintf("neighbour replace %s lladdr %s dev %s nud permanent", vtep, s.mac, dev),
			fmt.Sprintf("route replace %s via %s dev %s onlink", s.prefix, vtep, dev))
	}
	if len(others) == 0 {
		return nil
	}
	if _, err := n.input(ctx, strings.Join(forwarding, "\n")+"\n", "bridge", "-batch", "-"); err != nil {
		return err
	}
	return n.ip(ctx, others...)
}

// strangersAtOnce is how many requests about strangers are under way together.
const strangersAtOnce = 8

// CreateStrangers makes Node objects for a number of strangers, as flanneld leaves
// them. More than the lab was made with need Options.Room.
func (l *Lab) CreateStrangers(ctx context.Context, number int) error {
	l.Options.Strangers = number
	return l.eachStranger(func(s stranger) error {
		return l.Kube.Ask(ctx, http.MethodPost, "/api/v1/nodes", Object{
			"metadata": Object{"name": s.name, "annotations": Object{
				"flannel.alpha.coreos.com/kube-subnet-manager": "true",
				"flannel.alpha.coreos.com/backend-type":        "vxlan",
				"flannel.alpha.coreos.com/backend-data":        mustJSON(l.backendData(s)),
				"flannel.alpha.coreos.com/public-ip":           s.ip,
			}},
			"spec": Object{"podCIDR": s.prefix, "podCIDRs": []netip.Prefix{s.prefix}},
		}, nil)
	})
}

// DeleteStrangers deletes the Node objects of all strangers.
func (l *Lab) DeleteStrangers(ctx context.Context) error {
	defer func() { l.Options.Strangers = 0 }()
	return l.eachStranger(func(s stranger) error {
		return l.Kube.Ask(ctx, http.MethodDelete, "/api/v1/nodes/"+s.name, nil, nil)
	})
}

// eachStranger does something for each, some at the same time, and waits for all.
func (l *Lab) eachStranger(do func(s stranger) error) error {
	all := l.strangers()
	errs := make([]error, strangersAtOnce)
	var workers sync.WaitGroup
	for worker := range strangersAtOnce {
		workers.Go(func() {
			for i := worker; i < len(all) && errs[worker] == nil; i += strangersAtOnce {
				errs[worker] = do(all[i])
			}
		})
	}
	workers.Wait()
	return errors.Join(errs...)
}
