package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/renameio/v2"

	"github.com/weft-net/weft/controlplane/flannel"
)

// delegates is the directory where the CNI plugin keeps what it has delegated, so
// that a later call about an attachment is delegated in the same way.
//
// A file is named after its container, as flannel's plugin has it: so one plugin
// takes over from the other. Flannel's plugin knows one interface per container,
// and Kubernetes has one, eth0. Here another interface has a file of its own, whose
// name goes on with a colon, which no container's ID has, and the interface's.
type delegates string

// commonIfName is the interface whose file is named after the container alone.
const commonIfName = "eth0"

// path is where an attachment's file is.
func (d delegates) path(a flannel.Attachment) string {
	name := a.ContainerID
	if a.IfName != commonIfName {
		name += ":" + a.IfName
	}
	return filepath.Join(string(d), name)
}

// save keeps what is delegated for an attachment.
func (d delegates) save(a flannel.Attachment, conf []byte) error {
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(d.path(a), conf, 0o600)
}

// load returns what was delegated for an attachment. What is not known is
// fs.ErrNotExist. Flannel's plugin may have kept another interface under the
// container's name.
func (d delegates) load(a flannel.Attachment) ([]byte, error) {
	data, err := os.ReadFile(d.path(a))
	if errors.Is(err, fs.ErrNotExist) {
		a.IfName = commonIfName
		return os.ReadFile(d.path(a))
	}
	return data, err
}

// forget removes an attachment's file, if there is one.
func (d delegates) forget(a flannel.Attachment) error {
	if err := os.Remove(d.path(a)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// stale lists the attachments to a network that are not valid any more. A file
// named after a container may be any interface's, so it is stale with the last of
// them.
func (d delegates) stale(network string, valid []flannel.Attachment) ([]flannel.Attachment, error) {
	entries, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var stale []flannel.Attachment
	for _, e := range entries {
		id, ifName, named := strings.Cut(e.Name(), ":")
		if !named {
			ifName = commonIfName
		}
		a := flannel.Attachment{ContainerID: id, IfName: ifName}
		isValid := func(v flannel.Attachment) bool { return v == a || !named && v.ContainerID == id }
		if e.Type().IsRegular() && !slices.ContainsFunc(valid, isValid) && d.isOf(network, a) {
			stale = append(stale, a)
		}
	}
	return stale, err
}

// isOf tells whether an attachment is one to a network. What can't be read may be
// somebody else's.
func (d delegates) isOf(network string, a flannel.Attachment) bool {
	data, err := os.ReadFile(d.path(a))
	if err != nil {
		return false
	}
	conf, err := flannel.ParseDelegateConf(data)
	return err == nil && conf.Network() == network
}
