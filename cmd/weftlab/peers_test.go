//go:build linux && peers

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// `make interop` builds stock flanneld and kube-proxy and runs this with them:
// short rounds that find out whether they still work together at all.
func TestBenchBesideStockPrograms(t *testing.T) {
	paths := os.Getenv("WEFT_PEERS")
	if paths == "" {
		t.Fatal("WEFT_PEERS is not set: give it what `test/peers flanneld etcd kube-apiserver kube-proxy` prints")
	}
	weftlab := programs(t)
	file := filepath.Join(t.TempDir(), "bench.csv")
	out, err := exec.Command(weftlab, "bench", "--name", "pt", "--programs", paths, "--rounds", "1", "--time", "100ms",
		"--modes", "host,flanneld,base", "--tests", "TCP_CRR,UDP_RR", "--underlay", "wire", "--peers", "1,300",
		"--to", "pod,iptables:2,nftables:2", "--csv", file).CombinedOutput()
	if err != nil {
		t.Fatalf("weftlab bench: %v\n%s", err, out)
	}
	csv, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if rows := strings.Count(string(csv), "\n"); rows != 1+4*2*3 {
		t.Errorf("%d lines, want a head and four settings of two tests in three modes:\n%s", rows, csv)
	}
	for _, head := range []string{"flanneld    v", "kube-proxy  v1."} {
		if !strings.Contains(string(out), head) {
			t.Errorf("the head does not say %q:\n%s", head, out)
		}
	}
	for _, name := range []string{"pt1", "pt2", "pt3", "ptk"} {
		assertDown(t, name)
	}
	t.Logf("%s", out)
}
