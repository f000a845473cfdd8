package main

import (
	"flag"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
)

// agentOptions are what can be chosen for an agent.
type agentOptions struct {
	places
	flannelOptions
	Config          string
	Accel           string
	Express         string
	XDP             string
	SourceCheck     string
	MaxPeers        int
	MetricsAddr     string
	MetricsMaxPeers int
	LogLevel        string
	LogFormat       string
}

// register adds the agent's flags, whose defaults are its defaults.
func (o *agentOptions) register(fs *flag.FlagSet) {
	o.places.register(fs)
	o.flannelOptions.register(fs)
	fs.StringVar(&o.Config, "config", "", "YAML `file` that says what this node is and which peers it has; read again when it changes")
	fs.StringVar(&o.Accel, "accel", "auto", "`mode` of acceleration: auto, or off for the kernel path alone")
	fs.StringVar(&o.Express, "express", "auto", "`mode` of the express path, from pod to pod past the host's stack: auto, off, or on to have syncs fail while something is in its way")
	fs.StringVar(&o.XDP, "xdp", "off", "`mode` of stripping packets in the uplink's driver, before GRO: off, auto, or on to have syncs fail while something is in its way")
	fs.StringVar(&o.SourceCheck, "source-check", "observe", "what to do with packets whose source does not fit their sender: `mode` off, observe or enforce")
	fs.IntVar(&o.MaxPeers, "max-peers", 5120, "`number` of peer nodes that acceleration has room for; more ride the kernel path")
	fs.StringVar(&o.MetricsAddr, "metrics-addr", ":9273", "`address` for /metrics, /healthz and /readyz; \"\" for none")
	fs.IntVar(&o.MetricsMaxPeers, "metrics-max-peers", 500, "`number` of peers up to which each has metrics of its own; above it only totals have")
	fs.StringVar(&o.LogLevel, "log-level", "info", "`level` from which on to log: debug, info, warn or error")
	fs.StringVar(&o.LogFormat, "log-format", "text", "`format` of log lines: text or json")
}

// Bounds of the options.
const (
	mostPeers        = 100_000
	mostMetricsPeers = 100_000
)

// Validate reports every fault at once.
func (o *agentOptions) Validate() error {
	faults := append(o.places.faults(), o.flannelOptions.faults()...)
	if o.Config != "" && o.KubeSubnetMgr {
		faults = append(faults, "--config and --kube-subnet-mgr both say where the peers come from; give one of them")
	}
	if err := o.uplink(true, true).Validate(); err != nil {
		faults = append(faults, strings.Split(err.Error(), "\n")...)
	}
	if !o.KubeSubnetMgr && o.Config == "" {
		store := o.etcd(nil)
		store.RenewMargin = 0 // looked at beside the other flags
		if err := store.Validate(); err != nil {
			faults = append(faults, strings.Split(err.Error(), "\n")...)
		}
	}
	faults = append(faults,
		oneOf("--accel", o.Accel, "auto", "off"),
		oneOf("--express", o.Express, "auto", "on", "off"),
		withoutAccel("--express", o.Express, o.Accel),
		oneOf("--xdp", o.XDP, "off", "auto", "on"),
		withoutAccel("--xdp", o.XDP, o.Accel),
		oneOf("--source-check", o.SourceCheck, "off", "observe", "enforce"),
		between("--max-peers", o.MaxPeers, 1, mostPeers),
		addressFault("--metrics-addr", o.MetricsAddr),
		between("--metrics-max-peers", o.MetricsMaxPeers, 0, mostMetricsPeers),
		oneOf("--log-level", o.LogLevel, "debug", "info", "warn", "error"),
		oneOf("--log-format", o.LogFormat, "text", "json"),
	)
	return usageFaults("agent", faults)
}

// withoutAccel completes the sentence about a flag that can't come true.
func withoutAccel(name, value, accel string) string {
	if value == "on" && accel == "off" {
		return name + ` is "on", but --accel=off leaves nothing but the kernel path; give auto or off`
	}
	return ""
}

// between completes the sentence about a flag that takes a number.
func between(name string, value, least, most int) string {
	if value >= least && value <= most {
		return ""
	}
	return fmt.Sprintf("%s is %d; give a number from %d to %d", name, value, least, most)
}

// addressFault completes the sentence about a flag that takes host:port.
func addressFault(name, value string) string {
	if value == "" {
		return ""
	}
	_, port, err := net.SplitHostPort(value)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Sprintf("%s is %q; give host:port or :port, as in :9273", name, value)
	}
	return ""
}

// logger makes the agent's logger.
func (o *agentOptions) logger(e *env) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(o.LogLevel)) // Validate has seen it
	if o.Verbosity > 0 {
		level = min(level, slog.LevelDebug)
	}
	options := &slog.HandlerOptions{Level: level}
	if o.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(e.stderr, options))
	}
	return slog.New(slog.NewTextHandler(e.stderr, options))
}
