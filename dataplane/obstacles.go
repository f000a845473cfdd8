//go:build linux

package dataplane

import (
	"log/slog"
	"slices"
	"strings"
	"sync"
)

// obstacles are what is in the way of express, by who found it. Whoever looks
// says all that it finds each time; nothing found takes its entries away.
type obstacles struct {
	log *slog.Logger
	// quiet is when nobody wants express.
	quiet bool
	// changed is called when something has changed.
	changed func()

	mu    sync.Mutex
	found [finders][]string
	told  string
}

// Who finds obstacles.
const (
	findsProgram   = iota // the accelerator
	findsConntrack        // its settings
	findsWatch            // following the host's rules
	findsPods             // looking for pods
	findsForeign          // what express packets would bypass
	findsRules            // rules that no witness can stand for
	finders
)

// set replaces what a finder has found.
func (o *obstacles) set(finder int, found ...string) {
	if o.replace(finder, found) && o.changed != nil {
		o.changed()
	}
}

func (o *obstacles) replace(finder int, found []string) (changed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.found[finder] = slices.DeleteFunc(found, func(s string) bool { return s == "" })
	now := strings.Join(o.all(), "; ")
	switch {
	case now == o.told:
		return false
	case o.quiet:
	case now == "":
		o.log.Info("express is possible again")
	default:
		o.log.Warn("express is held back; base and kernel path carry on", "reason", now)
	}
	o.told = now
	return true
}

// List lists all that is in the way.
func (o *obstacles) List() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.all()
}

func (o *obstacles) all() []string { return slices.Concat(o.found[:]...) }
