/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Numbers of the protocols we speak, and the few that we choose ourselves. */

#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/types.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_HOPOPTS 0 /* this and the next three are IPv6 extension headers */
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_DSTOPTS 60
#define DNS_PORT 53
#define TCP_HEADER_LEN 20 /* without options */
#define TCP_CHECK_OFFSET 16
#define UDP_CHECK_OFFSET 6
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff
#define IP_MAX_LEN 0xffff
#define PACKET_HOST 0
#define EINVAL 22

/* BPF_FIB_LOOKUP_MARK of Linux 6.10. */
#define FIB_LOOKUP_MARK (1U << 5)

/* "Go on as if we were not there": the next program of the chain, then the
 * kernel. TCX_NEXT and TC_ACT_UNSPEC are both -1. TC_ACT_OK would end the
 * chain and disable other people's programs. */
#define PASS -1
#define DROP 2 /* TCX_DROP, TC_ACT_SHOT */

/* RFC 8365 and RFC 7348: the I flag, all else reserved and zero. */
#define VXLAN_FLAGS bpf_htonl(0x08000000)

/* RFC 3168: the two ECN bits of the TOS byte. */
#define ECN_MASK 3
#define ECN_NOT_ECT 0
#define ECN_ECT_1 1
#define ECN_ECT_0 2
#define ECN_CE 3
#define DSCP_MASK 0xfc

/* What encapsulation puts before the inner IP packet, behind the outer
 * Ethernet header: IPv4, UDP, VXLAN, inner Ethernet. */
#define ENCAP_LEN 50

/* How long we believe, without seeing it again, that the host lets a peer's
 * VXLAN packets through (see struct peer_state). Nanoseconds. */
#define PROOF_LIFE 2000000000LL

/* How long after an aggregate the small packets of the same flow ride the
 * kernel path with it, so that they cannot overtake it. Nanoseconds; some
 * ticks of the coarse clock, which moves every 1 to 10 ms. */
#define AGGREGATE_LIFE 20000000LL

/* Flows whose last aggregate is remembered, per direction; flows that share a
 * place share their fate for AGGREGATE_LIFE. A power of two. */
#define AGGREGATE_FLOWS 4096

/* How long a witness of a flow holds (see struct witness). Nanoseconds. It
 * covers what the kernel sends no event for: members of ipsets, rules by time. */
#define WITNESS_LIFE 4000000000LL

/* How many packets of a flow have to come through the host's stack, in one
 * direction, before it gets a witness. */
#define NEWCOMER_PACKETS 8

/* Flows whose first packets are counted; of two that share a place each starts
 * again when the other comes. A power of two. */
#define NEWCOMERS 32768

/* Flows whose next hop is remembered for a tick, on each CPU. A power of two. */
#define ROUTES 256

/* Witnesses that are kept, one per direction of a flow. */
#define MAX_WITNESSES 65536

/* How long express goes on without a sign of life from the agent. Nanoseconds. */
#define PULSE_LIFE 3000000000LL

/* Pod prefixes that can be known at all. */
#define MAX_KNOWN 16384

/* Addresses of pods on this node that can be known, and redirect targets. */
#define MAX_ENDPOINTS 2048

/* Different prefix lengths among the peers' pod prefixes, of one family. */
#define PREFIX_LENGTHS 8

/* IPv6 extension headers that are looked through before the transport header. */
#define EXTENSION_HEADERS 4
