package ebpf

// Reason is why a packet was left to the kernel, or dropped.
type Reason struct {
	// Name is the name in metrics and commands: the C constant's, in lower
	// case and without its prefix.
	Name string
	// Help says in a sentence what it means, and where that helps what to do.
	Help string
}

// Reasons are indexed by enum reason of bpf/reasons.h. The first is no reason
// and never counted.
var Reasons = [weftReasonREASON_COUNT]Reason{
	weftReasonREASON_NONE: {"none", ""},

	weftReasonREASON_SWITCHED_OFF:      {"switched_off", "acceleration is switched off on this node (weft accel on [base])"},
	weftReasonREASON_PEER_SWITCHED_OFF: {"peer_switched_off", "acceleration is switched off for this peer (weft accel on [base] --peer)"},
	weftReasonREASON_HELD:              {"held", "the agent holds acceleration back; weft status says why"},
	weftReasonREASON_PEER_NO_ROOM:      {"peer_no_room", "the accelerator has no room for this peer (agent flag --max-peers), or its kernel entries are not complete yet"},
	weftReasonREASON_AGGREGATE:         {"aggregate", "a GSO or GRO aggregate, which the kernel splits and merges better"},
	weftReasonREASON_AGGREGATE_RECENT:  {"aggregate_recent", "the flow took the kernel path just before (an aggregate, a renewal), and order is kept"},
	weftReasonREASON_HOST_UNPROVEN:     {"host_unproven", "no packet of this peer on the kernel path was seen to pass the host's own rules lately"},
	weftReasonREASON_HOST_RENEWAL:      {"host_renewal", "sent through the kernel to see that the host's own rules still let this peer through"},
	weftReasonREASON_DEVICE_MISSING:    {"device_missing", "the device to hand the packet to is gone; the agent makes it again"},
	weftReasonREASON_INNER_NOT_IPV4:    {"inner_not_ipv4", "the inner packet is not IPv4"},
	weftReasonREASON_INNER_MALFORMED:   {"inner_malformed", "the inner headers are cut or contradict themselves"},

	weftReasonREASON_DESTINATION_UNKNOWN: {"destination_unknown", "no peer has the inner destination"},
	weftReasonREASON_DESTINATION_MAC:     {"destination_mac", "the frame is not addressed to the MAC of the peer that has the destination"},
	weftReasonREASON_MARKED:              {"marked", "the packet is marked, the host has routing rules by mark, and this kernel (before 6.10) can not look up a route by mark from a program"},
	weftReasonREASON_UNDERLAY_ROUTE:      {"underlay_route", "the route to the peer does not leave by the uplink, or there is none"},
	weftReasonREASON_UNDERLAY_MTU:        {"underlay_mtu", "too long for the route to the peer once encapsulated; the kernel fragments it"},
	weftReasonREASON_UNDERLAY_NEIGHBOUR:  {"underlay_neighbour", "the MAC of the next hop in the underlay is not known yet; the kernel asks for it"},
	weftReasonREASON_ENCAP_REFUSED:       {"encap_refused", "the kernel refused to make room for outer headers, as for a tunnel within the pod"},
	weftReasonREASON_HOST_MANGLES:        {"host_mangles", "the host's rules change outer packets (TTL, DSCP, DF, mark, class), which only the kernel path can do"},

	weftReasonREASON_OUTER_VLAN:            {"outer_vlan", "the outer packet is VLAN-tagged"},
	weftReasonREASON_OUTER_NOT_FOR_HOST:    {"outer_not_for_host", "the outer frame is not addressed to this host's MAC"},
	weftReasonREASON_OUTER_ADDRESS:         {"outer_address", "the outer packet is not addressed to this node's underlay address"},
	weftReasonREASON_OUTER_OPTIONS:         {"outer_options", "the outer packet has IP options"},
	weftReasonREASON_OUTER_FRAGMENT:        {"outer_fragment", "the outer packet is a fragment"},
	weftReasonREASON_OUTER_CHECKSUM:        {"outer_checksum", "the outer IP header checksum is wrong, or, in the driver, the outer UDP checksum is wrong or still open"},
	weftReasonREASON_OUTER_LENGTH:          {"outer_length", "the outer lengths contradict each other"},
	weftReasonREASON_VXLAN_FLAGS:           {"vxlan_flags", "the VXLAN header has unknown bits, or no VNI"},
	weftReasonREASON_VXLAN_VNI:             {"vxlan_vni", "the VNI is not ours"},
	weftReasonREASON_INNER_MAC:             {"inner_mac", "the inner frame is not addressed to our overlay device, or claims to come from it"},
	weftReasonREASON_SEGMENT_TRAIN:         {"segment_train", "a TCP segment with more of the same write behind it, which the kernel merges"},
	weftReasonREASON_INNER_UNPROTECTED:     {"inner_unprotected", "the outer checksum is the only one the packet has, and the network card did not verify it"},
	weftReasonREASON_ECN_CONGESTED:         {"ecn_congested", "marked as congested on the way, but the inner packet can't carry the mark; the kernel drops it (RFC 6040)"},
	weftReasonREASON_STRIP_REFUSED:         {"strip_refused", "the kernel refused to take the outer headers off"},
	weftReasonREASON_NOTE_UNHEARD:          {"note_unheard", "not stripped in the driver: uplink_in was not seen lately to get what the driver hands on with a packet"},
	weftReasonREASON_SOURCE_UNKNOWN_PEER:   {"source_unknown_peer", "source check: the outer source is not a peer"},
	weftReasonREASON_SOURCE_NOT_ITS_PREFIX: {"source_not_its_prefix", "source check: the inner source is not in the pod prefixes or addresses of the peer that sent it"},
	weftReasonREASON_SOURCE_UNSEEN:         {"source_unseen", "source check: came to the overlay device without having passed the check on the uplink (another interface, outer fragments or options, another destination)"},

	weftReasonREASON_POD_VXLAN_INJECTION: {"pod_vxlan_injection", "a pod sent to the VXLAN port of a node, where it could pass for a peer"},
	weftReasonREASON_POD_SENDER:          {"pod_sender", "not express: the sender is not the pod that has the source address, but one that routes for it"},

	weftReasonREASON_AGENT_SILENT:       {"agent_silent", "not express: no agent follows the host's rules any more"},
	weftReasonREASON_FLOW_PROTOCOL:      {"flow_protocol", "not express: neither TCP nor UDP"},
	weftReasonREASON_FLOW_OPTIONS:       {"flow_options", "not express: the packet has IP options"},
	weftReasonREASON_FLOW_FRAGMENT:      {"flow_fragment", "not express: a fragment"},
	weftReasonREASON_FLOW_TTL:           {"flow_ttl", "not express: the TTL ends here, and the kernel tells the sender"},
	weftReasonREASON_FLOW_MALFORMED:     {"flow_malformed", "not express: a checksum or length that no receiver would accept"},
	weftReasonREASON_FLOW_CONTROL:       {"flow_control", "not express: TCP SYN, FIN or RST, which conntrack has to see"},
	weftReasonREASON_FLOW_UNWITNESSED:   {"flow_unwitnessed", "not express yet: no packet of the flow was seen to come through the host's rules"},
	weftReasonREASON_FLOW_UNTRACKED:     {"flow_untracked", "not express: conntrack does not know the flow"},
	weftReasonREASON_FLOW_UNESTABLISHED: {"flow_unestablished", "not express: conntrack does not call the flow established (UDP: it is the first answer)"},
	weftReasonREASON_FLOW_SPECIAL:       {"flow_special", "not express: the flow needs the host's stack (a conntrack helper, zone, timeout policy or offload, IPVS, or NAT of UDP without checksum)"},
	weftReasonREASON_FLOW_MANGLED:       {"flow_mangled", "not express: the host's rules change the TTL or DSCP of the flow"},
	weftReasonREASON_WITNESS_STALE:      {"witness_stale", "not express: the host's rules or routes may have changed since the flow was last seen to come through them, or it was too long ago"},
	weftReasonREASON_WITNESS_RENEWAL:    {"witness_renewal", "not express: sent through the host's stack to see that its rules still let the flow through"},
	weftReasonREASON_FLOW_ORDER:         {"flow_order", "past the host's stack, but in line behind packets of the flow that went through it"},
	weftReasonREASON_POD_UNKNOWN:        {"pod_unknown", "not express: the destination is no pod of this node, or one that is left alone; weft status counts those"},
	weftReasonREASON_POD_MTU:            {"pod_mtu", "not express: too long for the pod's device or the overlay; the kernel tells the sender or fragments it"},
	weftReasonREASON_REWRITE_FAILED:     {"rewrite_failed", "the kernel had no memory to finish a packet"},
}
