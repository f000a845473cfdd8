//go:build linux

package rtnl

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weft-net/weft/test/netns"
)

// mustOpen opens a socket in the namespace.
func mustOpen(t testing.TB, ns *netns.NS, groups ...int) *Socket {
	t.Helper()
	var s *Socket
	ns.MustDo(t, func() (err error) {
		s, err = Open(groups...)
		return err
	})
	t.Cleanup(s.Close)
	return s
}

// loopback is the index of lo, in every namespace.
const loopback = 1

// ifaddrmsg is struct ifaddrmsg of linux/if_addr.h, for IPv4.
func ifaddrmsg(bits byte, index uint32) []byte {
	return native.AppendUint32([]byte{unix.AF_INET, bits, 0, 0}, index)
}

// addAddress adds 172.21.x.y to lo.
func addAddress(i int) *Request {
	return NewRequest(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifaddrmsg(32, loopback)...).
		Attr(unix.IFA_LOCAL, []byte{172, 21, byte(i >> 8), byte(i)})
}

func deleteAddress(i int) *Request {
	return NewRequest(unix.RTM_DELADDR, 0, ifaddrmsg(32, loopback)...).Attr(unix.IFA_LOCAL, []byte{172, 21, byte(i >> 8), byte(i)})
}

func dumpAddresses() *Request {
	return NewRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP, ifaddrmsg(0, 0)...)
}

func TestBatchGoesOnAfterARequestThatFails(t *testing.T) {
	s := mustOpen(t, netns.New(t))
	errs := s.Batch([]*Request{addAddress(1), addAddress(1), deleteAddress(2), addAddress(3)})
	for i, want := range []error{nil, unix.EEXIST, unix.EADDRNOTAVAIL, nil} {
		if !errors.Is(errs[i], want) {
			t.Errorf("request %d: %v, want %v", i, errs[i], want)
		}
	}
	var found []byte
	err := s.Dump(DumpTries, dumpAddresses, unix.RTM_NEWADDR, func() { found = nil }, func(data []byte) {
		for kind, value := range Attributes(data[unix.SizeofIfAddrmsg:]) {
			if kind == unix.IFA_LOCAL {
				found = append(found, value[3])
			}
		}
	})
	if err != nil || !slices.Equal(found, []byte{1, 3}) {
		t.Errorf("addresses %v, error %v; want 1 and 3", found, err)
	}
}

// More questions than fit one datagram, each with its own answer.
func TestAsk(t *testing.T) {
	s := mustOpen(t, netns.New(t))
	var requests []*Request
	for i := range 3*askSize + 1 {
		fixed := make([]byte, unix.SizeofIfInfomsg)
		native.PutUint32(fixed[4:], uint32(loopback+i%2*4711)) // every second one is not there
		requests = append(requests, NewRequest(unix.RTM_GETLINK, 0, fixed...))
	}
	next := 0
	err := s.Ask(requests, func(i int, data []byte, refusal error) {
		if i != next {
			t.Errorf("answer %d came as number %d", i, next)
		}
		next++
		switch {
		case i%2 == 1:
			if !errors.Is(refusal, unix.ENODEV) {
				t.Errorf("answer %d: %v", i, refusal)
			}
		case refusal != nil || len(data) < unix.SizeofIfInfomsg || native.Uint32(data[4:]) != loopback:
			t.Errorf("answer %d: %x, %v", i, data, refusal)
		}
	})
	if err != nil || next != len(requests) {
		t.Errorf("%d answers, error %v", next, err)
	}
}

func TestQuestionThatIsOnlyAcknowledged(t *testing.T) {
	s := mustOpen(t, netns.New(t))
	r := addAddress(1)
	r.acknowledged()
	var refused error
	err := s.Ask([]*Request{r}, func(_ int, _ []byte, refusal error) { refused = refusal })
	if err != nil || !errors.Is(refused, errNoAnswer) {
		t.Errorf("refusal %v, error %v", refused, err)
	}
}

