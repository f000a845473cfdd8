package ebpf

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/weft-net/weft/dataplane/state"
)

func TestAddressesGoThereAndBack(t *testing.T) {
	for _, text := range []string{"0.0.0.0", "10.244.1.5", "192.0.2.11", "255.255.255.255", "1.2.3.4"} {
		a := netip.MustParseAddr(text)
		be := toBE32(a)
		if back := fromBE32(be); back != a {
			t.Errorf("%v came back as %v", a, back)
		}
		// In memory the bytes stand as on the wire.
		var memory [4]byte
		binary.NativeEndian.PutUint32(memory[:], be)
		if memory != a.As4() {
			t.Errorf("%v lies in memory as %v", a, memory)
		}
	}
}

func TestPrefixesGoThereAndBack(t *testing.T) {
	for _, text := range []string{"0.0.0.0/0", "10.0.0.0/8", "10.244.2.0/24", "10.244.2.128/25", "10.244.2.130/32"} {
		p := netip.MustParsePrefix(text)
		if back := fromPrefix(toPrefix(p)); back != p {
			t.Errorf("%v came back as %v", p, back)
		}
	}
}

func TestPeersGoThereAndBack(t *testing.T) {
	m := member{remote: netip.MustParseAddr("192.0.2.12"), slot: 7, mac: state.MAC{0x0a, 0x58, 0x0a, 0xf4, 2, 0}}
	value := toPeer(m)
	if value.Pad != [2]uint8{} {
		t.Errorf("padding %v is not zero", value.Pad)
	}
	if back := fromPeer(value); back != m {
		t.Errorf("%+v came back as %+v", m, back)
	}
	m.mac = state.MAC{}
	if back := fromNode(toNode(m)); back != m {
		t.Errorf("node %+v came back as %+v", m, back)
	}
}

func TestIPv6GoesThereAndBack(t *testing.T) {
	for _, text := range []string{"::/0", "2000::/3", "fd00:10:244:2::/64", "2001:db8:1:2:3:4:5:8/127", "2001:db8:1:2:3:4:5:6/128"} {
		p := netip.MustParsePrefix(text)
		key := toPrefix6(p)
		if back := fromPrefix6(key); back != p {
			t.Errorf("%v came back as %v", p, back)
		}
		var memory [16]byte
		for i, word := range key.Addr.Words {
			binary.NativeEndian.PutUint32(memory[4*i:], word)
		}
		if memory != p.Addr().As16() {
			t.Errorf("%v lies in memory as %v", p, memory)
		}
	}
	m := member{remote: netip.MustParseAddr("2001:db8::12"), slot: 7, mac: state.MAC{0x0a, 0x58, 0x0a, 0xf4, 2, 0}}
	if value := toPeer6(m); fromPeer6(value) != m || value.Pad != [2]uint8{} {
		t.Errorf("%+v came back as %+v, padding %v", m, fromPeer6(value), value.Pad)
	}
	m.mac = state.MAC{}
	if back := fromNode6(toNode6(m)); back != m {
		t.Errorf("node %+v came back as %+v", m, back)
	}
}
