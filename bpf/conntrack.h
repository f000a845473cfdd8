/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "flow.h"

/* What the kernel's connection tracking says of a flow, and keeping that true
 * for flows of which it sees few packets. */

/* The parts that we read of the kernel's types (include/net/netfilter/
 * nf_conntrack.h and its neighbours). Where they lie in the running kernel is
 * found by the loader. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct nf_conntrack_zone {
	__u16 id;
};

union nf_inet_addr {
	__be32 ip;
};

union nf_conntrack_man_proto {
	__be16 all;
};

struct nf_conntrack_man {
	union nf_inet_addr u3;
	union nf_conntrack_man_proto u;
};

struct nf_conntrack_tuple {
	struct nf_conntrack_man src;
	struct {
		union nf_inet_addr u3;
		union {
			__be16 all;
		} u;
	} dst;
};

struct nf_conntrack_tuple_hash {
	struct nf_conntrack_tuple tuple;
};

struct ip_ct_tcp {
	__u8 state;
};

union nf_conntrack_proto {
	struct ip_ct_tcp tcp;
};

struct nf_ct_ext {
	__u8 offset[1];
};

struct nf_conn {
	__u32 timeout; /* jiffies; kernels before 4.9 had a timer */
	struct nf_conntrack_zone zone;
	struct nf_conntrack_tuple_hash tuplehash[2];
	unsigned long status;
	struct nf_ct_ext *ext;
	union nf_conntrack_proto proto;
};

#pragma clang attribute pop

/* Bits of status: enum ip_conntrack_status. */
#define IPS_SEEN_REPLY (1 << 1)
#define IPS_ASSURED (1 << 2)
#define IPS_SRC_NAT (1 << 4)
#define IPS_DST_NAT (1 << 5)
#define IPS_SEQ_ADJUST (1 << 6)
#define IPS_DYING (1 << 9)
#define IPS_FIXED_TIMEOUT (1 << 10)
#define IPS_TEMPLATE (1 << 11)
#define IPS_NAT_CLASH (1 << 12)
#define IPS_OFFLOAD (1 << 14)
#define IPS_HW_OFFLOAD (1 << 15)
#define IPS_SPECIAL                                                                      \
	(IPS_SEQ_ADJUST | IPS_DYING | IPS_FIXED_TIMEOUT | IPS_TEMPLATE | IPS_NAT_CLASH | \
	 IPS_OFFLOAD | IPS_HW_OFFLOAD)

/* enum tcp_conntrack. */
#define TCP_CONNTRACK_ESTABLISHED 3

/* enum ip_conntrack_dir. */
#define IP_CT_DIR_ORIGINAL 0

/* Extensions of an entry whose flow needs the host's stack. Their numbers are
 * the running kernel's: some exist only with a configuration option. */
enum nf_ct_ext_id {
	NF_CT_EXT_HELPER,
	NF_CT_EXT_SEQADJ,
	NF_CT_EXT_TIMEOUT,
	NF_CT_EXT_SYNPROXY,
};

/* 12 bytes, as before Linux 6.11 added zones; newer kernels take both. */
struct bpf_ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};

extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *skb, struct bpf_sock_tuple *tuple,
					 __u32 tuple_len, struct bpf_ct_opts *opts,
					 __u32 opts_len) __weak __ksym;
extern void bpf_ct_release(struct nf_conn *ct) __weak __ksym;
extern int bpf_ct_change_timeout(struct nf_conn *ct, __u32 ms) __weak __ksym;

#define has_extension(ext, id)                                                      \
	(__builtin_preserve_enum_value(*(enum nf_ct_ext_id *)id, 0 /* exists */) && \
	 (ext)->offset[__builtin_preserve_enum_value(*(enum nf_ct_ext_id *)id, 1 /* value */)])

/* Asks for the entry of a flow, and which of its two directions the flow is. It
 * has to be released. */
static __always_inline struct nf_conn *find_tracked(struct __sk_buff *skb, const struct flow *flow,
						    __u8 *dir)
{
	struct bpf_sock_tuple tuple = {
		.ipv4 = {
			.saddr = flow->saddr,
			.daddr = flow->daddr,
			.sport = flow->sport,
			.dport = flow->dport,
		},
	};
	struct bpf_ct_opts opts = {
		.netns_id = BPF_F_CURRENT_NETNS,
		.l4proto = flow->protocol,
	};
	struct nf_conn *ct =
		bpf_skb_ct_lookup(skb, &tuple, sizeof(tuple.ipv4), &opts, sizeof(opts));

	if (ct)
		*dir = opts.dir;
	return ct;
}

