//go:build linux

package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// someRules are rules with something in each set.
func someRules() Rules {
	return Rules{
		Port: 8472,
		Nodes: []netip.Addr{
			netip.MustParseAddr("192.0.2.12"), netip.MustParseAddr("10.244.2.0"), netip.MustParseAddr("10.244.2.1"),
			netip.MustParseAddr("2001:db8::12"),
		},
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")},
		Devices:  []string{"cni0", "flannel.1"},
	}
}

// The table with someRules, as an operator sees it, but for the layout.
const listed = `
table inet weft {
counter vxlan_injection { packets 0 bytes 0 }
set nodes4 { type ipv4_addr elements = { 10.244.2.0, 10.244.2.1, 192.0.2.12 } }
set nodes6 { type ipv6_addr elements = { 2001:db8::12 } }
set prefixes4 { type ipv4_addr flags interval elements = { 10.244.1.0/24 } }
set prefixes6 { type ipv6_addr flags interval elements = { fd00:10:244:1::/64 } }
set pod_devices { type ifname elements = { "cni0", "flannel.1" } }
chain to_node {
ct direction reply return
iifname "lo" return
iifname @pod_devices counter name "vxlan_injection" drop
ip saddr @prefixes4 counter name "vxlan_injection" drop
ip6 saddr @prefixes6 counter name "vxlan_injection" drop
}
chain from_node {
ip saddr @nodes4 fib saddr . iif oif missing counter name "vxlan_injection" drop
ip6 saddr @nodes6 fib saddr . iif oif missing counter name "vxlan_injection" drop
fib saddr type local counter name "vxlan_injection" drop
}
chain through_node {
ct direction reply return
fib saddr type local return
ip saddr @prefixes4 counter name "vxlan_injection" drop
ip6 saddr @prefixes6 counter name "vxlan_injection" drop
}
chain input {
type filter hook input priority 110; policy accept;
udp dport 8472 goto to_node
udp sport 8472 iifname @pod_devices goto from_node
}
chain forward {
type filter hook forward priority filter - 10; policy accept;
udp dport 8472 ip daddr @nodes4 goto to_node
udp dport 8472 ip6 daddr @nodes6 goto to_node
udp sport 8472 iifname @pod_devices goto from_node
}
chain output {
type filter hook output priority filter - 10; policy accept;
udp dport 8472 ip daddr @nodes4 goto through_node
udp dport 8472 ip6 daddr @nodes6 goto through_node
}
}
`

// list is the table as `nft list` shows it.
func list(t *testing.T, ns *netns.NS) string {
	t.Helper()
	return ns.Run(t, "nft list table inet weft")
}

// parts are the counter, sets and chains of a listed table, each in one line,
// with elements sorted. The order of the parts says nothing.
func parts(text string) []string {
	var all, words []string
	depth := 0
	for _, word := range strings.Fields(text)[4:] { // table inet weft {
		words = append(words, word)
		switch word {
		case "{":
			depth++
		case "}":
			if depth--; depth == 0 {
				all = append(all, strings.Join(words, " "))
				words = nil
			}
		}
	}
	for i, part := range all {
		before, elements, ok := strings.Cut(part, "elements = { ")
		if ok {
			list := strings.Split(strings.TrimSuffix(elements, " } }"), ", ")
			slices.Sort(list)
			all[i] = before + "elements = { " + strings.Join(list, ", ") + " } }"
		}
	}
	slices.Sort(all)
	return all
}

// wantListed compares the table with listed.
func wantListed(t *testing.T, ns *netns.NS) {
	t.Helper()
	if got := list(t, ns); !slices.Equal(parts(got), parts(listed)) {
		t.Errorf("the table is\n%swant%s", got, listed)
	}
}

func TestTableAsAnOperatorSeesIt(t *testing.T) {
	ns := netns.New(t)
	mustSync(t, open(t, ns), someRules())
	wantListed(t, ns)
}

// nft runs commands in a namespace.
func nft(t *testing.T, ns *netns.NS, commands string) {
	t.Helper()
	path := t.TempDir() + "/commands"
	if err := os.WriteFile(path, []byte(commands), 0o600); err != nil {
		t.Fatal(err)
	}
	ns.Run(t, "nft -f "+path)
}

