/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "maps.h"

static __always_inline struct in_force *runtime_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&runtime, &zero);
}

/* The peer whose pod prefix holds addr: the longest match, as a route would
 * have it. */
static __always_inline struct peer *find_peer(const struct in_force *rt, __be32 addr)
{
	for (int i = 0; i < PREFIX_LENGTHS; i++) {
		if (i >= rt->prefix_lengths)
			break;

		__u32 bits = rt->prefix_bits[i] & 63;
		struct prefix key = {
			.bits = bits,
			.addr = addr & bpf_htonl((__u32)(0xffffffffULL << (32 - bits))),
		};
		struct peer *peer = bpf_map_lookup_elem(&peers, &key);

		if (peer)
			return peer;
	}
	return NULL;
}

/* The first bits of a word; all of it or nothing where bits goes beyond. */
static __always_inline __be32 first_bits(__be32 word, __s32 bits)
{
	if (bits <= 0)
		return 0;
	return bits >= 32 ? word : word & bpf_htonl(0xffffffff << (32 - bits));
}

/* find_peer for IPv6. */
static __always_inline struct peer6 *find_peer6(const struct in_force *rt,
						const struct address6 *addr)
{
	for (int i = 0; i < PREFIX_LENGTHS; i++) {
		if (i >= rt->prefix6_lengths)
			break;

		struct prefix6 key = { .bits = rt->prefix6_bits[i] };

		for (int word = 0; word < 4; word++)
			key.addr.words[word] = first_bits(addr->words[word], key.bits - 32 * word);

		struct peer6 *peer = bpf_map_lookup_elem(&peers6, &key);

		if (peer)
			return peer;
	}
	return NULL;
}

static __always_inline struct node6 *find_node6(const struct address6 *addr)
{
	return bpf_map_lookup_elem(&nodes6, addr);
}

static __always_inline struct node *find_node(__be32 addr)
{
	return bpf_map_lookup_elem(&nodes, &addr);
}

static __always_inline struct peer_state *find_state(__u32 slot)
{
	return bpf_map_lookup_elem(&peer_states, &slot);
}

/* The interface index of a redirect target, 0 when the device is gone. */
static __always_inline __u32 find_device(__u32 device)
{
	__u32 *index = bpf_map_lookup_elem(&devices, &device);

	return index ? *index : 0;
}
