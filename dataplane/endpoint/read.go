//go:build linux

package endpoint

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/internal/rtnl"
)

// read looks at all there is to judge.
//
// In what order it looks at a pod makes it certain: the number of the
// namespace comes from the host's end of the veth, then that namespace is
// asked for addresses, and at last for the other end, which must name the
// host's end in turn. If it does, the namespace was there from the first
// question to the last, and so its number was its own. Else the number may
// have passed to the next pod, with the same address perhaps.
func (f *Finder) read(prefixes []netip.Prefix) (seen, error) {
	var s seen
	var err error
	if s.links, err = f.readLinks(); err != nil {
		return s, err
	}
	if s.addrs, err = f.readAddresses(); err != nil {
		return s, err
	}
	cands := candidates(s, prefixes)
	if s.pods, err = f.readPods(cands, prefixes); err != nil {
		return s, err
	}
	var claimed []netip.Addr
	var pods []candidate // those that have anything to lose
	for _, c := range cands {
		claims := s.pods[c.veth.index].claims(prefixes)
		claimed = append(claimed, claims...)
		if len(claims) > 0 {
			pods = append(pods, c)
		}
	}
	if s.routes, err = f.readRoutes(claimed); err != nil {
		return s, err
	}
	s.foreign, err = f.readForeign(pods, s.links)
	return s, err
}

// readLinks reads the devices of the host's namespace.
func (f *Finder) readLinks() (links []device, err error) {
	err = f.socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			return rtnl.NewRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP, make([]byte, unix.SizeofIfInfomsg)...).
				Uint32(unix.IFLA_EXT_MASK, extSkipStats)
		},
		unix.RTM_NEWLINK,
		func() { links = nil },
		func(data []byte) {
			if l, _, ok := parseLink(data); ok {
				links = append(links, l)
			}
		},
	)
	if err != nil {
		return nil, fmt.Errorf("reading links: %w", err)
	}
	return links, nil
}

// readAddresses reads the addresses of the host's namespace.
func (f *Finder) readAddresses() (addrs []address, err error) {
	err = f.socket.Dump(
		rtnl.DumpTries,
		func() *rtnl.Request {
			return rtnl.NewRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP, ifaddrmsg(unix.AF_UNSPEC, 0)...)
		},
		unix.RTM_NEWADDR,
		func() { addrs = nil },
		func(data []byte) {
			if a, _, _, ok := parseAddress(data); ok {
				addrs = append(addrs, a)
			}
		},
	)
	if err != nil {
		return nil, fmt.Errorf("reading addresses: %w", err)
	}
	return addrs, nil
}

// ifaddrmsg is struct ifaddrmsg of linux/if_addr.h.
func ifaddrmsg(family byte, index int) []byte {
	return binary.NativeEndian.AppendUint32([]byte{family, 0, 0, 0}, uint32(index))
}

// families are the address families of the prefixes.
func families(prefixes []netip.Prefix) (out []byte) {
	for _, p := range prefixes {
		family := byte(unix.AF_INET6)
		if p.Addr().Is4() {
			family = unix.AF_INET
		}
		if !slices.Contains(out, family) {
			out = append(out, family)
		}
	}
	return out
}

// readPods asks the namespaces at the other ends, by index of the veth.
func (f *Finder) readPods(cands []candidate, prefixes []netip.Prefix) (map[int]pod, error) {
	pods := make(map[int]pod, len(cands))
	results := sync.OnceValue(f.results)
	var asked []candidate
	var requests []*rtnl.Request
	for _, c := range cands {
		if c.veth.netns == unknownNamespace {
			pods[c.veth.index] = pod{problem: problemGone}
			continue
		}
		addrs, err := f.readPodAddresses(c.veth, families(prefixes))
		switch {
		case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
			pods[c.veth.index] = refusedPod(c.veth, results())
		case errors.Is(err, rtnl.ErrInterrupted):
			pods[c.veth.index] = pod{problem: problemRestless}
		case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV):
			// The kernel knows no such namespace, or no such device in it.
			pods[c.veth.index] = pod{problem: problemGone}
		case err != nil:
			return nil, fmt.Errorf("reading the addresses of the pod of %s: %w", c.veth.name, err)
		default:
			pods[c.veth.index] = pod{addrs: addrs}
			asked = append(asked, c)
			requests = append(requests, peerRequest(c.veth))
		}
	}
	err := f.socket.Ask(requests, func(i int, data []byte, refusal error) {
		veth := asked[i].veth
		p := pods[veth.index]
		peer, target, ok := parseLink(data)
		switch {
		case refusal != nil || !ok || target != veth.netns || peer.kind != "veth" || peer.index != veth.peer || peer.peer != veth.index:
			p = pod{problem: problemGone}
		default:
			p.end = peer
		}
		pods[veth.index] = p
	})
	if err != nil {
		return nil, fmt.Errorf("reading the pods' ends: %w", err)
	}
	return pods, f.checkBackLinks(pods)
}

