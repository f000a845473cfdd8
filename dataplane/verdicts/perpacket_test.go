//go:build linux

package verdicts

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// iptables are the two that write the same rules for two interfaces.
var iptables = map[string]string{"iptables-legacy-restore": " (legacy)", "iptables-nft-restore": ""}

// perPacketOf loads a ruleset into a namespace of its own, and returns what is
// found in it.
func perPacketOf(t testing.TB, command, text string) string {
	t.Helper()
	ns := netns.New(t)
	var found []string
	ns.MustDo(t, func() error {
		if err := feed(command, text); err != nil {
			return err
		}
		var err error
		found, err = PerPacketRules()
		return err
	})
	return strings.Join(found, ", ")
}

func TestUsualRulesetsAreClean(t *testing.T) {
	files, err := filepath.Glob("testdata/*.*t*")
	if err != nil || len(files) == 0 {
		t.Fatal("no rulesets", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		commands := []string{"nft -f -"}
		if filepath.Ext(file) == ".iptables" {
			commands = []string{"iptables-legacy-restore", "iptables-nft-restore"}
		}
		for _, command := range commands {
			t.Run(filepath.Base(file)+" "+command, func(t *testing.T) {
				if found := perPacketOf(t, command, string(text)); found != "" {
					t.Errorf("found: %s", found)
				}
				// The same with a rule that nobody may overlook.
				if found := perPacketOf(t, command, withLimit(command, string(text))); !strings.Contains(found, "limit") {
					t.Errorf("did not find what was added: %q", found)
				}
			})
		}
	}
}

// withLimit adds to a ruleset a rule before all others.
func withLimit(command, text string) string {
	if command == "nft -f -" {
		return text + "\ntable inet other {\nchain c {\ntype filter hook forward priority 0;\nlimit rate 1/second accept\n}\n}\n"
	}
	return strings.Replace(text, "COMMIT", "-I FORWARD -m limit --limit 1/s -j ACCEPT\nCOMMIT", 1)
}

// Rules of iptables; in what is wanted, @ is the table's name.
func TestIptablesRules(t *testing.T) {
	const (
		accepts = "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
		limits  = "-m limit --limit 5/s -j ACCEPT"
	)
	for name, test := range map[string]struct{ rules, want string }{
		"Limit":      {"-A FORWARD " + limits, "@ FORWARD: limit"},
		"Hashlimit":  {"-A FORWARD -m hashlimit --hashlimit-above 5/s --hashlimit-name x -j DROP", "@ FORWARD: hashlimit"},
		"Quota":      {"-A FORWARD -m quota --quota 1000 -j ACCEPT", "@ FORWARD: quota"},
		"Statistic":  {"-A FORWARD -m statistic --mode nth --every 3 --packet 0 -j DROP", "@ FORWARD: statistic"},
		"Connbytes":  {"-A FORWARD -m connbytes --connbytes 1000: --connbytes-mode bytes --connbytes-dir both -j DROP", "@ FORWARD: connbytes"},
		"Recent":     {"-A FORWARD -m recent --rcheck -j DROP", "@ FORWARD: recent"},
		"String":     {"-A FORWARD -m string --algo bm --string x -j DROP", "@ FORWARD: string"},
		"U32":        {"-A FORWARD -m u32 --u32 0=1 -j DROP", "@ FORWARD: u32"},
		"Length":     {"-A FORWARD -m length --length 1000: -j DROP", "@ FORWARD: length"},
		"Queue":      {"-A FORWARD -j NFQUEUE --queue-num 1 --queue-bypass", "@ FORWARD: NFQUEUE"},
		"Copy":       {"-A FORWARD -j TEE --gateway 10.0.0.1", "@ FORWARD: TEE"},
		"Mark":       {"-A FORWARD -m limit --limit 5/s -j MARK --set-mark 1", "@ FORWARD: limit"},
		"Reject":     {"-A FORWARD -m limit --limit 5/s -j REJECT", "@ FORWARD: limit"},
		"Return":     {"-A FORWARD -m limit --limit 5/s -j RETURN\n-A FORWARD -j DROP", "@ FORWARD: limit"},
		"TwoThings":  {"-A FORWARD -m limit --limit 5/s -m length --length 1 -j DROP", "@ FORWARD: length, @ FORWARD: limit"},
		"Jump":       {"-N X\n-A FORWARD -s 10.1.0.0/16 -j X\n-A X " + limits, "@ X: limit"},
		"JumpToDrop": {"-N X\n-A FORWARD -m limit --limit 5/s -j X\n-A X -j DROP", "@ FORWARD: limit"},

		"Log":              {"-A FORWARD -m limit --limit 5/s -j LOG", ""},
		"Count":            {"-A FORWARD -m limit --limit 5/s", ""},
		"JumpToLog":        {"-N X\n-A FORWARD -m limit --limit 5/s -j X\n-A X -j LOG\n-A X -j RETURN", ""},
		"GotoLog":          {"-N X\n-A FORWARD -m limit --limit 5/s -g X\n-A X -j LOG\n-A FORWARD -j DROP", "@ FORWARD: limit"},
		"NewOnly":          {"-A FORWARD -m conntrack --ctstate NEW " + limits, ""},
		"NewOnlyByState":   {"-A FORWARD -m state --state NEW,INVALID " + limits, ""},
		"NotEstablished":   {"-A FORWARD -m conntrack ! --ctstate ESTABLISHED " + limits, ""},
		"NotNew":           {"-A FORWARD -m conntrack ! --ctstate NEW " + limits, "@ FORWARD: limit"},
		"DestinationNAT":   {"-A FORWARD -m conntrack --ctstate DNAT " + limits, "@ FORWARD: limit"},
		"NewOfAChain":      {"-N X\n-A FORWARD -m conntrack --ctstate NEW -j X\n-A X " + limits, ""},
		"Handshake":        {"-A FORWARD -p tcp --syn " + limits, ""},
		"NoHandshake":      {"-A FORWARD -p tcp ! --syn " + limits, "@ FORWARD: limit"},
		"Ping":             {"-A FORWARD -p icmp " + limits, ""},
		"NoPing":           {"-A FORWARD ! -p icmp " + limits, "@ FORWARD: limit"},
		"Fragments":        {"-A FORWARD -f " + limits, ""},
		"Input":            {"-A INPUT " + limits + "\n-A OUTPUT " + limits, ""},
		"NobodyJumpsThere": {"-N X\n-A X " + limits, ""},

		"BehindAccept":               {accepts + "-A FORWARD " + limits, ""},
		"BehindAcceptOfSome":         {"-A FORWARD -m conntrack --ctstate ESTABLISHED -s 10.0.0.1 -j ACCEPT\n-A FORWARD " + limits, "@ FORWARD: limit"},
		"BehindAcceptOfTranslated":   {"-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n-A FORWARD " + limits, "@ FORWARD: limit"},
		"BehindAcceptOfAll":          {"-A FORWARD -m comment --comment all -j ACCEPT\n-A FORWARD " + limits, ""},
		"BeforeAccept":               {"-A FORWARD " + limits + "\n" + accepts, "@ FORWARD: limit"},
		"BehindReturn":               {"-N X\n-A FORWARD -j X\n-A X -j RETURN\n-A X " + limits, ""},
		"BehindJumpToAccept":         {"-N X\n-A FORWARD -j X\n-A X -m conntrack --ctstate ESTABLISHED -j ACCEPT\n-A FORWARD " + limits, ""},
		"BehindJumpOfSomeToAccept":   {"-N X\n-A FORWARD -s 10.0.0.1 -j X\n-A X -j ACCEPT\n-A FORWARD " + limits, "@ FORWARD: limit"},
		"BehindJumpThatSomeLeave":    {"-N X\n-A FORWARD -j X\n-A X -s 10.0.0.1 -j RETURN\n-A X -j ACCEPT\n-A FORWARD " + limits, "@ FORWARD: limit"},
		"BehindGoto":                 {"-N X\n-A FORWARD -g X\n-A FORWARD " + limits, ""},
		"BehindAcceptOfAnInterface":  {"-A FORWARD -i eth0 -j ACCEPT\n-A FORWARD " + limits, "@ FORWARD: limit"},
		"BehindAcceptOfAnotherTable": {accepts + "COMMIT\n*mangle\n-A FORWARD " + limits, "mangle FORWARD: limit"},
	} {
		for command, suffix := range iptables {
			t.Run(name+" "+command, func(t *testing.T) {
				want := strings.ReplaceAll(test.want, "@", "filter")
				if suffix != "" || want != "" {
					want = strings.ReplaceAll(strings.ReplaceAll(want, "filter", "ip filter"+suffix), "mangle", "ip mangle"+suffix)
				}
				if found := perPacketOf(t, command, "*filter\n"+test.rules+"\nCOMMIT\n"); found != want {
					t.Errorf("found %q, want %q", found, want)
				}
			})
		}
	}
}

// Conntrack has seen no packet in raw, and NAT sees the first one of a flow only.
func TestOtherTablesOfIptables(t *testing.T) {
	for command, suffix := range iptables {
		for rules, want := range map[string]string{
			"*raw\n-A PREROUTING -m conntrack --ctstate ESTABLISHED -j ACCEPT\n-A PREROUTING -m limit --limit 1/s -j DROP":    "ip raw" + suffix + " PREROUTING: limit",
			"*mangle\n-A PREROUTING -m conntrack --ctstate ESTABLISHED -j ACCEPT\n-A PREROUTING -m limit --limit 1/s -j DROP": "",
			"*mangle\n-A POSTROUTING -m limit --limit 1/s -j DROP":                                                            "ip mangle" + suffix + " POSTROUTING: limit",
			"*nat\n-A PREROUTING -p tcp -m statistic --mode random --probability 0.5 -j DNAT --to-destination 10.0.0.1":       "",
		} {
			t.Run(strings.Fields(rules)[0]+" "+command, func(t *testing.T) {
				if found := perPacketOf(t, command, rules+"\nCOMMIT\n"); found != want {
					t.Errorf("found %q, want %q in\n%s", found, want, rules)
				}
			})
		}
	}
	for command, suffix := range map[string]string{"ip6tables-legacy-restore": " (legacy)", "ip6tables-nft-restore": ""} {
		t.Run(command, func(t *testing.T) {
			for rules, want := range map[string]string{
				"-A FORWARD -p tcp -j X\n-A X -m limit --limit 1/s -j DROP":               " X: limit",
				"-A FORWARD -m limit --limit 1/s -g X\n-A X -j LOG":                       " FORWARD: limit",
				"-A FORWARD -g X\n-A FORWARD -m limit --limit 1/s -j DROP":                "",
				"-A FORWARD -p icmpv6 -m limit --limit 1/s -j DROP":                       "",
				"-A FORWARD -p tcp --syn -m limit --limit 1/s -j DROP":                    "",
				"-A FORWARD -s fd00::/8 -j ACCEPT\n-A FORWARD -m quota --quota 1 -j DROP": " FORWARD: quota",
			} {
				if want != "" {
					want = "ip6 filter" + suffix + want
				}
				if found := perPacketOf(t, command, "*filter\n:X - [0:0]\n"+rules+"\nCOMMIT\n"); found != want {
					t.Errorf("found %q, want %q in\n%s", found, want, rules)
				}
			}
		})
	}
}

func TestNftablesRules(t *testing.T) {
	const (
		forward = "type filter hook forward priority 0;"
		drops   = "limit rate 1/second drop"
		table   = "inet t forward: "
	)
	for name, test := range map[string]struct {
		rules string // of chain forward
		extra string // of the table
		want  string
	}{
		"Limit":        {rules: "limit rate 5/second accept", want: table + "limit"},
		"Quota":        {rules: "quota over 100 mbytes drop", want: table + "quota"},
		"Numgen":       {rules: "numgen random mod 2 vmap { 0 : accept, 1 : drop }", want: table + "numgen"},
		"NumgenToMark": {rules: "meta mark set numgen inc mod 2", want: table + "numgen"},
		"Random":       {rules: "meta random < 1000 drop", want: table + "meta random"},
		"Length":       {rules: "meta length > 1000 drop", want: table + "meta length"},
		"IPLength":     {rules: "ip length > 1000 drop", want: table + "ip length"},
		"UDPLength":    {rules: "udp length > 1000 drop", want: table + "@th,32,16"},
		"Content":      {rules: "@th,160,32 0x47455420 drop", want: table + "@th,160,32"},
		"CtBytes":      {rules: "ct bytes > 1000 drop", want: table + "ct bytes"},
		"TCPOption":    {rules: "tcp option timestamp exists drop", want: table + "tcp option"},
		"Copy":         {extra: "chain forward4 { \n type filter hook forward priority 1; \n ip protocol tcp dup to 10.0.0.1 \n}\n", want: "ip t forward4: dup"},
		"ElementLimit": {extra: "set s {\n type ipv4_addr; flags dynamic; size 10;\n}\n", rules: "add @s { ip saddr limit rate over 1/second } drop", want: table + "limit"},
		"SetLimit":     {extra: "set s {\n type ipv4_addr; limit rate over 1/second; elements = { 10.0.0.1 }\n}\n", rules: "ip saddr @s drop", want: table + "limit"},
		"NamedLimit":   {extra: "limit l {\n rate 1/second \n}\n", rules: "limit name l drop", want: table + "limit"},
		"NamedQuota":   {extra: "quota q {\n over 1 bytes \n}\n", rules: "quota name q drop", want: table + "quota"},
		"LimitsByPort": {extra: "limit l {\n rate 1/second \n}\n", rules: "limit name tcp dport map { 80 : \"l\" } drop", want: table + "limit"},
		"MapOfChains":  {extra: "chain x {\n" + drops + "\n}\n", rules: "tcp dport vmap { 80 : jump x }", want: "inet t x: limit"},

		"Log":             {rules: "limit rate 5/second log prefix \"x\" counter"},
		"NamedCounter":    {extra: "counter c {\n }\n", rules: "counter name c drop"},
		"SetOfElements":   {extra: "set s {\n type ipv4_addr; flags dynamic; size 10;\n}\n", rules: "add @s { ip saddr counter } drop"},
		"Connlimit":       {rules: "ct count over 10 drop"},
		"TimeOfDay":       {rules: "meta hour \"08:00\"-\"17:00\" drop"},
		"MSS":             {rules: "tcp flags syn tcp option maxseg size set rt mtu"},
		"FlowsToBackends": {rules: "jhash ip saddr mod 2 vmap { 0 : accept, 1 : drop }"},

		"New":              {rules: "ct state new " + drops},
		"NewOrInvalid":     {rules: "ct state { new, invalid } " + drops},
		"NewOrEstablished": {rules: "ct state new,established " + drops, want: table + "limit"},
		"NotEstablished":   {rules: "ct state != established " + drops},
		"NoneOf":           {rules: "ct state & (established | related) == 0 " + drops},
		"Handshake":        {rules: "tcp flags syn " + drops},
		"HandshakeOfAll":   {rules: "tcp flags & (fin | syn | rst | ack) == syn " + drops},
		"NoHandshake":      {rules: "tcp flags & (syn | ack) == ack " + drops, want: table + "limit"},
		"XmasTree":         {rules: "tcp flags & (fin | psh | urg) == fin | psh | urg " + drops},
		"Ping":             {rules: "ip protocol icmp " + drops},
		"Pings":            {rules: "meta l4proto { icmp, icmpv6 } " + drops},
		"PingType":         {rules: "icmp type echo-request " + drops},
		"Ports":            {rules: "meta l4proto { tcp, udp } " + drops, want: table + "limit"},

		"Names":               {rules: "udp dport 53 " + drops},
		"NamesByTCP":          {rules: "tcp dport 53 " + drops, want: table + "limit"},
		"NamesByAnything":     {rules: "meta l4proto { tcp, udp } th dport 53 " + drops, want: table + "limit"},
		"NoNames":             {rules: "udp dport != 53 " + drops, want: table + "limit"},
		"AnswersOfNames":      {rules: "udp sport 53 " + drops, want: table + "limit"},
		"AllButNames":         {rules: "meta l4proto != udp accept\nudp dport != 53 accept\n" + drops},
		"AllButOtherPort":     {rules: "meta l4proto != udp accept\nudp dport != 54 accept\n" + drops, want: table + "limit"},
		"AllButNamesOfTCP":    {rules: "meta l4proto != tcp accept\ntcp dport != 53 accept\n" + drops, want: table + "limit"},
		"AllButNamesAndTCP":   {rules: "udp dport != 53 accept\n" + drops, want: table + "limit"},
		"AllButPing":          {rules: "meta l4proto != icmp accept\n" + drops},
		"BehindBothProtocols": {rules: "meta l4proto tcp accept\nip protocol udp accept\n" + drops, want: table + "limit"}, // of IPv6
		"BehindEachProtocol":  {rules: "meta l4proto tcp accept\nmeta l4proto udp accept\n" + drops},
		"BehindJumpOfTCP":     {extra: "chain x {\n accept\n}\n", rules: "meta l4proto tcp jump x\nmeta l4proto udp accept\n" + drops},

		"BehindAccept":      {rules: "ct state established,related accept\n" + drops},
		"BehindAcceptOfSet": {rules: "ct state { established, related } accept\n" + drops},
		"BehindMap":         {rules: "ct state vmap { established : accept, related : accept, invalid : drop }\n" + drops},
		"BehindMapOfOthers": {rules: "ct state vmap { new : accept, related : accept }\n" + drops, want: table + "limit"},
		"BehindMapToChain":  {extra: "chain x {\n}\n", rules: "ct state vmap { established : jump x, invalid : drop }\n" + drops, want: table + "limit"},
		"BehindSome":        {rules: "ct state established ip saddr 10.0.0.1 accept\n" + drops, want: table + "limit"},
		"BehindProtocol":    {rules: "meta l4proto tcp accept\n" + drops, want: table + "limit"},
		"BehindLog":         {rules: "log prefix \"x\"\n" + drops, want: table + "limit"},
		"BehindChain":       {extra: "chain x {\n ct state established accept\n}\n", rules: "jump x\n" + drops},

		"Ingress": {extra: "chain i {\n type nat hook prerouting priority 0; \n limit rate 1/second accept \n}\n"},
		"Output":  {extra: "chain o {\n type route hook output priority 0; \n limit rate 1/second accept \n}\n"},
		"BeforeConntrack": {
			extra: "chain p {\n type filter hook prerouting priority raw; \n ct state established accept \n limit rate 1/second drop \n}\n",
			want:  "inet t p: limit",
		},
		"BehindConntrack": {
			extra: "chain p {\n type filter hook prerouting priority mangle; \n ct state established accept \n limit rate 1/second drop \n}\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			family := "inet"
			if strings.HasPrefix(test.want, "ip t") {
				family = "ip"
			}
			text := "table " + family + " t {\n" + test.extra + "chain forward {\n" + forward + "\n" + test.rules + "\n}\n}\n"
			if found := perPacketOf(t, "nft -f -", text); found != test.want {
				t.Errorf("found %q, want %q in\n%s", found, test.want, text)
			}
		})
	}
}

