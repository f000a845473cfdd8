package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// runInstall is "weft install", and weft called as flannel's install-conf or as cp:
// init containers put the CNI plugin and its configuration in place with it.
func runInstall(e *env, args []string) error {
	flags := newFlags(e, "install", "SOURCE TARGET", `Puts a copy of a file in its place, or in a directory under its own name, with the same mode. Who
opens the place meanwhile finds the old file or the new one, never a part; a program that runs
from it goes on.`)
	flags.Bool("f", false, "has no effect: what is there is always replaced")
	rest, err := parseFlags(flags, args, "SOURCE", "TARGET")
	if err != nil {
		return err
	}
	if len(rest) != 2 {
		return usagef(`install: say what to put where, as in "weft install /etc/kube-flannel/cni-conf.json /etc/cni/net.d/10-flannel.conflist"`)
	}
	return install(rest[0], rest[1])
}

// install puts a copy of source at target at once.
func install(source, target string) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file; give one", source)
	}
	if there, err := os.Stat(target); err == nil && there.IsDir() {
		target = filepath.Join(target, filepath.Base(source))
	}
	to, err := renameio.NewPendingFile(target, renameio.WithPermissions(info.Mode().Perm()), renameio.IgnoreUmask())
	if err != nil {
		return fmt.Errorf("installing %s: %w", target, err)
	}
	defer func() { _ = to.Cleanup() }() // nothing to do once it is in place
	if _, err := to.ReadFrom(from); err != nil {
		return fmt.Errorf("installing %s: %w", target, err)
	}
	if err := to.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("installing %s: %w", target, err)
	}
	return nil
}
