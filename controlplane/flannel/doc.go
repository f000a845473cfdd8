// Package flannel holds flannel's formats: the network's configuration
// (net-conf.json), what a node publishes about itself (annotations of a
// Kubernetes Node, keys and values in etcd) and what it tells its CNI plugin
// and Docker (subnet.env). It is the only place that knows their names.
//
// What is written is flannel's byte for byte. What is read comes from outside
// and is bounded and checked, but everything that some flannel has written is
// accepted.
package flannel
