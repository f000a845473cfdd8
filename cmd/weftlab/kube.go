//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

// kube is the part of Kubernetes that kube-proxy needs: an API server in the
// underlay of a lab of its own. The nodes of other labs reach it through tunnels,
// and as all labs have the same addresses, one is enough for all of them.
type kube struct {
	lab      *lab.Lab
	api      *lab.Kube
	programs peerPrograms
}

const (
	// proxyTimeout is how long kube-proxy may take to write its rules.
	proxyTimeout = 60 * time.Second
	// testPort is where the servers of bench listen.
	testPort = 7000
)

// startKube builds the lab and waits until the API server is ready.
func startKube(ctx context.Context, name string, p peerPrograms) (*kube, error) {
	l, err := lab.New(ctx, lab.Options{Name: name, Nodes: 1, Pods: lab.NoPods})
	if err != nil {
		return nil, err
	}
	api, err := l.StartKube(ctx, p[apiServerName], p[etcdName])
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &kube{lab: l, api: api, programs: p}, nil
}

// serviceIP is a Service's ClusterIP, counted from 0, which is the one that is
// measured.
func serviceIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 96, byte(1 + i/250), byte(1 + i%250)})
}

// create makes the Nodes of a lab, and Services that all lead to its second
// node's first pod.
func (k *kube) create(ctx context.Context, l *lab.Lab, services int) error {
	for _, n := range l.Nodes {
		if err := k.api.CreateNode(ctx, n); err != nil {
			return err
		}
	}
	const workers = 8
	return together(workers, func(worker int) error {
		for i := worker; i < services; i += workers {
			service, slice := serviceObjects(i, l.Pod(2, 1))
			if err := k.api.Ask(ctx, http.MethodPost, "/api/v1/namespaces/default/services", service, nil); err != nil {
				return err
			}
			if err := k.api.Ask(ctx, http.MethodPost, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", slice, nil); err != nil {
				return err
			}
		}
		return nil
	})
}

// together does a number of things at the same time, and waits for all.
func together(number int, do func(i int) error) error {
	errs := make([]error, number)
	var all sync.WaitGroup
	for i := range number {
		all.Go(func() { errs[i] = do(i) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// serviceObjects are a Service, counted from 0, and its only endpoint. The first
// has a port for UDP too.
func serviceObjects(i int, pod *lab.Pod) (service, slice lab.Object) {
	name := fmt.Sprintf("service-%d", i)
	ports := []lab.Object{{"name": "tcp", "protocol": "TCP", "port": testPort}}
	if i == 0 {
		ports = append(ports, lab.Object{"name": "udp", "protocol": "UDP", "port": testPort})
	}
	service = lab.Object{
		"metadata": lab.Object{"name": name},
		"spec":     lab.Object{"clusterIP": serviceIP(i).String(), "ports": ports},
	}
	slice = lab.Object{
		"metadata":    lab.Object{"name": name, "labels": lab.Object{"kubernetes.io/service-name": name}},
		"addressType": "IPv4",
		"ports":       ports,
		"endpoints": []lab.Object{{
			"addresses": []string{pod.IP.String()}, "nodeName": pod.Node.String(), "conditions": lab.Object{"ready": true},
		}},
	}
	return service, slice
}

// proxies lets kube-proxy write its rules on all nodes of labs, and ends it: the
// rules stay, and nothing else shall run while modes are measured.
func (k *kube) proxies(ctx context.Context, labs []*lab.Lab, to target) error {
	nodes := len(labs[0].Nodes)
	return together(len(labs)*nodes, func(i int) error {
		l := labs[i/nodes]
		n := l.Nodes[i%nodes]
		if err := k.proxy(ctx, n, l.Network(), to); err != nil {
			return fmt.Errorf("kube-proxy on %s of lab %s: %w", n, l.Name(), err)
		}
		return nil
	})
}

// proxy runs kube-proxy on a node until its rules are there.
func (k *kube) proxy(ctx context.Context, n *lab.Node, pods netip.Prefix, to target) (err error) {
	tunnel, err := k.tunnel(n)
	if err != nil {
		return err
	}
	defer tunnel.Close()
	kubeconfig, err := k.api.Kubeconfig("https://"+tunnel.Addr().String(), lab.AdminToken)
	if err != nil {
		return err
	}
	const config = "/run/kube-proxy.yaml" // in the node, where /run is its own
	if err := os.WriteFile(n.Path(config), []byte(kubeconfig), 0o600); err != nil {
		return err
	}
	p, err := n.Start(k.programs[proxyName], "--kubeconfig", config, "--hostname-override", n.String(),
		"--proxy-mode", to.proxy, "--cluster-cidr", pods.String(),
		"--healthz-bind-address", "127.0.0.1:10256",
		// Zero leaves the machine's settings of conntrack alone.
		"--conntrack-max-per-core", "0", "--conntrack-min", "0",
		"--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0",
		"--conntrack-udp-timeout", "0", "--conntrack-udp-timeout-stream", "0",
		"--oom-score-adj", "0")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Stop(unix.SIGTERM)) }()
	ctx, cancel := context.WithTimeoutCause(ctx, proxyTimeout, errors.New("it has not written all rules"))
	defer cancel()
	for {
		// An error may mean that it has not begun.
		if rules, _ := proxyRules(ctx, n, to.proxy); hasServices(rules, to.services) {
			break
		}
		if !p.Running() || sleep(ctx, 500*time.Millisecond) != nil {
			return fmt.Errorf("waiting for its rules: %w\n%s", context.Cause(ctx), p.Output())
		}
	}
	if to.proxy == proxyIptables {
		return placeService(ctx, n)
	}
	return nil
}

// tunnel listens inside of a node and connects who comes to the API server.
func (k *kube) tunnel(n *lab.Node) (listener net.Listener, err error) {
	err = n.Do(func() error {
		listener, err = net.Listen("tcp4", "127.0.0.1:"+lab.APIPort)
		return err
	})
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			go k.connect(conn)
		}
	}()
	return listener, nil
}

