/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "express.h"
#include "line.h"
#include "rewrite.h"

/* Handing an inner packet to its pod: what both programs do that deliver. */

/* A packet that may go straight to its pod. */
struct delivery {
	struct segment segment;
	struct flow as;       /* after NAT */
	struct endpoint *pod; /* NULL: it may not */
	__u32 veth;
	__u16 turn; /* it may, when its turn comes: its number; else 0 */
};

/* The longest packet that an skb becomes when it is split. */
static __always_inline __u32 longest(struct __sk_buff *skb, const struct iphdr *ip,
				     const struct segment *segment)
{
	return skb->gso_size ? skb->gso_size + segment->headers : bpf_ntohs(ip->tot_len);
}

/* Finds the pod of a flow, as it was witnessed. */
static __always_inline enum reason find_pod(struct __sk_buff *skb, const struct iphdr *ip,
					    const struct witness *w, struct delivery *d,
					    struct endpoint **found)
{
	struct endpoint *pod;

	d->as = w->as;
	if (!(pod = find_endpoint(d->as.daddr)))
		return REASON_POD_UNKNOWN;
	if (!(d->veth = find_device(pod->veth)))
		return REASON_DEVICE_MISSING;
	if (longest(skb, ip, &d->segment) > pod->mtu)
		return REASON_POD_MTU;
	*found = pod;
	return REASON_NONE;
}

/* Whether a packet of a witnessed flow may go past the stack. UDP that was an
 * aggregate lately may not: the stack splits those, and nobody can stand in line
 * behind what is many packets by then. */
static __always_inline enum reason judge(struct __sk_buff *skb, const struct in_force *rt,
					 const struct pulse *pulse, const struct iphdr *ip,
					 struct witness *w, struct delivery *d,
					 struct endpoint **pod, __u64 now)
{
	enum reason reason;

	if (w->whole && since(w->whole, now) < WITNESS_LIFE)
		return REASON_AGGREGATE_RECENT;
	if ((reason = find_pod(skb, ip, w, d, pod)))
		return reason;
	if (!*pod)
		return REASON_POD_UNKNOWN; /* can't be; for the verifier */
	if ((reason = still_witnessed(w, pulse, (*pod)->veth, now)))
		return reason;
	return still_tracked(skb, rt, &d->segment, w, &d->as, now);
}

/* offset is where the inner IP packet starts. REASON_FLOW_ORDER means that the
 * packet may be delivered once those before it are: it has a number. */
static __always_inline enum reason may_deliver(struct __sk_buff *skb, const struct in_force *rt,
					       const struct peer_state *state,
					       const struct iphdr *ip, __u32 offset,
					       const struct transport *t, struct delivery *d,
					       __u64 now)
{
	struct pulse *pulse = pulse_now();
	struct endpoint *pod = NULL;
	struct witness *w;
	enum reason reason;

	if ((reason = express_on(rt, state, pulse, now)))
		return reason;
	reason = parse_segment(skb, offset, ip, t, &d->segment);
	if (reason == REASON_FLOW_CONTROL)
		forget_tracked(&d->segment.flow);
	if (reason && reason != REASON_AGGREGATE)
		return reason;
	if (!(w = bpf_map_lookup_elem(&witnesses, &d->segment.flow)))
		return reason ? reason : REASON_FLOW_UNWITNESSED;
	if (reason == REASON_AGGREGATE)
		w->whole = now;
	if (reason || (reason = judge(skb, rt, pulse, ip, w, d, &pod, now))) {
		draw_number(w);
		return reason;
	}
	if (w->turn) {
		d->turn = draw_number(w);
		return REASON_FLOW_ORDER;
	}
	d->pod = pod;
	return REASON_NONE;
}

/* may_deliver for a packet without outer headers. */
static __always_inline enum reason may_deliver_frame(struct __sk_buff *skb,
						     const struct in_force *rt,
						     const struct peer_state *state,
						     const struct frame *frame, struct delivery *d)
{
	struct transport t;
	bool readable = read_transport(skb, ETH_HLEN, &frame->ip, &t);

	if (rt->held || !state)
		return EXPRESS_OFF;
	return may_deliver(skb, rt, state, &frame->ip, ETH_HLEN, readable ? &t : NULL, d,
			   bpf_ktime_get_coarse_ns());
}

/* A packet whose turn has come was judged when it took its place. */
static __always_inline enum reason leave_line(struct __sk_buff *skb, const struct frame *frame,
					      __u32 place, struct delivery *d)
{
	struct endpoint *pod = NULL;
	struct witness *w;
	enum reason reason;

	if ((reason = read_segment(skb, ETH_HLEN, &frame->ip, &d->segment)))
		return reason;
	if (!(w = bpf_map_lookup_elem(&witnesses, &d->segment.flow)))
		return REASON_FLOW_UNWITNESSED;
	come_out(w, place);
	if ((reason = find_pod(skb, &frame->ip, w, d, &pod)))
		return reason;
	d->pod = pod;
	return REASON_NONE;
}

/* Makes of the frame, which is all there is of the packet now, what the host
 * would hand to the pod. */
static __always_inline long address_to_pod(struct __sk_buff *skb, struct frame frame, __u8 tos,
					   const struct delivery *d)
{
	__builtin_memcpy(frame.eth.h_dest, d->pod->mac, ETH_ALEN);
	__builtin_memcpy(frame.eth.h_source, d->pod->gateway, ETH_ALEN);
	frame.ip.tos = tos;
	return rewrite(skb, 0, &frame, &d->segment.flow, &d->as);
}

/* What is the host's own does not go along, as on the way through a veth. */
static __always_inline int hand_over(struct __sk_buff *skb, const struct delivery *d)
{
	skb->mark = 0;
	barrier();
	skb->priority = 0;
	barrier();
	skb->tc_index = 0;
	return bpf_redirect_peer(d->veth, 0);
}
