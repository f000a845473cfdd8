package flannel

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
)

// maxLeaseValue is the size of a lease in etcd in bytes. Flannel writes 280 at
// most.
const maxLeaseValue = 16 << 10

// LeaseKey is the last part of a lease's key in etcd, after
// "<prefix>/subnets/": 10.5.52.0-24, or 10.5.52.0-24&fd00:12::-56 with IPv6.
// Without IPv4 the first half is 0.0.0.0-0.
func LeaseKey(l Lease) string {
	v4 := l.Prefix
	if !v4.IsValid() {
		v4 = noPrefix
	}
	key := fmt.Sprintf("%s-%d", v4.Addr(), v4.Bits())
	if l.PrefixV6.IsValid() {
		key += fmt.Sprintf("&%s-%d", l.PrefixV6.Addr(), l.PrefixV6.Bits())
	}
	return key
}

// noPrefix stands in a key for IPv4 when there is IPv6 only.
var noPrefix = netip.PrefixFrom(netip.IPv4Unspecified(), 0)

// ParseLeaseKey reads what LeaseKey writes, in that form only. A family that is
// not in the key has the zero Prefix; one is there at least.
func ParseLeaseKey(key string) (v4, v6 netip.Prefix, err error) {
	first, second, _ := strings.Cut(key, "&")
	v4, v6 = parseKeyPrefix(first, false), parseKeyPrefix(second, true)
	if LeaseKey(Lease{Prefix: v4, PrefixV6: v6}) != key || (!v4.IsValid() && !v6.IsValid()) {
		return netip.Prefix{}, netip.Prefix{}, fmt.Errorf("%s is no key of a lease; one looks like 10.5.52.0-24 or 10.5.52.0-24&fd00:12::-56", quote(key))
	}
	return v4, v6, nil
}

// parseKeyPrefix reads a prefix of the form 10.5.52.0-24. It is zero if the text
// is not one of the family, or one that no node can have.
func parseKeyPrefix(text string, v6 bool) netip.Prefix {
	base, bits, _ := strings.Cut(text, "-")
	p, err := netip.ParsePrefix(base + "/" + bits)
	if err != nil || p.Addr().Is6() != v6 || p.Addr().Is4In6() || p.Bits() == 0 || p.IsSingleIP() || p != p.Masked() {
		return netip.Prefix{}
	}
	return p
}

// leaseValue is a lease's value in etcd.
type leaseValue struct {
	PublicIP      string
	PublicIPv6    *string
	BackendType   string          `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
}

// MarshalLease returns a lease's value in etcd, byte for byte as flannel writes
// it. A lease that peers could do nothing with is refused.
func MarshalLease(l Lease) ([]byte, error) {
	v4, v6 := l.half(false), l.half(true)
	if !v4.publishable() || !v6.publishable() || (!v4.complete() && !v6.complete()) {
		return nil, errNothingToTell
	}
	v := leaseValue{PublicIP: netip.IPv4Unspecified().String(), BackendType: BackendType}
	if v4.complete() {
		v.PublicIP = v4.publicIP.String()
		v.BackendData = json.RawMessage(v4.marshalVTEP())
	}
	if v6.complete() {
		text := v6.publicIP.String()
		v.PublicIPv6 = &text
		v.BackendV6Data = json.RawMessage(v6.marshalVTEP())
	}
	return json.Marshal(v)
}

// publishable tells whether all or nothing is there of a family.
func (h half) publishable() bool {
	return h.complete() || (half{prefix: h.prefix}) == h
}

// ParseLease reads a lease in etcd from the last part of its key and its value.
// The prefixes are filled in whenever the key is sound, so that they can be
// known as taken, and what one family has wrong does not harm the other: what is
// sound is returned beside the error.
func ParseLease(key string, value []byte) (Lease, error) {
	var l Lease
	var err error
	if l.Prefix, l.PrefixV6, err = ParseLeaseKey(key); err != nil {
		return Lease{}, err
	}
	broken := l
	broken.Broken, broken.BrokenV6 = true, true
	if len(value) > maxLeaseValue {
		return broken, fmt.Errorf("lease %s has a value of %d bytes; the limit is %d", key, len(value), maxLeaseValue)
	}
	var v leaseValue
	if err := json.Unmarshal(value, &v); err != nil {
		return broken, fmt.Errorf("lease %s: %s is no lease; one is written as %s", key, quote(value), exampleLease)
	}
	l.BackendType = v.BackendType
	var f faults
	for _, v6 := range []bool{false, true} {
		text, data := v.PublicIP, v.BackendData
		if v6 {
			text, data = "", v.BackendV6Data
			if v.PublicIPv6 != nil {
				text = *v.PublicIPv6
			}
		}
		if err := l.parseHalf(v6, text, data); err != nil {
			f.add("lease %s: %s: %w", key, family(v6), err)
		}
	}
	return l, f.err()
}

// exampleLease shows what a lease looks like.
const exampleLease = `{"PublicIP":"192.0.2.11","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:58:0a:f4:01:00"}}`

// parseHalf reads what a node publishes about a family. No address, and the one
// that flannel writes for none, are a family that it does not use. Data of other
// backends are not looked at.
//
// An address beside broken data is filled in all the same: it says whose lease this
// is, and a node that can't be reached yet may still send.
func (l *Lease) parseHalf(v6 bool, publicIP string, data []byte) error {
	if publicIP == "" || publicIP == "0.0.0.0" {
		return nil
	}
	var h half
	var err error
	if h.publicIP, err = parsePublicIP(publicIP, v6); err == nil && l.BackendType == BackendType {
		err = h.parseVTEP(data)
	}
	h.broken = err != nil
	l.tell(v6, h)
	return err
}
