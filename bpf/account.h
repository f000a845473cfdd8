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

/* Measures an inner IPv4 packet that starts at offset, with its header. An
 * aggregate is as many packets as the wire will see, each with a copy of the
 * headers. */
static __always_inline struct load measure(struct __sk_buff *skb, __u32 offset,
					   const struct iphdr *ip)
{
	struct load load = { .packets = 1, .bytes = skb->len - offset };

	if (!skb->gso_size)
		return load;

	__u32 headers = ip->ihl * 4 + sizeof(struct udphdr);

	if (ip->protocol == IPPROTO_TCP) {
		__u8 doff;

		if (bpf_skb_load_bytes(skb, offset + ip->ihl * 4 + 12, &doff, 1))
			return load;
		headers = ip->ihl * 4 + (doff >> 4) * 4;
	}
	/* A packet socket may call anything an aggregate. */
	if (ip->frag_off & bpf_htons(IP_OFFSET) || load.bytes <= headers)
		return load;

	/* Packets from a guest or a packet socket come without the number. */
	load.packets = skb->gso_segs;
	if (!load.packets)
		load.packets = (load.bytes - headers + skb->gso_size - 1) / skb->gso_size;
	load.bytes += (load.packets - 1) * headers;
	return load;
}

static __always_inline void count_peer(__u32 slot, enum packet_path path, enum direction direction,
				       struct load load)
{
	struct counters *counters = bpf_map_lookup_elem(&peer_counters, &slot);

	if (!counters)
		return;
	if (direction == TX) {
		counters->path[path].tx_packets += load.packets;
		counters->path[path].tx_bytes += load.bytes;
	} else {
		counters->path[path].rx_packets += load.packets;
		counters->path[path].rx_bytes += load.bytes;
	}
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
