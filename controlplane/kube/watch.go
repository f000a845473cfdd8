package kube

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
)

// follow keeps nodes as the API has them, until ctx ends. The first look and
// those after a gap come as a watch that begins with all Nodes, or as a list
// from API servers that refuse that; what is gone meanwhile
// is then gone from nodes too. What fails is noted in answers and tried again.
//
// client-go's informers would keep every Node a second time, in a queue.
func follow(ctx context.Context, c *client, nodes *nodes, answers *answers, backoff wait.Backoff) {
	ctx = klog.NewContext(ctx, c.logger)
	cache.NewReflectorWithOptions(source{c, answers}, &corev1.Node{}, nodes, cache.ReflectorOptions{
		Name: "nodes", Logger: &c.logger, Clock: impatient{done: ctx}, Backoff: &backoff,
	}).RunWithContext(ctx)
}

// source asks the API for Nodes, and notes how it answers.
type source struct {
	client  *client
	answers *answers
}

var (
	_ cache.ListerWatcher            = source{}
	_ cache.ListerWatcherWithContext = source{}
)

// ListWithContext implements cache.ListerWithContext.
func (s source) ListWithContext(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	nodes, err := s.client.list(ctx, options)
	s.note(ctx, err)
	return nodes, err
}

// WatchWithContext implements cache.WatcherWithContext.
func (s source) WatchWithContext(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	w, err := s.client.watch(ctx, options)
	s.note(ctx, err)
	return w, err
}

// note takes an answer. What fails because we are about to stop is not one.
func (s source) note(ctx context.Context, err error) {
	if ctx.Err() == nil {
		s.answers.Note(err)
	}
}

// List implements cache.Lister, which reflectors don't call where there is
// ListWithContext.
func (s source) List(options metav1.ListOptions) (runtime.Object, error) {
	return s.ListWithContext(context.Background(), options)
}

// Watch implements cache.Watcher, likewise.
func (s source) Watch(options metav1.ListOptions) (watch.Interface, error) {
	return s.WatchWithContext(context.Background(), options)
}

// impatient is the clock of a reflector, which waits up to a minute for an API
// that is away and does not look up meanwhile: it waits no longer than until
// done ends.
type impatient struct {
	clock.RealClock
	done context.Context
}

// After implements clock.Clock.
func (i impatient) After(d time.Duration) <-chan time.Time {
	due := make(chan time.Time, 1)
	fire := sync.OnceFunc(func() { due <- time.Now() })
	forget := context.AfterFunc(i.done, fire)
	time.AfterFunc(d, func() { fire(); forget() })
	return due
}

// TakeLogs has log take what client-go logs of its own accord, where no call of ours
// brings a logger along: when it reads a token again, for example. It would go to
// stderr in a form of its own. For a program to call before its first Open.
func TakeLogs(log *slog.Logger) {
	klog.SetLoggerWithOptions(quietLogger(log), klog.ContextualLogger(true))
}

// quietLogger is a logger for client-go.
func quietLogger(log *slog.Logger) klog.Logger {
	return logr.FromSlogHandler(quiet{log.With("part", "client-go").Handler()})
}

// quiet logs for debugging only what client-go logs: what matters of it is
// Health.
type quiet struct{ slog.Handler }

// Enabled implements slog.Handler.
func (q quiet) Enabled(ctx context.Context, _ slog.Level) bool {
	return q.Handler.Enabled(ctx, slog.LevelDebug)
}

// Handle implements slog.Handler.
func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	if !q.Enabled(ctx, slog.LevelDebug) { // logr does not ask before it logs an error
		return nil
	}
	r.Level = slog.LevelDebug
	return q.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }

// WithGroup implements slog.Handler.
func (q quiet) WithGroup(name string) slog.Handler { return quiet{q.Handler.WithGroup(name)} }
