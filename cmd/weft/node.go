package main

import (
	"context"

	"github.com/weft-net/weft/dataplane"
	"github.com/weft-net/weft/dataplane/state"
)

// node is what the commands need of a node's kernel. Tests have their own.
type node interface {
	Open(ctx context.Context, o dataplane.Options) (datapath, error)
	Inspect(ctx context.Context, pinDir string, vni uint32) (dataplane.Report, error)
	SetAccel(pinDir string, s dataplane.Switch) error
	Remove(ctx context.Context, pinDir string, vni uint32, all bool) (dataplane.Removal, error)
}

// datapath is what the agent needs of an open dataplane.
type datapath interface {
	Sync(ctx context.Context, s state.State) error
	Changed() <-chan struct{}
	Report(ctx context.Context) (dataplane.Report, error)
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

func (linux) Inspect(ctx context.Context, pinDir string, vni uint32) (dataplane.Report, error) {
	return dataplane.Inspect(ctx, pinDir, vni)
}

func (linux) SetAccel(pinDir string, s dataplane.Switch) error {
	return dataplane.SetAccel(pinDir, s)
}

func (linux) Remove(ctx context.Context, pinDir string, vni uint32, all bool) (dataplane.Removal, error) {
	return dataplane.Remove(ctx, pinDir, vni, all)
}
