package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/weft-net/weft/dataplane"
)

// runRemove is "weft remove".
func runRemove(e *env, args []string) error {
	var v view
	var all bool
	flags := newFlags(e, "remove", "[--all] [flags]", `Takes weft's programs, maps and firewall table away from this node. The kernel's overlay device stays
and carries the traffic, unless --all is given. The agent must be stopped first.`)
	v.register(flags.FlagSet)
	flags.BoolVar(&all, "all", false, "also remove the overlay device, which ends the overlay's traffic on this node")
	if _, err := parseFlags(flags, args); err != nil {
		return err
	}
	if err := v.validate("remove"); err != nil {
		return err
	}

	agent, err := viewAgent(v.RunDir)
	if err != nil {
		return err
	}
	release, err := keepAgentsOut(v.RunDir)
	if err != nil {
		return err
	}
	defer release()
	removal, err := e.node.Remove(e.ctx, v.PinDir, agent.vni(v.VNI), all, v.direct(agent))
	if err != nil {
		return fmt.Errorf("removing weft: %w", err)
	}
	if all {
		if err := os.Remove(runPath(v.RunDir)); err == nil {
			removal.Removed = append(removal.Removed, "run file "+runPath(v.RunDir))
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the run file: %w", err)
		}
	}
	return v.printRemoved(e, removal)
}

// keepAgentsOut makes sure that no agent runs, and that none starts until
// release is called: it would put back what is being removed.
func keepAgentsOut(runDir string) (release func(), err error) {
	if _, err := os.Stat(runDir); errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	held, err := takeLock(runDir)
	if errors.Is(err, errLocked) {
		return nil, fmt.Errorf("an agent runs (%w) and would put everything back; stop it first, with kill and its number or by stopping its service or DaemonSet, then remove again", err)
	}
	if err != nil {
		return nil, err
	}
	return held.Release, nil
}

// printRemoved tells what was removed, and what was not.
func (v *view) printRemoved(e *env, r dataplane.Removal) error {
	if v.json() {
		if r.Removed == nil {
			r.Removed = []string{}
		}
		return v.writeJSON(e.stdout, struct {
			schema
			dataplane.Removal
		}{schema{outputSchema}, r})
	}
	if len(r.Removed) == 0 {
		fmt.Fprintln(e.stdout, "There is nothing to remove.")
		return nil
	}
	for _, what := range r.Removed {
		fmt.Fprintf(e.stdout, "removed %s\n", printable(what))
	}
	for _, what := range r.Left {
		fmt.Fprintf(e.stdout, "left %s\n", printable(what))
	}
	return nil
}
