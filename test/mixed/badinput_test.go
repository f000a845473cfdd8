//go:build linux && peers

package mixed_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// badInput is something wrong that an agent is started with on n1.
type badInput struct {
	name  string
	flags []string
	// says is what the agent has to say.
	says string
	// stays tells that the agent does not end: what is wrong can be mended
	// elsewhere.
	stays bool
	// config is what etcd has as flannel's configuration meanwhile, if anything
	// else than before.
	config string
}

// mustRefuse starts the agent of n1 with bad input, one after the other, while pods
// talk. It says what is wrong, and what the node held stays in force.
func mustRefuse(t *testing.T, w world, all []badInput) {
	t.Helper()
	n := w.Node(1)
	configure := func(text string) {
		must(t, w.Etcd.Put(t.Context(), map[string]string{lab.FlannelPrefix + "/config": text}))
	}
	stop(t, n, syscall.SIGTERM)
	defer func() {
		if n.AgentRunning() { // the test has failed
			stop(t, n, syscall.SIGTERM)
		}
		start(t, n, lab.Weft)
	}()
	mustLoseNothing(t, w.Lab, everyRoute(w), func() {
		for _, bad := range all {
			if bad.config != "" {
				configure(bad.config)
			}
			must(t, n.LaunchAgent(weft, bad.flags...))
			lab.T(t).Eventually(10*time.Second, func() error {
				running := n.AgentRunning()
				switch log := n.AgentLog(); {
				case !running && bad.stays:
					return fmt.Errorf("%s: the agent has ended:\n%s", bad.name, log)
				case running && !bad.stays:
					return fmt.Errorf("%s: the agent still runs:\n%s", bad.name, log)
				case !strings.Contains(log, bad.says):
					return fmt.Errorf("%s: the agent does not say %q:\n%s", bad.name, bad.says, log)
				}
				return nil
			})
			if bad.stays {
				stop(t, n, syscall.SIGTERM)
			}
			if bad.config != "" {
				configure(w.NetConf())
			}
			mustHold(t, n, w.before, bad.name+": what it held before")
		}
	})
}

// badKubeInput is what can be wrong with a Kubernetes store.
func badKubeInput(t *testing.T, w world) {
	n := w.Node(1)
	must(t, os.MkdirAll(n.Path("/run/bad"), 0o755))
	netConf := func(name, text string) []string {
		path := "/run/bad/" + name + ".json"
		must(t, os.WriteFile(n.Path(path), []byte(text), 0o644))
		return []string{"--net-config-path", path}
	}
	good, err := os.ReadFile(n.Path(lab.KubeconfigFile))
	must(t, err)
	kubeconfig := func(name, from, to string) []string {
		text := strings.Replace(string(good), from, to, 1)
		if text == string(good) {
			t.Fatalf("the kubeconfig has no %q:\n%s", from, good)
		}
		path := "/run/bad/" + name + ".kubeconfig"
		must(t, os.WriteFile(n.Path(path), []byte(text), 0o600))
		return []string{"--kubeconfig-file", path}
	}
	value := func(key string) string {
		_, rest, _ := strings.Cut(string(good), key)
		word, _, _ := strings.Cut(rest, "}")
		return strings.TrimSuffix(strings.Fields(word)[0], ",")
	}
	mustRefuse(t, w, []badInput{
		{"no net-conf.json", []string{"--net-config-path", "/run/nowhere.json"}, "/run/nowhere.json", false, ""},
		{"net-conf.json is cut off", netConf("cut", `{"Network":`), "cannot be used", false, ""},
		{"another backend", netConf("udp", `{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}`), "host-gw", false, ""},
		{"no backend", netConf("none", `{"Network":"10.244.0.0/16"}`), "Backend", false, ""},
		{"no network", netConf("nonet", `{"Backend":{"Type":"vxlan"}}`), "Network", false, ""},
		{"another network", netConf("other", `{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}`), "lies outside Network 10.99.0.0/16", true, ""},
		{"no kubeconfig", []string{"--kubeconfig-file", "/run/nowhere"}, "/run/nowhere", true, ""},
		{"another authority", kubeconfig("authority", value("certificate-authority-data:"), base64.StdEncoding.EncodeToString(newAuthority(t))), "x509", true, ""},
		{"no rights", kubeconfig("token", value("token:"), "nobody"), "Unauthorized", true, ""},
		{"a flag out of range", []string{"--iptables-resync", "0"}, "--iptables-resync", false, ""},
	})
}

// badEtcdInput is what can be wrong with etcd.
func badEtcdInput(t *testing.T, w world) {
	n := w.Node(1)
	must(t, os.MkdirAll(n.Path("/run/bad"), 0o755))
	const authority = "/run/bad/ca.crt"
	must(t, os.WriteFile(n.Path(authority), newAuthority(t), 0o644))
	secure := strings.Replace(w.Etcd.URL, "http:", "https:", 1)
	mustRefuse(t, w, []badInput{
		{"nobody there", []string{"--etcd-endpoints", "http://192.0.2.1:9"}, "connection refused", true, ""},
		{"no URL", []string{"--etcd-endpoints", "192.0.2.1"}, "192.0.2.1", false, ""},
		{"no authority", []string{"--etcd-endpoints", secure, "--etcd-cafile", "/run/nowhere.crt"}, "/run/nowhere.crt", false, ""},
		{"etcd without TLS", []string{"--etcd-endpoints", secure, "--etcd-cafile", authority}, "does not speak TLS", true, ""},
		{"no configuration", []string{"--etcd-prefix", "/nowhere"}, "/nowhere/config", true, ""},
		{"the configuration has no backend", nil, "Backend", true, `{"Network":"10.244.0.0/16"}`},
		{"the configuration has another backend", nil, "udp", true, `{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}`},
		{"the configuration is cut off", nil, lab.FlannelPrefix + "/config", true, `{"Network":`},
	})
}

// newAuthority makes the certificate of an authority that has signed nothing here.
func newAuthority(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "somebody else"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
