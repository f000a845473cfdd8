/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "structs.h"

/* How our programs recognise packets that another of them has already judged.
 * No mark bit is touched: those belong to users and to kube-proxy. Random
 * numbers are used so that no packet from outside can carry a stamp; they are
 * kept in the pinned map runtime, so they hold across an upgrade.
 *
 * seen: set by uplink_in on packets it leaves to the kernel after the source
 *   check, with its outcome, cleared by overlay_in. It lives in skb->priority,
 *   which vxlan_rcv() and GRO leave alone, which is 0 on everything a driver
 *   receives, and which ____dev_forward_skb() clears between namespaces.
 *
 * stripped: set by uplink_in on packets it redirects into the overlay device,
 *   cleared by overlay_in. ____dev_forward_skb() clears the priority, so it
 *   lives in skb->cb, which nobody uses between the redirect and the device's
 *   tc ingress.
 *
 * encapsulated: set by overlay_out on packets it redirects out of the uplink,
 *   cleared by uplink_out, which so tells them from the kernel's own. It lives
 *   in skb->tc_index and need not be secret.
 */

/* What uplink_in found out about a packet's source. */
enum seen {
	UNSEEN, /* it never saw the packet, or could not tell where it is from */
	SEEN_GOOD,
	SEEN_SUSPECT,
};

/* The stamp is odd; a suspect has the even number below. */
static __always_inline void stamp_seen(struct __sk_buff *skb, const struct in_force *rt,
				       enum seen seen)
{
	skb->priority = seen == SEEN_GOOD ? rt->stamp : rt->stamp - 1;
}

static __always_inline enum seen take_seen(struct __sk_buff *skb, const struct in_force *rt)
{
	if ((skb->priority | 1) != rt->stamp)
		return UNSEEN;

	enum seen seen = skb->priority == rt->stamp ? SEEN_GOOD : SEEN_SUSPECT;

	skb->priority = 0;
	return seen;
}

static __always_inline void stamp_stripped(struct __sk_buff *skb, const struct in_force *rt)
{
	skb->cb[0] = rt->nonce;
	skb->cb[1] = rt->nonce >> 32;
}

static __always_inline bool take_stripped(struct __sk_buff *skb, const struct in_force *rt)
{
	if (skb->cb[0] != (__u32)rt->nonce || skb->cb[1] != (__u32)(rt->nonce >> 32))
		return false;
	skb->cb[0] = 0;
	skb->cb[1] = 0;
	return true;
}

#define ENCAPSULATED 0x7766

static __always_inline void stamp_encapsulated(struct __sk_buff *skb)
{
	skb->tc_index = ENCAPSULATED;
}

static __always_inline bool take_encapsulated(struct __sk_buff *skb)
{
	if (skb->tc_index != ENCAPSULATED)
		return false;
	skb->tc_index = 0;
	return true;
}
