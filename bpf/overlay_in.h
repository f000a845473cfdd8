/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "stamp.h"

/* tc ingress of the overlay device: inner frames that uplink_in has handed on,
 * and those that the VXLAN driver has stripped. The latter are counted here,
 * where the kernel has accepted them, and prove that the host lets this peer's
 * packets in. */

/* The peer that an inner source belongs to, as its slot; -1 when to none. */
static __always_inline __s64 source_slot(const struct in_force *rt, __be32 source)
{
	struct peer *peer = find_peer(rt, source);

	if (peer)
		return peer->slot;

	struct node *node = find_node(source);

	return node ? node->slot : -1;
}

static __always_inline void witness_arrival(__u32 slot)
{
	struct peer_state *state = find_state(slot);
	__u64 now = bpf_ktime_get_coarse_ns();

	if (state && state->rx_proven != now)
		state->rx_proven = now;
}

SEC("tc")
int overlay_in(struct __sk_buff *skb)
{
	struct in_force *rt = runtime_now();
	struct frame frame;

	if (!rt)
		return PASS;

	enum seen seen = take_seen(skb, rt);

	if (seen == SEEN_STRIPPED)
		return PASS;

	/* What came in by another interface, as outer fragments or with outer
	 * options has not passed the source check. */
	if (seen == UNSEEN && rt->source_check == SOURCE_CHECK_ENFORCE)
		return drop(REASON_SOURCE_UNSEEN);
	/* A suspect's inner source is not to be believed. */
	if (seen == SEEN_SUSPECT || parse_frame(skb, 0, &frame))
		return PASS;

	__s64 slot = source_slot(rt, frame.ip.saddr);

	if (slot >= 0)
		count_peer(slot, PATH_KERNEL, RX, measure(skb, ETH_HLEN, &frame.ip));
	if (slot >= 0 && seen == SEEN_GOOD) {
		/* Packets that we strip would not get the mark that the host's
		 * rules give to outer ones, and that stays on the inner ones. */
		if (skb->mark)
			return pass(REASON_HOST_MANGLES);
		witness_arrival(slot);
	}
	if (seen == UNSEEN && rt->source_check == SOURCE_CHECK_OBSERVE)
		return pass(REASON_SOURCE_UNSEEN);
	return PASS;
}
