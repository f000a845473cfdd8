package verdicts

import "strings"

// Changes is a set of kinds of change.
type Changes uint16

// What can change. Overrun is not a kind of its own: more came than a socket
// could hold, and anything may have been among what was lost.
const (
	Nftables   Changes = 1 << iota // rulesets, set elements; iptables-nft's too
	Iptables                       // rulesets of the older interface
	Routes                         // of any table
	Rules                          // which table is asked
	Nexthops                       // nexthop objects
	Links                          // devices, up or down: IPv4 routes that go with one send no event
	Forwarding                     // forwarding and reverse path filters, of any device
	XFRM                           // policies and states
	Settings                       // bridge-netfilter, and sysctls that send no event
	Overrun

	kinds = iota
)

var changeNames = [kinds]string{
	"nftables", "iptables", "routes", "rules", "nexthops", "links", "forwarding", "xfrm", "settings", "overrun",
}

// Kinds are the names of all kinds of change.
func Kinds() []string { return changeNames[:] }

// String lists the kinds: "nftables, routes".
func (c Changes) String() string {
	var names []string
	for i, name := range changeNames {
		if c&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}
