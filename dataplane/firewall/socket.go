//go:build linux

package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// socket is a connection to nf_tables for one reading or change. It is not
// kept: when something has failed, the library may leave answers unread.
type socket struct {
	*nftables.Conn
	// around, if there is one, runs large changes.
	around func(change func() error) error
	// link is what the library sends through.
	link *netlink.Conn
}

// A transaction is one datagram: some 50 bytes an element of IPv6, so these
// are good for more nodes than the kernel can route to.
const bufferSize = 16 << 20

// openSocket opens a socket in the namespace of the calling thread.
func openSocket(around func(change func() error) error) (*socket, error) {
	s := &socket{around: around}
	var err error
	s.Conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(link *netlink.Conn) error {
		s.link = link
		// More than the machine's limit needs CAP_NET_ADMIN there; we mostly
		// have it, and small clusters do without.
		_ = link.SetWriteBuffer(bufferSize)
		_ = link.SetReadBuffer(bufferSize)
		return nil
	}))
	if err != nil {
		return nil, fmt.Errorf("opening a netfilter netlink socket: %w", explain(err))
	}
	return s, nil
}

func (s *socket) close() { _ = s.CloseLasting() }

// generation is a number that changes with each transaction of anybody.
func (s *socket) generation() (uint32, error) {
	replies, err := s.link.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN,
			Flags: netlink.Request,
		},
		Data: make([]byte, nfgenmsgSize),
	})
	if errors.Is(err, unix.EINVAL) { // netfilter netlink knows of no nf_tables
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if err != nil {
		return 0, fmt.Errorf("asking for the generation of nf_tables: %w", explain(err))
	}
	for _, reply := range replies {
		if len(reply.Data) < nfgenmsgSize {
			continue
		}
		attrs, err := netlink.NewAttributeDecoder(reply.Data[nfgenmsgSize:])
		if err != nil {
			return 0, err
		}
		attrs.ByteOrder = binary.BigEndian
		for attrs.Next() {
			if attrs.Type() == unix.NFTA_GEN_ID {
				return attrs.Uint32(), attrs.Err()
			}
		}
	}
	return 0, errors.New("nf_tables does not tell its generation")
}

// nfgenmsgSize is the size of struct nfgenmsg, which begins each message.
const nfgenmsgSize = 4

// explain says what a refusal means for the user.
func explain(err error) error {
	for _, missing := range []error{
		unix.EPROTONOSUPPORT, // no netfilter netlink
		unix.EAFNOSUPPORT,    // no family inet
		unix.EOPNOTSUPP,
	} {
		if errors.Is(err, missing) {
			return fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w (nf_tables needs CAP_NET_ADMIN)", err)
	}
	return err
}
