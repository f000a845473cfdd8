//go:build linux

// Command weftcluster brings up a Kubernetes cluster on this machine with weft as its
// network (test/cluster), leaves it up, and takes it away again:
//
//	weftcluster up [--nodes N] [--proxy-mode MODE] [--flannel] [--dns=false]
//	weftcluster kubectl ARGUMENTS...
//	weftcluster enter NODE [COMMAND...]
//	weftcluster down
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/weft-net/weft/test/cluster"
)

// name is the cluster's; there is one of its kind on a machine.
const name = "cluster"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "weftcluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("say what to do: up, kubectl, enter or down")
	}
	switch args[0] {
	case "up":
		return up(ctx, args[1:])
	case "down":
		c, err := cluster.Open(name)
		if err != nil {
			return err
		}
		return c.Close()
	case "kubectl":
		c, err := cluster.Open(name)
		if err != nil {
			return err
		}
		return become(c.Lab.Underlay.Enter(c.KubectlCommand(args[1:]...)...))
	case "enter":
		return enter(args[1:])
	default:
		return fmt.Errorf("no such command: %s; there are up, kubectl, enter and down", args[0])
	}
}

// up builds a cluster and says what can be done with it.
func up(ctx context.Context, args []string) error {
	o := cluster.Options{Name: name, Keep: true, Log: os.Stdout}
	flags := flag.NewFlagSet("up", flag.ContinueOnError)
	flags.IntVar(&o.Nodes, "nodes", 3, "number of nodes")
	flags.StringVar(&o.ProxyMode, "proxy-mode", "iptables", "kube-proxy's mode: iptables or nftables")
	flannel := flags.Bool("flannel", false, "begin with stock flannel as the network; weft's image is there too")
	dns := flags.Bool("dns", true, "run CoreDNS")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if o.Flannel = *flannel; o.Flannel {
		manifest, err := cluster.FlannelManifest()
		if err != nil {
			return err
		}
		o.Manifest = manifest
	}
	c, err := cluster.New(ctx, o)
	if err != nil {
		return err
	}
	if *dns {
		if err := c.StartDNS(ctx); err != nil {
			return errors.Join(err, c.Close())
		}
	}
	fmt.Print(`
The cluster is up. Try

  bin/weftcluster kubectl get nodes,pods -A -o wide
  bin/weftcluster kubectl -n kube-flannel exec ds/kube-flannel-ds -- weft status
  bin/weftcluster enter n1 ip route

and remove it by

  bin/weftcluster down
`)
	return nil
}

// enter runs a command, or a shell, among a node's programs.
func enter(args []string) error {
	if len(args) == 0 {
		return errors.New("say which node to enter: n1, n2, …")
	}
	c, err := cluster.Open(name)
	if err != nil {
		return err
	}
	command := args[1:]
	if len(command) == 0 {
		command = []string{"sh"}
	}
	for _, n := range c.Nodes {
		if n.String() == args[0] {
			words, err := n.Enter(command...)
			if err != nil {
				return err
			}
			return become(words, os.Environ())
		}
	}
	return fmt.Errorf("no node is called %s: there are n1 to n%d", args[0], len(c.Nodes))
}

// become makes another program of this one.
func become(command, environment []string) error {
	path, err := exec.LookPath(command[0])
	if err != nil {
		return err
	}
	return syscall.Exec(path, command, environment)
}
