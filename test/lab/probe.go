//go:build linux

package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// ProbeOptions say how a Probe asks. The zero value is a UDP packet of 64
// bytes every 2 ms.
type ProbeOptions struct {
	Interval time.Duration
	// ICMP asks with ICMP echo, which the other pod's kernel answers, and not
	// with UDP, which the probe itself answers.
	ICMP bool
	// IPv6 asks by IPv6.
	IPv6 bool
	// Size is the payload in bytes, 16 at least.
	Size int
}

// Probe sends numbered packets from one pod to another and counts the answers,
// from the first answer until Stop: a ping that knows when it lost what.
type Probe struct {
	options ProbeOptions
	client  net.Conn
	server  net.PacketConn // nil when the kernel answers
	stop    chan struct{}
	stopped sync.Once
	sender  sync.WaitGroup
	readers sync.WaitGroup

	mu      sync.Mutex
	begun   time.Time
	sent    []time.Duration // when, since begun, by number
	answers []uint8         // how many, by number
	arrived []time.Duration // when, since begun, in order of arrival
	err     error
}

// ProbeResult is what a Probe saw.
type ProbeResult struct {
	Sent       int
	Received   int
	Lost       int
	Duplicates int
	// LongestGap is the longest time without an answer.
	LongestGap time.Duration
	// Losses are the runs of packets without answer.
	Losses []Loss
}

// Loss is a run of packets without answer.
type Loss struct {
	// At is when the first of them was sent, since the start of the probe.
	At    time.Duration
	Count int
}

// String returns a line for people.
func (r ProbeResult) String() string {
	s := fmt.Sprintf("%d sent, %d answered, %d lost, longest gap %s",
		r.Sent, r.Received, r.Lost, r.LongestGap.Round(100*time.Microsecond))
	for _, l := range r.Losses {
		s += fmt.Sprintf("; %d lost at %s", l.Count, l.At.Round(time.Millisecond))
	}
	return s
}

const (
	// icmpHeader is the length of an ICMP echo header.
	icmpHeader = 8
	// probeMinimum holds the number and the time.
	probeMinimum = 16
	// probeLinger is how long Stop waits for answers that are under way.
	probeLinger = 500 * time.Millisecond
	// probeFirst is how long StartProbe tries to get a first answer.
	probeFirst = 5 * time.Second
)

// StartProbe begins to ask, and returns when the first answer has come.
func StartProbe(from, to *Pod, o ProbeOptions) (*Probe, error) {
	setDefault(&o.Interval, 2*time.Millisecond)
	setDefault(&o.Size, 64)
	o.Size = max(o.Size, probeMinimum)
	p := &Probe{options: o, stop: make(chan struct{})}
	if err := p.open(from, to); err != nil {
		p.close()
		return nil, fmt.Errorf("probe %s to %s: %w", from, to, err)
	}
	p.readers.Go(p.receive)
	if p.server != nil {
		p.readers.Go(p.answer)
	}
	if err := p.first(); err != nil {
		p.close()
		return nil, fmt.Errorf("probe %s to %s: %w", from, to, err)
	}
	p.sender.Go(p.send)
	return p, nil
}

// open makes the sockets in their pods.
func (p *Probe) open(from, to *Pod) error {
	source, target := from.IP, to.IP
	if p.options.IPv6 {
		source, target = from.IPv6, to.IPv6
	}
	if p.options.ICMP {
		network := "ip4:icmp"
		if p.options.IPv6 {
			network = "ip6:ipv6-icmp"
		}
		return from.Do(func() (err error) {
			p.client, err = net.DialIP(network, &net.IPAddr{IP: source.AsSlice()}, &net.IPAddr{IP: target.AsSlice()})
			return err
		})
	}
	if err := to.Do(func() (err error) {
		p.server, err = listenUDP(target)
		return err
	}); err != nil {
		return err
	}
	return from.Do(func() error {
		client, err := net.DialUDP("udp", nil, p.server.LocalAddr().(*net.UDPAddr))
		if err != nil {
			return err
		}
		p.client = client
		return client.SetReadBuffer(1 << 22) // a busy machine may let us wait
	})
}

func listenUDP(addr netip.Addr) (net.PacketConn, error) {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		return nil, err
	}
	return conn, conn.SetReadBuffer(1 << 22)
}

// first asks until somebody answers, so that what takes its time at the
// beginning (ARP) does not count as loss. Numbers from here on are counted.
func (p *Probe) first() error {
	p.begun = time.Now()
	for deadline := p.begun.Add(probeFirst); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err := p.ask(); err != nil {
			return err
		}
		p.mu.Lock()
		answered := len(p.arrived) > 0
		p.mu.Unlock()
		if answered {
			time.Sleep(probeLinger / 5) // the others' answers are on their way
			p.mu.Lock()
			p.begun, p.sent, p.answers, p.arrived = time.Now(), nil, nil, nil
			p.mu.Unlock()
			return nil
		}
	}
	return fmt.Errorf("no answer within %s", probeFirst)
}

