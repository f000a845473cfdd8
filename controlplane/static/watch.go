package static

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// watch nudges when a path may lead to other content than before.
//
// It watches directories, not the file: an atomic rename replaces the file, and
// a watch on it would stay with the old one. A path can lead through symbolic
// links, as Kubernetes mounts a ConfigMap (weft.yaml → ..data/weft.yaml, and
// ..data is swapped), so each link's directory is watched too.
type watch struct {
	path   string
	log    *slog.Logger
	notify *fsnotify.Watcher // nil when the kernel has no more of them
	events chan struct{}
}

// newWatch starts watching; directories that are not there are tried again now
// and then. Without inotify it never nudges, says so, and leaves the work to
// the poll.
func newWatch(path string, again time.Duration, log *slog.Logger) *watch {
	w := &watch{path: path, log: log, events: make(chan struct{}, 1)}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("cannot watch the config file; looking at it now and then instead", "path", path, "error", err)
		return w
	}
	w.notify = notify
	w.follow()
	go w.run(again)
	return w
}

// Events delivers nudges; many make one.
func (w *watch) Events() <-chan struct{} { return w.events }

// Close ends the watch.
func (w *watch) Close() {
	if w.notify != nil {
		w.notify.Close()
	}
}

// run turns events about the path into nudges until the watch is closed.
func (w *watch) run(again time.Duration) {
	retry := time.NewTicker(again)
	defer retry.Stop()
	for {
		select {
		case <-retry.C:
			w.follow()
			continue
		case event, ok := <-w.notify.Events:
			if !ok {
				return
			}
			if !w.concerns(event.Name) {
				continue
			}
		case err, ok := <-w.notify.Errors:
			if !ok {
				return
			}
			// An overrun has lost events, so it counts as one.
			w.log.Debug("watching the config file", "error", err)
		}
		w.follow()
		select {
		case w.events <- struct{}{}:
		default:
		}
	}
}

// follow watches the directories on the way to the file, and no others.
func (w *watch) follow() {
	want := map[string]bool{}
	for _, hop := range hops(w.path) {
		want[filepath.Dir(hop)] = true
	}
	for _, dir := range w.notify.WatchList() {
		if !want[dir] {
			_ = w.notify.Remove(dir)
		}
	}
	for dir := range want {
		if err := w.notify.Add(dir); err != nil {
			w.log.Debug("cannot watch a directory", "path", dir, "error", err)
		}
	}
}

// concerns tells whether name is the file, one of the links to it, or a
// directory on the way.
func (w *watch) concerns(name string) bool {
	for _, hop := range hops(w.path) {
		if hop == name || filepath.Dir(hop) == name || strings.HasPrefix(hop, name+string(filepath.Separator)) {
			return true
		}
	}
	return false
}

// hops lists path and every path that its symbolic links lead to, as far as
// they exist.
func hops(path string) []string {
	const most = 40 // as the kernel
	list := []string{path}
	for len(list) < most {
		target, err := os.Readlink(path)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
		list = append(list, path)
	}
	return list
}
