/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "account.h"
#include "deliver.h"
#include "stripped.h"

/* tc ingress of the uplink: VXLAN packets as the network brings them. Where
 * they come from is checked, and the outer headers are taken off the ones that
 * we hand on: straight to their pod, or into the overlay device. */

/* An outer packet on its way in. */
struct arrival {
	struct outer outer;
	struct frame inner;
	struct transport transport; /* of the inner packet ... */
	bool readable;              /* ... if it has one */
	bool known;                 /* the outer source is a peer ... */
	struct peer_state *state;   /* ... that has a slot; else NULL */
	__u32 slot;
	struct delivery delivery; /* straight to its pod, if it may ... */
	__u32 overlay;            /* ... or into this device */
};

/* What parse_outer says of packets that are none of our business: not VXLAN on
 * our port. They are not counted. */
#define NOT_VXLAN REASON_COUNT

/* VXLAN on our port, at this offset? Fragments behind the first have no port;
 * from a peer they are most likely VXLAN. */
static __always_inline bool is_vxlan(struct __sk_buff *skb, const struct iphdr *ip)
{
	__be16 dest;

	if (ip->frag_off & bpf_htons(IP_OFFSET))
		return find_node(ip->saddr);
	if (bpf_skb_load_bytes(skb, ETH_HLEN + ip->ihl * 4 + 2, &dest, sizeof(dest)))
		return false;
	return dest == bpf_htons(port);
}

/* Whether outer headers of so many bytes, with all that is behind them, are of our
 * network and to us. */
static __always_inline enum reason judge_outer(const struct in_force *rt, const struct outer *outer,
					       __u32 len, bool aggregate)
{
	const struct iphdr *ip = &outer->ip;

	if (ip->daddr != rt->local)
		return REASON_OUTER_ADDRESS;
	if (ip->ihl != 5)
		return REASON_OUTER_OPTIONS;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return REASON_OUTER_FRAGMENT;
	if (!ip_checksum_right(ip))
		return REASON_OUTER_CHECKSUM;

	/* The lengths of an aggregate are GRO's to set. */
	__u32 total = bpf_ntohs(ip->tot_len);

	if (!aggregate &&
	    (total + ETH_HLEN != len || bpf_ntohs(outer->udp.len) + sizeof(struct iphdr) != total))
		return REASON_OUTER_LENGTH;
	if (outer->vxlan.flags != VXLAN_FLAGS || outer->vxlan.vni & bpf_htonl(0xff))
		return REASON_VXLAN_FLAGS;
	if (outer->vxlan.vni != bpf_htonl(vni << 8))
		return REASON_VXLAN_VNI;
	return REASON_NONE;
}

static __always_inline enum reason parse_outer(struct __sk_buff *skb, const struct in_force *rt,
					       struct outer *outer)
{
	const struct iphdr *ip = &outer->ip;

	if (bpf_skb_load_bytes(skb, 0, &outer->eth, OUTER_LEN))
		return NOT_VXLAN;
	if (ip->protocol != IPPROTO_UDP || ip->version != 4)
		return NOT_VXLAN;
	if (outer->udp.dest != bpf_htons(port) || ip->ihl != 5 ||
	    ip->frag_off & bpf_htons(IP_OFFSET)) {
		if (!is_vxlan(skb, ip))
			return NOT_VXLAN;
	}
	if (skb->vlan_present)
		return REASON_OUTER_VLAN;
	if (skb->pkt_type != PACKET_HOST)
		return REASON_OUTER_NOT_FOR_HOST;
	return judge_outer(rt, outer, skb->len, skb->gso_size);
}

/* vxlan_set_mac() drops frames that claim to come from the device itself, and the
 * stack those that are not addressed to it. */
static __always_inline enum reason judge_macs(const struct in_force *rt, const struct frame *inner)
{
	if (!same_mac(inner->eth.h_dest, rt->mac) || same_mac(inner->eth.h_source, rt->mac))
		return REASON_INNER_MAC;
	return REASON_NONE;
}

static __always_inline enum reason parse_inner(struct __sk_buff *skb, const struct in_force *rt,
					       struct frame *inner)
{
	enum reason reason = parse_frame(skb, OUTER_LEN, inner);

	return reason ? reason : judge_macs(rt, inner);
}

/* The outer source has to be a peer, and the inner source one of its own: in
 * its pod prefixes, or one of its node addresses. */
