/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "uplink_in.h"

/* XDP on the uplink, in its driver: VXLAN packets before there is an skb. Those
 * that must not come in are dropped; those that uplink_in will hand on whatever
 * happens lose their outer headers, so that GRO merges them like packets without a
 * tunnel. All else is left as it is, for uplink_in to judge. */

#define INNER_IP (OUTER_LEN + ETH_HLEN)
#define INNER_TRANSPORT (INNER_IP + sizeof(struct iphdr))

/* Packets without IP options, which are the only ones that are stripped. */
struct arrival_headers {
	__u8 outer[OUTER_LEN];
	__u8 inner[FRAME_LEN];
};

_Static_assert(sizeof(struct arrival_headers) == INNER_TRANSPORT, "outer headers, inner frame");

static __always_inline void count_at_driver(enum reason reason, bool dropped)
{
	__u32 key = reason;
	struct reason_counters *counters = bpf_map_lookup_elem(&driver_reasons, &key);

	if (!counters)
		return;
	if (dropped)
		counters->dropped++;
	else
		counters->passed++;
}

/* Why it is passed on is uplink_in's to count. */
static __always_inline int leave_be(enum reason reason)
{
	count_at_driver(reason, false);
	return XDP_PASS;
}

static __always_inline int refuse(enum reason reason)
{
	count_at_driver(reason, true);
	drop(reason);
	return XDP_DROP;
}

/* NOT_VXLAN where the headers are not all there, too. */
static __always_inline enum reason look_outer(struct xdp_md *ctx, const struct in_force *rt,
					      struct arrival *a)
{
	struct arrival_headers *headers = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	struct outer *outer = &a->outer;

	if ((void *)(headers + 1) > end)
		return NOT_VXLAN;
	__builtin_memcpy(&outer->eth, headers->outer, OUTER_LEN);
	if (outer->eth.h_proto != bpf_htons(ETH_P_IP) || outer->ip.protocol != IPPROTO_UDP ||
	    outer->ip.version != 4 || outer->ip.ihl != 5 || outer->udp.dest != bpf_htons(port))
		return NOT_VXLAN;
	__builtin_memcpy(&a->inner.eth, headers->inner, FRAME_LEN);
	if (!same_mac(outer->eth.h_dest, rt->uplink_mac))
		return REASON_OUTER_NOT_FOR_HOST;
	return judge_outer(rt, outer, ctx->data_end - ctx->data, false);
}

static __always_inline enum reason look_inner(struct xdp_md *ctx, const struct in_force *rt,
					      const struct arrival *a)
{
	enum reason reason = judge_frame(&a->inner);

	if (reason)
		return reason;
	if (bpf_ntohs(a->inner.ip.tot_len) > ctx->data_end - ctx->data - INNER_IP)
		return REASON_INNER_MALFORMED;
	return judge_macs(rt, &a->inner);
}

/* Adds the bytes of a block to a sum, if the packet has so many more. */
#define SUM_BLOCK(size)                                               \
	do {                                                          \
		if (at + (size) > end)                                \
			return REASON_FLOW_MALFORMED;                 \
		sum = (__u32)bpf_csum_diff(NULL, 0, at, (size), sum); \
		at += (size);                                         \
	} while (0)

/* Blocks of 512 bytes, the most that the kernel sums at once, in the packets that
 * a driver has in one piece. */
#define SUM_BLOCKS 8

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The sum of the pseudo header of what an IP header (without options) carries. */
static __always_inline __u64 pseudo_sum(const struct iphdr *ip)
{
	return (__u64)ip->saddr + ip->daddr + bpf_htons(ip->protocol) +
	       bpf_htons(bpf_ntohs(ip->tot_len) - sizeof(*ip));
}

/* What a right checksum makes of the sum of what the inner IP header is followed
 * by, inverted. */
static __always_inline __u64 inner_rest(const struct iphdr *ip)
{
	return ip->protocol == IPPROTO_ICMP ? 0 : pseudo_sum(ip);
}

/* Whether the inner checksum is right. What the inner IP header is followed by is
 * all of the rest. */
