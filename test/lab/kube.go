//go:build linux

package lab

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Kube is a Kubernetes API server in the underlay, where every node reaches it. It
// checks rights (RBAC) and certificates. No controller runs: who needs podCIDRs
// assigns them.
type Kube struct {
	// URL is where it listens, and Etcd keeps what it is told.
	URL  string
	Etcd *Etcd

	lab     *Lab
	program string
	client  *http.Client
	process *Process
}

// Object is something of the API, as JSON has it.
type Object = map[string]any

const (
	// APIPort is the API server's.
	APIPort = "6443"
	// AdminToken is that of somebody who may do anything.
	AdminToken = "admin-token"
	// apiTimeout is how long it may take to start.
	apiTimeout = 90 * time.Second
)

// ServiceNetwork and ServiceNetworkV6 are where ClusterIPs come from.
var (
	ServiceNetwork   = netip.MustParsePrefix("10.96.0.0/16")
	ServiceNetworkV6 = netip.MustParsePrefix("fd00:10:96::/112")
)

// StartKube starts etcd and an API server, and waits until that is ready. Both
// keep their data in the lab's directory.
func (l *Lab) StartKube(ctx context.Context, apiServer, etcd string) (*Kube, error) {
	k := &Kube{
		URL: "https://" + net.JoinHostPort(l.Gateway().String(), APIPort), lab: l, program: apiServer,
		client: &http.Client{
			Timeout: 30 * time.Second,
			Transport: &http.Transport{
				// Nobody else is down there.
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13},
				DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
					return l.Underlay.Dial(network, address)
				},
				MaxConnsPerHost: 8, MaxIdleConnsPerHost: 8,
			},
		},
	}
	var err error
	if k.Etcd, err = l.StartEtcd(ctx, etcd); err != nil {
		return nil, err
	}
	if err := writeKey(k.file("service-accounts.key")); err != nil {
		return nil, err
	}
	if err := os.WriteFile(k.file("tokens"), []byte(AdminToken+",admin,admin,system:masters\n"), 0o600); err != nil {
		return nil, err
	}
	return k, k.Start(ctx)
}

// file is the path of one of its files.
func (k *Kube) file(name string) string { return filepath.Join(k.lab.Directory(), name) }

// Start starts the API server again and waits until it is ready.
func (k *Kube) Start(ctx context.Context) (err error) {
	address := k.lab.Gateway().String()
	k.process, err = k.lab.Underlay.Start(k.program,
		"--etcd-servers", k.Etcd.URL, "--service-cluster-ip-range", choose(k.lab.Options.Families, ServiceNetwork, ServiceNetworkV6)[0].String(),
		"--bind-address", address, "--advertise-address", address, "--secure-port", APIPort,
		"--cert-dir", k.file("certificates"), "--token-auth-file", k.file("tokens"), "--authorization-mode", "RBAC",
		"--allow-privileged",                              // as every cluster that runs a network's agents
		"--kubelet-preferred-address-types", "InternalIP", // nobody resolves nodes' names
		"--service-account-key-file", k.file("service-accounts.key"), "--service-account-signing-key-file", k.file("service-accounts.key"),
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--enable-priority-and-fairness=false", "--max-requests-inflight", "0", "--max-mutating-requests-inflight", "0",
		"--shutdown-delay-duration", "0")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, Patient(apiTimeout), errors.New("it is not ready"))
	defer cancel()
	for _, path := range []string{"/readyz", "/api/v1/namespaces/default"} {
		for {
			err := k.Ask(ctx, http.MethodGet, path, nil, nil)
			if err == nil {
				break
			}
			if !k.process.Running() || sleep(ctx, 50*time.Millisecond) != nil {
				return fmt.Errorf("starting the API server: %w\n%s", errors.Join(context.Cause(ctx), err), k.process.Output())
			}
		}
	}
	return nil
}

// Stop ends the API server by a signal and waits until it is gone. Its etcd runs
// on.
func (k *Kube) Stop(sig syscall.Signal) error { return k.process.Stop(sig) }

// writeKey makes the private key that service accounts' tokens are signed with.
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

// Ask calls the API as its administrator. A body and a place for the answer are
// optional.
func (k *Kube) Ask(ctx context.Context, method, path string, body, answer any) error {
	return k.AskAs(ctx, AdminToken, method, path, body, answer)
}

// AskAs calls the API with somebody's token. An answer that refuses is an error, with
// what it says.
func (k *Kube) AskAs(ctx context.Context, token, method, path string, body, answer any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, k.URL+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		request.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	}
	response, err := k.client.Do(request)
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

// Kubeconfig is a file that tells a program how to speak to the API server, as
// whoever has a token; by another URL than its own where that leads to it. The
// server's certificate is checked.
func (k *Kube) Kubeconfig(url, token string) (string, error) {
	// The API server has made one for itself, with the authority behind it.
	certificate, err := os.ReadFile(k.file("certificates/apiserver.crt"))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: %q, certificate-authority-data: %s, tls-server-name: %q}}]