// A packet that is routed comes to the machine through its bridge's input.
func TestRulesOfBridges(t *testing.T) {
	for rules, want := range map[string]string{
		"type filter hook input priority 0; \n ip protocol tcp limit rate 1/second drop": "bridge t c: limit",
		"type filter hook forward priority 0; \n limit rate 1/second drop":               "bridge t c: limit",
		"type filter hook output priority 0; \n ether type arp accept":                   "",
		"type filter hook postrouting priority 0; \n limit rate 1/second drop":           "bridge t c: limit",
	} {
		if found := perPacketOf(t, "nft -f -", "table bridge t {\nchain c {\n"+rules+"\n}\n}\n"); found != want {
			t.Errorf("found %q, want %q in\n%s", found, want, rules)
		}
	}
	if found, want := perPacketOf(t, "ebtables-nft -A FORWARD --limit 1/s -j DROP", ""), "bridge filter FORWARD: limit"; found != want {
		t.Errorf("ebtables-nft: found %q, want %q", found, want)
	}
}

// The kernel is believed, but not more than one should believe anybody.
func FuzzEntries(f *testing.F) {
	f.Add([]byte{}, uint32(0), uint32(0))
	if os.Geteuid() == 0 {
		info, entries := mustReadLegacy(f, "-N X\n-A FORWARD -p tcp --syn -m limit -m conntrack --ctstate NEW -j X\n-A X -j NFQUEUE")
		f.Add(entries, info.validHooks, info.hookEntry[hookForward])
	}
	f.Fuzz(func(_ *testing.T, entries []byte, hooks, forward uint32) {
		for _, family := range legacyFamilies {
			rules, err := family.entry.ruleset(tableInfo{validHooks: hooks, hookEntry: [5]uint32{hookForward: forward}}, entries, established)
			if err == nil {
				_, _ = rules.perPacket()
			}
			family.entry.clearCounters(entries)
		}
	})
}

// mustReadLegacy loads rules into the filter table of a new namespace, and reads
// what the kernel has of it.
func mustReadLegacy(tb testing.TB, rules string) (info tableInfo, entries []byte) {
	tb.Helper()
	ns := netns.New(tb)
	ns.MustDo(tb, func() error {
		if err := feed("iptables-legacy-restore", "*filter\n"+rules+"\nCOMMIT\n"); err != nil {
			return err
		}
		f := legacyFamilies[0]
		fd, err := f.socket()
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		info, entries, err = f.readTable(fd, "filter")
		return err
	})
	return info, entries
}
