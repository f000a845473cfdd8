/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "constants.h"
#include "reasons.h"

/* Headers are copied to the stack by bpf_skb_load_bytes(): it reads what lies
 * in page fragments as well, and never changes the packet (a partial
 * bpf_skb_pull_data() of a fragment list panics kernels before 6.16). The two
 * bytes in front align what follows the Ethernet header. */

struct frame {
	__u16 pad;
	struct ethhdr eth;
	struct iphdr ip;
};

struct vxlanhdr {
	__be32 flags;
	__be32 vni; /* 24 bits and a reserved byte */
};

struct outer {
	__u16 pad;
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
	struct vxlanhdr vxlan;
};

#define OUTER_LEN (sizeof(struct outer) - sizeof(__u16))
#define FRAME_LEN (sizeof(struct frame) - sizeof(__u16))

_Static_assert(OUTER_LEN == ETH_HLEN + ENCAP_LEN - ETH_HLEN, "outer headers and VXLAN");

/* Whether a frame holds an IPv4 packet, with a header that may be true. */
static __always_inline enum reason judge_frame(const struct frame *f)
{
	if (f->eth.h_proto != bpf_htons(ETH_P_IP))
		return REASON_INNER_NOT_IPV4;

	__u32 header = f->ip.ihl * 4, total = bpf_ntohs(f->ip.tot_len);

	if (f->ip.version != 4 || header < sizeof(struct iphdr) || total < header)
		return REASON_INNER_MALFORMED;
	return REASON_NONE;
}

/* Reads an Ethernet frame with an IPv4 packet at offset. */
static __always_inline enum reason parse_frame(struct __sk_buff *skb, __u32 offset, struct frame *f)
{
	enum reason reason;

	if (bpf_skb_load_bytes(skb, offset, &f->eth, FRAME_LEN))
		return REASON_INNER_MALFORMED;
	if ((reason = judge_frame(f)))
		return reason;

	__u32 have = skb->len - offset - ETH_HLEN;

	/* The length field of an aggregate may be anything (BIG TCP has 0). */
	if (!skb->gso_size && bpf_ntohs(f->ip.tot_len) > have)
		return REASON_INNER_MALFORMED;
	return REASON_NONE;
}

/* Whether the IP header (without options) has a right checksum: the sum of its
 * words, carries added, is all ones (RFC 1071). */
static __always_inline bool ip_checksum_right(const struct iphdr *ip)
{
	const __u32 *words = (const void *)ip;
	__u64 sum = (__u64)words[0] + words[1] + words[2] + words[3] + words[4];

	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum == 0xffff;
}

/* The checksum of an IP header (without options) whose checksum field is 0. */
static __always_inline __u16 ip_checksum(const struct iphdr *ip)
{
	const __u16 *words = (const void *)ip;
	__u32 sum = 0;

	for (int i = 0; i < 10; i++)
		sum += words[i];
	sum = (sum & 0xffff) + (sum >> 16);
	return ~(sum + (sum >> 16));
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	return *(__u16 *)a == *(__u16 *)b && *(__u16 *)(a + 2) == *(__u16 *)(b + 2) &&
	       *(__u16 *)(a + 4) == *(__u16 *)(b + 4);
}

/* The start of a TCP or UDP header. */
struct transport {
	__be16 sport, dport;
	union {
		struct {
			__be16 len, check;
		} udp;
		struct {
			__be32 seq, ack;
			__u8 doff, flags;
			__be16 window, check, urgent;
		} tcp;
	};
};

/* Reads it, of the IPv4 packet that starts at offset; false when it is neither
 * TCP nor UDP, a fragment or cut. */
static __always_inline bool read_transport(struct __sk_buff *skb, __u32 offset,
					   const struct iphdr *ip, struct transport *t)
{
	__u32 length = ip->protocol == IPPROTO_TCP ? TCP_HEADER_LEN : sizeof(struct udphdr);

	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return false;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return false;
	return !bpf_skb_load_bytes(skb, offset + ip->ihl * 4, t, length);
}