func TestPlanPrintedIsWhatAnOperatorCanType(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	want, err := someRules().table()
	if err != nil {
		t.Fatal(err)
	}
	nft(t, ns, makePlan(want, table{}).String())
	wantListed(t, ns)
	events := watch(t, ns)
	mustSync(t, fw, someRules())
	events.want(t)

	nft(t, ns, makeRebuild(want, 3, 300).String())
	if got := dropped(t, fw); got != 3 {
		t.Errorf("%d packets were counted, want 3", got)
	}
}

// watcher hears of changes of nf_tables, as `nft monitor` does.
type watcher struct{ fd int }

func watch(t *testing.T, ns *netns.NS) watcher {
	t.Helper()
	var w watcher
	ns.MustDo(t, func() (err error) {
		w.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.Bind(w.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
			unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptInt(w.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES),
		)
	})
	t.Cleanup(func() { unix.Close(w.fd) })
	return w
}

// eventNames are the messages that our changes make.
var eventNames = map[uint16]string{
	unix.NFT_MSG_NEWTABLE: "new table", unix.NFT_MSG_DELTABLE: "delete table",
	unix.NFT_MSG_NEWCHAIN: "new chain", unix.NFT_MSG_DELCHAIN: "delete chain",
	unix.NFT_MSG_NEWRULE: "new rule", unix.NFT_MSG_DELRULE: "delete rule",
	unix.NFT_MSG_NEWSET: "new set", unix.NFT_MSG_DELSET: "delete set",
	unix.NFT_MSG_NEWSETELEM: "new element", unix.NFT_MSG_DELSETELEM: "delete element",
	unix.NFT_MSG_NEWOBJ: "new object", unix.NFT_MSG_DELOBJ: "delete object",
	unix.NFT_MSG_NEWGEN: "generation",
}

// events are all since the last call, by name. The kernel sends them before it
// answers the one who made the change.
func (w watcher) events(t *testing.T) map[string]int {
	t.Helper()
	seen := map[string]int{}
	buf := make([]byte, 1<<20)
	for {
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			return seen
		}
		if err != nil {
			t.Fatal(err)
		}
		for b := buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			size := int(binary.NativeEndian.Uint32(b))
			seen[eventNames[binary.NativeEndian.Uint16(b[4:])&0xff]]++
			b = b[min(len(b), (size+3)&^3):]
		}
	}
}

// want wants exactly these events: "2 new element", "1 generation", ...
func (w watcher) want(t *testing.T, events ...string) {
	t.Helper()
	var got []string
	for name, n := range w.events(t) {
		got = append(got, fmt.Sprintf("%d %s", n, name))
	}
	slices.Sort(got)
	slices.Sort(events)
	if !slices.Equal(got, events) {
		t.Errorf("the events were %q, want %q", got, events)
	}
}

// crowd are rules of a cluster of that many peers.
func crowd(peers int) Rules {
	r := someRules()
	r.Nodes = nil
	for i := range peers {
		r.Nodes = append(r.Nodes,
			netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}),
			netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}),
			netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}))
	}
	return r
}

func TestSyncWithoutChangeWritesNothing(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	for _, r := range []Rules{someRules(), crowd(5000), {Port: 8472}} {
		mustSync(t, fw, r)
		events := watch(t, ns)
		for range 3 {
			mustSync(t, fw, r)
			dropped(t, fw)
		}
		slices.Reverse(r.Nodes)
		r.Nodes = append(r.Nodes, r.Nodes...)
		mustSync(t, fw, r)
		mustSync(t, open(t, ns), r)
		events.want(t)
	}
}

func TestOnlyWhatDiffersIsWritten(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	r := crowd(5000)
	mustSync(t, fw, r)
	events := watch(t, ns)

	// One node goes, another comes.
	other := crowd(5001)
	other.Nodes = other.Nodes[3:]
	mustSync(t, fw, other)
	events.want(t, "1 generation", "3 new element", "3 delete element")

	other.Devices = append(other.Devices, "docker0")
	mustSync(t, fw, other)
	events.want(t, "1 generation", "1 new element")

	other.Prefixes = other.Prefixes[:1]
	mustSync(t, fw, other)
	events.want(t, "1 generation", "2 delete element") // begin and end

	const rules = 19
	other.Port = 4789
	mustSync(t, fw, other)
	events.want(t, "1 generation", fmt.Sprintf("%d new rule", rules), fmt.Sprintf("%d delete rule", rules))
}

