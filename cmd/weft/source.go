package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/etcd"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/controlplane/kube"
	"github.com/weft-net/weft/controlplane/static"
	"github.com/weft-net/weft/dataplane/uplink"
)

// source is where the peers will come from.
type source struct {
	// kind is the store's, place tells people where it is.
	kind, place string
	// open makes the store. Its error may pass, when what it has to ask is away:
	// it is called again.
	open func(context.Context) (controlplane.Store, error)
	// prepare finds out what has to be known before the store that open returned
	// can be offered anything; nil where it wants no offer.
	prepare func(context.Context, controlplane.Store) (preparation, error)
	// flannel tells that the node stands in a flannel's place: what waits for
	// flannel's files and conditions waits for ours.
	flannel bool
}

// preparation is what an offer depends on.
type preparation struct {
	uplink uplink.Options
	vni    uint32
}

// newSource opens what the options say the peers come from. What is wrong with
// files is an error now, while somebody is watching; what is wrong with servers
// will be waited for.
func newSource(e *env, o *agentOptions, log *slog.Logger) (source, error) {
	switch {
	case o.Config != "":
		return staticSource(o, log)
	case o.KubeSubnetMgr:
		return kubeSource(e, o, log)
	}
	return etcdSource(o, log)
}

func staticSource(o *agentOptions, log *slog.Logger) (source, error) {
	store, err := static.Open(o.Config, log)
	if err != nil {
		return source{}, fmt.Errorf("the config file cannot be used:\n%w", err)
	}
	first := store.State()
	log.Info("config read", "path", store.Path(), "node", first.Local.Node, "vni", first.VNI, "peers", len(namesOf(first)))
	return source{
		kind: store.Kind(), place: store.Path(),
		open: func(context.Context) (controlplane.Store, error) { return store, nil },
	}, nil
}

func kubeSource(e *env, o *agentOptions, log *slog.Logger) (source, error) {
	data, err := os.ReadFile(o.NetConfigPath)
	if err != nil {
		return source{}, fmt.Errorf("reading the network's configuration (--net-config-path): %w", err)
	}
	kube.TakeLogs(log)
	options := o.kube(log)
	if options.Config, err = flannel.ParseConfig(data); err != nil {
		return source{}, fmt.Errorf("%s cannot be used:\n%w", o.NetConfigPath, err)
	}
	log.Info("config read", "path", o.NetConfigPath, "networks", options.Config.Networks(), "vni", options.Config.VNI)
	return source{
		kind: "kube", place: o.KubeAPIURL, flannel: true,
		open: func(ctx context.Context) (controlplane.Store, error) {
			if options.Node == "" {
				if options.Node, err = kube.FindNode(ctx, options, e.getenv); err != nil {
					return nil, err
				}
			}
			return kube.Open(options)
		},
		prepare: func(ctx context.Context, s controlplane.Store) (preparation, error) {
			c := options.Config
			choice := o.uplink(c.EnableIPv4, c.EnableIPv6)
			said, err := s.(*kube.Store).Overrides(ctx)
			// As flannel has it: the annotation comes before the flag, and
			// chooses the interface where nothing else does.
			override(&choice.PublicIP, said.NodePublicIP)
			override(&choice.PublicIPv6, said.NodePublicIPv6)
			return preparation{choice, c.VNI}, err
		},
	}, nil
}

// override puts an address in the place of a flag's, if there is one.
func override(flag *string, said netip.Addr) {
	if said.IsValid() {
		*flag = said.String()
	}
}

func etcdSource(o *agentOptions, log *slog.Logger) (source, error) {
	options := etcdOptions(o, log)
	store, err := etcd.Open(options)
	if err != nil {
		return source{}, err
	}
	return source{
		kind: store.Kind(), place: strings.Join(options.Endpoints, ","), flannel: true,
		open: func(context.Context) (controlplane.Store, error) { return store, nil },
		prepare: func(ctx context.Context, _ controlplane.Store) (preparation, error) {
			c, err := store.Config(ctx)
			return preparation{o.uplink(c.EnableIPv4, c.EnableIPv6), c.VNI}, err
		},
	}, nil
}

// etcdOptions are those of the flags, and the prefixes that the node had.
func etcdOptions(o *agentOptions, log *slog.Logger) etcd.Options {
	options := o.etcd(log)
	options.Previous = previousPrefixes(o.SubnetFile, log)
	return options
}

// previousPrefixes are those that the node had at its last start, as the subnet file
// says; none if it is not there.
func previousPrefixes(subnetFile string, log *slog.Logger) (prefixes []netip.Prefix) {
	data, err := os.ReadFile(subnetFile)
	if err != nil {
		return nil
	}
	previous, err := flannel.ParseSubnetEnv(data)
	if err != nil {
		log.Warn("the last start's subnet file is not all right; what is, counts", "path", subnetFile, "error", err)
	}
	for _, p := range []netip.Prefix{previous.Subnet, previous.IPv6Subnet} {
		if p.IsValid() {
			prefixes = append(prefixes, p.Masked())
		}
	}
	return prefixes
}