static __always_inline enum reason verify(struct xdp_md *ctx, const struct iphdr *ip)
{
	void *at = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 left = end - at - INNER_TRANSPORT;
	__u64 sum = 0;

	at += INNER_TRANSPORT;
	for (int i = 0; i < SUM_BLOCKS && left >= 512; i++, left -= 512)
		SUM_BLOCK(512);
	if (left >= 512)
		return REASON_FLOW_MALFORMED;
	if (left & 256)
		SUM_BLOCK(256);
	if (left & 128)
		SUM_BLOCK(128);
	if (left & 64)
		SUM_BLOCK(64);
	if (left & 32)
		SUM_BLOCK(32);
	if (left & 16)
		SUM_BLOCK(16);
	if (left & 8)
		SUM_BLOCK(8);
	if (left & 4)
		SUM_BLOCK(4);
	if (left & 2) {
		if (at + 2 > end)
			return REASON_FLOW_MALFORMED;
		sum += *(__u16 *)at;
		at += 2;
	}
	if (left & 1) {
		if (at + 1 > end)
			return REASON_FLOW_MALFORMED;
		sum += *(__u8 *)at;
	}
	return fold(sum + inner_rest(ip)) == 0xffff ? REASON_NONE : REASON_FLOW_MALFORMED;
}

/* Whether the outer checksum is right, or there is none, of a packet whose inner
 * one is: so all behind the headers is known to sum up to what that makes of it
 * (as lco_csum() has it). One that a virtual device has left open is not. */
static __always_inline bool outer_checksum_right(const struct arrival *a)
{
	const struct outer *outer = &a->outer;
	const __u32 *udp = (const void *)&outer->udp;
	const __u16 *eth = (const void *)&a->inner.eth;
	__u64 sum = pseudo_sum(&outer->ip);

	if (!outer->udp.check)
		return true;
	sum += (__u64)udp[0] + udp[1] + outer->vxlan.flags + outer->vxlan.vni;
	for (int i = 0; i < 7; i++)
		sum += eth[i];
	/* The inner IP header sums up to nothing. */
	sum += (__u16)~fold(inner_rest(&a->inner.ip));
	return fold(sum) == 0xffff;
}

/* What a card says of a packet's checksums is of the packet as it came: taken for
 * the stripped one, it would vouch for an inner checksum that nobody has looked
 * at. So that is done here. A packet whose checksum can't be told is left alone. */
static __always_inline enum reason whole(struct xdp_md *ctx, const struct arrival *a)
{
	struct arrival_headers *headers = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	const struct iphdr *ip = &a->inner.ip;
	__u32 have = ctx->data_end - ctx->data - INNER_IP;
	enum reason reason;

	if (ip->ihl != 5)
		return REASON_FLOW_OPTIONS;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return REASON_FLOW_FRAGMENT;
	if (!ip_checksum_right(ip) || bpf_ntohs(ip->tot_len) != have)
		return REASON_FLOW_MALFORMED;
	if (ip->protocol == IPPROTO_UDP) {
		struct udphdr *udp = (void *)(headers + 1);

		if ((void *)(udp + 1) > end || bpf_ntohs(udp->len) + sizeof(*ip) != have)
			return REASON_FLOW_MALFORMED;
		if (!udp->check)
			return a->outer.udp.check ? REASON_INNER_UNPROTECTED : REASON_NONE;
	} else if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_ICMP) {
		return REASON_FLOW_PROTOCOL;
	}
	if ((reason = verify(ctx, ip)))
		return reason;
	return outer_checksum_right(a) ? REASON_NONE : REASON_OUTER_CHECKSUM;
}

/* Where one packet of a flow was left as it is, those behind it are too, for a
 * while: they would overtake it. */
static __always_inline bool flow_left(const __u64 *left, __u64 now)
{
	return *left && since(*left, now) < AGGREGATE_LIFE;
}

/* Is it a packet that uplink_in would hand on, by the base path if not by express?
 * The conditions are those of its may_enter, but for trains of segments: GRO merges
 * them behind us. */
static __always_inline enum reason may_strip(struct xdp_md *ctx, const struct arrival *a,
					     __u32 flow, __u64 now)
{
	enum reason reason;

	if (congested(a))
		return REASON_ECN_CONGESTED;
	if (!find_device(DEVICE_OVERLAY))
		return REASON_DEVICE_MISSING;
	if (!notes_arrive(now))
		return REASON_NOTE_UNHEARD;
	if ((reason = whole(ctx, a))) /* it looks at every byte, so late */
		return reason;
	if ((reason = host_proven(a->state->rx_proven, &a->state->rx_renewal, now)))
		keep_order(&rx_aggregates, flow, now); /* so uplink_in leaves it to the host */
	return reason;
}

