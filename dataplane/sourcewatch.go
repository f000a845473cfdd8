//go:build linux

package dataplane

import (
	"log/slog"
	"time"

	"github.com/weft-net/weft/dataplane/ebpf"
)

// sourceInterval is the least time between two log lines about senders that
// fail the source check.
const sourceInterval = time.Minute

// sourceWatch logs, at a limited rate, that packets fail the source check.
type sourceWatch struct {
	passed, dropped uint64
	last            time.Time
}

func (w *sourceWatch) report(log *slog.Logger, view *ebpf.View) {
	if time.Since(w.last) < sourceInterval {
		return
	}
	passed, dropped, err := view.SourceFailures()
	if err != nil || (passed == w.passed && dropped == w.dropped) {
		return
	}
	attrs := []any{"observed", passed - w.passed, "dropped", dropped - w.dropped}
	if suspects, err := view.Suspects(); err == nil && len(suspects) > 0 {
		s := suspects[0]
		attrs = append(attrs, "reason", s.Reason, "outerSource", s.Outer, "innerSource", s.Inner)
	}
	log.Warn("packets fail the source check (weft status lists the senders)", attrs...)
	w.passed, w.dropped, w.last = passed, dropped, time.Now()
}
