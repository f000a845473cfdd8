//go:build linux

// Package lab builds a small cluster out of namespaces on one machine, for
// tests, demonstrations and benchmarks. It is made of the real things (kernel
// devices, netfilter, mounts), and nothing of the machine itself is touched.
//
//	     lab-n1 (node)                                     lab-n2 (node)
//	+------------------------------+              +------------------------------+
//	| p1: 10.244.1.2  p2: .3       |              | p1: 10.244.2.2  p2: .3       |
//	|   eth0            eth0       |              |   eth0            eth0       |
//	|     |  (lab-n1-p1)  |  (-p2) |              |     |  (lab-n2-p1)  |  (-p2) |
//	|   veth1           veth2      |              |   veth1           veth2      |
//	|     +------ cni0 ---+        |              |     +------ cni0 ---+        |
//	|        10.244.1.1/24         |              |        10.244.2.1/24         |
//	|              |               |              |              |               |
//	|          flannel.1           |              |          flannel.1           |
//	|          10.244.1.0          |              |          10.244.2.0          |
//	|              |               |              |              |               |
//	|    eth0 192.0.2.11/24        |              |    eth0 192.0.2.12/24        |
//	+--------------|---------------+              +--------------|---------------+
//	               |           lab-underlay                      |
//	            +--n1--------------- br0 ------------------------n2--+
//	            |               192.0.2.1/24                         |
//	            +----------------------------------------------------+
//
// "lab" stands for the lab's name: several labs exist side by side with the
// same addresses, since they share nothing. A node is a network, mount and UTS
// namespace held open by a sleeping process; /run and /var/lib/weft are private
// tmpfs and /sys/fs/bpf is a BPF filesystem of its own there, so programs run
// with their default paths. A pod is a network namespace; its programs see the
// mounts of its node. cni0, its pods and their addresses are there from the
// start; flannel.1 is made by the node's kind: by plain ip and bridge commands,
// by the weft agent, by stock flanneld, or not at all. Labs with IPv6 have
// 2001:db8::11 and fd00:10:244:1::/64 where the picture has 192.0.2.11 and
// 10.244.1.0/24, and flannel-v6.1 beside flannel.1.
//
// Every MAC address is 0a:58 and then the IPv4 address of the device, but for
// those of overlay devices that flanneld or a store chooses.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
)

// Kind says who makes a node's overlay.
type Kind string

const (
	// Bare nodes have no overlay: the caller makes one, by StartAgent or else.
	Bare Kind = "bare"
	// Kernel nodes get flannel's state by ip and bridge commands: a peer that
	// shares no code with weft.
	Kernel Kind = "kernel"
	// Weft nodes run the weft agent; New waits until each is ready, and over a
	// store of flannel's until each has routes to all others.
	Weft Kind = "weft"
	// Flanneld nodes run stock flanneld; New waits until each has routes to all
	// others.
	Flanneld Kind = "flanneld"
)

// Store says where nodes hear of each other.
type Store string

const (
	// StoreFiles gives each Weft node a file that names all others. Flanneld
	// nodes, which know no such file, hear of each other by etcd.
	StoreFiles Store = "files"
	// StoreEtcd is an etcd in the underlay.
	StoreEtcd Store = "etcd"
	// StoreKube is a Kubernetes API server in the underlay, with a Node object
	// for each node and flannel's service account.
	StoreKube Store = "kube"
)

// Underlay says what crosses between nodes.
type Underlay string

const (
	// Virtual is veth as it is: aggregates of up to 64 KB cross whole.
	Virtual Underlay = "virtual"
	// Wire makes each uplink send packets no longer than its MTU and merge
	// what it receives (GRO), as a network card does.
	Wire Underlay = "wire"
	// Summed is Wire with whole checksums, which each node computes: a driver that
	// strips packets leaves those alone whose checksums are still open.
	Summed Underlay = "summed"
	// Cards are network cards of the machine: Options.Cards.
	Cards Underlay = "cards"
)

// underlays are all kinds.
var underlays = []Underlay{Virtual, Wire, Summed, Cards}

