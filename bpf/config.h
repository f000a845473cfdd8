/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

#include "constants.h"

/* Fixed for the life of a program; written by the loader into read-only data,
 * so that the verifier removes what is not used. */

/* The VXLAN network identifier. */
volatile const __u32 vni = 1;

/* The UDP destination port of outer packets, host byte order. */
volatile const __u16 port = 8472;

/* Whether packets may have been stripped by uplink_xdp, in the driver. */
volatile const bool with_xdp = false;

/* Whether the kernel lets us ask conntrack; without, there is no express. */
volatile const bool express = false;
