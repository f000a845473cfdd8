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
