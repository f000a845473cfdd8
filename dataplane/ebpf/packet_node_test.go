//go:build linux

package ebpf

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/test/netns"
)

// The node of the packet tests, and who it knows. Programs are run on it one
// packet at a time and not attached, so that nothing else is counted.
//
//	             node 192.0.2.11                       peers
//	flannel.1 ─ 10.244.1.0/24          blue   192.0.2.12  10.244.2.0/24, 10.244.20.0/24
//	eth0 ────── 192.0.2.0/24 ── wire   green  192.0.2.13  10.244.3.0/24
//	eth1 ────── 198.51.100.0/24        far    203.0.113.9 10.244.9.0/24 (no route)
//	                                   side   198.51.100.9 10.244.8.0/24 (by eth1)
const (
	ourIP     = "192.0.2.11"
	ourMAC    = "0a:58:0a:f4:01:00"
	uplinkMAC = "02:00:00:00:00:11"
	wireMAC   = "02:00:00:00:00:fe"

	blueIP   = "192.0.2.12"
	blueMAC  = "0a:58:0a:f4:02:00"
	greenIP  = "192.0.2.13"
	greenMAC = "0a:58:0a:f4:03:00"
	farIP    = "203.0.113.9"
	farMAC   = "0a:58:0a:f4:09:00"
	sideIP   = "198.51.100.9"
	sideMAC  = "0a:58:0a:f4:08:00"

	strangerIP = "192.0.2.99" // no peer
	ourPod     = "10.244.1.5"
	bluePod    = "10.244.2.7"
	greenPod   = "10.244.3.7"
	farPod     = "10.244.9.7"
	sidePod    = "10.244.8.7"
)

func knownPeers() []state.Peer {
	peer := func(node, prefix, ip, mac string) state.Peer {
		return state.Peer{
			Node: node, Prefix: netip.MustParsePrefix(prefix), PublicIP: addr(ip), MAC: state.MAC(mustMAC(mac)),
		}
	}
	return []state.Peer{
		peer("blue", "10.244.2.0/24", blueIP, blueMAC),
		peer("blue", "10.244.20.0/24", blueIP, blueMAC),
		peer("green", "10.244.3.0/24", greenIP, greenMAC),
		peer("far", "10.244.9.0/24", farIP, farMAC),
		peer("side", "10.244.8.0/24", sideIP, sideMAC),
	}
}

type node struct {
	*netns.NS
	tb              *testing.T
	accel           *Accelerator
	desired         Desired
	runtime         weftInForce // as Sync wrote it
	uplink, overlay uint32
	overlay6        uint32 // 0: the node has no IPv6
	*express               // nil: no pods on the node
}

func newNode(tb *testing.T) *node {
	tb.Helper()
	n := &node{NS: netns.New(tb), tb: tb}
	n.Run(
		tb,
		"ip link set lo up",
		"ip link add eth0 address "+uplinkMAC+" type veth peer name wire address "+wireMAC,
		"ip link set eth0 up",
		"ip link set wire up",
		"ip addr add 192.0.2.11/24 dev eth0",
		"ip link add eth1 type veth peer name wire1",
		"ip link set eth1 up",
		"ip link set wire1 up",
		"ip addr add 198.51.100.11/24 dev eth1",
		"ip link add flannel.1 address "+ourMAC+" type vxlan id 1 local 192.0.2.11 dev eth0 dstport 8472 nolearning",
		"ip link set flannel.1 up",
		"sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.lo.forwarding=1",
	)
	// Nobody answers on the wire, so who is there is said once and for all.
	for _, ip := range []string{blueIP, greenIP, "192.0.2.14", "192.0.2.1"} {
		n.Run(tb, "ip neigh add "+ip+" lladdr "+wireMAC+" dev eth0 nud permanent")
	}
	n.MustDo(tb, func() (err error) {
		n.uplink, n.overlay = uint32(interfaceIndex("eth0")), uint32(interfaceIndex("flannel.1"))
		n.accel, err = Open(Options{PinDir: filepath.Join(mustBPFFS(tb), "weft"), MaxPeers: 16, VNI: 1, Port: 8472})
		return err
	})
	tb.Cleanup(func() { n.accel.Close() })
	n.accel.attach = func(s site, _ *ebpf.Program, _ string) (attachment, error) { return attachment{site: s}, nil }
	n.desired = Desired{
		Uplink: int(n.uplink), Overlay: int(n.overlay),
		Local: addr(ourIP), MAC: state.MAC(mustMAC(ourMAC)),
		SourceCheck: "observe", Peers: knownPeers(),
	}
	n.sync()
	return n
}

