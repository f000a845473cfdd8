/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "gate.h"

/* How uplink_xdp tells uplink_in what it has done to a packet: by a note in the
 * packet's metadata, in front of its first byte, which the driver hands on with
 * the skb. Nothing from outside can write there, and a program of somebody else's
 * does not know the token.
 *
 * Whether notes arrive depends on the driver, and on uplink_in being where it
 * should be. So they are put on packets that are left as they are, first, and a
 * packet is stripped only while uplink_in was lately seen to read them.
 *
 * GRO merges packets whose notes are the same. */
struct note {
	__u64 token;    /* struct in_force's */
	__u32 slot;     /* of the peer that a stripped packet is from */
	__u32 stripped; /* 0: the packet is as it came */
};

/* Whether uplink_in gets the notes. */
static __always_inline bool notes_arrive(__u64 now)
{
	__u32 zero = 0;
	__u64 *read = bpf_map_lookup_elem(&notes_read, &zero);

	return read && *read && since(*read, now) < PROOF_LIFE;
}

/* A card that sums up whole packets has summed up what was stripped, too, and we
 * can't take it out again: its packets are not to be stripped. */
static __always_inline bool summed_up(struct __sk_buff *skb)
{
	return bpf_csum_update(skb, 0) >= 0;
}

/* Reads the note on a packet, if there is one. */
static __always_inline bool read_note(struct __sk_buff *skb, const struct in_force *rt,
				      struct note *note)
{
	const struct note *have = (void *)(long)skb->data_meta;
	__u64 now = bpf_ktime_get_coarse_ns(), *read;
	__u32 zero = 0;

	if ((void *)(have + 1) > (void *)(long)skb->data || have->token != rt->token)
		return false;
	*note = *have;
	read = bpf_map_lookup_elem(&notes_read, &zero);
	if (read && *read != now && !summed_up(skb))
		*read = now;
	return true;
}
