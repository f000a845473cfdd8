//go:build linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// agent is how a node's weft agent was started last.
type agent struct {
	process *Process
	binary  string
	flags   []string
}

const (
	// StaticFile is where a node's static store lies, as the node sees it.
	StaticFile = "/run/weft-static.yaml"
	// MetricsURL is the agent's default address for metrics, /readyz beside it.
	MetricsURL = "http://127.0.0.1:9273"
	// readyTimeout is how long an agent may take to carry traffic.
	readyTimeout = 20 * time.Second
)

// Config writes the static store with all other nodes as peers, and returns
// its path as the node sees it.
func (n *Node) Config() (string, error) { return n.WriteConfig(n.Peers()...) }

// WriteConfig writes the static store with some peers, whole or not at all.
func (n *Node) WriteConfig(peers ...*Node) (string, error) {
	path := n.Path(StaticFile)
	if err := os.WriteFile(path+".new", []byte(n.staticStore(peers)), 0o644); err != nil {
		return "", err
	}
	return StaticFile, os.Rename(path+".new", path)
}

// staticStore is the text of the static store.
func (n *Node) staticStore(peers []*Node) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("interface: eth0")
	line("publicIP: %s", n.Addresses()[0])
	line("vni: %d", n.lab.Options.VNI)
	line("port: %d", n.lab.Options.Port)
	line("network: [%s]", choose(n.lab.Options.Families, n.lab.Network(), NetworkV6)[0])
	line("node:")
	line("  name: %s", n.name)
	line("  prefixes: [%s]", n.Prefixes()[0])
	line("  mac: %q", choose(n.lab.Options.Families, n.MAC, n.MACv6)[0])
	strangers := n.lab.strangers()
	if len(peers)+len(strangers) == 0 {
		line("peers: []")
		return b.String()
	}
	line("peers:")
	for _, p := range peers {
		line("  - name: %s", p.name)
		line("    prefixes: [%s]", p.Prefixes()[0])
		line("    publicIP: %s", p.Addresses()[0])
		line("    mac: %q", choose(n.lab.Options.Families, p.MAC, p.MACv6)[0])
	}
	for _, s := range strangers {
		line("  - name: %s", s.name)
		line("    prefixes: [%s]", s.prefix)
		line("    publicIP: %s", s.ip)
		line("    mac: %q", s.mac)
	}
	return b.String()
}

// StartAgent starts `weft agent` and waits until it is ready. It gets its peers
// from the lab's store; a file of them is written first.
func (n *Node) StartAgent(ctx context.Context, binary string, flags ...string) error {
	if err := n.LaunchAgent(binary, flags...); err != nil {
		return err
	}
	return n.WaitReady(ctx)
}

// LaunchAgent is StartAgent that does not wait.
func (n *Node) LaunchAgent(binary string, flags ...string) error {
	if n.AgentRunning() {
		return fmt.Errorf("%s: the agent already runs as process %d", n, n.agent.process.PID())
	}
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	source, err := n.agentSource()
	if err != nil {
		return err
	}
	command := slices.Concat([]string{binary, "agent"}, source, flags)
	process, err := n.startWith(n.flannelEnvironment(), command...)
	if err != nil {
		return err
	}
	n.agent = &agent{process: process, binary: binary, flags: flags}
	return nil
}

// agentSource is what tells the agent where its peers come from.
func (n *Node) agentSource() ([]string, error) {
	if n.lab.Options.Store != StoreFiles {
		return n.FlannelFlags(), nil
	}
	config, err := n.Config()
	return []string{"--config", config}, err
}

// WaitReady waits until the agent says that the node can carry traffic.
func (n *Node) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, Patient(readyTimeout), errors.New("no answer that it is ready"))
	defer cancel()
	for {
		answer, err := n.get(ctx, MetricsURL+"/readyz")
		if err == nil {
			return nil
		}
		if n.agent != nil && !n.agent.process.Running() {
			return errors.Join(fmt.Errorf("%s: the agent has ended:\n%s", n, n.AgentLog()), n.agent.process.err)
		}
		if sleep(ctx, 10*time.Millisecond) != nil {
			return fmt.Errorf("%s: waiting for the agent: %w: %w\n%s%s", n, context.Cause(ctx), err, answer, n.AgentLog())
		}
	}
}

// get fetches a page from inside of the node.
func (n *Node) get(ctx context.Context, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := n.HTTP().Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, response.Status)
	}
	return string(body), err
}

// Metrics returns the agent's metrics page.
func (n *Node) Metrics(ctx context.Context) (string, error) { return n.get(ctx, MetricsURL+"/metrics") }

// StopAgent ends the agent by a signal and waits until it is gone.
func (n *Node) StopAgent(sig syscall.Signal) error {
	if n.agent == nil {
		return fmt.Errorf("%s: no agent was started here by this process", n)
	}
	return n.agent.process.Stop(sig)
}

// RestartAgent ends the agent by a signal, starts it again as it was started
// and waits until it is ready.
func (n *Node) RestartAgent(ctx context.Context, sig syscall.Signal) error {
	if err := n.StopAgent(sig); err != nil {
		return err
	}
	return n.StartAgent(ctx, n.agent.binary, n.agent.flags...)
}

// AgentRunning reports whether the agent has not ended.
func (n *Node) AgentRunning() bool { return n.agent != nil && n.agent.process.Running() }

// AgentLog is what the agent has printed since its last start.
func (n *Node) AgentLog() string {
	if n.agent == nil {
		return ""
	}
	return n.agent.process.Output()
}
