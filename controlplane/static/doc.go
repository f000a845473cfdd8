// Package static is the store for hosts without Kubernetes and etcd: one YAML
// file per node says what the node is and which peers it has.
//
//	interface: eth0             # uplink: the interface that carries the underlay
//	publicIP: 192.0.2.1         # this node's address there; peers send to it
//	vni: 1                      # VXLAN network identifier, 1 to 16777215; default 1
//	port: 8472                  # UDP port of the outer packets; default 8472
//	mtu: 0                      # overlay MTU; default 0: the uplink's less the overhead
//	network:                    # the overlay's network; every pod prefix lies inside
//	  - 10.244.0.0/16
//	node:
//	  name: node-a              # this node, as its peers know it
//	  prefixes: [10.244.1.0/24] # its pods
//	  mac: 0a:58:0a:f4:01:00    # of its overlay device; default: chosen and remembered
//	peers:                      # the other nodes; [] when there are none
//	  - name: node-b
//	    prefixes: [10.244.2.0/24]
//	    publicIP: 192.0.2.2
//	    mac: 0a:58:0a:f4:02:00  # required: nothing here discovers it
//
// interface, publicIP, network, node.name, node.prefixes and peers are
// required, and of every peer all four keys. Keys that are not in this list are
// refused, and so is anything YAML can say beyond plain values: anchors,
// aliases, a second document.
//
// The file carries one address family, that of publicIP. With an IPv6 publicIP
// the networks, prefixes and peers are IPv6 too, and the overlay device is
// flannel-v6.<vni>.
//
// All faults of a file are reported at once, each with its line. When the file
// changes it is read again; a file that has faults or is missing leaves the
// last good state in force.
package static
