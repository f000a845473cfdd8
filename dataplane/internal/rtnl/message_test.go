//go:build linux

package rtnl

import (
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzMessages: the kernel's own messages, and such with any damage, are read
// without harm.
func FuzzMessages(f *testing.F) {
	f.Add(addAddress(1).finish(1))
	f.Add(NewRequest(unix.RTM_NEWLINK, 0, make([]byte, unix.SizeofIfInfomsg)...).Nested(unix.IFLA_LINKINFO, func(r *Request) {
		r.Attr(unix.IFLA_INFO_KIND, []byte("vxlan"))
	}).finish(1))
	// struct nlmsgerr with the header of the request, and why in words.
	refused := append([]byte{0xed, 0xff, 0xff, 0xff}, make([]byte, unix.NLMSG_HDRLEN)...)
	f.Add(NewRequest(unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS|unix.NLM_F_CAPPED, refused...).
		Attr(unix.NLMSGERR_ATTR_MSG, []byte("no such device\x00")).finish(1))
	f.Fuzz(func(_ *testing.T, b []byte) {
		for m := range messages(b) {
			_ = ackError(m)
			for _, value := range Attributes(m.Data) {
				_ = Uint32(value)
			}
		}
	})
}
