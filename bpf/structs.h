/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "constants.h"

/* What the programs and the agent share. The Go side is made from this file
 * by bpf2go. Padding has a name and is zero. */

/* The road a packet takes. */
enum packet_path {
	PATH_EXPRESS, /* pod to pod, past the host's stack */
	PATH_BASE,    /* encapsulated or stripped by our programs */
	PATH_KERNEL,  /* by the kernel's VXLAN device */
	PATH_COUNT,
};

/* What happens to packets that fail the source check. */
enum source_check {
	SOURCE_CHECK_OFF,
	SOURCE_CHECK_OBSERVE, /* counted, never accelerated, left to the kernel */
	SOURCE_CHECK_ENFORCE, /* dropped and counted */
};

/* Where redirect targets are found in the map devices. The host's ends of pods'
 * veths are there by their interface index, which is never one of these: 1 is
 * loopback. */
enum device {
	DEVICE_OVERLAY,
	DEVICE_UPLINK,
};

/* Bits of a switch. */
enum off {
	OFF_BASE = 1,
	OFF_EXPRESS = 2,
};

/* A pod prefix: bits is its length, addr is masked with it. */
struct prefix {
	__u32 bits;
	__be32 addr;
};

/* An IPv6 address. */
struct address6 {
	__be32 words[4];
};

/* An IPv6 pod prefix, as a prefix. */
struct prefix6 {
	__u32 bits;
	struct address6 addr;
};

/* The slot of a peer that only the source check knows: there is no room for
 * its state, or the kernel path does not serve it yet. An IPv6 peer without a
 * slot is not counted. */
#define NO_SLOT 0xffffffff

/* The peer that a pod prefix belongs to. */
struct peer {
	__be32 remote;      /* its public IP */
	__u32 slot;         /* its place in peer_states and peer_counters */
	__u8 mac[ETH_ALEN]; /* its overlay device's */
	__u8 pad[2];
};

/* The same for an IPv6 one. */
struct peer6 {
	struct address6 remote;
	__u32 slot; /* its place in peer6_counters */
	__u8 mac[ETH_ALEN];
	__u8 pad[2];
};

/* The node that an address belongs to: a peer's public IP, or another address
 * of its that may be an inner source. */
struct node {
	__be32 remote; /* its public IP */
	__u32 slot;
};

/* The same for an IPv6 address. */
struct node6 {
	struct address6 remote;
	__u32 slot;
};

/* What the programs know of a peer node, by slot.
 *
 * The base path passes by the host's own rules for the outer packets: nft and
 * iptables in INPUT, OUTPUT and raw, netdev hooks, IPsec policies. So it is
 * taken only while packets on the kernel path prove that the host lets this
 * peer's VXLAN through unchanged. A proof holds for PROOF_LIFE; in the second
 * half of its life single packets are sent through the kernel to renew it.
 * Times are bpf_ktime_get_coarse_ns(), 0 is never. */
struct peer_state {
	__u64 rx_proven;  /* overlay_in saw a packet that the kernel had stripped */
	__u64 rx_renewal; /* uplink_in last left one to the kernel for that */
	__u64 tx_proven;  /* uplink_out saw a packet that the kernel had encapsulated */
	__u64 tx_renewal; /* overlay_out last left one to the kernel for that */
	__u32 off;        /* enum off bits, from the map switches */
	__u32 pad;
};

/* A pod on this node: the kernel itself would send packets for it through the
 * device veth, in frames from gateway to mac; and what it routes comes out of
 * veth in frames from mac to gateway. */
struct endpoint {
	__u32 veth; /* interface index of the host's end */
	__u32 mtu;  /* the smallest on the way into the pod */
	__u8 mac[ETH_ALEN];
	__u8 gateway[ETH_ALEN];
};

/* One direction of a flow. */
struct flow {
	__be32 saddr, daddr;
	__be16 sport, dport;
	__u8 protocol; /* TCP or UDP */
	__u8 pad[3];
};

/* The underlay's answer where packets of a flow go next. It is as good as asking
 * again while the coarse clock stands still, a few milliseconds. */
struct route {
	__u64 asked;   /* when */
	__u32 hash;    /* for which flow, */
	__be32 remote; /* to which public IP, */
	__u32 mark;    /* with which mark */
	__be32 hop;    /* the next hop, out of the uplink */
	__u32 mtu;
	__u32 pad;
};

