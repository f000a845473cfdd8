package flannel

import (
	"os"
	"strings"
	"testing"
)

// simpleEnv is what an agent for IPv4 writes.
const simpleEnv = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"

// delegated is what a configuration and a subnet.env make, as text.
func delegated(conf, env string) (string, error) {
	c, err := ParseCNIConf([]byte(conf))
	if err != nil {
		return "", err
	}
	e, err := ParsePluginEnv([]byte(env))
	if err != nil {
		return "", err
	}
	d, err := c.Delegate(e)
	if err != nil {
		return "", err
	}
	return string(d.Marshal()), nil
}

// What flannel's plugin documents: what it sets always, what it sets unless it is
// given, and what it passes on.
func TestDelegatedConfiguration(t *testing.T) {
	const routes = `"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"`
	for name, c := range map[string]struct{ conf, env, want string }{
		"nothing said": {
			`{"name":"cbr0","type":"flannel"}`, simpleEnv,
			`{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],` + routes + `},"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}`,
		},
		"flannel's own manifest": {
			`{"name":"cbr0","cniVersion":"1.0.0","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}}`, simpleEnv,
			`{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],` + routes + `},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}`,
		},
		"what is given stays": {
			`{"name":"n","delegate":{"bridge":"mynet0","mtu":1400,"ipMasq":true,"isGateway":false,"big":12345678901234567890}}`, simpleEnv,
			`{"big":12345678901234567890,"bridge":"mynet0","ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],` + routes + `},"isGateway":false,"mtu":1400,"name":"n","type":"bridge"}`,
		},
		"another plugin has no gateway": {
			`{"name":"n","delegate":{"type":"ipvlan","master":"eth0"}}`, simpleEnv,
			`{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],` + routes + `},"master":"eth0","mtu":1450,"name":"n","type":"ipvlan"}`,
		},
		"the agent does not masquerade": {
			`{"name":"n"}`, strings.Replace(simpleEnv, "true", "false", 1),
			`{"ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],` + routes + `},"isGateway":true,"mtu":1450,"name":"n","type":"bridge"}`,
		},
		"addresses and routes of one's own": {
			`{"name":"n","ipam":{"type":"mine","dataDir":"/d","ranges":"x","routes":[{"dst":"10.96.0.0/12","gw":"10.244.1.9"}]}}`, simpleEnv,
			`{"ipMasq":false,"ipam":{"dataDir":"/d","ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"10.96.0.0/12","gw":"10.244.1.9"},{"dst":"10.244.0.0/16"}],"type":"mine"},"isGateway":true,"mtu":1450,"name":"n","type":"bridge"}`,
		},
		"both families, more than one network": {
			`{"name":"n"}`, "FLANNEL_NETWORK=10.244.0.0/16,10.9.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
			`{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}],[{"subnet":"fd00:0:0:1::/64"}]],"routes":[{"dst":"10.244.0.0/16"},{"dst":"10.9.0.0/16"},{"dst":"fd00::/48"}],"type":"host-local"},"isGateway":true,"mtu":1450,"name":"n","type":"bridge"}`,
		},
		"what the runtime says": {
			`{"name":"n","runtimeConfig":{"mac":"02:00:00:00:00:01"},"prevResult":{"ips":[]}}`, simpleEnv,
			`{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],` + routes + `},"isGateway":true,"mtu":1450,"name":"n","runtimeConfig":{"mac":"02:00:00:00:00:01"},"type":"bridge"}`,
		},
		"null is not given": {
			`{"name":"n","delegate":null,"ipam":null,"runtimeConfig":null,"prevResult":null}`, simpleEnv,
			`{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],` + routes + `},"isGateway":true,"mtu":1450,"name":"n","type":"bridge"}`,
		},
	} {
		if got, err := delegated(c.conf, c.env); err != nil || got != c.want {
			t.Errorf("%s: %v\ngot  %s\nwant %s", name, err, got, c.want)
		}
	}
}

func TestConfigurationsThatCanNotBeDelegated(t *testing.T) {
	for conf, want := range map[string]string{
		``:                          "the configuration of the flannel plugin: unexpected end of JSON input",
		`{"delegate":[]}`:           "cannot unmarshal array",
		`{"delegate":{"type":5}}`:   `"type" in "delegate" is 5; give the name of a plugin, as in "bridge"`,
		`{"delegate":{"type":""}}`:  `"type" in "delegate" is ""; give the name`,
		`{"delegate":{"name":"x"}}`: `"name" in "delegate" is "x"; leave it out there`,
		`{"delegate":{"ipam":{}}}`:  `"ipam" in "delegate" is {}; leave it out there`,
		`{"ipam":{"routes":"x"}}`:   `"routes" in "ipam" is "x"; give a list`,
		`{"name":"` + strings.Repeat("x", maxConfig) + `"}`: "the limit is",
	} {
		if _, err := delegated(conf, simpleEnv); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v, want %s", conf, err, want)
		}
	}
}

