//go:build linux && peers

package mixed_test

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// In every kind of cluster that flannel knows with VXLAN, weft nodes and flannel
// nodes reach each other, a node that weft runs on holds what it holds under
// flannel, and either takes over from the other without anyone noticing.
func TestClusters(t *testing.T) {
	for _, c := range []struct {
		name string
		opts lab.Options
	}{
		{"etcd", lab.Options{Store: lab.StoreEtcd, Pods: 2}},
		{"etcd, both families", lab.Options{Store: lab.StoreEtcd, Families: lab.DualStack}},
		{"etcd, legacy tables, VNI 7", lab.Options{Store: lab.StoreEtcd, LegacyTables: true, VNI: 7}},
		{"etcd, DirectRouting, VNI 4096, port 4789, MTU 1400", lab.Options{Store: lab.StoreEtcd, DirectRouting: true, VNI: 4096, Port: 4789, BackendMTU: 1400}},
		{"kube", lab.Options{Store: lab.StoreKube, Pods: 2}},
		{"kube, both families", lab.Options{Store: lab.StoreKube, Families: lab.DualStack}},
		{"kube, IPv6", lab.Options{Store: lab.StoreKube, Families: lab.IPv6}},
		{"kube, both families, DirectRouting", lab.Options{Store: lab.StoreKube, Families: lab.DualStack, DirectRouting: true}},
		{"kube, both families, nftables, VNI 4096, MTU 1450", lab.Options{Store: lab.StoreKube, Families: lab.DualStack, NFTables: true, VNI: 4096, BackendMTU: 1450}},
		{"kube, port 4789, small underlay", lab.Options{Store: lab.StoreKube, Port: 4789, MTU: 1400}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.opts.Nodes = 3
			c.opts.Kinds = []lab.Kind{lab.Flanneld, lab.Flanneld, lab.Weft}
			c.opts.FlannelFlags = healthFlags
			_, l := newLab(t, c.opts)
			n := l.Node(1)
			t.Run("everybody reaches everybody", func(t *testing.T) { mustReachAll(t, l) })
			asFlannel := asWeft(l, mustState(t, n))
			t.Run("weft and flanneld take turns", func(t *testing.T) { takeTurns(t, l, asFlannel) })
			t.Run("weft starts from nothing", func(t *testing.T) { startFromNothing(t, l, asFlannel) })
			if c.opts.Store == lab.StoreKube && c.opts.Families == lab.DualStack {
				t.Run("a peer changes one family", func(t *testing.T) { changeOneFamily(t, l) })
			}
		})
	}
}

// asWeft is a text of flannel's as weft has it. They differ without IPv4: flannel
// then promises pods 20 bytes more than flannel-v6.1 carries.
func asWeft(l *lab.Lab, text string) string {
	if l.Options.Families != lab.IPv6 {
		return text
	}
	return strings.Replace(text, "FLANNEL_MTU=1450", "FLANNEL_MTU=1430", 1)
}

// takeTurns lets weft take flanneld's place and flanneld weft's, politely and not.
// Flanneld runs at the end as at the beginning.
func takeTurns(t *testing.T, l *lab.Lab, asFlannel string) {
	n, begun := l.Node(1), time.Now()
	defer mustIperf(t, route{l.Pod(3, 1), l.Pod(1, 1)})()
	published, macs, file := mustPublished(t, n, l), mustOverlayMACs(t, n), mustSubnetFile(t, n)
	mustLoseNothing(t, l, []route{
		{l.Pod(1, 1), l.Pod(2, 1)}, {l.Pod(3, 1), l.Pod(1, 1)},
	}, func() {
		for _, turn := range []struct {
			sig  syscall.Signal
			next lab.Kind
		}{
			{syscall.SIGTERM, lab.Weft},
			{syscall.SIGKILL, lab.Flanneld},
			{syscall.SIGKILL, lab.Weft},
			{syscall.SIGTERM, lab.Flanneld},
		} {
			before := n.Kind
			t.Logf("%s by %s at %s", before, turn.next, time.Since(begun).Round(time.Millisecond))
			stop(t, n, turn.sig)
			start(t, n, turn.next)
			whose := strings.Join([]string{"what it held under", string(before), "before", string(turn.next)}, " ")
			if turn.next == lab.Weft {
				mustHold(t, n, asFlannel, whose)
			}
			time.Sleep(500 * time.Millisecond)
			if got := mustPublished(t, n, l); !maps.Equal(got, published) {
				t.Errorf("%s has published\n%v\nand %s before it\n%v", turn.next, got, before, published)
			}
			if got := mustOverlayMACs(t, n); !slices.Equal(got, macs) {
				t.Errorf("%s has MAC addresses %v, want %v", turn.next, got, macs)
			}
			want := file
			if turn.next == lab.Weft {
				want = asWeft(l, file)
			}
			if got := mustSubnetFile(t, n); got != want {
				t.Errorf("%s has written\n%s\nwant\n%s", turn.next, got, want)
			}
		}
	})
}