/* Packets of a flow without a witness, at hash: most flows are short, and not
 * worth one. */
struct newcomer {
	__u32 hash;
	__u32 packets;
};

/* That a packet of a flow came through the host's netfilter and routing, and
 * what had become of it there. Kept by what the flow is before NAT.
 *
 * Express packets pass by all that, so they need a witness no older than
 * WITNESS_LIFE, of the epoch that is now. In the second half of its life single
 * packets are left to the host's stack to renew it. Times are
 * bpf_ktime_get_coarse_ns().
 *
 * Behind a packet that took the stack the flow's next ones stand in line (see
 * line.h), or they would be in the pod before it. */
struct witness {
	__u64 seen;     /* when a packet last came through; 0: conntrack has said otherwise since */
	__u64 renewal;  /* when one was last left to the stack for that */
	__u64 tracked;  /* when conntrack last said that it is established, and NAT so */
	__u64 whole;    /* when an aggregate of UDP to a pod last took the stack */
	struct flow as; /* the flow after NAT */
	__u32 epoch;
	__u32 device; /* interface index where it came out: overlay device or veth */
	__u32 mark;   /* what the host gave it; of packets to peers only, as priority ... */
	__u32 priority;
	__u32 hash;  /* ... and flow hash, which makes the outer source port */
	__u16 turn;  /* of packets to pods: the last number in the line, 0: there is no line */
	__u8 status; /* conntrack's, as far as rules can tell: visible_status() */
	__u8 pad;
};

/* What the agent writes while it lives: without a beat for PULSE_LIFE there is
 * no express. */
struct pulse {
	__u64 beat;  /* when; the kernel's rulesets were followed until then. 0: no more */
	__u32 epoch; /* moved when the host may judge packets differently */
	__u32 held;  /* the agent holds express back (not 0) */
};

/* A timeout of conntrack's. */
struct timeout {
	__u32 ms;
	__u32 jiffies;
	__u32 slack; /* in jiffies: what a timer may be off without being set anew */
};

/* What a node has in force now; the agent writes it whole. */
struct in_force {
	__be32 local;                     /* our underlay address */
	__u32 uplink;                     /* interface index that routes to peers must have */
	__u32 overlay;                    /* interface index of our overlay device */
	__u32 overlay_mtu;                /* its MTU */
	__u8 mac[ETH_ALEN];               /* our overlay device's */
	__u8 ttl;                         /* of outer packets: net.ipv4.ip_default_ttl */
	__u8 prefix_lengths;              /* how many of prefix_bits are used */
	__u8 prefix_bits[PREFIX_LENGTHS]; /* longest first */
	__u16 port_min, port_max;         /* net.ipv4.ip_local_port_range: outer source ports */
	__u32 off;                        /* enum off bits, from the map switches */
	__u32 held;                       /* the agent holds acceleration back (not 0) */
	__u32 source_check;               /* enum source_check */
	__u32 mtu;     /* least MTU of a route on the uplink that says one; 0: none does */
	__u32 by_mark; /* not 0: the host has routing rules that look at the mark */
	struct timeout tcp_established, tcp_unacknowledged, udp, udp_stream;
	__u32 pad;
	__u32 stamp; /* random; see stamp.h */
	__u64 nonce; /* random; see stamp.h */
	__u64 token; /* random; see note.h */

	__u32 overlay6;                    /* interface index of our IPv6 overlay device */
	__u8 prefix6_lengths;              /* how many of prefix6_bits are used */
	__u8 prefix6_bits[PREFIX_LENGTHS]; /* longest first */
	__u8 pad6[3];

	__u8 uplink_mac[ETH_ALEN]; /* the uplink's */
	__u8 pad_mac[2];
};

/* Inner packets and bytes of a peer over one path. A packet is one segment on
 * the wire, bytes are IP bytes as sent on the wire. */
struct path_counters {
	__u64 tx_packets;
	__u64 tx_bytes;
	__u64 rx_packets;
	__u64 rx_bytes;
};

struct counters {
	struct path_counters path[PATH_COUNT];
};

/* Packets (skbs, not segments) left to the kernel or dropped for one reason. */
struct reason_counters {
	__u64 passed;
	__u64 dropped;
};

/* A sender that failed the source check. */
struct suspect {
	__be32 outer;
	__be32 inner;
	__u32 reason;
};
