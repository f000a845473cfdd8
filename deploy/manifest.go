// Package deploy has what users apply to their clusters.
package deploy

import _ "embed"

// Manifest is weft.yaml: weft as a cluster's network, for `kubectl apply`.
//
//go:embed weft.yaml
var Manifest string

// MigrateCheck is migrate-check.yaml: a look at a cluster of flannel's.
//
//go:embed migrate-check.yaml
var MigrateCheck string

// Remove is remove.yaml: takes weft from nodes without an agent.
//
//go:embed remove.yaml
var Remove string