static __always_inline enum reason check_source(const struct in_force *rt, struct arrival *a)
{
	__be32 remote = a->outer.ip.saddr, source = a->inner.ip.saddr;
	struct peer *peer = find_peer(rt, source);

	if (peer && peer->remote == remote) {
		a->known = true;
		a->slot = peer->slot;
		a->state = find_state(a->slot);
		return REASON_NONE;
	}

	struct node *node = find_node(remote);

	if (!node || node->remote != remote)
		return REASON_SOURCE_UNKNOWN_PEER;
	a->known = true;
	a->slot = node->slot;
	a->state = find_state(a->slot);

	struct node *owner = find_node(source);

	if (!owner || owner->remote != remote)
		return REASON_SOURCE_NOT_ITS_PREFIX;
	return REASON_NONE;
}

static __always_inline void note_suspect(const struct arrival *a, enum reason reason)
{
	struct suspect key = {
		.outer = a->outer.ip.saddr,
		.inner = a->inner.ip.saddr,
		.reason = reason,
	};
	__u64 one = 1, *packets = bpf_map_lookup_elem(&suspects, &key);

	if (packets)
		__sync_fetch_and_add(packets, 1);
	else
		bpf_map_update_elem(&suspects, &key, &one, BPF_ANY);
}

/* The kernel would refuse a packet with a wrong outer checksum. We need not
 * look at it where the inner packet has a checksum of its own, which whoever
 * receives it verifies. Where it has none, a driver must have verified the
 * outer one. */
static __always_inline bool protected(struct __sk_buff *skb, const struct arrival *a)
{
	const struct iphdr *ip = &a->inner.ip;

	if (!a->outer.udp.check)
		return true;
	if (bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY) >= 0)
		return true;
	if (ip->protocol == IPPROTO_TCP || ip->protocol == IPPROTO_ICMP)
		return true;
	/* A fragment doesn't tell whether the datagram has a checksum. */
	return ip->protocol == IPPROTO_UDP && a->readable && a->transport.udp.check;
}

/* A TCP segment without PSH has more of the same write behind it. The kernel
 * merges such trains behind its VXLAN device, where the uplink did not; what we
 * hand on is not merged any more. */
static __always_inline bool more_follows(const struct arrival *a)
{
	const struct iphdr *ip = &a->inner.ip;
	const struct transport *t = &a->transport;

	return ip->protocol == IPPROTO_TCP && a->readable && !(t->tcp.flags & TCP_PSH) &&
	       bpf_ntohs(ip->tot_len) > ip->ihl * 4 + (t->tcp.doff >> 4) * 4;
}

/* RFC 6040: drop. INET_ECN_decapsulate() does, and can log it. */
static __always_inline bool congested(const struct arrival *a)
{
	return (a->outer.ip.tos & ECN_MASK) == ECN_CE &&
	       (a->inner.ip.tos & ECN_MASK) == ECN_NOT_ECT;
}

/* Is it a packet that the kernel path would not treat better? */
static __always_inline enum reason worth_stripping(struct __sk_buff *skb, const struct arrival *a)
{
	if (more_follows(a))
		return REASON_SEGMENT_TRAIN;
	if (!protected(skb, a))
		return REASON_INNER_UNPROTECTED;
	return congested(a) ? REASON_ECN_CONGESTED : REASON_NONE;
}

/* To its pod, or else into the overlay device. */
static __always_inline enum reason choose_exit(struct __sk_buff *skb, const struct in_force *rt,
					       struct arrival *a, __u64 now)
{
	const struct transport *t = a->readable ? &a->transport : NULL;
	enum reason reason = may_deliver(skb, rt, a->state, &a->inner.ip, OUTER_LEN + ETH_HLEN, t,
					 &a->delivery, now);

	if (!reason)
		return REASON_NONE;
	if (reason != EXPRESS_OFF)
		pass(reason);
	if ((reason = switched_on(rt, a->state, OFF_BASE)))
		return reason;
	a->overlay = find_device(DEVICE_OVERLAY);
	return a->overlay ? REASON_NONE : REASON_DEVICE_MISSING;
}

static __always_inline enum reason may_enter(struct __sk_buff *skb, const struct in_force *rt,
					     struct arrival *a)
{
	__u32 flow = bpf_ntohs(a->outer.udp.source) ^ bpf_ntohl(a->outer.ip.saddr);
	__u64 now = bpf_ktime_get_coarse_ns();
	enum reason reason;

	if (!a->state)
		return a->known ? REASON_PEER_NO_ROOM : REASON_SOURCE_UNKNOWN_PEER;
	if ((reason = switched_on(rt, a->state, OFF_BASE | OFF_EXPRESS)))
		return reason;
	a->readable = read_transport(skb, OUTER_LEN + ETH_HLEN, &a->inner.ip, &a->transport);
	if (!skb->gso_size && (reason = worth_stripping(skb, a))) {
		keep_order(&rx_aggregates, flow, now);
		return reason;
	}
	if ((reason = no_aggregate(skb, &rx_aggregates, flow, now)))
		return reason;
	if ((reason = host_proven(a->state->rx_proven, &a->state->rx_renewal, now))) {
		keep_order(&rx_aggregates, flow, now);
		return reason;
	}
	return choose_exit(skb, rt, a, now);
}

