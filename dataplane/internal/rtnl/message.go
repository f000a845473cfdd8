//go:build linux

package rtnl

import (
	"encoding/binary"
	"fmt"
	"iter"

	"golang.org/x/sys/unix"
)

// RTA_NH_ID is of linux/rtnetlink.h, and golang.org/x/sys has no name for it:
// the route leads to a next hop object.
const RTA_NH_ID = 30

// native is the byte order of netlink's own fields.
var native = binary.NativeEndian

// Message is one message that was received.
type Message struct {
	// Kind is the type of message (RTM_*).
	Kind uint16
	// Data is what follows the header: the fixed part, then attributes. It lies
	// in the socket's buffer and is valid until the socket is used again.
	Data []byte

	flags uint16
	seq   uint32
	port  uint32
}

// messages splits a datagram.
func messages(b []byte) iter.Seq[Message] {
	return func(yield func(Message) bool) {
		for len(b) >= unix.NLMSG_HDRLEN {
			size := int(native.Uint32(b))
			if size < unix.NLMSG_HDRLEN || size > len(b) {
				return
			}
			m := Message{
				Kind:  native.Uint16(b[4:]),
				Data:  b[unix.NLMSG_HDRLEN:size],
				flags: native.Uint16(b[6:]),
				seq:   native.Uint32(b[8:]),
				port:  native.Uint32(b[12:]),
			}
			if !yield(m) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

// Attributes splits a sequence of attributes into type and value. The flags in
// the type (NLA_F_*) are left out; at damage the sequence ends.
func Attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(native.Uint16(b))
			if size < unix.SizeofRtAttr || size > len(b) {
				return
			}
			if !yield(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:size]) {
				return
			}
			b = b[min(align(size), len(b)):]
		}
	}
}

// Uint32 reads an attribute that is a number in the machine's byte order; 0
// when it is too short for one.
func Uint32(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return native.Uint32(value)
}

// align rounds up to the alignment of messages and attributes.
func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// Request is one message to the kernel. Its methods add to it and return it.
type Request struct{ b []byte }

// NewRequest begins a message with its fixed part, such as a struct ndmsg.
// NLM_F_REQUEST need not be said.
func NewRequest(kind, flags uint16, fixed ...byte) *Request {
	r := &Request{b: make([]byte, unix.NLMSG_HDRLEN, 96)}
	native.PutUint16(r.b[4:], kind)
	native.PutUint16(r.b[6:], flags|unix.NLM_F_REQUEST)
	r.b = append(r.b, fixed...)
	return r
}

// Attr adds an attribute.
func (r *Request) Attr(kind uint16, value []byte) *Request {
	r.b = native.AppendUint16(r.b, uint16(unix.SizeofRtAttr+len(value)))
	r.b = native.AppendUint16(r.b, kind)
	r.b = append(r.b, value...)
	for len(r.b) != align(len(r.b)) {
		r.b = append(r.b, 0)
	}
	return r
}

// Uint32 adds an attribute with a number in the machine's byte order.
func (r *Request) Uint32(kind uint16, value uint32) *Request {
	return r.Attr(kind, native.AppendUint32(nil, value))
}

// Nested adds an attribute that consists of attributes.
func (r *Request) Nested(kind uint16, inside func(*Request)) *Request {
	begin := len(r.b)
	r.Attr(kind|unix.NLA_F_NESTED, nil)
	inside(r)
	native.PutUint16(r.b[begin:], uint16(len(r.b)-begin))
	return r
}

// Data is what follows the header, as in a Message.
func (r *Request) Data() []byte { return r.b[unix.NLMSG_HDRLEN:] }

// acknowledged has the kernel answer also when there is nothing else to say.
func (r *Request) acknowledged() {
	native.PutUint16(r.b[6:], native.Uint16(r.b[6:])|unix.NLM_F_ACK)
}

// finish sets length and sequence number.
func (r *Request) finish(seq uint32) []byte {
	native.PutUint32(r.b, uint32(len(r.b)))
	native.PutUint32(r.b[8:], seq)
	return r.b
}

// ackError reads an acknowledgement (struct nlmsgerr) or the end of a dump:
// nil, or the errno with the kernel's own words where it has some.
func ackError(m Message) error {
	if len(m.Data) < 4 {
		return nil
	}
	errno := int32(native.Uint32(m.Data))
	if errno == 0 {
		return nil
	}
	err := error(unix.Errno(-errno))
	const sizeofError = 4 + unix.NLMSG_HDRLEN // the request's header comes back, its rest is capped
	if m.Kind != unix.NLMSG_ERROR || m.flags&unix.NLM_F_ACK_TLVS == 0 || len(m.Data) < sizeofError {
		return err
	}
	rest := m.Data[sizeofError:]
	if m.flags&unix.NLM_F_CAPPED == 0 { // the whole request came back
		size := int(native.Uint32(m.Data[4:])) - unix.NLMSG_HDRLEN
		if size < 0 || align(size) > len(rest) {
			return err
		}
		rest = rest[align(size):]
	}
	for kind, value := range Attributes(rest) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w (%s)", err, unix.ByteSliceToString(value))
		}
	}
	return err
}
