package dataplane

import (
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// Report is what a node's dataplane looks like, read from the pins and the
// kernel at one moment. It needs no agent.
type Report struct {
	// Mode is "ebpf" when the programs are attached and "kernel" when the
	// kernel's VXLAN device carries everything.
	Mode string `json:"mode"`
	// Reason says why Mode is "kernel", or why acceleration is held back
	// although the programs are attached; empty when nothing is held back.
	Reason string `json:"reason,omitempty"`
	// MissingCapabilities keep the agent's programs away.
	MissingCapabilities []string `json:"missingCapabilities,omitempty"`
	// Switches are the node's, as `weft accel` has set them.
	Switches Switches `json:"switches"`
	// Express is how the express path stands.
	Express Express `json:"express"`
	// XDP is how packets fare in the uplink's driver.
	XDP XDP `json:"xdp"`
	// SourceCheck is off, observe or enforce.
	SourceCheck string `json:"sourceCheck,omitempty"`
	// Uplink and Overlay are the two devices; empty names when absent. OverlayV6
	// is the one of IPv6, which rides the kernel path.
	Uplink    Device `json:"uplink"`
	Overlay   Device `json:"overlay"`
	OverlayV6 Device `json:"overlayV6,omitzero"`
	// VNI and Port are the overlay's.
	VNI  uint32 `json:"vni"`
	Port uint16 `json:"port"`
	// Hooks are the places where a program of weft sits or should sit.
	Hooks []Hook `json:"hooks"`
	// Peers are ordered by public IP.
	Peers []PeerReport `json:"peers"`
	// Reasons are all reasons for a packet to be passed to the kernel or
	// dropped, zero counts included.
	Reasons []ReasonCount `json:"reasons"`
	// Firewall is what keeps pods from the VXLAN port where programs don't.
	Firewall Firewall `json:"firewall"`
	// Suspects are the latest senders that failed the source check.
	Suspects []Suspect `json:"suspects,omitempty"`
	// Maps tell what memory the maps cost.
	Maps []MapInfo `json:"maps,omitempty"`
}

// Switches tell which paths may be taken.
type Switches struct {
	Express bool `json:"express"`
	Base    bool `json:"base"`
}

// All tells that no path is switched off.
func (s Switches) All() bool { return s.Express && s.Base }

// Express is how the express path stands on a node.
type Express struct {
	// On tells that packets may take it.
	On bool `json:"on"`
	// Reasons say what is in the way; only the agent knows all of them.
	Reasons []string `json:"reasons,omitempty"`
	// Pods is the number of addresses of pods on this node that are served.
	Pods int `json:"pods"`
	// LeftAlone are pods that are not, and why, with their veth or address.
	LeftAlone []LeftAlone `json:"leftAlone,omitempty"`
	// Epoch is moved whenever the host may judge packets otherwise than before.
	Epoch uint32 `json:"epoch"`
	// Moves counts moves of the epoch since the agent started, by what made
	// them.
	Moves map[string]uint64 `json:"moves,omitempty"`
}

// XDP is how packets fare in the uplink's driver, before there is an skb.
type XDP struct {
	// Attached tells that a program is there, and Heard that it is known to be
	// heard behind the driver, without which it strips nothing.
	Attached bool `json:"attached"`
	Heard    bool `json:"heard"`
	// Reason says what is in the way; only the agent knows it.
	Reason string `json:"reason,omitempty"`
	// Stripped counts the packets that lost their outer headers there, and Reasons
	// those that were left as they were, for uplink_in (Passed), or dropped.
	Stripped uint64        `json:"stripped"`
	Reasons  []ReasonCount `json:"reasons,omitempty"`
}

// LeftAlone is a pod's veth, or one address of a pod, that express does not
// serve.
type LeftAlone struct {
	Veth   string     `json:"veth"`
	IP     netip.Addr `json:"ip,omitzero"`
	Reason string     `json:"reason"`
}

// Firewall is the table inet weft of nftables.
type Firewall struct {
	// Reason says why it is missing or incomplete, as far as that is known.
	Reason string `json:"reason,omitempty"`
	// DroppedPackets and DroppedBytes count what pods sent to the VXLAN port of
	// a node.
	DroppedPackets uint64 `json:"droppedPackets"`
	DroppedBytes   uint64 `json:"droppedBytes"`
}

// Device is a network device.
type Device struct {
	Name    string     `json:"name,omitempty"`
	Index   int        `json:"index,omitempty"`
	MTU     int        `json:"mtu,omitempty"`
	MAC     state.MAC  `json:"mac,omitzero"`
	Address netip.Addr `json:"address,omitzero"`
}

// Hook is a place where a program sits.
type Hook struct {
	// Program is the program's name, as bpftool shows it.
	Program string `json:"program"`
	// Device and Direction say where: ingress or egress of Device.
	Device    string `json:"device"`
	Direction string `json:"direction"`
	// Attached is "tcx", "clsact", or empty when the program is not there.
	Attached string `json:"attached,omitempty"`
	// ID is the kernel's number of the program.
	ID uint32 `json:"id,omitempty"`
	// Behind names foreign programs that run after ours and would not see
	// accelerated packets; while there are any, acceleration is held back.
	Behind []string `json:"behind,omitempty"`
}

// PeerReport is one peer node, or what it has of one address family: a node with
// two public IPs is two peers.
type PeerReport struct {
	PublicIP netip.Addr     `json:"publicIP"`
	Prefixes []netip.Prefix `json:"prefixes"`
	MAC      state.MAC      `json:"mac,omitzero"`
	// Switches are the peer's.
	Switches Switches `json:"switches"`
	// InMap tells that the peer is in the accelerator's peers map; one that is
	// not there rides the kernel path. No IPv6 peer is.
	InMap bool `json:"inMap"`
	// Divergence lists what differs between the peers map and the kernel's
	// route, neighbour and FDB entries, in words. Empty is as it should be.
	Divergence []string `json:"divergence,omitempty"`
	// Direct are those of the prefixes that DirectRouting serves: their packets
	// are routed there as they are, without a tunnel, and not counted.
	Direct []netip.Prefix `json:"direct,omitempty"`
	// Counters by path, in order express, base, kernel; nil without programs. Of
	// an IPv6 peer the first two are 0.
	Counters []PathCounters `json:"counters,omitempty"`
}

// PathCounters count the inner packets of one peer over one path since the
// peer was added. A packet is one segment on the wire, bytes are inner IP
// bytes as sent on the wire.
type PathCounters struct {
	Path      string `json:"path"`
	TxPackets uint64 `json:"txPackets"`
	TxBytes   uint64 `json:"txBytes"`
	RxPackets uint64 `json:"rxPackets"`
	RxBytes   uint64 `json:"rxBytes"`
}

// ReasonCount counts the packets that were passed to the kernel, or dropped,
// for one reason.
type ReasonCount struct {
	Name    string `json:"name"`
	Help    string `json:"help"`
	Passed  uint64 `json:"passed"`
	Dropped uint64 `json:"dropped"`
}

// Suspect is a sender whose packets failed the source check.
type Suspect struct {
	OuterSource netip.Addr `json:"outerSource"`
	InnerSource netip.Addr `json:"innerSource"`
	Reason      string     `json:"reason"`
	Packets     uint64     `json:"packets"`
}

// MapInfo is one BPF map and what it costs.
type MapInfo struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	Entries    int    `json:"entries"`
	MaxEntries uint32 `json:"maxEntries"`
	// Bytes is the memory the map takes when full, per-CPU values on all
	// possible CPUs included.
	Bytes uint64 `json:"bytes"`
}
