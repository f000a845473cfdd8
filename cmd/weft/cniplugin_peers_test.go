//go:build linux && peers

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// Version 1.1.0 of the specification, which Debian's plugins do not know.
func TestPluginWithNewestReferencePlugins(t *testing.T) {
	plugins, err := lab.Programs("bridge", "host-local")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, path := range plugins {
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	tryPlugins(t, "1.1.0", dir)
}
