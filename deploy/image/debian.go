//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// debianPackage is one of Debian's packages, in memory.
type debianPackage struct {
	Name, Version, Arch, Source string
	SHA256                      string
	control                     []byte
	files                       files
}

// fetchPackages has apt download packages of an architecture, and all that they
// depend on. apt checks where they come from. It works in a directory of its own,
// and neither changes nor asks what is installed here.
func fetchPackages(ctx context.Context, dir, arch string, names ...string) ([]debianPackage, error) {
	if err := os.MkdirAll(filepath.Join(dir, "lists", "partial"), 0o755); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(dir, "work-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	if err := errors.Join(os.MkdirAll(filepath.Join(work, "archives", "partial"), 0o755), os.WriteFile(filepath.Join(work, "status"), nil, 0o644)); err != nil {
		return nil, err
	}
	settings := []string{
		"-q", "-y", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none", "-o", "Debug::NoLocking=1",
		"-o", "APT::Architecture=" + arch, "-o", "APT::Architectures::=" + arch,
		"-o", "Dir::State=" + dir, "-o", "Dir::State::Status=" + filepath.Join(work, "status"),
		"-o", "Dir::Cache=" + work, "-o", "Dir::Cache::Archives=" + filepath.Join(work, "archives"),
	}
	if _, err := output(ctx, "apt-get", append(settings, "update")...); err != nil {
		return nil, err
	}
	install := append(settings, "--no-install-recommends", "--download-only", "install")
	if _, err := output(ctx, "apt-get", append(install, names...)...); err != nil {
		return nil, err
	}
	paths, err := filepath.Glob(filepath.Join(work, "archives", "*.deb"))
	if err != nil || len(paths) == 0 {
		return nil, fmt.Errorf("apt-get has downloaded no packages: %w", err)
	}
	var packages []debianPackage
	for _, path := range paths {
		p, err := readPackage(ctx, path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
		}
		packages = append(packages, p)
	}
	return packages, nil
}

// readPackage reads a package's file.
func readPackage(ctx context.Context, path string) (debianPackage, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return debianPackage{}, err
	}
	sum := sha256.Sum256(content)
	p := debianPackage{SHA256: hex.EncodeToString(sum[:])}
	if p.control, err = output(ctx, "dpkg-deb", "-f", path); err != nil {
		return p, err
	}
	for line := range strings.Lines(string(p.control)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch key {
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Architecture":
			p.Arch = value
		case "Source":
			p.Source = value
		}
	}
	data, err := output(ctx, "dpkg-deb", "--fsys-tarfile", path)
	if err != nil {
		return p, err
	}
	p.files, err = readFiles(bytes.NewReader(data))
	return p, err
}

// readFiles reads a tar.
func readFiles(from io.Reader) (files, error) {
	found := files{}
	for r := tar.NewReader(from); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found, nil
		}
		if err != nil {
			return nil, err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		switch h.Typeflag {
		case tar.TypeReg:
			content, err := io.ReadAll(r)
			if err != nil {
				return nil, err
			}
			found[name] = file{mode: h.Mode & 0o777, content: content}
		case tar.TypeSymlink:
			found[name] = file{link: h.Linkname}
		}
	}
}

// output runs a program and returns what it prints; what it complains of becomes
// part of the error.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "LC_") }), "LC_ALL=C")
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, args[len(args)-1], err, errs.String())
	}
	return out.Bytes(), nil
}