// Options say what a lab looks like. The zero value is two bare nodes with one
// pod each on a virtual underlay.
type Options struct {
	// Name is part of every namespace's name. Empty means a new name that
	// nobody uses. Lower-case letters and digits.
	Name string `json:"name"`
	// Nodes is the number of nodes, 2 by default, and Pods that of the pods on
	// each, 1 by default (NoPods for none).
	Nodes int `json:"nodes"`
	Pods  int `json:"pods"`
	// Kinds are the kinds of the nodes in order; nodes beyond the list are of
	// the kind that ends it. Empty means Bare.
	Kinds []Kind `json:"kinds"`
	// Underlay is Virtual by default.
	Underlay Underlay `json:"underlay"`
	// Cards are the nodes' uplinks in an underlay of cards, one for each: devices
	// of the machine that are cabled to each other and that nobody uses.
	Cards []string `json:"cards,omitempty"`
	// Families is IPv4 by default.
	Families Families `json:"families"`
	// Store is StoreFiles by default.
	Store Store `json:"store"`
	// MTU is the underlay's, 1500 by default. Pods and cni0 have 50 less.
	MTU int `json:"mtu"`
	// VNI and Port are the overlay's: 1 and 8472 by default, as flannel's.
	VNI  uint32 `json:"vni"`
	Port uint16 `json:"port"`
	// BackendMTU is Backend.MTU of flannel's configuration, which may be less than
	// the underlay's; 0 leaves it out.
	BackendMTU int `json:"backendMTU"`
	// DirectRouting and NFTables are flannel's settings of these names, for
	// nodes over a store of flannel's.
	DirectRouting bool `json:"directRouting"`
	NFTables      bool `json:"nfTables"`
	// Netfilter loads the rules that kube-proxy leaves on a node (and on
	// Kernel and Flanneld nodes those of flannel), which also turns conntrack
	// on. With KubeProxy those of kube-proxy are left to the caller, who runs it.
	Netfilter bool `json:"netfilter"`
	KubeProxy bool `json:"kubeProxy"`
	// LegacyTables has the nodes' iptables be the one that writes the kernel's old
	// tables, where else it writes nftables.
	LegacyTables bool `json:"legacyTables"`
	// Strangers is a number of peers that all nodes are told of besides each
	// other, and that do not exist: tables as full as those of a big cluster.
	Strangers int `json:"strangers"`
	// Room makes the pods' network wide enough for strangers that come later.
	Room bool `json:"room"`
	// Binary is the weft program that Weft nodes run, and AgentFlags what its
	// agent is told besides where its peers come from.
	Binary     string   `json:"binary"`
	AgentFlags []string `json:"agentFlags"`
	// Flanneld, Etcd and APIServer are the programs that Flanneld nodes and
	// stores need. FlannelFlags is what flanneld is told besides where its peers
	// come from, and the agent too where it stands in flanneld's place.
	Flanneld     string   `json:"flanneld"`
	FlannelFlags []string `json:"flannelFlags"`
	Etcd         string   `json:"etcd"`
	APIServer    string   `json:"apiServer"`
	// Keep leaves the lab up when the process that made it ends without Close.
	// Else the next lab made on the machine clears it away.
	Keep bool `json:"keep"`
	// Log gets a line for every step of building, if set.
	Log io.Writer `json:"-"`
}

// NoPods as Options.Pods means nodes without any pod.
const NoPods = -1

// limits of the address plan: 192.0.2.(10+node), 10.244.(node).(1+pod).
const (
	maxNodes = 200
	maxPods  = 250
)

// defaults fills in what is not set and reports everything that is wrong.
func (o Options) defaults() (Options, error) {
	setDefault(&o.Nodes, 2)
	setDefault(&o.Pods, 1)
	setDefault(&o.MTU, 1500)
	setDefault(&o.VNI, 1)
	setDefault(&o.Port, 8472)
	setDefault(&o.Underlay, Virtual)
	setDefault(&o.Families, IPv4)
	setDefault(&o.Store, StoreFiles)
	o.Pods = max(o.Pods, 0)

	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if o.Nodes < 1 || o.Nodes > maxNodes {
		wrong("%d nodes: a lab has 1 to %d", o.Nodes, maxNodes)
	}
	if o.Pods > maxPods {
		wrong("%d pods: a node has at most %d", o.Pods, maxPods)
	}
	if o.MTU < 700 || o.MTU > 65000 {
		wrong("underlay MTU %d: choose 700 to 65000", o.MTU)
	}
	if !slices.Contains(underlays, o.Underlay) {
		wrong("underlay %q: choose one of %s", o.Underlay, underlays)
	}
	for _, k := range o.Kinds {
		if !slices.Contains([]Kind{Bare, Kernel, Weft, Flanneld}, k) {
			wrong("node kind %q: choose %s, %s, %s or %s", k, Bare, Kernel, Weft, Flanneld)
		}
	}
	if o.Strangers < 0 || o.Strangers > maxStrangers {
		wrong("%d strangers: a lab has at most %d", o.Strangers, maxStrangers)
	}
	if slices.Contains(o.Kinds, Flanneld) && (o.Flanneld == "" || o.Etcd == "") {
		wrong("nodes of kind %s need flanneld and etcd: give both", Flanneld)
	}
	errs = append(errs, o.storeFaults()...)
	errs = append(errs, o.cardFaults()...)
	if slices.Contains(o.Kinds, Weft) && o.Binary == "" {
		wrong("nodes of kind %s need the weft program: give Binary", Weft)
	}
	if o.Binary != "" {
		abs, err := filepath.Abs(o.Binary)
		if err != nil {
			wrong("finding %s: %w", o.Binary, err)
		}
		o.Binary = abs
	}
	return o, errors.Join(errs...)
}

