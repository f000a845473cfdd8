//go:build linux && e2e

package e2e_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/weft-net/weft/deploy"
	"github.com/weft-net/weft/test/lab"
)

// charts are what users may set, and a word that then is in the manifests.
var charts = []struct{ name, set, want string }{
	{"flannel's values", "podCidr=10.1.0.0/16,flannel.backendPort=4789,flannel.vni=7,flannel.mtu=1400,flannel.directRouting=true,flannel.enableNFTables=true", `"VNI": 7`},
	{"both families", "podCidrv6=fd00:10:244::/48", `"EnableIPv6": true`},
	{"IPv6 alone", "podCidr=,podCidrv6=fd00:10:244::/48", `"EnableIPv4": false`},
	{"flannel's ports for health", "flannel.healthz.port=8081", "--healthz-port=8081"},
	{"flannel's CNI plugin", "flannel.flannel_cni.image.repository=example.com/cni,flannel.flannel_cni.image.tag=v1", "image: example.com/cni:v1"},
	{"CNI configuration of others", "flannel.skipCNIConfigInstallation=true,flannel.cniBinDir=/usr/lib/cni", "path: /usr/lib/cni"},
	{"NetworkPolicy", "netpol.enabled=true,global.imagePullSecrets[0].name=pull", "adminnetworkpolicies"},
	{"kernel path", "weft.accelerate=false", "--accel=off"},
	{"flags and ports", "weft.args[0]=--source-check=enforce,weft.metricsPort=9999", "--metrics-addr=:9999"},
	{"any policy", "weft.ownNodeOnly=false", "nodes/status"},
	{"nodes", "flannel.nodeSelector.pool=a", "pool: a"},
}

// The chart's defaults are the plain manifest, and it says no to what weft can't do.
func TestChart(t *testing.T) {
	if out, err := helm(t, "lint", "--strict", chart(t)); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	got, want := objects(t, render(t)), objects(t, deploy.Manifest)
	delete(want, "Namespace kube-flannel") // helm makes it, if it is asked to
	if !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want))) {
		t.Errorf("the chart has %v, weft.yaml %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
	for name, object := range want {
		if !reflect.DeepEqual(got[name], object) {
			t.Errorf("the chart has\n%+v\nweft.yaml has\n%+v", got[name], object)
		}
	}
	for _, c := range charts {
		text := render(t, "--set", c.set)
		objects(t, text)
		if !strings.Contains(text, c.want) {
			t.Errorf("%s: %s is not in\n%s", c.name, c.want, text)
		}
	}
	if _, there := objects(t, render(t, "--kube-version", "1.29"))["ValidatingAdmissionPolicy flannel-own-node"]; there {
		t.Error("Kubernetes 1.29 gets a policy that it does not know")
	}
	for set, want := range map[string]string{
		"flannel.backend=wireguard": `flannel.backend is "wireguard": weft is a VXLAN network`,
		"podCidr=":                  "podCidr and podCidrv6 are both empty",
	} {
		if out, err := helm(t, "template", "weft", chart(t), "--set", set); err == nil || !strings.Contains(out, want) {
			t.Errorf("with %s: %v\n%s\nwant %q", set, err, out, want)
		}
	}
}

// charts has the API server look at what users may make of the chart, all of it at once:
// nothing is made.
func (s *suite) charts(t *testing.T) {
	dir := t.TempDir()
	for i, c := range charts {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), []byte(render(t, "--set", c.set)), 0o644))
	}
	s.mustBeTaken(t, len(charts), "-f", dir)
}

// render has helm make manifests of the chart.
func render(t *testing.T, args ...string) string {
	t.Helper()
	out, err := helm(t, append([]string{"template", "weft", chart(t), "--namespace", "kube-flannel", "--kube-version", "1.30"}, args...)...)
	if err != nil {
		t.Fatalf("helm %v: %v\n%s", args, err, out)
	}
	return out
}

// chart is the path of the chart.
func chart(t *testing.T) string {
	t.Helper()
	root, err := lab.ModuleRoot()
	must(t, err)
	return filepath.Join(root, "deploy/helm")
}

func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	found, err := lab.Programs("helm")
	must(t, err)
	cmd := exec.CommandContext(t.Context(), found["helm"], args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// objects reads manifests, and returns what is in them by kind and name. A
// configuration of JSON is what it says, and not how it is written.
func objects(t *testing.T, text string) map[string]runtime.Object {
	t.Helper()
	found := map[string]runtime.Object{}
	for document := range strings.SplitSeq(text, "\n---") {
		object, kind, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(document), nil, nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		if c, ok := object.(*corev1.ConfigMap); ok {
			for key, value := range c.Data {
				var content any
				must(t, json.Unmarshal([]byte(value), &content))
				plain, err := json.Marshal(content)
				must(t, err)
				c.Data[key] = string(plain)
			}
		}
		m, err := meta.Accessor(object)
		must(t, err)
		found[kind.Kind+" "+m.GetName()] = object
	}
	return found
}
