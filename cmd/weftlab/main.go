//go:build linux

// Program weftlab builds clusters out of namespaces on one machine: to try weft
// in, to show it, and to measure it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/weft-net/weft/test/lab"
)

// env is everything a command knows of the world around it.
type env struct {
	ctx            context.Context
	stdout, stderr io.Writer
}

// command is a verb or noun of the command line.
type command struct {
	name string
	// about is its line in the list of commands; empty keeps it out.
	about string
	run   func(e *env, args []string) error
}

// commands lists what weftlab can do.
func commands() []command {
	return []command{
		{"up", "build a lab and leave it up", runUp},
		{"list", "show the labs that are up", runList},
		{"exec", "run a command in a node or a pod", runExec},
		{"down", "remove a lab, or what a crash has left of it", runDown},
		{"demo", "show weft at work", runDemo},
		{"bench", "measure weft against stock flanneld, the kernel and the host", runBench},
		{"load", "", runLoad}, // bench's load generator
		{"help", "show this text, or that of a command", runHelp},
	}
}

// errUsage marks a command line that cannot be understood: status 2.
var errUsage = errors.New("usage")

// usageError is a sentence about the command line.
type usageError string

func (e usageError) Error() string { return string(e) }

func (e usageError) Is(target error) bool { return target == errUsage }

// usagef makes a usageError.
func usagef(format string, args ...any) error { return usageError(fmt.Sprintf(format, args...)) }

func main() { os.Exit(weftlab(os.Args[1:])) }

// weftlab runs args in the real world and returns the exit status. A signal
// ends the context, and with it the command, which then removes what it built;
// so does a reader of our output that goes away.
func weftlab(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	return run(&env{ctx: ctx, stdout: os.Stdout, stderr: os.Stderr}, args)
}

// run runs args in e and returns the exit status, errors told on e.stderr.
func run(e *env, args []string) int {
	err := dispatch(e, args)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case e.ctx.Err() != nil:
		fmt.Fprintln(e.stderr, "weftlab: interrupted")
		return 130
	}
	fmt.Fprintf(e.stderr, "weftlab: %v\n", err)
	if errors.Is(err, errUsage) {
		return 2
	}
	return 1
}

// remove takes a lab away and tells of it only when that fails.
func (e *env) remove(l *lab.Lab) {
	if err := l.Close(); err != nil {
		fmt.Fprintf(e.stderr, "weftlab: removing lab %s: %v\n", l.Name(), err)
	}
}

// dispatch finds the command and runs it.
func dispatch(e *env, args []string) error {
	if len(args) == 0 {
		return usagef(`no command given; "weftlab help" lists them`)
	}
	name := args[0]
	if name == "-h" || name == "-help" || name == "--help" {
		name = "help"
	}
	for _, c := range commands() {
		if c.name == name {
			return c.run(e, args[1:])
		}
	}
	return usagef(`there is no command %q; "weftlab help" lists them`, name)
}

// runHelp is "weftlab help [COMMAND]".
func runHelp(e *env, args []string) error {
	if len(args) > 0 && args[0] != "help" && !strings.HasPrefix(args[0], "-") {
		return dispatch(e, []string{args[0], "-h"})
	}
	fmt.Fprint(e.stdout, "Usage: weftlab COMMAND [flags]\n\n"+
		"weftlab builds a cluster out of namespaces on this machine. It needs root, and leaves\n"+
		"nothing behind.\n\nCommands:\n")
	table := tabwriter.NewWriter(e.stdout, 0, 0, 3, ' ', 0)
	for _, c := range commands() {
		if c.about != "" {
			fmt.Fprintf(table, "  %s\t%s\n", c.name, c.about)
		}
	}
	table.Flush()
	fmt.Fprint(e.stdout, "\n\"weftlab COMMAND -h\" tells more about a command.\n")
	return nil
}
