package kube

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// published is a node with something to publish.
func published() (flannel.AnnotationKeys, self) {
	keys, _ := flannel.NewAnnotationKeys(flannel.DefaultAnnotationPrefix)
	return keys, self{local: state.Local{Node: "self"}, lease: flannel.Lease{
		Prefix: netip.MustParsePrefix("10.244.1.0/24"), PublicIP: netip.MustParseAddr("192.0.2.1"),
		MAC: state.MAC{0x7e, 0x3b, 0xa3, 0x81, 0x51, 0x24}, VNI: 1, BackendType: flannel.BackendType,
	}}
}

func TestPatchChangesNoMoreThanIsWrong(t *testing.T) {
	keys, me := published()
	p := newPublisher(slog.New(slog.DiscardHandler))
	body, _ := p.Patch(keys, me, own{found: true, annotations: map[string]string{
		"flannel.alpha.coreos.com/backend-type": "vxlan", "flannel.alpha.coreos.com/public-ip": "192.0.2.9",
		"flannel.alpha.coreos.com/public-ipv6": "2001:db8::9",
	}}, true, time.Unix(1_800_000_000, 0))
	const want = `{"metadata":{"annotations":{` +
		`"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"7e:3b:a3:81:51:24\"}",` +
		`"flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.0.2.1",` +
		`"flannel.alpha.coreos.com/public-ipv6":null}},` +
		`"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"2027-01-15T08:00:00Z",` +
		`"lastTransitionTime":"2027-01-15T08:00:00Z","reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}`
	if string(body) != want {
		t.Errorf("patch is\n%s\nwant\n%s", body, want)
	}
}

func TestNothingIsAskedWhileAnAnswerOrASightIsMissing(t *testing.T) {
	keys, me := published()
	p := newPublisher(slog.New(slog.DiscardHandler))
	now := time.Unix(1_800_000_000, 0)
	node := own{found: true, version: "100"}
	ask := func(what string, want bool) {
		t.Helper()
		if body, _ := p.Patch(keys, me, node, false, now); (body != nil) != want {
			t.Errorf("%s: patch %s", what, body)
		}
	}
	ask("first", true)
	ask("an answer is missing", false)
	p.Answer(&corev1.Node{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "120"}}, nil, now)
	ask("our own change was not seen yet", false)
	node.version = "119"
	ask("nor now", false)
	node.version = "120"
	ask("somebody took it back", true)
	p.Answer(&corev1.Node{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "130"}}, nil, now)
	node.version = "20" // etcd was restored from a copy
	now = now.Add(sightTimeout + time.Second)
	ask("no newer version comes", true)
}

func TestFailuresAreTriedAgainLaterAndLater(t *testing.T) {
	keys, me := published()
	p := newPublisher(slog.New(slog.DiscardHandler))
	p.pace = flowcontrol.NewFakeAlwaysRateLimiter() // it has a clock of its own
	now := time.Unix(1_800_000_000, 0)
	node := own{found: true, version: "100"}
	var total time.Duration
	for i := range 100 {
		body, wait := p.Patch(keys, me, node, false, now)
		if body == nil {
			if wait <= 0 || wait > 90*time.Second {
				t.Fatalf("wait %d: %v", i, wait)
			}
			total += wait
			now = now.Add(wait)
			continue
		}
		p.Answer(nil, errors.New("no"), now)
		if p.fault == nil || !strings.Contains(p.fault.Error(), "publishing this node: no") {
			t.Fatalf("fault is %v", p.fault)
		}
	}
	if total < 30*time.Minute {
		t.Errorf("50 failures within %v", total)
	}
	p.Hurry()
	if body, wait := p.Patch(keys, me, node, false, now); body == nil {
		t.Errorf("the API is back, but it is %v to the next try", wait)
	}
}

func TestAPIThatIsBackIsAskedAtOnce(t *testing.T) {
	o := sound(t)
	o.APIURL = "http://192.0.2.1:8080"
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	r := &run{Store: s, nodes: newNodes(s.reader, s.nudge), answers: &answers{nudge: s.nudge}, publisher: newPublisher(s.log), sink: nobody{}}
	r.answers.Note(errors.New("no"))
	r.publisher.notBefore = time.Now().Add(time.Minute)
	r.look(t.Context())
	if r.publisher.notBefore.IsZero() {
		t.Error("it is still away")
	}
	r.answers.Note(nil)
	r.look(t.Context())
	if !r.publisher.notBefore.IsZero() {
		t.Errorf("waiting until %s", r.publisher.notBefore)
	}
}

// nobody takes nothing.
type nobody struct{}

func (nobody) Deliver(state.State) {}
func (nobody) Health(error)        {}

func TestConditionIsSetOnceAndWhenItIsLost(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for have, want := range map[condition][2]bool{ // first, later
		{}:                                      {true, true},
		{"True", "NoRouteCreated", ""}:          {true, true},
		{"Unknown", "NodeStatusUnknown", ""}:    {true, true},
		{"False", "RouteCreated", "by a cloud"}: {true, false},
		networkUp:                               {false, false},
	} {
		for i, first := range []bool{true, false} {
			if got := conditionPatch(have, first, now) != nil; got != want[i] {
				t.Errorf("%+v, first %v: set %v", have, first, got)
			}
		}
	}
	text, _ := json.Marshal(patch{})
	if string(text) != "{}" || !(patch{}).empty() {
		t.Errorf("an empty patch is %s", text)
	}
}
