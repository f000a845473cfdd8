//go:build linux

package datapath_test

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// A router of the underlay marks outer packets. What the receiving pod sees of
// it follows RFC 6040, and is what a node with the kernel's device shows.
func TestCongestionMarksOfTheUnderlayReachThePod(t *testing.T) {
	for name, opts := range wires() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if opts.Underlay == lab.Cards {
				opts.Underlay, opts.Cards = lab.Summed, nil // there is no router between them
			}
			lt, l := newMixedLab(t, opts)
			routes := mixedRoutes(l)
			kernel := routes[len(routes)-1]
			for _, mark := range []string{"not-ect", "ect0", "ect1", "ce"} {
				markOuter(lt, l, "not-ect")
				for _, r := range routes {
					mustRideBase(lt, r)
				}
				markOuter(lt, l, mark)
				want := marksSeen(lt, kernel)
				if mark == "ce" && !strings.Contains(want, "0x02>0x03") {
					t.Fatalf("the underlay does not mark: %s", want)
				}
				for _, r := range routes[:len(routes)-1] {
					t.Run(fmt.Sprintf("%s/outer %s", r, mark), func(t *testing.T) {
						lt := lab.T(t)
						overBase(lt, r, func() {
							if got := marksSeen(lt, r); got != want {
								t.Errorf("inner TOS sent>received\nsaw  %s\nwant %s", got, want)
							}
						})
					})
				}
			}
			mustHaveStripped(lt, l)
		})
	}
}

// markOuter makes the underlay set the ECN bits of the VXLAN packets that carry
// UDP: the pods' test packets, and not the pings that check the path.
func markOuter(t lab.Test, l *lab.Lab, mark string) {
	t.Helper()
	t.Run(l.Underlay, "sh", "-c", fmt.Sprintf(`
		nft delete table bridge marks 2>/dev/null
		nft 'add table bridge marks { chain forward { type filter hook forward priority 0; udp dport 8472 @th,312,8 17 ip ecn set %s; }; }'`, mark))
}

// marksSeen sends packets with each ECN value and tells with which they come.
func marksSeen(t lab.Test, r route) string {
	t.Helper()
	receiver := mustListenUDP(t, r.to)
	defer receiver.Close()
	port := uint16(receiver.LocalAddr().(*net.UDPAddr).Port)
	var seen []string
	for tos := range 4 {
		seen = append(seen, fmt.Sprintf("0x%02x>%s", tos, tosOf(t, r, receiver, port, tos, 4)))
		time.Sleep(time.Millisecond)
	}
	return strings.Join(seen, " ")
}