// sync hands over what is desired, and remembers what is then in force.
func (n *node) sync() (misfits Misfits) {
	n.tb.Helper()
	n.MustDo(n.tb, func() (err error) {
		misfits, err = n.accel.Sync(n.desired)
		return err
	})
	if err := n.accel.objects.Runtime.Lookup(uint32(0), &n.runtime); err != nil {
		n.tb.Fatal(err)
	}
	return misfits
}

// reset brings the node to where every packet of a known peer is taken: all as
// Sync wrote it, every peer freshly proven, no aggregate remembered.
func (n *node) reset() {
	n.tb.Helper()
	n.refresh()
	if n.express != nil {
		n.resetExpress()
	}
}

// refresh is reset for a node whose flows go on.
func (n *node) refresh() {
	n.tb.Helper()
	n.inForce(func(*weftInForce) {})
	n.put(n.accel.objects.Devices, uint32(weftDeviceDEVICE_OVERLAY), n.overlay)
	n.put(n.accel.objects.Devices, uint32(weftDeviceDEVICE_UPLINK), n.uplink)
	n.setAggregates(n.accel.objects.TxAggregates, 0)
	n.setAggregates(n.accel.objects.RxAggregates, 0)
	for _, ip := range []string{blueIP, greenIP, farIP, sideIP} {
		n.peerState(ip, func(s *weftPeerState) { *s = weftPeerState{RxProven: fresh(), TxProven: fresh()} })
	}
	n.setAggregates(n.accel.objects.LeftFlows, 0)
	n.put(n.accel.objects.NotesRead, uint32(0), fresh())
}

// inForce changes what Sync wrote to the map runtime.
func (n *node) inForce(change func(*weftInForce)) {
	n.tb.Helper()
	now := n.runtime
	change(&now)
	n.put(n.accel.objects.Runtime, uint32(0), now)
}

// peerState changes what the programs know of a peer node, and returns it as
// it is then.
func (n *node) peerState(ip string, change func(*weftPeerState)) weftPeerState {
	n.tb.Helper()
	var s weftPeerState
	slot := n.slot(ip)
	if err := n.accel.objects.PeerStates.Lookup(slot, &s); err != nil {
		n.tb.Fatal(err)
	}
	if change != nil {
		change(&s)
		n.put(n.accel.objects.PeerStates, slot, s)
	}
	return s
}

func (n *node) slot(ip string) uint32 {
	n.tb.Helper()
	slot, ok := n.accel.slots.byIP[addr(ip)]
	if !ok {
		n.tb.Fatalf("%s has no slot", ip)
	}
	return slot
}

// setAggregates writes when every flow last had an aggregate.
func (n *node) setAggregates(m *ebpf.Map, when uint64) {
	n.tb.Helper()
	keys, values := make([]uint32, m.MaxEntries()), make([]uint64, m.MaxEntries())
	for i := range keys {
		keys[i], values[i] = uint32(i), when
	}
	if _, err := m.BatchUpdate(keys, values, nil); err != nil {
		n.tb.Fatalf("writing a map of aggregates: %v", err)
	}
}

func (n *node) put(m *ebpf.Map, key, value any) {
	n.tb.Helper()
	// A device map takes the interface indexes of the writer's namespace.
	n.MustDo(n.tb, func() error { return m.Put(key, value) })
}

// fresh is when something was seen that does not grow old during a test, for
// which a slow machine takes seconds: to the programs what is to come is now.
func fresh() uint64 { return coarseNow() + uint64(30*time.Second) }

func ago(d time.Duration) uint64 { return coarseNow() - uint64(d) }

// skBuff is struct __sk_buff of linux/bpf.h.
type skBuff struct {
	Len, PktType, Mark, QueueMapping, Protocol     uint32
	VLANPresent, VLANTCI, VLANProto                uint32
	Priority, IngressIfindex, Ifindex, TCIndex     uint32
	CB                                             [5]uint32
	Hash, TCClassid, Data, DataEnd, NAPIID, Family uint32
	RemoteIP4, LocalIP4                            uint32
	RemoteIP6, LocalIP6                            [4]uint32
	RemotePort, LocalPort, DataMeta                uint32
	FlowKeys, Tstamp                               uint64
	WireLen, GSOSegs                               uint32
	Sk                                             uint64
	GSOSize, TstampType                            uint32
	HWTstamp                                       uint64
}

// Verdicts.
const (
	passed     = -1 // TCX_NEXT
	dropped    = 2  // TCX_DROP
	redirected = 7  // TC_ACT_REDIRECT
)

// checksumComplete is BPF_F_TEST_SKB_CHECKSUM_COMPLETE of Linux 6.11: the packet
// has the checksum that a network card computes over all of it, and the kernel
// refuses (EBADMSG) when it is wrong afterwards.
const checksumComplete = 1 << 2

