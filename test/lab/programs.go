//go:build linux

package lab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// Programs finds the real programs that labs are tried with, by name: where the
// environment's WEFT_PEERS says, else where test/peers has built them, once.
func Programs(names ...string) (map[string]string, error) {
	paths := os.Getenv("WEFT_PEERS")
	if paths == "" {
		root, err := ModuleRoot()
		if err != nil {
			return nil, err
		}
		cmd := exec.Command(filepath.Join(root, "test/peers"), names...)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("test/peers: %w", err)
		}
		paths = string(out)
	}
	found := map[string]string{}
	for _, path := range strings.Fields(paths) {
		found[filepath.Base(path)] = path
	}
	for _, name := range names {
		if found[name] == "" {
			return nil, fmt.Errorf("WEFT_PEERS has no %s: give it what `test/peers %s` prints", name, strings.Join(names, " "))
		}
	}
	return found, nil
}

// WithWeft builds the program under test, tells its path, runs tests and takes it
// away again: for TestMain. It returns the tests' exit status, 1 if there is no program.
// WEFT_PROGRAM in the environment is one that is built already: in an emulated machine
// that would take for ever.
func WithWeft(m interface{ Run() int }, tell func(weft string)) (status int) {
	if built := os.Getenv("WEFT_PROGRAM"); built != "" {
		tell(built)
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "weft-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	weft, err := buildWeft(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	tell(weft)
	return m.Run()
}

// buildWeft builds the program under test in a directory, and returns its path.
func buildWeft(dir string) (string, error) {
	path := filepath.Join(dir, "weft")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", path, "github.com/weft-net/weft/cmd/weft")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building weft: %w\n%s", err, out)
	}
	return path, nil
}

// BuildOtherWeft builds a weft in a directory whose programs differ in constants from
// those of the sources, and returns its path: what an upgrade leads to.
func BuildOtherWeft(dir string) (string, error) {
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	source := filepath.Join(dir, "other")
	for _, part := range []string{"bpf", "headers", "cmd", "controlplane", "dataplane"} {
		if err := os.CopyFS(filepath.Join(source, part), os.DirFS(filepath.Join(root, part))); err != nil {
			return "", err
		}
	}
	for _, file := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(source, file), text, 0o644); err != nil {
			return "", err
		}
	}
	constants := filepath.Join(source, "bpf/constants.h")
	text, err := os.ReadFile(constants)
	if err != nil {
		return "", err
	}
	changed := string(text)
	for _, c := range []string{"AGGREGATE_LIFE", "PROOF_LIFE"} {
		changed = regexp.MustCompile(`(#define `+c+` \d+)1?0LL`).ReplaceAllString(changed, "${1}1LL")
	}
	if err := os.WriteFile(constants, []byte(changed), 0o644); err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "weft-other")
	for _, command := range [][]string{
		{"go", "generate", "./dataplane/ebpf"},
		{"go", "build", "-buildvcs=false", "-o", binary, "./cmd/weft"},
	} {
		build := exec.Command(command[0], command[1:]...)
		build.Dir, build.Env = source, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%v: %w\n%s", command, err, out)
		}
	}
	return binary, nil
}

// ModuleRoot is the directory of go.mod.
func ModuleRoot() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("finding the module's directory: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
