/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "witness.h"

/* In front of the host's netfilter and routing: what has to be true before a
 * packet may go past them, and what they would have made of it. */

static __always_inline struct endpoint *find_endpoint(__be32 addr)
{
	return bpf_map_lookup_elem(&endpoints, &addr);
}

/* What express_on says when express_off, for the node or the peer. It is not
 * counted: weft status says why. */
#define EXPRESS_OFF REASON_COUNT

static __always_inline enum reason express_on(const struct in_force *rt,
					      const struct peer_state *state,
					      const struct pulse *pulse, __u64 now)
{
	if (express_off(rt, pulse) || state->off & OFF_EXPRESS)
		return EXPRESS_OFF;
	if (since(pulse->beat, now) > PULSE_LIFE)
		return REASON_AGENT_SILENT;
	return REASON_NONE;
}

/* Whether the flow was lately seen to come out of the host at a device. */
static __always_inline enum reason still_witnessed(struct witness *w, const struct pulse *pulse,
						   __u32 device, __u64 now)
{
	if (w->device != device || w->epoch != pulse->epoch || since(w->seen, now) > WITNESS_LIFE)
		return REASON_WITNESS_STALE;
	if (since(w->seen, now) > WITNESS_LIFE / 2 && since(w->renewal, now) > WITNESS_LIFE / 16) {
		w->renewal = now;
		return REASON_WITNESS_RENEWAL;
	}
	return REASON_NONE;
}

/* Asks conntrack whether the flow is established, and what NAT would make of it
 * now: the inverse of what the answers are. That must be what was witnessed. */
static __always_inline enum reason ask_conntrack(struct __sk_buff *skb, const struct in_force *rt,
						 const struct segment *segment,
						 const struct flow *as, __u8 status)
{
	const struct flow *flow = &segment->flow;
	struct flow answers = { .protocol = flow->protocol };
	unsigned long nat;
	enum reason reason;
	__u8 dir;
	struct nf_conn *ct = find_tracked(skb, flow, &dir);

	if (!ct)
		return REASON_FLOW_UNTRACKED;
	if (!(reason = judge_tracked(ct, flow->protocol, dir))) {
		/* What was judged as a new flow's is not that any more, or again. */
		if (visible_status(ct) != status)
			reason = REASON_WITNESS_STALE;
		other_side(ct, dir, &answers);
		nat = ct->status & (IPS_SRC_NAT | IPS_DST_NAT);
		keep_alive(ct, rt, segment);
	}
	bpf_ct_release(ct);
	if (reason)
		return reason;

	struct flow wanted = inverse(&answers);

	if (!same_flow(&wanted, as))
		return REASON_WITNESS_STALE;
	/* IPVS changes packets without conntrack's NAT. */
	return same_flow(&wanted, flow) || nat ? REASON_NONE : REASON_FLOW_SPECIAL;
}

/* Conntrack is asked once a tick of the coarse clock, since the entry of an
 * established flow changes seldom, and again after FIN or RST (see
 * forget_tracked). A segment without data asks always: it may be the last for
 * long, and sets the entry's timeout. */
static __always_inline enum reason still_tracked(struct __sk_buff *skb, const struct in_force *rt,
						 const struct segment *segment, struct witness *w,
						 const struct flow *as, __u64 now)
{
	bool udp = segment->flow.protocol == IPPROTO_UDP;
	enum reason reason;

	if (w->tracked != now || !(segment->data || udp)) {
		if ((reason = ask_conntrack(skb, rt, segment, as, w->status))) {
			/* As when UDP becomes assured. This packet's way through the
			 * stack is a new witness, however new the old one is. */
			if (reason == REASON_WITNESS_STALE)
				w->seen = 0;
			return reason;
		}
		w->tracked = now;
	}
	/* A checksum of zero may be none, or one that is yet to be computed and
	 * happens to be zero so far: only the kernel can tell. */
	if (udp && !segment->check && !same_flow(&segment->flow, as))
		return REASON_FLOW_SPECIAL;
	return REASON_NONE;
}

/* A flow begins to close: its entry changes with the next packets, of either
 * direction. */
static __always_inline void forget_tracked(const struct flow *flow)
{
	struct witness *w = bpf_map_lookup_elem(&witnesses, flow);

	if (!w)
		return;
	w->tracked = 0;

	struct flow answers = inverse(&w->as);

	if ((w = bpf_map_lookup_elem(&witnesses, &answers)))
		w->tracked = 0;
}
