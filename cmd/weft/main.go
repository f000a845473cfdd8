// Program weft is a VXLAN dataplane for Kubernetes and for plain hosts: its
// agent keeps a node's kernel as the peers require, its other commands show and
// change what is there.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// env is everything a command knows of the world around it.
type env struct {
	ctx            context.Context
	stdout, stderr io.Writer
	node           node
	now            func() time.Time
	getenv         func(string) string
}

// command is a verb or noun of the command line.
type command struct {
	name string
	// about is its line in the list of commands.
	about string
	run   func(e *env, args []string) error
}

// commands lists what weft can do: nouns show, verbs change.
func commands() []command {
	return []command{
		{"agent", "run the dataplane of this node", runAgent},
		{"status", "show how this node's dataplane is doing", runStatus},
		{"peers", "show the peers and their traffic", runPeers},
		{"accel", "turn acceleration on or off, for the node or for peers", runAccel},
		{"migrate", "look at a node of flannel's, before weft takes its place", runMigrate},
		{"remove", "take weft away from this node", runRemove},
		{"cni-plugin", "be the CNI plugin flannel, for a container runtime", runCNIPlugin},
		{"install", "put a file in its place, for a container that has no shell", runInstall},
		{"wait", "do nothing, for a container that has no shell", runWait},
		{"mk-docker-opts", "make options for dockerd of what the agent has written", runMkDockerOpts},
		{"version", "show the version", runVersion},
		{"help", "show this text, or that of a command", runHelp},
	}
}

// Errors that end weft with a certain exit status.
var (
	// errUsage marks a command line that cannot be understood: status 2.
	errUsage = errors.New("usage")
	// errReported marks a failure that has been told already: status 1.
	errReported = errors.New("reported")
)

// usageError is a sentence about the command line.
type usageError string

func (e usageError) Error() string { return string(e) }

func (e usageError) Is(target error) bool { return target == errUsage }

// usagef makes a usageError.
func usagef(format string, args ...any) error { return usageError(fmt.Sprintf(format, args...)) }

// otherNames are names under which weft is called in flannel's place, and the
// commands that they stand for.
var otherNames = map[string]string{
	"flanneld":          "agent",
	"flannel":           "cni-plugin",
	"mk-docker-opts.sh": "mk-docker-opts",
	// What the manifests of flannel's versions put files in place with.
	"install-conf": "install",
	"cp":           "install",
}

func main() { os.Exit(weft(os.Args)) }

// byOwnName turns a call in flannel's place into one of weft. What flannel's
// manifests keep across a restart of the container is /run/flannel: so that is
// where the agent remembers things, unless there is a place that outlives a reboot.
func byOwnName(args []string, stateDir string) []string {
	command, ok := otherNames[filepath.Base(args[0])]
	if !ok {
		return args
	}
	call := []string{"weft", command}
	if _, err := os.Stat(stateDir); command == "agent" && err != nil {
		call = append(call, "--state-dir", filepath.Join(filepath.Dir(defaultSubnetFile), "weft"))
	}
	return append(call, args[1:]...)
}

// weft runs args, the first of which is its name, in the real world and returns
// the exit status.
func weft(args []string) int {
	args = byOwnName(args, defaultStateDir)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	// The second signal ends a stop that hangs.
	context.AfterFunc(ctx, stop)
	return run(&env{ctx: ctx, stdout: os.Stdout, stderr: os.Stderr, node: linux{}, now: time.Now, getenv: os.Getenv}, args[1:])
}

// run runs args in e and returns the exit status, errors told on e.stderr.
func run(e *env, args []string) int {
	err := dispatch(e, args)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errReported):
		return 1
	}
	fmt.Fprintf(e.stderr, "weft: %v\n", err)
	if errors.Is(err, errUsage) {
		return 2
	}
	return 1
}

// dispatch finds the command and runs it.
func dispatch(e *env, args []string) error {
	if len(args) == 0 {
		return usagef("no command given; \"weft help\" lists them")
	}
	name := args[0]
	switch name {
	case "-h", "-help", "--help":
		return runHelp(e, args[1:])
	case "-version", "--version":
		return runVersion(e, args[1:])
	}
	c, ok := findCommand(name)
	if !ok && strings.HasPrefix(name, "-") {
		return usagef("flags come after a command, as in \"weft status %s\"; \"weft help\" lists the commands", name)
	}
	if !ok {
		return usagef("there is no command %q; there are %s", name, strings.Join(commandNames(), ", "))
	}
	return c.run(e, args[1:])
}

// findCommand finds a command by its name.
func findCommand(name string) (command, bool) {
	for _, c := range commands() {
		if c.name == name {
			return c, true
		}
	}
	return command{}, false
}

// commandNames lists the commands.
func commandNames() []string {
	var names []string
	for _, c := range commands() {
		names = append(names, c.name)
	}
	return names
}

// runHelp is "weft help [COMMAND]".
func runHelp(e *env, args []string) error {
	if len(args) > 0 && args[0] != "help" && !strings.HasPrefix(args[0], "-") {
		return dispatch(e, []string{args[0], "-h"})
	}
	fmt.Fprint(e.stdout, "Usage: weft COMMAND [flags]\n\nweft is a VXLAN dataplane that speaks flannel's formats.\n\nCommands:\n")
	table := tabwriter.NewWriter(e.stdout, 0, 0, 3, ' ', 0)
	for _, c := range commands() {
		fmt.Fprintf(table, "  %s\t%s\n", c.name, c.about)
	}
	table.Flush()
	fmt.Fprint(e.stdout, "\n\"weft COMMAND -h\" tells more about a command.\n")
	return nil
}
