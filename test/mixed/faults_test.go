//go:build linux && peers

package mixed_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// world is a lab in which things happen.
type world struct {
	*lab.Lab
	// before is what n1 held when the lab was new.
	before string
}

// scenario is something that happens to a world, which is left as it was.
type scenario struct {
	name string
	play func(t *testing.T, w world)
}

// playAll plays scenarios in one lab. After each, n1 holds what it held before,
// and everybody reaches everybody.
func playAll(t *testing.T, l *lab.Lab, all []scenario) {
	w := world{l, mustState(t, l.Node(1))}
	for _, s := range all {
		if !t.Run(s.name, func(t *testing.T) {
			s.play(t, w)
			mustReachAllSoon(t, l)
			mustHold(t, l.Node(1), w.before, "what it held before")
		}) {
			return // the others would fail for the same reason
		}
	}
}

// mustReachAllSoon is mustReachAll that leaves everybody time to hear of the others.
func mustReachAllSoon(tb testing.TB, l *lab.Lab) {
	tb.Helper()
	lab.T(tb).Eventually(30*time.Second, func() error { return reachAll(tb.Context(), l) })
}

// newFaultyLab has weft on n1, which is looked at, flanneld on n2 and weft on n3.
func newFaultyLab(t *testing.T, opts lab.Options) *lab.Lab {
	t.Helper()
	opts.Nodes, opts.Room = 3, true
	opts.Kinds = []lab.Kind{lab.Weft, lab.Flanneld, lab.Weft}
	opts.FlannelFlags = healthFlags
	_, l := newLab(t, opts)
	mustReachAllSoon(t, l)
	return l
}

func TestKubeFaults(t *testing.T) {
	playAll(t, newFaultyLab(t, lab.Options{Store: lab.StoreKube}), []scenario{
		{"the API server's etcd restarts", func(t *testing.T, w world) {
			mustLoseNothing(t, w.Lab, everyRoute(w), func() {
				must(t, w.Etcd.Stop(syscall.SIGKILL))
				time.Sleep(time.Second)
				must(t, w.Etcd.Start(t.Context()))
				mustSeeStranger(t, w)
			})
		}},
		{"a peer has another MAC address", func(t *testing.T, w world) {
			gettingAnotherMAC(t, w, func(n *lab.Node) {
				must(t, w.Kube.Annotate(t.Context(), n, lab.Object{flannelAnnotations + "backend-data": nil}))
			})
		}},
		{"a peer has another address", func(t *testing.T, w world) {
			for _, number := range []int{4, 3} {
				beingReplaced(t, w, func(n *lab.Node) { must(t, n.MoveUplink(t.Context(), number)) })
			}
		}},
		{"a peer has another podCIDR", func(t *testing.T, w world) {
			for _, number := range []int{4, 3} {
				beingReplaced(t, w, func(n *lab.Node) {
					must(t, w.Kube.DeleteNode(t.Context(), n))
					must(t, n.MovePods(t.Context(), number))
					must(t, w.Kube.CreateNode(t.Context(), n))
				})
			}
		}},
		{"a peer loses its annotations", loseAnnotations},
		{"a peer's annotations turn to nonsense", talkNonsense},
		{"Nodes with hostile annotations", hostileNodes},
		{"bad input", badKubeInput},
		// Last, as client-go's retries have long gaps for minutes after it.
		{"the API server is away", func(t *testing.T, w world) {
			outage(t, w,
				func() error { return w.Kube.Stop(syscall.SIGKILL) },
				func() error { return w.Kube.Start(t.Context()) })
		}},
	})
}

