//go:build linux

// Package cluster builds a real Kubernetes cluster out of namespaces on one machine:
// the nodes and the underlay of test/lab, and in them etcd, kube-apiserver,
// kube-controller-manager and kube-scheduler (in the underlay), containerd, kubelet
// and kube-proxy (in every node). weft runs as a DaemonSet, or stock flannel does, and
// CoreDNS where it is asked for. Images are built here and imported; no registry and no
// engine is needed.
//
//	underlay 192.0.2.1: etcd, kube-apiserver, kube-controller-manager, kube-scheduler
//	   |
//	   +-- n1 192.0.2.11, n2 .12, n3 .13: containerd, kubelet, kube-proxy;
//	       pods: weft (of the host's network), and others on cni0
//
// What the machine has is left alone: all of a node lies in its own /run; /etc, /opt
// and parts of /var are overlays with that as their upper layer, its processes are of a
// PID namespace that ends with them, and it has control groups of its own.
package cluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weft-net/weft/deploy"
	"github.com/weft-net/weft/test/lab"
)

// Options say what a cluster looks like.
type Options struct {
	// Name is that of the lab, one that nobody uses by default.
	Name string
	// Nodes is the number of nodes, 3 by default.
	Nodes int
	// ProxyMode is kube-proxy's: iptables (the default) or nftables.
	ProxyMode string
	// Manifest is that of the network: deploy/weft.yaml by default. Its DaemonSet is
	// called as flannel's is.
	Manifest string
	// Flannel has the nodes know the images that FlannelManifest names.
	Flannel bool
	// Keep leaves the cluster up when the process that made it ends.
	Keep bool
	// Log gets a line for every step of building, if set.
	Log io.Writer
}

// Cluster is one that is up, until Close.
type Cluster struct {
	Options Options
	Lab     *lab.Lab
	Nodes   []*Node
	// Kubeconfig is the path of the administrator's.
	Kubeconfig string

	programs map[string]string
	// images are the paths of those that every node has.
	images []string
	traces *traces
}

// programs are those of test/peers that a cluster needs.
var programs = []string{
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl",
}

// New builds a cluster, and waits until its network is on all nodes and they are Ready.
// When that fails nothing is left of it.
func New(ctx context.Context, o Options) (_ *Cluster, err error) {
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	if o.ProxyMode == "" {
		o.ProxyMode = "iptables"
	}
	if o.Manifest == "" {
		o.Manifest = deploy.Manifest
	}
	c := &Cluster{Options: o}
	needed := programs
	if o.Flannel {
		needed = append(slices.Clone(programs), "flanneld", "install-conf")
	}
	if c.programs, err = lab.Programs(needed...); err != nil {
		return nil, err
	}
	if c.Lab, err = lab.New(ctx, lab.Options{Name: o.Name, Nodes: o.Nodes, Pods: lab.NoPods, Keep: o.Keep}); err != nil {
		return nil, err
	}
	c.Kubeconfig = c.file(kubeconfigFile)
	if err := errors.Join(removeAbandonedGroups(), c.build(ctx)); err != nil {
		return nil, errors.Join(fmt.Errorf("building the cluster: %w", err), c.Close())
	}
	return c, nil
}

// Open returns a cluster that another process made and left up. It can be asked and
// removed, but not be changed.
func Open(name string) (*Cluster, error) {
	l, err := lab.Open(name)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Options: Options{Name: name, Nodes: len(l.Nodes)}, Lab: l}
	c.Kubeconfig = c.file(kubeconfigFile)
	if c.programs, err = lab.Programs("kubectl"); err != nil {
		return nil, err
	}
	for _, n := range l.Nodes {
		c.Nodes = append(c.Nodes, &Node{Node: n, cluster: c})
	}
	return c, nil
}

