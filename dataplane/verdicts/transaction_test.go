//go:build linux

package verdicts

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// feed runs a command in the calling thread's namespace, with text for it to
// read.
func feed(command, text string) error {
	args := strings.Fields(command)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", command, err, out)
	}
	return nil
}

// services is a transaction as kube-proxy makes one in its nftables mode at its
// start: for each service a chain, two endpoints' chains, and elements of maps.
func services(count int) string {
	var b strings.Builder
	b.WriteString(`add table ip kube-proxy
delete table ip kube-proxy
add table ip kube-proxy
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add chain ip kube-proxy services
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
`)
	for i := range count {
		service, ip := fmt.Sprintf("service-%08x-ns/svc/tcp", i*2654435761), fmt.Sprintf("10.96.%d.%d", i>>8, i&255)
		chain := strings.NewReplacer("/", "-").Replace(service)
		fmt.Fprintf(&b, "add chain ip kube-proxy %s\n", chain)
		for e := range 2 {
			fmt.Fprintf(&b, "add chain ip kube-proxy endpoint-%d-%s\n", e, chain)
			fmt.Fprintf(&b, "add rule ip kube-proxy endpoint-%d-%s ip saddr 10.244.%d.%d meta mark set mark or 0x4000\n", e, chain, i>>8, i&255)
			fmt.Fprintf(&b, "add rule ip kube-proxy endpoint-%d-%s meta l4proto tcp dnat to 10.244.%d.%d:80\n", e, chain, i>>8, i&255)
		}
		fmt.Fprintf(&b, "add rule ip kube-proxy %s ip daddr %s tcp dport 80 ip saddr != 10.244.0.0/16 meta mark set mark or 0x4000\n", chain, ip)
		fmt.Fprintf(&b, "add rule ip kube-proxy %[1]s numgen random mod 2 vmap { 0 : goto endpoint-0-%[1]s , 1 : goto endpoint-1-%[1]s }\n", chain)
		fmt.Fprintf(&b, "add element ip kube-proxy service-ips { %s . tcp . 80 : goto %s }\n", ip, chain)
	}
	return b.String()
}

// BenchmarkTransaction is what a transaction of 1,000 services costs: us, to
// read that it was, and whoever makes it, by our being there.
func BenchmarkTransaction(b *testing.B) {
	text := services(1000)
	n := newNode(b)
	for name, filter := range map[string][]unix.SockFilter{"Filtered": transactionsOnce, "Unfiltered": nil} {
		b.Run(name, func(b *testing.B) {
			s := subscriptions[1]
			s.filter = filter
			var heard *socket
			n.MustDo(b, func() (err error) {
				heard, err = subscribe(s)
				return err
			})
			defer heard.close()
			var reading time.Duration
			for b.Loop() {
				n.MustDo(b, func() error { return feed("nft -f -", text) })
				begin := time.Now()
				changes, err := heard.drain()
				if reading += time.Since(begin); err != nil || changes&Nftables == 0 {
					b.Fatalf("seen: %v, error %v", changes, err)
				}
			}
			b.ReportMetric(float64(reading.Microseconds())/float64(b.N), "reading-µs/op")
		})
	}
	b.Run("Unheard", func(b *testing.B) {
		for b.Loop() {
			n.MustDo(b, func() error { return feed("nft -f -", text) })
		}
	})
}

// BenchmarkPerPacketRules is what it costs to look through the rules of 1,000
// services in nftables, and through 5,000 of iptables-legacy.
func BenchmarkPerPacketRules(b *testing.B) {
	for name, load := range map[string]func() error{
		"Nftables": func() error { return feed("nft -f -", services(1000)) },
		"Legacy": func() error {
			return feed("iptables-legacy-restore", strings.Replace(legacyRules(5000), "COMMIT", "-A FORWARD -j KUBE-SERVICES\nCOMMIT", 1))
		},
		"LegacyByNftables": func() error {
			return feed("iptables-nft-restore", strings.Replace(legacyRules(5000), "COMMIT", "-A FORWARD -j KUBE-SERVICES\nCOMMIT", 1))
		},
	} {
		b.Run(name, func(b *testing.B) {
			newNode(b).MustDo(b, func() error {
				if err := load(); err != nil {
					return err
				}
				for b.Loop() {
					if _, err := PerPacketRules(); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
}
