//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/weft-net/weft/test/lab"
)

// lookPath finds a program and makes its path absolute.
func lookPath(path string) (string, error) {
	found, err := exec.LookPath(path)
	if err != nil {
		return "", err
	}
	return filepath.Abs(found)
}

// runUp is "weftlab up".
func runUp(e *env, args []string) error {
	fs := newFlags(e, "up", "[flags]", "Builds a lab and leaves it up: nodes and pods in namespaces, weft on each node.")
	name := fs.String("name", defaultName, "`name` of the lab, part of the namespaces' names")
	nodes := fs.Int("nodes", 3, "`number` of nodes")
	pods := fs.Int("pods", 2, "`number` of pods on each")
	mtu := fs.Int("mtu", 1500, "MTU of the underlay in `bytes`")
	underlay := fs.String("underlay", string(lab.Virtual), "`kind` of underlay: virtual carries aggregates whole, wire cuts them as a network card does, summed also computes their checksums")
	kinds := fs.String("kinds", string(lab.Weft), "`list` of kinds of nodes, the last of which is that of all that follow: weft, kernel (flannel's state by ip commands), bare")
	netfilter := fs.Bool("netfilter", true, "load the rules that kube-proxy leaves on a node")
	agentFlags := fs.String("agent-flags", "", "`flags` for weft agent, split at blanks")
	weft := weftFlag(fs)
	if _, err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	opts := lab.Options{
		Name: *name, Nodes: *nodes, Pods: *pods, MTU: *mtu, Underlay: lab.Underlay(*underlay), Netfilter: *netfilter,
		AgentFlags: strings.Fields(*agentFlags), Keep: true, Log: e.stdout,
	}
	if *pods == 0 {
		opts.Pods = lab.NoPods
	}
	for _, k := range strings.Split(*kinds, ",") {
		opts.Kinds = append(opts.Kinds, lab.Kind(k))
	}
	var err error
	if strings.Contains(*kinds, string(lab.Weft)) {
		if opts.Binary, err = findWeft(*weft); err != nil {
			return err
		}
	}
	l, err := lab.New(e.ctx, opts)
	if err != nil {
		return err
	}
	fmt.Fprintf(e.stdout, "\nLab %s is up.\n\n", l.Name())
	printPlay(e, l)
	return nil
}

// printPlay tells what one can do with a lab that is up.
func printPlay(e *env, l *lab.Lab) {
	flag := ""
	if l.Name() != defaultName {
		flag = "--name " + l.Name() + " "
	}
	table := tabwriter.NewWriter(e.stdout, 0, 0, 3, ' ', 0)
	tip := func(what, format string, args ...any) {
		fmt.Fprintf(table, "  %s\t%s\n", fmt.Sprintf(format, args...), what)
	}
	self := os.Args[0]
	if len(l.Nodes) > 1 && len(l.Node(1).Pods) > 0 {
		tip("from pod to pod", "%s exec %sn1/p1 -- ping -c 3 %s", self, flag, l.Pod(2, 1).IP)
	}
	tip("what a node's dataplane does", "%s exec %sn1 -- weft status", self, flag)
	tip("a shell on a node", "%s exec %sn1", self, flag)
	tip("a node's network, without entering", "ip -n %s address", l.Node(1).Namespace())
	tip("what its agent says", "cat %s/n1-weft-*.log", l.Directory())
	tip("remove it all", "%s down %s", self, flag)
	table.Flush()
}

// runList is "weftlab list".
func runList(e *env, args []string) error {
	fs := newFlags(e, "list", "", "Shows the labs that are up on this machine.")
	if _, err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	names, err := lab.Names()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		fmt.Fprintln(e.stdout, "No lab is up.")
		return nil
	}
	table := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NAME\tNODES\tPODS\tUNDERLAY\tNAMESPACES")
	for _, name := range names {
		l, err := lab.Open(name)
		if err != nil {
			fmt.Fprintf(table, "%s\t-\t-\t-\t%v\n", name, err)
			continue
		}
		o := l.Options
		fmt.Fprintf(table, "%s\t%d\t%d\t%s, MTU %d\t%s-*\n", name, o.Nodes, o.Nodes*o.Pods, o.Underlay, o.MTU, name)
	}
	return table.Flush()
}

// runExec is "weftlab exec". It becomes the command.
func runExec(e *env, args []string) error {
	fs := newFlags(e, "exec", "[flags] NODE[/POD] [-- COMMAND...]",
		"Runs a command (a shell if there is none) in a node such as n1, in a pod such as n1/p1, or\nin the underlay.")
	name := fs.String("name", defaultName, "`name` of the lab")
	rest, err := parseFlags(fs, args, -1)
	if err != nil {
		return err
	}
	if len(rest) == 0 {
		return usagef("exec: say where, as in \"weftlab exec n1/p1 -- ip address\"")
	}
	l, err := lab.Open(*name)
	if err != nil {
		return err
	}
	space, err := l.Space(rest[0])
	if err != nil {
		return err
	}
	command := rest[1:]
	if len(command) > 0 && command[0] == "--" {
		command = command[1:]
	}
	if len(command) == 0 {
		command = []string{"bash", "--norc"}
	}
	full, environment := space.Enter(command...)
	program, err := exec.LookPath(full[0])
	if err != nil {
		return err
	}
	environment = append(environment, fmt.Sprintf("PS1=%s:%s # ", l.Name(), space))
	return syscall.Exec(program, full, environment)
}

// runDown is "weftlab down".
func runDown(e *env, args []string) error {
	fs := newFlags(e, "down", "[flags]", "Removes a lab: its processes, namespaces and mounts.")
	name := fs.String("name", defaultName, "`name` of the lab")
	all := fs.Bool("all", false, "remove all labs of this machine")
	if _, err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	names := []string{*name}
	if *all {
		var err error
		if names, err = lab.Names(); err != nil {
			return err
		}
		if len(names) == 0 {
			fmt.Fprintln(e.stdout, "No lab is up.")
		}
	}
	var errs []error
	for _, n := range names {
		switch err := lab.Remove(n); {
		case errors.Is(err, lab.ErrNotUp):
			fmt.Fprintf(e.stdout, "Lab %s is not up.\n", n)
		case err != nil:
			errs = append(errs, err)
		default:
			fmt.Fprintf(e.stdout, "Lab %s is removed.\n", n)
		}
	}
	return errors.Join(errs...)
}
