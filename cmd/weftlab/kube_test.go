//go:build linux

package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

func TestServicesHaveAddressesOfTheirOwn(t *testing.T) {
	seen := map[netip.Addr]int{netip.MustParseAddr("10.96.0.1"): -1} // the API server's own
	for i := range mostServices {
		ip := serviceIP(i)
		if other, twice := seen[ip]; twice || !lab.ServiceNetwork.Contains(ip) {
			t.Fatalf("service %d has %s, as has %d", i, ip, other)
		}
		seen[ip] = i
	}
}

// natRules are what iptables-save prints of a node with kube-proxy and five
// Services, shortened.
const natRules = `*nat
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SEP-3 -p tcp -m tcp -j DNAT --to-destination 10.244.2.2:7000
-A KUBE-SERVICES -d 10.96.1.1/32 -p udp -m comment --comment "default/service-0:udp cluster IP" -m udp --dport 7000 -j KUBE-SVC-1
-A KUBE-SERVICES -d 10.96.1.2/32 -p tcp -m comment --comment "default/service-1:tcp cluster IP" -m tcp --dport 7000 -j KUBE-SVC-2
-A KUBE-SERVICES -d 10.96.1.1/32 -p tcp -m comment --comment "default/service-0:tcp cluster IP" -m tcp --dport 7000 -j KUBE-SVC-3
-A KUBE-SERVICES -d 10.96.1.10/32 -p tcp -m comment --comment "default/service-9:tcp cluster IP" -m tcp --dport 7000 -j KUBE-SVC-4
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/kubernetes:https cluster IP" -m tcp --dport 443 -j KUBE-SVC-5
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
`

func TestServiceIsMovedToTheMiddleOfTheList(t *testing.T) {
	got, err := movesToMiddle(natRules, serviceIP(0))
	if err != nil {
		t.Fatal(err)
	}
	udp := `-d 10.96.1.1/32 -p udp -m comment --comment "default/service-0:udp cluster IP" -m udp --dport 7000 -j KUBE-SVC-1` + "\n"
	tcp := `-d 10.96.1.1/32 -p tcp -m comment --comment "default/service-0:tcp cluster IP" -m tcp --dport 7000 -j KUBE-SVC-3` + "\n"
	// Four are left, so ours come behind the first two.
	want := "*nat\n-D KUBE-SERVICES " + udp + "-D KUBE-SERVICES " + tcp +
		"-I KUBE-SERVICES 3 " + udp + "-I KUBE-SERVICES 4 " + tcp + "COMMIT\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if moves, err := movesToMiddle(natRules, serviceIP(100)); err == nil {
		t.Errorf("a Service that is not there is moved by\n%s", moves)
	}
}

func TestRulesAreCompleteWithTheLastService(t *testing.T) {
	const verdicts = `table ip kube-proxy {
	map service-ips {
		type ipv4_addr . inet_proto . inet_service : verdict
		comment "ClusterIP, ExternalIP and LoadBalancer IP traffic"
		elements = { 10.96.0.1 . tcp . 443 : goto service-2QRHZV4L-default/kubernetes/tcp/https,
			     10.96.1.1 . tcp . 7000 : goto service-UBO2YJ4V-default/service-0/tcp/tcp,
			     10.96.1.2 . tcp . 7000 : goto service-4DBB5NLP-default/service-1/tcp/tcp,
			     10.96.1.10 . tcp . 7000 : goto service-XHEUNLPM-default/service-9/tcp/tcp }
	}
}`
	for _, rules := range []string{natRules, verdicts} {
		for services, want := range map[int]bool{1: true, 2: true, 3: false, 10: true, 11: false} {
			if got := hasServices(rules, services); got != want {
				t.Errorf("all of %d Services in the rules: %v\n%s", services, got, rules)
			}
		}
	}
	if hasServices("", 1) || hasServices(strings.ReplaceAll(natRules, "10.96.1.1/", "10.96.1.11/"), 2) {
		t.Error("a Service was found that is not there")
	}
}
