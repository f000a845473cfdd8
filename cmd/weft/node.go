package main

import (
	"context"
	"log/slog"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/uplink"
)

// node is what the commands need of a node's kernel. Tests have their own.
type node interface {
	Open(ctx context.Context, o dataplane.Options) (datapath, error)
	OpenUplink(log *slog.Logger) (uplinkFinder, error)
	Inspect(ctx context.Context, pinDir string, vni uint32, told []state.Peer) (dataplane.Report, error)
	Survey(s state.State) (dataplane.Survey, error)
	SetAccel(pinDir string, s dataplane.Switch) error
	Remove(ctx context.Context, pinDir string, vni uint32, all bool, told []state.Peer) (dataplane.Removal, error)
}

// datapath is what the agent needs of an open dataplane.
type datapath interface {
	Sync(ctx context.Context, s state.State) error
	Changed() <-chan struct{}
	Report(ctx context.Context) (dataplane.Report, error)
	Brief(ctx context.Context) (dataplane.Report, error)
	PeerCounters(ctx context.Context) (dataplane.Report, error)
	MACs(vni uint32) (v4, v6 state.MAC, err error)
	MTU() int
	BridgeFault(s state.State) error
	Close() error
}

// uplinkFinder is what the agent needs to know its uplink.
type uplinkFinder interface {
	Find(o uplink.Options) (uplink.Uplink, error)
	Watch(ctx context.Context) (<-chan struct{}, error)
	Close() error
}

// linux is the node that weft runs on.
type linux struct{}

func (linux) Open(ctx context.Context, o dataplane.Options) (datapath, error) {
	d, err := dataplane.Open(ctx, o)
	if err != nil {
		return nil, err // not a datapath that holds a nil pointer
	}
	return d, nil
}

func (linux) OpenUplink(log *slog.Logger) (uplinkFinder, error) {
	f, err := uplink.Open(log)
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (linux) Inspect(ctx context.Context, pinDir string, vni uint32, told []state.Peer) (dataplane.Report, error) {
	return dataplane.Inspect(ctx, pinDir, vni, told)
}

func (linux) Survey(s state.State) (dataplane.Survey, error) { return dataplane.Look(s) }

func (linux) SetAccel(pinDir string, s dataplane.Switch) error {
	return dataplane.SetAccel(pinDir, s)
}

func (linux) Remove(ctx context.Context, pinDir string, vni uint32, all bool, told []state.Peer) (dataplane.Removal, error) {
	return dataplane.Remove(ctx, pinDir, vni, all, told)
}
