/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "lookup.h"
#include "parse.h"

/* The counters are per CPU and a plain ++ is enough: programs of one hook
 * don't preempt each other on a CPU, and where ingress and egress of one CPU
 * meet they count in different fields. */

enum direction { TX, RX };

/* What an skb is on the wire. */
struct load {
	__u64 packets;
	__u64 bytes;
};

/* The load of an aggregate whose packets have headers of so many bytes each: as
 * many packets as the wire will see, each with a copy of the headers. */
static __always_inline struct load split(struct __sk_buff *skb, struct load load, __u32 headers)
{
	/* A packet socket may call anything an aggregate. */
	if (load.bytes <= headers)
		return load;

	/* Packets from a guest or a packet socket come without the number. */
	load.packets = skb->gso_segs;
	if (!load.packets)
		load.packets = (load.bytes - headers + skb->gso_size - 1) / skb->gso_size;
	load.bytes += (load.packets - 1) * headers;
	return load;
}

/* The length of an aggregate's transport header at an offset, -1 when it is cut. */
static __always_inline __s32 transport_len(struct __sk_buff *skb, __u32 offset, __u8 protocol)
{
	__u8 doff;

	if (protocol != IPPROTO_TCP)
		return sizeof(struct udphdr);
	if (bpf_skb_load_bytes(skb, offset + 12, &doff, 1))
		return -1;
	return (doff >> 4) * 4;
}

/* Measures an inner IPv4 packet that starts at offset, with its header. */
static __always_inline struct load measure(struct __sk_buff *skb, __u32 offset,
					   const struct iphdr *ip)
{
	struct load load = { .packets = 1, .bytes = skb->len - offset };

	if (!skb->gso_size)
		return load;

	__s32 transport = transport_len(skb, offset + ip->ihl * 4, ip->protocol);

	if (transport < 0 || ip->frag_off & bpf_htons(IP_OFFSET))
		return load;
	return split(skb, load, ip->ihl * 4 + transport);
}

static __always_inline void add_load(struct path_counters *counters, enum direction direction,
				     struct load load)
{
	if (direction == TX) {
		counters->tx_packets += load.packets;
		counters->tx_bytes += load.bytes;
	} else {
		counters->rx_packets += load.packets;
		counters->rx_bytes += load.bytes;
	}
}

static __always_inline void count_peer(__u32 slot, enum packet_path path, enum direction direction,
				       struct load load)
{
	struct counters *counters = bpf_map_lookup_elem(&peer_counters, &slot);

	if (counters)
		add_load(&counters->path[path], direction, load);
}

/* The same for an IPv6 peer, which has the kernel path only. */
static __always_inline void count_peer6(__u32 slot, enum direction direction, struct load load)
{
	struct path_counters *counters = bpf_map_lookup_elem(&peer6_counters, &slot);

	if (counters)
		add_load(counters, direction, load);
}

static __always_inline int pass(enum reason reason)
{
	__u32 key = reason;
	struct reason_counters *counters = bpf_map_lookup_elem(&reasons, &key);

	if (counters)
		counters->passed++;
	return PASS;
}

static __always_inline int drop(enum reason reason)
{
	__u32 key = reason;
	struct reason_counters *counters = bpf_map_lookup_elem(&reasons, &key);

	if (counters)
		counters->dropped++;
	return DROP;
}
