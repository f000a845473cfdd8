/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "config.h"
#include "conntrack.h"
#include "gate.h"
#include "stamp.h"

/* Behind the host's netfilter and routing: writing down that a flow got there. */

static __always_inline struct pulse *pulse_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&heartbeat, &zero);
}

/* Whether express is switched off, held back or not possible on this node. */
static __always_inline bool express_off(const struct in_force *rt, const struct pulse *pulse)
{
	return !express || !pulse || !pulse->beat || pulse->held || rt->off & OFF_EXPRESS;
}

/* Writes down where a packet came out, with all that became of it on the way;
 * as is the flow after NAT. */
static __always_inline void write_witness(const struct flow *before, const struct witness *now)
{
	struct witness *w = bpf_map_lookup_elem(&witnesses, before);

	if (!w) {
		bpf_map_update_elem(&witnesses, before, now, BPF_ANY);
		return;
	}
	w->as = now->as;
	w->device = now->device;
	w->mark = now->mark;
	w->priority = now->priority;
	w->hash = now->hash;
	w->status = now->status;
	w->epoch = now->epoch;
	w->seen = now->seen;
}

/* Without NAT a flow's witness is found without asking conntrack; a fresh one
 * need not be written again. */
static __always_inline bool witnessed_lately(const struct witness *now)
{
	struct witness *w = bpf_map_lookup_elem(&witnesses, &now->as);

	return w && same_flow(&w->as, &now->as) && w->device == now->device &&
	       w->epoch == now->epoch && w->mark == now->mark && w->priority == now->priority &&
	       w->hash == now->hash && since(w->seen, now->seen) < WITNESS_LIFE / 16;
}

static __always_inline __u32 newcomer_hash(const struct flow *flow)
{
	return (flow->saddr ^ flow->daddr * 0x85ebca6b ^ ((__u32)flow->sport << 16 | flow->dport) ^
		flow->protocol) *
	       0x9e3779b1;
}

/* Where the first packets of a flow are counted. */
static __always_inline struct newcomer *find_newcomer(const struct flow *flow)
{
	__u32 key = newcomer_hash(flow) >> 16 & (NEWCOMERS - 1);

	return bpf_map_lookup_elem(&newcomers, &key);
}

/* Whether the flow has to show some packets yet, before it is worth asking
 * conntrack about it. */
static __always_inline bool is_newcomer(struct newcomer *n, const struct flow *flow)
{
	__u32 hash = newcomer_hash(flow);

	if (n->hash != hash) {
		n->hash = hash;
		n->packets = 0;
	}
	if (n->packets >= NEWCOMER_PACKETS)
		return false;
	n->packets++;
	return true;
}

/* A reset that conntrack can't verify, since it does not see all of the flow,
 * leaves the entry established, to go in seconds (nf_conntrack_tcp_packet). Who
 * knows no sequence numbers could so take an idle flow its NAT: it gets minutes. */
static __always_inline void survive_reset(struct __sk_buff *skb, const struct in_force *rt,
					  const struct iphdr *ip)
{
	__u32 transport = ETH_HLEN + ip->ihl * 4;
	struct flow answers = {
		.saddr = ip->daddr,
		.daddr = ip->saddr,
		.protocol = IPPROTO_TCP,
	};
	__u8 flags, dir;
	struct nf_conn *ct;

	/* Whatever else there is about it: conntrack has seen it. */
	if (ip->protocol != IPPROTO_TCP || ip->frag_off & bpf_htons(IP_OFFSET))
		return;
	/* A fragment that ends before the flags may be one. */
	if (bpf_skb_load_bytes(skb, transport + 13, &flags, sizeof(flags)))
		flags = ip->frag_off & bpf_htons(IP_MF) ? TCP_RST : 0;
	if (!(flags & TCP_RST))
		return;
	if (bpf_skb_load_bytes(skb, transport, &answers.dport, sizeof(__be16)) ||
	    bpf_skb_load_bytes(skb, transport + 2, &answers.sport, sizeof(__be16)) ||
	    !(ct = find_tracked(skb, &answers, &dir)))
		return;
	if (!judge_tracked(ct, IPPROTO_TCP, dir))
		set_timeout(ct, &rt->tcp_unacknowledged);
	bpf_ct_release(ct);
}

/* Rules may look at each question that is asked of a name server: kube-network-policies
 * has them all queued, not the first of a flow alone (netfilter bug 1766). The agent
 * takes it that these flows meet every rule (dataplane/verdicts). */
static __always_inline bool asks_for_names(const struct flow *flow)
{
	return flow->protocol == IPPROTO_UDP && flow->dport == bpf_htons(DNS_PORT);
}

/* Sees that a packet has come through. Its header must be as it was when it came
 * to this host, but for the TTL and what NAT has made of it. */
static __always_inline enum reason witness_flow(struct __sk_buff *skb, const struct in_force *rt,
						const struct frame *frame, struct witness *now)
{
	struct pulse *pulse = pulse_now();
	struct segment segment = {};
	__u16 index = skb->tc_index;
	enum reason reason;
	__u8 dir;

	if (!index || express_off(rt, pulse))
		return REASON_NONE;
	survive_reset(skb, rt, &frame->ip);
	if (read_segment(skb, ETH_HLEN, &frame->ip, &segment))
		return REASON_NONE;
	if (index != untouched_index(frame->ip.tos, frame->ip.ttl + 1))
		return REASON_FLOW_MANGLED;

	now->as = segment.flow;
	now->epoch = pulse->epoch;
	now->seen = bpf_ktime_get_coarse_ns();

	struct newcomer *newcomer = find_newcomer(&now->as);

	if (!newcomer || is_newcomer(newcomer, &now->as) || witnessed_lately(now))
		return REASON_NONE;

	struct flow answers = inverse(&segment.flow), before = { .protocol = answers.protocol };
	struct nf_conn *ct = find_tracked(skb, &answers, &dir);

	if (!ct)
		return REASON_NONE;
	if (!(reason = judge_tracked(ct, answers.protocol, !dir))) {
		keep_alive(ct, rt, &segment);
		now->status = visible_status(ct);
		other_side(ct, dir, &before);
	}
	bpf_ct_release(ct);
	if (reason || asks_for_names(&before) || asks_for_names(&now->as))
		newcomer->packets = 0; /* it is not asked for each packet */
	else
		write_witness(&before, now);
	return REASON_NONE;
}
