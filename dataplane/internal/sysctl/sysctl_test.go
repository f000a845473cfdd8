//go:build linux

package sysctl

import (
	"os"
	"path/filepath"
	"testing"
)

// What a container has of the host's settings comes before its own, one by one.
func TestHostsSettingsComeFirst(t *testing.T) {
	host, own := t.TempDir(), t.TempDir()
	mounted := filepath.Join(host, "net/here")
	if err := os.MkdirAll(filepath.Dir(mounted), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(mounted, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"net/here":  mounted,
		"net/there": filepath.Join(own, "net/there"),
	} {
		if path := choose(host, own, name); path != want {
			t.Errorf("%s is at %s, want %s", name, path, want)
		}
	}
}

func TestSettingsOfThisMachine(t *testing.T) {
	if path := Path("net/ipv4/ip_forward"); path != "/proc/sys/net/ipv4/ip_forward" {
		t.Errorf("ip_forward is at %s", path)
	}
}
