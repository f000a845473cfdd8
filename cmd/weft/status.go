package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/weft-net/weft/dataplane"
)

// runStatus is "weft status".
func runStatus(e *env, args []string) error {
	var v view
	fs := newFlags(e, "status", "[flags]", `Shows how this node's dataplane is doing: the agent, how packets travel and why,
and what was passed or dropped. It reads the kernel, so it works without an agent.`)
	v.register(fs.FlagSet)
	if _, err := parseFlags(fs, args); err != nil {
		return err
	}
	if err := v.validate("status"); err != nil {
		return err
	}
	agent, report, err := v.look(e)
	if err != nil {
		return err
	}
	if v.json() {
		return v.writeJSON(e.stdout, struct {
			schema
			Agent  agentJSON        `json:"agent"`
			Report dataplane.Report `json:"report"`
		}{schema{outputSchema}, agent.json(), withLists(report)})
	}
	printStatus(e.stdout, e.now(), agent, report)
	return nil
}

// withLists gives programs an empty list where there is none.
func withLists(r dataplane.Report) dataplane.Report {
	if r.Hooks == nil {
		r.Hooks = []dataplane.Hook{}
	}
	if r.Peers == nil {
		r.Peers = []dataplane.PeerReport{}
	}
	if r.Reasons == nil {
		r.Reasons = []dataplane.ReasonCount{}
	}
	return r
}

// agentJSON is an agent as programs see it.
type agentJSON struct {
	State life `json:"state"`
	*runInfo
}

// json returns the view for programs; the names of peers are with the peers, and
// what the agent says of express is in the report.
func (v agentView) json() agentJSON {
	if v.Info.SchemaVersion == 0 {
		return agentJSON{State: v.Life}
	}
	info := v.Info
	info.Names, info.Express, info.NoXDP = nil, expressInfo{}, ""
	return agentJSON{v.Life, &info}
}

// printStatus prints the screen.
func printStatus(w io.Writer, now time.Time, agent agentView, r dataplane.Report) {
	f := newFacts(w)
	agentFacts(f, now, agent)
	nodeFacts(f, r, agent.Info.WayToPrograms)
	f.Flush()
	printPaths(w, r)
	printHooks(w, r)
	printReasons(w, r)
	printSuspects(w, r)
	printMaps(w, r)
}

// agentFacts prints what concerns the agent.
func agentFacts(f facts, now time.Time, v agentView) {
	switch v.Life {
	case never:
		f.add("agent", "never ran here")
		return
	case running:
		f.add("agent", "running as %s%s, weft %s", v.Holder, since(now, v.Info.StartedAt), v.Info.Version)
	case stopped:
		f.add("agent", "stopped %s ago; traffic flows, nothing follows changes of peers", age(now, v.Info.StoppedAt))
	case dead:
		f.add("agent", "DEAD, was process %d; traffic flows, nothing follows changes of peers", v.Info.PID)
	}
	f.add("node", "%s", orNone(v.Info.Node))
	store := strings.TrimSpace(v.Info.Store.Kind + " " + v.Info.Store.Config)
	f.add("store", "%s", store)
	if v.Info.Store.Error != "" {
		f.add("", "BROKEN: %s", v.Info.Store.Error)
	}
	f.add("sync", "%s", syncWords(now, v.Info.Sync))
}

// since prints for how long something has been so.
func since(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return fmt.Sprintf(" for %s", age(now, t))
}

// syncWords says how the loop fares.
func syncWords(now time.Time, s syncInfo) string {
	last := "none succeeded yet"
	if !s.LastSuccess.IsZero() {
		last = fmt.Sprintf("last success %s ago", age(now, s.LastSuccess))
	}
	if s.Error == "" {
		return last
	}
	return fmt.Sprintf("FAILING, %s, %s: %s", number(s.Failures, "failure", "failures"), last, s.Error)
}

// nodeFacts prints what the kernel holds, and what would have programs in it.
func nodeFacts(f facts, r dataplane.Report, way string) {
	mode := r.Mode
	if r.Reason != "" {
		mode += ": " + r.Reason
	}
	f.add("mode", "%s", mode)
	if r.Mode == dataplane.ModeKernel && way != "" {
		f.add("", "to turn eBPF on: %s", way)
	}
	if len(r.Hooks) > 0 {
		f.add("accel", "%s", accelWords(r))
		expressFacts(f, r)
		xdpFacts(f, r.XDP)
		f.add("source check", "%s", orNone(r.SourceCheck))
	}
	f.add("firewall", "%s", firewallWords(r.Firewall))
	f.add("uplink", "%s", deviceWords(r.Uplink))
	overlayFacts(f, r)
	f.add("peers", "%s", peerWords(r))
}