func TestWhatOthersHaveChangedIsRepaired(t *testing.T) {
	for name, commands := range map[string]string{
		"TableDeleted":                "delete table inet weft",
		"RulesFlushed":                "flush table inet weft",
		"TableAsleep":                 "add table inet weft { flags dormant; }",
		"RuleInserted":                "insert rule inet weft to_node accept",
		"RuleOfAnUnknownKindInserted": "insert rule inet weft to_node meta priority set 1",
		"RuleAdded":                   "add rule inet weft input udp dport 53 drop",
		"RuleTwice":                   "add rule inet weft input udp dport 8472 goto to_node",
		"ChainFlushed":                "flush chain inet weft from_node",
		"ChainAdded":                  "add chain inet weft mine { type filter hook output priority 0; }; add rule inet weft mine accept",
		"ChainInUse":                  "add chain inet weft mine; add rule inet weft mine ip saddr @nodes4 counter name vxlan_injection jump to_node",
		"MapInUse":                    "add map inet weft mine { type ipv4_addr : verdict; elements = { 192.0.2.1 : goto to_node }; }",
		"MapOfCounters":               "add map inet weft mine { type ipv4_addr : counter; elements = { 192.0.2.1 : \"vxlan_injection\" }; }",
		"SetAdded":                    "add set inet weft mine { type ipv4_addr . inet_service; }",
		"PolicyDrop":                  "add chain inet weft input { policy drop; }",
		"PriorityDiffers":             "flush table inet weft; delete chain inet weft input; add chain inet weft input { type filter hook input priority 10; }",
		"HookDiffers":                 "flush table inet weft; delete chain inet weft input; add chain inet weft input { type filter hook prerouting priority 110; }",
		"ChainDeleted":                "delete chain inet weft input",
		"BaseChainAsPlain":            "delete chain inet weft forward; add chain inet weft forward",
		"SetExpires":                  "flush table inet weft; delete set inet weft nodes4; add set inet weft nodes4 { type ipv4_addr; flags timeout; }",
		"SetOfAnotherType":            "flush table inet weft; delete set inet weft nodes4; add set inet weft nodes4 { type ipv6_addr; }",
		"SetBounded":                  "flush table inet weft; delete set inet weft pod_devices; add set inet weft pod_devices { type ifname; size 1; }",
		"SetIsAMap":                   "flush table inet weft; delete set inet weft nodes4; add map inet weft nodes4 { type ipv4_addr : mark; }",
		"SetDeleted":                  "flush table inet weft; delete set inet weft prefixes4",
		"SetFlushed":                  "flush set inet weft nodes6",
		"IntervalsFlushed":            "flush set inet weft prefixes4",
		"ElementDeleted":              "delete element inet weft nodes4 { 10.244.2.0 }",
		"ElementAdded":                "add element inet weft nodes4 { 10.9.9.9 }; add element inet weft pod_devices { eth0 }",
		"IntervalAdded":               "add element inet weft prefixes4 { 10.9.0.0/16 }",
		"RangeAdded":                  "add element inet weft prefixes4 { 10.9.0.3-10.9.0.9 }",
		"LastRangeAdded":              "add element inet weft prefixes4 { 255.255.255.0-255.255.255.255 }",
		"CounterDeleted":              "flush table inet weft; delete counter inet weft vxlan_injection",
		"QuotaAdded":                  "add quota inet weft vxlan_injection { 10 mbytes }",
	} {
		t.Run(name, func(t *testing.T) {
			ns := netns.New(t)
			fw := open(t, ns)
			mustSync(t, fw, someRules())
			nft(t, ns, strings.ReplaceAll(commands, "; add ", "\nadd "))
			mustSync(t, fw, someRules())
			if name == "QuotaAdded" {
				ns.Run(t, "nft delete quota inet weft vxlan_injection") // hurts nobody, so it was left
			}
			wantListed(t, ns)
			events := watch(t, ns)
			mustSync(t, fw, someRules())
			events.want(t)
		})
	}
}

