//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// mustProgram writes a program that prints a line.
func mustProgram(t *testing.T, name, says string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho '"+says+"' >&2\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProgramsAreFoundInTheListAndInPath(t *testing.T) {
	listed, other := mustProgram(t, "flanneld", "v1.2.3"), mustProgram(t, "etcd", "etcd Version: 3.2.1")
	t.Setenv("PATH", filepath.Dir(other))
	found, err := findPrograms("/nowhere/kube-proxy\n"+listed, []string{"flanneld", "etcd"})
	if err != nil || len(found) != 2 || found["flanneld"] != listed || found["etcd"] != other {
		t.Errorf("found %v, %v", found, err)
	}
	if _, err := findPrograms(listed, []string{"flanneld", "kube-proxy"}); err == nil ||
		!strings.Contains(err.Error(), "`test/peers flanneld kube-proxy`") {
		t.Errorf("a missing program should be told, with what builds it: %v", err)
	}
}

func TestVersionIsTheLastWord(t *testing.T) {
	found := peerPrograms{"flanneld": mustProgram(t, "flanneld", "v1.2.3"), "kube-proxy": mustProgram(t, "kube-proxy", "Kubernetes v1.36.3")}
	for name, want := range map[string]string{"flanneld": "v1.2.3", "kube-proxy": "v1.36.3"} {
		if got, err := found.version(t.Context(), name); err != nil || got != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	found["silent"] = mustProgram(t, "silent", "")
	if got, err := found.version(t.Context(), "silent"); err == nil {
		t.Errorf("a program that says nothing has version %q", got)
	}
}
