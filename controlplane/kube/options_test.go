package kube

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weft-net/weft/controlplane/flannel"
)

func TestFaultsOfOptionsComeTogether(t *testing.T) {
	_, err := Open(Options{APIURL: "192.0.2.1:6443", AnnotationPrefix: "no/such/prefix"})
	for _, want := range []string{"NODE_NAME", "192.0.2.1:6443", "annotation prefix", "network", "logger"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %s in: %v", want, err)
		}
	}
}

// sound are options without a fault, but for where the API is.
func sound(t *testing.T) Options {
	t.Helper()
	config, err := flannel.ParseConfig([]byte(confV4))
	if err != nil {
		t.Fatal(err)
	}
	return Options{Node: "self", Config: config, Log: slog.New(slog.DiscardHandler), Version: "1.2.3"}
}

func TestWhereTheAPIIs(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := Open(sound(t)); err == nil || !strings.Contains(err.Error(), "--kubeconfig-file") {
		t.Errorf("neither a pod nor a flag: %v", err)
	}
	o := sound(t)
	o.APIURL = "http://192.0.2.1:8080"
	if s, err := Open(o); err != nil || s.client.host != o.APIURL {
		t.Errorf("a URL: %v", err)
	}
	o.Kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	if _, err := Open(o); err == nil || !strings.Contains(err.Error(), o.Kubeconfig) {
		t.Errorf("a file that is missing: %v", err)
	}
	text := "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'https://192.0.2.2:6443'}}]\n" +
		"contexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n"
	if err := os.WriteFile(o.Kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(o); err != nil || s.client.host != "http://192.0.2.1:8080" {
		t.Errorf("the URL goes before the file's: %v", err)
	}
	o.APIURL = ""
	if s, err := Open(o); err != nil || s.client.host != "https://192.0.2.2:6443" {
		t.Errorf("the file's URL: %v", err)
	}
}

func TestNameOfTheNode(t *testing.T) {
	for environment, want := range map[string]string{
		"NODE_NAME=a":              "a",
		"":                         "",
		"POD_NAME=p":               "",
		"NODE_NAME=a POD_NAME=p":   "a",
		"POD_NAMESPACE=n POD_NAM=": "",
	} {
		name, err := FindNode(t.Context(), sound(t), func(key string) string {
			for pair := range strings.FieldsSeq(environment) {
				if value, ok := strings.CutPrefix(pair, key+"="); ok {
					return value
				}
			}
			return ""
		})
		if name != want || (err == nil) != (want != "") || err != nil && !strings.Contains(err.Error(), "NODE_NAME") {
			t.Errorf("%q: %q, %v", environment, name, err)
		}
	}
}
