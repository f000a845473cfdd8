package ebpf

// The object is compiled by the clang that Debian's clang-19 installs, from
// the C in bpf/ and the headers in headers/ alone, for little-endian machines
// of any kind (amd64 and arm64). `make generate` runs this line.
//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -go-package ebpf -type reason -type packet_path -type source_check -type device -type off -type prefix -type peer -type node -type address6 -type prefix6 -type peer6 -type node6 -type path_counters -type peer_state -type in_force -type counters -type reason_counters -type suspect -type endpoint -type flow -type witness -type pulse -type timeout weft ../../bpf/weft.bpf.c -- -I../../headers -nostdlibinc -O2 -mcpu=v3 -Wall -Wextra -Werror
