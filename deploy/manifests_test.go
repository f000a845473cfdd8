// Package deploy_test reads the manifests as an API server does.
package deploy_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

// mustDecode reads a manifest. A field that Kubernetes does not know is a fault.
func mustDecode(t *testing.T, path string) []runtime.Object {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	strict := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer()
	var objects []runtime.Object
	for documents := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text))); ; {
		document := make([]byte, len(text))
		n, err := documents.Read(document)
		if errors.Is(err, io.EOF) {
			return objects
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		object, _, err := strict.Decode(document[:n], nil, nil)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		objects = append(objects, object)
	}
}

// The plain manifest is what kustomize's base consists of, comments and all.
func TestPlainManifestIsTheBase(t *testing.T) {
	var parts []string
	for _, name := range []string{"rbac", "admission", "config", "daemonset"} {
		text, err := os.ReadFile(filepath.Join("kustomize/base", name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, string(text))
	}
	plain, err := os.ReadFile("weft.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if string(plain) != strings.Join(parts, "---\n") {
		t.Error("weft.yaml is not the files of kustomize/base with --- between them")
	}
}

func TestManifestIsWhatKubernetesKnows(t *testing.T) {
	objects := mustDecode(t, "weft.yaml")
	if len(objects) != 8 {
		t.Errorf("%d objects", len(objects))
	}
	objects = slices.Concat(objects, mustDecode(t, "migrate-check.yaml"), mustDecode(t, "remove.yaml"))
	for _, object := range objects {
		d, ok := object.(*appsv1.DaemonSet)
		if !ok {
			continue
		}
		pod := d.Spec.Template.Spec
		volumes := map[string]bool{}
		for _, v := range pod.Volumes {
			volumes[v.Name] = true
		}
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			checkContainer(t, c, volumes)
		}
	}
}

// checkContainer looks at what a container may do and at what it is given.
func checkContainer(t *testing.T, c corev1.Container, volumes map[string]bool) {
	t.Helper()
	if s := c.SecurityContext; s == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || s.Privileged != nil && *s.Privileged {
		t.Errorf("container %s may do %+v", c.Name, s)
	}
	for _, m := range c.VolumeMounts {
		if !volumes[m.Name] {
			t.Errorf("container %s mounts %s, which is no volume", c.Name, m.Name)
		}
	}
}
