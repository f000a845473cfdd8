package state

import (
	"crypto/rand"
	"fmt"
	"net"
)

// MAC is a 48-bit Ethernet address that can be compared with == and used as a
// map key.
type MAC [6]byte

// ParseMAC reads an Ethernet address in the form aa:bb:cc:dd:ee:ff (or with
// dashes or dots, as net.ParseMAC does). Addresses that are not 48 bits long,
// are all zero, or are group addresses (IEEE 802: lowest bit of the first
// byte) are refused: no device can own them.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return MAC{}, fmt.Errorf("%q is not a MAC address; write it as aa:bb:cc:dd:ee:ff", s)
	}
	mac := MAC(hw)
	if mac.IsZero() || mac[0]&1 != 0 {
		return MAC{}, fmt.Errorf("%q is not the address of one device; give a unicast MAC address", s)
	}
	return mac, nil
}

// RandomMAC makes an address of one device, locally administered (IEEE 802).
func RandomMAC() MAC {
	var mac MAC
	_, _ = rand.Read(mac[:]) // never fails
	mac[0] = mac[0]&^1 | 2
	return mac
}

// IsZero reports whether the address is not set.
func (m MAC) IsZero() bool { return m == MAC{} }

// HardwareAddr returns the address as package net has it.
func (m MAC) HardwareAddr() net.HardwareAddr { return m[:] }

// String returns the form aa:bb:cc:dd:ee:ff.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText implements encoding.TextMarshaler. A zero MAC is empty.
func (m MAC) MarshalText() ([]byte, error) {
	if m.IsZero() {
		return nil, nil
	}
	return []byte(m.String()), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MAC) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*m = MAC{}
		return nil
	}
	mac, err := ParseMAC(string(text))
	if err != nil {
		return err
	}
	*m = mac
	return nil
}
