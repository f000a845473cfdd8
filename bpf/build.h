/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "parse.h"
#include "structs.h"

/* The headers that encapsulation puts before the inner IP packet. */
struct encap {
	struct iphdr ip;
	struct udphdr udp;
	struct vxlanhdr vxlan;
	struct ethhdr eth;
	__u16 pad;
};

_Static_assert(sizeof(struct encap) - sizeof(__u16) == ENCAP_LEN, "IPv4, UDP, VXLAN, Ethernet");

/* RFC 6040 as INET_ECN_encapsulate() has it: the inner bits, but ECT(0) for a
 * packet that is already marked, so that marks on the way are seen. */
static __always_inline __u8 encap_ecn(__u8 inner_tos)
{
	__u8 ecn = inner_tos & ECN_MASK;

	return ecn == ECN_CE ? ECN_ECT_0 : ecn;
}

/* The kernel's choice, udp_flow_src_port(): the flow's hash scaled into the
 * local port range, so that one flow has one port whoever encapsulates it. */
static __always_inline __be16 flow_source_port(const struct in_force *rt, __u32 hash)
{
	hash ^= hash << 16;
	return bpf_htons((((__u64)hash * (rt->port_max - rt->port_min)) >> 32) + rt->port_min);
}

static __always_inline void build_ip(struct iphdr *ip, __u8 tos, __u8 ttl, __u16 len, __be32 src,
				     __be32 dst)
{
	*ip = (struct iphdr){
		.version = 4,
		.ihl = 5,
		.tos = tos,
		.tot_len = bpf_htons(len),
		.id = bpf_get_prandom_u32(), /* DF is 0: a fresh one (RFC 6864) */
		.ttl = ttl,
		.protocol = IPPROTO_UDP,
		.saddr = src,
		.daddr = dst,
	};
	ip->check = ip_checksum(ip);
}

/* A checksum of 0 is none, which IPv4 permits (RFC 768, RFC 7348); the inner
 * packet has its own. */
static __always_inline void build_udp(struct udphdr *udp, __be16 src, __be16 dst, __u16 len)
{
	udp->source = src;
	udp->dest = dst;
	udp->len = bpf_htons(len);
	udp->check = 0;
}

static __always_inline void build_vxlan(struct vxlanhdr *vxlan, __u32 vni)
{
	vxlan->flags = VXLAN_FLAGS;
	vxlan->vni = bpf_htonl(vni << 8);
}
