package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane"
)

// runAccel is "weft accel on|off".
func runAccel(e *env, args []string) error {
	var v view
	var wanted []string
	fs := newFlags(e, "accel", "on|off [--peer NAME|IP|PREFIX]... [flags]", `Turns acceleration on or off, for the whole node or for single peers, from the next
packet on. What is not accelerated takes the kernel path. It needs no agent.`)
	v.register(fs.FlagSet)
	fs.Func("peer", "`name`, public IP or pod prefix of a peer, instead of the whole node; can be given more than once", func(s string) error {
		wanted = append(wanted, s)
		return nil
	})
	rest, err := parseFlags(fs, args, "on|off")
	if err != nil {
		return err
	}
	if err := v.validate("accel"); err != nil {
		return err
	}
	if len(rest) == 0 || rest[0] != "on" && rest[0] != "off" {
		return usagef("accel: say \"weft accel on\" or \"weft accel off\"; \"weft status\" shows how it stands")
	}
	on := rest[0] == "on"

	agent, report, err := v.look(e)
	if err != nil {
		return err
	}
	if len(wanted) == 0 {
		return v.switchNode(e, report, on)
	}
	peers, err := resolvePeers(agent.Info.Names, report, wanted)
	if err != nil {
		return err
	}
	return v.switchPeers(e, agent.Info.Names, report, peers, on)
}

// switched is what "weft accel" did, for programs.
type switched struct {
	schema
	Accel string `json:"accel"`
	// Scope is node or peers.
	Scope   string       `json:"scope"`
	Changed []netip.Addr `json:"changed,omitempty"`
	Already []netip.Addr `json:"already,omitempty"`
	// NodeChanged tells that the node's switch moved.
	NodeChanged bool `json:"nodeChanged"`
}

// switchNode moves the node's switch.
func (v *view) switchNode(e *env, r dataplane.Report, on bool) error {
	change := r.Accel != on
	if change {
		if err := e.node.SetAccel(v.PinDir, dataplane.Switch{On: on}); err != nil {
			return fmt.Errorf("turning acceleration %s: %w", onOff(on), err)
		}
	}
	if v.json() {
		return v.writeJSON(e.stdout, switched{schema: schema{outputSchema}, Accel: onOff(on), Scope: "node", NodeChanged: change})
	}
	if !change {
		fmt.Fprintf(e.stdout, "Acceleration is already %s for this node.\n", onOff(on))
	} else {
		fmt.Fprintf(e.stdout, "Acceleration is now %s for this node.\n", onOff(on))
	}
	if on && r.Mode != "ebpf" {
		fmt.Fprintf(e.stdout, "Packets still take the kernel path: %s\n", printable(noPrograms(r)))
	}
	return nil
}

// noPrograms says why nothing is accelerated.
func noPrograms(r dataplane.Report) string {
	if r.Reason == "" {
		return "no programs are attached."
	}
	return r.Reason
}

// switchPeers moves the switches of peers that stand differently.
func (v *view) switchPeers(e *env, names names, r dataplane.Report, peers []dataplane.PeerReport, on bool) error {
	result := switched{schema: schema{outputSchema}, Accel: onOff(on), Scope: "peers"}
	for _, p := range peers {
		if p.Accel == on {
			result.Already = append(result.Already, p.PublicIP)
		} else {
			result.Changed = append(result.Changed, p.PublicIP)
		}
	}
	if len(result.Changed) > 0 {
		if err := e.node.SetAccel(v.PinDir, dataplane.Switch{On: on, Peers: result.Changed}); err != nil {
			return fmt.Errorf("turning acceleration %s: %w", onOff(on), err)
		}
	}
	if v.json() {
		return v.writeJSON(e.stdout, result)
	}
	for _, p := range peers {
		word := "now"
		if p.Accel == on {
			word = "already"
		}
		fmt.Fprintf(e.stdout, "Acceleration is %s %s for %s.\n", word, onOff(on), peerName(names, p))
	}
	if on && !r.Accel {
		fmt.Fprintln(e.stdout, "It has no effect while it is off for the node; \"weft accel on\" turns that on.")
	}
	return nil
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
