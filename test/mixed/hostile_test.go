//go:build linux && peers

package mixed_test

import (
	"fmt"
	"maps"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// hostileNodes adds Nodes that say what no flanneld says, or claim what is
// others'. Nothing changes on n1. Flanneld believes much of it, and pauses.
func hostileNodes(t *testing.T, w world) {
	n, flannel := w.Node(1), w.Node(2)
	stop(t, flannel, syscall.SIGTERM)
	routes := mustPodRoutes(t, w.Node(3))
	good := map[string]any{
		"kube-subnet-manager": "true",
		"backend-type":        "vxlan",
		"backend-data":        `{"VNI":1,"VtepMAC":"0a:58:0a:c8:00:00"}`,
		"public-ip":           "198.18.7.7",
	}
	const mac = `{"VNI":1,"VtepMAC":"%s"}`
	var paths []string
	defer func() {
		for _, path := range paths {
			must(t, w.Kube.Ask(t.Context(), http.MethodDelete, path, nil, nil))
		}
		start(t, flannel, lab.Flanneld)
	}()
	mustLoseNothing(t, w.Lab, everyRoute(w), func() {
		for i, evil := range []struct {
			podCIDR    string
			key, value string
		}{
			{"", "backend-data", `{"VNI":1,"VtepMAC":"`},
			{"", "backend-data", `[]`},
			{"", "backend-data", fmt.Sprintf(mac, "ff:ff:ff:ff:ff:ff")},
			{"", "backend-data", fmt.Sprintf(mac, "01:00:5e:00:00:01")},
			{"", "backend-data", fmt.Sprintf(mac, "00:00:00:00:00:00")},
			{"", "backend-data", strings.Repeat(`{"VNI":1,`, 20_000)},
			{"", "backend-type", "host-gw"},
			{"", "public-ip", "0.0.0.0"},
			{"", "public-ip", "127.0.0.1"},
			{"", "public-ip", "224.0.0.1"},
			{"", "public-ip", "255.255.255.255"},
			{"", "public-ip", n.IP.String()},
			{"", "public-ip", "2001:db8::13"},
			{"", "public-ip", "192.0.2.13; reboot"},
			{"0.0.0.0/0", "", ""},
			{"192.0.2.0/24", "", ""},
			{"11.0.0.0/24", "", ""},
			{w.Network().String(), "", ""},
			{lab.Network.String(), "", ""},
			{n.Prefix.String(), "", ""},
			{w.Node(3).Prefix.String(), "", ""},
			{"10.244.2.128/25", "", ""},
		} {
			annotations := lab.Object{}
			for key, value := range good {
				annotations[flannelAnnotations+key] = value
			}
			if evil.key != "" {
				annotations[flannelAnnotations+evil.key] = evil.value
			}
			if evil.podCIDR == "" {
				evil.podCIDR = fmt.Sprintf("10.200.%d.0/24", i)
			}
			name := fmt.Sprintf("evil%d", i)
			must(t, w.Kube.Ask(t.Context(), http.MethodPost, "/api/v1/nodes", lab.Object{
				"metadata": lab.Object{"name": name, "annotations": annotations},
				"spec":     lab.Object{"podCIDR": evil.podCIDR, "podCIDRs": []string{evil.podCIDR}},
			}, nil))
			paths = append(paths, "/api/v1/nodes/"+name)
		}
		mustSeeStranger(t, w) // and so all that was written before
		mustHold(t, n, w.before, "what it held before")
		mustSay(t, n, "node=evil")
		if got := mustPodRoutes(t, w.Node(3)); got != routes {
			t.Errorf("n3 had the routes\n%s\nand has\n%s", routes, got)
		}
	})
}

// talkNonsense has what a peer has published turn to nonsense. Its peers go by what
// it said before, flanneld and weft alike, until it says something better.
func talkNonsense(t *testing.T, w world) {
	n, peer := w.Node(1), w.Node(3)
	stop(t, peer, syscall.SIGTERM) // or it would set it right at once
	published := mustPublished(t, peer, w.Lab)
	lines := strings.Count(n.AgentLog(), "going by what it said before")
	nonsense := map[string]func(text string) string{
		"another backend": func(text string) string { return strings.ReplaceAll(text, "vxlan", "host-gw") },
		"no MAC address":  func(text string) string { return strings.ReplaceAll(text, `"VtepMAC":"`, `"VtepMAC":"ff:ff:ff:`) },
		"cut off":         func(text string) string { return strings.TrimSuffix(text, "}") },
		"no address": func(text string) string {
			return strings.NewReplacer(peer.IP.String(), "127.0.0.1; reboot", peer.IPv6.String(), "ff02::1").Replace(text)
		},
	}
	mustLoseNothing(t, w.Lab, everyRoute(w), func() {
		for what, of := range nonsense {
			said := map[string]string{}
			for key, text := range published {
				said[key] = of(text)
			}
			if maps.Equal(said, published) {
				t.Fatalf("%s: nothing changes of %v", what, published)
			}
			mustPublish(t, w, peer, said)
			lab.T(t).Eventually(10*time.Second, func() error {
				now := strings.Count(n.AgentLog(), "going by what it said before")
				if now == lines {
					return fmt.Errorf("%s: the agent does not say what it goes by:\n%s", what, n.AgentLog())
				}
				lines = now
				return nil
			})
			time.Sleep(200 * time.Millisecond) // for it to do what it should not
			mustHold(t, n, w.before, what+": what it held before")
		}
		mustPublish(t, w, peer, published)
		start(t, peer, lab.Weft)
	})
}

// mustPublish writes to the store in a node's name.
func mustPublish(t *testing.T, w world, n *lab.Node, values map[string]string) {
	t.Helper()
	if w.Kube == nil {
		must(t, w.Etcd.Put(t.Context(), values))
		return
	}
	annotations := lab.Object{}
	for key, value := range values {
		annotations[key] = value
	}
	must(t, w.Kube.Annotate(t.Context(), n, annotations))
}

// mustSay fails unless an agent's log says of many what is wrong with them. It need
// not be all: a crowd shall not flood it.
func mustSay(t *testing.T, n *lab.Node, what string) {
	t.Helper()
	const many = 10
	if said := strings.Count(n.AgentLog(), what); said < many {
		t.Errorf("the agent's log names %d, want %d at least:\n%s", said, many, n.AgentLog())
	}
}

// mustPodRoutes are a node's routes to pods that exist.
func mustPodRoutes(t *testing.T, n *lab.Node) string {
	t.Helper()
	return lab.T(t).Run(n, "ip -4 route show root "+lab.Network.String())
}

// hostileLeases is the same for leases in etcd.
func hostileLeases(t *testing.T, w world) {
	n, flannel := w.Node(1), w.Node(2)
	stop(t, flannel, syscall.SIGTERM)
	routes := mustPodRoutes(t, w.Node(3))
	of := func(ip, mac string) string {
		return strings.NewReplacer("198.18.0.0", ip, "0a:58:0a:80:00:00", mac).Replace(strangersLease)
	}
	const subnets, mac = lab.FlannelPrefix + "/subnets/", "0a:58:0a:c8:00:00"
	evil := map[string]string{
		"10.200.0.0-24":            "",
		"10.200.1.0-24":            "{",
		"10.200.2.0-24":            strings.Repeat("[", 20_000),
		"10.200.3.0-24":            of("198.18.7.7", "ff:ff:ff:ff:ff:ff"),
		"10.200.4.0-24":            of("198.18.7.7", "0a:58"),
		"10.200.5.0-24":            of("127.0.0.1", mac),
		"10.200.6.0-24":            of("0.0.0.0", mac),
		"10.200.7.0-24":            of(n.IP.String(), mac),
		"10.200.9.0-24":            strings.Replace(of("198.18.7.7", mac), `"vxlan"`, `"udp"`, 1),
		"10.200.10.0-33":           of("198.18.7.7", mac),
		"10.200.11.0-24&fd00::-56": "null",
		"nothing":                  of("198.18.7.7", mac),
		"../../config":             of("198.18.7.7", mac),
		"0.0.0.0-0":                of("198.18.7.7", mac),
		"192.0.2.0-24":             of("198.18.7.7", mac),
		"11.0.0.0-24":              of("198.18.7.7", mac),
		"10.244.0.0-16":            of("198.18.7.7", mac),
		"10.244.1.128-25":          of("198.18.7.7", mac),
		"10.244.3.0-25":            of("198.18.7.7", mac),
	}
	defer func() {
		for key := range evil {
			must(t, w.Etcd.Delete(t.Context(), subnets+key))
		}
		start(t, flannel, lab.Flanneld)
	}()
	mustLoseNothing(t, w.Lab, everyRoute(w), func() {
		pairs := map[string]string{}
		for key, value := range evil {
			pairs[subnets+key] = value
		}
		must(t, w.Etcd.Put(t.Context(), pairs))
		mustSeeStranger(t, w)
		time.Sleep(500 * time.Millisecond)
		mustHold(t, n, w.before, "what it held before")
		mustSay(t, n, "key="+subnets)
		if got := mustPodRoutes(t, w.Node(3)); got != routes {
			t.Errorf("n3 had the routes\n%s\nand has\n%s", routes, got)
		}
	})
}