// firewallWords says what the firewall against pods that send to the VXLAN port
// has done.
func firewallWords(fw dataplane.Firewall) string {
	words := fmt.Sprintf("%s to the VXLAN port dropped", number(int(fw.DroppedPackets), "packet of pods", "packets of pods"))
	if fw.Reason != "" {
		return "NOT IN FORCE: " + fw.Reason
	}
	return words
}

// accelWords says how the switches stand.
func accelWords(r dataplane.Report) string {
	words := switchWords(r.Switches)
	off, partly := 0, 0
	for _, p := range r.Peers {
		switch {
		case p.Switches == dataplane.Switches{}:
			off++
		case !p.Switches.All():
			partly++
		}
	}
	if off > 0 {
		words += fmt.Sprintf(", off for %s", number(off, "peer", "peers"))
	}
	if partly > 0 {
		words += fmt.Sprintf(", partly off for %s", number(partly, "peer", "peers"))
	}
	return words
}

// switchWords says how the switches of a node or peer stand.
func switchWords(s dataplane.Switches) string {
	switch {
	case s.Base && !s.Express:
		return "base only"
	case s.Express && !s.Base:
		return "express only"
	}
	return onOff(s.Base)
}

// expressFacts prints how the express path stands, for how many pods, and the
// first reason why one is left alone.
func expressFacts(f facts, r dataplane.Report) {
	x := r.Express
	pods := number(x.Pods, "pod", "pods")
	if x.On {
		f.addWrapped("express", "on, "+pods+" served"+leftAloneWords(x))
	} else {
		f.addWrapped("express", strings.TrimSuffix("off: "+strings.Join(whyNoExpress(r), "; "), ": "))
		if x.Pods+len(x.LeftAlone) > 0 {
			f.addWrapped("", pods+" to serve"+leftAloneWords(x))
		}
	}
	if len(x.LeftAlone) > 0 {
		f.addWrapped("", leftAloneReason(x.LeftAlone[0]))
	}
}

// xdpFacts prints how packets fare in the uplink's driver, where anybody wants to
// have them stripped there.
func xdpFacts(f facts, x dataplane.XDP) {
	switch {
	case x.Reason != "":
		f.addWrapped("xdp", "off: "+x.Reason)
	case !x.Attached:
	case !x.Heard:
		f.addWrapped("xdp", "attached, but strips nothing: no packet with a note of its has come to uplink_in lately")
	default:
		f.add("xdp", "on, %d packets stripped", x.Stripped)
	}
}

// leftAloneWords counts what express does not serve, to be added to what it
// does.
func leftAloneWords(x dataplane.Express) string {
	switch n := len(x.LeftAlone); n {
	case 0:
		return ""
	case 1:
		return ", 1 left alone"
	default:
		return fmt.Sprintf(", %d left alone (-o json has all)", n)
	}
}

// leftAloneReason says why a pod's veth, or one address behind it, is not
// served.
func leftAloneReason(l dataplane.LeftAlone) string {
	name := l.Veth
	if l.IP.IsValid() {
		name = fmt.Sprintf("%s (%s)", l.Veth, l.IP)
	}
	return name + ": " + l.Reason
}

// whyNoExpress lists what keeps packets from the express path: the switch, and
// what the agent or the pins say.
func whyNoExpress(r dataplane.Report) []string {
	if r.Express.On {
		return nil
	}
	var why []string
	if !r.Switches.Express {
		why = append(why, "switched off (weft accel on express)")
	}
	why = append(why, r.Express.Reasons...)
	if len(why) == 0 && r.Mode != "ebpf" {
		why = append(why, "the programs are not attached")
	}
	return why
}

// deviceWords describes a device.
func deviceWords(d dataplane.Device) string {
	if d.Name == "" {
		return "none"
	}
	words := fmt.Sprintf("%s  index %d  mtu %d", d.Name, d.Index, d.MTU)
	if d.Address.IsValid() {
		words += "  " + d.Address.String()
	}
	if !d.MAC.IsZero() {
		words += "  " + d.MAC.String()
	}
	return words
}

// overlayFacts prints the overlay devices, of which IPv6 has one of its own.
func overlayFacts(f facts, r dataplane.Report) {
	name := "overlay"
	for _, d := range []dataplane.Device{r.Overlay, r.OverlayV6} {
		if d.Name != "" {
			f.add(name, "%s  vni %d  port %d", deviceWords(d), r.VNI, r.Port)
			name = ""
		}
	}
	if name != "" {
		f.add(name, "none")
	}
}

// peerWords counts the peers.
func peerWords(r dataplane.Report) string {
	outside, diverging := 0, 0
	for _, p := range r.Peers {
		if !p.InMap {
			outside++
		}
		if len(p.Divergence) > 0 {
			diverging++
		}
	}
	words := fmt.Sprint(len(r.Peers))
	if outside > 0 && r.Mode == "ebpf" {
		words += fmt.Sprintf(", %d on the kernel path alone", outside)
	}
	if diverging > 0 {
		words += fmt.Sprintf(", %d DIVERGING (\"weft peers\" says where)", diverging)
	}
	return words
}

