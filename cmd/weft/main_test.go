package main

import (
	"slices"
	"testing"
)

func TestCalledInFlannelsPlace(t *testing.T) {
	here, nowhere := t.TempDir(), "/does/not/exist"
	for _, c := range []struct {
		args     []string
		stateDir string
		want     []string
	}{
		{[]string{"/opt/bin/flanneld", "--ip-masq"}, nowhere, []string{"weft", "agent", "--state-dir", "/run/flannel/weft", "--ip-masq"}},
		{[]string{"/opt/bin/flanneld", "--ip-masq"}, here, []string{"weft", "agent", "--ip-masq"}},
		{[]string{"/opt/cni/bin/flannel"}, nowhere, []string{"weft", "cni-plugin"}},
		{[]string{"cp", "-f", "/flannel", "/opt/cni/bin/flannel"}, nowhere, []string{"weft", "install", "-f", "/flannel", "/opt/cni/bin/flannel"}},
		{[]string{"/opt/bin/install-conf", "a", "b"}, nowhere, []string{"weft", "install", "a", "b"}},
		{[]string{"mk-docker-opts.sh", "-c"}, nowhere, []string{"weft", "mk-docker-opts", "-c"}},
		{[]string{"/usr/bin/weft", "agent"}, nowhere, []string{"/usr/bin/weft", "agent"}},
	} {
		if got := byOwnName(c.args, c.stateDir); !slices.Equal(got, c.want) {
			t.Errorf("%q is called as %q, want %q", c.args, got, c.want)
		}
	}
}