/* Everything is decided; adjust_room is the last to refuse. Only behind it is
 * the packet changed. */
static __always_inline enum reason strip(struct __sk_buff *skb)
{
	/* The outer headers' part of a verified checksum goes with them; what
	 * remains verified is what the driver said of the inner ones. */
	if (bpf_skb_adjust_room(skb, -ENCAP_LEN, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return REASON_STRIP_REFUSED;
	bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
	return REASON_NONE;
}

/* RFC 6040, section 4.2, as INET_ECN_decapsulate() has it: what was marked on
 * the way is carried over to inner packets that can say so. */
static __always_inline __u8 decap_ecn(__u8 inner_tos, __u8 outer_tos)
{
	__u8 inner = inner_tos & ECN_MASK, outer = outer_tos & ECN_MASK;

	if (outer == ECN_CE && inner != ECN_NOT_ECT)
		return inner_tos | ECN_CE;
	if (outer == ECN_ECT_1 && inner == ECN_ECT_0)
		return (inner_tos & ~ECN_MASK) | ECN_ECT_1;
	return inner_tos;
}

/* The header keeps its sum, since its checksum changes with it (RFC 1624): so
 * does a checksum that the card took over the whole packet. */
static __always_inline void carry_congestion(struct __sk_buff *skb, const struct arrival *a)
{
	__u8 tos = decap_ecn(a->inner.ip.tos, a->outer.ip.tos);

	if (tos == a->inner.ip.tos)
		return;
	bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check),
			    bpf_htons(a->inner.ip.tos), bpf_htons(tos), 2);
	bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct iphdr, tos), &tos, sizeof(tos), 0);
}

/* Puts a stripped packet on its way. */
static __always_inline int hand_on(struct __sk_buff *skb, const struct in_force *rt,
				   const struct arrival *a)
{
	const struct iphdr *ip = &a->inner.ip;
	struct load load = { .packets = 1, .bytes = skb->len - ETH_HLEN };

	if (!a->delivery.pod) {
		__u16 turn = a->delivery.turn;

		/* Can't fail: the header is there and was just made private. */
		bpf_skb_store_bytes(skb, 0, &a->inner.eth, ETH_HLEN, 0);
		carry_congestion(skb, a);
		count_peer(a->slot, turn ? PATH_EXPRESS : PATH_BASE, RX, load);
		return wait_in_line(skb, rt, a->overlay, turn ? place_in_line(turn, 1) : 0);
	}
	if (address_to_pod(skb, a->inner, decap_ecn(ip->tos, a->outer.ip.tos), &a->delivery))
		return drop(REASON_REWRITE_FAILED);
	count_peer(a->slot, PATH_EXPRESS, RX, load);
	return hand_over(skb, &a->delivery);
}

static __always_inline int refuse_source(struct __sk_buff *skb, const struct in_force *rt,
					 const struct arrival *a, enum reason reason)
{
	note_suspect(a, reason);
	if (rt->source_check == SOURCE_CHECK_ENFORCE)
		return drop(reason);
	stamp_seen(skb, rt, SEEN_SUSPECT);
	return pass(reason);
}

static __always_inline int enter(struct __sk_buff *skb, const struct in_force *rt,
				 struct arrival *a)
{
	enum reason reason;

	if ((reason = parse_outer(skb, rt, &a->outer)))
		return reason == NOT_VXLAN ? PASS : pass(reason);
	if ((reason = parse_inner(skb, rt, &a->inner)))
		return pass(reason);
	if ((reason = check_source(rt, a)) && rt->source_check != SOURCE_CHECK_OFF)
		return refuse_source(skb, rt, a, reason);
	if ((reason = may_enter(skb, rt, a)) || (reason = strip(skb))) {
		stamp_seen(skb, rt, SEEN_GOOD);
		return pass(reason);
	}
	return hand_on(skb, rt, a);
}

SEC("tc")
int uplink_in(struct __sk_buff *skb)
{
	struct in_force *rt;
	struct arrival a = {};

	if (skb->protocol != bpf_htons(ETH_P_IP) || !(rt = runtime_now()))
		return PASS;
	if (with_xdp) {
		struct note note;

		if (read_note(skb, rt, &note) && note.stripped)
			return take_stripped(skb, rt, note.slot);
	}
	return enter(skb, rt, &a);
}
