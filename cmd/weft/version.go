package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// version and commit are set by the linker in a release; what the Go toolchain
// noted stands in for them.
var (
	version string
	commit  string
)

// build says which weft this is.
type build struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Go      string `json:"go"`
	Kernel  string `json:"kernel"`
}

// thisBuild reads what is known of this program and the kernel below it.
func thisBuild() build {
	b := build{Version: version, Commit: commit, Go: runtime.Version(), Kernel: kernelRelease()}
	info, ok := debug.ReadBuildInfo()
	if ok && b.Version == "" && info.Main.Version != "(devel)" {
		b.Version = info.Main.Version
	}
	if ok && b.Commit == "" {
		b.Commit = revision(info)
	}
	if b.Version == "" {
		b.Version = "unreleased"
	}
	if b.Commit == "" {
		b.Commit = "unknown"
	}
	return b
}

// revision is the commit the toolchain noted, and whether it was changed.
func revision(info *debug.BuildInfo) string {
	var commit, changed string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			commit = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				changed = "-changed"
			}
		}
	}
	if commit == "" {
		return ""
	}
	return commit + changed
}

// kernelRelease is what uname -r says.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// runVersion is "weft version".
func runVersion(e *env, args []string) error {
	var o output
	fs := newFlags(e, "version", "[flags]", "Shows the version of weft, of Go, and of the kernel.")
	o.register(fs.FlagSet)
	if _, err := parseFlags(fs, args); err != nil {
		return err
	}
	if err := usageFaults("version", o.faults()); err != nil {
		return err
	}
	b := thisBuild()
	if o.json() {
		return o.writeJSON(e.stdout, struct {
			schema
			build
		}{schema{outputSchema}, b})
	}
	fmt.Fprintf(e.stdout, "weft %s\ncommit %s\n%s\nkernel %s\n", b.Version, b.Commit, b.Go, b.Kernel)
	return nil
}
