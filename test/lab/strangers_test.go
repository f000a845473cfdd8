//go:build linux

package lab

import (
	"fmt"
	"strings"
	"testing"
)

func TestStrangersAreInTheTablesAndInNobodysWay(t *testing.T) {
	const strangers = 300
	for _, kind := range []Kind{Kernel, Weft} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			lt := T(t)
			l := lt.New(Options{Kinds: []Kind{kind}, Binary: weft(t), Netfilter: true, Strangers: strangers})
			n := l.Node(1)
			for _, command := range []string{"ip -4 route show dev flannel.1", "bridge fdb show dev flannel.1"} {
				if lines := strings.Count(lt.Run(n, command), "\n"); lines != 1+strangers {
					t.Errorf("%s shows %d lines, want one for the other node and %d for strangers", command, lines, strangers)
				}
			}
			lt.Run(l.Pod(1, 1), "ping -c 1 -W 2 "+l.Pod(2, 1).IP.String())
		})
	}
}

func TestStrangersAreDifferentAndOutsideOfTheLab(t *testing.T) {
	l := &Lab{Options: Options{Strangers: maxStrangers}}
	seen := map[string]bool{}
	for _, s := range l.strangers() {
		for _, key := range []string{s.name, s.prefix.String(), s.ip.String(), s.mac.String()} {
			if seen[key] {
				t.Fatalf("%s is there twice", key)
			}
			seen[key] = true
		}
		if s.prefix.Overlaps(Network) || !l.Network().Overlaps(s.prefix) {
			t.Fatalf("%s has %s: that should be in %s and outside of %s", s.name, s.prefix, l.Network(), Network)
		}
	}
	if !l.Network().Contains(Network.Addr()) {
		t.Errorf("%s does not hold %s", l.Network(), Network)
	}
}

func TestFlanneldNodesNeedTheirPrograms(t *testing.T) {
	for _, o := range []Options{
		{Kinds: []Kind{Flanneld}},
		{Kinds: []Kind{Kernel, Flanneld}, Flanneld: "/bin/flanneld"},
		{Strangers: maxStrangers + 1},
		{Strangers: -1},
	} {
		if got, err := o.defaults(); err == nil {
			t.Errorf("taken: %s", fmt.Sprintf("%+v", got))
		}
	}
}
