//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/renameio/v2"
)

// built is the image of one architecture.
type built struct {
	arch     string
	weft     []byte
	packages []debianPackage
	image    v1.Image
	digest   v1.Hash
	size     int64 // of its layers, compressed
}

// assemble makes an image of layers, one for each set of files: what changes seldom
// comes first.
func assemble(o *options, arch string, weft []byte, packages []debianPackage, layers ...files) (built, error) {
	b := built{arch: arch, weft: weft, packages: packages}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, f := range layers {
		content, err := f.tar(o.created)
		if err != nil {
			return b, err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
			tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestCompression), tarball.WithCompressedCaching)
		if err != nil {
			return b, err
		}
		size, err := layer.Size()
		if err != nil {
			return b, err
		}
		b.size += size
		if image, err = mutate.Append(image, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: o.created}, CreatedBy: "deploy/image"}}); err != nil {
			return b, err
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		return b, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", arch, v1.Time{Time: o.created}
	config.Config = v1.Config{
		Entrypoint: []string{"/usr/bin/weft"},
		Env:        []string{"PATH=/usr/sbin:/usr/bin:/opt/bin"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    "weft",
			"org.opencontainers.image.version":  o.version,
			"org.opencontainers.image.revision": o.commit,
			"org.opencontainers.image.licenses": "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)",
		},
	}
	if b.image, err = mutate.ConfigFile(image, config); err != nil {
		return b, err
	}
	b.digest, err = b.image.Digest()
	return b, err
}

// writeArchive writes one index of all images as an OCI archive, and returns its
// digest.
func writeArchive(path string, o options, images []built) (v1.Hash, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, b := range images {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: b.image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: b.arch}},
		})
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), "layout-")
	if err != nil {
		return v1.Hash{}, err
	}
	defer os.RemoveAll(dir)
	in, err := layout.Write(dir, empty.Index)
	if err != nil {
		return v1.Hash{}, err
	}
	// The first is the specification's name of an image, the second containerd's.
	names := map[string]string{"org.opencontainers.image.ref.name": tag(o.name), "io.containerd.image.name": o.name}
	if err := in.AppendIndex(index, layout.WithAnnotations(names)); err != nil {
		return v1.Hash{}, err
	}
	if err := pack(path, dir, o); err != nil {
		return v1.Hash{}, err
	}
	return index.Digest()
}

// pack makes a tar of a directory, in order and from one moment.
func pack(path, dir string, o options) error {
	out, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o644))
	if err != nil {
		return err
	}
	defer func() { _ = out.Cleanup() }() // nothing to do once it is in place
	w := tar.NewWriter(out)
	err = fs.WalkDir(os.DirFS(dir), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: o.created, Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return out.CloseAtomicallyReplace()
}

// tag is an image's tag.
func tag(name string) string {
	for i := len(name) - 1; i >= 0 && name[i] != '/'; i-- {
		if name[i] == ':' {
			return name[i+1:]
		}
	}
	return "latest"
}