// results are the CNI plugins' results. Without them, none is.
func (f *Finder) results() map[string][]cniResult {
	if f.opts.ResultsDir == "" {
		return nil
	}
	results, err := readResults(os.DirFS(f.opts.ResultsDir))
	if err != nil {
		f.opts.Log.Debug("no CNI results", "err", err)
	}
	return results
}

// refusedPod is a pod that the kernel would not show.
func refusedPod(veth device, results map[string][]cniResult) pod {
	if p, ok := podOf(veth, results); ok {
		return p
	}
	return pod{problem: problemRefused}
}

// peerRequest asks for the other end of a veth.
func peerRequest(veth device) *rtnl.Request {
	fixed := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(fixed[4:], uint32(veth.peer))
	return rtnl.NewRequest(unix.RTM_GETLINK, 0, fixed...).
		Uint32(unix.IFLA_TARGET_NETNSID, uint32(veth.netns)).
		Uint32(unix.IFLA_EXT_MASK, extSkipStats)
}

// errOtherNamespace says that the kernel has answered for another namespace
// than it was asked for, as old ones do.
var errOtherNamespace = errors.New("the kernel does not show other namespaces; 4.20 or newer is needed")

// podTries is how often the dump of what a pod can change is read until no
// change has come between: it shall not keep us.
const podTries = 3

// readPodAddresses reads the addresses of the other end of a veth.
func (f *Finder) readPodAddresses(veth device, families []byte) ([]netip.Addr, error) {
	var all []netip.Addr
	for _, family := range families {
		var addrs []netip.Addr
		var other bool
		err := f.socket.Dump(
			podTries,
			func() *rtnl.Request {
				return rtnl.NewRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP, ifaddrmsg(family, veth.peer)...).
					Uint32(unix.IFA_TARGET_NETNSID, uint32(veth.netns))
			},
			unix.RTM_NEWADDR,
			func() { addrs, other = nil, false },
			func(data []byte) {
				a, target, usable, ok := parseAddress(data)
				other = other || target != veth.netns
				if ok && usable && a.index == veth.peer {
					addrs = append(addrs, a.prefix.Addr())
				}
			},
		)
		if err == nil && other {
			err = errOtherNamespace
		}
		if err != nil {
			return nil, err
		}
		all = append(all, addrs...)
	}
	return all, nil
}

// checkBackLinks makes sure that the ends which name one of our veths mean our
// namespace: another one has devices of the same indexes.
func (f *Finder) checkBackLinks(pods map[int]pod) error {
	for veth, p := range pods {
		if p.problem != "" || p.cni || p.end.netns == f.self {
			continue
		}
		if f.self == noNamespace {
			// The kernel has numbered our namespace when it was first asked
			// for a link that leads here.
			self, err := f.readSelf()
			if err != nil {
				return err
			}
			f.self = self
		}
		if p.end.netns != f.self || f.self == unknownNamespace {
			pods[veth] = pod{problem: problemGone}
		}
	}
	return nil
}

// readSelf asks for the number that our namespace has for itself.
func (f *Finder) readSelf() (int, error) {
	self := noNamespace
	r := rtnl.NewRequest(unix.RTM_GETNSID, 0, make([]byte, sizeofRtGenMsg)...).
		Uint32(unix.NETNSA_FD, uint32(f.namespace.Fd()))
	var refused error
	err := f.socket.Ask([]*rtnl.Request{r}, func(_ int, data []byte, refusal error) {
		if refused = refusal; refusal != nil || len(data) < sizeofRtGenMsg {
			return
		}
		for attr, value := range rtnl.Attributes(data[sizeofRtGenMsg:]) {
			if attr == unix.NETNSA_NSID {
				self = int(int32(rtnl.Uint32(value)))
			}
		}
	})
	if err = cmp.Or(err, refused); err != nil {
		return noNamespace, fmt.Errorf("asking for the number of our own namespace: %w", err)
	}
	return self, nil
}

// readRoutes asks where the kernel sends packets for some addresses. One
// without a route is left out.
func (f *Finder) readRoutes(addrs []netip.Addr) (map[netip.Addr]route, error) {
	routes := make(map[netip.Addr]route, len(addrs))
	requests := make([]*rtnl.Request, len(addrs))
	for i, a := range addrs {
		fixed := make([]byte, unix.SizeofRtMsg)
		fixed[0], fixed[1] = unix.AF_INET, byte(a.BitLen())
		if a.Is6() {
			fixed[0] = unix.AF_INET6
		}
		// The route as the table has it, and not what a packet makes of it.
		binary.NativeEndian.PutUint32(fixed[8:], unix.RTM_F_FIB_MATCH)
		requests[i] = rtnl.NewRequest(unix.RTM_GETROUTE, 0, fixed...).Attr(unix.RTA_DST, a.AsSlice())
	}
	err := f.socket.Ask(requests, func(i int, data []byte, refusal error) {
		if r, dst, ok := parseRoute(data); refusal == nil && ok && dst.Contains(addrs[i]) {
			routes[addrs[i]] = r
		}
	})
	if err != nil {
		return nil, fmt.Errorf("asking for routes: %w", err)
	}
	return routes, nil
}
