//go:build linux

package ebpf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// What the wire brings, whatever it is, ends as it does without a program in the
// driver: the same bytes at the same receivers, and as much of each peer's counted.
// Which of the two has dropped a packet, and why, may differ; and what the driver
// strips need not take the kernel's path.
func TestRandomPacketsEndAsWithoutTheDriver(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	alone, pair := newCatching(t, false), newCatching(t, true)

	var frames, stripped int
	seen := map[string]uint64{}
	for range 12 {
		batch := make([][]byte, 200) // a veth takes 256 at once
		for i := range batch {
			batch[i] = randomArrival(random, alone.arriving[random.IntN(len(alone.arriving))])
		}
		before := pair.stripped()
		was, is := alone.catch(batch), pair.catch(batch)
		frames += len(batch)
		stripped += int(pair.stripped() - before)
		for _, c := range []struct {
			what    string
			was, is []string
		}{
			{"at the pod", was.pod, is.pod},
			{"at the host", was.host, is.host},
			{"counted", was.peers, is.peers},
		} {
			if missing, more := less(c.was, c.is), less(c.is, c.was); len(missing)+len(more) > 0 {
				t.Errorf("%s: with the driver are missing\n     %q\nand there are in their place\n     %q", c.what, missing, more)
			}
		}
		seen["at the pod"] += uint64(len(is.pod))
		seen["at the host"] += uint64(len(is.host))
		for _, path := range PathNames {
			seen[path] += is.paths[path]
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("of %d frames the driver has stripped %d; %v", frames, stripped, seen)
	for what, n := range seen {
		if n < uint64(frames)/50 {
			t.Errorf("%s: only %d of %d frames", what, n, frames)
		}
	}
	if stripped < frames/5 {
		t.Errorf("only %d of %d frames were stripped", stripped, frames)
	}
}

// catchRoom is more than a socket gets of one batch of frames, in bytes.
const catchRoom = 8 << 20

// catching is a live node that sees all that is received, and flows that are
// established with its pod. Nobody answers.
type catching struct {
	*liveNode
	wire, inside *tap
	host         []int // raw sockets
	arriving     []flow
}

func newCatching(t *testing.T, xdp bool) *catching {
	t.Helper()
	// GRO verifies checksums that nobody has: then hardly any packet is the kernel's.
	c := &catching{liveNode: newLiveAt(t, xdp, "a ethtool -K eth0 gro off")}
	for _, ns := range []*netns.NS{c.b, c.pod} {
		ns.Run(t, "nft add table ip silent", "nft add chain ip silent out { type filter hook output priority 0 ; policy drop ; }")
	}
	c.wire, c.inside = mustTap(t, c.b, "eth0"), mustTap(t, c.pod, "eth0")
	if err := unix.SetsockoptInt(c.inside.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, catchRoom); err != nil {
		t.Fatal(err)
	}
	for _, protocol := range []int{unix.IPPROTO_UDP, unix.IPPROTO_TCP, unix.IPPROTO_ICMP} {
		c.MustDo(t, func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
			if err == nil {
				c.host = append(c.host, fd)
				err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, catchRoom)
			}
			return err
		})
	}
	t.Cleanup(func() {
		for _, fd := range c.host {
			unix.Close(fd)
		}
	})
	ours := []flow{ourTCP, ourUDP, viaService, viaServiceUDP}
	c.Run(t, "nft flush chain ip live dstnat")
	c.translate(ours...)
	for _, f := range ours {
		c.establish(f)
		c.arriving = append(c.arriving, f.answers())
	}
	return c
}

// establish lets a flow of our pod's begin, by the packets that would.
func (c *catching) establish(f flow) {
	c.tb.Helper()
	gateway := net.HardwareAddr(c.gate[:]).String()
	f.begin(func(way flow, tcp []byte) {
		var came []byte
		if way == f {
			c.inside.send(way.first(podMAC, gateway, tcp))
			came = c.wire.next(soon, isVXLAN)
		} else {
			c.wire.send(carriedFrame(way.first(blueMAC, ourMAC, tcp)).bytes(c.tb))
			came = c.inside.next(soon, isIPv4)
		}
		if came == nil {
			c.tb.Fatalf("a packet of %+v did not come through", way)
		}
	})
	if f.protocol == unix.IPPROTO_UDP {
		// As after two seconds; and no slow machine is to see it expire.
		c.entry(f, withStatus(ipsConfirmed|ipsSeenReply|ipsAssured), withTimeout(3600))
	}
}

// caught is what was received, and what was counted of each peer by whatever path.
type caught struct {
	pod, host, peers []string
	paths            map[string]uint64 // of all peers
}

