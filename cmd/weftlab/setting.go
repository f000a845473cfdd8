//go:build linux

package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/weft-net/weft/test/lab"
)

// setting is the world that modes are compared in.
type setting struct {
	underlay lab.Underlay
	// cpus is 1 where client and server share one, and 2 where each has its own.
	cpus int
	// peers is the number of nodes that each node is told of.
	peers int
	to    target
	// junk is what a stranger sends to the server's node meanwhile, or noJunk.
	junk string
}

// target is what clients in pods talk to: the server's pod itself, or a
// ClusterIP that kube-proxy leads to it.
type target struct {
	// proxy is the mode of kube-proxy; empty means the pod itself.
	proxy string
	// services is the number of Services that there are, ours included.
	services int
}

// modes of kube-proxy.
const (
	proxyIptables = "iptables"
	proxyNftables = "nftables"
)

// String is the target as --to takes it.
func (t target) String() string {
	if t.proxy == "" {
		return "pod"
	}
	return fmt.Sprintf("%s:%d", t.proxy, t.services)
}

// String tells a reader of the results.
func (s setting) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s underlay, ", s.underlay)
	switch {
	case s.to.proxy == "":
		b.WriteString("pod to pod")
	case s.to.services == 1:
		fmt.Fprintf(&b, "pod to ClusterIP (kube-proxy with %s)", s.to.proxy)
	default:
		fmt.Fprintf(&b, "pod to ClusterIP, one of %d (kube-proxy with %s)", s.to.services, s.to.proxy)
	}
	if s.peers > 1 {
		fmt.Fprintf(&b, ", %d peers", s.peers)
	}
	if s.cpus == 2 {
		b.WriteString(", client and server on a CPU each")
	} else {
		b.WriteString(", client and server on one CPU")
	}
	if j, found := findJunk(s.junk); found {
		fmt.Fprintf(&b, ", beside datagrams %s", j.about)
	}
	return b.String()
}

// world is what labs are built by: all but where client and server run, and what a
// stranger sends.
func (s setting) world() setting {
	s.cpus, s.junk = 0, ""
	return s
}

// factors are the values that each part of a setting is tried with.
type factors struct {
	underlays []lab.Underlay
	cpus      []int
	peers     []int
	to        []target
	junk      []string
}

// base is the setting of all first values.
func (f factors) base() setting {
	return setting{f.underlays[0], f.cpus[0], f.peers[0], f.to[0], f.junk[0]}
}

// oneByOne lists the base, and those settings that differ from it in one part.
func (f factors) oneByOne() []setting {
	base := f.base()
	all := []setting{base}
	for _, cpus := range f.cpus[1:] { // first, as the labs can stay
		s := base
		s.cpus = cpus
		all = append(all, s)
	}
	for _, junk := range f.junk[1:] {
		s := base
		s.junk = junk
		all = append(all, s)
	}
	for _, underlay := range f.underlays[1:] {
		s := base
		s.underlay = underlay
		all = append(all, s)
	}
	for _, peers := range f.peers[1:] {
		s := base
		s.peers = peers
		all = append(all, s)
	}
	for _, to := range f.to[1:] {
		s := base
		s.to = to
		all = append(all, s)
	}
	return all
}

// combinations lists all settings, the base first.
func (f factors) combinations() (all []setting) {
	for _, underlay := range f.underlays {
		for _, to := range f.to {
			for _, peers := range f.peers {
				for _, cpus := range f.cpus {
					for _, junk := range f.junk {
						all = append(all, setting{underlay, cpus, peers, to, junk})
					}
				}
			}
		}
	}
	return all
}

// parseFactors reads the lists of the command line.
func parseFactors(underlays, cpus, peers, to, junk string) (f factors, err error) {
	var errs [5]error
	f.underlays, errs[0] = parseList(underlays, func(word string) (lab.Underlay, error) {
		if u := lab.Underlay(word); u == lab.Virtual || u == lab.Wire || u == lab.Summed {
			return u, nil
		}
		return "", usagef("bench: --underlay has %q; give some of virtual, wire and summed, as in virtual,wire", word)
	})
	f.cpus, errs[1] = parseList(cpus, func(word string) (int, error) {
		if word == "1" || word == "2" {
			return strconv.Atoi(word)
		}
		return 0, usagef("bench: --cpus has %q; give 1, 2 or both, as in 1,2", word)
	})
	f.peers, errs[2] = parseList(peers, func(word string) (int, error) {
		if n, err := strconv.Atoi(word); err == nil && n >= 1 && n <= mostPeers {
			return n, nil
		}
		return 0, usagef("bench: --peers has %q; give numbers from 1 to %d, as in 1,5000", word, mostPeers)
	})
	f.to, errs[3] = parseList(to, parseTarget)
	f.junk, errs[4] = parseList(junk, parseJunk)
	return f, errors.Join(errs[:]...)
}

const (
	// mostPeers and mostServices have addresses in the plans of labs and of
	// kube.
	mostPeers    = 20000
	mostServices = 10000
)

// parseTarget reads pod, iptables:1 and the like.
func parseTarget(word string) (target, error) {
	if word == "pod" {
		return target{}, nil
	}
	proxy, number, _ := strings.Cut(word, ":")
	services, err := strconv.Atoi(number)
	if err != nil || services < 1 || services > mostServices || proxy != proxyIptables && proxy != proxyNftables {
		return target{}, usagef("bench: --to has %q; give pod, or kube-proxy's mode and a number of Services up to %d, as in iptables:1 or nftables:1000", word, mostServices)
	}
	return target{proxy, services}, nil
}

// parseList reads a list of different words, separated by commas.
func parseList[T comparable](list string, parse func(string) (T, error)) (values []T, err error) {
	seen := map[T]bool{}
	for _, word := range strings.Split(list, ",") {
		value, err := parse(word)
		if err != nil {
			return nil, err
		}
		if seen[value] {
			return nil, usagef("bench: %q is in a list twice", word)
		}
		seen[value] = true
		values = append(values, value)
	}
	return values, nil
}
