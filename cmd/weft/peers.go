package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane"
)

// runPeers is "weft peers".
func runPeers(e *env, args []string) error {
	var v view
	var wide bool
	fs := newFlags(e, "peers", "[flags]", `Shows the peers, their traffic by path (express/base/kernel), and where the
accelerator's map and the kernel's entries differ.`)
	v.register(fs.FlagSet)
	fs.BoolVar(&wide, "wide", false, "also show MAC addresses, and exact packets and bytes of each path")
	if _, err := parseFlags(fs, args); err != nil {
		return err
	}
	if err := v.validate("peers"); err != nil {
		return err
	}
	agent, report, err := v.look(e)
	if err != nil {
		return err
	}
	if v.json() {
		return v.writeJSON(e.stdout, struct {
			schema
			Agent agentJSON  `json:"agent"`
			Peers []peerJSON `json:"peers"`
		}{schema{outputSchema}, agent.json(), peersJSON(agent, report)})
	}
	if warning := agent.warning(e); warning != "" {
		fmt.Fprintf(e.stdout, "%s\n\n", warning)
	}
	printPeers(e.stdout, agent.Info.Names, report, wide)
	return nil
}

// peerJSON is a peer as programs see it.
type peerJSON struct {
	Name string `json:"name,omitempty"`
	dataplane.PeerReport
}

// peersJSON joins names and peers.
func peersJSON(agent agentView, r dataplane.Report) []peerJSON {
	peers := []peerJSON{}
	for _, p := range r.Peers {
		peers = append(peers, peerJSON{agent.Info.Names[p.PublicIP], p})
	}
	return peers
}

// printPeers prints the table, and below it what diverges.
func printPeers(w io.Writer, names names, r dataplane.Report, wide bool) {
	if len(r.Peers) == 0 {
		fmt.Fprintln(w, "There are no peers.")
		return
	}
	if wide {
		peersWide(names, r).write(w, "")
	} else {
		peersNarrow(names, r).write(w, "")
		fmt.Fprint(w, pathsLegend(r))
	}
	if r.Mode != "ebpf" && !anyCounted(r) {
		fmt.Fprintf(w, "\nNo counters: %s.\n", printable(strings.TrimSuffix(noCounters(r), ".")))
	}
	printDivergence(w, names, r)
}

// pathsLegend explains the packets of peersNarrow.
func pathsLegend(r dataplane.Report) string {
	for _, p := range r.Peers {
		var paths []string
		for _, n := range p.Counters {
			paths = append(paths, n.Path)
		}
		if len(paths) > 0 {
			return fmt.Sprintf("\nPackets are by path: %s.\n", strings.Join(paths, "/"))
		}
	}
	return ""
}

// anyCounted tells that programs count packets of a peer.
func anyCounted(r dataplane.Report) bool {
	return slices.ContainsFunc(r.Peers, func(p dataplane.PeerReport) bool { return len(p.Counters) > 0 })
}

// noCounters says why there are no counters.
func noCounters(r dataplane.Report) string {
	if r.Reason == "" {
		return "the kernel path carries everything"
	}
	return "the kernel path carries everything: " + r.Reason
}

// peersNarrow has one line a peer.
func peersNarrow(names names, r dataplane.Report) *table {
	t := &table{columns: []string{"NAME", "PUBLIC IP", "PREFIXES", "ACCEL", ">SENT PACKETS", ">BYTES", ">RECEIVED PACKETS", ">BYTES", "NOTE"}}
	for _, p := range r.Peers {
		t.row(
			orDash(names[p.PublicIP]), p.PublicIP.String(), prefixWords(p), peerAccel(r, p),
			byPath(p, count, func(n dataplane.PathCounters) uint64 { return n.TxPackets }),
			sumOf(p, size, func(n dataplane.PathCounters) uint64 { return n.TxBytes }),
			byPath(p, count, func(n dataplane.PathCounters) uint64 { return n.RxPackets }),
			sumOf(p, size, func(n dataplane.PathCounters) uint64 { return n.RxBytes }),
			note(p),
		)
	}
	return t
}

// peersWide has one line a peer and path.
func peersWide(names names, r dataplane.Report) *table {
	t := &table{columns: []string{"NAME", "PUBLIC IP", "PREFIXES", "MAC", "ACCEL", "PATH", ">SENT PACKETS", ">BYTES", ">RECEIVED PACKETS", ">BYTES", "NOTE"}}
	for _, p := range r.Peers {
		head := []string{orDash(names[p.PublicIP]), p.PublicIP.String(), prefixWords(p), orDash(macWords(p)), peerAccel(r, p)}
		if len(p.Counters) == 0 {
			t.row(append(head, "-", "-", "-", "-", "-", note(p))...)
		}
		for i, n := range p.Counters {
			tail := note(p)
			if i > 0 {
				head, tail = make([]string, len(head)), ""
			}
			t.row(append(head, n.Path, fmt.Sprint(n.TxPackets), fmt.Sprint(n.TxBytes), fmt.Sprint(n.RxPackets), fmt.Sprint(n.RxBytes), tail)...)
		}
	}
	return t
}

// prefixWords lists a peer's prefixes.
func prefixWords(p dataplane.PeerReport) string {
	var words []string
	for _, prefix := range p.Prefixes {
		words = append(words, prefix.String())
	}
	return orDash(strings.Join(words, ","))
}

// macWords is a peer's MAC address, if it has one.
func macWords(p dataplane.PeerReport) string {
	if p.MAC.IsZero() {
		return ""
	}
	return p.MAC.String()
}

// peerAccel says by what paths a peer's packets may be accelerated: those that
// neither its own switches nor the node's exclude.
func peerAccel(r dataplane.Report, p dataplane.PeerReport) string {
	if r.Mode != "ebpf" || !p.InMap {
		return "-"
	}
	both := dataplane.Switches{
		Express: r.Switches.Express && p.Switches.Express,
		Base:    r.Switches.Base && p.Switches.Base,
	}
	if both != p.Switches {
		return switchWords(both) + " (node)"
	}
	return switchWords(both)
}

// byPath prints one counter of each path, in the order express/base/kernel.
func byPath(p dataplane.PeerReport, print func(uint64) string, field func(dataplane.PathCounters) uint64) string {
	var words []string
	for _, n := range p.Counters {
		words = append(words, print(field(n)))
	}
	return orDash(strings.Join(words, "/"))
}

// sumOf prints one counter, summed over the paths.
func sumOf(p dataplane.PeerReport, print func(uint64) string, field func(dataplane.PathCounters) uint64) string {
	if len(p.Counters) == 0 {
		return "-"
	}
	var sum uint64
	for _, n := range p.Counters {
		sum += field(n)
	}
	return print(sum)
}

// note flags a peer that needs a look.
func note(p dataplane.PeerReport) string {
	if len(p.Divergence) == 0 {
		return ""
	}
	return "DIVERGES"
}

// printDivergence tells where map and kernel differ.
func printDivergence(w io.Writer, names names, r dataplane.Report) {
	for _, p := range r.Peers {
		if len(p.Divergence) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n%s diverges:\n", peerName(names, p))
		for _, d := range p.Divergence {
			fmt.Fprintf(w, "  %s\n", printable(d))
		}
	}
}

// peerName names a peer for a sentence.
func peerName(names names, p dataplane.PeerReport) string {
	if name := names[p.PublicIP]; name != "" {
		return fmt.Sprintf("%s (%s)", printable(name), p.PublicIP)
	}
	return p.PublicIP.String()
}
