/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "reasons.h"
#include "structs.h"

/* The loader sets the size of peer_states, peer_counters and peer6_counters: the
 * number of peers that have slots. Without IPv6 the maps for it have room for one
 * entry, without IPv4 the former two and witnesses. Hash maps take memory for
 * what is in them, LRU maps all of it at once. */

/* pod prefix → the peer it belongs to. Written by the agent. A hash with one
 * lookup per prefix length in use, longest first: a fifth of an LPM trie's
 * time at 5,000 peers, and clusters use one length. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_KNOWN);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, struct peer);
} peers SEC(".maps");

/* node address → the node it belongs to. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_KNOWN);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __be32);
	__type(value, struct node);
} nodes SEC(".maps");

/* slot → what the programs know of that peer node. Written by the programs,
 * the switch by the agent and by weft accel. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct peer_state);
} peer_states SEC(".maps");

/* slot → what was carried to and from that peer node. Written by the programs,
 * set to zero by the agent when a slot changes hands. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} peer_counters SEC(".maps");

/* IPv6 pod prefix → the peer it belongs to. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_KNOWN);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix6);
	__type(value, struct peer6);
} peers6 SEC(".maps");

/* IPv6 node address → the node it belongs to. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_KNOWN);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address6);
	__type(value, struct node6);
} nodes6 SEC(".maps");

/* slot of an IPv6 peer → what the kernel path carried to and from that peer node.
 * Written by the programs, set to zero by the agent when a slot changes hands. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct path_counters);
} peer6_counters SEC(".maps");

/* enum reason → packets passed and dropped for it. Written by the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_COUNT);
	__type(key, __u32);
	__type(value, struct reason_counters);
} reasons SEC(".maps");

/* enum reason → packets that uplink_xdp left as they were, or dropped, for it;
 * those that it stripped at REASON_NONE. Written by uplink_xdp. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_COUNT);
	__type(key, __u32);
	__type(value, struct reason_counters);
} driver_reasons SEC(".maps");

/* 0 → when uplink_in last read a note of uplink_xdp's (coarse clock); see note.h.
 * Written by uplink_in. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} notes_read SEC(".maps");

/* a sender that failed the source check → packets. Written by the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 256);
	__type(key, struct suspect);
	__type(value, __u64);
} suspects SEC(".maps");

/* pod address → the pod. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __be32);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

/* address that a node answers on, this one or a peer → 1. Written by the
 * agent. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 5 * MAX_KNOWN);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __be32);
	__type(value, __u32);
} node_addresses SEC(".maps");

/* flow before NAT → that it came through netfilter and routing. Written by the
 * programs behind them. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_WITNESSES);
	__type(key, struct flow);
	__type(value, struct witness);
} witnesses SEC(".maps");

/* flow → how many packets of it have come through. Written by the programs that
 * write witnesses. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NEWCOMERS);
	__type(key, __u32);
	__type(value, struct newcomer);
} newcomers SEC(".maps");

/* flow → its next hop in the underlay. Written by pod_in. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, ROUTES);
	__type(key, __u32);
	__type(value, struct route);
} routes SEC(".maps");

/* 0 → the agent's signs of life. Written by the agent. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pulse);
} heartbeat SEC(".maps");

/* enum device, or the interface index of a veth → network device. Written by the agent; the kernel
 * takes an entry out when its device goes, so a hit is never stale. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
	__uint(max_entries, MAX_ENDPOINTS);
	__type(key, __u32);
	__type(value, __u32);
} devices SEC(".maps");

/* flow → when it last had an aggregate, or on the way in another packet that
 * took the kernel path alone. Written by the programs. */
struct aggregates {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, AGGREGATE_FLOWS);
	__type(key, __u32);
	__type(value, __u64);
} tx_aggregates SEC(".maps"), rx_aggregates SEC(".maps");

/* flow → since when uplink_xdp leaves its packets as they are. Written by
 * uplink_xdp. */
struct aggregates left_flows SEC(".maps");

/* node (its public IP, 0 for all) → enum off bits. Written by weft accel, and
 * read by the agent, which carries it into runtime and peer_states. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __be32);
	__type(value, __u32);
} switches SEC(".maps");

/* 0 → what is in force now. Written by the agent and by weft accel. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct in_force);
} runtime SEC(".maps");
