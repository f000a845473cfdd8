//go:build linux

package lab

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestPodsReachEachOtherByEveryFamily(t *testing.T) {
	for _, families := range []Families{IPv4, DualStack, IPv6} {
		t.Run(string(families), func(t *testing.T) {
			t.Parallel()
			lt := T(t)
			l := lt.New(Options{Kinds: []Kind{Kernel}, Families: families})
			for _, to := range l.Pod(2, 1).Addresses() {
				// A slow machine may still be asking for its neighbours.
				lt.Eventually(10*time.Second, func() error {
					return l.Pod(1, 1).Run(t.Context(), "ping -c 1 -W 1 "+to.String())
				})
				out := lt.Run(l.Pod(1, 1), "ping -c 2 -i 0.05 -W 2 "+to.String())
				if !strings.Contains(out, "ttl=62") {
					t.Errorf("two routers between the pods should leave 62 of 64 hops:\n%s", out)
				}
			}
			lt.Run(l.Node(1), "ping -c 1 -W 2 "+l.Gateway().String())
			state, err := l.Node(1).KernelState(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for family, word := range map[bool]string{families.Has4(): "10.244.", families.Has6(): "fd00:10:244:"} {
				if family != strings.Contains(state, word) {
					t.Errorf("%s on a node of a lab with %s: %v\n%s", word, families, !family, state)
				}
			}
		})
	}
}

func TestWeftByIPv6(t *testing.T) {
	lt := T(t)
	l := lt.New(Options{Kinds: []Kind{Weft, Kernel}, Families: IPv6, Binary: weft(t)})
	lt.MustLoseNothing(l.Pod(1, 1), l.Pod(2, 1), ProbeOptions{IPv6: true}, func() { time.Sleep(100 * time.Millisecond) })
	lt.MustLoseNothing(l.Pod(2, 1), l.Pod(1, 1), ProbeOptions{IPv6: true, ICMP: true}, func() { time.Sleep(100 * time.Millisecond) })
}

func TestStreamTellsWhatWasLost(t *testing.T) {
	t.Parallel()
	lt := T(t)
	l := lt.New(Options{Kinds: []Kind{Kernel}})
	stream := func(f func()) StreamResult {
		t.Helper()
		s, err := StartStream(l.Pod(1, 1), l.Pod(2, 1), l.Pod(2, 1).IP)
		if err != nil {
			t.Fatal(err)
		}
		f()
		r, err := s.Stop()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := stream(func() { time.Sleep(200 * time.Millisecond) }); r.Lost != 0 || r.Bytes < streamChunk {
		t.Errorf("nothing was to be lost: %s", r)
	}
	if r := stream(func() {
		lt.Run(l.Node(1), "ip link set flannel.1 mtu 1450 down")
		time.Sleep(50 * time.Millisecond)
		if err := l.Node(1).ip(t.Context(), "link set flannel.1 up"); err != nil {
			t.Error(err)
		}
		if err := l.Node(1).AddKernelPeer(t.Context(), l.Node(2)); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
	}); r.Lost == 0 {
		t.Errorf("an overlay that was down for 50 ms lost nothing: %s", r)
	}
}

func TestRebootLeavesNothingOfTheOverlay(t *testing.T) {
	t.Parallel()
	lt := T(t)
	l := lt.New(Options{Kinds: []Kind{Kernel}, Netfilter: true, Families: DualStack})
	n := l.Node(1)
	if err := n.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	state, err := n.KernelState(t.Context())
	if err == nil {
		t.Fatalf("the overlay devices are still there:\n%s", state)
	}
	for _, command := range []string{"ip -4 route", "ip -6 route", "ip link", "iptables-save", "nft list ruleset"} {
		if out := lt.Run(n, command); strings.Contains(strings.ToLower(out), "flannel") {
			t.Errorf("%s shows\n%s", command, out)
		}
	}
	if out := lt.Run(n, "iptables-nft-save"); !strings.Contains(out, "KUBE-FORWARD") {
		t.Errorf("kube-proxy's rules are not there again:\n%s", out)
	}
	lt.Run(l.Pod(1, 1), "ping -c 1 -W 2 "+n.Gateway.String())
}

func TestLabsThatCannotBe(t *testing.T) {
	for _, o := range []Options{
		{Families: "ipv5"},
		{Store: "paper"},
		{Store: StoreEtcd},
		{Store: StoreKube, Etcd: "/bin/etcd"},
		{Families: DualStack, Kinds: []Kind{Weft}, Binary: "/bin/weft"},
		{Families: IPv6, Kinds: []Kind{Flanneld}, Flanneld: "/bin/flanneld", Etcd: "/bin/etcd"},
		{Families: DualStack, Strangers: 1},
	} {
		if got, err := o.defaults(); err == nil {
			t.Errorf("taken: %s", fmt.Sprintf("%+v", got))
		}
	}
}
