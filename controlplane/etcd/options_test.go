//go:build linux && peers

package etcd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestOptions(t *testing.T) {
	good := Options{Endpoints: []string{"http://127.0.0.1:4001", "http://127.0.0.1:2379"}, Prefix: "/coreos.com/network"}
	for name, c := range map[string]struct {
		change func(*Options)
		want   []string // in the error; none for no error
	}{
		"flanneld's defaults":        {func(*Options) {}, nil},
		"no endpoint":                {func(o *Options) { o.Endpoints = nil }, []string{"--etcd-endpoints is empty"}},
		"an empty endpoint":          {func(o *Options) { o.Endpoints = []string{""} }, []string{`--etcd-endpoints has "", which names no host and port`}},
		"no port":                    {func(o *Options) { o.Endpoints = []string{"http://etcd"} }, []string{`"http://etcd", which names no host and port`}},
		"no scheme":                  {func(o *Options) { o.Endpoints = []string{"etcd.example.org:2379"} }, nil},
		"IPv6":                       {func(o *Options) { o.Endpoints = []string{"https://[2001:db8::1]:2379"} }, nil},
		"another scheme":             {func(o *Options) { o.Endpoints = []string{"ftp://etcd:2379"} }, []string{"neither http nor https"}},
		"no URL":                     {func(o *Options) { o.Endpoints = []string{"http://%zz:2379"} }, []string{"no URL"}},
		"a socket":                   {func(o *Options) { o.Endpoints = []string{"unix:///run/etcd.sock"} }, nil},
		"no key":                     {func(o *Options) { o.CertFile = "a.pem" }, []string{`--etcd-certfile is "a.pem" and --etcd-keyfile ""`}},
		"no password":                {func(o *Options) { o.Username = "flannel" }, []string{"only one of --etcd-username and --etcd-password"}},
		"the smallest margin":        {func(o *Options) { o.RenewMargin = time.Minute }, nil},
		"a margin that is too small": {func(o *Options) { o.RenewMargin = 30 * time.Second }, []string{"--subnet-lease-renew-margin is 30s"}},
		"a margin that is too great": {func(o *Options) { o.RenewMargin = leaseTTL }, []string{"from 1 to 1439 minutes"}},
		"all at once": {
			func(o *Options) { *o = Options{KeyFile: "k", Password: "p", RenewMargin: -1} },
			[]string{"--etcd-endpoints", "--etcd-certfile", "--etcd-username", "--subnet-lease-renew-margin"},
		},
	} {
		o := good
		c.change(&o)
		err := o.Validate()
		if (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v", name, err)
		}
		for _, want := range c.want {
			if err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q in it", name, err, want)
			}
		}
	}
}

// certificates are files of an authority and what it has signed.
type certificates struct {
	ca, serverCert, serverKey, clientCert, clientKey string
	otherCA                                          string
}

// mustCertify makes certificates.
func mustCertify(tb testing.TB) certificates {
	tb.Helper()
	dir := tb.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		must(tb, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(tb, err)
		return key
	}
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
	}
	authority := func(name string) (*x509.Certificate, *ecdsa.PrivateKey, string) {
		c, key := template(name), newKey()
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		must(tb, err)
		return c, key, write(name+".pem", "CERTIFICATE", der)
	}
	ca, caKey, caFile := authority("ca")
	_, _, otherFile := authority("other")
	sign := func(name string) (string, string) {
		c, key := template(name), newKey()
		c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, key.Public(), caKey)
		must(tb, err)
		keyDER, err := x509.MarshalECPrivateKey(key)
		must(tb, err)
		return write(name+".pem", "CERTIFICATE", der), write(name+"-key.pem", "EC PRIVATE KEY", keyDER)
	}
	all := certificates{ca: caFile, otherCA: otherFile}
	all.serverCert, all.serverKey = sign("server")
	all.clientCert, all.clientKey = sign("client")
	return all
}