// tcPrograms by their place.
type tcProgram string

const (
	uplinkIn   tcProgram = "uplink_in"
	uplinkOut  tcProgram = "uplink_out"
	overlayIn  tcProgram = "overlay_in"
	overlayOut tcProgram = "overlay_out"
	podIn      tcProgram = "pod_in"
	podOut     tcProgram = "pod_out"

	overlay6In  tcProgram = "overlay6_in"
	overlay6Out tcProgram = "overlay6_out"
)

// outcome is what became of a packet, and what was counted for it.
type outcome struct {
	verdict int
	packet  []byte
	skb     skBuff
	passed  map[string]uint64 // reason → packets
	dropped map[string]uint64
	paths   map[string]PathCounters // "public IP path" → what was counted
}

// run sends one packet through a program. with changes the context: the device
// is the one where the program sits.
func (n *node) run(name tcProgram, data []byte, with ...func(*skBuff)) outcome {
	n.tb.Helper()
	return n.runProgram(n.accel.program(string(name)), name, data, 0, with...)
}

func (n *node) runProgram(prog *ebpf.Program, name tcProgram, data []byte, flags uint32, with ...func(*skBuff)) outcome {
	n.tb.Helper()
	in := skBuff{Ifindex: n.uplink}
	switch name {
	case overlayIn, overlayOut:
		in.Ifindex = n.overlay
	case overlay6In, overlay6Out:
		in.Ifindex = n.overlay6
	case podIn, podOut:
		in.Ifindex = n.veth
	}
	for _, change := range with {
		change(&in)
	}
	opts := &ebpf.RunOptions{Data: data, DataOut: make([]byte, len(data)+256), Context: in, Flags: flags}
	out := outcome{}
	opts.ContextOut = &out.skb
	before := n.count()
	n.MustDo(n.tb, func() error {
		verdict, err := prog.Run(opts)
		out.verdict = int(int32(verdict))
		if err != nil {
			return fmt.Errorf("running %s: %w", name, err)
		}
		return nil
	})
	after := n.count()
	out.packet = opts.DataOut
	out.passed = difference(after.passed, before.passed)
	out.dropped = difference(after.dropped, before.dropped)
	out.paths = map[string]PathCounters{}
	for key, now := range after.paths {
		was := before.paths[key]
		delta := PathCounters{
			now.TxPackets - was.TxPackets, now.TxBytes - was.TxBytes,
			now.RxPackets - was.RxPackets, now.RxBytes - was.RxBytes,
		}
		if delta != (PathCounters{}) {
			out.paths[key] = delta
		}
	}
	return out
}

type counts struct {
	passed, dropped map[string]uint64
	paths           map[string]PathCounters
}

// count reads all counters of the node.
func (n *node) count() counts {
	n.tb.Helper()
	c := counts{map[string]uint64{}, map[string]uint64{}, map[string]PathCounters{}}
	view := n.accel.View()
	reasons, err := view.ReasonCounts()
	if err != nil {
		n.tb.Fatal(err)
	}
	for _, r := range reasons {
		c.passed[r.Name], c.dropped[r.Name] = r.Passed, r.Dropped
	}
	peers, err := view.Peers()
	if err != nil {
		n.tb.Fatal(err)
	}
	for _, p := range peers {
		for i, counters := range p.Paths {
			c.paths[p.PublicIP.String()+" "+PathNames[i]] = counters
		}
	}
	return c
}

func difference(after, before map[string]uint64) map[string]uint64 {
	delta := maps.Clone(after)
	for key := range delta {
		delta[key] -= before[key]
	}
	maps.DeleteFunc(delta, func(_ string, n uint64) bool { return n == 0 })
	return delta
}

// setSysctl writes a sysctl of the node whose value has blanks in it.
func (n *node) setSysctl(name, value string) {
	n.tb.Helper()
	n.MustDo(n.tb, func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644) })
}

// mustKnowChecksumComplete skips where the kernel can't run a program on a
// packet with the checksum of a network card (before Linux 6.11).
func (n *node) mustKnowChecksumComplete() {
	n.tb.Helper()
	err := n.Do(func() error {
		_, err := n.accel.objects.UplinkOut.Run(&ebpf.RunOptions{Data: make([]byte, 64), Flags: checksumComplete})
		return err
	})
	if errors.Is(err, unix.EINVAL) {
		n.tb.Skip("needs BPF_F_TEST_SKB_CHECKSUM_COMPLETE (Linux 6.11)")
	}
	if err != nil {
		n.tb.Fatal(err)
	}
}
