//go:build linux

package verdicts

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

const (
	// headSize is how much of a message is read: its header, and of the rest
	// what tells a device's message from a bridge port's.
	headSize = unix.NLMSG_HDRLEN + 4
	// receiveSize is asked for as the size of a socket's queue in bytes. An
	// event takes some 800 of them.
	receiveSize = 2 << 20
	// drainTime bounds the reading of one socket where events come faster than
	// they are read.
	drainTime = 10 * time.Millisecond
)

// subscription is what one socket hears.
type subscription struct {
	protocol int
	groups   []int
	// kind tells what a message is about, from its first bytes.
	kind func(head []byte) Changes
	// filter lets the kernel drop what need not be heard.
	filter []unix.SockFilter
	// optional says that a kernel may have been built without.
	optional bool
}

// Groups of NETLINK_XFRM (enum xfrm_nlgroups in linux/xfrm.h). A policy or
// state that ends by its lifetime is told to the second only.
const (
	xfrmGroupExpire  = 2
	xfrmGroupSA      = 3
	xfrmGroupPolicy  = 4
	xfrmGroupMigrate = 7
)

var subscriptions = []subscription{{
	protocol: unix.NETLINK_ROUTE,
	groups: []int{
		unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
		unix.RTNLGRP_NEXTHOP,
		unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
	},
	kind: routeKind,
}, {
	protocol: unix.NETLINK_NETFILTER,
	groups:   []int{unix.NFNLGRP_NFTABLES},
	kind:     func([]byte) Changes { return Nftables },
	filter:   transactionsOnce,
	optional: true,
}, {
	protocol: unix.NETLINK_XFRM,
	groups:   []int{xfrmGroupExpire, xfrmGroupSA, xfrmGroupPolicy, xfrmGroupMigrate},
	kind:     func([]byte) Changes { return XFRM },
	optional: true,
}}

// routeKind reads an event of rtnetlink.
func routeKind(head []byte) Changes {
	switch native.Uint16(head[4:]) {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return Routes
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return Rules
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		return Nexthops
	case unix.RTM_NEWNETCONF, unix.RTM_DELNETCONF:
		return Forwarding
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if head[unix.NLMSG_HDRLEN] == unix.AF_UNSPEC { // of AF_BRIDGE: a bridge's port
			return Links
		}
	}
	return 0
}

// transactionsOnce is a filter that drops the messages about rules, chains, sets
// and elements. They come by the thousand, and all in transactions, whose last
// message (NFT_MSG_NEWGEN) comes through, as does what the kernel tells outside
// of transactions. Of a datagram the first message is looked at: a transaction
// shares none with others, and its last message has one of its own.
var transactionsOnce = rtnl.DropFilter(
	ofNftables(unix.NFT_MSG_NEWCHAIN), ofNftables(unix.NFT_MSG_DELCHAIN),
	ofNftables(unix.NFT_MSG_NEWRULE), ofNftables(unix.NFT_MSG_DELRULE),
	ofNftables(unix.NFT_MSG_NEWSET), ofNftables(unix.NFT_MSG_DELSET),
	ofNftables(unix.NFT_MSG_NEWSETELEM), ofNftables(unix.NFT_MSG_DELSETELEM),
)

// ofNftables matches messages of nftables of a kind.
func ofNftables(kind uint16) []rtnl.Match {
	return []rtnl.Match{rtnl.Kind(unix.NFNL_SUBSYS_NFTABLES<<8 | kind)}
}

// socket hears the events of the namespace it was opened in.
type socket struct {
	subscription

	file *os.File
	conn syscall.RawConn
}

// subscribe opens a socket in the namespace of the calling thread.
func subscribe(s subscription) (_ *socket, err error) {
	// It blocks, as far as the runtime knows: the watcher waits for all at once.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, s.protocol)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	opened := &socket{subscription: s, file: os.NewFile(uintptr(fd), "netlink")}
	defer func() {
		if err != nil {
			opened.close()
		}
	}()
	if opened.conn, err = opened.file.SyscallConn(); err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	if s.filter != nil {
		rtnl.SetFilter(fd, s.filter)
	}
	// More than the machine's limit needs CAP_NET_ADMIN, which the groups need too.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveSize)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("binding a netlink socket: %w", err)
	}
	return opened, opened.join()
}

// join joins the groups; being in one already is no error.
func (s *socket) join() error {
	if err := s.eachGroup(unix.NETLINK_ADD_MEMBERSHIP); err != nil {
		return fmt.Errorf("joining netlink groups: %w", err)
	}
	return nil
}

// leave leaves the groups: what happens from now on is not heard.
func (s *socket) leave() error {
	if err := s.eachGroup(unix.NETLINK_DROP_MEMBERSHIP); err != nil {
		return fmt.Errorf("leaving netlink groups: %w", err)
	}
	return nil
}

// eachGroup sets a socket option for each of the groups.
func (s *socket) eachGroup(option int) error {
	var setErr error
	err := s.conn.Control(func(fd uintptr) {
		for _, group := range s.groups {
			if setErr = unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, option, group); setErr != nil {
				return
			}
		}
	})
	return cmp.Or(err, setErr)
}

// close ends the socket.
func (s *socket) close() { _ = s.file.Close() }

// drain reads what lies in the queue, and returns what it was about. It leaves
// some where more comes than it can read, and never with an empty result.
func (s *socket) drain() (Changes, error) {
	var changes Changes
	var readErr error
	err := s.conn.Control(func(fd uintptr) {
		head := make([]byte, headSize)
		begin := time.Now()
		for changes == 0 || time.Since(begin) < drainTime {
			n, from, err := unix.Recvfrom(int(fd), head, unix.MSG_DONTWAIT)
			switch {
			case errors.Is(err, unix.EAGAIN):
				return
			case errors.Is(err, unix.EINTR):
			case errors.Is(err, unix.ENOBUFS):
				changes |= Overrun
			case err != nil:
				readErr = fmt.Errorf("reading a netlink socket: %w", err)
				return
			case n == headSize && fromKernel(from):
				changes |= s.kind(head)
			}
		}
	})
	return changes, cmp.Or(err, readErr)
}

func fromKernel(from unix.Sockaddr) bool {
	a, ok := from.(*unix.SockaddrNetlink)
	return ok && a.Pid == 0
}
