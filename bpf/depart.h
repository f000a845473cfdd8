/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "build.h"
#include "config.h"
#include "gate.h"

/* Sending an inner packet to a peer: what both programs do that encapsulate. */

/* An inner packet on its way to a peer. */
struct departure {
	struct frame frame;
	struct peer *peer; /* NULL: no peer has the destination */
	struct peer_state *state;
	struct load load;
	struct encap encap;
	struct bpf_redir_neigh hop;
	__u32 uplink;
	__u32 overlay; /* an aggregate leaves by it; otherwise 0 */
};

static __always_inline void build_encap(struct encap *encap, const struct in_force *rt,
					const struct departure *d, __u32 flow, __u32 inner_len)
{
	__u16 len = inner_len + ENCAP_LEN;

	build_ip(&encap->ip, encap_ecn(d->frame.ip.tos), rt->ttl, len, rt->local, d->peer->remote);
	build_udp(&encap->udp, flow_source_port(rt, flow), bpf_htons(port),
		  len - sizeof(struct iphdr));
	build_vxlan(&encap->vxlan, vni);
	encap->eth = d->frame.eth;
}

/* Asks for the underlay's route as the VXLAN driver does: an output route, not
 * bound to a device. Bound to the uplink the answer would be the uplink's
 * default route where a better one leaves by another device. */
static __always_inline long lookup_route(struct __sk_buff *skb, const struct encap *encap,
					 struct bpf_fib_lookup *fib, __u32 mark)
{
	*fib = (struct bpf_fib_lookup){
		.family = AF_INET,
		.l4_protocol = IPPROTO_UDP,
		.sport = encap->udp.source,
		.dport = encap->udp.dest,
		.tot_len = bpf_ntohs(encap->ip.tot_len),
		.ifindex = 1, /* loopback: packets of the host itself */
		.tos = encap->ip.tos,
		.ipv4_src = encap->ip.saddr,
		.ipv4_dst = encap->ip.daddr,
	};
	if (mark)
		*(__u32 *)fib->smac = mark; /* the field mark of newer headers */
	return bpf_fib_lookup(skb, fib, sizeof(*fib), mark ? FIB_LOOKUP_MARK : 0);
}

/* The underlay's next hop, and what fits. Where the next hop's MAC is not known
 * the kernel has to ask for it and keep the packet meanwhile; else
 * bpf_redirect_neigh() finds it, and keeps probing as the kernel does. */
static __always_inline enum reason ask_next_hop(struct __sk_buff *skb, const struct in_force *rt,
						const struct departure *d, struct route *route)
{
	struct bpf_fib_lookup fib;
	long verdict = lookup_route(skb, &d->encap, &fib, route->mark);

	/* Kernels before 6.10 can't look up by mark. */
	if (verdict == -EINVAL && route->mark) {
		if (rt->by_mark)
			return REASON_MARKED;
		verdict = lookup_route(skb, &d->encap, &fib, 0);
	}
	if (verdict == BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return REASON_UNDERLAY_MTU;
	if (rt->mtu && bpf_ntohs(d->encap.ip.tot_len) > rt->mtu)
		return REASON_UNDERLAY_MTU;
	if ((verdict != BPF_FIB_LKUP_RET_SUCCESS && verdict != BPF_FIB_LKUP_RET_NO_NEIGH) ||
	    fib.ifindex != rt->uplink || fib.family != AF_INET)
		return REASON_UNDERLAY_ROUTE;
	if (verdict == BPF_FIB_LKUP_RET_NO_NEIGH)
		return REASON_UNDERLAY_NEIGHBOUR;
	route->hop = fib.ipv4_dst;
	route->mtu = rt->mtu && rt->mtu < fib.mtu_result ? rt->mtu : fib.mtu_result;
	return REASON_NONE;
}

static __always_inline enum reason take_next_hop(struct departure *d, const struct route *route)
{
	if (!(d->uplink = find_device(DEVICE_UPLINK)))
		return REASON_DEVICE_MISSING;
	d->hop.nh_family = AF_INET;
	d->hop.ipv4_nh = route->hop;
	return REASON_NONE;
}

/* Everything is decided; adjust_room is the last to refuse. Only behind it is
 * the packet changed. */
static __always_inline enum reason encapsulate(struct __sk_buff *skb, const struct encap *encap)
{
	const __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 |
			    BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) |
			    BPF_F_ADJ_ROOM_ENCAP_L2_ETH | BPF_F_ADJ_ROOM_NO_CSUM_RESET;

	if (bpf_skb_adjust_room(skb, ENCAP_LEN, BPF_ADJ_ROOM_MAC, flags))
		return REASON_ENCAP_REFUSED;
	/* Can't fail: the room is there and was just made private. */
	bpf_skb_store_bytes(skb, ETH_HLEN, encap, ENCAP_LEN, 0);
	return REASON_NONE;
}
