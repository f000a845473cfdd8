//go:build linux && e2e

package e2e_test

import (
	_ "embed"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weft-net/weft/test/cluster"
	"github.com/weft-net/weft/test/lab"
)

//go:embed pods.yaml
var podsManifest string

// A cluster of three nodes has weft as its only network, and all the ways that
// packets go in a cluster are open, with each of kube-proxy's modes.
func TestCluster(t *testing.T) {
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run("kube-proxy "+mode, func(t *testing.T) {
			s := newSuite(t, cluster.Options{ProxyMode: mode})
			t.Run("pods reach pods", s.pairs)
			t.Run("large UDP", s.largeUDP)
			t.Run("ClusterIP", s.service)
			t.Run("NodePort from outside", s.nodePort)
			t.Run("externalTrafficPolicy Local", s.local)
			t.Run("hostPort", s.hostPort)
			t.Run("hairpin", s.hairpin)
			t.Run("the world sees the node", s.world)
			t.Run("names are resolved", s.names)
			t.Run("established flows take express", s.express)
			t.Run("Prometheus", s.prometheus)
			t.Run("log of the agents", s.log)
			t.Run("an agent may change its own node alone", s.ownNode)
			t.Run("overlays", s.overlays)
			t.Run("chart", s.charts)
			t.Run("NetworkPolicy", s.policies)
		})
	}
}

// pairs has every pod fetch from every pod, also from itself and from the other
// nodes, and wants the asking pod's own address to be seen.
func (s *suite) pairs(t *testing.T) {
	for _, from := range s.pods {
		for _, to := range s.pods {
			lab.T(t).Eventually(10*time.Second, func() error {
				said, err := s.ask(from, "fetch", net.JoinHostPort(to.ip, "8080"), 0)
				if want := to.name + " " + from.ip; err == nil && said != want {
					err = fmt.Errorf("%q, want %q", said, want)
				}
				if err != nil {
					return fmt.Errorf("%s to %s: %w", from.name, to.name, err)
				}
				return nil
			})
			// From the host of one to the pod of the other.
			if said, err := get(&from.node.Space, net.JoinHostPort(to.ip, "8080"), "who", nil); err != nil || !strings.HasPrefix(said, to.name+" ") {
				t.Errorf("node %s to %s: %q, %v", from.node, to.name, said, err)
			}
		}
	}
}

// largeUDP sends datagrams around the overlay's MTU, and one that is cut into many.
func (s *suite) largeUDP(t *testing.T) {
	for i, from := range s.pods {
		to := s.pods[(i+1)%len(s.pods)]
		for _, size := range []int{1, 1422, 1423, 8000, 60000} {
			if _, err := s.ask(from, "udp", net.JoinHostPort(to.ip, "8081"), size); err != nil {
				t.Errorf("%s to %s, %d bytes: %v", from.name, to.name, size, err)
			}
		}
	}
}

// service asks a ClusterIP until every pod has answered.
func (s *suite) service(t *testing.T) {
	ip := s.clusterIP(t, "any")
	for _, from := range s.pods {
		s.mustAllAnswer(t, from.name, func() (string, error) { return s.ask(from, "fetch", net.JoinHostPort(ip, "80"), 0) })
		if _, err := s.ask(from, "udp", net.JoinHostPort(ip, "81"), 512); err != nil {
			t.Errorf("%s by UDP: %v", from.name, err)
		}
	}
}

// mustAllAnswer asks a Service until each pod has answered; no question may fail.
func (s *suite) mustAllAnswer(t *testing.T, who string, ask func() (string, error)) {
	t.Helper()
	seen := map[string]int{}
	for range 1000 { // kube-proxy hears of a pod some seconds later
		said, err := ask()
		if err != nil {
			t.Errorf("%s: %v", who, err)
			return
		}
		name, _, _ := strings.Cut(said, " ")
		seen[name]++
		if len(seen) == len(s.pods) {
			return
		}
	}
	t.Errorf("%s: of 1000 answers so many came from each pod: %v, want all of %d", who, seen, len(s.pods))
}

// nodePort asks every node from outside; it may forward to pods of other nodes.
func (s *suite) nodePort(t *testing.T) {
	for _, p := range s.pods {
		s.mustAllAnswer(t, p.node.String(), func() (string, error) {
			return get(s.Lab.Underlay, net.JoinHostPort(p.node.IP.String(), "30080"), "who", nil)
		})
	}
}

// local wants every node's own pod to answer, and to see the client.
func (s *suite) local(t *testing.T) { s.mustBeOwn(t, localPort) }

// hostPort is what the portmap plugin makes of a container's port.
func (s *suite) hostPort(t *testing.T) { s.mustBeOwn(t, "8088") }

