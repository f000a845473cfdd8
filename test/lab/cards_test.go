//go:build linux

package lab

import (
	"slices"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/netns"
)

// Cards are veths here, of a machine of its own.
func newCards(t *testing.T) *netns.NS {
	t.Helper()
	machine := netns.New(t)
	machine.Run(t, "ip link add card1 type veth peer name card2")
	return machine
}

func TestCardsAreUplinksForAWhile(t *testing.T) {
	t.Parallel()
	machine := newCards(t)
	machine.Run(t, "ip link set card1 up", "ip link set card2 up")
	show := func() []string {
		lines := strings.Split(machine.Run(t, "ip -brief link show"), "\n")
		slices.Sort(lines) // a device that was away may come back at another place
		return lines
	}
	before := show()
	var l *Lab
	machine.MustDo(t, func() (err error) {
		l, err = New(t.Context(), Options{Kinds: []Kind{Kernel}, Underlay: Cards, Cards: []string{"card1", "card2"}})
		return err
	})
	err := l.Pod(1, 1).Run(t.Context(), "ping -c 2 -i 0.05 -W 2 "+l.Pod(2, 1).IP.String())
	if err != nil {
		t.Error(err)
	}
	_, hasCard := machine.Try("ip link show card1")
	if hasCard == nil {
		t.Error("card1 is at the machine's while the lab is up")
	}
	if err := l.Node(1).Run(t.Context(), "ping -c 1 -W 2 "+Gateway.String()); err != nil {
		t.Errorf("the underlay, where stores are: %v", err)
	}
	machine.MustDo(t, l.Close)
	machine.Run(t, "ip link set card1 up", "ip link set card2 up")
	if after := show(); !slices.Equal(after, before) {
		t.Errorf("after the lab the machine has\n%q\nbefore it had\n%q", after, before)
	}
}

func TestCardsThatAreNoneToUse(t *testing.T) {
	t.Parallel()
	machine := newCards(t)
	machine.Run(t, "ip link add busy address 0a:58:00:00:00:01 type veth peer name port", "ip addr add 198.51.100.1/24 dev busy",
		"ip link add name bridge0 type bridge", "ip link set port master bridge0",
		"ip link add lower type veth peer name end", "ip link add upper link lower type macvlan mode bridge")
	for want, opts := range map[string]Options{
		"card busy is in use: it has the address 198.51.100.1/24": {Underlay: Cards, Cards: []string{"busy", "card2"}},
		"card port is in use: it is part of device":               {Underlay: Cards, Cards: []string{"port", "card2"}},
		"card lower is in use: device upper (macvlan) is on it":   {Underlay: Cards, Cards: []string{"lower", "card2"}},
		"card none: Link not found":                               {Underlay: Cards, Cards: []string{"none", "card2"}},
		"card card1 is there twice":                               {Underlay: Cards, Cards: []string{"card1", "card1"}},
		"1 cards for 2 nodes":                                     {Underlay: Cards, Cards: []string{"card1"}},
		"underlay cards and cards []":                             {Underlay: Cards},
		`underlay wire and cards ["card1" "card2"]`:               {Underlay: Wire, Cards: []string{"card1", "card2"}},
	} {
		machine.MustDo(t, func() error {
			l, err := New(t.Context(), opts)
			if err == nil {
				return l.Close()
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%+v: the error is %q, want %q", opts.Cards, err, want)
			}
			return nil
		})
	}
	machine.Run(t, "ip link show card1", "ip link show card2")
}