// catch lets frames arrive, at a node whose peers are proven and whose flows are
// witnessed.
func (c *catching) catch(frames [][]byte) (all caught) {
	c.tb.Helper()
	c.refresh()
	c.witnessed(c.arriving...)
	got := c.during(func() {
		for _, frame := range frames {
			c.wire.sendAs(frame, uint16(frame[12])<<8|uint16(frame[13]))
		}
		for frame := c.inside.next(never, isIPv4); frame != nil; frame = c.inside.next(never/4, isIPv4) {
			if !bytes.Equal(frame[:6], mustMAC(podMAC)) || !bytes.Equal(frame[6:12], c.gate[:]) {
				c.tb.Errorf("the pod got a frame that is not its own: %x", frame)
			}
			all.pod = append(all.pod, fmt.Sprintf("%x", frame[14:]))
		}
	})
	for _, fd := range c.host {
		buffer := make([]byte, 1<<16)
		for {
			n, _, err := unix.Recvfrom(fd, buffer, 0)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				c.tb.Fatal(err)
			}
			// What is still encapsulated is received by nobody yet.
			if !toVXLANPort(buffer[:n]) {
				all.host = append(all.host, fmt.Sprintf("%x", buffer[:n]))
			}
		}
	}
	all.paths = map[string]uint64{}
	peers := map[string]PathCounters{}
	for key, counters := range got.paths {
		peer, path, _ := strings.Cut(key, " ")
		all.paths[path] += counters.RxPackets
		sum := peers[peer]
		sum.RxPackets += counters.RxPackets
		sum.RxBytes += counters.RxBytes
		peers[peer] = sum
	}
	for _, peer := range slices.Sorted(maps.Keys(peers)) {
		all.peers = append(all.peers, fmt.Sprintf("%s: %+v", peer, peers[peer]))
	}
	return all
}

func toVXLANPort(ip []byte) bool {
	udp := ip[ip[0]&15*4:]
	return ip[9] == unix.IPPROTO_UDP && len(udp) >= 8 && binary.BigEndian.Uint16(udp[2:]) == 8472
}

// less is what there is in all but not in some, as often as it is more often there.
func less(all, some []string) (rest []string) {
	have := map[string]int{}
	for _, s := range some {
		have[s]++
	}
	for _, s := range all {
		if have[s]--; have[s] < 0 {
			rest = append(rest, s)
		}
	}
	return rest
}

// randomArrival is a packet of a flow, or one that is nearly it, as the wire may
// bring it.
func randomArrival(random *rand.Rand, f flow) []byte {
	once := func(in int) bool { return random.IntN(in) == 0 }
	pick := func(most string, others ...string) string {
		if len(others) > 0 && once(10) {
			return others[random.IntN(len(others))]
		}
		return most
	}
	header := func(ip *layers.IPv4) {
		ip.TOS, ip.TTL, ip.Id = uint8(random.Uint32()), uint8(random.Uint32()), uint16(random.Uint32())
		if once(2) {
			ip.Flags |= layers.IPv4DontFragment
		}
		switch random.IntN(30) {
		case 0:
			firstFragment(ip)
		case 1:
			laterFragment(ip)
		case 2:
			recordRoute(ip)
		}
	}

	var inner []byte
	if once(3) {
		src, dst := pick(bluePod, "10.244.20.9", greenPod, blueIP, ourPod, strangerIP), pick(ourPod, "10.244.1.99", greenPod, ourIP)
		if once(3) {
			dst = "10.244.1.0"
		}
		p := eth(pick(blueMAC, greenMAC, ourMAC), pick(ourMAC, blueMAC, "ff:ff:ff:ff:ff:ff")).ip(src, dst, header)
		sport, dport := uint16(random.Uint32()), uint16(random.Uint32())
		switch random.IntN(5) {
		case 0:
			p = p.tcp(sport, dport, timestamps...)
		case 1:
			p = p.udp(sport, dport)
		case 2:
			p = p.udpWithoutChecksum(sport, dport)
		case 3:
			p = p.ping(sport)
		case 4:
			p = p.protocol(uint8(random.Uint32()))
		}
		inner = mustFrame(p.payload(random.IntN(1390)))
	} else {
		frame, _ := randomPacket(random, f)
		inner = frame(blueMAC, ourMAC)
	}
	inner = damaged(random, inner, 12)

	p := eth(wireMAC, pick(uplinkMAC, "02:00:00:00:00:99", "ff:ff:ff:ff:ff:ff")).ip(pick(blueIP, greenIP, strangerIP), ourIP, header)
	if port := uint16(random.Uint32()); once(2) {
		p = p.udp(port, 8472)
	} else {
		p = p.udpWithoutChecksum(port, 8472)
	}
	vni := uint32(1)
	if once(30) {
		vni = random.Uint32() >> 8
	}
	frame := damaged(random, mustFrame(p.vxlan(vni).raw(inner)), 8)
	return frame[:min(len(frame), 14+1500)] // what is longer does not leave
}

// damaged is a frame of which one in so many is not what it was: a byte differs
// (the IP header's checksum may be right for it), or the end is missing or too long.
func damaged(random *rand.Rand, frame []byte, in int) []byte {
	if random.IntN(in) != 0 {
		return frame
	}
	switch at := random.IntN(min(len(frame), 70)); random.IntN(4) {
	case 0:
		return frame[:14+random.IntN(len(frame)-14)]
	case 1:
		return trailer(1 + random.IntN(20))(frame)
	case 2:
		frame[at] ^= byte(1 + random.IntN(255))
	default:
		if at = random.IntN(20); len(frame) >= 34 {
			frame = setIP(atIP, at, frame[atIP+at]^byte(1+random.IntN(255)))(frame)
		}
	}
	return frame
}
