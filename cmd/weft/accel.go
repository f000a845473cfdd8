package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane"
)

// runAccel is "weft accel on|off".
func runAccel(e *env, args []string) error {
	var v view
	var wanted []string
	fs := newFlags(e, "accel", "on|off [express|base] [--peer NAME|IP|PREFIX]... [flags]", `Turns acceleration on or off, for the whole node or for single peers, from the next
packet on. It has two paths, and both are meant unless one is named: express goes from
pod to pod past the host's stack, base does the work of the VXLAN device. A packet that
may take neither takes the kernel path. The switches need no agent.`)
	v.register(fs.FlagSet)
	fs.Func("peer", "`name`, public IP or pod prefix of a peer, instead of the whole node; can be given more than once", func(s string) error {
		wanted = append(wanted, s)
		return nil
	})
	rest, err := parseFlags(fs, args, "on|off", "express|base")
	if err != nil {
		return err
	}
	if err := v.validate("accel"); err != nil {
		return err
	}
	turn, err := parseTurn(rest)
	if err != nil {
		return err
	}

	agent, report, err := v.look(e)
	if err != nil {
		return err
	}
	if len(wanted) == 0 {
		return v.switchNode(e, report, turn)
	}
	peers, err := resolvePeers(agent.Info.Names, report, wanted)
	if err != nil {
		return err
	}
	return v.switchPeers(e, agent.Info.Names, report, peers, turn)
}

// turn is which way a switch goes, and of what.
type turn struct {
	on bool
	// path is express or base; empty for both.
	path string
}

// parseTurn reads the words behind "weft accel".
func parseTurn(words []string) (turn, error) {
	if len(words) == 0 || words[0] != "on" && words[0] != "off" {
		return turn{}, usagef("accel: say \"weft accel on\" or \"weft accel off\"; \"weft status\" shows how it stands")
	}
	t := turn{on: words[0] == "on"}
	if len(words) > 1 {
		t.path = words[1]
		if !slices.Contains(switchedPaths, t.path) {
			return turn{}, usagef("accel: %q is no path with a switch; say express or base, or neither for both, and name a peer with --peer", t.path)
		}
	}
	return t, nil
}

// switchedPaths are the paths that have a switch.
var switchedPaths = []string{"express", "base"}

// paths are those that are turned.
func (t turn) paths() []string {
	if t.path == "" {
		return switchedPaths
	}
	return []string{t.path}
}

// what is turned, in words.
func (t turn) what() string {
	if t.path == "" {
		return "acceleration"
	}
	return "the " + t.path + " path"
}

// done tells whether the switches stand as they are to be turned.
func (t turn) done(s dataplane.Switches) bool {
	return !slices.ContainsFunc(t.paths(), func(path string) bool { return pathOn(s, path) != t.on })
}

// order is t for the dataplane.
func (t turn) order(peers []netip.Addr) dataplane.Switch {
	o := dataplane.Switch{On: t.on, Peers: peers}
	if t.path != "" {
		o.Paths = []string{t.path}
	}
	return o
}

// answer is the sentence about whatever was turned.
func (t turn) answer(was dataplane.Switches, whom string) string {
	word := "now"
	if t.done(was) {
		word = "already"
	}
	what := t.what()
	return fmt.Sprintf("%s%s is %s %s for %s.\n", strings.ToUpper(what[:1]), what[1:], word, onOff(t.on), whom)
}

// pathOn is the switch of one path.
func pathOn(s dataplane.Switches, path string) bool {
	if path == "express" {
		return s.Express
	}
	return s.Base
}

// switched is what "weft accel" did, for programs.
type switched struct {
	schema
	Accel string `json:"accel"`
	// Paths are those that were to be turned.
	Paths []string `json:"paths"`
	// Scope is node or peers.
	Scope   string       `json:"scope"`
	Changed []netip.Addr `json:"changed,omitempty"`
	Already []netip.Addr `json:"already,omitempty"`
	// NodeChanged tells that a switch of the node moved.
	NodeChanged bool `json:"nodeChanged"`
}

