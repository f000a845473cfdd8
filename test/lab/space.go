//go:build linux

package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Space is a place where programs run: a node, a pod, or the underlay. A
// command is given as words; a command of a single string is split at blanks.
type Space struct {
	lab   *Lab
	name  string
	netns string
	// holder returns the process whose mounts and hostname the space has; nil
	// means the machine's.
	holder func() pid
}

// String returns the name within the lab: n1, n1/p1 or underlay.
func (s *Space) String() string { return s.name }

// Namespace returns the name of the network namespace, as for `ip -n`.
func (s *Space) Namespace() string { return s.netns }

// Run runs a command and returns an error that shows what it printed when it
// fails.
func (s *Space) Run(ctx context.Context, command ...string) error {
	_, err := s.Output(ctx, command...)
	return err
}

// Output is Run that returns what the command printed on stdout. When the
// command fails, the error also shows its stderr.
func (s *Space) Output(ctx context.Context, command ...string) (string, error) {
	return s.input(ctx, "", command...)
}

// input is Output with something to read on stdin.
func (s *Space) input(ctx context.Context, stdin string, command ...string) (string, error) {
	cmd := s.Command(ctx, command...)
	var stdout, stderr strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %s: %w\n%s%s%s", s, strings.Join(command, " "), err, stdin, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// Command prepares a command to run in the space. The lab does not know of it:
// the caller sees to its end.
func (s *Space) Command(ctx context.Context, command ...string) *exec.Cmd {
	args := s.enter(words(command))
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = s.environment()
	cmd.WaitDelay = time.Second // a child that inherited our pipes may outlive it
	return cmd
}

// Enter returns the full command and environment with which a command runs in
// the space, for those who exec it themselves.
func (s *Space) Enter(command ...string) (args, environment []string) {
	return s.enter(words(command)), s.environment()
}

// enter puts the words before a command that bring it into the space. They
// exec each other, so the process that starts is the command in the end.
// `ip netns exec` is no choice: it remounts /sys, and so hides the node's BPF
// filesystem.
func (s *Space) enter(command []string) []string {
	args := []string{"nsenter", "--net=" + filepath.Join(netnsDir, s.netns)}
	if s.holder != nil {
		proc := fmt.Sprintf("/proc/%d/ns/", s.holder().ID)
		args = append(args, "--mount="+proc+"mnt", "--uts="+proc+"uts")
	}
	args = append(args, "--")
	// A mount namespace is entered at its root: go back to where we were.
	if dir, err := os.Getwd(); err == nil && !strings.HasPrefix(dir, "/run/") {
		args = append(args, "env", "-C", dir)
	}
	return append(args, command...)
}

// environment is ours, with the lab's own programs in front of the PATH.
func (s *Space) environment() []string {
	var dirs []string
	if s.lab.Options.Binary != "" {
		dirs = append(dirs, filepath.Dir(s.lab.Options.Binary))
	}
	if s.lab.Options.LegacyTables {
		dirs = append(dirs, legacyTables)
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PATH=") })
	return append(env, "PATH="+strings.Join(append(dirs, os.Getenv("PATH")), ":"))
}

// words splits a command that was given as one string.
func words(command []string) []string {
	if len(command) == 1 {
		return strings.Fields(command[0])
	}
	return command
}

// Do runs f on a thread inside the network namespace. Sockets that f opens
// stay there; goroutines that it starts do not.
func (s *Space) Do(f func() error) error { return inNamespace(s.netns, f) }

// Sysctl sets a value of the network namespace, by its path below /proc/sys.
func (s *Space) Sysctl(path, value string) error {
	return s.Do(func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0o644); err != nil {
			return fmt.Errorf("%s: setting %s to %s: %w", s, path, value, err)
		}
		return nil
	})
}

// Dial connects from inside of the space.
func (s *Space) Dial(network, address string) (conn net.Conn, err error) {
	err = s.Do(func() error {
		conn, err = net.DialTimeout(network, address, 5*time.Second)
		return err
	})
	return conn, err
}

// HTTP returns a client that connects from inside of the space.
func (s *Space) HTTP() *http.Client {
	return &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
				return s.Dial(network, address)
			},
		},
	}
}

// ip runs iproute2 commands, one a line, in a single process.
func (s *Space) ip(ctx context.Context, lines ...string) error {
	_, err := s.input(ctx, strings.Join(lines, "\n")+"\n", "ip", "-batch", "-")
	return err
}
