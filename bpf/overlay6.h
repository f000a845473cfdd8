/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"

/* tc ingress and egress of the IPv6 overlay device: IPv6 rides the kernel path,
 * and is counted on it. Nothing is changed or stopped here, and nothing checked:
 * a sender counts as the peer whose address it bears. */

struct ip6hdr {
	__be32 flow; /* version, traffic class, flow label */
	__be16 payload_len;
	__u8 next_header;
	__u8 hop_limit;
	struct address6 saddr, daddr;
};

_Static_assert(sizeof(struct ip6hdr) == 40, "RFC 8200");

struct frame6 {
	__u16 pad;
	struct ethhdr eth;
	struct ip6hdr ip;
};

#define FRAME6_LEN (sizeof(struct frame6) - sizeof(__u16))

/* The hop-by-hop header by which the kernel tells the length of an aggregate of
 * more than 64 KB (BIG TCP): a jumbo payload option alone. It never gets to the
 * wire. */
#define JUMBO_LEN 8

/* An extension header that each segment of an aggregate has a copy of. */
struct extension {
	__u8 next_header;
	__u8 len; /* in units of 8 bytes, behind the first 8 */
};

/* Reads a frame with an IPv6 packet of no VLAN. */
static __always_inline bool read_frame6(struct __sk_buff *skb, struct frame6 *f)
{
	if (skb->protocol != bpf_htons(ETH_P_IPV6) || skb->vlan_present)
		return false;
	if (bpf_skb_load_bytes(skb, 0, &f->eth, FRAME6_LEN))
		return false;
	if (bpf_ntohl(f->ip.flow) >> 28 != 6)
		return false;
	/* The length field of an aggregate may be anything (BIG TCP has 0). */
	return skb->gso_size || bpf_ntohs(f->ip.payload_len) <= skb->len - FRAME6_LEN;
}

/* Measures the packet of a frame, as measure() does for IPv4. Only an aggregate's
 * extension headers need to be looked through, and only those that the kernel
 * splits and merges: hop-by-hop options, routing, destination options. */
static __always_inline struct load measure6(struct __sk_buff *skb, const struct frame6 *f)
{
	struct load load = { .packets = 1, .bytes = skb->len - ETH_HLEN };
	struct extension extension;
	__u32 ip_len = sizeof(struct ip6hdr);
	__u8 next = f->ip.next_header;

	if (!skb->gso_size)
		return load;
	for (int i = 0; i < EXTENSION_HEADERS; i++) {
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS)
			break;
		if (bpf_skb_load_bytes(skb, ETH_HLEN + ip_len, &extension, sizeof(extension)))
			return load;
		next = extension.next_header;
		ip_len += (extension.len + 1) * 8;
	}

	__s32 transport = transport_len(skb, ETH_HLEN + ip_len, next);

	if (transport < 0 || next == IPPROTO_FRAGMENT)
		return load;
	load = split(skb, load, ip_len + transport);
	if (f->ip.next_header == IPPROTO_HOPOPTS && !f->ip.payload_len)
		load.bytes -= load.packets * JUMBO_LEN;
	return load;
}

/* The slot of the peer that an inner source belongs to. */
static __always_inline __u32 source_slot6(const struct in_force *rt, const struct address6 *source)
{
	struct peer6 *peer = find_peer6(rt, source);

	if (peer)
		return peer->slot;

	struct node6 *node = find_node6(source);

	return node ? node->slot : NO_SLOT;
}

SEC("tc")
int overlay6_in(struct __sk_buff *skb)
{
	struct in_force *rt = runtime_now();
	struct frame6 frame;

	if (!rt || !read_frame6(skb, &frame))
		return PASS;

	__u32 slot = source_slot6(rt, &frame.ip.saddr);

	if (slot != NO_SLOT)
		count_peer6(slot, RX, measure6(skb, &frame));
	return PASS;
}

SEC("tc")
int overlay6_out(struct __sk_buff *skb)
{
	struct in_force *rt = runtime_now();
	struct frame6 frame;

	if (!rt || !read_frame6(skb, &frame))
		return PASS;

	struct peer6 *peer = find_peer6(rt, &frame.ip.daddr);

	if (peer && peer->slot != NO_SLOT)
		count_peer6(peer->slot, TX, measure6(skb, &frame));
	return PASS;
}