func TestCountSurvives(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	nft(t, ns, "add table inet weft\nadd counter inet weft vxlan_injection { packets 7 bytes 700 }")
	want := func(after string) {
		t.Helper()
		packets, bytes, err := fw.Dropped()
		if packets != 7 || bytes != 700 || err != nil {
			t.Errorf("after %s %d packets of %d bytes are counted (%v)", after, packets, bytes, err)
		}
	}
	r := someRules()
	mustSync(t, fw, r)
	want("taking over")
	r.Port = 4789
	r.Nodes, r.Prefixes, r.Devices = r.Nodes[1:], r.Prefixes[1:], nil
	mustSync(t, fw, r)
	want("a change of everything")
	nft(t, ns, "insert rule inet weft input accept")
	mustSync(t, fw, r)
	want("a repair")
	nft(t, ns, "add map inet weft mine { type ipv4_addr : quota; }\nadd quota inet weft q { 1 mbytes }\nadd element inet weft mine { 192.0.2.1 : \"q\" }")
	mustSync(t, fw, r)
	want("a repair of sets")
	rules, err := r.table()
	if err != nil {
		t.Fatal(err)
	}
	if err := fw.with(func(s *socket) error { return s.rebuild(rules) }); err != nil {
		t.Error(err)
	}
	want("making the table anew")
	events := watch(t, ns)
	mustSync(t, fw, r)
	events.want(t)
}

func TestRemoveTakesOurTableOnly(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	nft(t, ns, "add table inet mine\nadd chain inet mine c\nadd table ip weft")
	before := ns.Run(t, "nft list ruleset")
	for range 2 {
		if removed, err := fw.Remove(); removed || err != nil {
			t.Errorf("removing what is not there: %v, %v", removed, err)
		}
		if _, _, err := fw.Dropped(); !errors.Is(err, ErrNoTable) {
			t.Errorf("dropped without a table: %v", err)
		}
		mustSync(t, fw, someRules())
		if removed, err := fw.Remove(); !removed || err != nil {
			t.Errorf("removing what is there: %v, %v", removed, err)
		}
		if after := ns.Run(t, "nft list ruleset"); after != before {
			t.Errorf("the ruleset was\n%sis\n%s", before, after)
		}
	}
}

func TestOthersChangeTablesMeanwhile(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	nft(t, ns, "add table inet mine\nadd set inet mine s { type ipv4_addr; }")
	mustSync(t, fw, someRules())
	path := t.TempDir() + "/commands"
	if err := os.WriteFile(path, []byte("add element inet mine s { 192.0.2.1 }\nadd element inet weft nodes4 { 198.51.100.1 }\ninsert rule inet weft input accept\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		changes := 0
		for {
			select {
			case <-stop:
				done <- changes
				return
			default:
			}
			if _, err := ns.Try("nft -f " + path); err != nil {
				t.Error(err)
			}
			changes++
		}
	}()
	for i := range 60 {
		mustSync(t, fw, crowd(500*(i%3)))
	}
	close(stop)
	t.Logf("the others made %d changes", <-done)
	mustSync(t, fw, someRules())
	wantListed(t, ns)
}

func TestOthersChangeTheTableBetweenOurLookAndOurChange(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	mustSync(t, fw, crowd(1))
	want, err := someRules().table()
	if err != nil {
		t.Fatal(err)
	}
	if err := fw.with(func(s *socket) error {
		have, generation, err := fw.actual(s, want)
		if err != nil {
			return err
		}
		ns.Run(t, "nft insert rule inet weft input accept")
		return fw.write(s, want, have, generation)
	}); err != nil {
		t.Error(err)
	}
	mustSync(t, fw, someRules())
	wantListed(t, ns)
}

func TestPrefixesAtTheEdges(t *testing.T) {
	for _, prefixes := range [][]string{
		{"0.0.0.0/0", "::/0"},
		{"0.0.0.0/8", "255.255.255.0/24", "255.255.255.255/32", "::/128", "ff00::/8"},
		{"10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/23", "10.244.1.7/32"}, // neighbours, and one within
		nil,
	} {
		t.Run(fmt.Sprint(prefixes), func(t *testing.T) {
			ns := netns.New(t)
			r := Rules{Port: 8472}
			for _, p := range prefixes {
				r.Prefixes = append(r.Prefixes, netip.MustParsePrefix(p))
			}
			mustSync(t, open(t, ns), r)
			events := watch(t, ns)
			mustSync(t, open(t, ns), r) // reads what the other has written
			events.want(t)
		})
	}
}

func TestWithoutRights(t *testing.T) {
	ns := netns.New(t)
	err := ns.Do(func() error {
		if err := dropPrivileges(); err != nil {
			return err
		}
		_, err := Open(slog.New(slog.DiscardHandler))
		return err
	})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("the error is %v", err)
	}
}

