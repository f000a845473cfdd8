/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "config.h"
#include "stamp.h"

/* tc egress of the uplink: behind OUTPUT, POSTROUTING and IPsec. A VXLAN packet
 * of the kernel's that gets here as it was built proves that the host lets this
 * peer's packets out unchanged. Nothing is changed or stopped here. */

static __always_inline enum reason witness_departure(struct __sk_buff *skb,
						     const struct in_force *rt)
{
	struct outer outer;

	if (bpf_skb_load_bytes(skb, 0, &outer.eth, OUTER_LEN))
		return REASON_NONE;
	/* What the kernel had to fragment proves nothing. */
	if (outer.ip.frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return REASON_NONE;
	if (outer.ip.protocol != IPPROTO_UDP || outer.ip.ihl != 5 || outer.ip.saddr != rt->local ||
	    outer.udp.dest != bpf_htons(port) || outer.vxlan.vni != bpf_htonl(vni << 8))
		return REASON_NONE;

	struct node *node = find_node(outer.ip.daddr);
	struct peer_state *state = node ? find_state(node->slot) : NULL;

	if (!state || outer.ip.daddr != node->remote)
		return REASON_NONE;

	bool unchanged = skb->tc_index == left_index(skb);

	skb->tc_index = 0;
	/* Our own packets would not get what the host's rules do to the
	 * kernel's: a mark or a class, DSCP or TTL set, DF, a VLAN tag. */
	if (!unchanged || (outer.ip.tos & DSCP_MASK) || outer.ip.ttl != rt->ttl ||
	    outer.ip.frag_off || skb->vlan_present)
		return REASON_HOST_MANGLES;

	__u64 now = bpf_ktime_get_coarse_ns();

	if (state->tx_proven != now)
		state->tx_proven = now;
	return REASON_NONE;
}

SEC("tc")
int uplink_out(struct __sk_buff *skb)
{
	struct in_force *rt;
	enum reason reason;

	/* Most of what leaves a host never was in overlay_out. */
	if (!skb->tc_index)
		return PASS;
	if (skb->tc_index == ENCAPSULATED) {
		skb->tc_index = 0;
		return PASS;
	}
	if (skb->protocol != bpf_htons(ETH_P_IP) || !(rt = runtime_now()))
		return PASS;
	if ((reason = witness_departure(skb, rt)))
		return pass(reason);
	return PASS;
}
