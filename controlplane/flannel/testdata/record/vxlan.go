package vxlan

var ParseVXLANConfig = parseVXLANConfig

type LeaseAttrs = vxlanLeaseAttrs
type HardwareAddr = hardwareAddr
