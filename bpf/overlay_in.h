/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "deliver.h"

/* tc ingress of the overlay device: inner frames that uplink_in has handed on,
 * and those that the VXLAN driver has stripped. The latter are counted here,
 * where the kernel has accepted them, and prove that the host lets this peer's
 * packets in; those of established flows go straight to their pod. */

/* The peer that an inner source belongs to, as its slot; -1 when to none. */
static __always_inline __s64 source_slot(const struct in_force *rt, __be32 source)
{
	struct peer *peer = find_peer(rt, source);

	if (peer)
		return peer->slot;

	struct node *node = find_node(source);

	return node ? node->slot : -1;
}

static __always_inline void witness_arrival(struct peer_state *state)
{
	__u64 now = bpf_ktime_get_coarse_ns();

	if (state->rx_proven != now)
		state->rx_proven = now;
}

/* What the kernel has stripped, an aggregate most likely. */
static __always_inline enum reason deliver_stripped(struct __sk_buff *skb,
						    const struct in_force *rt,
						    const struct peer_state *state,
						    const struct frame *frame, struct delivery *d)
{
	enum reason reason = may_deliver_frame(skb, rt, state, frame, d);

	if (reason)
		return reason;
	if (!d->pod)
		return REASON_POD_UNKNOWN; /* can't be; for the verifier */
	return address_to_pod(skb, *frame, frame->ip.tos, d) ? REASON_REWRITE_FAILED : REASON_NONE;
}

/* A good packet of a peer's that the kernel has stripped. */
static __always_inline int arrived(struct __sk_buff *skb, const struct in_force *rt, __u32 slot,
				   const struct frame *frame)
{
	struct load load = measure(skb, ETH_HLEN, &frame->ip);
	struct peer_state *state = find_state(slot);
	struct delivery delivery = {};

	/* Packets that we strip would not get the mark that the host's rules
	 * give to outer ones, and that stays on the inner ones. */
	if (skb->mark || !state) {
		count_peer(slot, PATH_KERNEL, RX, load);
		return skb->mark ? pass(REASON_HOST_MANGLES) : PASS;
	}
	witness_arrival(state);

	enum reason reason = deliver_stripped(skb, rt, state, frame, &delivery);

	if (reason == REASON_REWRITE_FAILED)
		return drop(reason);
	count_peer(slot, reason && !delivery.turn ? PATH_KERNEL : PATH_EXPRESS, RX, load);
	if (!reason)
		return hand_over(skb, &delivery);
	/* Of all else uplink_in has counted why it did not take it. */
	if (skb->gso_size && reason != EXPRESS_OFF)
		pass(reason);
	if (delivery.turn)
		return wait_in_line(skb, rt, rt->overlay, place_in_line(delivery.turn, 1));
	stamp_untouched(skb, &frame->ip);
	return PASS;
}

/* A packet that stands in line. */
static __always_inline int next_in_line(struct __sk_buff *skb, const struct in_force *rt,
					const struct frame *frame, __u32 place)
{
	struct delivery delivery = {};

	if (waits_again(place))
		return wait_in_line(skb, rt, rt->overlay, place_in_line(place, 0));
	if (leave_line(skb, frame, place, &delivery) || !delivery.pod) {
		stamp_untouched(skb, &frame->ip);
		return PASS;
	}
	if (address_to_pod(skb, *frame, frame->ip.tos, &delivery))
		return drop(REASON_REWRITE_FAILED);
	return hand_over(skb, &delivery);
}

SEC("tc")
int overlay_in(struct __sk_buff *skb)
{
	struct in_force *rt = runtime_now();
	struct frame frame;

	if (!rt)
		return PASS;

	__u32 place = 0;
	enum seen seen = take_seen(skb, rt, &place);

	/* What came in by another interface, as outer fragments or with outer
	 * options has not passed the source check. */
	if (seen == UNSEEN && rt->source_check == SOURCE_CHECK_ENFORCE)
		return drop(REASON_SOURCE_UNSEEN);
	/* A suspect's inner source is not to be believed. */
	if (seen == SEEN_SUSPECT || parse_frame(skb, 0, &frame))
		return PASS;
	if (place)
		return next_in_line(skb, rt, &frame, place);

	__s64 slot = source_slot(rt, frame.ip.saddr);

	if (seen == SEEN_GOOD && slot >= 0)
		return arrived(skb, rt, slot, &frame);
	stamp_untouched(skb, &frame.ip);
	if (seen == SEEN_STRIPPED)
		return PASS;
	if (slot >= 0)
		count_peer(slot, PATH_KERNEL, RX, measure(skb, ETH_HLEN, &frame.ip));
	if (seen == UNSEEN && rt->source_check == SOURCE_CHECK_OBSERVE)
		return pass(REASON_SOURCE_UNSEEN);
	return PASS;
}
