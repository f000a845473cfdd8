package flannel

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
)

// DefaultAnnotationPrefix is flannel's default of --kube-annotation-prefix.
const DefaultAnnotationPrefix = "flannel.alpha.coreos.com"

// AnnotationKeys are the names of the annotations on a Kubernetes Node.
type AnnotationKeys struct {
	// Managed is "true" on nodes that flannel serves.
	Managed                    string
	BackendType                string
	BackendData, BackendV6Data string
	PublicIP, PublicIPv6       string
	// The following are written by operators; see Overrides.
	PublicIPOverwrite, PublicIPv6Overwrite string
	NodePublicIP, NodePublicIPv6           string
}

// annotationPrefix is a domain, a slash, and what the names may begin with.
var annotationPrefix = regexp.MustCompile(`^(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?$`)

// NewAnnotationKeys makes the names that begin with prefix, as flannel treats
// --kube-annotation-prefix: a domain, after which the names follow a slash, or
// domain/word, where they follow a dash.
func NewAnnotationKeys(prefix string) (AnnotationKeys, error) {
	p := prefix
	if !strings.Contains(p, "/") {
		p += "/"
	}
	if !strings.HasSuffix(p, "/") && !strings.HasSuffix(p, "-") {
		p += "-"
	}
	if !annotationPrefix.MatchString(p) {
		return AnnotationKeys{}, fmt.Errorf("annotation prefix %s: write a domain in lower case, as in %s, or a domain and a word, as in example.com/flannel", quote(prefix), DefaultAnnotationPrefix)
	}
	return AnnotationKeys{
		Managed:             p + "kube-subnet-manager",
		BackendType:         p + "backend-type",
		BackendData:         p + "backend-data",
		BackendV6Data:       p + "backend-v6-data",
		PublicIP:            p + "public-ip",
		PublicIPv6:          p + "public-ipv6",
		PublicIPOverwrite:   p + "public-ip-overwrite",
		PublicIPv6Overwrite: p + "public-ipv6-overwrite",
		NodePublicIP:        p + "node-public-ip",
		NodePublicIPv6:      p + "node-public-ipv6",
	}, nil
}

// All lists the names.
func (k AnnotationKeys) All() []string {
	return []string{
		k.Managed, k.BackendType, k.BackendData, k.BackendV6Data, k.PublicIP, k.PublicIPv6,
		k.PublicIPOverwrite, k.PublicIPv6Overwrite, k.NodePublicIP, k.NodePublicIPv6,
	}
}

// half returns the names of a family's public IP and backend data.
func (k AnnotationKeys) half(v6 bool) (publicIP, data string) {
	if v6 {
		return k.PublicIPv6, k.BackendV6Data
	}
	return k.PublicIP, k.BackendData
}

// Marshal returns the annotations that publish l, and the names of those that
// must not be there: of a family that the node does not use. A family needs a
// public IP, a MAC and a VNI to be published.
func (k AnnotationKeys) Marshal(l Lease) (set map[string]string, remove []string) {
	set = map[string]string{k.Managed: "true", k.BackendType: BackendType}
	for _, v6 := range []bool{false, true} {
		publicIP, data := k.half(v6)
		h := l.half(v6)
		if !h.complete() {
			remove = append(remove, data, publicIP)
			continue
		}
		set[publicIP] = h.publicIP.String()
		set[data] = h.marshalVTEP()
	}
	return set, remove
}

// IsManaged tells whether the annotations are those of a node that takes part.
func (k AnnotationKeys) IsManaged(annotations map[string]string) bool {
	return annotations[k.Managed] == "true"
}

// Parse reads what a node has published in its annotations; with none at all
// that is the zero Lease. The prefixes are not among them: see ParsePodCIDRs.
// What one family has wrong does not harm the other, whose part of the lease is
// filled in beside the error.
func (k AnnotationKeys) Parse(annotations map[string]string) (Lease, error) {
	l := Lease{BackendType: annotations[k.BackendType]}
	var f faults
	for _, v6 := range []bool{false, true} {
		publicIP, data := k.half(v6)
		if err := l.parseHalf(v6, annotations[publicIP], []byte(annotations[data])); err != nil {
			f.add("annotations %s and %s: %w", publicIP, data, err)
		}
	}
	return l, f.err()
}

// Overrides are what an operator says of a node's addresses in its annotations.
// An address that is not given is zero.
type Overrides struct {
	// PublicIPOverwrite and PublicIPv6Overwrite are published in place of the
	// node's own addresses, which the node goes on using itself.
	PublicIPOverwrite, PublicIPv6Overwrite netip.Addr
	// NodePublicIP and NodePublicIPv6 go before --public-ip and --public-ipv6.
	NodePublicIP, NodePublicIPv6 netip.Addr
}

// ParseOverrides reads what an operator has annotated the own node with. What
// is wrong with one annotation does not harm the others.
func (k AnnotationKeys) ParseOverrides(annotations map[string]string) (Overrides, error) {
	var o Overrides
	var f faults
	for _, a := range []struct {
		key   string
		v6    bool
		value *netip.Addr
	}{
		{k.PublicIPOverwrite, false, &o.PublicIPOverwrite},
		{k.PublicIPv6Overwrite, true, &o.PublicIPv6Overwrite},
		{k.NodePublicIP, false, &o.NodePublicIP},
		{k.NodePublicIPv6, true, &o.NodePublicIPv6},
	} {
		text := annotations[a.key]
		if text == "" {
			continue
		}
		ip, err := parsePublicIP(text, a.v6)
		if err != nil {
			f.add("annotation %s: %w", a.key, err)
		}
		*a.value = ip
	}
	return o, f.err()
}

// errManyPodCIDRs is a Node with more prefixes than there are families.
var errManyPodCIDRs = errors.New("more than two podCIDRs; a node has one per family")

// ParsePodCIDRs reads spec.podCIDR and spec.podCIDRs of a Node: the first
// counts if there is none of the second. Prefixes are masked; that of a family
// that the node has none of is zero, and of two of one family the first counts.
// None at all is no error.
func ParsePodCIDRs(podCIDR string, podCIDRs []string) (v4, v6 netip.Prefix, err error) {
	if len(podCIDRs) == 0 && podCIDR != "" {
		podCIDRs = []string{podCIDR}
	}
	if len(podCIDRs) > 2 {
		return netip.Prefix{}, netip.Prefix{}, errManyPodCIDRs
	}
	for _, text := range podCIDRs {
		p, ok := parseNet(text)
		switch {
		case !ok || p.Addr().Is4In6():
			return netip.Prefix{}, netip.Prefix{}, fmt.Errorf("podCIDR %s is no prefix", quote(text))
		case p.Addr().Is4() && !v4.IsValid():
			v4 = p
		case p.Addr().Is6() && !v6.IsValid():
			v6 = p
		}
	}
	return v4, v6, nil
}
