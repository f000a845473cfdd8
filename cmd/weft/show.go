package main

import (
	"flag"
	"fmt"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
)

// view is what the show commands look at: a node, its agent, and where.
type view struct {
	places
	output
	VNI uint
}

// register adds the flags of a show command.
func (v *view) register(fs *flag.FlagSet) {
	v.places.register(fs)
	v.output.register(fs)
	fs.UintVar(&v.VNI, "vni", 0, "`number` of the overlay (default: the agent's, else 1)")
}

// validate reports every fault at once.
func (v *view) validate(command string) error {
	faults := append(v.places.faults(), v.output.faults()...)
	return usageFaults(command, append(faults, vniFault(v.VNI)))
}

// vniFault completes the sentence about --vni; 0 stands for the agent's.
func vniFault(vni uint) string {
	if vni < 1<<24 {
		return ""
	}
	return fmt.Sprintf("--vni is %d; give a number from 1 to %d", vni, 1<<24-1)
}

// look reads the agent's run file and the node's kernel.
func (v *view) look(e *env) (agentView, dataplane.Report, error) {
	agent, err := viewAgent(v.RunDir)
	if err != nil {
		return agentView{}, dataplane.Report{}, err
	}
	report, err := e.node.Inspect(e.ctx, v.PinDir, agent.vni(v.VNI), v.direct(agent))
	if err != nil {
		return agentView{}, dataplane.Report{}, fmt.Errorf("reading the dataplane: %w", err)
	}
	// Why there are no programs only the agent knows, which tried.
	if report.Mode == dataplane.ModeKernel && agent.Info.Mode == report.Mode && agent.Info.Reason != "" {
		report.Reason = agent.Info.Reason
	}
	agent.complete(&report.Express)
	if agent.Life == running && !report.XDP.Attached {
		report.XDP.Reason = agent.Info.NoXDP
	}
	return agent, report, nil
}

// direct are the peers that DirectRouting may serve, as the agent remembers them.
func (v *view) direct(agent agentView) []state.Peer {
	last, _, err := newMemory(v.StateDir, agent.Info.Store.Kind, nil, nil).Recall()
	if err != nil || !last.DirectRouting {
		return nil // or none that we know: a file of peers has no such setting
	}
	return last.Peers
}

// complete adds what only a living agent knows of the express path. Whether it
// is on the pins say, and better: what the agent wrote may be some seconds old.
func (v agentView) complete(x *dataplane.Express) {
	if v.Life != running {
		return
	}
	x.LeftAlone = v.Info.Express.LeftAlone
	if len(x.Reasons) > 0 && len(v.Info.Express.Reasons) > 0 {
		x.Reasons = v.Info.Express.Reasons
	}
}

// warning is what a person should know about the agent before believing the
// rest; nothing while it runs.
func (v agentView) warning(e *env) string {
	switch v.Life {
	case never:
		return "No agent has run here; this is what the kernel holds."
	case stopped:
		return fmt.Sprintf("The agent was stopped %s ago; traffic flows, but nothing follows changes of peers.", age(e.now(), v.Info.StoppedAt))
	case dead:
		return fmt.Sprintf("The agent is dead (it was process %d); traffic flows, but nothing follows changes of peers.", v.Info.PID)
	}
	return ""
}