func TestCertificateFiles(t *testing.T) {
	c := mustCertify(t)
	empty := filepath.Join(t.TempDir(), "empty.pem")
	must(t, os.WriteFile(empty, nil, 0o600))
	for name, test := range map[string]struct {
		o    Options
		want []string
	}{
		"all good":    {Options{CAFile: c.ca, CertFile: c.clientCert, KeyFile: c.clientKey}, nil},
		"missing":     {Options{CAFile: "/none/ca.pem", CertFile: "/none/cert.pem", KeyFile: c.clientKey}, []string{"--etcd-cafile", "/none/ca.pem", "--etcd-certfile /none/cert.pem", "no such file"}},
		"empty":       {Options{CAFile: empty}, []string{"--etcd-cafile", empty, "no PEM certificate"}},
		"not a pair":  {Options{CertFile: c.clientCert, KeyFile: c.serverKey}, []string{"--etcd-certfile " + c.clientCert, "--etcd-keyfile " + c.serverKey, "does not match"}},
		"not checked": {Options{Endpoints: []string{"http://127.0.0.1:2379"}, CAFile: "/none"}, nil}, // as flanneld: not used
	} {
		o := test.o
		if o.Endpoints == nil {
			o.Endpoints = []string{"https://127.0.0.1:2379"}
		}
		o.Log = slog.New(slog.DiscardHandler)
		_, err := Open(o)
		if (err == nil) != (test.want == nil) {
			t.Errorf("%s: %v", name, err)
		}
		for _, want := range test.want {
			if err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q in it", name, err, want)
			}
		}
	}
}

func TestWhatIsMostLikelyNotMeant(t *testing.T) {
	for _, c := range []struct {
		o    Options
		want string
	}{
		{Options{Endpoints: []string{"http://a:1"}, CAFile: "ca"}, "certificates for etcd are not used"},
		{Options{Endpoints: []string{"http://a:1"}, Username: "u", Password: "p"}, "in the clear"},
		{Options{Endpoints: []string{"http://a:1", "https://b:1"}}, "endpoint https://b:1 is spoken to like the first"},
		{Options{Endpoints: []string{"https://a:1", "https://b:1"}, Username: "u", Password: "p"}, ""},
	} {
		if got := strings.Join(c.o.warnings(), "\n"); !strings.Contains(got, c.want) || (c.want == "") != (got == "") {
			t.Errorf("%v: %q", c.o.Endpoints, got)
		}
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	c := mustCertify(t)
	s := ownEtcd(t, "https", "--cert-file", c.serverCert, "--key-file", c.serverKey, "--trusted-ca-file", c.ca, "--client-cert-auth")
	pair, err := tls.LoadX509KeyPair(c.clientCert, c.clientKey)
	must(t, err)
	pool, err := readPool(c.ca)
	must(t, err)
	h := mustHand(t, s, network, func(o *clientv3.Config) {
		o.TLS = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool, Certificates: []tls.Certificate{pair}}
	})
	for name, test := range map[string]struct {
		change func(*Options)
		want   []string
	}{
		"all good":              {func(o *Options) { o.CAFile, o.CertFile, o.KeyFile = c.ca, c.clientCert, c.clientKey }, nil},
		"no authority":          {func(o *Options) { o.CertFile, o.KeyFile = c.clientCert, c.clientKey }, []string{"signed by unknown authority", "give --etcd-cafile"}},
		"another authority":     {func(o *Options) { o.CAFile = c.otherCA }, []string{"signed by unknown authority", "see --etcd-cafile, " + c.otherCA}},
		"no certificate":        {func(o *Options) { o.CAFile = c.ca }, []string{"tls: ", "give --etcd-certfile and --etcd-keyfile"}},
		"http where TLS is due": {func(o *Options) { o.Endpoints = []string{"http://" + s.client} }, []string{"http://" + s.client, "give https endpoints"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store, log := mustOpen(t, s, test.change, func(o *Options) { o.Prefix = h.prefix })
			n := begin(t, store, log, offer(1))
			if test.want != nil {
				n.says(t, test.want...)
				must(t, slept(500*time.Millisecond))
				// Where etcd ends the connection, that may be seen before what it says.
				if said := n.everBroken(); len(said) > 2 || n.count() != 0 {
					t.Errorf("%d states, health: %q", n.count(), said)
				}
				return
			}
			n.ready(t)
			n.isWell(t)
		})
	}
}