// printPaths prints the packets by path.
func printPaths(w io.Writer, r dataplane.Report) {
	sums := sumPaths(r.Peers)
	if len(sums) == 0 {
		return
	}
	var tx, rx uint64
	for _, s := range sums {
		tx, rx = tx+s.TxPackets, rx+s.RxPackets
	}
	t := table{columns: []string{"PATH", ">SENT", ">", ">BYTES", ">RECEIVED", ">", ">BYTES"}}
	for _, s := range sums {
		t.row(
			s.Path,
			count(s.TxPackets), share(s.TxPackets, tx), size(s.TxBytes),
			count(s.RxPackets), share(s.RxPackets, rx), size(s.RxBytes),
		)
	}
	section(w, "packets by path", t)
}

// sumPaths sums the counters of peers by path, in the order they come.
func sumPaths(peers []dataplane.PeerReport) []dataplane.PathCounters {
	var sums []dataplane.PathCounters
	at := map[string]int{}
	for _, p := range peers {
		for _, n := range p.Counters {
			i, ok := at[n.Path]
			if !ok {
				i = len(sums)
				at[n.Path] = i
				sums = append(sums, dataplane.PathCounters{Path: n.Path})
			}
			sums[i].TxPackets += n.TxPackets
			sums[i].TxBytes += n.TxBytes
			sums[i].RxPackets += n.RxPackets
			sums[i].RxBytes += n.RxBytes
		}
	}
	return sums
}

// printHooks prints where programs sit.
func printHooks(w io.Writer, r dataplane.Report) {
	t := table{columns: []string{"PROGRAM", "DEVICE", "DIRECTION", "ATTACHED", ">ID", "BEHIND IT"}}
	for _, h := range r.Hooks {
		attached, id := "not attached", "-"
		if h.Attached != "" {
			attached, id = h.Attached, fmt.Sprint(h.ID)
		}
		t.row(h.Program, orNone(h.Device), h.Direction, attached, id, orDash(strings.Join(h.Behind, ", ")))
	}
	section(w, "hooks", t)
}

// topReasons is how many reasons fit on the screen.
const topReasons = 10

// printReasons prints the reasons that happened most.
func printReasons(w io.Writer, r dataplane.Report) {
	var happened []dataplane.ReasonCount
	for _, reason := range r.Reasons {
		if reason.Passed+reason.Dropped > 0 {
			happened = append(happened, reason)
		}
	}
	// Drops first: they are what somebody misses.
	slices.SortStableFunc(happened, func(a, b dataplane.ReasonCount) int {
		return cmp.Or(cmp.Compare(b.Dropped, a.Dropped), cmp.Compare(b.Passed, a.Passed))
	})
	title := "reasons for a packet to be dropped, or left to the base path or the kernel"
	if len(happened) > topReasons {
		title += fmt.Sprintf(" (first %d of %d; -o json has all)", topReasons, len(happened))
		happened = happened[:topReasons]
	}
	t := table{columns: []string{"REASON", ">DROPPED", ">PASSED", "MEANING"}}
	for _, reason := range happened {
		t.row(reason.Name, count(reason.Dropped), count(reason.Passed), reason.Help)
	}
	section(w, title, t)
}

// printSuspects prints who failed the source check.
func printSuspects(w io.Writer, r dataplane.Report) {
	t := table{columns: []string{"OUTER SOURCE", "INNER SOURCE", ">PACKETS", "REASON"}}
	for _, s := range r.Suspects {
		t.row(s.OuterSource.String(), s.InnerSource.String(), count(s.Packets), s.Reason)
	}
	section(w, "latest senders that failed the source check", t)
}

// printMaps prints what the maps cost.
func printMaps(w io.Writer, r dataplane.Report) {
	t := table{columns: []string{"MAP", "TYPE", ">ENTRIES", ">ROOM", ">MEMORY"}}
	var sum uint64
	for _, m := range r.Maps {
		sum += m.Bytes
		t.row(m.Name, m.Type, fmt.Sprint(m.Entries), fmt.Sprint(m.MaxEntries), size(m.Bytes))
	}
	section(w, fmt.Sprintf("maps, %s when full", size(sum)), t)
}

// section prints a table under a title, unless it is empty.
func section(w io.Writer, title string, t table) {
	if len(t.rows) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n", title)
	t.write(w, "  ")
}

// orNone is s, or the word none.
func orNone(s string) string { return cmp.Or(s, "none") }

// orDash is s, or a dash.
func orDash(s string) string { return cmp.Or(s, "-") }
