//go:build linux

package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/weft-net/weft/test/lab"
)

// Names of the images that nodes have. There is no registry: they are imported.
const (
	PodImage  = "weft.test/pod:1"
	WeftImage = "localhost/weft:dev" // as weft.yaml has it
)

// writeImage writes an image of one layer as `docker save` does, which containerd
// imports (https://github.com/moby/docker-image-spec, "Combined Image JSON +
// Filesystem Changeset Format").
func writeImage(path, name string, entrypoint []string, layer []byte) error {
	layerSum := sum(layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": entrypoint, "Env": []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + layerSum}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]map[string]any{{
		"Config": sum(config) + ".json", "RepoTags": []string{name}, "Layers": []string{layerSum + ".tar"},
	}})
	if err != nil {
		return err
	}
	archive := newLayer()
	archive.add(sum(config)+".json", 0o644, config)
	archive.add(layerSum+".tar", 0o644, layer)
	archive.add("manifest.json", 0o644, manifest)
	content, err := archive.bytes()
	if err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o644)
}

func sum(content []byte) string {
	s := sha256.Sum256(content)
	return hex.EncodeToString(s[:])
}

// layer collects files as a tar.
type layer struct {
	buffer bytes.Buffer
	tar    *tar.Writer
	err    error // the first
}

func newLayer() *layer {
	l := &layer{}
	l.tar = tar.NewWriter(&l.buffer)
	return l
}

func (l *layer) header(h *tar.Header) {
	if l.err == nil {
		l.err = l.tar.WriteHeader(h)
	}
}

func (l *layer) add(name string, mode int64, content []byte) {
	l.header(&tar.Header{Name: name, Mode: mode, Size: int64(len(content))})
	if l.err == nil {
		_, l.err = l.tar.Write(content)
	}
}

// copy adds a file of the machine's, under the same or another name.
func (l *layer) copy(path, name string) {
	content, err := os.ReadFile(path)
	if err != nil {
		l.err = errors.Join(l.err, err)
		return
	}
	l.add(strings.TrimPrefix(name, "/"), 0o755, content)
}

func (l *layer) bytes() ([]byte, error) {
	err := errors.Join(l.err, l.tar.Close())
	return l.buffer.Bytes(), err
}

// buildPodImage builds what pods run.
func buildPodImage(dir string) (string, error) {
	program := filepath.Join(dir, "pod")
	if err := goBuild(program, "github.com/weft-net/weft/test/cluster/pod"); err != nil {
		return "", err
	}
	return programImage(dir, program, PodImage, "/pod")
}

// programImage is an image of one program that needs nothing else.
func programImage(dir, program, name, place string) (string, error) {
	l := newLayer()
	l.copy(program, place)
	return l.image(dir, name, place)
}

// buildWeftImage builds weft, and of it the image that users have.
func buildWeftImage(dir string) (string, error) {
	program := filepath.Join(dir, "weft")
	if err := goBuild(program, "github.com/weft-net/weft/cmd/weft"); err != nil {
		return "", err
	}
	return WeftImageOf(dir, program, WeftImage)
}

// WeftImageOf makes an image of a weft program, below a directory, as deploy/image
// does, and returns its path.
func WeftImageOf(dir, program, name string) (string, error) {
	root, err := lab.ModuleRoot()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, fileName(name))
	build := exec.Command("go", "run", "./deploy/image", "-name", name, "-program", runtime.GOARCH+"="+program,
		"-out", out, "-cache", filepath.Join(cache, "weft", "image"))
	build.Dir = root
	if said, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building image %s: %w\n%s", name, err, said)
	}
	return filepath.Join(out, "weft.oci.tar"), nil
}

// fileName makes an image's name one that a file can have.
func fileName(image string) string { return strings.NewReplacer("/", "-", ":", "-").Replace(image) }

// image writes an image of the layer that runs one of its programs, and returns its
// path.
func (l *layer) image(dir, name, entrypoint string) (string, error) {
	content, err := l.bytes()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, fileName(name)+".tar")
	return path, writeImage(path, name, []string{entrypoint}, content)
}

// goBuild builds a program that needs no shared library.
func goBuild(path, pkg string) error {
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", path, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return nil
}
