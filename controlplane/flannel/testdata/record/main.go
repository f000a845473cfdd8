// Program record has stock flannel's own code judge the inputs in a directory of
// fixtures, and writes down beside each what it says.
package main

import (
	"bytes"
	"encoding/json"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/flannel-io/flannel/pkg/backend/vxlan"
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
	"github.com/flannel-io/flannel/pkg/subnet/kube"
)

type netconf struct {
	Name   string
	Config string
	// What flannel says. An error ends the list of what it has looked at.
	ParseError string             `json:",omitempty"`
	Parsed     *parsed            `json:",omitempty"`
	VXLANError string             `json:",omitempty"`
	VXLAN      *vxlan.VXLANConfig `json:",omitempty"`
	EtcdError  string             `json:",omitempty"`
	Etcd       *parsed            `json:",omitempty"`
}

type parsed struct {
	EnableIPv4     bool
	EnableIPv6     bool
	EnableNFTables bool `json:",omitempty"`
	BackendType    string
	Network        string `json:",omitempty"`
	SubnetMin      string `json:",omitempty"`
	SubnetMax      string `json:",omitempty"`
	SubnetLen      uint   `json:",omitempty"`
	IPv6Network    string `json:",omitempty"`
	IPv6SubnetMin  string `json:",omitempty"`
	IPv6SubnetMax  string `json:",omitempty"`
	IPv6SubnetLen  uint   `json:",omitempty"`
}

func values(c *subnet.Config) *parsed {
	p := &parsed{
		EnableIPv4: c.EnableIPv4, EnableIPv6: c.EnableIPv6, EnableNFTables: c.EnableNFTables, BackendType: c.BackendType,
		SubnetLen: c.SubnetLen, IPv6SubnetLen: c.IPv6SubnetLen,
	}
	if !c.Network.Empty() {
		p.Network = c.Network.String()
	}
	if c.SubnetMin != 0 {
		p.SubnetMin = c.SubnetMin.String()
	}
	if c.SubnetMax != 0 {
		p.SubnetMax = c.SubnetMax.String()
	}
	if !c.IPv6Network.Empty() {
		p.IPv6Network = c.IPv6Network.String()
	}
	if !ip.IsEmpty(c.IPv6SubnetMin) {
		p.IPv6SubnetMin = c.IPv6SubnetMin.String()
	}
	if !ip.IsEmpty(c.IPv6SubnetMax) {
		p.IPv6SubnetMax = c.IPv6SubnetMax.String()
	}
	return p
}

func recordNetconf(c *netconf) {
	*c = netconf{Name: c.Name, Config: c.Config}
	cfg, err := subnet.ParseConfig(c.Config)
	if err != nil {
		c.ParseError = err.Error()
		return
	}
	c.Parsed = values(cfg)
	if v, err := vxlan.ParseVXLANConfig(cfg.Backend, 1500); err != nil {
		c.VXLANError = err.Error()
	} else {
		c.VXLAN = &v
	}
	if err := subnet.CheckNetworkConfig(cfg); err != nil {
		c.EtcdError = err.Error()
		return
	}
	c.Etcd = values(cfg)
}

// written is what a node publishes, and what flannel writes of it.
type written struct {
	Name                 string
	Prefix, PrefixV6     string
	PublicIP, PublicIPv6 string
	MAC, MACv6           string
	VNI                  uint32
	Network, IPv6Network string
	MTU                  int
	IPMasq               bool

	Key, Value, Data, DataV6, SubnetEnv string
}

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}

func v4net(s string) (n ip.IP4Net) {
	if s != "" {
		must(0, n.UnmarshalJSON([]byte(s)))
	}
	return n
}

func v6net(s string) (n ip.IP6Net) {
	if s != "" {
		must(0, n.UnmarshalJSON([]byte(s)))
	}
	return n
}

func recordWritten(w *written) {
	attrs := lease.LeaseAttrs{BackendType: "vxlan"}
	if w.PublicIP != "" {
		attrs.PublicIP = must(ip.ParseIP4(w.PublicIP))
		attrs.BackendData = must(json.Marshal(&vxlan.LeaseAttrs{VNI: w.VNI, VtepMAC: vxlan.HardwareAddr(must(net.ParseMAC(w.MAC)))}))
	}
	if w.PublicIPv6 != "" {
		attrs.PublicIPv6 = must(ip.ParseIP6(w.PublicIPv6))
		attrs.BackendV6Data = must(json.Marshal(&vxlan.LeaseAttrs{VNI: w.VNI, VtepMAC: vxlan.HardwareAddr(must(net.ParseMAC(w.MACv6)))}))
	}
	v4, v6 := v4net(w.Prefix), v6net(w.PrefixV6)
	w.Key = subnet.MakeSubnetKey(v4, v6)
	w.Value = string(must(json.Marshal(attrs)))
	w.Data, w.DataV6 = string(attrs.BackendData), string(attrs.BackendV6Data)
	config := &subnet.Config{EnableIPv4: w.Prefix != "", EnableIPv6: w.PrefixV6 != "", Network: v4net(w.Network), IPv6Network: v6net(w.IPv6Network)}
	path := filepath.Join(must(os.MkdirTemp("", "record")), "subnet.env")
	must(0, subnet.WriteSubnetFile(path, config, w.IPMasq, v4, v6, w.MTU))
	w.SubnetEnv = string(must(os.ReadFile(path)))
}

// read is a lease as it may be found, and what flannel makes of it.
type read struct {
	Name       string
	Key, Value string
	Error      string `json:",omitempty"`
	V4, V6     *peer  `json:",omitempty"`
	Type       string `json:",omitempty"`
}

type peer struct {
	Prefix, PublicIP string
	DataError        string `json:",omitempty"`
	VNI              uint32
	MAC              string
}