// send asks until Stop.
func (p *Probe) send() {
	tick := time.NewTicker(p.options.Interval)
	defer tick.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-tick.C:
		}
		if err := p.ask(); err != nil {
			p.mu.Lock()
			p.err = errors.Join(p.err, err)
			p.mu.Unlock()
			return
		}
	}
}

// ask sends one packet with the next number.
func (p *Probe) ask() error {
	p.mu.Lock()
	number := len(p.sent)
	p.sent, p.answers = append(p.sent, time.Since(p.begun)), append(p.answers, 0)
	packet := p.packet(uint32(number), p.begun)
	p.mu.Unlock()
	// What the kernel refuses to send (no route, an ICMP error that came back)
	// is a packet without answer like any other.
	if _, err := p.client.Write(packet); errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// packet is a request: a number, and when counting began so that an answer to
// an earlier count is told apart.
func (p *Probe) packet(number uint32, begun time.Time) []byte {
	payload := make([]byte, p.options.Size)
	binary.BigEndian.PutUint32(payload[0:], number)
	binary.BigEndian.PutUint64(payload[4:], uint64(begun.UnixNano()))
	if !p.options.ICMP {
		return payload
	}
	packet := append([]byte{8, 0, 0, 0, 0x77, 0x66, 0, 0}, payload...)
	binary.BigEndian.PutUint16(packet[6:], uint16(number))
	if p.options.IPv6 {
		packet[0] = 128 // the kernel writes the checksum of ICMPv6
		return packet
	}
	binary.BigEndian.PutUint16(packet[2:], checksum(packet))
	return packet
}

// receive counts the answers.
func (p *Probe) receive() {
	buffer := make([]byte, 1<<16)
	for {
		n, err := p.client.Read(buffer)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil {
			continue // a refusal that an ICMP error brought: the answer stays away
		}
		payload := buffer[:n]
		switch {
		case p.options.ICMP && p.options.IPv6:
			payload = echoedV6(payload)
		case p.options.ICMP:
			payload = echoed(payload)
		}
		p.count(payload)
	}
}

// echoed returns the payload of an IPv4 packet with an ICMP echo reply, and
// nothing of any other.
func echoed(packet []byte) []byte {
	if len(packet) == 0 {
		return nil
	}
	ipHeader := int(packet[0]&0x0f) * 4
	if len(packet) < ipHeader+icmpHeader || packet[ipHeader] != 0 {
		return nil
	}
	return packet[ipHeader+icmpHeader:]
}

// echoedV6 is echoed for ICMPv6, which comes without the IP header.
func echoedV6(packet []byte) []byte {
	if len(packet) < icmpHeader || packet[0] != 129 {
		return nil
	}
	return packet[icmpHeader:]
}

// count notes an answer.
func (p *Probe) count(payload []byte) {
	if len(payload) != p.options.Size {
		return
	}
	number, begun := binary.BigEndian.Uint32(payload), binary.BigEndian.Uint64(payload[4:])
	p.mu.Lock()
	defer p.mu.Unlock()
	if begun != uint64(p.begun.UnixNano()) || int(number) >= len(p.answers) {
		return
	}
	p.answers[number]++
	p.arrived = append(p.arrived, time.Since(p.begun))
}

// answer sends back what comes.
func (p *Probe) answer() {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := p.server.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = p.server.WriteTo(buffer[:n], from) // a failure shows as a lost packet
		}
	}
}

// Stop ends the asking, waits a little for answers that are under way, and
// tells what was seen. The error is about the asking itself.
func (p *Probe) Stop() (ProbeResult, error) {
	p.stopped.Do(func() {
		close(p.stop)
		p.sender.Wait()
		p.waitForAnswers()
		p.close()
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.result(), p.err
}

// waitForAnswers returns when every packet is answered, or after a while.
func (p *Probe) waitForAnswers() {
	for deadline := time.Now().Add(probeLinger); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		p.mu.Lock()
		lost := p.result().Lost
		p.mu.Unlock()
		if lost == 0 {
			return
		}
	}
}

// close ends the readers, too.
func (p *Probe) close() {
	if p.client != nil {
		p.client.Close()
	}
	if p.server != nil {
		p.server.Close()
	}
	p.readers.Wait()
}

// result sums up.
func (p *Probe) result() ProbeResult {
	r := ProbeResult{Sent: len(p.sent)}
	for number, answers := range p.answers {
		if answers > 0 {
			r.Received++
			r.Duplicates += int(answers) - 1
			continue
		}
		r.Lost++
		if number > 0 && p.answers[number-1] == 0 {
			r.Losses[len(r.Losses)-1].Count++
		} else {
			r.Losses = append(r.Losses, Loss{At: p.sent[number], Count: 1})
		}
	}
	last := time.Duration(0)
	for _, at := range p.arrived {
		r.LongestGap, last = max(r.LongestGap, at-last), at
	}
	if len(p.sent) > 0 {
		r.LongestGap = max(r.LongestGap, p.sent[len(p.sent)-1]-last)
	}
	return r
}

// checksum is the Internet checksum (RFC 1071) of a packet whose own checksum
// field is zero.
func checksum(packet []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(packet); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(packet[i:]))
	}
	if len(packet)%2 == 1 {
		sum += uint32(packet[len(packet)-1]) << 8
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
