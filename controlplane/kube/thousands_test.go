//go:build linux && peers

package kube

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weft-net/weft/dataplane/state"
)

// many is how many nodes the largest cluster has.
const many = 5000

// manyNode is one of them, as its kubelet and its flannel leave it.
func manyNode(i int) *corev1.Node {
	cidr := fmt.Sprintf("10.%d.%d.0/24", 128+i/256, i%256)
	ip := fmt.Sprintf("198.18.%d.%d", i/256, i%256)
	var images []corev1.ContainerImage
	for j := range 20 {
		images = append(images, corev1.ContainerImage{Names: []string{
			fmt.Sprintf("registry.example.com/team/image-%d@sha256:%064d", j, j), fmt.Sprintf("registry.example.com/team/image-%d:v1.%d", j, j),
		}, SizeBytes: 1 << 26})
	}
	return &corev1.Node{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("many-%04d", i), UID: types.UID(fmt.Sprintf("00000000-0000-0000-0000-%012d", i)), CreationTimestamp: metav1.Now(),
			Annotations: map[string]string{
				prefix + "backend-data":        fmt.Sprintf(`{"VNI":1,"VtepMAC":"02:00:00:00:%02x:%02x"}`, i/256, i%256),
				prefix + "backend-type":        "vxlan",
				prefix + "kube-subnet-manager": "true",
				prefix + "public-ip":           ip,
			},
		},
		Spec:   corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}, Images: images},
	}
}

// nodesKey is where the API server keeps Nodes in etcd. To write there is faster
// than the API server would be, which then tells everybody all at once.
const nodesKey = "/registry/minions/"

// askEtcd calls etcd's API.
func askEtcd(method string, question any) error {
	text, err := json.Marshal(question)
	if err != nil {
		return err
	}
	answer, err := shared.admin.Post("http://127.0.0.1:"+shared.etcdPort+"/v3/kv/"+method, "application/json", bytes.NewReader(text))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if said, _ := io.ReadAll(answer.Body); answer.StatusCode != http.StatusOK {
		return fmt.Errorf("etcd %s: %s: %s", method, answer.Status, said)
	}
	return nil
}

// eachOfMany does something for each of the many, eight at a time. They are
// changed one by one, as an API server would: a watch that ends amid changes of
// one revision can't go on there.
func eachOfMany(t *testing.T, do func(*corev1.Node) error) {
	t.Helper()
	const workers = 8
	errs := make([]error, workers)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for i := w; i < many && errs[w] == nil; i += workers {
				errs[w] = do(manyNode(i))
			}
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// createMany creates the many.
func createMany(t *testing.T) {
	t.Helper()
	eachOfMany(t, func(n *corev1.Node) error {
		value, err := json.Marshal(n)
		if err != nil {
			return err
		}
		return askEtcd("put", object{"key": []byte(nodesKey + n.Name), "value": value})
	})
}

// deleteMany deletes them.
func deleteMany(t *testing.T) {
	t.Helper()
	eachOfMany(t, func(n *corev1.Node) error {
		return askEtcd("deleterange", object{"key": []byte(nodesKey + n.Name)})
	})
}

// cpu is the CPU time of this process so far.
func cpu() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// memory is the heap in use after a collection, in KiB, and what the process
// holds and has held at most.
func memory() (heap int, resident string) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmRSS:") || strings.HasPrefix(line, "VmHWM:") {
			resident += " " + strings.Join(strings.Fields(line), " ")
		}
	}
	return int(m.HeapAlloc >> 10), resident
}

func TestFiveThousandNodes(t *testing.T) {
	empty(t)
	makeNode(t, me, []string{"10.127.1.0/24"}, nil)
	run := func() *rig {
		t.Helper()
		r := newRig(t, `{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}`)
		r.store.timing = defaultTiming()
		return r.run(ourOffer())
	}
	peers := func(number int) func(state.State) bool {
		return func(s state.State) bool { return len(s.Peers) == number }
	}
	// All of them come or go while the store runs.
	change := func(r *rig, what string, number int, do func()) {
		t.Helper()
		before, deliveries, began := cpu(), r.sink.delivered(), time.Now()
		do()
		done := time.Now()
		r.waitState(what, peers(number))
		deliveries = r.sink.delivered() - deliveries
		took := r.sink.at.Sub(began)
		t.Logf("%d %s in %v, last delivery %v after; %d deliveries; %v of CPU", many, what, done.Sub(began), r.sink.at.Sub(done), deliveries, cpu()-before)
		if most := int(took/r.store.timing.Gap) + 2; deliveries > most {
			t.Errorf("%s: %d deliveries, want %d at most", what, deliveries, most)
		}
	}

	r := run()
	r.waitState("itself", peers(0))
	heapBefore, _ := memory()
	change(r, "created", many, func() { createMany(t) })
	heap, resident := memory()
	t.Logf("heap %d KiB more;%s", heap-heapBefore, resident)
	r.stop()

	// They are there when the store starts.
	before, began := cpu(), time.Now()
	r = run()
	r.waitState("all peers", peers(many))
	t.Logf("%d at start: %v, %v of CPU", many, r.sink.at.Sub(began), cpu()-before)
	if n := r.sink.delivered(); n != 1 {
		t.Errorf("%d deliveries, want one", n)
	}
	change(r, "deleted", 0, func() { deleteMany(t) })
}