// A kernel that lacks something, told by what it answers.
func TestKernelWithoutNfTables(t *testing.T) {
	for _, answer := range []error{unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP} {
		if err := explain(fmt.Errorf("trying: %w", answer)); !errors.Is(err, ErrUnsupported) || !errors.Is(err, answer) {
			t.Errorf("%v is explained as %v", answer, err)
		}
	}
	if errors.Is(explain(unix.EPERM), ErrUnsupported) || explain(nil) != nil {
		t.Error("no error, or one of rights, is told as a lack of the kernel")
	}
}

func TestRulesThatMakeNoSenseAreToldAndTheOthersKept(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	r := someRules()
	r.Nodes = append(r.Nodes, netip.Addr{}, netip.MustParseAddr("fe80::1%eth0"), netip.MustParseAddr("::ffff:192.0.2.12"))
	r.Prefixes = append(r.Prefixes, netip.Prefix{}, netip.MustParsePrefix("10.244.1.128/25"), netip.MustParsePrefix("10.244.1.9/24"))
	r.Devices = append(r.Devices, "", "a-name-of-16-char", "a/b", "cni0")
	err := fw.Sync(r)
	for _, refused := range []string{"invalid IP", "fe80::1%eth0", "invalid Prefix", `""`, "a-name-of-16-char", "a/b"} {
		if err == nil || !strings.Contains(err.Error(), refused) {
			t.Errorf("nothing is said about %s: %v", refused, err)
		}
	}
	if n := strings.Count(fmt.Sprint(err), "\n") + 1; n != 6 {
		t.Errorf("%d faults were told, want 6: %v", n, err)
	}
	wantListed(t, ns)
	if err := fw.Sync(Rules{}); err == nil {
		t.Error("rules without a port were accepted")
	}
	wantListed(t, ns)
}

func BenchmarkSync(b *testing.B) {
	for _, c := range []struct {
		name  string
		rules func(i int) Rules
	}{
		{"Unchanged", func(int) Rules { return crowd(5000) }},
		{"OneNodeChanged", func(i int) Rules { return crowd(5000 + i%2) }},
		{"FromNothing", func(i int) Rules {
			r := crowd(5000)
			if i%2 == 1 {
				r.Nodes = nil
			}
			return r
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			ns := netns.New(b)
			fw := open(b, ns)
			mustSync(b, fw, c.rules(1))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				mustSync(b, fw, c.rules(i))
			}
		})
	}
}

// Each large change of the table runs within what was given, and nothing else does.
func TestChangesRunWithinWhatIsGiven(t *testing.T) {
	ns := netns.New(t)
	fw := open(t, ns)
	generation := func() (g uint32) {
		if err := fw.with(func(s *socket) (err error) {
			g, err = s.generation()
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return g
	}
	var within uint32
	fw.Around(func(change func() error) error {
		before := generation()
		defer func() { within += generation() - before }()
		return change()
	})
	before := generation()
	for _, r := range []Rules{someRules(), crowd(5000), crowd(5000), {Port: 8472}, someRules(), crowd(1000)} {
		mustSync(t, fw, r)
	}
	nft(t, ns, "delete table inet weft") // somebody else's
	mustSync(t, fw, crowd(1000))
	if all := generation() - before; within != 4 || all != 7 {
		t.Errorf("%d of %d changes were within, want 4 of 7", within, all)
	}
}