func data(p *peer, raw json.RawMessage) *peer {
	var v vxlan.LeaseAttrs
	if err := json.Unmarshal(raw, &v); err != nil {
		p.DataError = err.Error()
		return p
	}
	p.VNI, p.MAC = v.VNI, net.HardwareAddr(v.VtepMAC).String()
	return p
}

func recordRead(r *read) {
	*r = read{Name: r.Name, Key: r.Key, Value: r.Value}
	v4, v6 := subnet.ParseSubnetKey(r.Key)
	if v4 == nil {
		r.Error = "no key"
		return
	}
	var attrs lease.LeaseAttrs
	if err := json.Unmarshal([]byte(r.Value), &attrs); err != nil {
		r.Error = err.Error()
		return
	}
	r.Type = attrs.BackendType
	r.V4 = data(&peer{Prefix: v4.String(), PublicIP: attrs.PublicIP.String()}, attrs.BackendData)
	if v6 != nil {
		p := &peer{Prefix: v6.String()}
		if attrs.PublicIPv6 != nil {
			p.PublicIP = attrs.PublicIPv6.String()
		}
		r.V6 = data(p, attrs.BackendV6Data)
	}
}

// node is a Node as it may be found, and what flannel makes of it.
type node struct {
	Name        string
	IPv4, IPv6  bool
	Annotations map[string]string
	PodCIDR     string
	PodCIDRs    []string
	Error       string `json:",omitempty"`
	V4, V6      *peer  `json:",omitempty"`
	Type        string `json:",omitempty"`
}

func recordNode(n *node) {
	n.Error, n.V4, n.V6, n.Type = "", nil, nil, ""
	l, err := kube.NodeToLease(n.IPv4, n.IPv6, n.Annotations, n.PodCIDR, n.PodCIDRs)
	if err != nil {
		n.Error = err.Error()
		return
	}
	n.Type = l.Attrs.BackendType
	if l.EnableIPv4 {
		n.V4 = data(&peer{Prefix: l.Subnet.String(), PublicIP: l.Attrs.PublicIP.String()}, l.Attrs.BackendData)
	}
	if l.EnableIPv6 {
		n.V6 = data(&peer{Prefix: l.IPv6Subnet.String(), PublicIP: l.Attrs.PublicIPv6.String()}, l.Attrs.BackendV6Data)
	}
}

// prefix is a --kube-annotation-prefix.
type prefix struct {
	Prefix string
	Error  string   `json:",omitempty"`
	Names  []string `json:",omitempty"`
}

func recordPrefix(p *prefix) {
	*p = prefix{Prefix: p.Prefix}
	names, err := kube.AnnotationNames(p.Prefix)
	if err != nil {
		p.Error = err.Error()
		return
	}
	p.Names = names
}

// call is a call of mk-docker-opts.sh, and what comes of it.
type call struct {
	Name        string
	Args        []string          `json:",omitempty"`
	File        *string           // subnet.env
	Environment map[string]string `json:",omitempty"`
	Route       string            `json:",omitempty"`
	Before      string            `json:",omitempty"`
	Status      int
	Output      *string
}

// neighbour makes a network of 192.0.2.0/24, leads $1 to another host there and
// runs the rest.
const neighbour = `ip link add v0 type veth peer name v1
ip addr add 192.0.2.1/24 dev v0; ip link set v0 up; ip link set v1 up
[ -z "$1" ] || ip route add "$1" via 192.0.2.2
shift; exec "$@"`

func recordCall(c *call, script string) {
	dir := must(os.MkdirTemp("", "record"))
	file, output := filepath.Join(dir, "subnet.env"), filepath.Join(dir, "docker_opts.env")
	if c.File != nil {
		must(0, os.WriteFile(file, []byte(*c.File), 0o644))
	}
	if c.Before != "" {
		must(0, os.WriteFile(output, []byte(c.Before), 0o644))
	}
	args := []string{"-n", "sh", "-c", neighbour, "neighbour", c.Route, "env", "-i", "PATH=" + os.Getenv("PATH")}
	for name, value := range c.Environment {
		args = append(args, name+"="+value)
	}
	args = append(args, "/bin/sh", script, "-f", file, "-d", output)
	cmd := exec.Command("unshare", append(args, c.Args...)...)
	cmd.Dir = dir
	_ = cmd.Run()
	c.Status, c.Output = cmd.ProcessState.ExitCode(), nil
	if data, err := os.ReadFile(output); err == nil {
		text := string(data)
		c.Output = &text
	}
}

func record[T any](path string, f func(*T)) {
	var cases []T
	must(0, json.Unmarshal(must(os.ReadFile(path)), &cases))
	for i := range cases {
		f(&cases[i])
	}
	// One case a line, for diffs to be read.
	out := bytes.NewBufferString("[")
	for i, c := range cases {
		if i > 0 {
			out.WriteByte(',')
		}
		out.WriteString("\n ")
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		must(0, e.Encode(c))
		out.Truncate(out.Len() - 1)
	}
	out.WriteString("\n]\n")
	must(0, os.WriteFile(path, out.Bytes(), 0o644))
}

func main() {
	// The fixtures of controlplane/flannel, those of mk-docker-opts, the script.
	dir, options, script := os.Args[1], os.Args[2], os.Args[3]
	record(filepath.Join(dir, "netconf.json"), recordNetconf)
	record(filepath.Join(dir, "written.json"), recordWritten)
	record(filepath.Join(dir, "leases.json"), recordRead)
	record(filepath.Join(dir, "nodes.json"), recordNode)
	record(filepath.Join(dir, "prefixes.json"), recordPrefix)
	record(options, func(c *call) { recordCall(c, script) })
}