// In a cluster of both families what goes wrong with one does not harm the other,
// and an outage is survived as in one of IPv4.
func TestFaultsInBothFamilies(t *testing.T) {
	playAll(t, newFaultyLab(t, lab.Options{Store: lab.StoreKube, Families: lab.DualStack}), []scenario{
		{"a peer has other MAC addresses", func(t *testing.T, w world) {
			gettingAnotherMAC(t, w, func(n *lab.Node) {
				must(t, w.Kube.Annotate(t.Context(), n, lab.Object{flannelAnnotations + "backend-data": nil, flannelAnnotations + "backend-v6-data": nil}))
			})
		}},
		{"a peer's annotations turn to nonsense", talkNonsense},
		{"the API server is away", func(t *testing.T, w world) {
			outage(t, w,
				func() error { return w.Kube.Stop(syscall.SIGKILL) },
				func() error { return w.Kube.Start(t.Context()) })
		}},
	})
}

// With DirectRouting, too, nonsense changes nothing.
func TestNonsenseWithDirectRouting(t *testing.T) {
	playAll(t, newFaultyLab(t, lab.Options{Store: lab.StoreKube, Families: lab.DualStack, DirectRouting: true}), []scenario{
		{"a peer's annotations turn to nonsense", talkNonsense},
	})
}

func TestEtcdFaults(t *testing.T) {
	playAll(t, newFaultyLab(t, lab.Options{Store: lab.StoreEtcd}), []scenario{
		{"etcd has forgotten what the watchers have not seen", forgottenChanges},
		{"the node's own key is deleted", func(t *testing.T, w world) { loseKey(t, w, w.Node(1)) }},
		{"a peer's key is deleted", func(t *testing.T, w world) { loseKey(t, w, w.Node(3)) }},
		{"a peer has another MAC address", func(t *testing.T, w world) {
			gettingAnotherMAC(t, w, func(n *lab.Node) {
				must(t, w.Etcd.Delete(t.Context(), leaseKey(n)))
				must(t, n.WriteSubnetFile())
			})
		}},
		{"a peer has another address", func(t *testing.T, w world) {
			for _, number := range []int{4, 3} {
				beingReplaced(t, w, func(n *lab.Node) {
					must(t, w.Etcd.Delete(t.Context(), leaseKey(n)))
					must(t, n.MoveUplink(t.Context(), number))
					must(t, n.WriteSubnetFile())
				})
			}
		}},
		{"a peer has another subnet", func(t *testing.T, w world) {
			for _, number := range []int{4, 3} {
				beingReplaced(t, w, func(n *lab.Node) {
					must(t, w.Etcd.Delete(t.Context(), leaseKey(n)))
					must(t, n.MovePods(t.Context(), number))
					must(t, n.WriteSubnetFile())
				})
			}
		}},
		{"a peer's lease turns to nonsense", talkNonsense},
		{"leases with hostile content", hostileLeases},
		{"bad input", badEtcdInput},
		{"etcd is away", func(t *testing.T, w world) {
			outage(t, w,
				func() error { return w.Etcd.Stop(syscall.SIGKILL) },
				func() error { return w.Etcd.Start(t.Context()) })
		}},
	})
}

// everyRoute is between all nodes, both ways.
func everyRoute(w world) []route {
	return []route{{w.Pod(1, 1), w.Pod(2, 1)}, {w.Pod(2, 1), w.Pod(3, 1)}, {w.Pod(3, 1), w.Pod(1, 1)}}
}

// routesWithout is everyRoute but for those of a node.
func routesWithout(w world, n *lab.Node) []route {
	return slices.DeleteFunc(everyRoute(w), func(r route) bool { return r.from.Node == n || r.to.Node == n })
}

// outage takes what the nodes hear of each other by away for a while, in which
// agents restart and a node reboots: they go by what they remember. When it is back,
// changes arrive again.
func outage(t *testing.T, w world, begin, end func() error) {
	n := w.Node(1)
	must(t, begin())
	t.Run("and nothing else happens", func(t *testing.T) {
		mustLoseNothing(t, w.Lab, everyRoute(w), func() {
			time.Sleep(2 * time.Second)
			mustBeReady(t, n)
			mustBeReady(t, w.Node(3))
		})
	})
	t.Run("and the agent restarts", func(t *testing.T) {
		mustLoseNothing(t, w.Lab, everyRoute(w), func() {
			stop(t, n, syscall.SIGTERM)
			start(t, n, lab.Weft)
			mustHold(t, n, w.before, "what it held before its agent's restart")
		})
	})
	t.Run("and the node reboots", func(t *testing.T) {
		mustLoseNothing(t, w.Lab, routesWithout(w, n), func() {
			stop(t, n, syscall.SIGKILL)
			must(t, n.Reboot(t.Context()))
			start(t, n, lab.Weft)
			mustHold(t, n, w.before, "what it held before the reboot")
		})
		mustReachAll(t, w.Lab) // with the MAC address that its peers know
	})
	mustLoseNothing(t, w.Lab, everyRoute(w), func() {
		must(t, end())
		mustSeeStranger(t, w)
	})
}

