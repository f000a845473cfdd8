// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

/* The programs of weft, one file each. See ARCHITECTURE.md for how a packet
 * meets them. */

#include "overlay6.h"
#include "overlay_in.h"
#include "overlay_out.h"
#include "pod_in.h"
#include "pod_out.h"
#include "uplink_in.h"
#include "uplink_out.h"
#include "uplink_xdp.h"

/* Kernel helpers for GPL-compatible programs are used. */
char __license[] SEC("license") = "Dual BSD/GPL";

/* bpf2go makes Go constants of enums that the object mentions. */
enum reason *unused_reason __attribute__((unused));
enum packet_path *unused_path __attribute__((unused));
enum source_check *unused_source_check __attribute__((unused));
enum device *unused_device __attribute__((unused));
enum off *unused_off __attribute__((unused));
