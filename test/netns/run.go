//go:build linux

package netns

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
)

// Run executes each line as a command inside the namespace, split at blanks,
// and returns the output of the last. A failing command fails the test and
// shows what it printed.
func (ns *NS) Run(tb testing.TB, lines ...string) string {
	tb.Helper()
	var out string
	for _, line := range lines {
		var err error
		if out, err = ns.Try(line); err != nil {
			tb.Fatal(err)
		}
	}
	return out
}

// Try executes one line inside the namespace and returns what it printed.
func (ns *NS) Try(line string) (string, error) {
	args := strings.Fields(line)
	var out []byte
	err := ns.Do(func() error {
		var err error
		out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", line, err, out)
		}
		return nil
	})
	return string(out), err
}

// Connect joins two namespaces by a veth pair; both ends are up.
func Connect(tb testing.TB, a *NS, nameA string, b *NS, nameB string) {
	tb.Helper()
	a.Run(tb, fmt.Sprintf("ip link add %s type veth peer name %s netns %s", nameA, nameB, b.Path()))
	a.Run(tb, "ip link set "+nameA+" up")
	b.Run(tb, "ip link set "+nameB+" up")
}