func (s *suite) mustBeOwn(t *testing.T, port string) {
	t.Helper()
	for _, p := range s.pods {
		for range 10 {
			said, err := get(s.Lab.Underlay, net.JoinHostPort(p.node.IP.String(), port), "who", nil)
			if want := p.name + " " + lab.Gateway.String(); err != nil || said != want {
				t.Errorf("node %s: %q, %v, want %q", p.node, said, err, want)
			}
		}
	}
}

// hairpin asks a Service from the pods behind it, which has to lead some of them back
// to themselves.
func (s *suite) hairpin(t *testing.T) {
	to := net.JoinHostPort(s.clusterIP(t, "any"), "80")
	for _, p := range s.pods {
		lab.T(t).Eventually(20*time.Second, func() error {
			said, err := s.ask(p, "fetch", to, 0)
			if err == nil && !strings.HasPrefix(said, p.name+" ") {
				err = fmt.Errorf("%s to %s: %q, not yet itself", p.name, to, said)
			}
			return err
		})
	}
}

// world connects pods to the world outside, which must see their nodes.
func (s *suite) world(t *testing.T) {
	var listener net.Listener
	must(t, s.Lab.Underlay.Do(func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(lab.Gateway.String(), "0"))
		return err
	}))
	defer listener.Close()
	for _, p := range s.pods {
		go func() { _, _ = s.ask(p, "stream", listener.Addr().String(), 1) }() // it is us who judge
		must(t, listener.(*net.TCPListener).SetDeadline(time.Now().Add(5*time.Second)))
		conn, err := listener.Accept()
		if err != nil {
			t.Errorf("%s: %v", p.name, err)
			continue
		}
		conn.Close()
		if seen := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); seen != p.node.IP {
			t.Errorf("%s is seen as %s, want its node's %s", p.name, seen, p.node.IP)
		}
	}
}

// names asks for a Service by name, from every pod.
func (s *suite) names(t *testing.T) {
	must(t, s.StartDNS(t.Context()))
	want := s.clusterIP(t, "any")
	for _, p := range s.pods {
		for _, name := range []string{"any", "any.default.svc.cluster.local"} {
			lab.T(t).Eventually(20*time.Second, func() error {
				said, err := s.ask(p, "resolve", name, 0)
				if err == nil && said != want {
					err = fmt.Errorf("%s from %s: %q, want %q", name, p.name, said, want)
				}
				return err
			})
		}
	}
}

// express keeps small messages going on one connection between any two nodes.
func (s *suite) express(t *testing.T) {
	for i, from := range s.pods {
		s.mustTakeExpress(t, from, s.pods[(i+1)%len(s.pods)])
	}
}

// mustTakeExpress keeps small messages going on one connection from pod to pod, and wants
// most of the packets of the sender's node to have taken express, both ways.
func (s *suite) mustTakeExpress(t *testing.T, from, to pod) {
	t.Helper()
	const messages = 400
	before := packets(t, from)
	if _, err := s.ask(from, "stream", net.JoinHostPort(to.ip, "8082"), messages); err != nil {
		t.Errorf("%s to %s: %v", from.name, to.name, err)
	}
	after := packets(t, from)
	for _, direction := range []string{"transmit", "receive"} {
		var all float64
		for _, path := range []string{"express", "base", "kernel"} {
			all += after[direction+" "+path] - before[direction+" "+path]
		}
		express := after[direction+" express"] - before[direction+" express"]
		t.Logf("%s: %s: %.0f of %.0f packets by express", from.node, direction, express, all)
		if express < messages*8/10 || express < all*8/10 {
			t.Errorf("%s: %s: %.0f of %.0f packets by express, want four of five, and of %d messages", from.node, direction, express, all, messages)
		}
	}
}

var packetsMetric = regexp.MustCompile(`(?m)^weft_peer_(transmit|receive)_packets_total\{path="(\w+)",peer="[^"]*"\} (\S+)$`)

// packets reads the counters of a pod's node, by direction and path.
func packets(t *testing.T, p pod) map[string]float64 {
	t.Helper()
	text, err := p.node.Metrics(t.Context())
	must(t, err)
	counts := map[string]float64{}
	for _, match := range packetsMetric.FindAllStringSubmatch(text, -1) {
		count, err := strconv.ParseFloat(match[3], 64)
		must(t, err)
		counts[match[1]+" "+match[2]] += count
	}
	return counts
}

// log wants the agents to have started with few lines.
func (s *suite) log(t *testing.T) {
	for name := range strings.FieldsSeq(s.kubectl(t, "-n kube-flannel get pods -l app=flannel -o jsonpath={.items[*].metadata.name}")) {
		text := s.kubectl(t, "-n kube-flannel logs -c kube-flannel "+name)
		if lines := strings.Count(text, "\n"); lines == 0 || lines >= 40 {
			t.Errorf("%s has written %d lines, want fewer than 40:\n%s", name, lines, text)
		} else {
			t.Logf("%s has written %d lines", name, lines)
		}
	}
}
