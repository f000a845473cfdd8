//go:build linux && peers

package kube

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// cluster is a real API server with its etcd, on loopback. All tests share it.
type cluster struct {
	dir       string
	programs  map[string]string
	etcdPort  string
	port      string
	etcd, api *exec.Cmd
	admin     *http.Client
}

// adminToken is that of somebody who may do anything.
const adminToken = "admin-token"

// shared is the cluster of this package's tests.
var shared *cluster

func TestMain(m *testing.M) {
	status, err := withCluster(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		status = 1
	}
	os.Exit(status)
}

// withCluster runs f while there is a cluster.
func withCluster(f func() int) (status int, err error) {
	dir, err := os.MkdirTemp("", "weft-kube-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	c := &cluster{dir: dir}
	if c.programs, err = lab.Programs("kube-apiserver", "etcd"); err != nil {
		return 1, err
	}
	c.admin = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}, MaxIdleConnsPerHost: 8,
	}}
	defer c.stop()
	if err := c.start(); err != nil {
		return 1, err
	}
	shared = c
	return f(), nil
}

// file is a path in the cluster's directory.
func (c *cluster) file(name string) string { return filepath.Join(c.dir, name) }

// url is where the API is.
func (c *cluster) url() string { return "https://127.0.0.1:" + c.port }

// start starts etcd and the API server and prepares the API.
func (c *cluster) start() error {
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	c.etcdPort, c.port = ports[0], ports[1]
	client, peer := "http://127.0.0.1:"+c.etcdPort, "http://127.0.0.1:"+ports[2]
	c.etcd, err = c.run("etcd", "--data-dir", c.file("etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	if err != nil {
		return err
	}
	if err := writeKey(c.file("sa.key")); err != nil {
		return err
	}
	if err := os.WriteFile(c.file("tokens"), []byte(adminToken+",admin,admin,system:masters\n"), 0o600); err != nil {
		return err
	}
	if err := c.startAPI(); err != nil {
		return err
	}
	return c.allow()
}

// startAPI starts the API server and waits until it is ready.
func (c *cluster) startAPI() (err error) {
	c.api, err = c.run("kube-apiserver", "--etcd-servers", "http://127.0.0.1:"+c.etcdPort,
		"--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1", "--secure-port", c.port,
		"--endpoint-reconciler-type", "none", "--service-cluster-ip-range", "10.96.0.0/16",
		"--cert-dir", c.file("certificates"), "--token-auth-file", c.file("tokens"), "--authorization-mode", "RBAC",
		"--service-account-key-file", c.file("sa.key"), "--service-account-signing-key-file", c.file("sa.key"),
		"--service-account-issuer", "https://kubernetes.default.svc", "--disable-admission-plugins", "ServiceAccount",
		"--enable-priority-and-fairness=false", "--max-requests-inflight", "0", "--max-mutating-requests-inflight", "0",
		"--shutdown-delay-duration", "0")
	if err != nil {
		return err
	}
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := c.do(http.MethodGet, "/readyz", nil, nil)
		if err == nil {
			return nil
		}
		if time.Now().After(end) || c.api.Process.Signal(syscall.Signal(0)) != nil {
			output, _ := os.ReadFile(c.file("kube-apiserver.log"))
			return fmt.Errorf("the API server does not get ready: %w\n%s", err, output[max(0, len(output)-4000):])
		}
	}
}

// stopAPI stops the API server and leaves etcd. As it would wait for a minute
// until nobody watches any more, it is killed.
func (c *cluster) stopAPI() { end(c.api); c.api = nil }

// stop stops all.
func (c *cluster) stop() {
	end(c.api)
	end(c.etcd)
}

// end kills a process that we started.
func end(p *exec.Cmd) {
	if p == nil || p.Process == nil {
		return
	}
	_ = p.Process.Kill()
	_ = p.Wait()
}

// run starts a program; its output goes to a file. It ends with us.
func (c *cluster) run(name string, args ...string) (*exec.Cmd, error) {
	output, err := os.OpenFile(c.file(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	cmd := exec.Command(c.programs[name], args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = output, output, c.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd, cmd.Start()
}

// freePorts are TCP ports that nobody listens on.
func freePorts(number int) (ports []string, err error) {
	for range number {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ports = append(ports, port)
	}
	return ports, nil
}

// writeKey makes the key that service accounts' tokens are signed with.
func writeKey(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// object is something of the API.
type object = map[string]any

// do asks the API as its administrator.
func (c *cluster) do(method, path string, body, answer any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, c.url()+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	request.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		request.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	}
	response, err := c.admin.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	said, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode >= 300:
		return fmt.Errorf("%s %s: %s: %s", method, path, response.Status, said)
	case answer != nil:
		return json.Unmarshal(said, answer)
	}
	return nil
}

// allow makes a service account that may do what flannel's manifest allows, and
// one that may not change anything.
func (c *cluster) allow() error {
	var errs []error
	make := func(path string, o object) { errs = append(errs, c.do(http.MethodPost, path, o, nil)) }
	rules := func(resource string, verbs ...string) object {
		return object{"apiGroups": []string{""}, "resources": []string{resource}, "verbs": verbs}
	}
	const rbac = "/apis/rbac.authorization.k8s.io/v1/"
	make("/api/v1/namespaces", object{"metadata": object{"name": "weft"}})
	for name, role := range map[string][]object{
		"weft":   {rules("pods", "get"), rules("nodes", "get", "list", "watch"), rules("nodes/status", "patch")},
		"reader": {rules("nodes", "get", "list", "watch")},
	} {
		make("/api/v1/namespaces/weft/serviceaccounts", object{"metadata": object{"name": name}})
		make(rbac+"clusterroles", object{"metadata": object{"name": name}, "rules": role})
		make(rbac+"clusterrolebindings", object{
			"metadata": object{"name": name},
			"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
			"subjects": []object{{"kind": "ServiceAccount", "namespace": "weft", "name": name}},
		})
	}
	return errors.Join(errs...)
}

// token is a new one of a service account.
func (c *cluster) token(t *testing.T, account string) string {
	t.Helper()
	var answer struct{ Status struct{ Token string } }
	c.must(t, http.MethodPost, "/api/v1/namespaces/weft/serviceaccounts/"+account+"/token", object{"spec": object{}}, &answer)
	return answer.Status.Token
}

// must asks, and fails the test when that fails.
func (c *cluster) must(t *testing.T, method, path string, body, answer any) {
	t.Helper()
	if err := c.do(method, path, body, answer); err != nil {
		t.Fatal(err)
	}
}

// kubeconfig writes a file whose user shows what a file says.
func (c *cluster) kubeconfig(t *testing.T, tokenFile string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: u, user: {tokenFile: %q}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, c.url(), tokenFile)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
