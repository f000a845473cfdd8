/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "stamp.h"

/* Keeping order among the packets of a flow to a pod when some of them go through
 * the host's stack and others past it.
 *
 * A packet for the stack waits twice in the backlog of its CPU: for the overlay
 * device, into which we redirect it, and for the pod's veth. One that goes past
 * the stack waits nowhere. So each that takes the stack draws a number from its
 * flow's witness, and as long as there is one, all that could go past draw one too
 * and wait in the same backlog, which is first in, first out: as often as the
 * packet for the stack does, each time for the overlay device. What has waited is
 * handed over, whatever the witness says meanwhile. When the last number comes out
 * the line is over.
 *
 * A flow whose packets come faster than the backlog is emptied stays in line,
 * past the stack all the same, until a pause.
 *
 * What the VXLAN driver has stripped comes in lists, of which the programs see all
 * packets before the stack gets any (__netif_receive_skb_list_core): it waits twice
 * as well, to be behind those of its own list. */

#define LAPS_SHIFT 16

/* Draws the next number. Two CPUs may draw the same: between CPUs there is no
 * order. */
static __always_inline __u16 draw_number(struct witness *w)
{
	__u16 turn = w->turn + 1;

	if (!turn)
		turn = 1;
	w->turn = turn;
	return turn;
}

/* A packet's place in line: its number, and how often it waits after this time. */
static __always_inline __u32 place_in_line(__u16 turn, __u16 laps)
{
	return (__u32)laps << LAPS_SHIFT | turn;
}

static __always_inline bool waits_again(__u32 place)
{
	return place >> LAPS_SHIFT;
}

/* Waits in front of the overlay device. */
static __always_inline int wait_in_line(struct __sk_buff *skb, const struct in_force *rt,
					__u32 overlay, __u32 place)
{
	stamp_stripped(skb, rt, place);
	return bpf_redirect(overlay, BPF_F_INGRESS);
}

static __always_inline void come_out(struct witness *w, __u32 place)
{
	if (w->turn == (__u16)place)
		w->turn = 0;
}
