package firewall

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
)

// table is what "inet weft" holds, or shall hold.
type table struct {
	exists bool
	// odd says that the table has flags: it was put to sleep, for example.
	odd bool
	// counter is whether it has the counter.
	counter bool
	sets    map[string]set
	chains  map[string]chain
}

// set is a named set.
type set struct {
	setType
	// odd says that something else is unlike ours: it is a map, its elements
	// expire, it is bounded, ...
	odd      bool
	elements map[element]bool
}

// setType is what can't be changed of a set.
type setType struct {
	// key is ipv4_addr, ipv6_addr or ifname.
	key      string
	interval bool
}

// element is a prefix (an address is one of full length), or a device's name.
type element struct {
	prefix netip.Prefix
	name   string
}

// String is the element as nft reads it.
func (e element) String() string {
	switch {
	case e.name != "":
		return fmt.Sprintf("%q", e.name)
	case e.prefix.IsSingleIP():
		return e.prefix.Addr().String()
	}
	return e.prefix.String()
}

// compare orders elements for printing, in half the time of netip.Prefix.Compare.
func (e element) compare(other element) int {
	return cmp.Or(
		e.prefix.Addr().Compare(other.prefix.Addr()), cmp.Compare(e.prefix.Bits(), other.prefix.Bits()),
		strings.Compare(e.name, other.name),
	)
}

// chain is a chain and its rules.
type chain struct {
	// hook is "" for a chain that is only jumped to.
	hook     string
	priority int32
	// odd says that something else is unlike ours: its type or policy.
	odd   bool
	rules []rule
}

// rule is a rule in nft's words, phrase by phrase. A rule that was read and is
// none of ours has no phrases.
type rule []string

// String is the rule as nft reads it.
func (r rule) String() string { return strings.Join(r, " ") }

// The phrases that our rules are made of, besides those that name the port
// (see toPort, fromPort).
const (
	toNodes4     = "ip daddr @nodes4"
	toNodes6     = "ip6 daddr @nodes6"
	fromNodes4   = "ip saddr @nodes4"
	fromNodes6   = "ip6 saddr @nodes6"
	fromPods4    = "ip saddr @prefixes4"
	fromPods6    = "ip6 saddr @prefixes6"
	fromDevices  = "iifname @pod_devices"
	fromLoopback = `iifname "lo"`
	isReply      = "ct direction reply"
	sourceIsHere = "fib saddr type local"
	// otherWayBack: the source is not routed through the device that the packet
	// came through.
	otherWayBack = "fib saddr . iif oif missing"
	count        = "counter name " + counterName
	drop         = "drop"
	back         = "return"
	judgeTo      = "goto to_node"
	judgeFrom    = "goto from_node"
	judgeOutput  = "goto through_node"
)

// toPort and fromPort match a port.
func toPort(port uint16) string   { return fmt.Sprintf("udp dport %d", port) }
func fromPort(port uint16) string { return fmt.Sprintf("udp sport %d", port) }

// The priorities of our base chains; the package comment says why.
const (
	beforeFilter = -10
	behindIPVS   = 110
)

// The order in which sets and chains are made and printed. Chains come after
// those that they go to.
var (
	setNames   = []string{"nodes4", "nodes6", "prefixes4", "prefixes6", "pod_devices"}
	chainNames = []string{"to_node", "from_node", "through_node", "input", "forward", "output"}
)

// setTypes are the types of our sets.
var setTypes = map[string]setType{
	"nodes4":      {key: "ipv4_addr"},
	"nodes6":      {key: "ipv6_addr"},
	"prefixes4":   {key: "ipv4_addr", interval: true},
	"prefixes6":   {key: "ipv6_addr", interval: true},
	"pod_devices": {key: "ifname"},
}

// newTable is our table for that port, with empty sets.
func newTable(port uint16) table {
	t := table{exists: true, counter: true, sets: map[string]set{}, chains: chains(port)}
	for name, kind := range setTypes {
		t.sets[name] = set{setType: kind, elements: map[element]bool{}}
	}
	return t
}

// chains are our chains; the package comment tells them as a story.
func chains(port uint16) map[string]chain {
	fromPod := rule{fromPort(port), fromDevices, judgeFrom}
	return map[string]chain{
		"input": {hook: "input", priority: behindIPVS, rules: []rule{
			{toPort(port), judgeTo},
			fromPod,
		}},
		"forward": {hook: "forward", priority: beforeFilter, rules: []rule{
			{toPort(port), toNodes4, judgeTo},
			{toPort(port), toNodes6, judgeTo},
			fromPod,
		}},
		"output": {hook: "output", priority: beforeFilter, rules: []rule{
			{toPort(port), toNodes4, judgeOutput},
			{toPort(port), toNodes6, judgeOutput},
		}},
		"to_node": {rules: []rule{
			{isReply, back},
			{fromLoopback, back},
			{fromDevices, count, drop},
			{fromPods4, count, drop},
			{fromPods6, count, drop},
		}},
		"from_node": {rules: []rule{
			{fromNodes4, otherWayBack, count, drop},
			{fromNodes6, otherWayBack, count, drop},
			{sourceIsHere, count, drop},
		}},
		"through_node": {rules: []rule{
			{isReply, back},
			{sourceIsHere, back},
			{fromPods4, count, drop},
			{fromPods6, count, drop},
		}},
	}
}