func TestEventsAndTheirEnd(t *testing.T) {
	ns := netns.New(t)
	s := mustOpen(t, ns, unix.RTNLGRP_IPV4_IFADDR)
	if err := mustOpen(t, ns).Batch([]*Request{addAddress(1)})[0]; err != nil {
		t.Fatal(err)
	}
	received, err := s.Receive()
	if err != nil {
		t.Fatal(err)
	}
	for m := range received {
		if m.Kind != unix.RTM_NEWADDR {
			t.Errorf("heard %d", m.Kind)
		}
	}
	time.AfterFunc(50*time.Millisecond, s.Close)
	if _, err := s.Receive(); err == nil {
		t.Error("a closed socket has heard something")
	}
}

// Events that come one upon another are waited for together, and all of them are
// heard.
func TestEventsThatGather(t *testing.T) {
	const events = 500
	ns := netns.New(t)
	s := mustOpen(t, ns, unix.RTNLGRP_IPV4_IFADDR)
	asks := mustOpen(t, ns)
	began := time.Now()
	go func() {
		for i := range events {
			asks.Batch([]*Request{addAddress(i)})
			time.Sleep(time.Millisecond / 10)
		}
	}()
	waits := map[time.Time]bool{}
	for heard := 0; heard < events; {
		received, err := s.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for range received {
			heard++
		}
		waits[s.waited] = true
	}
	if most := int(time.Since(began)/gatherTime) + 2; len(waits) > most || len(waits) > events/3 {
		t.Errorf("%d waits for %d events in %s, want %d at most", len(waits), events, time.Since(began), most)
	}
}

func TestKernelsAnswerInWords(t *testing.T) {
	s := mustOpen(t, netns.New(t))
	fixed := make([]byte, unix.SizeofRtMsg)
	fixed[0] = unix.AF_INET
	r := NewRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE, fixed...).Uint32(unix.RTA_OIF, 4711)
	err := s.Batch([]*Request{r})[0]
	if !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("error is %v", err)
	}
	t.Log(err)
}

func TestInterruptedDumpIsReadAgainUntilItIsWhole(t *testing.T) {
	wrong := errors.New("wrong")
	for name, test := range map[string]struct {
		interrupted, tries int
		fail, want         error
		reads              int
	}{
		"Whole":      {interrupted: 0, tries: DumpTries, reads: 1},
		"ThreeTimes": {interrupted: 3, tries: DumpTries, reads: 4},
		"WithoutEnd": {interrupted: 1000, tries: DumpTries, want: ErrInterrupted, reads: DumpTries},
		"FewTries":   {interrupted: 1000, tries: 3, want: ErrInterrupted, reads: 3},
		"Failed":     {interrupted: 0, tries: DumpTries, fail: wrong, want: wrong, reads: 1},
	} {
		t.Run(name, func(t *testing.T) {
			reads := 0
			err := UntilWhole(test.tries, func() (bool, error) {
				reads++
				return reads <= test.interrupted, test.fail
			})
			if !errors.Is(err, test.want) || reads != test.reads {
				t.Errorf("%d reads, error %v; want %d, %v", reads, err, test.reads, test.want)
			}
		})
	}
}

func TestKernelSaysThatADumpWasInterrupted(t *testing.T) {
	ns := netns.New(t)
	s, others := mustOpen(t, ns), mustOpen(t, ns)
	for i := range 1000 { // so many that they do not fit one datagram
		if err := s.Batch([]*Request{addAddress(i)})[0]; err != nil {
			t.Fatal(err)
		}
	}
	end := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
				others.Batch([]*Request{addAddress(1000), deleteAddress(1000)})
			}
		}
	})
	defer done.Wait()
	defer close(end)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		err := s.Dump(1, dumpAddresses, unix.RTM_NEWADDR, func() {}, func([]byte) {})
		if errors.Is(err, ErrInterrupted) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Error("no dump was ever interrupted")
}
