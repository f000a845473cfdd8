// Package kube is the store for Kubernetes: the API's Nodes say which peers
// there are.
//
// The names and forms of what a node publishes are flannel's (see
// controlplane/flannel), so stock flannel nodes and this one find each other in
// the same cluster. A node's pod prefixes are its spec.podCIDRs; what else peers
// need is in annotations, which every node writes to its own Node: whether it
// takes part, public IPs, MACs.
//
// All Nodes are watched, and each is cut down to what is read here when it
// arrives (node.go). What the peers are is computed from all of them at once
// (peers.go), so that nodes that claim the same thing are judged the same way
// on every node, whatever was heard first. A Node whose annotations can't be
// understood any more is gone by as it was, as with flanneld. What the own Node
// should say is compared with what it says after every change of either
// (publish.go).
//
// What the store needs to be allowed: get, list and watch nodes; patch
// nodes/status; and to find the node's name from a pod's, get pods.
package kube
