/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "deliver.h"
#include "note.h"

/* Packets that uplink_xdp has stripped before they were skbs, as uplink_in gets
 * them: inner frames, of TCP often aggregates. They go to their pod or into the
 * overlay device, and never on through the uplink: that is not where their frames
 * are addressed to, so the host would drop them. */

#define VLAN_VID_MASK 0x0fff

/* A card may have taken a VLAN tag off before uplink_xdp saw the packet. The host
 * ignores a tag that only says a priority, and so do we. */
static __always_inline bool of_a_vlan(struct __sk_buff *skb)
{
	if (!skb->vlan_present)
		return false;
	return skb->vlan_tci & VLAN_VID_MASK || bpf_skb_vlan_pop(skb);
}

/* uplink_xdp has verified the checksum that the packet has. What the card says is
 * of the packet as it came, and may go beyond that: to a tunnel within. */
static __always_inline void vouch(struct __sk_buff *skb)
{
	if (skb->gso_size)
		return; /* GRO has seen to it */
	bpf_csum_level(skb, BPF_CSUM_LEVEL_RESET);
	bpf_csum_level(skb, BPF_CSUM_LEVEL_INC);
}

static __always_inline int take_stripped(struct __sk_buff *skb, const struct in_force *rt,
					 __u32 slot)
{
	struct delivery delivery = {};
	enum reason reason;
	struct frame frame;
	__u32 overlay;

	if (of_a_vlan(skb))
		return drop(REASON_OUTER_VLAN);
	if ((reason = parse_frame(skb, 0, &frame)))
		return drop(reason); /* can't be */
	/* Older kernels' bpf_redirect_peer() leaves the type as it is. */
	bpf_skb_change_type(skb, PACKET_HOST);
	vouch(skb);

	struct load load = measure(skb, ETH_HLEN, &frame.ip);

	reason = may_deliver_frame(skb, rt, find_state(slot), &frame, &delivery);
	if (!reason && delivery.pod) {
		if (address_to_pod(skb, frame, frame.ip.tos, &delivery))
			return drop(REASON_REWRITE_FAILED);
		count_peer(slot, PATH_EXPRESS, RX, load);
		return hand_over(skb, &delivery);
	}
	if (reason != EXPRESS_OFF)
		pass(reason);
	if (!(overlay = find_device(DEVICE_OVERLAY)))
		return drop(REASON_DEVICE_MISSING);
	count_peer(slot, delivery.turn ? PATH_EXPRESS : PATH_BASE, RX, load);
	return wait_in_line(skb, rt, overlay, delivery.turn ? place_in_line(delivery.turn, 1) : 0);
}
