/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "lookup.h"

/* What has to be true before a packet leaves the kernel path. Both directions
 * ask the same questions. */

/* The switches of some paths, as enum off bits: the operator's, the agent's. All
 * of the paths have to be off to refuse. */
static __always_inline enum reason switched_on(const struct in_force *rt,
					       const struct peer_state *state, __u32 paths)
{
	if ((rt->off & paths) == paths)
		return REASON_SWITCHED_OFF;
	if (((rt->off | state->off) & paths) == paths)
		return REASON_PEER_SWITCHED_OFF;
	if (rt->held)
		return REASON_HELD;
	return REASON_NONE;
}

/* The time from then to now. Another CPU may have written then with a clock
 * that had ticked on already: that is no time ago, and not an age. */
static __always_inline __s64 since(__u64 then, __u64 now)
{
	return now - then;
}

/* Whether a proof of the host's (see struct peer_state) is due to be renewed. */
static __always_inline bool renewal_due(__u64 proven, __u64 renewal, __u64 now)
{
	return since(proven, now) > PROOF_LIFE / 2 && since(renewal, now) > PROOF_LIFE / 8;
}

/* Whether the host was lately seen to let this peer's packets through. Two CPUs may renew at once:
 * one packet more takes the kernel path, no harm done. */
static __always_inline enum reason host_proven(__u64 proven, __u64 *renewal, __u64 now)
{
	if (!proven || since(proven, now) > PROOF_LIFE)
		return REASON_HOST_UNPROVEN;
	if (renewal_due(proven, *renewal, now)) {
		*renewal = now;
		return REASON_HOST_RENEWAL;
	}
	return REASON_NONE;
}

/* Aggregates ride the kernel path, and for a moment the rest of their flow
 * with them: the two roads have queues of their own, and a small packet on the
 * other one would overtake. */
static __always_inline enum reason no_aggregate(struct __sk_buff *skb, void *aggregates, __u32 flow,
						__u64 now)
{
	__u32 key = flow & (AGGREGATE_FLOWS - 1);
	__u64 *last = bpf_map_lookup_elem(aggregates, &key);

	if (!last)
		return REASON_AGGREGATE_RECENT;
	if (skb->gso_size) {
		*last = now;
		return REASON_AGGREGATE;
	}
	return *last && since(*last, now) < AGGREGATE_LIFE ? REASON_AGGREGATE_RECENT : REASON_NONE;
}

/* The same for another packet that takes the kernel path while the rest of its
 * flow would not. */
static __always_inline void keep_order(void *aggregates, __u32 flow, __u64 now)
{
	__u32 key = flow & (AGGREGATE_FLOWS - 1);
	__u64 *last = bpf_map_lookup_elem(aggregates, &key);

	if (last)
		*last = now;
}
