/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "flow.h"

/* Makes of a packet what routing and NAT would have made of it. */

/* Brings a transport checksum from one address to another, which it covers by
 * its pseudo header. */
static __always_inline long replace_address(struct __sk_buff *skb, __u32 check, __u64 flags,
					    __be32 from, __be32 to)
{
	if (from == to)
		return 0;
	return bpf_l4_csum_replace(skb, check, from, to, BPF_F_PSEUDO_HDR | flags | sizeof(to));
}

static __always_inline long replace_port(struct __sk_buff *skb, __u32 check, __u64 flags,
					 __u32 offset, __be16 from, __be16 to)
{
	if (from == to)
		return 0;
	return bpf_l4_csum_replace(skb, check, from, to, flags | sizeof(to))
		       ?: bpf_skb_store_bytes(skb, offset, &to, sizeof(to), 0);
}

/* Writes a frame, which starts at offset, with one TTL less and as another flow.
 * The IP header is valid before and after, so its sum stays, and with it one that
 * a card took over the whole packet. */
static __always_inline long rewrite(struct __sk_buff *skb, __u32 offset, struct frame *frame,
				    const struct flow *flow, const struct flow *as)
{
	struct iphdr *ip = &frame->ip;
	__u32 transport = offset + FRAME_LEN;
	__u32 check =
		transport + (ip->protocol == IPPROTO_TCP ? TCP_CHECK_OFFSET : UDP_CHECK_OFFSET);
	__u64 flags = ip->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

	ip->ttl--;
	ip->saddr = as->saddr;
	ip->daddr = as->daddr;
	ip->check = 0;
	ip->check = ip_checksum(ip);
	return bpf_skb_store_bytes(skb, offset, &frame->eth, FRAME_LEN, 0) ?:
	       replace_address(skb, check, flags, flow->saddr, as->saddr) ?:
	       replace_address(skb, check, flags, flow->daddr, as->daddr) ?:
	       replace_port(skb, check, flags, transport, flow->sport, as->sport) ?:
	       replace_port(skb, check, flags, transport + 2, flow->dport, as->dport);
}
