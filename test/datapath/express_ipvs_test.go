//go:build linux

package datapath_test

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// Services as kube-proxy makes them in ipvs mode. The client's node, which has the
// service's address, gets a packet as one for itself, and sends it on as one of its
// own: it does no express for them, the endpoint's node does.
func TestExpressObeysIPVS(t *testing.T) {
	// Nothing but ipvsadm loads the module, which may not be there.
	_ = exec.CommandContext(t.Context(), "modprobe", "--quiet", "ip_vs").Run()
	if _, err := os.Stat("/proc/net/ip_vs"); err != nil {
		t.Skipf("this kernel has no IPVS (%v)", err)
	}
	playEverywhere(t, lab.Options{}, []expressScenario{
		{"TCP service", ipvsService},
		{"UDP service gets another endpoint", ipvsOtherEndpoint},
	})
}

// mustServeByIPVS makes a service of a node's, for proto t or u, with the settings
// that kube-proxy makes.
func mustServeByIPVS(t lab.Test, n *lab.Node, proto string, service, backend netip.AddrPort) {
	t.Helper()
	t.Run(n, "ip link add kube-ipvs0 type dummy")
	atEnd(t, n, "ip link delete kube-ipvs0")
	t.Run(n, "ip address add "+service.Addr().String()+"/32 dev kube-ipvs0")
	t.Run(n, "ipvsadm", "-A", "-"+proto, service.String(), "-s", "rr")
	atEnd(t, n, "ipvsadm", "-D", "-"+proto, service.String())
	t.Run(n, "ipvsadm", "-a", "-"+proto, service.String(), "-r", backend.String(), "-m")
	for _, setting := range []string{"conntrack=1", "expire_nodest_conn=1", "conn_reuse_mode=0"} {
		t.Run(n, "sysctl -q -w net.ipv4.vs."+setting)
	}
}

// endpointsEnds are those of the node that an IPVS service leads to.
const endpointsEnds = "n2 tx, n2 rx"

func ipvsService(t lab.Test, w world) {
	client, server := w.pod(1, 1), w.pod(2, 1)
	l, port := mustListenTCP(t, server)
	service := serviceAddress()
	mustServeByIPVS(t, w.Node(1), "t", service, at(server, port))
	mustSee(t, w, endpointsEnds, client, l, service, client.ip)
	if got := transferTCP(client, l, service, 4<<20); got != "intact" {
		t.Errorf("bulk: %s", got)
	}
}

// Nobody tells that IPVS has lost an endpoint.
func ipvsOtherEndpoint(t lab.Test, w world) {
	client, old, fresh := w.pod(1, 1), w.pod(2, 1), w.pod(2, 2)
	n := w.Node(1)
	service := serviceAddress()
	oldConn, freshConn := mustListenUDP(t, old), mustListenUDP(t, fresh)
	oldAt := at(old, uint16(oldConn.LocalAddr().(*net.UDPAddr).Port))
	freshAt := at(fresh, uint16(freshConn.LocalAddr().(*net.UDPAddr).Port))
	oldSeen, freshSeen := echoAndStamp(oldConn), echoAndStamp(freshConn)
	mustServeByIPVS(t, n, "u", service, oldAt)
	c := mustConnectUDP(t, w, client, service)
	w.mustTake(t, endpointsEnds, func() { c.mustAsk(t, 100) })

	s := c.stream()
	defer s.cancel()
	time.Sleep(50 * time.Millisecond)
	t.Run(n, "ipvsadm", "-a", "-u", service.String(), "-r", freshAt.String(), "-m")
	t.Run(n, "ipvsadm", "-d", "-u", service.String(), "-r", oldAt.String())
	gone := time.Now()
	time.Sleep(cutWithin + time.Second)
	_, last := oldSeen()
	t.Logf("the old endpoint got its last packet after %s", last.Sub(gone).Round(time.Millisecond))
	if last.After(gone.Add(cutWithin)) {
		t.Errorf("the old endpoint got a packet %s after it was taken out", last.Sub(gone))
	}
	if first, latest := freshSeen(); first.IsZero() || time.Since(latest) > time.Second {
		t.Errorf("the new endpoint got its first packet after %s, and none for %s", first.Sub(gone), time.Since(latest))
	}
}