// mustSeeStranger adds a peer that does not exist and takes it away: both have to
// be seen on weft's nodes. After an outage they try again in gaps of up to a minute.
func mustSeeStranger(t *testing.T, w world) {
	t.Helper()
	const strangers = "10.128.0.0/24"
	see := func(want bool) {
		t.Helper()
		for _, n := range []*lab.Node{w.Node(1), w.Node(3)} {
			lab.T(t).Eventually(75*time.Second, func() error {
				routes, err := n.Output(t.Context(), "ip -4 route show "+strangers)
				if err == nil && want != strings.Contains(routes, strangers) {
					err = fmt.Errorf("%s: want a route to a new peer: %v; there is %q", n, want, routes)
				}
				return err
			})
		}
	}
	if w.Kube != nil {
		must(t, w.CreateStrangers(t.Context(), 1))
		see(true)
		must(t, w.DeleteStrangers(t.Context()))
	} else {
		key := lab.FlannelPrefix + "/subnets/10.128.0.0-24"
		must(t, w.Etcd.Put(t.Context(), map[string]string{key: strangersLease}))
		see(true)
		must(t, w.Etcd.Delete(t.Context(), key))
	}
	see(false)
}

// strangersLease is what a flanneld that does not exist has written.
const strangersLease = `{"PublicIP":"198.18.0.0","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:58:0a:80:00:00"}}`

// mustBeReady fails unless the node says that it is.
func mustBeReady(t *testing.T, n *lab.Node) {
	t.Helper()
	if err := ready(n); err != nil {
		t.Errorf("%s is not ready: %v", n, err)
	}
}

// beingReplaced lets n3 be installed anew, with something changed, while n1 and n2
// talk. n1 then holds what it held, with n3's new addresses, and nothing of the old
// ones.
func beingReplaced(t *testing.T, w world, change func(n *lab.Node)) {
	t.Helper()
	n := w.Node(3)
	old := *n
	mustLoseNothing(t, w.Lab, routesWithout(w, n), func() {
		stop(t, n, syscall.SIGTERM)
		must(t, n.Reboot(t.Context()))
		must(t, forgetState(n))
		change(n)
		start(t, n, lab.Weft)
		mustReachAllSoon(t, w.Lab)
		var pairs []string
		for _, pair := range [][2]fmt.Stringer{{old.IP, n.IP}, {old.Prefix, n.Prefix}, {old.VTEP, n.VTEP}} {
			pairs = append(pairs, pair[0].String(), pair[1].String())
		}
		mustHold(t, w.Node(1), strings.NewReplacer(pairs...).Replace(w.before), "what it held before, with the peer's new addresses,")
	})
}

// gettingAnotherMAC is beingReplaced by a node that does not know what MAC address
// it had.
func gettingAnotherMAC(t *testing.T, w world, forget func(n *lab.Node)) {
	t.Helper()
	n := w.Node(3)
	before := mustOverlayMACs(t, n)
	beingReplaced(t, w, forget)
	if slices.Equal(before, mustOverlayMACs(t, n)) {
		t.Errorf("the peer has the MAC address that it had, %v: this tests nothing", before)
	}
}

// forgetState empties what outlives a reboot.
func forgetState(n *lab.Node) error {
	entries, err := os.ReadDir(n.Path("/var/lib/weft"))
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(n.Path("/var/lib/weft"), e.Name())))
	}
	return err
}

