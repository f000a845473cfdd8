//go:build linux && peers

package mixed_test

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// Peers that DirectRouting serves are shown, of both families, and taken away, with
// programs of weft's in place.
func TestDirectPeersAreShownAndRemoved(t *testing.T) {
	for name, flags := range map[string][]string{
		"with programs":    nil,
		"without programs": {"--accel=off"},
	} {
		t.Run(name, func(t *testing.T) {
			_, l := newLab(t, lab.Options{
				Store: lab.StoreEtcd, Families: lab.DualStack, DirectRouting: true,
				Nodes: 2, Kinds: []lab.Kind{lab.Weft}, AgentFlags: flags,
			})
			n, peer := l.Node(1), l.Node(2)
			mustReachAll(t, l)
			want := []string{
				fmt.Sprint(peer.IP, []any{peer.Prefix}, []any{peer.Prefix}, []string(nil)),
				fmt.Sprint(peer.IPv6, []any{peer.PrefixV6}, []any{peer.PrefixV6}, []string(nil)),
			}
			lab.T(t).Eventually(10*time.Second, func() error { // the agent remembers them after a while
				var shown []string
				for _, p := range mustPeers(t, n) {
					shown = append(shown, fmt.Sprint(p.PublicIP, p.Prefixes, p.Direct, p.Divergence))
				}
				if !slices.Equal(shown, want) {
					return fmt.Errorf("weft peers shows %q, want %q", shown, want)
				}
				return nil
			})

			stop(t, n, syscall.SIGTERM)
			said := lab.T(t).Run(n, weft, "remove", "--all")
			if !strings.Contains(said, "removed 2 routes of direct routing\n") {
				t.Errorf("weft remove --all says\n%s", said)
			}
			for _, family := range []string{"-4", "-6"} {
				if routes := lab.T(t).Run(n, "ip", family, "route", "show"); strings.Contains(routes, " via "+peer.IP.String()) || strings.Contains(routes, " via "+peer.IPv6.String()) {
					t.Errorf("after weft remove --all:\n%s", routes)
				}
			}
		})
	}
}
