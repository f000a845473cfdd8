package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/weft-net/weft/controlplane/flannel"
)

// cniPlugin is flannel's CNI plugin: it makes the configuration of another plugin
// (bridge, if nothing else is said) of its own and of subnet.env, and has that one
// do the work.
type cniPlugin struct {
	ctx context.Context
	// version is what the call's configuration speaks.
	version string
}

// runCNIPlugin is "weft cni-plugin", and weft called as "flannel". What is wanted
// is in the environment.
func runCNIPlugin(e *env, args []string) error {
	flags := newFlags(e, "cni-plugin", "", `Is flannel's CNI plugin, for container runtimes. They call it as "flannel", with CNI_COMMAND and
more in the environment and the network's configuration on standard input. It reads subnet.env
and has another plugin do the work: bridge, if the configuration says nothing else.`)
	if _, err := parseFlags(flags, args); err != nil {
		return err
	}
	p := cniPlugin{ctx: e.ctx, version: cniversion.Current()}
	err := skel.PluginMainFuncsWithError(
		skel.CNIFuncs{Add: p.add, Del: p.del, Check: p.check, GC: p.gc, Status: p.status},
		cniversion.All, "CNI plugin flannel, of weft "+thisBuild().Version)
	if err == nil {
		return nil
	}
	// The library's error lacks the version, which the specification wants.
	failure := struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{p.version, err}
	text, _ := json.MarshalIndent(failure, "", "    ")
	fmt.Fprintf(e.stdout, "%s\n", text)
	return errReported
}

// call is what a call is about.
type call struct {
	conf       flannel.CNIConf
	kept       delegates
	attachment flannel.Attachment
}

// read reads a call's configuration.
func (p *cniPlugin) read(args *skel.CmdArgs) (call, error) {
	conf, err := flannel.ParseCNIConf(args.StdinData)
	if err != nil {
		return call{}, types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	if conf.CNIVersion != "" {
		p.version = conf.CNIVersion
	}
	return call{conf, delegates(conf.DataDir), flannel.Attachment{ContainerID: args.ContainerID, IfName: args.IfName}}, nil
}

// delegate makes the other plugin's configuration.
func (c call) delegate() (flannel.DelegateConf, error) {
	if err := c.conf.CheckDelegate(); err != nil {
		return flannel.DelegateConf{}, types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	data, err := os.ReadFile(c.conf.SubnetFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && len(data) == 0:
		return flannel.DelegateConf{}, types.NewError(types.ErrTryAgainLater,
			c.conf.SubnetFile+" is not there yet; the network's agent writes it when this node can carry traffic",
			"If it does not come: see the log of weft or flannel on this node, and \"subnetFile\" in the network's configuration.")
	case err != nil:
		return flannel.DelegateConf{}, types.NewError(types.ErrIOFailure, err.Error(), "")
	}
	subnet, err := flannel.ParsePluginEnv(data)
	if err != nil {
		return flannel.DelegateConf{}, types.NewError(types.ErrInvalidNetworkConfig, c.conf.SubnetFile+": "+err.Error(),
			"The network's agent writes this file anew when it starts.")
	}
	d, err := c.conf.Delegate(subnet)
	if err != nil {
		return d, types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	return d, nil
}

// add attaches a container.
func (p *cniPlugin) add(args *skel.CmdArgs) error {
	c, err := p.read(args)
	if err != nil {
		return err
	}
	d, err := c.delegate()
	if err != nil {
		return err
	}
	if _, err := invoke.FindInPath(d.Type(), filepath.SplitList(args.Path)); err != nil {
		return explain(err, d) // nothing is done, and there will be nothing to undo
	}
	if err := c.kept.save(c.attachment, d.Marshal()); err != nil {
		return types.NewError(types.ErrIOFailure, "keeping what is delegated: "+err.Error(), "")
	}
	result, err := invoke.DelegateAdd(p.ctx, d.Type(), d.Marshal(), nil)
	if err != nil {
		p.undo(c, d)
		return explain(err, d)
	}
	spoken, err := (&cniversion.ConfigDecoder{}).Decode(args.StdinData)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	return types.PrintResult(result, spoken)
}

// undo takes back what a failed attachment may have left. What can't be taken back
// now is left to the runtime's DEL.
func (p *cniPlugin) undo(c call, d flannel.DelegateConf) {
	err := invoke.DelegateDel(context.WithoutCancel(p.ctx), d.Type(), d.Marshal(), nil)
	if err == nil {
		err = c.kept.forget(c.attachment)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "taking back a failed ADD: %v\n", err)
	}
}

// del detaches a container. One that is not known is detached.
func (p *cniPlugin) del(args *skel.CmdArgs) error {
	c, err := p.read(args)
	if err != nil {
		return err
	}
	d, err := c.previous()
	switch codeOf(err) {
	case types.ErrUnknownContainer:
		return nil
	case types.ErrDecodingFailure:
		// It will not become better, and must not keep the pod from going.
		fmt.Fprintf(os.Stderr, "nothing is delegated: %v\n", err)
		return c.forget()
	}
	if err != nil {
		return err
	}
	if err := invoke.DelegateDel(p.ctx, d.Type(), d.Marshal(), nil); err != nil {
		return explain(err, d)
	}
	return c.forget()
}

// detach detaches a container whose network namespace is not known any more.
func (p *cniPlugin) detach(c call, path string) error {
	d, err := c.previous()
	if err != nil {
		return err
	}
	plugin, err := invoke.FindInPath(d.Type(), filepath.SplitList(path))
	if err != nil {
		return err
	}
	err = invoke.ExecPluginWithoutResult(p.ctx, plugin, d.Marshal(), &invoke.Args{
		Command: "DEL", ContainerID: c.attachment.ContainerID, IfName: c.attachment.IfName, Path: path,
	}, nil)
	if err != nil {
		return err
	}
	return c.forget()
}

// check has the other plugin look whether an attachment is still in order.
func (p *cniPlugin) check(args *skel.CmdArgs) error {
	c, err := p.read(args)
	if err != nil {
		return err
	}
	d, err := c.previous()
	if err != nil {
		return err
	}
	return explain(invoke.DelegateCheck(p.ctx, d.Type(), d.Marshal(), nil), d)
}

// previous is what was delegated when the container was attached, made fit for this
// call.
func (c call) previous() (flannel.DelegateConf, error) {
	var d flannel.DelegateConf
	data, err := c.kept.load(c.attachment)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return d, types.NewError(types.ErrUnknownContainer, fmt.Sprintf("container %s has no interface %s in network %s",
			c.attachment.ContainerID, c.attachment.IfName, c.conf.Name), "")
	case err != nil:
		return d, types.NewError(types.ErrIOFailure, err.Error(), "")
	}
	if d, err = flannel.ParseDelegateConf(data); err != nil {
		return d, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("%s: %v", c.kept.path(c.attachment), err), "")
	}
	return d.Continued(c.conf), nil
}

