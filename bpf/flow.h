/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "parse.h"
#include "structs.h"

/* A packet as part of a flow. */
struct segment {
	struct flow flow;
	__u32 headers; /* bytes of IP and transport headers */
	__be16 check;  /* the transport's checksum */
	bool data;     /* TCP: more than headers */
};

/* Takes from an IPv4 packet, which starts at offset, what express needs to know,
 * and refuses what it does not carry. t is NULL where there is no transport
 * header. */
static __always_inline enum reason parse_segment(struct __sk_buff *skb, __u32 offset,
						 const struct iphdr *ip, const struct transport *t,
						 struct segment *s)
{
	__u32 total = bpf_ntohs(ip->tot_len);

	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return REASON_FLOW_PROTOCOL;
	if (ip->ihl != 5)
		return REASON_FLOW_OPTIONS;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return REASON_FLOW_FRAGMENT;
	if (ip->ttl <= 1)
		return REASON_FLOW_TTL;
	if (!ip_checksum_right(ip) || total + offset != skb->len || !t)
		return REASON_FLOW_MALFORMED;

	s->flow = (struct flow){
		.saddr = ip->saddr,
		.daddr = ip->daddr,
		.sport = t->sport,
		.dport = t->dport,
		.protocol = ip->protocol,
	};
	if (ip->protocol == IPPROTO_UDP) {
		if (skb->gso_size)
			return REASON_AGGREGATE;
		if (bpf_ntohs(t->udp.len) + sizeof(*ip) != total)
			return REASON_FLOW_MALFORMED;
		s->headers = sizeof(*ip) + sizeof(struct udphdr);
		s->check = t->udp.check;
		return REASON_NONE;
	}
	s->headers = sizeof(*ip) + (t->tcp.doff >> 4) * 4;
	s->check = t->tcp.check;
	s->data = total > s->headers;
	if (s->headers < sizeof(*ip) + TCP_HEADER_LEN || s->headers > total)
		return REASON_FLOW_MALFORMED;
	/* Without ACK it is invalid, and conntrack's to refuse. */
	return (t->tcp.flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK)) != TCP_ACK
		       ? REASON_FLOW_CONTROL
		       : REASON_NONE;
}

/* The same for a packet whose transport header has not been read. */
static __always_inline enum reason read_segment(struct __sk_buff *skb, __u32 offset,
						const struct iphdr *ip, struct segment *s)
{
	struct transport t;

	return parse_segment(skb, offset, ip, read_transport(skb, offset, ip, &t) ? &t : NULL, s);
}

/* The flow of the answers. */
static __always_inline struct flow inverse(const struct flow *flow)
{
	return (struct flow){
		.saddr = flow->daddr,
		.daddr = flow->saddr,
		.sport = flow->dport,
		.dport = flow->sport,
		.protocol = flow->protocol,
	};
}

static __always_inline bool same_flow(const struct flow *a, const struct flow *b)
{
	return a->saddr == b->saddr && a->daddr == b->daddr && a->sport == b->sport &&
	       a->dport == b->dport;
}