func TestSubnetFilesForThePlugin(t *testing.T) {
	for name, data := range capturedEnvs(t) {
		e, err := ParsePluginEnv(data)
		if err != nil || len(e.Networks) == 0 || e.MTU == 0 || !e.IPMasq || e.Subnet != e.Subnet.Masked() {
			t.Errorf("%s, by a stock flanneld: %+v, %v", name, e, err)
		}
	}
	for text, want := range map[string]string{
		"": "FLANNEL_NETWORK or FLANNEL_IPV6_NETWORK is missing\nFLANNEL_SUBNET or FLANNEL_IPV6_SUBNET is missing\nFLANNEL_MTU is missing\nFLANNEL_IPMASQ is missing",
		"FLANNEL_NETWORK=10.244.0.0/16,fd00::/48\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=x\nFLANNEL_IPMASQ=1": `FLANNEL_NETWORK has "fd00::/48", which is not an IPv4 prefix` + "\n" +
			`FLANNEL_MTU="x" is no MTU; give bytes from 0 to 65535` + "\n" + `FLANNEL_IPMASQ="1"; give true or false`,
		simpleEnv + "FLANNEL_MTU": `line 5: "FLANNEL_MTU": not of the form NAME=value`,
		// Lines of somebody else's.
		"# hello\nX=$(date)\n" + simpleEnv: "",
	} {
		_, err := ParsePluginEnv([]byte(text))
		if (err == nil) != (want == "") || err != nil && err.Error() != want {
			t.Errorf("%q:\n%v\nwant\n%s", text, err, want)
		}
	}
}

// What is not said must never be taken for "nothing is in use".
func TestAttachmentsInUse(t *testing.T) {
	for text, want := range map[string]struct {
		count int
		err   string
	}{
		`{}`:                                  {err: ErrNoAttachments.Error()},
		`{"cni.dev/valid-attachments":null}`:  {err: ErrNoAttachments.Error()},
		`{"cni.dev/valid-attachments": null}`: {err: ErrNoAttachments.Error()},
		`{"cni.dev/attachments":[]}`:          {err: ErrNoAttachments.Error()},
		`{"cni.dev/valid-attachments":{}}`:    {err: `"cni.dev/valid-attachments" is {}`},
		`{"cni.dev/valid-attachments":[{}]}`:  {err: `has no containerID or no ifname at 0`},
		`{"cni.dev/valid-attachments":[]}`:    {},
		`{"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"},{"containerID":"b","ifname":"net1"}]}`: {count: 2},
	} {
		c, err := ParseCNIConf([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		valid, err := c.Valid()
		if len(valid) != want.count || (err == nil) != (want.err == "") || err != nil && !strings.Contains(err.Error(), want.err) {
			t.Errorf("%s: %v, %v", text, valid, err)
		}
	}
}

// A later call is about what was made at first, with what the runtime says now. A
// result in the words of another version is not passed on.
func TestLaterCalls(t *testing.T) {
	d, err := ParseDelegateConf([]byte(`{"cniVersion":"1.0.0","name":"n","type":"bridge","runtimeConfig":{"old":1}}`))
	if err != nil {
		t.Fatal(err)
	}
	for conf, want := range map[string]string{
		`{"name":"n","cniVersion":"1.0.0"}`:                                                                                         `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"old":1},"type":"bridge"}`,
		`{"name":"n","cniVersion":"1.0.0","runtimeConfig":{"new":2},"prevResult":{"ips":[]}}`:                                       `{"cniVersion":"1.0.0","name":"n","prevResult":{"ips":[]},"runtimeConfig":{"new":2},"type":"bridge"}`,
		`{"name":"n","cniVersion":"1.0.0","prevResult":{"routes":[{"dst":"10.244.0.0/16"},{"dst":"0.0.0.0/0","gw":"10.244.1.1"}]}}`: `{"cniVersion":"1.0.0","name":"n","prevResult":{"routes":[{"dst":"0.0.0.0/0","gw":"10.244.1.1"}]},"runtimeConfig":{"old":1},"type":"bridge"}`,
		`{"name":"n","cniVersion":"0.4.0","prevResult":{"ips":[]}}`:                                                                 `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"old":1},"type":"bridge"}`,
		`{"name":"n","cniVersion":"1.0.0","runtimeConfig":null,"prevResult":null,"cni.dev/valid-attachments":[{"x":"y"}]}`:          `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"old":1},"type":"bridge"}`,
	} {
		c, err := ParseCNIConf([]byte(conf))
		if err != nil {
			t.Fatal(err)
		}
		if got := string(d.Continued(c).Marshal()); got != want {
			t.Errorf("%s:\ngot  %s\nwant %s", conf, got, want)
		}
	}
	for _, text := range []string{``, `[]`, `{}`, `{"type":""}`, `{"type":7}`, `null`} {
		if _, err := ParseDelegateConf([]byte(text)); err == nil {
			t.Errorf("%q was read", text)
		}
	}
}

// FuzzDelegate looks for configurations that can be read but not delegated, or not
// read back.
func FuzzDelegate(f *testing.F) {
	f.Add([]byte(`{"name":"cbr0","cniVersion":"1.0.0","type":"flannel","delegate":{"hairpinMode":true}}`), []byte(simpleEnv))
	f.Add([]byte(`{"name":"n","ipam":{"routes":[{"dst":"10.96.0.0/12"}]},"runtimeConfig":null}`), []byte(simpleEnv))
	dual, err := os.ReadFile("testdata/captured/subnet-kube-dual-n1.env")
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"name":"n","delegate":{"type":"ptp"}}`), dual)
	f.Fuzz(func(t *testing.T, conf, env []byte) {
		c, err := ParseCNIConf(conf)
		if err != nil {
			return
		}
		_, _ = c.Valid()
		e, err := ParsePluginEnv(env)
		if err != nil {
			return
		}
		d, err := c.Delegate(e)
		if err != nil {
			return
		}
		back, err := ParseDelegateConf(d.Marshal())
		if err != nil || back.Type() != d.Type() || back.Network() != c.Name {
			t.Errorf("%s came back as %+v, %v", d.Marshal(), back, err)
		}
	})
}