// build makes the cluster, each step leaning on those before it.
func (c *Cluster) build(ctx context.Context) (err error) {
	c.logf("images")
	if err := c.buildImages(); err != nil {
		return err
	}
	c.logf("control plane")
	if err := c.startControlPlane(ctx); err != nil {
		return err
	}
	for _, n := range c.Lab.Nodes {
		c.Nodes = append(c.Nodes, &Node{Node: n, cluster: c})
	}
	c.logf("nodes")
	if err := c.onAllNodes(func(n *Node) error { return n.start(ctx) }); err != nil {
		return err
	}
	if c.traces, err = c.trace(); err != nil {
		return err
	}
	for _, n := range c.Nodes { // of one that is not known yet nobody waits for anything
		if err := c.wait(ctx, "wait --for=create --timeout=300s node/"+n.String()); err != nil {
			return err
		}
	}
	c.logf("network")
	if err := c.Apply(ctx, c.Options.Manifest); err != nil {
		return err
	}
	if err := c.WaitForNetwork(ctx); err != nil {
		return err
	}
	if err := c.wait(ctx, "wait --for=condition=Ready node --all --timeout=300s"); err != nil {
		return err
	}
	c.logf("up")
	return nil
}

// dnsManifest runs CoreDNS.
//
//go:embed dns.yaml
var dnsManifest string

// StartDNS runs CoreDNS, and waits until it does.
func (c *Cluster) StartDNS(ctx context.Context) error {
	c.logf("CoreDNS")
	found, err := lab.Programs("coredns")
	if err != nil {
		return err
	}
	image, err := programImage(c.Lab.Directory(), found["coredns"], DNSImage, "/coredns")
	if err != nil {
		return err
	}
	if err := c.Import(ctx, image); err != nil {
		return err
	}
	if err := c.Apply(ctx, dnsManifest); err != nil {
		return err
	}
	return c.wait(ctx, "-n kube-system rollout status deployment/coredns --timeout=300s")
}

// StartNetworkPolicies runs on every node what flannel's chart has for NetworkPolicy,
// kube-network-policies, by its own manifest, and waits until it does.
func (c *Cluster) StartNetworkPolicies(ctx context.Context) error {
	c.logf("kube-network-policies")
	found, err := lab.Programs("kube-network-policies", "kube-network-policies.yaml")
	if err != nil {
		return err
	}
	manifest, err := os.ReadFile(found["kube-network-policies.yaml"])
	if err != nil {
		return err
	}
	images := Images(string(manifest))
	if len(images) != 1 {
		return fmt.Errorf("%s names the images %q, want one", found["kube-network-policies.yaml"], images)
	}
	image, err := programImage(c.Lab.Directory(), found["kube-network-policies"], images[0], "/bin/netpol")
	if err != nil {
		return err
	}
	if err := c.Import(ctx, image); err != nil {
		return err
	}
	if err := c.Apply(ctx, string(manifest)); err != nil {
		return err
	}
	return c.wait(ctx, "-n kube-system rollout status daemonset/kube-network-policies --timeout=300s")
}

// wait has kubectl wait for something, and tells what there was if it was in vain.
func (c *Cluster) wait(ctx context.Context, args string) error {
	_, err := c.Kubectl(ctx, strings.Fields(args)...)
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, c.Story(ctx))
	}
	return err
}

// onAllNodes does something on all nodes at once.
func (c *Cluster) onAllNodes(do func(n *Node) error) error {
	var group sync.WaitGroup
	errs := make([]error, len(c.Nodes))
	for i, n := range c.Nodes {
		group.Go(func() { errs[i] = do(n) })
	}
	group.Wait()
	return errors.Join(errs...)
}

// buildImages builds the images that nodes have from the start.
func (c *Cluster) buildImages() error {
	dir := c.Lab.Directory()
	pod, err := buildPodImage(dir)
	if err != nil {
		return err
	}
	weft, err := buildWeftImage(dir)
	if err != nil {
		return err
	}
	c.images = append(c.images, pod, weft)
	if c.Options.Flannel {
		flannel, err := buildFlannelImages(dir, weft, c.programs["flanneld"], c.programs["install-conf"])
		if err != nil {
			return err
		}
		c.images = append(c.images, flannel...)
	}
	return nil
}

