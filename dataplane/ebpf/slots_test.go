//go:build linux

package ebpf

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weft-net/weft/dataplane/state"
)

func nodeIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}) }

func TestNodeKeepsItsSlot(t *testing.T) {
	s, now := newSlots(4), time.Now()
	first, fresh, ok := s.get(nodeIP(1), now)
	if !ok || !fresh {
		t.Fatalf("fresh %v, ok %v; want a new slot", fresh, ok)
	}
	if again, fresh, ok := s.get(nodeIP(1), now); again != first || fresh || !ok {
		t.Errorf("slot %d (fresh %v, ok %v), want %d again", again, fresh, ok, first)
	}
	if other, _, _ := s.get(nodeIP(2), now); other == first {
		t.Errorf("two nodes have slot %d", first)
	}
}

func TestSlotsRunOut(t *testing.T) {
	s, now := newSlots(2), time.Now()
	s.get(nodeIP(1), now)
	s.get(nodeIP(2), now)
	if slot, _, ok := s.get(nodeIP(3), now); ok {
		t.Errorf("a third node got slot %d of two", slot)
	}
	if _, _, ok := s.get(nodeIP(1), now); !ok {
		t.Error("a node lost its slot because another wanted one")
	}
}

func TestFreedSlotRestsBeforeItIsGivenAgain(t *testing.T) {
	s, now := newSlots(1), time.Now()
	slot, _, _ := s.get(nodeIP(1), now)
	s.release(map[netip.Addr]bool{}, now)
	if _, _, ok := s.get(nodeIP(2), now.Add(slotRest-1)); ok {
		t.Error("a slot was given while a program may still count into it")
	}
	again, fresh, ok := s.get(nodeIP(2), now.Add(slotRest))
	if !ok || !fresh || again != slot {
		t.Errorf("slot %d (fresh %v, ok %v), want %d as new", again, fresh, ok, slot)
	}
}

func TestUnusedSlotsComeBeforeFreedOnes(t *testing.T) {
	s, now := newSlots(2), time.Now()
	freed, _, _ := s.get(nodeIP(1), now)
	s.release(map[netip.Addr]bool{}, now)
	if slot, _, ok := s.get(nodeIP(2), now.Add(time.Hour)); !ok || slot == freed {
		t.Errorf("slot %d (ok %v), want one never used", slot, ok)
	}
}

func TestNodeThatComesBackSoonGetsACleanSlot(t *testing.T) {
	s, now := newSlots(3), time.Now()
	s.get(nodeIP(1), now)
	s.release(map[netip.Addr]bool{}, now)
	if _, fresh, ok := s.get(nodeIP(1), now); !ok || !fresh {
		t.Errorf("fresh %v, ok %v; its old slot was given up, so it must be cleared", fresh, ok)
	}
}

func TestReleaseKeepsWhoIsWanted(t *testing.T) {
	s, now := newSlots(2), time.Now()
	kept, _, _ := s.get(nodeIP(1), now)
	s.get(nodeIP(2), now)
	s.release(map[netip.Addr]bool{nodeIP(1): true}, now)
	if slot, fresh, _ := s.get(nodeIP(1), now); slot != kept || fresh {
		t.Errorf("slot %d (fresh %v), want %d as it was", slot, fresh, kept)
	}
}

func TestAdoptedSlots(t *testing.T) {
	s, now := newSlots(3), time.Now()
	s.adopt(nodeIP(1), 0)
	s.adopt(nodeIP(2), 2)
	s.adopt(nodeIP(3), 2) // taken: the maps contradict themselves
	s.adopt(nodeIP(4), 3) // of a larger map
	for ip, want := range map[netip.Addr]uint32{nodeIP(1): 0, nodeIP(2): 2} {
		if slot, fresh, ok := s.get(ip, now); slot != want || fresh || !ok {
			t.Errorf("%v has slot %d (fresh %v, ok %v), want %d", ip, slot, fresh, ok, want)
		}
	}
	if slot, fresh, ok := s.get(nodeIP(3), now); slot != 1 || !fresh || !ok {
		t.Errorf("slot %d (fresh %v, ok %v), want the free one, 1", slot, fresh, ok)
	}
	if _, _, ok := s.get(nodeIP(4), now); ok {
		t.Error("a slot beyond the maps was given")
	}
}

