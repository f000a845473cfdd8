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
//
// Lines of ip that follow each other are given to one ip -batch, whose output is
// that of all: there are dozens before every test, and starting a program is what
// takes long.
func (ns *NS) Run(tb testing.TB, lines ...string) string {
	tb.Helper()
	var out string
	for len(lines) > 0 {
		together := max(1, inBatch(lines))
		var err error
		if together > 1 {
			out, err = ns.batch(lines[:together])
		} else {
			out, err = ns.Try(lines[0])
		}
		if err != nil {
			tb.Fatal(err)
		}
		lines = lines[together:]
	}
	return out
}

// inBatch is how many of the first lines can be given to one ip: those without
// options before the object.
func inBatch(lines []string) int {
	for i, line := range lines {
		if !strings.HasPrefix(line, "ip ") || strings.HasPrefix(line, "ip -") {
			return i
		}
	}
	return len(lines)
}

// batch executes lines of ip by one.
func (ns *NS) batch(lines []string) (out string, err error) {
	var batch strings.Builder
	for _, line := range lines {
		batch.WriteString(strings.TrimPrefix(line, "ip ") + "\n")
	}
	ip := exec.Command("ip", "-batch", "-")
	ip.Stdin = strings.NewReader(batch.String())
	return ns.output(ip, batch.String())
}

// Try executes one line inside the namespace and returns what it printed.
func (ns *NS) Try(line string) (string, error) {
	args := strings.Fields(line)
	return ns.output(exec.Command(args[0], args[1:]...), line)
}

// output runs a command inside the namespace, which an error says by name.
func (ns *NS) output(command *exec.Cmd, name string) (string, error) {
	var out []byte
	err := ns.Do(func() error {
		var err error
		if out, err = command.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", name, err, out)
		}
		return nil
	})
	return string(out), err
}

// Connect joins two namespaces by a veth pair; both ends are up.
func Connect(tb testing.TB, a *NS, nameA string, b *NS, nameB string) {
	tb.Helper()
	a.Run(
		tb,
		fmt.Sprintf("ip link add %s type veth peer name %s netns %s", nameA, nameB, b.Path()),
		"ip link set "+nameA+" up",
	)
	b.Run(tb, "ip link set "+nameB+" up")
}
