/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "build.h"
#include "config.h"
#include "gate.h"
#include "stamp.h"

/* tc egress of the overlay device: what the kernel has routed to a peer,
 * behind FORWARD and POSTROUTING. It is encapsulated here and sent out of the
 * uplink, or left to the VXLAN driver below. */

/* An inner packet on its way to a peer. */
struct departure {
	struct frame frame;
	struct peer *peer; /* NULL: no peer has the destination */
	struct peer_state *state;
	struct load load;
	struct encap encap;
	struct bpf_redir_neigh hop;
	__u32 uplink;
};

static __always_inline enum reason find_destination(struct __sk_buff *skb,
						    const struct in_force *rt, struct departure *d)
{
	enum reason reason;

	if (skb->protocol != bpf_htons(ETH_P_IP) || skb->vlan_present)
		return REASON_INNER_NOT_IPV4;
	if ((reason = parse_frame(skb, 0, &d->frame)))
		return reason;

	struct peer *peer = find_peer(rt, d->frame.ip.daddr);

	if (!peer)
		return REASON_DESTINATION_UNKNOWN;
	if (!(d->state = find_state(peer->slot)))
		return REASON_PEER_NO_ROOM;
	d->load = measure(skb, ETH_HLEN, &d->frame.ip);
	d->peer = peer;
	/* The kernel's FDB goes by MAC: where it may say something else than
	 * our map, it decides. */
	if (!same_mac(d->frame.eth.h_dest, peer->mac))
		return REASON_DESTINATION_MAC;
	return REASON_NONE;
}

static __always_inline enum reason may_leave(struct __sk_buff *skb, const struct in_force *rt,
					     struct departure *d, __u32 flow)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	enum reason reason;

	if ((reason = switched_on(rt, d->state)))
		return reason;
	if ((reason = no_aggregate(skb, &tx_aggregates, flow, now)))
		return reason;
	return host_proven(d->state->tx_proven, &d->state->tx_renewal, now);
}

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

/* The underlay's next hop, and whether the packet fits. Where the next hop's
 * MAC is not known the kernel has to ask for it and keep the packet meanwhile;
 * else bpf_redirect_neigh() finds it, and keeps probing as the kernel does. */
static __always_inline enum reason find_next_hop(struct __sk_buff *skb, const struct in_force *rt,
						 struct departure *d)
{
	struct bpf_fib_lookup fib;
	long verdict = lookup_route(skb, &d->encap, &fib, skb->mark);

	/* Kernels before 6.10 can't look up by mark. */
	if (verdict == -EINVAL && skb->mark) {
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
	if (!(d->uplink = find_device(DEVICE_UPLINK)))
		return REASON_DEVICE_MISSING;
	d->hop.nh_family = AF_INET;
	d->hop.ipv4_nh = fib.ipv4_dst;
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

static __always_inline enum reason leave(struct __sk_buff *skb, const struct in_force *rt,
					 struct departure *d)
{
	enum reason reason;

	if ((reason = find_destination(skb, rt, d)))
		return reason;

	__u32 flow = bpf_get_hash_recalc(skb);

	if ((reason = may_leave(skb, rt, d, flow)))
		return reason;
	if (skb->len - ETH_HLEN + ENCAP_LEN > IP_MAX_LEN)
		return REASON_UNDERLAY_MTU;
	build_encap(&d->encap, rt, d, flow, skb->len - ETH_HLEN);
	if ((reason = find_next_hop(skb, rt, d)))
		return reason;
	return encapsulate(skb, &d->encap);
}

SEC("tc")
int overlay_out(struct __sk_buff *skb)
{
	struct in_force *rt = runtime_now();
	struct departure d = {};

	if (!rt)
		return PASS;

	enum reason reason = leave(skb, rt, &d);

	if (d.peer)
		count_peer(d.peer->slot, reason ? PATH_KERNEL : PATH_BASE, TX, d.load);
	if (reason) {
		if (d.peer)
			stamp_left(skb);
		return pass(reason);
	}
	stamp_encapsulated(skb);
	return bpf_redirect_neigh(d.uplink, &d.hop, sizeof(d.hop), 0);
}