// startFromNothing starts weft on a node that flannel has never been on, as far as
// its kernel can tell.
func startFromNothing(t *testing.T, l *lab.Lab, asFlannel string) {
	n := l.Node(1)
	stop(t, n, syscall.SIGTERM)
	if err := n.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	start(t, n, lab.Weft)
	mustHold(t, n, asFlannel, "what it held under flanneld")
	var err error
	for range 5 { // the others have to hear of a new MAC address
		if err = reachAll(t.Context(), l); err == nil {
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
	t.Errorf("not everybody reaches everybody:\n%v", err)
}

// changeOneFamily lets a peer, which does not exist, change its public addresses
// one by one. Flanneld sees only what changes both.
func changeOneFamily(t *testing.T, l *lab.Lab) {
	const path = "/api/v1/nodes/other"
	n := l.Node(1)
	data := fmt.Sprintf(`{"VNI":%d,"VtepMAC":"0a:58:0a:f4:63:00"}`, l.Options.VNI)
	annotations := lab.Object{
		flannelAnnotations + "kube-subnet-manager": "true", flannelAnnotations + "backend-type": "vxlan",
		flannelAnnotations + "backend-data": data, flannelAnnotations + "backend-v6-data": data,
		flannelAnnotations + "public-ip": "198.18.0.1", flannelAnnotations + "public-ipv6": "2001:db8:1::1",
	}
	must(t, l.Kube.Ask(t.Context(), http.MethodPost, "/api/v1/nodes", lab.Object{
		"metadata": lab.Object{"name": "other", "annotations": annotations},
		"spec":     lab.Object{"podCIDR": "10.244.99.0/24", "podCIDRs": []string{"10.244.99.0/24", "fd00:10:244:63::/64"}},
	}, nil))
	defer func() { must(t, l.Kube.Ask(t.Context(), http.MethodDelete, path, nil, nil)) }()
	see := func(addresses ...string) {
		t.Helper()
		lab.T(t).Eventually(5*time.Second, func() error {
			entries := lab.T(t).Run(n, "bridge fdb show dev "+n.Overlay()) + lab.T(t).Run(n, "bridge fdb show dev "+n.OverlayV6())
			for _, a := range addresses {
				if !strings.Contains(entries, "0a:58:0a:f4:63:00 dst "+a+" ") {
					return fmt.Errorf("the peer is not at %s:\n%s", a, entries)
				}
			}
			return nil
		})
	}
	see("198.18.0.1", "2001:db8:1::1")
	for _, change := range []struct{ key, address, v4, v6 string }{
		{"public-ipv6", "2001:db8:1::2", "198.18.0.1", "2001:db8:1::2"},
		{"public-ip", "198.18.0.2", "198.18.0.2", "2001:db8:1::2"},
	} {
		must(t, l.Kube.Ask(t.Context(), http.MethodPatch, path, lab.Object{"metadata": lab.Object{
			"annotations": lab.Object{flannelAnnotations + change.key: change.address},
		}}, nil))
		see(change.v4, change.v6)
	}
}
