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
	p := state.Peer{
		Prefix: netip.MustParsePrefix("10.244.2.0/24"), PublicIP: netip.MustParseAddr("192.0.2.12"),
		MAC: state.MAC{0x0a, 0x58, 0x0a, 0xf4, 2, 0},
	}
	value := toPeer(p, 7)
	if value.Slot != 7 {
		t.Errorf("slot %d, want 7", value.Slot)
	}
	if value.Pad != [2]uint8{} {
		t.Errorf("padding %v is not zero", value.Pad)
	}
	if back := fromPeer(toPrefix(p.Prefix), value); back != p {
		t.Errorf("%+v came back as %+v", p, back)
	}
}
