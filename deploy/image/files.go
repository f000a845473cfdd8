//go:build linux

package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
)

// file is a file, or a symbolic link or an empty directory.
type file struct {
	mode    int64
	link    string
	dir     bool
	content []byte
}

// files are files by their path, without a slash before it.
type files map[string]file

// triplets are Debian's names of the architectures, in the paths of libraries.
var triplets = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// architectures lists those that there are programs for, in order.
func architectures(programs map[string]string) []string { return slices.Sorted(maps.Keys(programs)) }

// weftFiles is weft, and the names that flannel's manifests call. There must be no
// /var/lib/weft: that it is there tells weft that it outlives a reboot.
func weftFiles(weft, licence []byte) files {
	const program = "/usr/bin/weft"
	return files{
		"usr/bin/weft":               {mode: 0o755, content: weft},
		"opt/bin/flanneld":           {link: program},
		"opt/bin/mk-docker-opts.sh":  {link: program},
		"opt/bin/install-conf":       {link: program},
		"usr/bin/cp":                 {link: program},
		"flannel":                    {link: program},
		"run":                        {dir: true}, // xtables.lock
		"usr/share/doc/weft/LICENSE": {mode: 0o644, content: licence},
	}
}

// tools are what weft calls.
var tools = []string{"usr/sbin/nft", "usr/sbin/xtables-nft-multi", "usr/sbin/xtables-legacy-multi"}

// pickTools picks from packages the tools, all extensions of iptables, the libraries
// that these load, and of each package that gave something its licence and its name
// and version, where scanners look for them. It returns the packages too.
func pickTools(packages []debianPackage, triplet string) (files, []debianPackage, error) {
	all, owner := files{}, map[string]int{}
	for i, p := range packages {
		for name, f := range p.files {
			all[name], owner[name] = f, i
		}
	}
	p := picker{all: all, picked: files{}, directories: []string{"lib/" + triplet, "usr/lib/" + triplet}}
	for _, name := range tools {
		p.pick(name)
	}
	for name, f := range all {
		base := path.Base(name)
		isTable := strings.HasPrefix(base, "iptables") || strings.HasPrefix(base, "ip6tables")
		if path.Dir(name) == "usr/lib/"+triplet+"/xtables" || path.Dir(name) == "usr/sbin" && isTable && f.link != "" {
			p.pick(name)
		}
	}
	if p.err != nil {
		return nil, nil, p.err
	}
	// Debian's alternatives, which a script of the package would make. weft looks
	// for the other flavour by its own name.
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, program := range []string{family, family + "-save", family + "-restore"} {
			p.picked["usr/sbin/"+program] = file{link: "xtables-nft-multi"}
		}
	}
	var used []debianPackage
	for i, pkg := range packages {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(p.picked)), func(name string) bool { o, ok := owner[name]; return ok && o == i }) {
			continue
		}
		used = append(used, pkg)
		p.picked["var/lib/dpkg/status.d/"+pkg.Name] = file{mode: 0o644, content: pkg.control}
		licence, err := p.licence(pkg.Name)
		if err != nil {
			return nil, nil, err
		}
		p.picked["usr/share/doc/"+pkg.Name+"/copyright"] = licence
	}
	return p.picked, used, nil
}

// picker picks files, and what they need.
type picker struct {
	all, picked files
	directories []string // of libraries
	err         error    // the first
}

// pick picks a file, what it links to, and the libraries that it loads.
func (p *picker) pick(name string) {
	if _, done := p.picked[name]; done || p.err != nil {
		return
	}
	f, ok := p.all[name]
	if !ok {
		p.err = fmt.Errorf("no package has %s", name)
		return
	}
	p.picked[name] = f
	if f.link != "" {
		p.pick(target(name, f.link))
		return
	}
	program, err := elf.NewFile(bytes.NewReader(f.content))
	if err != nil {
		return // no program
	}
	libraries, err := program.ImportedLibraries()
	if err != nil {
		p.err = fmt.Errorf("what %s loads: %w", name, err)
		return
	}
	for _, library := range libraries {
		p.pick(p.find(library))
	}
	for _, segment := range program.Progs {
		if segment.Type == elf.PT_INTERP {
			loader := make([]byte, segment.Filesz)
			if _, err := segment.ReadAt(loader, 0); err != nil {
				p.err = fmt.Errorf("the loader of %s: %w", name, err)
				return
			}
			p.pick(strings.Trim(string(loader), "/\x00"))
		}
	}
}

// find is the path of a library.
func (p *picker) find(library string) string {
	for _, dir := range p.directories {
		if _, ok := p.all[path.Join(dir, library)]; ok {
			return path.Join(dir, library)
		}
	}
	return library // of which pick says that it is not there
}

// licence is a package's, which may be kept with another package.
func (p *picker) licence(name string) (file, error) {
	dir := path.Join("usr/share/doc", name)
	if link := p.all[dir].link; link != "" {
		dir = target(dir, link)
	}
	f, ok := p.all[path.Join(dir, "copyright")]
	if !ok || f.link != "" {
		return f, fmt.Errorf("package %s says nothing of its licence", name)
	}
	return f, nil
}

// target is what a link leads to.
func target(name, link string) string {
	if !path.IsAbs(link) {
		link = path.Join("/", path.Dir(name), link)
	}
	return strings.TrimPrefix(path.Clean(link), "/")
}

// tar packs files, in order, as root's and from one moment. Directories come before
// what is in them.
func (f files) tar(at time.Time) ([]byte, error) {
	directories := map[string]bool{}
	for name, one := range f {
		if !one.dir {
			name = path.Dir(name)
		}
		for dir := name; dir != "."; dir = path.Dir(dir) {
			directories[dir] = true
		}
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range slices.Sorted(maps.Keys(directories)) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: at, Format: tar.FormatPAX}); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(f)) {
		if f[name].dir {
			continue
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: f[name].mode, Size: int64(len(f[name].content)), ModTime: at, Format: tar.FormatPAX}
		if f[name].link != "" {
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f[name].link, 0o777
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f[name].content); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}
