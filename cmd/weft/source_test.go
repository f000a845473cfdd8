package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weft-net/weft/dataplane/uplink"
)

// The operator's word on the Node about where peers reach it comes before the
// flags, family by family, and chooses the interface where nothing else does.
func TestNodePublicIPOfTheAnnotationChoosesTheUplink(t *testing.T) {
	const prefix = `"flannel.alpha.coreos.com/node-public-`
	for name, c := range map[string]struct {
		annotations string
		want        string
		err         string
	}{
		"none":      {"", "198.51.100.1 2001:db8:1::1", ""},
		"IPv4":      {prefix + `ip":"203.0.113.4"`, "203.0.113.4 2001:db8:1::1", ""},
		"IPv6":      {prefix + `ipv6":"2001:db8:2::6"`, "198.51.100.1 2001:db8:2::6", ""},
		"both":      {prefix + `ip":"203.0.113.4",` + prefix + `ipv6":"2001:db8:2::6"`, "203.0.113.4 2001:db8:2::6", ""},
		"no IP":     {prefix + `ip":"eth0"`, "", `annotation flannel.alpha.coreos.com/node-public-ip: "eth0" is no IPv4 address`},
		"no Node":   {"404", "198.51.100.1 2001:db8:1::1", ""},
		"API fails": {"500", "", "broken"},
	} {
		t.Run(name, func(t *testing.T) {
			api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				switch {
				case r.URL.Path != "/api/v1/nodes/n1" || c.annotations == "404":
					w.WriteHeader(http.StatusNotFound)
					fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
				case c.annotations == "500":
					w.WriteHeader(http.StatusInternalServerError)
					fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"broken","code":500}`)
				default:
					fmt.Fprintf(w, `{"kind":"Node","apiVersion":"v1","metadata":{"name":"n1","annotations":{%s}}}`, c.annotations)
				}
			}))
			defer api.Close()
			conf := filepath.Join(t.TempDir(), "net-conf.json")
			text := `{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","VNI":7}}`
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			d := newDesk(t)
			d.env = map[string]string{"NODE_NAME": "n1"}
			o := &agentOptions{flannelOptions: flannelOptions{
				KubeSubnetMgr: true, KubeAPIURL: api.URL, KubeAnnotationPrefix: "flannel.alpha.coreos.com", NetConfigPath: conf,
				PublicIP: "198.51.100.1", PublicIPv6: "2001:db8:1::1",
			}}
			from, err := newSource(&env{ctx: t.Context(), getenv: d.getenv}, o, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			store, err := from.open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got, err := from.prepare(t.Context(), store)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("%+v, %v; want an error that says %s", got, err, c.err)
				}
				return
			}
			ip, ipv6, _ := strings.Cut(c.want, " ")
			want := preparation{uplink.Options{PublicIP: ip, PublicIPv6: ipv6, IPv4: true, IPv6: true}, 7}
			if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
				t.Errorf("prepared %+v, %v, want %+v", got, err, want)
			}
		})
	}
}

// What the last start has written is what the etcd store tries to have again.
func TestSubnetFileGoesToTheEtcdStore(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		want []string
		warn string
	}{
		"no file":       {"", nil, ""},
		"IPv4":          {"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.9.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n", []string{"10.244.9.0/24"}, ""},
		"both families": {"FLANNEL_SUBNET=10.244.9.1/24\nFLANNEL_IPV6_SUBNET=fd00:9::1/64\n", []string{"10.244.9.0/24", "fd00:9::/64"}, ""},
		"half of it":    {"FLANNEL_SUBNET=10.244.9.1\nFLANNEL_IPV6_SUBNET=fd00:9::1/64\n", []string{"fd00:9::/64"}, "the last start's subnet file is not all right"},
	} {
		t.Run(name, func(t *testing.T) {
			var log syncBuffer
			o := &agentOptions{flannelOptions: flannelOptions{EtcdEndpoints: "http://192.0.2.5:2379", SubnetFile: filepath.Join(t.TempDir(), "subnet.env")}}
			if c.file != "" {
				if err := os.WriteFile(o.SubnetFile, []byte(c.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var want []netip.Prefix
			for _, p := range c.want {
				want = append(want, netip.MustParsePrefix(p))
			}
			options := etcdOptions(o, slog.New(slog.NewTextHandler(io.Writer(&log), nil)))
			if !slices.Equal(options.Previous, want) {
				t.Errorf("previous prefixes %v, want %v", options.Previous, want)
			}
			if c.warn == "" && log.String() != "" || !strings.Contains(log.String(), c.warn) {
				t.Errorf("log %q, want %q", log.String(), c.warn)
			}
		})
	}
}
