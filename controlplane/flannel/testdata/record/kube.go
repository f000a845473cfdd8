package kube

import (
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/flannel-io/flannel/pkg/lease"
)

func AnnotationNames(prefix string) ([]string, error) {
	a, err := newAnnotations(prefix)
	return []string{a.SubnetKubeManaged, a.BackendType, a.BackendData, a.BackendV6Data, a.BackendPublicIP, a.BackendPublicIPv6,
		a.BackendPublicIPOverwrite, a.BackendPublicIPv6Overwrite, a.BackendNodePublicIP, a.BackendNodePublicIPv6}, err
}

func NodeToLease(v4, v6 bool, annotations map[string]string, podCIDR string, podCIDRs []string) (lease.Lease, error) {
	a, _ := newAnnotations("flannel.alpha.coreos.com")
	m := kubeSubnetManager{enableIPv4: v4, enableIPv6: v6, annotations: a}
	return m.nodeToLease(v1.Node{ObjectMeta: metav1.ObjectMeta{Annotations: annotations}, Spec: v1.NodeSpec{PodCIDR: podCIDR, PodCIDRs: podCIDRs}})
}
