package flannel

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
)

// CNIConf is the configuration of flannel's CNI plugin, a plugin that makes from
// it and from subnet.env the configuration of another, and calls that one.
type CNIConf struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	// SubnetFile is the path of subnet.env, DataDir that of the directory where
	// the plugin keeps the configurations it has made.
	SubnetFile string `json:"subnetFile"`
	DataDir    string `json:"dataDir"`

	// Delegated is what the other plugin is to be given besides.
	Delegated     object `json:"delegate"`
	IPAM          object `json:"ipam"`
	RuntimeConfig object `json:"runtimeConfig"`

	// What the runtime adds to a call.
	PrevResult       json.RawMessage `json:"prevResult"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
	// Attachments is another name of ValidAttachments, from before the name was
	// settled. Runtimes give both.
	Attachments json.RawMessage `json:"cni.dev/attachments"`
}

// object is a JSON object whose values are kept as they came.
type object = map[string]json.RawMessage

// ParseCNIConf reads a configuration. What is not given has flannel's defaults.
func ParseCNIConf(data []byte) (CNIConf, error) {
	if len(data) > maxConfig {
		return CNIConf{}, fmt.Errorf("the configuration has %d bytes; the limit is %d", len(data), maxConfig)
	}
	var c CNIConf
	if err := json.Unmarshal(data, &c); err != nil {
		return CNIConf{}, fmt.Errorf("the configuration of the flannel plugin: %w", err)
	}
	if c.SubnetFile == "" {
		c.SubnetFile = "/run/flannel/subnet.env"
	}
	if c.DataDir == "" {
		c.DataDir = "/var/lib/cni/flannel"
	}
	return c, nil
}

// CheckDelegate finds what must not be in "delegate", since the plugin sets it.
func (c CNIConf) CheckDelegate() error {
	var f faults
	if raw, ok := c.Delegated["type"]; ok {
		if name, ok := asString(raw); !ok || name == "" {
			f.add(`"type" in "delegate" is %s; give the name of a plugin, as in "bridge"`, shown(raw))
		}
	}
	for _, key := range []string{"name", "ipam"} {
		if raw, ok := c.Delegated[key]; ok {
			f.add(`%q in "delegate" is %s; leave it out there, the flannel plugin sets it`, key, shown(raw))
		}
	}
	if raw, ok := c.IPAM["routes"]; ok {
		var routes []types.Route
		if err := json.Unmarshal(raw, &routes); err != nil {
			f.add(`"routes" in "ipam" is %s; give a list as in [{"dst": "10.96.0.0/12"}]: %w`, shown(raw), err)
		}
	}
	return f.err()
}

// asString reads a JSON string.
func asString(raw json.RawMessage) (string, bool) {
	var s *string
	if json.Unmarshal(raw, &s) != nil || s == nil {
		return "", false
	}
	return *s, true
}

// Delegate makes the configuration of the other plugin.
func (c CNIConf) Delegate(e PluginEnv) (DelegateConf, error) {
	if err := c.CheckDelegate(); err != nil {
		return DelegateConf{}, err
	}
	d := DelegateConf{object{}}
	for key, raw := range c.Delegated {
		d.fields[key] = raw
	}
	d.setDefault("type", "bridge")
	d.setDefault("ipMasq", !e.IPMasq) // one of us must
	d.setDefault("mtu", e.MTU)
	if d.Type() == "bridge" {
		d.setDefault("isGateway", true)
	}
	d.set("name", c.Name)
	d.set("ipam", c.ipam(e))
	if c.CNIVersion != "" {
		d.set("cniVersion", c.CNIVersion)
	}
	if c.RuntimeConfig != nil {
		d.set("runtimeConfig", c.RuntimeConfig)
	}
	return d, nil
}

// ipam makes the part about addresses and routes.
func (c CNIConf) ipam(e PluginEnv) object {
	d := DelegateConf{object{}}
	for key, raw := range c.IPAM {
		d.fields[key] = raw
	}
	d.setDefault("type", "host-local")
	type subnet struct {
		Subnet netip.Prefix `json:"subnet"`
	}
	var ranges [][]subnet
	for _, p := range []netip.Prefix{e.Subnet, e.IPv6Subnet} {
		if p.IsValid() {
			ranges = append(ranges, []subnet{{p}})
		}
	}
	d.set("ranges", ranges)
	routes := []types.Route{}
	_ = json.Unmarshal(c.IPAM["routes"], &routes) // CheckDelegate has looked at them
	for _, n := range e.Networks {
		routes = append(routes, types.Route{Dst: net.IPNet{IP: n.Addr().AsSlice(), Mask: net.CIDRMask(n.Bits(), n.Addr().BitLen())}})
	}
	d.set("routes", routes)
	return d.fields
}

// Attachment is a container's interface.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// ErrNoAttachments says that a runtime does not say what is still in use.
var ErrNoAttachments = errors.New(`"cni.dev/valid-attachments" is missing: without it everything would be taken for unused; give a list, [] if nothing is in use`)

// Valid lists what is still in use, as the runtime says.
func (c CNIConf) Valid() ([]Attachment, error) {
	if !isGiven(c.ValidAttachments) {
		return nil, ErrNoAttachments
	}
	var list []Attachment
	if err := json.Unmarshal(c.ValidAttachments, &list); err != nil {
		return nil, fmt.Errorf(`"cni.dev/valid-attachments" is %s: %w`, shown(c.ValidAttachments), err)
	}
	for i, a := range list {
		if a.ContainerID == "" || a.IfName == "" {
			return nil, fmt.Errorf(`"cni.dev/valid-attachments" has no containerID or no ifname at %d: %s`, i, shown(c.ValidAttachments))
		}
	}
	return list, nil
}

// isGiven tells whether there is a value, which null is not.
func isGiven(raw json.RawMessage) bool {
	return len(raw) > 0 && !bytes.Equal(raw, []byte("null"))
}

// DelegateConf is the configuration of the plugin that the work is delegated to.
type DelegateConf struct{ fields object }

// ParseDelegateConf reads one that was made before, by this plugin or flannel's.
func ParseDelegateConf(data []byte) (DelegateConf, error) {
	var d DelegateConf
	if err := json.Unmarshal(data, &d.fields); err != nil {
		return DelegateConf{}, err
	}
	if d.Type() == "" {
		return DelegateConf{}, errors.New(`there is no "type"`)
	}
	return d, nil
}

// set and setDefault set a field to a value that JSON can say.
func (d DelegateConf) set(key string, value any) {
	raw, err := json.Marshal(value)
	if err != nil {
		panic(fmt.Sprintf("%s: %v", key, err)) // they are strings, numbers, and what was JSON before
	}
	d.fields[key] = raw
}

func (d DelegateConf) setDefault(key string, value any) {
	if _, ok := d.fields[key]; !ok {
		d.set(key, value)
	}
}

// Type is the name of the plugin.
func (d DelegateConf) Type() string { return d.text("type") }

// Network is the name of the network.
func (d DelegateConf) Network() string { return d.text("name") }

func (d DelegateConf) text(key string) string {
	s, _ := asString(d.fields[key])
	return s
}

// Continued is the configuration for a later call about the same attachment:
// with the result of the first, and what the runtime says this time. A result in
// another version's form than d's is left out: d's plugin could not read it.
func (d DelegateConf) Continued(c CNIConf) DelegateConf {
	later := DelegateConf{object{}}
	for key, raw := range d.fields {
		later.fields[key] = raw
	}
	if c.RuntimeConfig != nil {
		later.set("runtimeConfig", c.RuntimeConfig)
	}
	if isGiven(c.PrevResult) && d.text("cniVersion") == c.CNIVersion {
		later.set("prevResult", withoutOpenRoutes(c.PrevResult))
	}
	return later
}

// withoutOpenRoutes leaves out of a result the routes that have no gateway: which
// one they have got is the other plugin's choice. The route to the overlay is one,
// and bridge of Debian 12 looks for it without a gateway at each CHECK, in vain.
func withoutOpenRoutes(result json.RawMessage) json.RawMessage {
	var fields object
	var routes []object
	if json.Unmarshal(result, &fields) != nil || json.Unmarshal(fields["routes"], &routes) != nil {
		return result
	}
	routes = slices.DeleteFunc(routes, func(r object) bool { return !isGiven(r["gw"]) })
	d := DelegateConf{fields}
	d.set("routes", routes)
	return d.Marshal()
}

// Collecting is the configuration for the call that collects garbage.
func (d DelegateConf) Collecting(c CNIConf) DelegateConf {
	later := d.Continued(CNIConf{})
	later.set("cni.dev/valid-attachments", c.ValidAttachments)
	if isGiven(c.Attachments) {
		later.set("cni.dev/attachments", c.Attachments)
	}
	return later
}

// Marshal returns the configuration as flannel's plugin writes it: by key.
func (d DelegateConf) Marshal() []byte {
	data, err := json.Marshal(d.fields)
	if err != nil {
		panic(err) // as in set
	}
	return data
}
