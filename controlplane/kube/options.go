package kube

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"

	"github.com/weft-net/weft/controlplane/flannel"
)

// Options say which node this is and where its API is.
type Options struct {
	// Node is the name of this node's Node; see FindNode.
	Node string
	// Kubeconfig is the path of a kubeconfig file, APIURL the API server's URL,
	// which goes before the file's. Without either the process is in a pod,
	// whose service account serves.
	Kubeconfig, APIURL string
	// AnnotationPrefix is that of flannel's annotations; empty means flannel's
	// default.
	AnnotationPrefix string
	// Config is the network's configuration.
	Config flannel.Config
	// SetNodeNetworkUnavailable has the Node's condition NetworkUnavailable set
	// to False once the node carries traffic, which the scheduler waits for
	// where a cloud provider has set it to True.
	SetNodeNetworkUnavailable bool
	// Version is weft's own, which the API server is told.
	Version string
	// Log is required.
	Log *slog.Logger
}

// nodeName is what the API takes as a Node's name (RFC 1123).
var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

// Validate reports all faults at once.
func (o Options) Validate() error {
	var faults []error
	switch {
	case o.Node == "":
		faults = append(faults, errors.New("the node's name is missing; set NODE_NAME"))
	case !nodeName.MatchString(o.Node):
		faults = append(faults, fmt.Errorf("%.300q is no name of a Node; `kubectl get nodes` lists them", o.Node))
	}
	if o.APIURL != "" {
		if u, err := url.Parse(o.APIURL); err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			faults = append(faults, fmt.Errorf("%q is no URL of an API server; write it as https://192.0.2.1:6443", o.APIURL))
		}
	}
	if _, err := o.keys(); err != nil {
		faults = append(faults, err)
	}
	if len(o.Config.Networks()) == 0 {
		faults = append(faults, errors.New("the network's configuration has no network"))
	}
	if o.Log == nil {
		faults = append(faults, errors.New("no logger is given"))
	}
	return errors.Join(faults...)
}

// keys are the annotations' names.
func (o Options) keys() (flannel.AnnotationKeys, error) {
	prefix := o.AnnotationPrefix
	if prefix == "" {
		prefix = flannel.DefaultAnnotationPrefix
	}
	return flannel.NewAnnotationKeys(prefix)
}
