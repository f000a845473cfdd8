package kube

import (
	"context"
	"log/slog"
	"maps"
	"slices"

	"k8s.io/client-go/util/flowcontrol"
)

// leftOut logs which Nodes are not used, once for each reason. A node that
// writes nonsense all the time does not fill the log.
type leftOut struct {
	log    *slog.Logger
	pace   flowcontrol.RateLimiter
	faults map[string]string
	silent int
}

// Some lines at once, then one in half a minute.
const (
	linesAtOnce    = 20
	linesPerSecond = 1.0 / 30
)

// newLeftOut makes one that has nothing to tell.
func newLeftOut(log *slog.Logger) *leftOut {
	return &leftOut{log: log, pace: flowcontrol.NewTokenBucketRateLimiter(linesPerSecond, linesAtOnce)}
}

// Note takes what is wrong now, by the Nodes' names.
func (l *leftOut) Note(faults map[string]string) {
	for _, node := range slices.Sorted(maps.Keys(faults)) {
		if l.faults[node] != faults[node] {
			l.line(slog.LevelWarn, "something of a Node is not used", "node", node, "reason", faults[node])
		}
	}
	for _, node := range slices.Sorted(maps.Keys(l.faults)) {
		if faults[node] == "" {
			l.line(slog.LevelInfo, "the Node is used again, or gone", "node", node)
		}
	}
	l.faults = faults
}

// line logs, unless it was much lately.
func (l *leftOut) line(level slog.Level, text string, attrs ...any) {
	if !l.pace.TryAccept() {
		l.silent++
		l.log.Debug(text, attrs...)
		return
	}
	if l.silent > 0 {
		attrs = append(attrs, "linesLeftOut", l.silent)
		l.silent = 0
	}
	l.log.Log(context.Background(), level, text, attrs...)
}
