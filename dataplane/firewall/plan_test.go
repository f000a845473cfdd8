package firewall

import (
	"net/netip"
	"strings"
	"testing"
)

// These tests need no kernel: they compare tables, and look at the commands.

// testTable is a small table, as it shall be.
func testTable(t *testing.T, change func(*Rules)) table {
	t.Helper()
	r := Rules{
		Port:     8472,
		Nodes:    []netip.Addr{netip.MustParseAddr("192.0.2.12"), netip.MustParseAddr("2001:db8::12")},
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
		Devices:  []string{"cni0"},
	}
	if change != nil {
		change(&r)
	}
	want, err := r.table()
	if err != nil {
		t.Fatal(err)
	}
	return want
}

func wantPlan(t *testing.T, want, have table, commands ...string) {
	t.Helper()
	if got, want := makePlan(want, have).String(), strings.Join(append(commands, ""), "\n"); got != want {
		t.Errorf("the plan is\n%swant\n%s", got, want)
	}
}

func TestPlanForWhatIsRight(t *testing.T) {
	wantPlan(t, testTable(t, nil), testTable(t, nil))
}

func TestPlanForANodeThatChangesItsAddress(t *testing.T) {
	now := testTable(t, func(r *Rules) { r.Nodes[0] = netip.MustParseAddr("192.0.2.13") })
	wantPlan(t, now, testTable(t, nil),
		"add element inet weft nodes4 { 192.0.2.13 }",
		"delete element inet weft nodes4 { 192.0.2.12 }")
}

func TestPlanForAnotherPodPrefix(t *testing.T) {
	now := testTable(t, func(r *Rules) { r.Prefixes[0] = netip.MustParsePrefix("10.244.7.0/24") })
	wantPlan(t, now, testTable(t, nil),
		"flush set inet weft prefixes4",
		"add element inet weft prefixes4 { 10.244.7.0/24 }")
}

func TestPlanForANewDevice(t *testing.T) {
	now := testTable(t, func(r *Rules) { r.Devices = append(r.Devices, "docker0") })
	wantPlan(t, now, testTable(t, nil), `add element inet weft pod_devices { "docker0" }`)
}

func TestPlanForATableAsleep(t *testing.T) {
	have := testTable(t, nil)
	have.odd = true
	wantPlan(t, testTable(t, nil), have, "add table inet weft")
}

// What leans on what is taken away goes first, and comes again after what
// takes its place.
func TestPlanForASetOfAnotherType(t *testing.T) {
	have := testTable(t, nil)
	have.sets["nodes4"] = set{setType: setType{key: "ether_addr"}}
	have.chains["mine"] = chain{hook: "another"}
	lines := strings.Split(makePlan(testTable(t, nil), have).String(), "\n")
	before := []string{
		"flush table inet weft",
		"delete set inet weft nodes4",
		"delete chain inet weft mine",
		"add set inet weft nodes4 { type ipv4_addr; }",
		"add element inet weft nodes4 { 192.0.2.12 }",
		"add rule inet weft to_node ct direction reply return",
	}
	if got := strings.Join(lines[:len(before)], "\n"); got != strings.Join(before, "\n") {
		t.Errorf("the plan begins\n%s\nwant\n%s", got, strings.Join(before, "\n"))
	}
	for _, line := range lines[len(before):] {
		if line != "" && !strings.HasPrefix(line, "add rule ") {
			t.Errorf("after the first rule comes %q", line)
		}
	}
}
