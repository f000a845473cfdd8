//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"
)

// joinTimeout is how long a node may take to know all peers. Over etcd flanneld
// asks for the lease of each.
const joinTimeout = 20 * time.Second

// StartFlanneld starts flanneld on a node. WaitForPeers tells when it has done its
// work.
func (n *Node) StartFlanneld() (err error) {
	if n.flanneld != nil && n.flanneld.Running() {
		return fmt.Errorf("%s: flanneld already runs as process %d", n, n.flanneld.PID())
	}
	command := append([]string{n.lab.Options.Flanneld}, n.FlannelFlags()...)
	n.flanneld, err = n.startWith(n.flannelEnvironment(), command...)
	return err
}

// StopFlanneld ends flanneld by a signal and waits until it is gone. What it has
// set up stays.
func (n *Node) StopFlanneld(sig syscall.Signal) error {
	if n.flanneld == nil {
		return fmt.Errorf("%s: no flanneld was started here by this process", n)
	}
	return n.flanneld.Stop(sig)
}

// Daemon is what was started last to run the node's overlay, the agent or flanneld
// as the node's kind says; nil if nothing was.
func (n *Node) Daemon() *Process {
	switch {
	case n.Kind == Flanneld:
		return n.flanneld
	case n.agent != nil:
		return n.agent.process
	}
	return nil
}

// FlanneldLog is what flanneld has printed since its last start.
func (n *Node) FlanneldLog() string {
	if n.flanneld == nil {
		return ""
	}
	return n.flanneld.Output()
}

// waitForAll waits until all nodes that join a store have routes to each other,
// and to the strangers.
func (l *Lab) waitForAll(ctx context.Context) error {
	for _, n := range l.Nodes {
		if n.joins() {
			if err := n.WaitForPeers(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// WaitForPeers waits until the node has routes to all others that join the store,
// and to the strangers. Flanneld that has ended is an error.
func (n *Node) WaitForPeers(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Patient(joinTimeout), errors.New("no routes to all peers"))
	defer cancel()
	for {
		missing, err := n.missingRoutes(ctx)
		if err == nil && missing == "" {
			return nil
		}
		ended := n.flanneld != nil && !n.flanneld.Running() && !n.AgentRunning()
		if ended || sleep(ctx, 50*time.Millisecond) != nil {
			return fmt.Errorf("%s: waiting for a route to %s: %w\n%s%s", n, missing, errors.Join(context.Cause(ctx), err), n.FlanneldLog(), n.AgentLog())
		}
	}
}

// missingRoutes names a prefix that the node has no route to, if any.
func (n *Node) missingRoutes(ctx context.Context) (string, error) {
	text, err := n.Output(ctx, "sh", "-c", "ip -4 route show; ip -6 route show")
	if err != nil {
		return "", err
	}
	routed := map[string]bool{}
	for line := range strings.Lines(text) {
		if prefix, _, ok := strings.Cut(line, " via "); ok {
			routed[prefix] = true
		}
	}
	for _, peer := range n.Peers() {
		if !peer.joins() {
			continue
		}
		for _, prefix := range peer.Prefixes() {
			if !routed[prefix.String()] {
				return prefix.String(), nil
			}
		}
	}
	for _, s := range n.lab.strangers() {
		if !routed[s.prefix.String()] {
			return s.prefix.String(), nil
		}
	}
	return "", nil
}
