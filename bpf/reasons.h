/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Why a packet was left to the kernel, or dropped; for express, also why it was
 * left to the base path. A name states a fact that
 * a user can act on; the words for people are in dataplane/ebpf/reasons.go. */
enum reason {
	REASON_NONE, /* taken by us; never counted */

	/* Either direction. */
	REASON_SWITCHED_OFF,      /* acceleration is switched off on this node */
	REASON_PEER_SWITCHED_OFF, /* acceleration is switched off for this peer */
	REASON_HELD,              /* the agent found a reason to hold acceleration back */
	REASON_PEER_NO_ROOM,      /* the maps have no room for this peer */
	REASON_AGGREGATE,         /* a GSO or GRO aggregate: the kernel splits and merges it */
	REASON_AGGREGATE_RECENT,  /* an aggregate of the same flow just took the kernel path */
	REASON_HOST_UNPROVEN,     /* no kernel packet of this peer passed the host lately */
	REASON_HOST_RENEWAL,      /* sent through the kernel to renew that proof */
	REASON_DEVICE_MISSING,    /* the device to hand it to is gone */
	REASON_INNER_NOT_IPV4,    /* the inner packet is not IPv4 */
	REASON_INNER_MALFORMED,   /* the inner headers are cut or contradict themselves */

	/* Out of the overlay. */
	REASON_DESTINATION_UNKNOWN, /* no peer has the inner destination */
	REASON_DESTINATION_MAC,     /* the frame is not addressed to that peer's device */
	REASON_MARKED,              /* marked, and the host routes by mark */
	REASON_UNDERLAY_ROUTE,      /* the route to the peer does not leave by the uplink */
	REASON_UNDERLAY_MTU,        /* too long for the route once encapsulated */
	REASON_UNDERLAY_NEIGHBOUR,  /* the next hop's MAC has to be asked for */
	REASON_ENCAP_REFUSED,       /* the kernel refused to make room (a tunnel within) */
	REASON_HOST_MANGLES,        /* the host changes outer packets: TTL, DSCP, DF, mark, class */

	/* Into the overlay. */
	REASON_OUTER_VLAN,            /* VLAN-tagged */
	REASON_OUTER_NOT_FOR_HOST,    /* not addressed to this host's MAC */
	REASON_OUTER_ADDRESS,         /* not addressed to this node's underlay address */
	REASON_OUTER_OPTIONS,         /* IP options */
	REASON_OUTER_FRAGMENT,        /* a fragment */
	REASON_OUTER_CHECKSUM,        /* wrong IP header checksum */
	REASON_OUTER_LENGTH,          /* lengths contradict each other */
	REASON_VXLAN_FLAGS,           /* unknown bits, or no I flag */
	REASON_VXLAN_VNI,             /* not our network */
	REASON_INNER_MAC,             /* the inner frame is not for our device, or from it */
	REASON_SEGMENT_TRAIN,         /* more of the same TCP write follows: the kernel merges it */
	REASON_INNER_UNPROTECTED,     /* only the unverified outer checksum protects it */
	REASON_ECN_CONGESTED,         /* congestion marked, but the inner packet can't say so */
	REASON_STRIP_REFUSED,         /* the kernel refused to take the outer headers off */
	REASON_NOTE_UNHEARD,          /* uplink_in was not seen to get what the driver says */
	REASON_SOURCE_UNKNOWN_PEER,   /* source check: the outer source is no peer */
	REASON_SOURCE_NOT_ITS_PREFIX, /* source check: the inner source is not that peer's */
	REASON_SOURCE_UNSEEN,         /* source check: came in where uplink_in didn't see it */

	/* From pods. */
	REASON_POD_VXLAN_INJECTION, /* a pod sends to a node's VXLAN port */
	REASON_POD_SENDER,          /* the sender is not the pod that has the source address */

	/* Not by express. */
	REASON_AGENT_SILENT,     /* the agent does not follow the rulesets any more */
	REASON_FLOW_PROTOCOL,    /* neither TCP nor UDP */
	REASON_FLOW_OPTIONS,     /* IP options */
	REASON_FLOW_FRAGMENT,    /* a fragment */
	REASON_FLOW_TTL,         /* the TTL ends here */
	REASON_FLOW_MALFORMED,   /* checksum or lengths that a receiver would not accept */
	REASON_FLOW_CONTROL,     /* TCP SYN, FIN or RST: conntrack has to see it */
	REASON_FLOW_UNWITNESSED, /* no packet of the flow was seen to come through the host's rules
				  */
	REASON_FLOW_UNTRACKED,   /* conntrack does not know the flow */
	REASON_FLOW_UNESTABLISHED, /* conntrack does not call the flow established */
	REASON_FLOW_SPECIAL,       /* a helper, zone, NAT or offload that needs the host's stack */
	REASON_FLOW_MANGLED,       /* the host changes the flow's TTL or DSCP */
	REASON_WITNESS_STALE,      /* it was, but too long ago or before rules changed */
	REASON_WITNESS_RENEWAL,    /* left to the host's stack to renew that */
	REASON_FLOW_ORDER,         /* stands in line behind packets that took the host's stack */
	REASON_POD_UNKNOWN,        /* the destination is no pod that we know on this node */
	REASON_POD_MTU,            /* too long for the pod's device, or the overlay */
	REASON_REWRITE_FAILED,     /* no memory to change a packet that was begun; dropped */

	REASON_COUNT,
};
