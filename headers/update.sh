#!/usr/bin/env bash
# Refreshes the C headers in this directory from Debian's packages, so that the
# BPF object does not depend on the machine that compiles it.
#
#   apt-get install linux-libc-dev libbpf-dev && headers/update.sh && make generate
set -euo pipefail
cd "$(dirname "$0")"

uapi=(
	linux/bpf.h linux/bpf_common.h linux/byteorder/little_endian.h linux/const.h
	linux/if_ether.h linux/ip.h linux/pkt_cls.h linux/pkt_sched.h
	linux/posix_types.h linux/stddef.h linux/swab.h linux/types.h linux/udp.h
	asm-generic/bitsperlong.h asm-generic/int-ll64.h asm-generic/posix_types.h
	asm-generic/swab.h asm-generic/types.h
)
libbpf=(bpf/bpf_endian.h bpf/bpf_helper_defs.h bpf/bpf_helpers.h)

rm -rf linux asm asm-generic bpf
for file in "${uapi[@]}" "${libbpf[@]}"; do
	install -D -m 0644 "/usr/include/$file" "$file"
done

# <asm/…> is the one part that differs between machines; BPF is a machine of
# its own, 64-bit and here little-endian, for which the generic headers hold.
mkdir asm
for file in bitsperlong posix_types swab types; do
	echo "#include <asm-generic/$file.h>" >asm/$file.h
done
echo "#include <linux/byteorder/little_endian.h>" >asm/byteorder.h
sed -i '1i #define __BITS_PER_LONG 64' asm/bitsperlong.h

dpkg-query -W -f '${Package} ${Version}\n' linux-libc-dev libbpf-dev >VERSIONS
