//go:build linux

package dataplane

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// settings makes a directory of sysctls with what express needs of conntrack;
// "" is one that does not exist. It returns how to read them.
func settings(t *testing.T, liberal, ignoreResets string) func() []string {
	t.Helper()
	dir := t.TempDir()
	old := sysctlPath
	sysctlPath = func(name string) string { return filepath.Join(dir, name) }
	t.Cleanup(func() { sysctlPath = old })
	for i, value := range []string{liberal, ignoreResets} {
		path := filepath.Join(dir, conntrackSettings[i])
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if value == "" {
			continue
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return func() (now []string) {
		for _, name := range conntrackSettings {
			text, _ := os.ReadFile(filepath.Join(dir, name))
			now = append(now, strings.TrimSpace(string(text)))
		}
		return now
	}
}

func TestConntrackIsSetForExpress(t *testing.T) {
	for name, c := range map[string]struct {
		before, after, changed []string
		obstacle               string
	}{
		"as the kernel has them": {
			[]string{"0", "0"},
			[]string{"1", "1"},
			[]string{"net.netfilter.nf_conntrack_tcp_be_liberal", "net.netfilter.nf_conntrack_tcp_ignore_invalid_rst"},
			"",
		},
		"one is set":        {[]string{"1", "0"}, []string{"1", "1"}, []string{"net.netfilter.nf_conntrack_tcp_ignore_invalid_rst"}, ""},
		"both are set":      {[]string{"1", "1"}, []string{"1", "1"}, nil, ""},
		"without conntrack": {[]string{"", ""}, []string{"", ""}, nil, "net.netfilter.nf_conntrack_tcp_be_liberal does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			now := settings(t, c.before[0], c.before[1])
			changed, obstacle := setConntrack()
			if !slices.Equal(changed, c.changed) || !slices.Equal(now(), c.after) {
				t.Errorf("changed %v to %v; want %v, %v", changed, now(), c.changed, c.after)
			}
			if !strings.HasPrefix(obstacle, c.obstacle) || (obstacle == "") != (c.obstacle == "") {
				t.Errorf("in the way is %q, want %q…", obstacle, c.obstacle)
			}
		})
	}
}

// A container has /proc/sys read-only: what can't be set is named, with what to
// do.
func TestConntrackThatCanNotBeSetIsInTheWay(t *testing.T) {
	settings(t, "1", "1")
	blocked := sysctlPath(conntrackSettings[0])
	if err := os.Remove(blocked); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(blocked, 0o755); err != nil { // root may write to any file
		t.Fatal(err)
	}
	_, obstacle := setConntrack()
	for _, part := range []string{"net.netfilter.nf_conntrack_tcp_be_liberal is not 1 and can't be set", "/host/proc/sys/net"} {
		if !strings.Contains(obstacle, part) {
			t.Errorf("in the way is %q, which does not say %q", obstacle, part)
		}
	}
}
