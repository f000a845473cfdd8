//go:build linux

package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// peerPrograms are the real ones that weft is compared with, by name.
type peerPrograms map[string]string

// names of the programs.
const (
	flanneldName  = "flanneld"
	etcdName      = "etcd"
	apiServerName = "kube-apiserver"
	proxyName     = "kube-proxy"
)

// findPrograms finds those that are needed: among the paths of a list, else in
// PATH.
func findPrograms(list string, needed []string) (peerPrograms, error) {
	given := map[string]string{}
	for _, path := range strings.Fields(strings.ReplaceAll(list, ",", " ")) {
		given[filepath.Base(path)] = path
	}
	found := peerPrograms{}
	for _, name := range needed {
		path := given[name]
		if path == "" {
			path = name
		}
		var err error
		if found[name], err = lookPath(path); err != nil {
			return nil, fmt.Errorf("%s is missing (%w); `test/peers %s` builds what is measured, and --programs says where it is",
				name, err, strings.Join(needed, " "))
		}
	}
	return found, nil
}

// version asks a program for its version.
func (p peerPrograms) version(ctx context.Context, name string) (string, error) {
	text, err := exec.CommandContext(ctx, p[name], "--version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("asking %s for its version: %w\n%s", p[name], err, text)
	}
	words := strings.Fields(string(text))
	if len(words) == 0 {
		return "", fmt.Errorf("%s --version says nothing", p[name])
	}
	return words[len(words)-1], nil
}
