package flannel

import (
	"encoding/json"
	"strings"
)

// backendConf is the key Backend of net-conf.json as it is written.
type backendConf struct {
	Type, VNI, Port, MTU, GBP, Learning, DirectRouting given
}

// otherBackends are flannel's other backends, and what is left to those who
// have them: it completes the sentence "run flanneld on these nodes".
var otherBackends = map[string]string{
	"host-gw":     `, or set it to "vxlan" on all nodes: with "DirectRouting": true nodes of one subnet have host-gw's routes`,
	"udp":         `, or set it to "vxlan" on all nodes, which does the same in the kernel`,
	"ipip":        `, or set it to "vxlan" on all nodes`,
	"wireguard":   ", which encrypts; weft does not",
	"ipsec":       ", which encrypts; weft does not",
	"alloc":       ", which leaves the routes to others",
	"extension":   ", which runs commands of yours",
	"tencent-vpc": ", which leaves the routes to the cloud",
}

// backend reads what the configuration says about VXLAN.
func (c *Config) backend(f *faults, values given) {
	c.VNI, c.Port = defaultVNI, defaultPort
	if len(values) == 0 {
		f.add(`Backend is missing, which flannel takes for its backend udp; set it to {"Type": "vxlan"} on all nodes, or run flanneld on these nodes`)
		return
	}
	var b backendConf
	if err := json.Unmarshal(values[len(values)-1], &b); err != nil {
		f.add(`Backend is %s; write an object, as in {"Type": "vxlan"}`, shown(values[len(values)-1]))
		return
	}
	if b.isVXLAN(f) {
		c.vxlan(f, b)
	}
}

// isVXLAN tells whether the backend is the one that is spoken here, and notes
// what to run if not.
func (b backendConf) isVXLAN(f *faults) bool {
	var name string
	for _, raw := range b.Type {
		if json.Unmarshal(raw, &name) != nil {
			f.add(`Backend.Type is %s; write "vxlan"`, shown(raw))
			return false
		}
	}
	lower := strings.ToLower(name) // as flannel does
	instead, known := otherBackends[lower]
	switch {
	case lower == BackendType:
		return true
	case name == "":
		f.add(`Backend has no Type; set it to "vxlan", which is what weft speaks`)
	case known:
		f.add("Backend.Type is %q, and weft speaks vxlan only; run flanneld on these nodes%s", lower, instead)
	default:
		f.add(`Backend.Type is %s, which flannel does not know; set it to "vxlan", which is what weft speaks`, quote(name))
	}
	return false
}

// vxlan reads the fields of the vxlan backend.
func (c *Config) vxlan(f *faults, b backendConf) {
	c.VNI = uint32(b.VNI.number(f, "Backend.VNI", defaultVNI, 1, maxVNI, "flannel's default is 1"))
	c.Port = uint16(b.Port.number(f, "Backend.Port", 0, 0, 65535, "flannel's default is 8472"))
	if c.Port == 0 {
		c.Port = defaultPort
	}
	c.MTU = b.MTU.number(f, "Backend.MTU", 0, 0, 65535, "the underlay's, in bytes; 0 or nothing is the uplink's")
	least, why := 68+overheadV4, "IPv4 packets of 68 bytes"
	if c.EnableIPv6 {
		least, why = 1280+overheadV6, "IPv6 packets of 1280 bytes"
	}
	if c.MTU > 0 && c.MTU < least {
		f.add("Backend.MTU is %d; it is the underlay's, which must carry %s in VXLAN: give %d or more, or 0 for the uplink's", c.MTU, why, least)
	}
	c.GBP = b.GBP.boolean(f, "Backend.GBP", false)
	c.Learning = b.Learning.boolean(f, "Backend.Learning", false)
	c.DirectRouting = b.DirectRouting.boolean(f, "Backend.DirectRouting", false)
}
