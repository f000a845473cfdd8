// Package etcd is the store for hosts that share an etcd v3, without
// Kubernetes, in flannel's keys and values:
//
//	<prefix>/config                     the network's configuration, written by people
//	<prefix>/subnets/10.5.52.0-24       a node's lease: its pod prefix is the key
//
// A node takes part by holding a lease. It keeps the one it has: that with its
// public IP, else that of its subnet.env if nobody has taken it. Otherwise it
// takes a free prefix between SubnetMin and SubnetMax, at random. The key is
// bound to an etcd lease of 24 hours, which is renewed when the renew margin
// remains. A key that is bound to none is a reservation, and stays one.
//
// The peers are all the other leases. They are listed once and then watched;
// when a watch can't go on, because etcd has compacted what it would tell next
// or for any other reason, they are listed again. A state is delivered only
// when it is whole and the own lease is in it. While etcd is away nothing is
// delivered, the health says so, and what was delivered stays in force.
//
// # Beside flanneld
//
// Nodes that run flanneld can't tell the difference, and find the same values
// byte by byte. What differs serves them too:
//
//   - A lease that is deleted, or expires while etcd or the node is away, is
//     acquired again, the same prefix if it is still free. flanneld exits. If
//     somebody else has the prefix, the node takes another and the state says
//     so.
//   - Renewing extends the etcd lease and does not write the key, so that no
//     peer hears of it. flanneld writes the key with a new lease, and leaves the
//     old one behind. A restart writes nothing either if nothing has changed.
//   - Two nodes whose new leases overlap although their keys differ (with IPv6
//     the two prefixes make one key) notice it, and who came second chooses
//     again. Who loses the race for a key chooses again too; flanneld exits.
//   - A reservation stays one. flanneld binds it to a lease of 24 hours.
//   - In a network that has become one of both families, or has lost one, a node
//     keeps the prefix that still fits.
//   - When the node's address changes its lease is rewritten.
//   - A peer that claims what is ours or a peer's that was there first, or whose
//     lease can't be understood, is left out and named in the log. One of which
//     only the backend data can't be is a node that has not told its MAC: it can't
//     be reached, but its public IP and prefix are known. As with flanneld, a
//     lease that could be understood before stays in force as it was.
//
// The configuration is read when the store starts, as flanneld does: it can't
// change under running pods. A change is logged when it is noticed, which is
// whenever the leases are listed again, and takes a restart.
package etcd
