package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What init containers do: the new file is there at once, with its mode, and who
// has the old one open still has it.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	if err := os.WriteFile(source, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(source, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(target, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	running, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer running.Close()
	d := newDesk(t)
	if said := d.must("install", "-f", source, target); said != "" {
		t.Errorf("it says %q", said)
	}
	old := make([]byte, 8)
	if n, _ := running.Read(old); string(old[:n]) != "old" {
		t.Errorf("who had the file open reads %q", old[:n])
	}
	where := filepath.Join(dir, "there")
	if err := os.Mkdir(where, 0o755); err != nil {
		t.Fatal(err)
	}
	d.must("install", source, where)
	for _, path := range []string{target, filepath.Join(where, "source")} {
		text, err := os.ReadFile(path)
		info, statErr := os.Stat(path)
		if err != nil || statErr != nil || string(text) != "new" || info.Mode() != 0o755 {
			t.Errorf("%s: %q, %v, %v", path, text, info.Mode(), err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("%v is left behind", left)
	}
}

func TestInstallFailures(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"only"}, "install: say what to put where"},
		{[]string{"a", "b", "c"}, `install: there is no use for "c"`},
		{[]string{filepath.Join(dir, "none"), filepath.Join(dir, "x")}, "no such file"},
		{[]string{dir, filepath.Join(dir, "x")}, "is not a regular file"},
		{[]string{"install_test.go", filepath.Join(dir, "none", "x")}, "installing " + filepath.Join(dir, "none", "x")},
	} {
		status, _, stderr := newDesk(t).call(append([]string{"install"}, c.args...)...)
		if status == 0 || !strings.Contains(stderr, c.want) {
			t.Errorf("install %q: status %d, %s", c.args, status, stderr)
		}
	}
}
