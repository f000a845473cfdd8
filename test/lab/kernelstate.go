//go:build linux

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// view is a command that shows a part of what a node holds of an overlay.
type view struct {
	command string
	// anyOrder tells that the order of lines means nothing.
	anyOrder bool
}

// views are those of a node. What a device's name follows is asked for each
// overlay device.
var views = []view{
	{"ip -d link show type vxlan", false},
	{"ip address show", false},
	{"ip -4 route show table all", true},
	{"ip -6 route show table all", true},
	{"ip -4 rule show", false},
	{"ip -6 rule show", false},
	{"ip neighbour show dev", true},
	{"bridge fdb show dev", true},
	{"iptables-legacy-save", false},
	{"ip6tables-legacy-save", false},
	{"iptables-nft-save", false},
	{"ip6tables-nft-save", false},
	{"nft list ruleset", false},
}

// KernelState is what a node holds of an overlay, as the commands print it that
// an operator would type: devices, addresses, routes, neighbours, forwarding
// entries, rules and the subnet file. Left out is what differs between two nodes
// that hold the same: indexes, counters, times, and weft's own nftables table. MAC
// addresses of overlay devices are named by their node.
func (n *Node) KernelState(ctx context.Context) (string, error) {
	names, err := n.lab.overlayMACs(ctx)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	section := func(head, text string, anyOrder bool) {
		lines := normalise(text, names)
		if anyOrder {
			slices.Sort(lines)
		}
		fmt.Fprintf(&b, "### %s\n", head)
		for _, line := range lines {
			fmt.Fprintln(&b, line)
		}
	}
	for _, v := range views {
		for _, command := range n.commandsOf(v) {
			text, err := n.Output(ctx, command)
			if err != nil {
				return "", err
			}
			section(command, text, v.anyOrder)
		}
	}
	for _, device := range n.Overlays() {
		text, err := n.deviceSettings(device)
		if err != nil {
			return "", err
		}
		section("settings of "+device, text, false)
	}
	text, err := os.ReadFile(n.Path(SubnetFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	section(SubnetFile, string(text), false)
	return b.String(), nil
}

// commandsOf are the commands that a view is on the node.
func (n *Node) commandsOf(v view) []string {
	if !strings.HasSuffix(v.command, " dev") {
		return []string{v.command}
	}
	var all []string
	for _, device := range n.Overlays() {
		all = append(all, v.command+" "+device)
	}
	return all
}

// deviceSettings are the values below /proc/sys/net of a device, one a line.
func (n *Node) deviceSettings(device string) (string, error) {
	var b strings.Builder
	err := n.Do(func() error {
		for _, family := range []string{"ipv4", "ipv6"} {
			dir := filepath.Join("/proc/sys/net", family, "conf", device)
			entries, err := os.ReadDir(dir)
			if err != nil {
				return err
			}
			for _, e := range entries {
				value, err := os.ReadFile(filepath.Join(dir, e.Name()))
				if err != nil {
					continue // stable_secret can't be read until it is written
				}
				fmt.Fprintf(&b, "%s.%s = %s\n", family, e.Name(), strings.TrimSpace(string(value)))
			}
		}
		return nil
	})
	return b.String(), err
}

// overlayMACs are the MAC addresses of all overlay devices, and what to call
// them.
func (l *Lab) overlayMACs(ctx context.Context) (map[string]string, error) {
	names := map[string]string{}
	for _, n := range l.Nodes {
		text, err := n.Output(ctx, "ip -j link show type vxlan")
		if err != nil {
			return nil, err
		}
		var links []struct{ IfName, Address string }
		if strings.TrimSpace(text) != "" {
			if err := json.Unmarshal([]byte(text), &links); err != nil {
				return nil, fmt.Errorf("%s: %w\n%s", n, err, text)
			}
		}
		for _, link := range links {
			names[link.Address] = fmt.Sprintf("<%s of %s>", link.IfName, n)
		}
	}
	return names, nil
}

// What differs between two nodes that hold the same, and what stands in its
// place.
var (
	macPattern = regexp.MustCompile(`\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b`)
	leftOut    = []struct {
		pattern *regexp.Regexp
		instead string
	}{
		{regexp.MustCompile(`^\d+: (\S+?)(@\S+)?: `), "$1: "},
		{regexp.MustCompile(` link-netns(id)? \S+`), ""},
		{regexp.MustCompile(`\bfe80::[0-9a-f:]*[0-9a-f]\b`), "fe80::MAC"},
		{regexp.MustCompile(` tentative\b`), ""},
		{regexp.MustCompile(`counter packets \d+ bytes \d+`), "counter"},
		{regexp.MustCompile(`\[\d+:\d+\]`), "[0:0]"},
		{regexp.MustCompile(`^# (Generated|Completed) .*`), ""},
		{regexp.MustCompile(`\s+$`), ""},
	}
	ourTable = regexp.MustCompile(`(?m)^table inet weft \{\n([^}\n].*\n|\n)*\}\n`)
)

// normalise splits what a command printed into lines, without what is left out.
func normalise(text string, macs map[string]string) (lines []string) {
	for line := range strings.Lines(ourTable.ReplaceAllString(text, "")) {
		line = strings.TrimSuffix(line, "\n")
		line = macPattern.ReplaceAllStringFunc(line, func(mac string) string {
			if name, ok := macs[mac]; ok {
				return name
			}
			return "MAC"
		})
		for _, l := range leftOut {
			line = l.pattern.ReplaceAllString(line, l.instead)
		}
		if line != "" {
			lines = append(lines, line)
		}
	}
	return lines
}

// Diff shows the lines in which two texts differ, below the heads ("### …") of
// their sections; nothing if they are the same.
func Diff(before, after string) string {
	a, b := strings.Split(before, "\n"), strings.Split(after, "\n")
	// common[i][j] is the length of the longest common part of a[i:] and b[j:].
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out strings.Builder
	head, shown := "", ""
	show := func(sign, line string) {
		if head != shown {
			fmt.Fprintln(&out, head)
			shown = head
		}
		fmt.Fprintln(&out, sign+line)
	}
	for i, j := 0, 0; i < len(a) || j < len(b); {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			if strings.HasPrefix(a[i], "### ") {
				head = a[i]
			}
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			show("- ", a[i])
			i++
		default:
			show("+ ", b[j])
			j++
		}
	}
	return out.String()
}

// Reboot takes away what a reboot of the node would of its overlay: devices,
// routes, rules, files in /run, programs. What lies in /var/lib/weft stays, and so
// do the pods. The caller ends what runs the overlay before.
func (n *Node) Reboot(ctx context.Context) error {
	text, err := n.Output(ctx, "ip -j link show type vxlan")
	if err != nil {
		return err
	}
	for _, device := range regexp.MustCompile(`"ifname":"([^"]+)"`).FindAllStringSubmatch(text, -1) {
		if err := n.ip(ctx, "link delete "+device[1]); err != nil {
			return err
		}
	}
	if err := n.Run(ctx, "sh", "-c", rebootScript); err != nil {
		return err
	}
	for _, dir := range []string{filepath.Dir(SubnetFile), "/run/weft", "/sys/fs/bpf/weft"} {
		if err := os.RemoveAll(n.Path(dir)); err != nil {
			return err
		}
	}
	if n.lab.Options.Netfilter && !n.lab.Options.KubeProxy {
		return n.loadNetfilter(ctx)
	}
	return nil
}

// rebootScript deletes the routes that lead to other nodes directly, and all
// rules. The tables of the old kind stay once they are there, but empty.
const rebootScript = `set -e
for family in -4 -6; do
	ip $family route show dev eth0 | grep -v '^default' | sed -n 's/^\([^ ]*\) via .*/\1/p' | while read -r prefix; do
		ip $family route delete "$prefix"
	done
done
nft flush ruleset
for program in iptables-legacy ip6tables-legacy; do
	for table in $($program-save | sed -n 's/^\*//p'); do
		$program -t $table -F
		$program -t $table -X
	done
done`