// loseAnnotations takes a peer's annotations away, after which it is none.
func loseAnnotations(t *testing.T, w world) {
	const path, prefix = "/api/v1/nodes/stranger1", "10.128.0.0/24"
	n := w.Node(1)
	mustLoseNothing(t, w.Lab, everyRoute(w), func() {
		must(t, w.CreateStrangers(t.Context(), 1))
		must(t, n.WaitForPeers(t.Context()))
		must(t, w.Kube.Ask(t.Context(), http.MethodPatch, path, lab.Object{"metadata": lab.Object{"annotations": lab.Object{"$patch": "replace"}}}, nil))
		lab.T(t).Eventually(5*time.Second, func() error {
			routes, err := n.Output(t.Context(), "ip -4 route show "+prefix)
			if err == nil && routes != "" {
				err = fmt.Errorf("a route to a peer without annotations: %s", routes)
			}
			return err
		})
		must(t, w.DeleteStrangers(t.Context()))
	})
}

// loseKey deletes a node's key in etcd. It gets it back, with the same content, and
// what it does not carry is not disturbed.
func loseKey(t *testing.T, w world, n *lab.Node) {
	published, file := mustPublished(t, n, w.Lab), mustSubnetFile(t, n)
	mustLoseNothing(t, w.Lab, routesWithout(w, n), func() {
		must(t, w.Etcd.Delete(t.Context(), leaseKey(n)))
		lab.T(t).Eventually(15*time.Second, func() error {
			if got := mustPublished(t, n, w.Lab); fmt.Sprint(got) != fmt.Sprint(published) {
				return fmt.Errorf("etcd has %v of %s, want %v", got, n, published)
			}
			return nil
		})
		mustReachAllSoon(t, w.Lab)
	})
	if got := mustSubnetFile(t, n); got != file {
		t.Errorf("the subnet file is now\n%s\nwant\n%s", got, file)
	}
}

// leaseKey is where a node's lease is in etcd.
func leaseKey(n *lab.Node) string {
	return lab.FlannelPrefix + "/subnets/" + strings.ReplaceAll(n.Prefix.String(), "/", "-")
}

// forgottenChanges changes the peers while nobody is connected to etcd, and has it
// forget how it came to that: those who watch can't go on where they were. Flanneld
// pauses: it would be busy for minutes with removing itself from its peers.
func forgottenChanges(t *testing.T, w world) {
	const kept, gone = lab.FlannelPrefix + "/subnets/10.128.0.0-24", lab.FlannelPrefix + "/subnets/10.128.1.0-24"
	n, flannel := w.Node(1), w.Node(2)
	stop(t, flannel, syscall.SIGTERM)
	see := func(want string) {
		t.Helper()
		lab.T(t).Eventually(30*time.Second, func() error {
			routes, err := n.Output(t.Context(), "sh", "-c", "ip -4 route show | sed -n 's/^\\(10.128[^ ]*\\) .*/\\1/p'")
			if err == nil && strings.TrimSpace(routes) != want {
				err = fmt.Errorf("routes to strangers: %q, want %q", routes, want)
			}
			return err
		})
	}
	mustLoseNothing(t, w.Lab, everyRoute(w), func() {
		must(t, w.Etcd.Put(t.Context(), map[string]string{gone: strings.NewReplacer("198.18.0.0", "198.18.0.1", "80:00:00", "80:01:00").Replace(strangersLease)}))
		see("10.128.1.0/24")
		must(t, w.Etcd.Aside(t.Context(), func() error {
			return errors.Join(
				w.Etcd.Delete(t.Context(), gone),
				w.Etcd.Put(t.Context(), map[string]string{kept: strangersLease}),
				w.Etcd.Compact(t.Context()),
			)
		}))
		see("10.128.0.0/24")
		must(t, w.Etcd.Delete(t.Context(), kept))
		see("")
	})
	start(t, flannel, lab.Flanneld)
}

// must fails the test on an error.
func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