/* may_strip for a packet whose peer may be accelerated at all. */
static __always_inline enum reason may_strip_next(struct xdp_md *ctx, const struct in_force *rt,
						  struct arrival *a)
{
	__u32 flow = bpf_ntohs(a->outer.udp.source) ^ bpf_ntohl(a->outer.ip.saddr);
	__u32 key = flow & (AGGREGATE_FLOWS - 1);
	__u64 now = bpf_ktime_get_coarse_ns(), *left;
	enum reason reason;

	if (!a->state)
		return a->known ? REASON_PEER_NO_ROOM : REASON_SOURCE_UNKNOWN_PEER;
	if ((reason = switched_on(rt, a->state, OFF_BASE)))
		return reason;
	if (!(left = bpf_map_lookup_elem(&left_flows, &key)) || flow_left(left, now))
		return REASON_AGGREGATE_RECENT;
	if ((reason = may_strip(ctx, a, flow, now)))
		*left = now;
	return reason;
}

/* Puts a note before a packet, of which headers many bytes are taken off. False
 * when the driver has no room for notes; then nothing is changed. */
static __always_inline bool put_note(struct xdp_md *ctx, const struct in_force *rt, __u32 slot,
				     int headers)
{
	struct note *note;

	if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(*note)))
		return false;
	if (headers && bpf_xdp_adjust_head(ctx, headers)) {
		bpf_xdp_adjust_meta(ctx, sizeof(*note));
		return false;
	}
	note = (void *)(long)ctx->data_meta;
	if ((void *)(note + 1) > (void *)(long)ctx->data)
		return false; /* can't be; for the verifier */
	note->token = rt->token;
	note->slot = slot;
	note->stripped = !!headers;
	return true;
}

/* carry_congestion for a packet that is no skb yet (RFC 1624). */
static __always_inline void mark_congestion(struct xdp_md *ctx, const struct arrival *a)
{
	__u8 tos = decap_ecn(a->inner.ip.tos, a->outer.ip.tos);
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct iphdr *ip = (void *)(eth + 1);

	if (tos == a->inner.ip.tos || (void *)(ip + 1) > (void *)(long)ctx->data_end)
		return;
	ip->tos = tos;
	ip->check = 0;
	ip->check = ip_checksum(ip);
}

/* Everything is decided. */
static __always_inline int strip_at_driver(struct xdp_md *ctx, const struct in_force *rt,
					   const struct arrival *a)
{
	if (!put_note(ctx, rt, a->slot, ENCAP_LEN))
		return leave_be(REASON_STRIP_REFUSED);
	mark_congestion(ctx, a);
	count_at_driver(REASON_NONE, false);
	return XDP_PASS;
}

/* In enforce overlay_in drops what uplink_in can't tell the source of: here that
 * is known already. */
static __always_inline int arrive(struct xdp_md *ctx, const struct in_force *rt, struct arrival *a)
{
	bool enforce = rt->source_check == SOURCE_CHECK_ENFORCE;
	enum reason reason;

	if ((reason = look_outer(ctx, rt, a)))
		return reason == NOT_VXLAN ? XDP_PASS : leave_be(reason);
	if ((reason = look_inner(ctx, rt, a)))
		return enforce ? refuse(reason) : leave_be(reason);
	if ((reason = check_source(rt, a)) && rt->source_check != SOURCE_CHECK_OFF) {
		if (!enforce)
			return leave_be(reason);
		note_suspect(a, reason);
		return refuse(reason);
	}
	reason = may_strip_next(ctx, rt, a);
	if (reason == REASON_NOTE_UNHEARD)
		put_note(ctx, rt, 0, 0);
	return reason ? leave_be(reason) : strip_at_driver(ctx, rt, a);
}

SEC("xdp")
int uplink_xdp(struct xdp_md *ctx)
{
	struct in_force *rt = runtime_now();
	struct arrival a = {};

	return rt ? arrive(ctx, rt, &a) : XDP_PASS;
}
