//go:build linux

package ebpf

import (
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
)

// The table of reasons names the C constants, in their order and all of them.
func TestReasonsAreThoseOfTheObject(t *testing.T) {
	spec, err := loadWeft()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("reason", &enum); err != nil {
		t.Fatal(err)
	}
	if len(enum.Values) != len(Reasons)+1 {
		t.Fatalf("the object has %d reasons with REASON_COUNT, the table %d without", len(enum.Values), len(Reasons))
	}
	for i, v := range enum.Values {
		if v.Value != uint64(i) {
			t.Errorf("%s is %d, want %d", v.Name, v.Value, i)
		}
		if i == len(Reasons) {
			if v.Name != "REASON_COUNT" {
				t.Errorf("the last reason is %s, want REASON_COUNT", v.Name)
			}
			continue
		}
		if want := strings.ToLower(strings.TrimPrefix(v.Name, "REASON_")); Reasons[i].Name != want {
			t.Errorf("reason %d is %q, want %q", i, Reasons[i].Name, want)
		}
	}
}

func TestEveryReasonIsExplained(t *testing.T) {
	names := map[string]bool{}
	for i, r := range Reasons {
		if names[r.Name] {
			t.Errorf("reason %q is there twice", r.Name)
		}
		names[r.Name] = true
		if explained := r.Help != ""; explained != (i != int(weftReasonREASON_NONE)) {
			t.Errorf("reason %q: help %q", r.Name, r.Help)
		}
		if strings.HasSuffix(r.Help, ".") || strings.ToLower(r.Name) != r.Name {
			t.Errorf("reason %q: %q is not as the others are written", r.Name, r.Help)
		}
	}
}

// The values of the source check stand where the C enum has them.
func TestSourceChecksAreThoseOfTheObject(t *testing.T) {
	spec, err := loadWeft()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("source_check", &enum); err != nil {
		t.Fatal(err)
	}
	if len(enum.Values) != len(SourceChecks) {
		t.Fatalf("the object has %d values, the table %d", len(enum.Values), len(SourceChecks))
	}
	for _, v := range enum.Values {
		want := strings.ToLower(strings.TrimPrefix(v.Name, "SOURCE_CHECK_"))
		if SourceChecks[v.Value] != want {
			t.Errorf("source check %d is %q, want %q", v.Value, SourceChecks[v.Value], want)
		}
		if sourceCheck(want) != uint32(v.Value) {
			t.Errorf("source check %q becomes %d, want %d", want, sourceCheck(want), v.Value)
		}
	}
	if got := sourceCheck("a typing error"); got != uint32(weftSourceCheckSOURCE_CHECK_OBSERVE) {
		t.Errorf("an unknown source check becomes %d, want observe", got)
	}
}

func TestPathsAreThoseOfTheObject(t *testing.T) {
	spec, err := loadWeft()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("packet_path", &enum); err != nil {
		t.Fatal(err)
	}
	for _, v := range enum.Values[:len(enum.Values)-1] {
		if want := strings.ToLower(strings.TrimPrefix(v.Name, "PATH_")); PathNames[v.Value] != want {
			t.Errorf("path %d is %q, want %q", v.Value, PathNames[v.Value], want)
		}
	}
}

// provokedElsewhere are the reasons that need more than one packet, or a kernel
// that does more than to run a program, with the test that provokes them.
var provokedElsewhere = map[weftReason]func(*testing.T){
	weftReasonREASON_AGGREGATE_RECENT:   TestSmallPacketsDoNotOvertakeAggregates,
	weftReasonREASON_HOST_RENEWAL:       TestProofLife,
	weftReasonREASON_MARKED:             TestMarkedPacketOnAHostThatRoutesByMark,
	weftReasonREASON_UNDERLAY_NEIGHBOUR: TestNextHopIsNotKnownYet,
	weftReasonREASON_PEER_NO_ROOM:       TestPeerWithoutRoom,
	weftReasonREASON_SEGMENT_TRAIN:      TestTrainsOfSegmentsAreTheKernels,
	weftReasonREASON_HOST_MANGLES:       TestDeparturesFromTheUplink,
	weftReasonREASON_SOURCE_UNSEEN:      TestArrivalsOnTheOverlayDevice,
	weftReasonREASON_ENCAP_REFUSED:      TestTunnelWithinAPod,
	weftReasonREASON_OUTER_VLAN:         TestVLANTaggedPacketOnTheUplink,
	weftReasonREASON_FLOW_MANGLED:       TestWhatIsNotWitnessed,
	weftReasonREASON_NOTE_UNHEARD:       TestDriverStripsOnceItIsHeard,
	weftReasonREASON_FLOW_ORDER:         TestPacketsBehindOneInTheStackStandInLine,
	// The kernel refuses these only when it is out of memory.
	weftReasonREASON_REWRITE_FAILED: TestRewriteThatFails,
	weftReasonREASON_STRIP_REFUSED:  TestRefusedRoomLeavesThePacketUntouched,
}

func TestEveryReasonIsProvoked(t *testing.T) {
	provoked := map[weftReason]bool{weftReasonREASON_NONE: true}
	for _, c := range slices.Concat(outCases(), inCases(), expressOutCases(), expressInCases(), injectionCases()) {
		provoked[c.reason] = true
	}
	for reason := range provokedElsewhere {
		provoked[reason] = true
	}
	for i, r := range Reasons {
		if !provoked[weftReason(i)] {
			t.Errorf("no packet test provokes %q", r.Name)
		}
	}
}
