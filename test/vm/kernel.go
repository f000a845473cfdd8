//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// kernel is a Debian cloud kernel, unpacked and never installed.
type kernel struct {
	release string // as uname -r prints it
	dir     string // holds vmlinux and lib/modules/<release>
}

const (
	packagePrefix = "linux-image-"
	packageSuffix = "-cloud-amd64"
)

// findKernel returns the newest kernel of a series that apt knows, from the
// cache or downloaded into it. Where apt knows none (no package lists, no
// Debian), the newest cached one will do.
func findKernel(ctx context.Context, series string) (*kernel, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	cache := filepath.Join(base, "weft", "kernels")
	names, err := exec.CommandContext(ctx, "apt-cache", "pkgnames", packagePrefix+series+".").Output()
	if err != nil && !errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("asking apt for kernels: %w", err)
	}
	var known []string
	for _, name := range strings.Fields(string(names)) {
		if strings.HasSuffix(name, packageSuffix) {
			known = append(known, strings.TrimPrefix(name, packagePrefix))
		}
	}
	if len(known) == 0 {
		cached, _ := filepath.Glob(filepath.Join(cache, series+".*"+packageSuffix))
		for _, dir := range cached {
			known = append(known, filepath.Base(dir))
		}
	}
	if len(known) == 0 {
		return nil, fmt.Errorf("apt knows no package %s%s.*%s (has apt-get update been run? is this Debian 12?)",
			packagePrefix, series, packageSuffix)
	}
	k := &kernel{release: slices.MaxFunc(known, compareVersions)}
	k.dir = filepath.Join(cache, k.release)
	if _, err := os.Stat(k.dir); err == nil {
		return k, nil
	}
	if err := k.fetch(ctx); err != nil {
		return nil, fmt.Errorf("fetching kernel %s: %w", k.release, err)
	}
	return k, nil
}

// compareVersions orders releases as Debian orders versions.
func compareVersions(a, b string) int {
	if a == b {
		return 0
	}
	if exec.Command("dpkg", "--compare-versions", a, "lt", b).Run() == nil {
		return -1
	}
	return 1
}

// fetch puts the kernel into the cache: all of it, or nothing.
func (k *kernel) fetch(ctx context.Context) error {
	pkg := packagePrefix + k.release
	fmt.Fprintf(os.Stderr, "vm: downloading %s into %s\n", pkg, filepath.Dir(k.dir))
	if err := os.MkdirAll(filepath.Dir(k.dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(k.dir), ".fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)

	if err := command(ctx, tmp, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d packages, want 1", len(debs))
	}
	unpacked := filepath.Join(tmp, "unpacked")
	if err := command(ctx, tmp, "dpkg-deb", "-x", debs[0], unpacked); err != nil {
		return err
	}
	// Debian runs depmod when a kernel is installed; this one never is.
	if err := command(ctx, tmp, "depmod", "-b", unpacked, k.release); err != nil {
		return err
	}
	// An uncompressed kernel saves the emulated machine the seconds that it
	// would take to unpack itself.
	image := filepath.Join(unpacked, "boot", "vmlinuz-"+k.release)
	if err := decompress(ctx, image, filepath.Join(unpacked, "vmlinux")); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(unpacked, "boot")); err != nil {
		return err
	}
	err = os.Rename(unpacked, k.dir)
	if errors.Is(err, os.ErrExist) {
		return nil // another run was faster
	}
	return err
}

// decompress writes the ELF image inside a bzImage. Where the payload begins
// is not worth parsing for: it is where decompression yields an ELF file.
func decompress(ctx context.Context, from, to string) error {
	image, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	for _, format := range []struct{ magic, tool string }{
		{"\x28\xb5\x2f\xfd", "zstd"},
		{"\x02\x21\x4c\x18", "lz4"},
		{"\xfd7zXZ\x00", "xz"},
		{"\x1f\x8b\x08", "gzip"},
	} {
		for rest := image; ; {
			at := bytes.Index(rest, []byte(format.magic))
			if at < 0 {
				break
			}
			cmd := exec.CommandContext(ctx, format.tool, "-dc")
			cmd.Stdin = bytes.NewReader(rest[at:])
			// The status says nothing: bytes follow the payload.
			out, err := cmd.Output()
			if errors.Is(err, exec.ErrNotFound) {
				return err
			}
			if bytes.HasPrefix(out, []byte("\x7fELF")) {
				return os.WriteFile(to, out, 0o644)
			}
			rest = rest[at+1:]
		}
	}
	return fmt.Errorf("%s holds no ELF image in a known compression", from)
}

// moduleFiles lists what has to be loaded for the named modules, in order.
// Modules built into the kernel need nothing.
func (k *kernel) moduleFiles(ctx context.Context, names ...string) ([]string, error) {
	var files []string
	for _, name := range names {
		out, err := exec.CommandContext(ctx, "modprobe", "-d", k.dir, "-S", k.release, "--show-depends", name).Output()
		if err != nil {
			return nil, fmt.Errorf("what module %s needs on %s: %w", name, k.release, err)
		}
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if len(f) >= 2 && f[0] == "insmod" && !slices.Contains(files, f[1]) {
				files = append(files, f[1])
			}
		}
	}
	return files, nil
}

// command runs a program quietly; what it printed becomes part of the error.
func command(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return nil
}