// Import gives an image to all nodes, also to those that are made anew later.
func (c *Cluster) Import(ctx context.Context, path string) error {
	c.images = append(c.images, path)
	return c.onAllNodes(func(n *Node) error { return n.importImage(ctx, path) })
}

// WaitForNetwork waits until the network runs on all nodes, as it is wanted now.
func (c *Cluster) WaitForNetwork(ctx context.Context) error {
	return c.wait(ctx, "-n kube-flannel rollout status daemonset/kube-flannel-ds --timeout=300s")
}

// startControlPlane starts what decides, in the underlay.
func (c *Cluster) startControlPlane(ctx context.Context) (err error) {
	if c.Lab.Kube, err = c.Lab.StartKube(ctx, c.programs["kube-apiserver"], c.programs["etcd"]); err != nil {
		return err
	}
	kubeconfig, err := c.Lab.Kube.Kubeconfig(c.Lab.Kube.URL, lab.AdminToken)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.Kubeconfig, []byte(kubeconfig), 0o600); err != nil {
		return err
	}
	_, err = c.Lab.Underlay.Start(c.programs["kube-controller-manager"],
		"--kubeconfig", c.Kubeconfig, "--leader-elect=false", "--bind-address", "127.0.0.1",
		"--allocate-node-cidrs", "--cluster-cidr", podNetwork, "--service-cluster-ip-range", lab.ServiceNetwork.String(),
		"--service-account-private-key-file", c.file("service-accounts.key"),
		"--root-ca-file", c.file("certificates/apiserver.crt"))
	if err != nil {
		return err
	}
	_, err = c.Lab.Underlay.Start(c.programs["kube-scheduler"],
		"--kubeconfig", c.Kubeconfig, "--leader-elect=false", "--bind-address", "127.0.0.1")
	return err
}

const (
	// kubeconfigFile is the name of the administrator's kubeconfig.
	kubeconfigFile = "admin.kubeconfig"
	// podNetwork is where all pods have their addresses.
	podNetwork = "10.244.0.0/16"
	// dnsAddress is where pods ask for names.
	dnsAddress = "10.96.0.10"
)

// file is the path of one of the cluster's files, which go with it.
func (c *Cluster) file(name string) string { return filepath.Join(c.Lab.Directory(), name) }

// Kubectl runs kubectl as the administrator and returns what it printed.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.Lab.Underlay.Output(ctx, c.KubectlCommand(args...)...)
}

// KubectlCommand is the command, to be run in the underlay.
func (c *Cluster) KubectlCommand(args ...string) []string {
	return append([]string{c.programs["kubectl"], "--kubeconfig", c.Kubeconfig}, args...)
}

// Apply applies manifests.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	path := c.file("apply.yaml")
	if err := os.WriteFile(path, []byte(manifests), 0o600); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "apply", "-f", path)
	return err
}

// Story is what an operator would look at first when something is wrong.
func (c *Cluster) Story(ctx context.Context) string {
	var b strings.Builder
	for _, question := range []string{
		"get nodes,pods -A -o wide",
		"get events -A --field-selector type!=Normal",
		"-n kube-flannel logs -l app=flannel -c kube-flannel --tail=40 --prefix",
	} {
		out, err := c.Kubectl(ctx, strings.Fields(question)...)
		fmt.Fprintf(&b, "kubectl %s\n%s", question, out)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	return b.String()
}

// Close takes everything away.
func (c *Cluster) Close() error {
	// The nodes' programs end with their namespaces, and leave their groups.
	stopped := c.onAllNodes(func(n *Node) error { return n.stop() })
	return errors.Join(stopped, c.Lab.Close(), removeGroupsOf(c.Lab.Name()))
}

func (c *Cluster) logf(format string, args ...any) {
	if c.Options.Log != nil {
		fmt.Fprintf(c.Options.Log, time.Now().Format("15:04:05 ")+format+"\n", args...)
	}
}