// switchNode moves the node's switches.
func (v *view) switchNode(e *env, r dataplane.Report, t turn) error {
	change := !t.done(r.Switches)
	if change {
		if err := e.node.SetAccel(v.PinDir, t.order(nil)); err != nil {
			return fmt.Errorf("turning %s %s: %w", t.what(), onOff(t.on), err)
		}
	}
	if v.json() {
		return v.writeJSON(e.stdout, switched{
			schema: schema{outputSchema}, Accel: onOff(t.on), Paths: t.paths(), Scope: "node", NodeChanged: change,
		})
	}
	fmt.Fprint(e.stdout, t.answer(r.Switches, "this node"))
	sayUntaken(e.stdout, r, t)
	return nil
}

// sayUntaken says why packets do not take what is turned on.
func sayUntaken(w io.Writer, r dataplane.Report, t turn) {
	switch {
	case !t.on:
	case r.Mode != "ebpf":
		fmt.Fprintf(w, "Packets still take the kernel path: %s\n", printable(noPrograms(r)))
	case t.path == "express" && len(r.Express.Reasons) > 0:
		fmt.Fprintf(w, "Packets still take the other paths: %s\n", printable(strings.Join(r.Express.Reasons, "; ")))
	}
}

// noPrograms says why nothing is accelerated.
func noPrograms(r dataplane.Report) string {
	if r.Reason == "" {
		return "no programs are attached."
	}
	return r.Reason
}

// switchPeers moves the switches of peers that stand differently.
func (v *view) switchPeers(e *env, names names, r dataplane.Report, peers []dataplane.PeerReport, t turn) error {
	result := switched{schema: schema{outputSchema}, Accel: onOff(t.on), Paths: t.paths(), Scope: "peers"}
	for _, p := range peers {
		if t.done(p.Switches) {
			result.Already = append(result.Already, p.PublicIP)
		} else {
			result.Changed = append(result.Changed, p.PublicIP)
		}
	}
	if len(result.Changed) > 0 {
		if err := e.node.SetAccel(v.PinDir, t.order(result.Changed)); err != nil {
			return fmt.Errorf("turning %s %s: %w", t.what(), onOff(t.on), err)
		}
	}
	if v.json() {
		return v.writeJSON(e.stdout, result)
	}
	for _, p := range peers {
		fmt.Fprint(e.stdout, t.answer(p.Switches, peerName(names, p)))
	}
	sayOffForNode(e.stdout, r, t)
	return nil
}

// sayOffForNode says what is turned on for peers in vain: the node's switches
// come first.
func sayOffForNode(w io.Writer, r dataplane.Report, t turn) {
	var off []string
	for _, path := range t.paths() {
		if t.on && !pathOn(r.Switches, path) {
			off = append(off, path)
		}
	}
	switch {
	case len(off) == 0:
	case len(off) < len(t.paths()):
		fmt.Fprintf(w, "The %s path stays off for the node; \"weft accel on %[1]s\" turns that on.\n", off[0])
	default:
		fmt.Fprintf(w, "It has no effect while it is off for the node; \"%s\" turns that on.\n", strings.TrimSpace("weft accel on "+t.path))
	}
}

// resolvePeers finds each peer that was named. All that were not found are
// reported at once, and then nothing is changed.
func resolvePeers(names names, r dataplane.Report, wanted []string) ([]dataplane.PeerReport, error) {
	var found []dataplane.PeerReport
	var unknown []string
	for _, w := range wanted {
		matches := matchPeers(names, r, w)
		if len(matches) == 0 {
			unknown = append(unknown, fmt.Sprintf("%q", w))
		}
		for _, p := range matches {
			if !slices.ContainsFunc(found, func(q dataplane.PeerReport) bool { return q.PublicIP == p.PublicIP }) {
				found = append(found, p)
			}
		}
	}
	if len(unknown) > 0 {
		return nil, fmt.Errorf("no peer has the name, public IP or pod prefix %s; \"weft peers\" lists them", strings.Join(unknown, ", "))
	}
	return found, nil
}

// matchPeers finds the peers that w names.
func matchPeers(names names, r dataplane.Report, w string) []dataplane.PeerReport {
	ip, _ := netip.ParseAddr(w)
	prefix, _ := netip.ParsePrefix(w)
	var found []dataplane.PeerReport
	for _, p := range r.Peers {
		if names[p.PublicIP] == w || p.PublicIP == ip || prefix.IsValid() && slices.Contains(p.Prefixes, prefix.Masked()) {
			found = append(found, p)
		}
	}
	return found
}