users: [{name: lab, user: {token: %q}}]
contexts: [{name: lab, context: {cluster: lab, user: lab}}]
current-context: lab
`, url, base64.StdEncoding.EncodeToString(certificate), k.lab.Gateway(), token), nil
}

// flannelAccount is the namespace and the name of the service account in
// flannel's manifest.
const flannelNamespace, flannelAccount = "kube-flannel", "flannel"

// buildKubeStore starts an API server and makes what a cluster with flannel has
// there: a Node for each node, and strangers as if each had its flanneld. Each
// node gets a kubeconfig of flannel's service account.
func (l *Lab) buildKubeStore(ctx context.Context) (err error) {
	l.logf("etcd and an API server")
	if l.Kube, err = l.StartKube(ctx, l.Options.APIServer, l.Options.Etcd); err != nil {
		return err
	}
	l.Etcd = l.Kube.Etcd
	if err := l.Kube.allowFlannel(ctx); err != nil {
		return err
	}
	token, err := l.Kube.FlannelToken(ctx)
	if err != nil {
		return err
	}
	kubeconfig, err := l.Kube.Kubeconfig(l.Kube.URL, token)
	if err != nil {
		return err
	}
	for _, n := range l.Nodes {
		if err := l.Kube.CreateNode(ctx, n); err != nil {
			return err
		}
		if err := n.writeFile(KubeconfigFile, kubeconfig); err != nil {
			return err
		}
		if err := n.writeFile(NetConfFile, l.NetConf()); err != nil {
			return err
		}
	}
	return l.CreateStrangers(ctx, l.Options.Strangers)
}

// allowFlannel makes flannel's service account, with the rights that its manifest
// gives it.
func (k *Kube) allowFlannel(ctx context.Context) error {
	rules := func(resource string, verbs ...string) Object {
		return Object{"apiGroups": []string{""}, "resources": []string{resource}, "verbs": verbs}
	}
	const rbac = "/apis/rbac.authorization.k8s.io/v1/"
	for _, step := range []struct {
		path   string
		object Object
	}{
		{"/api/v1/namespaces", Object{"metadata": Object{"name": flannelNamespace}}},
		{"/api/v1/namespaces/" + flannelNamespace + "/serviceaccounts", Object{"metadata": Object{"name": flannelAccount}}},
		{rbac + "clusterroles", Object{
			"metadata": Object{"name": flannelAccount},
			"rules":    []Object{rules("pods", "get"), rules("nodes", "get", "list", "watch"), rules("nodes/status", "patch")},
		}},
		{rbac + "clusterrolebindings", Object{
			"metadata": Object{"name": flannelAccount},
			"roleRef":  Object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": flannelAccount},
			"subjects": []Object{{"kind": "ServiceAccount", "namespace": flannelNamespace, "name": flannelAccount}},
		}},
	} {
		if err := k.Ask(ctx, http.MethodPost, step.path, step.object, nil); err != nil {
			return err
		}
	}
	return nil
}

// FlannelToken is a new one of flannel's service account.
func (k *Kube) FlannelToken(ctx context.Context) (string, error) {
	var answer struct{ Status struct{ Token string } }
	err := k.Ask(ctx, http.MethodPost, "/api/v1/namespaces/"+flannelNamespace+"/serviceaccounts/"+flannelAccount+"/token",
		Object{"spec": Object{}}, &answer)
	return answer.Status.Token, err
}

// CreateNode registers a node as its kubelet would, with its podCIDRs, which
// somebody else would assign.
func (k *Kube) CreateNode(ctx context.Context, n *Node) error {
	return k.Ask(ctx, http.MethodPost, "/api/v1/nodes", NodeObject(n), nil)
}

// DeleteNode deletes a node's object.
func (k *Kube) DeleteNode(ctx context.Context, n *Node) error {
	return k.Ask(ctx, http.MethodDelete, nodePath(n), nil, nil)
}

// nodePath is where a node's object is in the API.
func nodePath(n *Node) string { return "/api/v1/nodes/" + n.name }

// NodeObject is a node as its kubelet would register it. Stock flanneld 0.28.10
// can't do with a Node that has no annotation, but in a cluster there is this one.
func NodeObject(n *Node) Object {
	var addresses []Object
	for _, a := range n.Addresses() {
		addresses = append(addresses, Object{"type": "InternalIP", "address": a.String()})
	}
	return Object{
		"metadata": Object{"name": n.name, "annotations": Object{"node.alpha.kubernetes.io/ttl": "0"}},
		"spec":     Object{"podCIDR": n.Prefixes()[0].String(), "podCIDRs": n.Prefixes()},
		"status":   Object{"addresses": addresses},
	}
}

// Annotations are those of a node's object.
func (k *Kube) Annotations(ctx context.Context, n *Node) (map[string]string, error) {
	var node struct {
		Metadata struct{ Annotations map[string]string }
	}
	err := k.Ask(ctx, http.MethodGet, nodePath(n), nil, &node)
	return node.Metadata.Annotations, err
}

// Annotate sets annotations of a node's object; nil as a value deletes one.
func (k *Kube) Annotate(ctx context.Context, n *Node, annotations Object) error {
	return k.Ask(ctx, http.MethodPatch, nodePath(n), Object{"metadata": Object{"annotations": annotations}}, nil)
}
