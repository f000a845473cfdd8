package etcd

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

// Options say where etcd is, and what this node has there. In faults they are
// called by the flags that set them.
type Options struct {
	// Endpoints are etcd's members: http://host:port, https://host:port,
	// host:port (TLS if certificates are given), unix://path or unixs://path.
	Endpoints []string
	// Prefix is what all keys begin with; flannel's default is
	// /coreos.com/network.
	Prefix string
	// CAFile holds the certificates that etcd's are signed by; without it the
	// system's count. CertFile and KeyFile hold our own, if etcd asks for one:
	// both or none. They are read again for every connection.
	CAFile, CertFile, KeyFile string
	// Username and Password are for etcd's own authentication: both or none.
	Username, Password string
	// RenewMargin is how long before it expires a lease is renewed, from a
	// minute to a minute less than 24 hours; 0 means an hour.
	RenewMargin time.Duration
	// Previous are the prefixes that the node had when it ran last, as its
	// subnet.env says, one per family.
	Previous []netip.Prefix
	// Node is the node's own name. The default is its public IP, which is the
	// name that its peers give it.
	Node string
	Log  *slog.Logger
}

const (
	// leaseTTL is for how long a lease is held without being renewed.
	leaseTTL = 24 * time.Hour
	// defaultRenewMargin is flannel's default of --subnet-lease-renew-margin.
	defaultRenewMargin = time.Hour
)

// Validate reports every fault at once. It looks at no file.
func (o Options) Validate() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if len(o.Endpoints) == 0 {
		fault("--etcd-endpoints is empty; give the URL of at least one member, as in http://127.0.0.1:2379")
	}
	for _, endpoint := range o.Endpoints {
		if what := endpointFault(endpoint); what != "" {
			fault("--etcd-endpoints has %q, %s; give URLs as in http://127.0.0.1:2379", endpoint, what)
		}
	}
	if (o.CertFile == "") != (o.KeyFile == "") {
		fault("--etcd-certfile is %q and --etcd-keyfile %q; give both, or none if etcd asks for no certificate", o.CertFile, o.KeyFile)
	}
	if (o.Username == "") != (o.Password == "") {
		fault("only one of --etcd-username and --etcd-password is given; give both, or none if etcd asks for none")
	}
	if o.RenewMargin != 0 && (o.RenewMargin < time.Minute || o.RenewMargin > leaseTTL-time.Minute) {
		fault("--subnet-lease-renew-margin is %s; give from 1 to 1439 minutes", o.RenewMargin)
	}
	return errors.Join(faults...)
}

// endpointFault says what is wrong with an endpoint, if anything is.
func endpointFault(endpoint string) string {
	if secure, ok := strings.CutPrefix(endpoint, "unix"); ok && strings.Contains(secure, ":") {
		return ""
	}
	host := endpoint
	if strings.Contains(endpoint, "://") {
		u, err := url.Parse(endpoint)
		if err != nil {
			return "which is no URL"
		}
		if u.Scheme != "http" && u.Scheme != "https" {
			return "which is neither http nor https"
		}
		host = u.Host
	}
	name, port, err := net.SplitHostPort(host)
	if err != nil || name == "" || port == "" {
		return "which names no host and port"
	}
	return ""
}

// secure tells whether connections are encrypted. As in flanneld, the first
// endpoint decides for all.
func (o Options) secure() bool {
	first := o.Endpoints[0]
	switch {
	case strings.HasPrefix(first, "https:"), strings.HasPrefix(first, "unixs:"):
		return true
	case strings.HasPrefix(first, "http:"), strings.HasPrefix(first, "unix:"):
		return false
	}
	return o.CAFile != "" || o.CertFile != ""
}

// warnings name what is allowed and most likely not meant.
func (o Options) warnings() []string {
	var list []string
	secure := o.secure()
	if !secure && (o.CAFile != "" || o.CertFile != "") {
		list = append(list, "the certificates for etcd are not used: its first endpoint is http; give https endpoints")
	}
	if !secure && o.Password != "" {
		list = append(list, "the password for etcd crosses the network in the clear; give https endpoints")
	}
	for _, endpoint := range o.Endpoints {
		if strings.HasPrefix(endpoint, "http:") && secure || strings.HasPrefix(endpoint, "https:") && !secure {
			list = append(list, fmt.Sprintf("endpoint %s is spoken to like the first, %s; give only http or only https endpoints", endpoint, o.Endpoints[0]))
		}
	}
	return list
}
