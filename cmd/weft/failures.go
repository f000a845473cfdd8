package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
)

// failures logs changes of state, not events: the first failure of a kind with
// a count, and one line when all is well again.
type failures struct {
	log *slog.Logger
	// doing is what fails, as the first word of the log lines.
	doing string
	// seen are the kinds logged since the last success.
	seen  map[string]bool
	count int
	since time.Time
}

// newFailures makes failures of one thing that is done again and again.
func newFailures(log *slog.Logger, doing string) *failures {
	return &failures{log: log, doing: doing, seen: map[string]bool{}}
}

// Note takes the result of one attempt.
func (f *failures) Note(err error) {
	if err == nil {
		f.success()
		return
	}
	if f.count == 0 {
		f.since = time.Now()
	}
	f.count++
	for _, k := range kindsOf(err) {
		if f.seen[k.name] {
			f.log.Debug(f.doing+" still fails", "attempt", f.count, "problems", k.count, "error", k.first)
			continue
		}
		f.seen[k.name] = true
		f.log.Error(f.doing+" failed, trying again", "problems", k.count, "error", k.first)
	}
}

// success ends a row of failures.
func (f *failures) success() {
	if f.count == 0 {
		return
	}
	f.log.Info(f.doing+" is well again", "failures", f.count, "after", time.Since(f.since).Round(time.Millisecond))
	f.count = 0
	clear(f.seen)
}

// kind is a group of errors with the same cause.
type kind struct {
	name  string
	count int
	first string
}

// kindsOf groups what was joined in err by cause, in order of appearance: 5,000
// peers that fail for one reason are one kind.
func kindsOf(err error) []*kind {
	var kinds []*kind
	byName := map[string]*kind{}
	for _, e := range leaves(err) {
		name := cause(e)
		k := byName[name]
		if k == nil {
			k = &kind{name: name, first: oneLine(e)}
			byName[name] = k
			kinds = append(kinds, k)
		}
		k.count++
	}
	return kinds
}

// leaves lists the errors that were joined in err; what wraps a join is left
// out.
func leaves(err error) []error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		// fmt.Errorf with several %w unwraps to several errors too, but its
		// text is one sentence; a join's is a list of lines.
		joined, ok := e.(interface{ Unwrap() []error })
		if !ok || e.Error() != joinText(joined.Unwrap()) {
			continue
		}
		var list []error
		for _, part := range joined.Unwrap() {
			list = append(list, leaves(part)...)
		}
		return list
	}
	return []error{err}
}

// joinText is what errors.Join would say.
func joinText(errs []error) string {
	texts := make([]string, len(errs))
	for i, e := range errs {
		texts[i] = e.Error()
	}
	return strings.Join(texts, "\n")
}

// cause names what lies deepest in err.
func cause(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return fmt.Sprintf("%T %v", err, err)
		}
		err = inner
	}
}

// oneLine gives an error's text without line breaks, as a log line wants it.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
