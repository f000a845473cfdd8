/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "config.h"
#include "parse.h"
#include "structs.h"

/* How our programs recognise packets that another of them has already judged.
 * No mark bit is touched: those belong to users and to kube-proxy. What matters
 * for who may come in is a random number, so that no packet from outside can
 * carry it; it is kept in the pinned map runtime, so it holds across an upgrade.
 *
 * Into the overlay a stamp lies in two places, and one is enough: somebody may
 * write the one, hardly anybody writes both.
 *
 * - seen: set by uplink_in on packets it leaves to the kernel after the source
 *   check, with its outcome, cleared by overlay_in. In skb->priority (a netfilter
 *   rule may set it) and skb->tc_index. vxlan_rcv() and GRO leave both alone.
 * - stripped: set by uplink_in on packets it redirects into the overlay device,
 *   cleared by overlay_in. In skb->cb (a tc program may use it as scratch) and
 *   skb->tc_index. ____dev_forward_skb() clears the priority. In skb->cb only is
 *   the packet's place in the line of its flow (line.h): without it, it takes the
 *   host's stack.
 *
 * Out of the overlay nothing depends on secrecy, and skb->tc_index has it alone:
 *
 * - encapsulated: set by overlay_out on packets it redirects out of the uplink.
 * - departed: set by pod_in on aggregates of express, which it sends out of the
 *   overlay device, for overlay_out. Where somebody wipes it they count twice, and
 *   are no witness, since they are not untouched either (see below).
 * - left: set by overlay_out on packets it leaves to the kernel, with what their
 *   mark and priority were, so that uplink_out sees whether the host's rules for
 *   outer packets changed them.
 *
 * uplink_out clears both. Where somebody wipes them, nothing is proven, and the
 * kernel path carries on.
 *
 * Through the host's stack, from pod_in to overlay_out and from overlay_in to
 * pod_out, skb->tc_index carries what TOS and TTL were: so that the programs
 * behind netfilter see whether rules have changed them. Where somebody wipes it,
 * no flow is witnessed.
 */

/* What uplink_in found out about a packet. */
enum seen {
	UNSEEN, /* it never saw the packet, or could not tell where it is from */
	SEEN_GOOD,
	SEEN_SUSPECT,
	SEEN_STRIPPED, /* good, and counted */
};

static __always_inline __u16 seen_index(const struct in_force *rt, enum seen seen)
{
	return ((__u16)(rt->nonce >> 48) & ~3) | seen;
}

/* The stamp is odd; a suspect has the even number below. */
static __always_inline void stamp_seen(struct __sk_buff *skb, const struct in_force *rt,
				       enum seen seen)
{
	skb->priority = seen == SEEN_GOOD ? rt->stamp : rt->stamp - 1;
	skb->tc_index = seen_index(rt, seen);
}

/* place is 0 for packets that don't stand in line. */
static __always_inline void stamp_stripped(struct __sk_buff *skb, const struct in_force *rt,
					   __u32 place)
{
	skb->cb[0] = rt->nonce;
	skb->cb[1] = rt->nonce >> 32;
	skb->cb[2] = place;
	skb->tc_index = seen_index(rt, SEEN_STRIPPED);
}

/* barrier() keeps clang from sharing the stores, which would be one to a
 * computed place: "dereference of modified ctx ptr", the verifier says. */
static __always_inline enum seen take_seen(struct __sk_buff *skb, const struct in_force *rt,
					   __u32 *place)
{
	__u32 priority = skb->priority, low = skb->cb[0], high = skb->cb[1], third = skb->cb[2];
	__u16 index = skb->tc_index;
	enum seen seen = UNSEEN;

	if (index > seen_index(rt, UNSEEN) && index <= seen_index(rt, SEEN_STRIPPED)) {
		seen = index & 3;
		skb->tc_index = 0;
		barrier();
	}
	if ((priority | 1) == rt->stamp) {
		if (!seen)
			seen = priority == rt->stamp ? SEEN_GOOD : SEEN_SUSPECT;
		skb->priority = 0;
		barrier();
	}
	if (low == (__u32)rt->nonce && high == (__u32)(rt->nonce >> 32)) {
		seen = SEEN_STRIPPED;
		skb->cb[0] = 0;
		barrier();
		skb->cb[1] = 0;
		barrier();
		skb->cb[2] = 0;
		barrier();
		*place = third;
	}
	return seen;
}

/* TOS and TTL folded into 15 bits, never 0. */
static __always_inline __u16 untouched_index(__u8 tos, __u8 ttl)
{
	return (((__u32)tos << 8 | ttl) * 0x9e3779b1 >> 17) | 1;
}

/* An index that somebody else has set stays. */
static __always_inline void stamp_untouched(struct __sk_buff *skb, const struct iphdr *ip)
{
	if (express && !skb->tc_index)
		skb->tc_index = untouched_index(ip->tos, ip->ttl);
}

/* The other indexes have 15 bits. */
#define ENCAPSULATED 0x8000
#define DEPARTED 0xc000

/* Mark and priority folded into 15 bits, never 0. */
static __always_inline __u16 left_index(const struct __sk_buff *skb)
{
	__u32 hash = (skb->mark ^ (skb->priority << 16 | skb->priority >> 16)) * 0x9e3779b1;

	return (hash >> 17) | 1;
}

static __always_inline void stamp_encapsulated(struct __sk_buff *skb)
{
	skb->tc_index = ENCAPSULATED;
}

static __always_inline void stamp_departed(struct __sk_buff *skb)
{
	skb->tc_index = DEPARTED;
}

static __always_inline void stamp_left(struct __sk_buff *skb)
{
	skb->tc_index = left_index(skb);
}
