package kernel

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

// The tests say states and kernels as text: a state as one line per peer, what
// the kernel holds as the lines that ip and bridge print.

func mustMAC(tb testing.TB, text string) state.MAC {
	tb.Helper()
	mac, err := state.ParseMAC(text)
	if err != nil {
		tb.Fatal(err)
	}
	return mac
}

// mustPeers reads lines of node, prefix, public IP and MAC. A MAC of "-" is
// none.
func mustPeers(tb testing.TB, text string) []state.Peer {
	tb.Helper()
	var peers []state.Peer
	for line := range lines(text) {
		var node, prefix, ip, mac string
		if n, err := fmt.Sscan(line, &node, &prefix, &ip, &mac); n != 4 {
			tb.Fatalf("peer %q: %v", line, err)
		}
		p := state.Peer{Node: node, Prefix: netip.MustParsePrefix(prefix), PublicIP: netip.MustParseAddr(ip)}
		if mac != "-" {
			// Not ParseMAC: a test may want what that refuses.
			if _, err := fmt.Sscanf(mac, "%02x:%02x:%02x:%02x:%02x:%02x",
				&p.MAC[0], &p.MAC[1], &p.MAC[2], &p.MAC[3], &p.MAC[4], &p.MAC[5]); err != nil {
				tb.Fatalf("peer %q: %v", line, err)
			}
		}
		peers = append(peers, p)
	}
	return peers
}

// mustActual reads what ip and bridge print, each line after the table it is
// from: link, addr, route, neigh, fdb. A line with router is the gateway of a
// route out of the overlay's network.
func mustActual(tb testing.TB, text string) actual {
	tb.Helper()
	var have actual
	for line := range lines(text) {
		table, rest, _ := strings.Cut(line, " ")
		words := strings.Fields(rest)
		word := func(name string) string { // what comes after a word
			for i, w := range words[:len(words)-1] {
				if w == name {
					return words[i+1]
				}
			}
			return ""
		}
		has := func(name string) bool { return strings.Contains(" "+rest+" ", " "+name+" ") }
		number := func(text string) int {
			n, err := strconv.Atoi(text)
			if err != nil {
				tb.Fatalf("%q: %v", line, err)
			}
			return n
		}
		switch table {
		case "link":
			d := &device{name: words[0], index: 3, kind: word("type"), up: has("UP"), learning: !has("nolearning"), mtu: number(word("mtu"))}
			if d.kind == "vxlan" {
				d.mac = mustMAC(tb, word("address"))
				d.vxlan = vxlan{
					vni: uint32(number(word("id"))), port: uint16(number(word("dstport"))),
					local: netip.MustParseAddr(word("local")), gbp: has("gbp"), uplink: word("dev"), uplinkIndex: 2,
				}
			}
			if has("external") {
				d.odd = "external"
			}
			have.device = d
		case "addr":
			have.device.addrs = append(have.device.addrs, netip.MustParsePrefix(words[0]))
		case "route":
			r := route{proto: protoBoot, device: word("dev"), onlink: has("onlink"), more: has("src")}
			r.index = map[string]int{"eth0": 2, have.deviceName(): 3}[r.device]
			if words[0] == "blackhole" {
				r.kind, words = words[0], words[1:]
			}
			r.prefix = netip.MustParsePrefix(words[0])
			if via := word("via"); via != "" {
				r.gateway = netip.MustParseAddr(via)
			}
			if metric := word("metric"); metric != "" {
				r.metric = uint32(number(metric))
			}
			switch word("proto") {
			case "kernel":
				r.proto = 2
			case "static":
				r.proto = 4
			}
			have.routes = append(have.routes, r)
		case "router":
			if have.routers == nil {
				have.routers = map[netip.Addr]bool{}
			}
			have.routers[netip.MustParseAddr(words[0])] = true
		case "neigh":
			n := neighbour{ip: netip.MustParseAddr(words[0]), permanent: has("PERMANENT"), foreign: has("extern_learn")}
			if mac := word("lladdr"); mac != "" {
				n.mac = mustMAC(tb, mac)
			}
			have.neighbours = append(have.neighbours, n)
		case "fdb":
			f := fdbEntry{dst: netip.MustParseAddr(word("dst")), permanent: has("permanent"), foreign: has("extern_learn") || has("port")}
			if words[0] != "00:00:00:00:00:00" {
				f.mac = mustMAC(tb, words[0])
			}
			have.fdb = append(have.fdb, f)
		default:
			tb.Fatalf("unknown table in %q", line)
		}
	}
	return have
}

func (a actual) deviceName() string {
	if a.device == nil {
		return ""
	}
	return a.device.name
}

// lines are the lines of a text without indentation and empty ones.
func lines(text string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" && !yield(line) {
				return
			}
		}
	}
}

// trimmed is a text without indentation, for comparing.
func trimmed(text string) string {
	var b strings.Builder
	for line := range lines(text) {
		b.WriteString(line + "\n")
	}
	return b.String()
}
