//go:build linux && e2e

package e2e_test

import (
	"strings"
	"testing"

	"github.com/weft-net/weft/test/cluster"
)

// Flannel's own manifest works with nothing changed in it but the images' name: on the
// kernel path, as the rights in it allow no more. The command that the agent then tells
// turns eBPF on, for express too.
func TestDropIn(t *testing.T) {
	manifest, err := cluster.FlannelManifest()
	must(t, err)
	images := cluster.Images(manifest)
	if len(images) != 2 {
		t.Fatalf("flannel's manifest names %q, want two images", images)
	}
	for _, image := range images {
		manifest = strings.ReplaceAll(manifest, "image: "+image, "image: "+cluster.WeftImage)
	}
	s := newSuite(t, cluster.Options{Manifest: manifest})
	s.pairs(t)
	s.service(t)
	s.log(t)

	way := s.way(t, "-n kube-flannel logs ds/kube-flannel-ds -c kube-flannel", `command="`)
	if status := s.way(t, "-n kube-flannel exec ds/kube-flannel-ds -c kube-flannel -- weft status", "to turn eBPF on: "); status != way {
		t.Errorf("the log tells\n%s\nand weft status\n%s", way, status)
	}
	if out, err := s.Lab.Underlay.Output(t.Context(), "sh", "-c", strings.Replace(way, "kubectl", strings.Join(s.KubectlCommand(), " "), 1)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	must(t, s.WaitForNetwork(t.Context()))
	s.pairs(t)
	s.express(t)
	s.log(t)
}

// way finds the command that turns eBPF on in what kubectl prints: what follows these
// words in a line, up to where the shell's last quote ends.
func (s *suite) way(t *testing.T, ask, words string) string {
	t.Helper()
	said := s.kubectl(t, ask)
	_, way, found := strings.Cut(said, words)
	way, _, _ = strings.Cut(way, "\n")
	way = strings.ReplaceAll(way, `\"`, `"`)
	if end := strings.LastIndexByte(way, '\''); found && end > 0 {
		return way[:end+1]
	}
	t.Fatalf("kubectl %s tells no command after %q:\n%s", ask, words, said)
	return ""
}
