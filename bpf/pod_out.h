/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "express.h"

/* tc egress of a pod's veth, on the host's side: what gets to a pod, behind
 * netfilter, routing and bridge. Packets that came in by the overlay device are
 * witnessed; nothing is changed or stopped. */

static __always_inline enum reason witness_to_pod(struct __sk_buff *skb, const struct in_force *rt)
{
	/* The packet that makes a witness is on its way into the pod yet. */
	struct witness now = { .device = skb->ifindex, .turn = 1 };
	struct frame frame;

	if (parse_frame(skb, 0, &frame))
		return REASON_NONE;

	/* A bridge floods what it has not learned. */
	struct endpoint *pod = find_endpoint(frame.ip.daddr);

	if (!pod || pod->veth != skb->ifindex || !same_mac(frame.eth.h_dest, pod->mac) ||
	    !same_mac(frame.eth.h_source, pod->gateway))
		return REASON_NONE;
	return witness_flow(skb, rt, &frame, &now);
}

SEC("tc")
int pod_out(struct __sk_buff *skb)
{
	struct in_force *rt;
	enum reason reason;

	if (!skb->tc_index)
		return PASS;
	if (express && skb->protocol == bpf_htons(ETH_P_IP) && !skb->vlan_present &&
	    (rt = runtime_now()) && skb->ingress_ifindex == rt->overlay &&
	    (reason = witness_to_pod(skb, rt)))
		pass(reason);
	skb->tc_index = 0; /* no business of the pod's */
	return PASS;
}