// storeFaults are those of families and stores.
func (o Options) storeFaults() (errs []error) {
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !slices.Contains([]Families{IPv4, DualStack, IPv6}, o.Families) {
		wrong("families %q: choose %s, %s or %s", o.Families, IPv4, DualStack, IPv6)
	}
	if !slices.Contains([]Store{StoreFiles, StoreEtcd, StoreKube}, o.Store) {
		wrong("store %q: choose %s, %s or %s", o.Store, StoreFiles, StoreEtcd, StoreKube)
	}
	if o.Store != StoreFiles && o.Etcd == "" || o.Store == StoreKube && o.APIServer == "" {
		wrong("store %s needs its programs: give Etcd, and for %s APIServer too", o.Store, StoreKube)
	}
	if o.Families == DualStack && o.Store == StoreFiles && slices.Contains(o.Kinds, Weft) {
		wrong("a file has one family of peers: nodes of kind %s need another store in a lab of both", Weft)
	}
	if o.Families == IPv6 && o.Store != StoreKube && slices.Contains(o.Kinds, Flanneld) {
		wrong("flanneld tells leases in etcd apart by their IPv4 address: give nodes of kind %s the store %s in a lab without", Flanneld, StoreKube)
	}
	if o.Families != IPv4 && o.Strangers > 0 || o.Families == IPv6 && o.Room {
		wrong("strangers have IPv4 addresses only: choose families %s", IPv4)
	}
	return errs
}

// setDefault gives a value to what is zero.
func setDefault[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// kind returns the kind of a node, counted from 1.
func (o Options) kind(node int) Kind {
	if len(o.Kinds) == 0 {
		return Bare
	}
	return o.Kinds[min(node, len(o.Kinds))-1]
}

// Lab is a cluster in namespaces. Its methods may be used by several
// goroutines, but one node's agent by one at a time.
type Lab struct {
	Options  Options
	Nodes    []*Node
	Underlay *Space

	// Etcd and Kube are the store, where the lab has it, while the process that
	// made the lab runs. With Kube, Etcd is the API server's.
	Etcd *Etcd
	Kube *Kube

	record *record
}

// New builds a lab. When that fails, or ctx ends, nothing is left of it.
func New(ctx context.Context, opts Options) (*Lab, error) {
	opts, err := opts.defaults()
	if err != nil {
		return nil, fmt.Errorf("lab options: %w", err)
	}
	rec, err := newRecord(opts)
	if err != nil {
		return nil, err
	}
	l := newLab(rec)
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("building lab %s: %w", l.Name(), err), l.Close())
	}
	return l, nil
}

// Open returns a lab that another process made and left up.
func Open(name string) (*Lab, error) {
	rec, err := readRecord(name)
	if err != nil {
		return nil, err
	}
	return newLab(rec), nil
}

// newLab makes the Go side of a lab from its record.
func newLab(rec *record) *Lab {
	l := &Lab{Options: rec.Options, record: rec}
	l.Underlay = &Space{lab: l, name: "underlay", netns: l.Name() + "-underlay"}
	for i := 1; i <= l.Options.Nodes; i++ {
		l.Nodes = append(l.Nodes, newNode(l, i))
	}
	return l
}

// build makes the lab, each step leaning on those before it.
func (l *Lab) build(ctx context.Context) error {
	if err := l.buildUnderlay(ctx); err != nil {
		return err
	}
	for _, n := range l.Nodes {
		l.logf("node %s (%s): %s, pods %s", n, n.Kind, list(n.Addresses()), list(n.Prefixes()))
		if err := n.build(ctx); err != nil {
			return fmt.Errorf("node %s: %w", n, err)
		}
	}
	if err := l.waitForCards(ctx); err != nil {
		return err
	}
	if err := l.buildStore(ctx); err != nil {
		return err
	}
	for _, n := range l.Nodes {
		if err := n.buildOverlay(ctx); err != nil {
			return fmt.Errorf("overlay of node %s: %w", n, err)
		}
	}
	return l.waitForAll(ctx)
}

// Name is the lab's name.
func (l *Lab) Name() string { return l.Options.Name }

// Node returns a node, counted from 1.
func (l *Lab) Node(i int) *Node { return l.Nodes[i-1] }

// Pod returns a pod, node and pod counted from 1.
func (l *Lab) Pod(node, pod int) *Pod { return l.Node(node).Pods[pod-1] }

// Space returns the space called "underlay", "n1" or "n1/p1".
func (l *Lab) Space(name string) (*Space, error) {
	if name == l.Underlay.name {
		return l.Underlay, nil
	}
	for _, n := range l.Nodes {
		if n.name == name {
			return &n.Space, nil
		}
		for _, p := range n.Pods {
			if p.name == name {
				return &p.Space, nil
			}
		}
	}
	return nil, fmt.Errorf("lab %s has no %q: it has underlay, nodes n1 to n%d and pods like n1/p1", l.Name(), name, len(l.Nodes))
}

// Close takes everything away: the processes that were started in the lab, its
// namespaces and what was mounted for them.
func (l *Lab) Close() error { return l.record.remove() }

// Directory is where the lab's logs and its record lie, until Close.
func (l *Lab) Directory() string { return l.record.directory() }

// list shows what there is, separated by commas.
func list[T fmt.Stringer](all []T) string {
	var words []string
	for _, one := range all {
		words = append(words, one.String())
	}
	return strings.Join(words, ", ")
}

func (l *Lab) logf(format string, args ...any) {
	if l.Options.Log != nil {
		fmt.Fprintf(l.Options.Log, format+"\n", args...)
	}
}
