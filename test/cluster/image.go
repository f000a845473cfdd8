//go:build linux

package cluster

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/weft-net/weft/test/lab"
)

// Names of the images that nodes have. There is no registry: they are imported.
const (
	PodImage  = "weft.test/pod:1"
	WeftImage = "localhost/weft:dev" // as weft.yaml has it
	DNSImage  = "weft.test/coredns:1"
)

// podPlace is where the program of PodImage is.
const podPlace = "/pod"

// files are programs of the machine's, by the place that they get in an image.
type files map[string]string

// layer is the files as a layer.
func (f files) layer() (v1.Layer, error) {
	var buffer bytes.Buffer
	w := tar.NewWriter(&buffer)
	for place, path := range f {
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(place, "/"), Mode: 0o755, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buffer.Bytes())), nil })
}

// buildPodImage builds what pods run.
func buildPodImage(dir string) (string, error) {
	program := filepath.Join(dir, "pod")
	if err := goBuild(program, "github.com/weft-net/weft/test/cluster/pod"); err != nil {
		return "", err
	}
	return programImage(dir, program, PodImage, podPlace)
}

// programImage writes an image of one program that needs nothing else, and returns its
// path.
func programImage(dir, program, image, place string) (string, error) {
	layer, err := files{place: program}.layer()
	if err != nil {
		return "", err
	}
	layers, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return "", err
	}
	config, err := layers.ConfigFile()
	if err != nil {
		return "", err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Config.Entrypoint = "linux", runtime.GOARCH, []string{place}
	made, err := mutate.ConfigFile(layers, config)
	if err != nil {
		return "", err
	}
	return writeImage(dir, made, image)
}

// writeImage writes an image as `docker save` does, which containerd imports, and
// returns its path.
func writeImage(dir string, made v1.Image, image string) (string, error) {
	tag, err := name.NewTag(image)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, fileName(image)+".tar")
	return path, tarball.WriteToFile(path, tag, made)
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
func WeftImageOf(dir, program, image string) (string, error) {
	root, err := lab.ModuleRoot()
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	out := filepath.Join(dir, fileName(image))
	build := exec.Command("go", "run", "./deploy/image", "-name", image, "-program", runtime.GOARCH+"="+program,
		"-out", out, "-cache", filepath.Join(cache, "weft", "image"))
	build.Dir = root
	if said, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building image %s: %w\n%s", image, err, said)
	}
	return filepath.Join(out, "weft.oci.tar"), nil
}

// FlannelManifest is stock flannel's own.
func FlannelManifest() (string, error) {
	found, err := lab.Programs("kube-flannel.yml")
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(found["kube-flannel.yml"])
	return string(text), err
}

// buildFlannelImages makes the images that FlannelManifest names, and returns their
// paths: stock flanneld and its install-conf in place of weft's, on top of the tools
// in weft's image. Flannel's CNI plugin can't be had as a Go module: as /flannel there
// is weft's.
func buildFlannelImages(dir, weft, flanneld, installConf string) ([]string, error) {
	manifest, err := FlannelManifest()
	if err != nil {
		return nil, err
	}
	tools, err := readImage(weft)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", weft, err)
	}
	layer, err := files{"/opt/bin/flanneld": flanneld, "/opt/bin/install-conf": installConf}.layer()
	if err != nil {
		return nil, err
	}
	flannel, err := mutate.AppendLayers(tools, layer)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, image := range Images(manifest) {
		path, err := writeImage(dir, flannel, image)
		if err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// Images are those that a manifest names, each once.
func Images(manifest string) []string {
	var images []string
	for line := range strings.Lines(manifest) {
		image, found := strings.CutPrefix(strings.TrimSpace(line), "image: ")
		if found && !slices.Contains(images, image) {
			images = append(images, image)
		}
	}
	return images
}

// readImage reads the image of the only architecture in an OCI archive.
func readImage(archive string) (v1.Image, error) {
	dir := strings.TrimSuffix(archive, ".tar")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.Command("tar", "-xf", archive, "-C", dir).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	index, err := layout.ImageIndexFromPath(dir)
	for err == nil {
		var manifest *v1.IndexManifest
		if manifest, err = index.IndexManifest(); err != nil {
			break
		}
		if len(manifest.Manifests) != 1 {
			return nil, errors.New("want one architecture")
		}
		found := manifest.Manifests[0]
		if found.MediaType.IsImage() {
			return index.Image(found.Digest)
		}
		index, err = index.ImageIndex(found.Digest)
	}
	return nil, err
}

// fileName makes an image's name one that a file can have.
func fileName(image string) string { return strings.NewReplacer("/", "-", ":", "-").Replace(image) }

// goBuild builds a program that needs no shared library.
func goBuild(path, pkg string) error {
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", path, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
	}
	return nil
}
