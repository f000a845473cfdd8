/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "depart.h"
#include "express.h"
#include "rewrite.h"

/* tc ingress of a pod's veth, on the host's side: what a pod sends, in front of
 * bridge, netfilter and routing. What pods inject into the overlay network is
 * dropped, and packets of established flows to pods of peers go straight out of
 * the uplink. */

static __always_inline bool is_node(__be32 addr)
{
	return bpf_map_lookup_elem(&node_addresses, &addr);
}

/* Somebody else's source port may be 8472 after NAT: then it is an answer. */
static __always_inline bool is_answer(struct __sk_buff *skb, const struct iphdr *ip)
{
	struct flow flow = {
		.saddr = ip->saddr,
		.daddr = ip->daddr,
		.protocol = ip->protocol,
	};
	struct nf_conn *ct;
	__u8 dir;

	if (!express || ip->frag_off & bpf_htons(IP_MF))
		return false;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + ip->ihl * 4, &flow.sport, sizeof(__be32)))
		return false;
	if (!(ct = find_tracked(skb, &flow, &dir)))
		return false;
	bpf_ct_release(ct);
	return dir != IP_CT_DIR_ORIGINAL;
}

/* Does a pod play a node? VXLAN knows no authentication, so the kernel of a node
 * would take what is sent to its VXLAN port for a peer's. Answers are let pass, so
 * nobody must ask in a node's name, either. What comes with a translated
 * destination, or as a later fragment, is left to the firewall. */
static __always_inline bool injects(struct __sk_buff *skb, const struct iphdr *ip)
{
	__be16 ports[2];

	if (ip->protocol != IPPROTO_UDP || ip->frag_off & bpf_htons(IP_OFFSET))
		return false;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + ip->ihl * 4, ports, sizeof(ports)))
		return false;
	if (ports[0] == bpf_htons(port) && is_node(ip->saddr))
		return true;
	return ports[1] == bpf_htons(port) && is_node(ip->daddr) && !is_answer(skb, ip);
}

/* Else a pod that routes for others would be bypassed. */
static __always_inline bool sent_by_owner(struct __sk_buff *skb, const struct frame *frame)
{
	struct endpoint *pod = find_endpoint(frame->ip.saddr);

	return pod && pod->veth == skb->ifindex && same_mac(frame->eth.h_source, pod->mac) &&
	       same_mac(frame->eth.h_dest, pod->gateway);
}

/* Finds the next hop of a flow, and asks for it once a tick of the clock. */
static __always_inline enum reason find_next_hop(struct __sk_buff *skb, const struct in_force *rt,
						 struct departure *d, __u32 hash, __u32 mark,
						 __u64 now)
{
	struct route asked = {
		.asked = now,
		.hash = hash,
		.remote = d->peer->remote,
		.mark = mark,
	};
	__u32 len = bpf_ntohs(d->encap.ip.tot_len), key = hash & (ROUTES - 1);
	struct route *known = bpf_map_lookup_elem(&routes, &key);
	enum reason reason;

	if (!known)
		return REASON_UNDERLAY_ROUTE;
	if (known->asked != asked.asked || known->hash != hash || known->mark != mark ||
	    known->remote != asked.remote || known->mtu < len) {
		if ((reason = ask_next_hop(skb, rt, d, &asked)))
			return reason;
		*known = asked;
	}
	return take_next_hop(d, known);
}

/* What is asked of single packets, which are encapsulated here. Aggregates of UDP
 * take the stack, and the rest of their flow with them; those of TCP come here. */
static __always_inline enum reason may_be_encapsulated(struct __sk_buff *skb,
						       const struct peer_state *state,
						       const struct segment *segment, __u32 hash,
						       __u64 now)
{
	enum reason reason;

	if (segment->flow.protocol == IPPROTO_UDP &&
	    (reason = no_aggregate(skb, &tx_aggregates, hash, now)))
		return reason;
	/* The stack gets it; overlay_out then leaves it to the kernel. */
	if (since(state->tx_proven, now) > PROOF_LIFE || !state->tx_proven)
		return REASON_HOST_UNPROVEN;
	return renewal_due(state->tx_proven, state->tx_renewal, now) ? REASON_HOST_RENEWAL
								     : REASON_NONE;
}

static __always_inline enum reason may_depart(struct __sk_buff *skb, const struct in_force *rt,
					      struct departure *d, const struct segment *segment,
					      struct witness *w, const struct flow *as, __u64 now)
{
	struct pulse *pulse = pulse_now();
	struct peer *peer = find_peer(rt, as->daddr);
	__u32 len =
		skb->gso_size ? segment->headers + skb->gso_size : bpf_ntohs(d->frame.ip.tot_len);
	enum reason reason;