// No two nodes ever share a slot, whatever comes and goes.
func TestSlotsAreNeverShared(t *testing.T) {
	s, now := newSlots(8), time.Now()
	for round := range 200 {
		now = now.Add(slotRest / 3)
		keep := map[netip.Addr]bool{}
		for i := range 20 {
			if (i*7+round)%5 < 2 {
				keep[nodeIP(i)] = true
			}
		}
		s.release(keep, now)
		owner := map[uint32]netip.Addr{}
		for ip := range keep {
			slot, _, ok := s.get(ip, now)
			if !ok {
				continue
			}
			if int(slot) >= s.size {
				t.Fatalf("round %d: slot %d of %d", round, slot, s.size)
			}
			if other, taken := owner[slot]; taken {
				t.Fatalf("round %d: %v and %v share slot %d", round, ip, other, slot)
			}
			owner[slot] = ip
		}
	}
}

func TestCommonLengths(t *testing.T) {
	for name, c := range map[string]struct {
		bits []int
		want []uint8
	}{
		"none":                                 {nil, []uint8{}},
		"one for all":                          {[]int{24, 24, 24}, []uint8{24}},
		"longest first":                        {[]int{24, 26, 16, 25}, []uint8{26, 25, 24, 16}},
		"the rarest is left out":               {[]int{24, 24, 25, 25, 26, 26, 27, 16, 16, 15, 15, 14, 14, 13, 13, 12, 12}, []uint8{26, 25, 24, 16, 15, 14, 13, 12}},
		"among equally rare ones the shortest": {[]int{16, 17, 18, 19, 20, 21, 22, 23, 24}, []uint8{24, 23, 22, 21, 20, 19, 18, 17}},
	} {
		t.Run(name, func(t *testing.T) {
			var peers []state.Peer
			for i, bits := range c.bits {
				peers = append(peers, state.Peer{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), bits)})
			}
			if got := commonLengths(peers); !slices.Equal(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

func TestPeersThatFitAndMisfits(t *testing.T) {
	peer := func(node int, prefix string) state.Peer {
		return state.Peer{
			Node: fmt.Sprint("n", node), Prefix: mustPrefix(prefix), PublicIP: nodeIP(node), MAC: state.MAC{2, 0, 0, 0, 0, byte(node)},
		}
	}
	for name, c := range map[string]struct {
		peers   []state.Peer
		misfits []int // indexes
		nodes   int
	}{
		"all fit": {peers: []state.Peer{peer(1, "10.244.1.0/24"), peer(2, "10.244.2.0/24")}, nodes: 2},
		"two prefixes of a node share its slot": {
			peers: []state.Peer{peer(1, "10.244.1.0/24"), peer(1, "10.244.9.0/24")}, nodes: 1,
		},
		"a ninth prefix length": {
			peers: []state.Peer{
				peer(1, "10.1.0.0/24"), peer(1, "10.2.0.0/25"), peer(1, "10.3.0.0/26"), peer(1, "10.4.0.0/27"),
				peer(1, "10.6.0.0/23"), peer(1, "10.8.0.0/22"), peer(1, "10.12.0.0/21"), peer(1, "10.16.0.0/20"), peer(2, "10.5.0.0/16"),
			},
			misfits: []int{8}, nodes: 1,
		},
		"more prefixes than the map has room for": {
			peers: []state.Peer{
				peer(1, "10.1.0.0/24"), peer(1, "10.2.0.0/24"), peer(1, "10.3.0.0/24"), peer(1, "10.4.0.0/24"),
				peer(1, "10.5.0.0/24"), peer(1, "10.6.0.0/24"), peer(1, "10.7.0.0/24"), peer(1, "10.8.0.0/24"),
				peer(1, "10.9.0.0/24"), peer(1, "10.10.0.0/24"),
			},
			misfits: []int{8, 9}, nodes: 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSlots(8)
			placed := place(&s, 8, c.peers, nil)
			wantPeers, wantNodes, fresh := placed.peers, placed.nodes, placed.fresh
			misfits := slices.Concat(placed.misfits.Unknown, placed.misfits.NoRoom)
			var want []state.Peer
			for _, i := range c.misfits {
				want = append(want, c.peers[i])
			}
			if !slices.Equal(misfits, want) {
				t.Errorf("misfits %v, want %v", misfits, want)
			}
			if len(wantPeers) != len(c.peers)-len(want) || len(wantNodes) != c.nodes || len(fresh) != c.nodes {
				t.Errorf("%d peers, %d nodes, %d fresh slots; want %d, %d, %d",
					len(wantPeers), len(wantNodes), len(fresh), len(c.peers)-len(want), c.nodes, c.nodes)
			}
			for i, p := range c.peers {
				got, ok := wantPeers[p.Prefix]
				if ok == slices.Contains(c.misfits, i) {
					t.Errorf("%v in the map: %v", p.Prefix, ok)
				}
				if ok && (got != member{remote: p.PublicIP, slot: got.slot, mac: p.MAC} ||
					wantNodes[p.PublicIP] != member{remote: p.PublicIP, slot: got.slot}) {
					t.Errorf("%v became %+v and %+v", p, got, wantNodes[p.PublicIP])
				}
			}
		})
	}
}

// A full set of peers is exchanged for another: the old ones make room, and
// what each node is told stays right.
func TestPeersAreExchangedInFullMaps(t *testing.T) {
	n := newNode(t)
	full := func(net byte) (peers []state.Peer) {
		for i := range byte(16) {
			peers = append(peers, state.Peer{
				Prefix:   netip.PrefixFrom(netip.AddrFrom4([4]byte{10, net, i, 0}), 24),
				PublicIP: netip.AddrFrom4([4]byte{192, 0, net, i + 1}), MAC: state.MAC{2, 0, 0, 0, net, i},
			})
		}
		return peers
	}
	for _, net := range []byte{1, 2, 1} {
		n.desired.Peers = full(net)
		misfits := n.sync()
		for deadline := time.Now().Add(5 * slotRest); misfits.Len() > 0 && time.Now().Before(deadline); {
			time.Sleep(slotRest / 4) // freed slots rest
			misfits = n.sync()
		}
		if misfits.Len() > 0 {
			t.Fatalf("%d peers never fitted", misfits.Len())
		}
		got, err := n.accel.View().Peers()
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 16 {
			t.Fatalf("%d peers in the maps, want 16", len(got))
		}
		for i, want := range n.desired.Peers {
			if got[i].PublicIP != want.PublicIP || got[i].MAC != want.MAC || !slices.Equal(got[i].Prefixes, []netip.Prefix{want.Prefix}) {
				t.Errorf("peer %d is %+v, want %+v", i, got[i], want)
			}
		}
	}
}

// What is desired reaches the programs.
func TestDesiredIsInForce(t *testing.T) {
	n := newNode(t)
	for check := range SourceChecks {
		for _, on := range []bool{false, true} {
			n.desired.SourceCheck, n.desired.Held, n.desired.RoutesByMark = SourceChecks[check], on, on
			n.sync()
			r := n.runtime
			if r.SourceCheck != uint32(check) || r.Held != boolean(on) || r.ByMark != boolean(on) {
				t.Errorf("%+v became %+v", n.desired, r)
			}
		}
	}
	r := n.runtime
	if fromBE32(r.Local) != addr(ourIP) || r.Uplink != n.uplink || r.Mac != [6]uint8(mustMAC(ourMAC)) || r.Ttl != 64 ||
		r.PortMin != 32768 || r.PortMax != 60999 || r.PrefixLengths != 1 || r.PrefixBits[0] != 24 {
		t.Errorf("in force is %+v", r)
	}
}

// After a restart all slots are adopted and none was given by us: one that is
// freed then rests as any other, and is given once.
func TestAdoptedSlotIsFreed(t *testing.T) {
	s, now := newSlots(2), time.Now()
	s.adopt(nodeIP(1), 0)
	s.release(map[netip.Addr]bool{}, now)
	first, _, ok := s.get(nodeIP(2), now)
	if !ok || first == 0 {
		t.Errorf("got slot %d (ok %v) at once, want 1: slot 0 was freed just now", first, ok)
	}
	later := now.Add(slotRest)
	second, _, ok := s.get(nodeIP(3), later)
	if !ok || second == first {
		t.Errorf("got slot %d (ok %v) after the rest, want the other of two", second, ok)
	}
	if third, _, ok := s.get(nodeIP(4), later); ok {
		t.Errorf("a third node got slot %d of two, which another has", third)
	}
}
