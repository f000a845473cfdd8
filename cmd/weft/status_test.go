package main

import (
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane"
)

// Why packets are not stripped in the uplink's driver is told where somebody wants it.
func TestXDPIsTold(t *testing.T) {
	for _, c := range []struct {
		xdp  dataplane.XDP
		want string
	}{
		{dataplane.XDP{}, ""},
		{dataplane.XDP{Reason: "another XDP program is there"}, "off: another XDP program is there"},
		{dataplane.XDP{Attached: true}, "strips nothing"},
		{dataplane.XDP{Attached: true, Heard: true, Stripped: 7}, "on, 7 packets stripped"},
	} {
		r := dataplane.Report{Hooks: []dataplane.Hook{{Program: "uplink_in"}}, XDP: c.xdp}
		var out strings.Builder
		f := newFacts(&out)
		nodeFacts(f, r, "")
		f.Flush()
		line := ""
		for l := range strings.Lines(out.String()) {
			if strings.HasPrefix(strings.TrimSpace(l), "xdp") {
				line = l
			}
		}
		if c.want == "" && line != "" || !strings.Contains(line, c.want) {
			t.Errorf("%+v: the line is %q, want %q", c.xdp, line, c.want)
		}
	}
}
