//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/lab"
)

const (
	// noJunk is the setting without.
	noJunk = "none"
	// defaultJunkRate is how many datagrams of junk are sent a second.
	defaultJunkRate = 10000
)

// junk is what is wrong with what a stranger sends.
type junk struct {
	name, about string
	// vni is that of the datagrams, and cut how much is missing at their end.
	vni uint32
	cut int
}

// junks are all kinds of junk. Their outer source is nobody's.
var junks = []junk{
	{"vni", "with a wrong VNI", 4711, 0},
	{"source", "from an unknown source", 1, 0},
	{"malformed", "without a whole inner header", 1, 40},
}

// findJunk finds one by its name.
func findJunk(name string) (junk, bool) {
	i := slices.IndexFunc(junks, func(j junk) bool { return j.name == name })
	if i < 0 {
		return junk{}, false
	}
	return junks[i], true
}

// parseJunk reads a word of --junk.
func parseJunk(word string) (string, error) {
	if _, found := findJunk(word); found || word == noJunk {
		return word, nil
	}
	names := []string{noJunk}
	for _, j := range junks {
		names = append(names, j.name)
	}
	return "", usagef("bench: --junk has %q; give some of %s", word, strings.Join(names, ", "))
}

// datagram is a VXLAN datagram's payload (RFC 7348, 5): a frame to a VTEP with an
// inner datagram to a pod, from an address that no pod has.
func (j junk) datagram(vtep net.HardwareAddr, pod netip.Addr) ([]byte, error) {
	stranger := net.HardwareAddr{0x0a, 0x58, 0x0a, 0xf4, 0x63, 0} // locally administered
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: net.IPv4(10, 244, 99, 7), DstIP: pod.AsSlice()}
	udp := &layers.UDP{SrcPort: 40000, DstPort: 9} // discard
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		return nil, err
	}
	buffer := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(buffer, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true},
		&layers.VXLAN{ValidIDFlag: true, VNI: j.vni},
		&layers.Ethernet{SrcMAC: stranger, DstMAC: vtep, EthernetType: layers.EthernetTypeIPv4},
		ip, udp, gopacket.Payload(make([]byte, 22)))
	b := buffer.Bytes()
	return b[:len(b)-min(j.cut, len(b))], err
}

// startJunk has a stranger in the underlay send junk to the server's node. What it
// returns ends that, and tells how many datagrams a second were sent: where CPU time is
// short, fewer than were to be.
func (b *bench) startJunk(l *lab.Lab, s setting) (stop func() (rate float64, err error), err error) {
	j, wanted := findJunk(s.junk)
	if !wanted {
		return func() (float64, error) { return 0, nil }, nil
	}
	node := l.Node(2)
	var overlay *net.Interface
	if err := node.Do(func() error {
		overlay, err = net.InterfaceByName(node.Overlay())
		return err
	}); err != nil {
		return nil, fmt.Errorf("%s of %s: %w", node.Overlay(), node, err)
	}
	datagram, err := j.datagram(overlay.HardwareAddr, l.Pod(2, 1).IP)
	if err != nil {
		return nil, err
	}
	command, err := loadCommand(0, "junk", fmt.Sprintf("%x", datagram), netip.AddrPortFrom(node.IP, l.Options.Port), "--rate", strconv.Itoa(b.options.junkRate))
	if err != nil {
		return nil, err
	}
	p, err := l.Underlay.Start(command...)
	if err != nil {
		return nil, err
	}
	return func() (float64, error) {
		if err := p.Stop(unix.SIGTERM); err != nil {
			return 0, err
		}
		var sent count
		if err := json.Unmarshal([]byte(p.Output()), &sent); err != nil {
			return 0, fmt.Errorf("reading the count %q: %w", p.Output(), err)
		}
		return float64(sent.Transactions) / sent.Seconds, nil
	}, nil
}

// sendJunk sends a datagram so many times a second, until it is told to end.
func sendJunk(datagram []byte, l load) (c count, err error) {
	s, err := connect(unix.SOCK_DGRAM, address(l.at))
	if err != nil {
		return count{}, err
	}
	defer s.close()
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGTERM)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	most := uint64(max(1, l.rate/100)) // at a time; what is due longer than that is left out
	for begun, due := time.Now(), uint64(0); ; {
		select {
		case <-ended:
			return c, nil
		case <-tick.C:
		}
		c.Seconds = time.Since(begun).Seconds()
		now := uint64(c.Seconds * float64(l.rate))
		for range min(now-due, most) {
			c.Transactions++
			// ENOBUFS: a queue on the way is full. ECONNREFUSED: nobody listens.
			if err := s.write(datagram); err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.ECONNREFUSED) {
				return c, err
			}
		}
		due = now
	}
}
