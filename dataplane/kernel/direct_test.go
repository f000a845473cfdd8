package kernel

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

const directB = "route 10.244.4.0/24 via 192.0.2.12 dev eth0\n"

func TestPlanWithDirectRouting(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*state.State)
		peers  string
		// onLink are addresses that the uplink reaches without a gateway, made
		// prefixes, gateways and devices of routes known to be DirectRouting's.
		onLink, made string
		before       string
		want         string
		failed       map[string]string
		// direct and skipped are prefixes.
		direct, skipped string
	}{
		{
			name:  "PeerOnTheUplinksNetworkGetsNoTunnel",
			peers: peerB + peerC, onLink: "192.0.2.12", before: goodDevice,
			want: `
				bridge fdb replace 0a:00:00:00:00:0c dev flannel.1 dst 192.0.2.13 self permanent
				ip neigh replace 10.244.7.0 lladdr 0a:00:00:00:00:0c dev flannel.1 nud permanent
				ip route add 10.244.4.0/24 via 192.0.2.12 dev eth0
				ip route add 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink
			`,
			direct: "10.244.4.0/24",
		},
		{
			name:  "AllIsAsFlannelLeftIt",
			peers: peerB, onLink: "192.0.2.12", before: goodDevice + directB, direct: "10.244.4.0/24",
		},
		{
			name:  "MACIsNotNeeded",
			peers: "b 10.244.4.0/24 192.0.2.12 -\nc 10.244.7.0/24 192.0.2.13 -", onLink: "192.0.2.12", before: goodDevice,
			want:   "ip route add 10.244.4.0/24 via 192.0.2.12 dev eth0",
			direct: "10.244.4.0/24", skipped: "10.244.7.0/24",
		},
		{
			name: "MACIsNotLookedAt", onLink: "192.0.2.12 192.0.2.13 192.0.2.14",
			peers: `
				own   10.244.4.0/24 192.0.2.12 0a:00:00:00:00:0a
				same  10.244.5.0/24 192.0.2.13 0a:00:00:00:00:0d
				group 10.244.6.0/24 192.0.2.14 01:00:5e:00:00:01
				far   10.244.7.0/24 192.0.2.99 0a:00:00:00:00:0d
			`,
			before: goodDevice,
			want: `
				bridge fdb replace 0a:00:00:00:00:0d dev flannel.1 dst 192.0.2.99 self permanent
				ip neigh replace 10.244.7.0 lladdr 0a:00:00:00:00:0d dev flannel.1 nud permanent
				ip route add 10.244.4.0/24 via 192.0.2.12 dev eth0
				ip route add 10.244.5.0/24 via 192.0.2.13 dev eth0
				ip route add 10.244.6.0/24 via 192.0.2.14 dev eth0
				ip route add 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink
			`,
			direct: "10.244.4.0/24 10.244.5.0/24 10.244.6.0/24",
		},
		{
			name:  "TurnedOn",
			peers: peerB, onLink: "192.0.2.12", before: goodDevice + goodB,
			want: `
				ip route replace 10.244.4.0/24 via 192.0.2.12 dev eth0
				ip neigh del 10.244.4.0 dev flannel.1
				bridge fdb del 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self
			`,
			direct: "10.244.4.0/24",
		},
		{
			name:   "TurnedOff",
			change: func(s *state.State) { s.DirectRouting = false },
			peers:  peerB, onLink: "192.0.2.12", before: goodDevice + directB,
			want: strings.ReplaceAll(makeB, "route add", "route replace"),
		},
		{
			name:  "PeerIsNoLongerOnLink",
			peers: peerB, before: goodDevice + directB,
			want: strings.ReplaceAll(makeB, "route add", "route replace"),
		},
		{
			name:  "PeerHasANewAddress",
			peers: "b 10.244.4.0/24 192.0.2.112 -", onLink: "192.0.2.112", before: goodDevice + directB,
			want:   "ip route replace 10.244.4.0/24 via 192.0.2.112 dev eth0",
			direct: "10.244.4.0/24",
		},
		{
			name:   "PrefixMovedToAnotherNodeAndDirectRoutingWasTurnedOff",
			change: func(s *state.State) { s.DirectRouting = false },
			peers:  "b 10.244.5.0/24 192.0.2.12 0a:00:00:00:00:0b\nc 10.244.4.0/24 192.0.2.13 0a:00:00:00:00:0c",
			before: goodDevice + directB,
			want: `
				bridge fdb replace 0a:00:00:00:00:0c dev flannel.1 dst 192.0.2.13 self permanent
				bridge fdb replace 0a:00:00:00:00:0b dev flannel.1 dst 192.0.2.12 self permanent
				ip neigh replace 10.244.4.0 lladdr 0a:00:00:00:00:0c dev flannel.1 nud permanent
				ip neigh replace 10.244.5.0 lladdr 0a:00:00:00:00:0b dev flannel.1 nud permanent
				ip route replace 10.244.4.0/24 via 10.244.4.0 dev flannel.1 onlink
				ip route add 10.244.5.0/24 via 10.244.5.0 dev flannel.1 onlink
			`,
		},
		{
			name:   "PeerGone",
			before: goodDevice + directB,
			want:   "ip route del 10.244.4.0/24 via 192.0.2.12 dev eth0",
		},
		{
			name:   "PeerGoneThatWeServedAlsoWhenItWasARouter",
			change: func(s *state.State) { s.DirectRouting = false },
			made:   "10.244.4.0/24 192.0.2.12 eth0", before: goodDevice + directB + "router 192.0.2.12",
			want: "ip route del 10.244.4.0/24 via 192.0.2.12 dev eth0",
		},
		{
			name:   "PeerGoneThatWeServedByAnotherUplink",
			made:   "10.244.4.0/24 192.0.2.12 eth7",
			before: goodDevice + "route 10.244.4.0/24 via 192.0.2.12 dev eth7",
			want:   "ip route del 10.244.4.0/24 via 192.0.2.12 dev eth7",
		},
		{
			name:  "OthersRoutesAreLeftAlone",
			peers: peerB, onLink: "192.0.2.12",
			before: goodDevice + directB + `
				route 10.244.40.0/24 via 192.0.2.99 dev eth0 proto static
				route 10.244.41.0/24 via 192.0.2.99 dev eth0 metric 50
				route 10.244.42.0/24 via 192.0.2.99 dev eth0 onlink
				route 10.244.43.0/24 via 192.0.2.99 dev eth0 src 192.0.2.11
				route 10.244.44.0/25 via 192.0.2.99 dev eth0
				route 10.244.45.0/24 via 192.0.2.99 dev eth1
				route 10.244.46.0/24 dev eth0
				route blackhole 10.244.47.0/24
				route 10.245.48.0/24 via 192.0.2.99 dev eth0
				route 10.244.0.0/16 via 192.0.2.99 dev eth0
				route 10.244.25.0/24 via 192.0.2.99 dev eth0
				route 10.244.49.0/24 via 192.0.2.1 dev eth0
				router 192.0.2.1
			`,
			direct: "10.244.4.0/24",
		},
		{
			name:   "WithoutDirectRoutingNothingIsTakenForIts",
			change: func(s *state.State) { s.DirectRouting = false },
			peers:  peerB,
			before: goodDevice + goodB + "route 10.244.40.0/24 via 192.0.2.12 dev eth0",
		},
		{
			name:  "RouteElsewhereIsAConflict",
			peers: peerB + peerC, onLink: "192.0.2.12 192.0.2.13",
			before: goodDevice + "route 10.244.4.0/24 via 192.0.2.1 dev eth0\nroute 10.244.7.0/24 via 192.0.2.99 dev eth0 proto static\nrouter 192.0.2.1",
			failed: map[string]string{
				"10.244.4.0/24": "leads elsewhere: 10.244.4.0/24 via 192.0.2.1 dev eth0;",
				"10.244.7.0/24": "leads elsewhere: 10.244.7.0/24 via 192.0.2.99 dev eth0 proto static;",
			},
		},
		{
			name:  "RouteThatLeadsThereAlreadyIsGoodEnough",
			peers: peerB, onLink: "192.0.2.12",
			before: goodDevice + "route 10.244.4.0/24 via 192.0.2.12 dev eth0 proto static onlink",
			direct: "10.244.4.0/24",
		},
		{
			name:  "OwnPublicIPBehindNATIsNoPeers",
			peers: "us 10.244.4.0/24 203.0.113.9 -", onLink: "203.0.113.9",
			change: func(s *state.State) {
				s.Local.Address, s.Local.PublicIP = s.Local.PublicIP, netip.MustParseAddr("203.0.113.9")
			},
			before: goodDevice,
			failed: map[string]string{"10.244.4.0/24": "public IP 203.0.113.9 is this node's own"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := testState(t, test.peers)
			s.DirectRouting = true
			if test.change != nil {
				test.change(&s)
			}
			wants, err := overlays(s, testUplink())
			if err != nil {
				t.Fatal(err)
			}
			wants[0].direct.onLink = map[netip.Addr]bool{}
			for _, a := range strings.Fields(test.onLink) {
				wants[0].direct.onLink[netip.MustParseAddr(a)] = true
			}
			if words := strings.Fields(test.made); len(words) == 3 {
				wants[0].direct.made = map[madeRoute]bool{{netip.MustParsePrefix(words[0]), netip.MustParseAddr(words[1]), words[2]}: true}
			}
			have := mustActual(t, test.before)
			for i := range have.routes {
				if have.routes[i].index == 0 {
					have.routes[i].index = 7 // some other device
				}
			}
			plan, err := makePlan(wants[0], s.Peers, have)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := plan.String(), trimmed(test.want); got != want {
				t.Errorf("plan is\n%swant\n%s", got, want)
			}
			checkFailed(t, plan.Failed, test.failed)
			if got := prefixWords(plan.Direct); got != test.direct {
				t.Errorf("direct are %q, want %q", got, test.direct)
			}
			if got := prefixWords(plan.Skipped); got != test.skipped {
				t.Errorf("skipped are %q, want %q", got, test.skipped)
			}
		})
	}
}

func prefixWords(prefixes []netip.Prefix) string {
	var words []string
	for _, p := range prefixes {
		words = append(words, p.String())
	}
	return strings.Join(words, " ")
}
