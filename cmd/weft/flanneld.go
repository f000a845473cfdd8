package main

import (
	"flag"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/weft-net/weft/controlplane/etcd"
	"github.com/weft-net/weft/controlplane/kube"
	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/uplink"
)

// flannelOptions are flanneld's own, by its names and with its defaults
// (flannel's main.go). A manifest or unit that runs flanneld runs weft with them.
type flannelOptions struct {
	KubeSubnetMgr             bool
	KubeAPIURL                string
	KubeconfigFile            string
	KubeAnnotationPrefix      string
	NetConfigPath             string
	SetNodeNetworkUnavailable bool

	EtcdEndpoints          string
	EtcdPrefix             string
	EtcdKeyfile            string
	EtcdCertfile           string
	EtcdCAFile             string
	EtcdUsername           string
	EtcdPassword           string
	SubnetLeaseRenewMargin int

	Iface         list
	IfaceRegex    list
	IfaceCanReach string
	PublicIP      string
	PublicIPv6    string

	IPMasq               bool
	IPMasqRandomDisable  bool
	IPTablesResync       int
	IPTablesForwardRules bool
	IPBlackholeRoute     bool

	SubnetFile  string
	HealthzIP   string
	HealthzPort int
	Version     bool

	// Flags of flannel's logging library.
	Verbosity               int
	vmodule, logBacktraceAt string // have no effect
}

// register adds flanneld's flags.
func (o *flannelOptions) register(fs *flag.FlagSet) {
	fs.BoolVar(&o.KubeSubnetMgr, "kube-subnet-mgr", false, "read the peers from the Kubernetes API rather than from etcd")
	fs.StringVar(&o.KubeAPIURL, "kube-api-url", "", "`URL` of the Kubernetes API server; not needed in a pod")
	fs.StringVar(&o.KubeconfigFile, "kubeconfig-file", "", "kubeconfig `file`; not needed in a pod")
	fs.StringVar(&o.KubeAnnotationPrefix, "kube-annotation-prefix", "flannel.alpha.coreos.com", "`prefix` of the nodes' annotations")
	fs.StringVar(&o.NetConfigPath, "net-config-path", "/etc/kube-flannel/net-conf.json", "`file` with the network's configuration, with --kube-subnet-mgr")
	fs.BoolVar(&o.SetNodeNetworkUnavailable, "set-node-network-unavailable", true, "set the Node's condition NetworkUnavailable to False once it carries traffic")

	fs.StringVar(&o.EtcdEndpoints, "etcd-endpoints", "http://127.0.0.1:4001,http://127.0.0.1:2379", "`URLs` of etcd's members, separated by commas")
	fs.StringVar(&o.EtcdPrefix, "etcd-prefix", "/coreos.com/network", "`prefix` of flannel's keys in etcd")
	fs.StringVar(&o.EtcdKeyfile, "etcd-keyfile", "", "`file` with the key for TLS to etcd")
	fs.StringVar(&o.EtcdCertfile, "etcd-certfile", "", "`file` with the certificate for TLS to etcd")
	fs.StringVar(&o.EtcdCAFile, "etcd-cafile", "", "`file` with the certificates that etcd's are signed by")
	fs.StringVar(&o.EtcdUsername, "etcd-username", "", "`name` to log in to etcd with")
	fs.StringVar(&o.EtcdPassword, "etcd-password", "", "`password` to log in to etcd with")
	fs.IntVar(&o.SubnetLeaseRenewMargin, "subnet-lease-renew-margin", 60, "`minutes` before its end to renew the lease in etcd, 1 to 1439")

	fs.Var(&o.Iface, "iface", "`interface` (name or address) that carries the underlay; may be given again, the first that is there counts")
	fs.Var(&o.IfaceRegex, "iface-regex", "regular `expression` for that interface's name or address, tried after --iface; may be given again")
	fs.StringVar(&o.IfaceCanReach, "iface-can-reach", "", "`address` that the interface is routed to by, tried after --iface-regex")
	fs.StringVar(&o.PublicIP, "public-ip", "", "IPv4 `address` that peers reach this node at, if not the interface's")
	fs.StringVar(&o.PublicIPv6, "public-ipv6", "", "IPv6 `address` that peers reach this node at, if not the interface's")

	fs.BoolVar(&o.IPMasq, "ip-masq", false, "masquerade what leaves the overlay network")
	fs.BoolVar(&o.IPMasqRandomDisable, "ip-masq-fully-random-disable", false, "masquerade without random source ports")
	fs.IntVar(&o.IPTablesResync, "iptables-resync", 5, "`seconds` between looks at the masquerading and forwarding rules")
	fs.BoolVar(&o.IPTablesForwardRules, "iptables-forward-rules", true, "accept forwarded packets from and to the overlay network")
	fs.BoolVar(&o.IPBlackholeRoute, "ip-blackhole-route", false, "add a blackhole route for this node's pod prefix, where no bridge has it")

	fs.StringVar(&o.SubnetFile, "subnet-file", defaultSubnetFile, "`file` to write for the CNI plugin and Docker, \"\" for none; with --config only if this is given")
	fs.StringVar(&o.HealthzIP, "healthz-ip", "0.0.0.0", "`address` for flannel's /healthz and /readyz")
	fs.IntVar(&o.HealthzPort, "healthz-port", 0, "`port` for flannel's /healthz and /readyz; 0 for none (--metrics-addr has them too)")
	fs.BoolVar(&o.Version, "version", false, "print the version and exit")

	fs.IntVar(&o.Verbosity, "v", 0, "`number` of flannel's log verbosity: from 1 on debug messages are logged")
	fs.StringVar(&o.vmodule, "vmodule", "", "`list` of flannel's log verbosity per file; has no effect")
	fs.StringVar(&o.logBacktraceAt, "log_backtrace_at", "", "`place` at which flannel logs a stack trace; has no effect")
}

