//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// someFiles are a layer.
func someFiles() files {
	return files{
		"usr/bin/weft": {mode: 0o755, content: []byte("program")}, "opt/bin/flanneld": {link: "/usr/bin/weft"},
		"run": {dir: true}, "usr/share/doc/weft/LICENSE": {mode: 0o644, content: []byte("licence")},
	}
}

// mustArchive writes an archive of an image of two architectures.
func mustArchive(t *testing.T, created time.Time, layer files) []byte {
	t.Helper()
	o := options{version: "1.2.3", commit: "abc", name: "example.com/weft:1.2.3", created: created}
	var images []built
	for _, arch := range []string{"amd64", "arm64"} {
		b, err := assemble(&o, arch, []byte("program"), nil, layer)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, b)
	}
	path := filepath.Join(t.TempDir(), "weft.oci.tar")
	if _, err := writeArchive(path, o, images); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The same files give the same archive, byte for byte; others do not.
func TestArchiveIsReproducible(t *testing.T) {
	at := time.Unix(1_700_000_000, 0).UTC()
	first := mustArchive(t, at, someFiles())
	if !bytes.Equal(first, mustArchive(t, at, someFiles())) {
		t.Error("the same files give another archive")
	}
	if bytes.Equal(first, mustArchive(t, at.Add(time.Second), someFiles())) {
		t.Error("another moment gives the same archive")
	}
	changed := someFiles()
	changed["usr/bin/weft"] = file{mode: 0o755, content: []byte("another")}
	if bytes.Equal(first, mustArchive(t, at, changed)) {
		t.Error("another program gives the same archive")
	}
}

// A layer has its directories first, everything in order, and links that lead to
// something in it.
func TestLayer(t *testing.T) {
	content, err := someFiles().tar(time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for r := tar.NewReader(bytes.NewReader(content)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s is of user %d, group %d, %q", h.Name, h.Uid, h.Gid, h.Uname)
		}
		names = append(names, h.Name)
	}
	want := "opt/ opt/bin/ run/ usr/ usr/bin/ usr/share/ usr/share/doc/ usr/share/doc/weft/ " +
		"opt/bin/flanneld usr/bin/weft usr/share/doc/weft/LICENSE"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("the layer has\n%s\nwant\n%s", got, want)
	}
}

func TestNamesOfFlannelLeadToWeft(t *testing.T) {
	all := weftFiles([]byte("program"), []byte("licence"))
	for _, name := range []string{"opt/bin/flanneld", "opt/bin/mk-docker-opts.sh", "opt/bin/install-conf", "flannel", "usr/bin/cp"} {
		if to := target(name, all[name].link); to != "usr/bin/weft" {
			t.Errorf("%s leads to %q", name, to)
		}
	}
	for name := range all {
		if strings.HasPrefix(name, "var/lib/weft") {
			t.Errorf("%s is in the image, and would be taken for the host's", name)
		}
	}
}

// What a tool needs that no package has is an error, and so is a package without a
// licence.
func TestWhatIsMissingIsNamed(t *testing.T) {
	tool := func(p debianPackage) []debianPackage { return []debianPackage{p} }
	p := debianPackage{Name: "nftables", files: files{"usr/sbin/nft": {mode: 0o755, content: []byte("#!script")}}}
	if _, _, err := pickTools(tool(p), triplets["amd64"]); err == nil || err.Error() != "no package has usr/sbin/xtables-nft-multi" {
		t.Errorf("without iptables: %v", err)
	}
	for _, name := range tools {
		p.files[name] = file{mode: 0o755, content: []byte("#!script")}
	}
	if _, _, err := pickTools(tool(p), triplets["amd64"]); err == nil || err.Error() != "package nftables says nothing of its licence" {
		t.Errorf("without a licence: %v", err)
	}
	p.files["usr/share/doc/nftables/copyright"] = file{mode: 0o644, content: []byte("GPL-2")}
	picked, used, err := pickTools(tool(p), triplets["amd64"])
	if err != nil || len(used) != 1 || picked["usr/sbin/iptables"].link != "xtables-nft-multi" {
		t.Errorf("picked %v of %d packages, %v", slices.Sorted(maps.Keys(picked)), len(used), err)
	}
}

func TestCommandLineIsLookedAt(t *testing.T) {
	for _, args := range [][]string{{}, {"-program", "amd64=weft"}, {"-cache", "c"}, {"-cache", "c", "-program", "sparc=weft"}, {"-cache", "c", "-program", "weft"}} {
		if _, err := parse(append(args, "-out", t.TempDir())); err == nil {
			t.Errorf("%v is taken", args)
		}
	}
}