// forget removes what was kept.
func (c call) forget() error {
	if err := c.kept.forget(c.attachment); err != nil {
		return types.NewError(types.ErrIOFailure, err.Error(), "")
	}
	return nil
}

// codeOf is the specification's number of an error, 0 of none.
func codeOf(err error) uint {
	if failure := (*types.Error)(nil); errors.As(err, &failure) {
		return failure.Code
	}
	return 0
}

// gc collects what belongs to attachments that are gone: it detaches those that it
// knows of, and has the other plugin look for more.
func (p *cniPlugin) gc(args *skel.CmdArgs) error {
	c, err := p.read(args)
	if err != nil {
		return err
	}
	valid, err := c.conf.Valid()
	if err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	d, err := c.delegate()
	if err != nil {
		return err
	}
	stale, err := c.kept.stale(c.conf.Name, valid)
	errs := []error{err}
	for _, c.attachment = range stale {
		if err := p.detach(c, args.Path); err != nil {
			errs = append(errs, fmt.Errorf("container %s, interface %s: %w", c.attachment.ContainerID, c.attachment.IfName, err))
		}
	}
	d = d.Collecting(c.conf)
	errs = append(errs, explain(invoke.DelegateGC(p.ctx, d.Type(), d.Marshal(), nil), d))
	if err := errors.Join(errs...); err != nil {
		return types.NewError(types.ErrInternal, "collecting what is unused: "+oneLine(err), "")
	}
	return nil
}

// status tells whether containers can be attached.
func (p *cniPlugin) status(args *skel.CmdArgs) error {
	c, err := p.read(args)
	if err != nil {
		return err
	}
	d, err := c.delegate()
	if codeOf(err) == types.ErrTryAgainLater {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	if err != nil {
		return err
	}
	return explain(invoke.DelegateStatus(p.ctx, d.Type(), d.Marshal(), nil), d)
}

// explain adds to an error that is not the other plugin's own that it could not be
// called.
func explain(err error, d flannel.DelegateConf) error {
	if err == nil || errors.As(err, new(*types.Error)) {
		return err
	}
	return types.NewError(types.ErrInternal, fmt.Sprintf("calling the plugin %s, to which flannel delegates: %v", d.Type(), err), "")
}