const defaultSubnetFile = "/run/flannel/subnet.env"

// list is a flag that may be given again.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

// Set implements flag.Value.
func (l *list) Set(value string) error {
	*l = append(*l, value)
	return nil
}

// faults lists what is wrong with the options.
func (o *flannelOptions) faults() []string {
	return []string{
		between("--iptables-resync", o.IPTablesResync, 1, 24*60*60),
		between("--subnet-lease-renew-margin", o.SubnetLeaseRenewMargin, 1, 24*60-1),
		between("--healthz-port", o.HealthzPort, 0, 65535),
	}
}

// uplink are the options of choosing an interface, for the families in use.
func (o *flannelOptions) uplink(v4, v6 bool) uplink.Options {
	return uplink.Options{
		Interfaces: o.Iface, Regexps: o.IfaceRegex, CanReach: o.IfaceCanReach,
		PublicIP: o.PublicIP, PublicIPv6: o.PublicIPv6, IPv4: v4, IPv6: v6,
	}
}

// rules are the host's rules that flannel writes.
func (o *flannelOptions) rules() dataplane.Rules {
	return dataplane.Rules{
		Masquerade: o.IPMasq, OrderedPorts: o.IPMasqRandomDisable, Forward: o.IPTablesForwardRules,
		Blackhole: o.IPBlackholeRoute, Resync: time.Duration(o.IPTablesResync) * time.Second,
	}
}

// etcd are the options of the etcd store.
func (o *flannelOptions) etcd(log *slog.Logger) etcd.Options {
	return etcd.Options{
		Endpoints: strings.Split(o.EtcdEndpoints, ","), Prefix: o.EtcdPrefix,
		CAFile: o.EtcdCAFile, CertFile: o.EtcdCertfile, KeyFile: o.EtcdKeyfile,
		Username: o.EtcdUsername, Password: o.EtcdPassword,
		RenewMargin: time.Duration(o.SubnetLeaseRenewMargin) * time.Minute,
		Log:         log,
	}
}

// kube are the options of the Kubernetes store.
func (o *flannelOptions) kube(log *slog.Logger) kube.Options {
	return kube.Options{
		Kubeconfig: o.KubeconfigFile, APIURL: o.KubeAPIURL, AnnotationPrefix: o.KubeAnnotationPrefix,
		SetNodeNetworkUnavailable: o.SetNodeNetworkUnavailable, Version: thisBuild().Version, Log: log,
	}
}

// fromEnvironment sets the flags that were not given by variables of the
// environment, FLANNELD_IP_MASQ for --ip-masq, as flanneld does: --version is
// looked at before. A value that a flag does not take is a fault; flanneld goes on
// without it.
func fromEnvironment(fs *flag.FlagSet, getenv func(string) string) []string {
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var faults []string
	fs.VisitAll(func(f *flag.Flag) {
		name := "FLANNELD_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value := getenv(name)
		if given[f.Name] || value == "" || f.Name == "version" {
			return
		}
		if err := fs.Set(f.Name, value); err != nil {
			faults = append(faults, fmt.Sprintf("the environment's %s is %q, which --%s does not take: %v", name, value, f.Name, err))
		}
	})
	return faults
}