	if (!peer || !(d->state = find_state(peer->slot)))
		return REASON_PEER_NO_ROOM;
	d->peer = peer;
	if ((reason = switched_on(rt, d->state, OFF_BASE | OFF_EXPRESS)) ||
	    (reason = express_on(rt, d->state, pulse, now)))
		return reason;
	if (!skb->gso_size && (reason = may_be_encapsulated(skb, d->state, segment, w->hash, now)))
		return reason;
	if (!sent_by_owner(skb, &d->frame))
		return REASON_POD_SENDER;
	if (len > rt->overlay_mtu)
		return REASON_POD_MTU;
	if ((reason = still_witnessed(w, pulse, rt->overlay, now)))
		return reason;
	return still_tracked(skb, rt, segment, w, as, now);
}

/* Out of the uplink, encapsulated. */
static __always_inline enum reason depart_single(struct __sk_buff *skb, const struct in_force *rt,
						 struct departure *d, const struct segment *segment,
						 const struct flow *as, __u32 hash, __u32 mark,
						 __u64 now)
{
	enum reason reason;

	build_encap(&d->encap, rt, d, hash, skb->len - ETH_HLEN);
	if ((reason = find_next_hop(skb, rt, d, hash, mark, now)) ||
	    (reason = encapsulate(skb, &d->encap)))
		return reason;
	return rewrite(skb, OUTER_LEN, &d->frame, &segment->flow, as) ? REASON_REWRITE_FAILED
								      : REASON_NONE;
}

/* An aggregate goes out of the overlay device as the host would have sent it: what
 * the VXLAN driver encapsulates may stay whole down to the card, what a program
 * does may not. */
static __always_inline enum reason depart_whole(struct __sk_buff *skb, struct departure *d,
						const struct segment *segment,
						const struct flow *as)
{
	if (!(d->overlay = find_device(DEVICE_OVERLAY)))
		return REASON_DEVICE_MISSING;
	return rewrite(skb, 0, &d->frame, &segment->flow, as) ? REASON_REWRITE_FAILED : REASON_NONE;
}

static __always_inline enum reason depart(struct __sk_buff *skb, const struct in_force *rt,
					  struct departure *d, const struct segment *segment,
					  struct witness *w)
{
	struct frame *frame = &d->frame;
	__u64 now = bpf_ktime_get_coarse_ns();
	struct flow as = w->as;
	__u32 mark = w->mark, priority = w->priority, hash = w->hash;
	enum reason reason;

	if ((reason = may_depart(skb, rt, d, segment, w, &as, now)))
		return reason;
	d->load = measure(skb, ETH_HLEN, &frame->ip);
	__builtin_memcpy(frame->eth.h_dest, d->peer->mac, ETH_ALEN);
	__builtin_memcpy(frame->eth.h_source, rt->mac, ETH_ALEN);
	reason = skb->gso_size ? depart_whole(skb, d, segment, &as)
			       : depart_single(skb, rt, d, segment, &as, hash, mark, now);
	if (reason)
		return reason;
	skb->mark = mark;
	barrier();
	skb->priority = priority;
	return REASON_NONE;
}

SEC("tc")
int pod_in(struct __sk_buff *skb)
{
	struct in_force *rt;
	struct departure d = {};
	struct segment segment = {};
	struct witness *w;

	if (skb->protocol != bpf_htons(ETH_P_IP) || !(rt = runtime_now()) ||
	    parse_frame(skb, 0, &d.frame))
		return PASS;
	/* Tagged or not: to the kernel a tag of VLAN 0 is none. */
	if (injects(skb, &d.frame.ip))
		return drop(REASON_POD_VXLAN_INJECTION);
	if (skb->vlan_present)
		return PASS;
	stamp_untouched(skb, &d.frame.ip);

	if (express_off(rt, pulse_now()))
		return PASS;

	enum reason reason = read_segment(skb, ETH_HLEN, &d.frame.ip, &segment);

	if (reason == REASON_FLOW_CONTROL)
		forget_tracked(&segment.flow);
	/* Without a witness it is no matter of ours: most of what a pod sends
	 * goes elsewhere. */
	if (reason || !(w = bpf_map_lookup_elem(&witnesses, &segment.flow)) ||
	    w->device != rt->overlay)
		return PASS;
	reason = depart(skb, rt, &d, &segment, w);

	if (reason == REASON_REWRITE_FAILED)
		return drop(reason);
	/* What is no matter of express alone overlay_out will find, and count. */
	if (reason)
		return reason > REASON_POD_VXLAN_INJECTION && reason != EXPRESS_OFF ? pass(reason)
										    : PASS;

	count_peer(d.peer->slot, PATH_EXPRESS, TX, d.load);
	if (d.overlay) {
		stamp_departed(skb);
		return bpf_redirect(d.overlay, 0);
	}
	stamp_encapsulated(skb);
	return bpf_redirect_neigh(d.uplink, &d.hop, sizeof(d.hop), 0);
}
