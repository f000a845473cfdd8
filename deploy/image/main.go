//go:build linux

// Program image makes weft's container image, for each architecture, without a
// daemon and without a registry: an OCI archive, and an SPDX document per
// architecture of what is in it. `make image` calls it.
//
// In the image are weft, under all the names that flannel's manifests call, and of
// Debian's packages iptables and nftables the programs and the libraries that these
// load. There is no shell, and no package manager. What comes out depends on the
// programs and on the versions of Debian's packages, and on nothing else.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// options are what the image is made of.
type options struct {
	version, commit string
	name            string // of the image, with its tag
	created         time.Time
	programs        map[string]string // path of weft, by architecture
	out             string            // directory to write to
	cache           string            // directory for apt's package lists
}

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "image: %v\n", err)
		os.Exit(1)
	}
}

// run is the program.
func run(ctx context.Context, args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	var images []built
	for _, arch := range architectures(o.programs) {
		b, err := o.build(ctx, arch)
		if err != nil {
			return fmt.Errorf("the image for %s: %w", arch, err)
		}
		images = append(images, b)
	}
	archive := filepath.Join(o.out, "weft.oci.tar")
	digest, err := writeArchive(archive, o, images)
	if err != nil {
		return fmt.Errorf("writing %s: %w", archive, err)
	}
	fmt.Printf("%s is %s\n  %s\n", archive, o.name, digest)
	for _, b := range images {
		path := filepath.Join(o.out, "weft-"+b.arch+".spdx.json")
		if err := writeSBOM(path, o, b); err != nil {
			return fmt.Errorf("writing %s: %w", path, err)
		}
		fmt.Printf("%s: %.1f MB compressed, %d Debian packages; %s says what is in it\n", b.arch, float64(b.size)/1e6, len(b.packages), path)
	}
	return nil
}

// parse reads the command line.
func parse(args []string) (options, error) {
	o := options{programs: map[string]string{}}
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.StringVar(&o.version, "version", "unreleased", "version of weft")
	flags.StringVar(&o.commit, "commit", "unknown", "commit that weft is built of")
	flags.StringVar(&o.name, "name", "localhost/weft:dev", "name of the image, with its tag")
	flags.StringVar(&o.out, "out", "bin/image", "directory to write to")
	flags.StringVar(&o.cache, "cache", "", "directory to keep apt's package lists in")
	created := flags.Int64("created", 0, "seconds since 1970 that the image and its files say they are from")
	flags.Func("program", "ARCH=FILE, weft for an architecture of Go; may be given again", func(text string) error {
		arch, path, ok := strings.Cut(text, "=")
		if _, known := triplets[arch]; !ok || !known {
			return errors.New("give ARCH=FILE, with amd64 or arm64 as ARCH")
		}
		o.programs[arch] = path
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if len(o.programs) == 0 || o.cache == "" || flags.NArg() > 0 {
		return o, errors.New("-program and -cache have to be given, and nothing but flags")
	}
	o.created = time.Unix(*created, 0).UTC()
	return o, os.MkdirAll(o.out, 0o755)
}

// build makes the image of one architecture.
func (o *options) build(ctx context.Context, arch string) (built, error) {
	packages, err := fetchPackages(ctx, filepath.Join(o.cache, arch), arch, "iptables", "nftables")
	if err != nil {
		return built{}, err
	}
	tools, used, err := pickTools(packages, triplets[arch])
	if err != nil {
		return built{}, err
	}
	weft, err := os.ReadFile(o.programs[arch])
	if err != nil {
		return built{}, err
	}
	licence, err := os.ReadFile("LICENSE")
	if err != nil {
		return built{}, err
	}
	return assemble(o, arch, weft, used, tools, weftFiles(weft, licence))
}