func TestTLSWhereThereIsNone(t *testing.T) {
	t.Parallel()
	s := sharedEtcd(t)
	store, log := mustOpen(t, s, func(o *Options) { o.Endpoints = []string{"https://" + s.client} })
	n := begin(t, store, log, offer(1))
	n.says(t, "https://"+s.client, "if it does not speak TLS there, give http endpoints")
}

// Certificates are replaced under a running agent.
func TestCertificateIsReplaced(t *testing.T) {
	t.Parallel()
	c := mustCertify(t)
	s := ownEtcd(t, "https", "--cert-file", c.serverCert, "--key-file", c.serverKey, "--trusted-ca-file", c.ca, "--client-cert-auth")
	// One that etcd does not accept, since nobody has signed it.
	other := mustCertify(t)
	cert, key := filepath.Join(t.TempDir(), "cert"), filepath.Join(t.TempDir(), "key")
	swap := func(to certificates) {
		must(t, os.RemoveAll(cert))
		must(t, os.RemoveAll(key))
		must(t, os.Symlink(to.clientCert, cert))
		must(t, os.Symlink(to.clientKey, key))
	}
	swap(other)
	store, log := mustOpen(t, s, func(o *Options) { o.CAFile, o.CertFile, o.KeyFile = c.ca, cert, key })
	n := begin(t, store, log, offer(1))
	n.says(t, "etcd does not accept the certificate in --etcd-certfile, "+cert)
	swap(c)
	n.says(t, "etcdctl put")
}

func TestAuthentication(t *testing.T) {
	t.Parallel()
	s := ownEtcd(t, "http")
	h := mustHand(t, s, network)
	ctx := t.Context()
	for _, user := range []string{"root", "flannel", "reader"} {
		_, err := h.UserAdd(ctx, user, user+"-password")
		must(t, err)
	}
	for _, role := range []string{"root", "flannel", "reader"} {
		_, err := h.RoleAdd(ctx, role)
		must(t, err)
		_, err = h.UserGrantRole(ctx, role, role)
		must(t, err)
	}
	// Just what is needed.
	config, leases := h.prefix+"/config", h.prefix+"/subnets/"
	for role, access := range map[string]clientv3.PermissionType{"flannel": clientv3.PermissionType(clientv3.PermReadWrite), "reader": clientv3.PermissionType(clientv3.PermRead)} {
		_, err := h.RoleGrantPermission(ctx, role, config, "", clientv3.PermissionType(clientv3.PermRead))
		must(t, err)
		_, err = h.RoleGrantPermission(ctx, role, leases, clientv3.GetPrefixRangeEnd(leases), access)
		must(t, err)
	}
	_, err := h.AuthEnable(ctx)
	must(t, err)
	as := func(user, password string) func(*Options) {
		return func(o *Options) { o.Username, o.Password = user, password }
	}
	for name, test := range map[string]struct {
		change func(*Options)
		want   []string
	}{
		"good":              {as("flannel", "flannel-password"), nil},
		"wrong password":    {as("flannel", "wrong"), []string{`does not know user "flannel" with the password given`, "--etcd-password"}},
		"nobody":            {func(*Options) {}, []string{"etcd asks for a user; give --etcd-username"}},
		"who may not write": {as("reader", "reader-password"), []string{`user "reader" may not do this`, "grant read for " + config, "readwrite for the prefix " + leases}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store, log := mustOpen(t, s, test.change, func(o *Options) { o.Prefix = h.prefix })
			store.timing.TTL, store.timing.Margin = 4*time.Second, 3*time.Second
			n := begin(t, store, log, offer(1))
			if test.want != nil {
				n.says(t, test.want...)
				if n.count() != 0 {
					t.Errorf("%d states", n.count())
				}
				return
			}
			n.ready(t)
			n.isWell(t)
			must(t, slept(2*time.Second)) // it is renewed meanwhile
			if said := n.everBroken(); len(said) > 0 {
				t.Errorf("health: %q", said)
			}
		})
	}
}
