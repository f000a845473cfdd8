// Package deploy has what users apply to their clusters.
package deploy

import _ "embed"

// Manifest is weft.yaml: weft as a cluster's network, for `kubectl apply`.
//
//go:embed weft.yaml
var Manifest string