/* The tuple of the direction that is not dir. */
static __always_inline void other_side(struct nf_conn *ct, __u8 dir, struct flow *flow)
{
	if (dir == IP_CT_DIR_ORIGINAL) {
		flow->saddr = ct->tuplehash[1].tuple.src.u3.ip;
		flow->daddr = ct->tuplehash[1].tuple.dst.u3.ip;
		flow->sport = ct->tuplehash[1].tuple.src.u.all;
		flow->dport = ct->tuplehash[1].tuple.dst.u.all;
	} else {
		flow->saddr = ct->tuplehash[0].tuple.src.u3.ip;
		flow->daddr = ct->tuplehash[0].tuple.dst.u3.ip;
		flow->sport = ct->tuplehash[0].tuple.src.u.all;
		flow->dport = ct->tuplehash[0].tuple.dst.u.all;
	}
}

/* What rules can tell of a flow's status: whether an answer has been seen, and
 * whether conntrack expects it to last. */
static __always_inline __u8 visible_status(const struct nf_conn *ct)
{
	return ct->status & (IPS_SEEN_REPLY | IPS_ASSURED);
}

/* All that conntrack does about a packet of UDP is to start a timeout anew, but
 * for the first answer and the one that makes the flow assured, after two seconds
 * (nf_conntrack_udp_packet). The latter may be any packet that takes the stack. */
static __always_inline bool is_talking(unsigned long status, __u8 dir)
{
	return status & IPS_SEEN_REPLY || dir == IP_CT_DIR_ORIGINAL;
}

/* Is it a flow of which conntrack need not see every packet of direction dir? */
static __always_inline enum reason judge_tracked(struct nf_conn *ct, __u8 protocol, __u8 dir)
{
	unsigned long status = ct->status;
	struct nf_ct_ext *ext = ct->ext;

	if (!(protocol == IPPROTO_UDP ? is_talking(status, dir) : status & IPS_ASSURED))
		return REASON_FLOW_UNESTABLISHED;
	/* Not status alone: the last ACK of a handshake and those of a close
	 * would go by, and the entry would hang in SYN_RECV or LAST_ACK. */
	if (protocol == IPPROTO_TCP && ct->proto.tcp.state != TCP_CONNTRACK_ESTABLISHED)
		return REASON_FLOW_UNESTABLISHED;
	if (status & IPS_SPECIAL)
		return REASON_FLOW_SPECIAL;
	if (__builtin_preserve_field_info(ct->zone, 2 /* exists */) && ct->zone.id)
		return REASON_FLOW_SPECIAL;
	if (ext &&
	    (has_extension(ext, NF_CT_EXT_HELPER) || has_extension(ext, NF_CT_EXT_SEQADJ) ||
	     has_extension(ext, NF_CT_EXT_TIMEOUT) || has_extension(ext, NF_CT_EXT_SYNPROXY)))
		return REASON_FLOW_SPECIAL;
	return REASON_NONE;
}

static __always_inline void set_timeout(struct nf_conn *ct, const struct timeout *timeout)
{
	__s32 left = ct->timeout - (__u32)bpf_jiffies64();
	__s32 jiffies = timeout->jiffies, slack = timeout->slack;

	if (left < jiffies - slack || left > jiffies + slack)
		bpf_ct_change_timeout(ct, timeout->ms);
}

/* Makes the entry live as long as if conntrack had seen this packet. Of TCP it
 * can't know any more what is acknowledged, since it does not see all: it gives
 * data the shorter time (nf_conntrack_tcp_packet), and so do we; a segment
 * without data says that its sender waits for nothing. */
static __always_inline void keep_alive(struct nf_conn *ct, const struct in_force *rt,
				       const struct segment *segment)
{
	if (segment->flow.protocol == IPPROTO_UDP)
		set_timeout(ct, ct->status & IPS_ASSURED ? &rt->udp_stream : &rt->udp);
	else if (segment->data)
		set_timeout(ct, &rt->tcp_unacknowledged);
	else
		set_timeout(ct, &rt->tcp_established);
}
