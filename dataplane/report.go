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
	// Accel is the node's switch: false after `weft accel off`.
	Accel bool `json:"accel"`
	// SourceCheck is off, observe or enforce.
	SourceCheck string `json:"sourceCheck,omitempty"`
	// Uplink and Overlay are the two devices; empty names when absent.
	Uplink  Device `json:"uplink"`
	Overlay Device `json:"overlay"`
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
	// Suspects are the latest senders that failed the source check.
	Suspects []Suspect `json:"suspects,omitempty"`
	// Maps tell what memory the maps cost.
	Maps []MapInfo `json:"maps,omitempty"`
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

// PeerReport is one peer node.
type PeerReport struct {
	PublicIP netip.Addr     `json:"publicIP"`
	Prefixes []netip.Prefix `json:"prefixes"`
	MAC      state.MAC      `json:"mac,omitzero"`
	// Accel is the peer's switch.
	Accel bool `json:"accel"`
	// InMap tells that the peer is in the accelerator's peers map; one that is
	// not there rides the kernel path.
	InMap bool `json:"inMap"`
	// Divergence lists what differs between the peers map and the kernel's
	// route, neighbour and FDB entries, in words. Empty is as it should be.
	Divergence []string `json:"divergence,omitempty"`
	// Counters by path, in order express, base, kernel; nil without programs.
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
