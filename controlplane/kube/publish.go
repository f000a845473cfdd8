package kube

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/weft-net/weft/controlplane/flannel"
)

// networkUp is what flannel says once a node carries traffic, word for word.
var networkUp = condition{string(corev1.ConditionFalse), "FlannelIsUp", "Flannel is running on this node"}

// patch is a strategic merge patch of a Node.
type patch struct {
	Metadata *patchMetadata `json:"metadata,omitempty"`
	Status   *patchStatus   `json:"status,omitempty"`
}

type patchMetadata struct {
	// Annotations are set, or removed where there is no value.
	Annotations map[string]*string `json:"annotations"`
}

type patchStatus struct {
	Conditions []corev1.NodeCondition `json:"conditions"`
}

// empty tells whether there is nothing to change.
func (p patch) empty() bool { return p.Metadata == nil && p.Status == nil }

// leasePatch is what has to be changed of the Node's annotations so that they
// publish the lease.
func leasePatch(keys flannel.AnnotationKeys, lease flannel.Lease, have map[string]string) *patchMetadata {
	set, remove := keys.Marshal(lease)
	changes := map[string]*string{}
	for key, value := range set {
		if old, ok := have[key]; !ok || old != value {
			changes[key] = &value
		}
	}
	for _, key := range remove {
		if _, ok := have[key]; ok {
			changes[key] = nil
		}
	}
	if len(changes) == 0 {
		return nil
	}
	return &patchMetadata{changes}
}

// conditionPatch is what has to be changed of the condition NetworkUnavailable
// for a node that carries traffic. The first time it is made flannel's; later
// whoever says that the network is there may do so in other words, as a cloud
// provider's route controller does.
func conditionPatch(have condition, first bool, now time.Time) *patchStatus {
	if have == networkUp || !first && have.status == networkUp.status {
		return nil
	}
	return &patchStatus{[]corev1.NodeCondition{{
		Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionStatus(networkUp.status),
		Reason: networkUp.reason, Message: networkUp.message,
		LastHeartbeatTime: metav1.NewTime(now), LastTransitionTime: metav1.NewTime(now),
	}}}
}

// publisher keeps the own Node as it should be. It belongs to the goroutine of
// Run, but for the asking itself.
type publisher struct {
	log *slog.Logger
	// pace has the API left alone when somebody else changes the same things
	// again and again.
	pace flowcontrol.RateLimiter
	// backoff says how long to wait after a failure.
	backoff wait.Backoff
	// notBefore is when to try again.
	notBefore time.Time
	// asked is the patch whose answer is waited for, or empty.
	asked patch
	// seen is the version of the Node that has our last change, made at. Sights
	// of older ones say nothing about it.
	seen string
	made time.Time
	// wanted is the lease that is being published, published the last that was;
	// told says that the condition was set once.
	wanted, published flannel.Lease
	told              bool
	// fault is why the last attempt failed.
	fault error
}

// The pace of changes of the own Node: some at once, then one in ten seconds.
const (
	changesAtOnce    = 5
	changesPerSecond = 0.1
)

// sightTimeout is how long a change of the own Node may take to be seen by its
// watch. An etcd that was restored from a copy begins to count versions anew.
const sightTimeout = time.Minute

// newBackoff is the time between attempts: a second at first, then twice the
// last up to a minute, and up to half as much more, so that nodes that failed
// together do not come back together.
func newBackoff() wait.Backoff {
	return wait.Backoff{Duration: time.Second, Factor: 2, Jitter: 0.5, Steps: 100, Cap: time.Minute}
}

// newPublisher makes one that has published nothing.
func newPublisher(log *slog.Logger) *publisher {
	return &publisher{
		log: log, backoff: newBackoff(),
		pace: flowcontrol.NewTokenBucketRateLimiter(changesPerSecond, changesAtOnce),
	}
}

// Patch says what to ask of the API now. Nothing is asked when the Node is as
// it should be, and when it is too early: then wait is how long to wait.
func (p *publisher) Patch(keys flannel.AnnotationKeys, me self, o own, carrying bool, now time.Time) (body []byte, wait time.Duration) {
	if !p.asked.empty() {
		return nil, 0 // there will be an answer
	}
	if hold := p.made.Add(sightTimeout).Sub(now); hold > 0 && older(o.version, p.seen) {
		return nil, hold
	}
	wanted := patch{Metadata: leasePatch(keys, me.lease, o.annotations)}
	if carrying {
		wanted.Status = conditionPatch(o.network, !p.told, now)
		p.told = p.told || wanted.Status == nil
	}
	switch {
	case wanted.empty():
		p.fault = nil
		return nil, 0
	case now.Before(p.notBefore):
		return nil, p.notBefore.Sub(now)
	case !p.pace.TryAccept():
		p.notBefore = now.Add(time.Duration(float64(time.Second) / changesPerSecond))
		return nil, p.notBefore.Sub(now)
	}
	body, err := json.Marshal(wanted)
	if err != nil {
		p.fault = fmt.Errorf("writing the patch for node %q: %w", me.local.Node, err)
		return nil, 0
	}
	p.asked, p.wanted = wanted, me.lease
	return body, 0
}

// Answer takes what became of a patch.
func (p *publisher) Answer(node *corev1.Node, err error, now time.Time) {
	asked := p.asked
	p.asked = patch{}
	if err != nil {
		p.fault = fmt.Errorf("publishing this node: %w%s", err, publishHint(err))
		p.notBefore = now.Add(p.backoff.Step())
		return
	}
	p.fault, p.notBefore, p.backoff = nil, time.Time{}, newBackoff()
	p.report(asked)
	p.seen, p.made, p.published = node.ResourceVersion, now, p.wanted
}

// report logs what was changed, and whether it was somebody else who made that
// necessary.
func (p *publisher) report(done patch) {
	if done.Metadata != nil {
		keys := slices.Sorted(maps.Keys(done.Metadata.Annotations))
		if p.published == p.wanted {
			p.log.Warn("somebody changed this node's annotations; they are set again", "annotations", keys)
		} else {
			p.log.Info("this node is published", "annotations", keys)
		}
	}
	if done.Status != nil {
		if p.told {
			p.log.Warn("somebody took back this node's condition NetworkUnavailable=False; it is set again")
		} else {
			p.log.Info("this node's condition NetworkUnavailable is set to False")
		}
	}
}

// Hurry forgets a wait: the API is back.
func (p *publisher) Hurry() { p.notBefore, p.backoff = time.Time{}, newBackoff() }

// publishHint says what to do about an error.
func publishHint(err error) string {
	if apierrors.IsForbidden(err) {
		return " (allow this service account to patch nodes/status, as flannel's ClusterRole does)"
	}
	return ""
}

// older tells whether version a of an object was before b. What can't be
// compared is taken for new.
func older(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order < 0
}
