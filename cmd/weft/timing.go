package main

import "time"

// timing says when the loop syncs.
type timing struct {
	LeastGap   time.Duration
	BusyGap    time.Duration
	RetryMin   time.Duration
	RetryMax   time.Duration
	NudgedMax  time.Duration
	LongestGap time.Duration
	StuckAfter time.Duration
	ReportGap  time.Duration
	LookGap    time.Duration
	MemoryGap  time.Duration
	StoreWait  time.Duration
}

// defaultTiming is every interval of the agent, with its reason.
func defaultTiming() timing {
	return timing{
		// Between the end of one sync and the start of the next. Nodes join
		// in bursts and a route change comes as several events: one sync for
		// all of them. A single change is not delayed at all, as the gap is
		// usually over.
		LeastGap: 50 * time.Millisecond,
		// The most of that while changes come without end, as nodes of a big cluster
		// join or leave one by one: each sync looks at all of them.
		BusyGap: time.Second,

		// After a failure: a device that is just being created is there in a
		// quarter of a second; what still fails after minutes needs a person,
		// and then half a minute is soon enough.
		RetryMin: 250 * time.Millisecond,
		RetryMax: 30 * time.Second,

		// A kernel event during that wait may well be the cure (the uplink
		// came up), so it cuts the wait short; but it may also be the echo of
		// the failing sync itself, so not below the growing retry gap, and
		// never further than to this.
		NudgedMax: 2 * time.Second,

		// Without any event. Some changes send none (TCX links, legacy
		// iptables), and an event can be lost without a trace; a minute bounds
		// how long such a fault lasts. A sync that finds nothing to do costs
		// one read of our own routes and neighbours.
		LongestGap: time.Minute,

		// A sync of 5,000 peers takes seconds on a slow machine. One that
		// takes minutes hangs, and /healthz says so.
		StuckAfter: 2 * time.Minute,

		// Between looks at the mode after a sync.
		ReportGap: 5 * time.Second,

		// Between looks without a sync. Pods come, and what is in the way of
		// express comes and goes, without one; "weft status" is to know.
		LookGap: 10 * time.Second,

		// Between looks for something new to remember. In a cluster that grows
		// there always is.
		MemoryGap: 5 * time.Second,

		// How long a start waits for the store before it goes by memory. On the
		// way up the API answers in a second or two; what the kernel still
		// carries meanwhile it carries.
		StoreWait: 5 * time.Second,
	}
}

// busyGap is what lies between the end of a sync and the start of the next when changes
// come without end: so much more than the sync took that they cost a quarter of a CPU,
// and never more than BusyGap.
func (t timing) busyGap(took time.Duration) time.Duration {
	return max(t.LeastGap, min(3*took, t.BusyGap))
}
