//go:build linux

package ebpf

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/dataplane/state"
)

// SourceChecks are the values of the source check, by enum source_check.
var SourceChecks = []string{
	weftSourceCheckSOURCE_CHECK_OFF:     "off",
	weftSourceCheckSOURCE_CHECK_OBSERVE: "observe",
	weftSourceCheckSOURCE_CHECK_ENFORCE: "enforce",
}

// syncRuntime changes what is in force, and writes it if that made a difference.
// Stamps once made stay, so that a packet stamped by the old programs is known to
// the new ones.
func (a *Accelerator) syncRuntime(set func(*weftInForce)) error {
	var have weftInForce
	if err := a.objects.Runtime.Lookup(uint32(0), &have); err != nil {
		return fmt.Errorf("reading map runtime: %w", err)
	}
	want := have
	set(&want)
	want.Stamp = cmp.Or(have.Stamp, uint32(random())|1)
	want.Nonce = cmp.Or(have.Nonce, random()|1)
	want.Token = cmp.Or(have.Token, random()|1)
	want.readSettings()
	if want == have {
		return nil
	}
	if err := a.objects.Runtime.Put(uint32(0), want); err != nil {
		return fmt.Errorf("writing map runtime: %w", err)
	}
	return nil
}

// setIPv4 sets what IPv4 packets go by.
func (f *weftInForce) setIPv4(d Desired, lengths []uint8) {
	f.Local = 0
	if d.Local.IsValid() {
		f.Local = toBE32(d.Local)
	}
	f.Uplink = uint32(d.Uplink)
	f.UplinkMac = deviceMAC(d.Uplink)
	f.Overlay = uint32(d.Overlay)
	f.OverlayMtu = uint32(d.OverlayMTU)
	f.Mac = d.MAC
	f.SourceCheck = sourceCheck(d.SourceCheck)
	f.Held = boolean(d.Held)
	f.Mtu = uint32(routeMTU(d.Uplink))
	f.ByMark = boolean(d.RoutesByMark)
	f.PrefixLengths, f.PrefixBits = prefixBits(lengths)
}

// setIPv6 sets what IPv6 packets are counted by.
func (f *weftInForce) setIPv6(d Desired, lengths []uint8) {
	f.Overlay6 = uint32(d.Overlay6)
	f.Prefix6Lengths, f.Prefix6Bits = prefixBits(lengths)
}

// deviceMAC is zero where there is none: no packet is addressed to that.
func deviceMAC(index int) (mac state.MAC) {
	if link, err := netlink.LinkByIndex(index); err == nil && len(link.Attrs().HardwareAddr) == len(mac) {
		mac = state.MAC(link.Attrs().HardwareAddr)
	}
	return mac
}

func prefixBits(lengths []uint8) (used uint8, bits [maxPrefixLengths]uint8) {
	return uint8(copy(bits[:], lengths)), bits
}

// SettingsChanged tells whether a sysctl that the programs go by is no longer
// what it was when Sync read it. Sysctls send no event.
func (a *Accelerator) SettingsChanged() bool {
	var have weftInForce
	if err := a.objects.Runtime.Lookup(uint32(0), &have); err != nil {
		return false
	}
	now := have
	now.readSettings()
	return now != have
}

func (f *weftInForce) readSettings() {
	f.Ttl = uint8(sysctl("net/ipv4/ip_default_ttl", 64))
	f.PortMin, f.PortMax = localPortRange()
	f.TcpEstablished = timeout("tcp_timeout_established", 432000)
	f.TcpUnacknowledged = timeout("tcp_timeout_unacknowledged", 300)
	f.UdpStream = timeout("udp_timeout_stream", 120)
	f.Udp = timeout("udp_timeout", 30)
}

// timeout reads one of conntrack's timeouts. A timer that express keeps may be
// off by a second, or a quarter of a short one.
func timeout(name string, otherwise int) weftTimeout {
	// The kernel takes milliseconds, of 31 bits: what is looked for must be what
	// can be written.
	seconds := min(sysctl("net/netfilter/nf_conntrack_"+name, otherwise), math.MaxInt32/1000)
	jiffies := seconds * hz()
	return weftTimeout{
		Ms:      uint32(seconds * 1000),
		Jiffies: uint32(jiffies),
		Slack:   uint32(min(jiffies/4, hz())),
	}
}

// hz is the kernel's ticks per second: the coarse clock moves once a tick.
func hz() int {
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil || tick.Nano() == 0 {
		return 250
	}
	return int(time.Second / time.Duration(tick.Nano()))
}

func sourceCheck(name string) uint32 {
	for i, n := range SourceChecks {
		if n == name {
			return uint32(i)
		}
	}
	return uint32(weftSourceCheckSOURCE_CHECK_OBSERVE)
}

func boolean(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

func random() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return binary.NativeEndian.Uint64(b[:])
}

// localPortRange is where the kernel takes a flow's outer source port from
// (udp_flow_src_port, inet_get_local_port_range).
func localPortRange() (low, high uint16) {
	low, high = 32768, 60999
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return low, high
	}
	var l, h uint16
	if _, err := fmt.Sscan(string(text), &l, &h); err != nil || l > h {
		return low, high
	}
	return l, h
}

// sysctl reads a number, or returns what the kernel starts with.
func sysctl(name string, otherwise int) int {
	text, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return otherwise
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return otherwise
	}
	return n
}