// connect carries one connection, until either side ends it.
func (k *kube) connect(conn net.Conn) {
	defer conn.Close()
	server, err := k.lab.Underlay.Dial("tcp4", net.JoinHostPort(lab.Gateway.String(), lab.APIPort))
	if err != nil {
		return // the client finds its connection closed
	}
	defer server.Close()
	done := make(chan struct{}, 2)
	carry := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // ends when one of both is closed
		done <- struct{}{}
	}
	go carry(server, conn)
	go carry(conn, server)
	<-done
}

// proxyRules are those of kube-proxy's rules on a node that lead from a
// ClusterIP to its endpoints.
func proxyRules(ctx context.Context, n *lab.Node, proxy string) (string, error) {
	if proxy == proxyNftables {
		return n.Output(ctx, "nft list map ip kube-proxy service-ips")
	}
	return n.Output(ctx, "iptables-save -t nat")
}

// hasServices reports whether rules lead somewhere for the first and the last
// of a number of Services. kube-proxy writes all at once.
func hasServices(rules string, services int) bool {
	for _, i := range []int{0, services - 1} {
		ip := serviceIP(i).String()
		if !strings.Contains(rules, " -d "+ip+"/32 ") && !strings.Contains(rules, " "+ip+" . tcp . ") {
			return false
		}
	}
	return true
}

// placeService puts the Service that is measured into the middle of
// kube-proxy's list, which is in random order and searched from the top for
// every new connection: no mode shall be luckier than another.
func placeService(ctx context.Context, n *lab.Node) error {
	rules, err := proxyRules(ctx, n, proxyIptables)
	if err != nil {
		return err
	}
	moves, err := movesToMiddle(rules, serviceIP(0))
	if err != nil {
		return err
	}
	restore := n.Command(ctx, "iptables-restore --noflush")
	restore.Stdin = strings.NewReader(moves)
	if out, err := restore.CombinedOutput(); err != nil {
		return fmt.Errorf("placing a Service's rules: %w\n%s%s", err, moves, out)
	}
	return nil
}

// movesToMiddle is what iptables-restore has to be told for that.
func movesToMiddle(rules string, ip netip.Addr) (string, error) {
	const list = "-A KUBE-SERVICES "
	var all int
	var ours []string
	for line := range strings.Lines(rules) {
		rule, ok := strings.CutPrefix(line, list)
		if !ok {
			continue
		}
		all++
		if strings.Contains(rule, "-d "+ip.String()+"/32 ") {
			ours = append(ours, rule)
		}
	}
	if len(ours) == 0 {
		return "", fmt.Errorf("kube-proxy has no rule for %s", ip)
	}
	var moves strings.Builder
	moves.WriteString("*nat\n")
	for _, rule := range ours {
		moves.WriteString("-D KUBE-SERVICES " + rule)
	}
	for i, rule := range ours {
		fmt.Fprintf(&moves, "-I KUBE-SERVICES %d %s", (all-len(ours))/2+1+i, rule)
	}
	moves.WriteString("COMMIT\n")
	return moves.String(), nil
}

// sleep waits for a while, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
