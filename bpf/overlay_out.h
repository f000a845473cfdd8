/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "depart.h"
#include "witness.h"

/* tc egress of the overlay device: what the kernel has routed to a peer,
 * behind FORWARD and POSTROUTING. It is encapsulated here and sent out of the
 * uplink, or left to the VXLAN driver below. */

static __always_inline enum reason find_destination(struct __sk_buff *skb,
						    const struct in_force *rt, struct departure *d)
{
	enum reason reason;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return REASON_INNER_NOT_IPV4;
	if ((reason = parse_frame(skb, 0, &d->frame)))
		return reason;

	struct peer *peer = find_peer(rt, d->frame.ip.daddr);

	if (!peer)
		return REASON_DESTINATION_UNKNOWN;
	if (!(d->state = find_state(peer->slot)))
		return REASON_PEER_NO_ROOM;
	d->load = measure(skb, ETH_HLEN, &d->frame.ip);
	d->peer = peer;
	/* The kernel's FDB goes by MAC: where it may say something else than
	 * our map, it decides. */
	if (!same_mac(d->frame.eth.h_dest, peer->mac))
		return REASON_DESTINATION_MAC;
	return REASON_NONE;
}

static __always_inline enum reason may_leave(struct __sk_buff *skb, const struct in_force *rt,
					     struct departure *d, __u32 flow, __u64 now)
{
	enum reason reason;

	if ((reason = switched_on(rt, d->state, OFF_BASE)))
		return reason;
	if ((reason = no_aggregate(skb, &tx_aggregates, flow, now)))
		return reason;
	return host_proven(d->state->tx_proven, &d->state->tx_renewal, now);
}

/* Only packets of pods are worth it, as far as their ingress tells: none of the
 * host's own, none that it forwards for others. */
static __always_inline void witness_to_peer(struct __sk_buff *skb, const struct in_force *rt,
					    const struct departure *d, __u32 hash)
{
	__u32 from = skb->ingress_ifindex;
	struct witness now = {
		.device = rt->overlay,
		.mark = skb->mark,
		.priority = skb->priority,
		.hash = hash,
	};

	if (!from || from == rt->uplink || from == rt->overlay)
		return;
	if (witness_flow(skb, rt, &d->frame, &now))
		pass(REASON_FLOW_MANGLED);
}

static __always_inline enum reason leave(struct __sk_buff *skb, const struct in_force *rt,
					 struct departure *d)
{
	enum reason reason;

	if ((reason = find_destination(skb, rt, d)))
		return reason;

	__u32 flow = bpf_get_hash_recalc(skb);
	__u64 now = bpf_ktime_get_coarse_ns();
	struct route route = { .mark = skb->mark };

	witness_to_peer(skb, rt, d, flow);
	if ((reason = may_leave(skb, rt, d, flow, now)))
		return reason;
	if (skb->len - ETH_HLEN + ENCAP_LEN > IP_MAX_LEN)
		return REASON_UNDERLAY_MTU;
	build_encap(&d->encap, rt, d, flow, skb->len - ETH_HLEN);
	/* Asked for each packet: one that waits for a neighbour's MAC would find its
	 * way back to flannel.1's neighbours, where it is routed to now. */
	if ((reason = ask_next_hop(skb, rt, d, &route)) || (reason = take_next_hop(d, &route)))
		return reason;
	return encapsulate(skb, &d->encap);
}

SEC("tc")
int overlay_out(struct __sk_buff *skb)
{
	struct in_force *rt = runtime_now();
	struct departure d = {};

	/* An aggregate of express is the VXLAN driver's, and counted. It has not come
	 * through the host's rules: it is no witness. */
	if (skb->tc_index == DEPARTED) {
		stamp_left(skb);
		return PASS;
	}
	if (!rt)
		return PASS;

	enum reason reason = leave(skb, rt, &d);

	if (d.peer)
		count_peer(d.peer->slot, reason ? PATH_KERNEL : PATH_BASE, TX, d.load);
	if (reason) {
		if (d.peer)
			stamp_left(skb);
		return pass(reason);
	}
	stamp_encapsulated(skb);
	return bpf_redirect_neigh(d.uplink, &d.hop, sizeof(d.hop), 0);
}
