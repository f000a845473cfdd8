package static

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-net/weft/dataplane/state"
)

// sink remembers what a store hands over.
type sink struct {
	mu     sync.Mutex
	states []state.State
	health []error
}

func (s *sink) Deliver(st state.State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.states = append(s.states, st)
}

func (s *sink) Health(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.health = append(s.health, err)
}

// vni is the VNI of the state delivered last, by which these tests tell states
// apart.
func (s *sink) vni() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.states) == 0 {
		return 0
	}
	return s.states[len(s.states)-1].VNI
}

// delivered is how many states came.
func (s *sink) delivered() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.states)
}

// broken is the health told last.
func (s *sink) broken() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.health) == 0 || s.health[len(s.health)-1] == nil {
		return ""
	}
	return s.health[len(s.health)-1].Error()
}

// withVNI is the example with another VNI.
func withVNI(tb testing.TB, vni string) []byte {
	tb.Helper()
	return []byte(strings.Replace(string(example(tb)), "vni: 1 ", "vni: "+vni+" ", 1))
}

func mustWrite(tb testing.TB, path string, data []byte) {
	tb.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		tb.Fatal(err)
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// replace writes a new file and renames it over path, as careful writers do.
func replace(tb testing.TB, path string, data []byte) {
	tb.Helper()
	mustWrite(tb, path+".tmp", data)
	must(tb, os.Rename(path+".tmp", path))
}

func mustOpen(tb testing.TB, path string) *Store {
	tb.Helper()
	s, err := Open(path, slog.New(slog.DiscardHandler))
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// eventually waits for ok in real time: inotify knows no other.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	tb.Fatalf("not within ten seconds: %s", what)
}

// start runs a store whose poll is out of the game unless poll is short.
func start(tb testing.TB, path string, poll time.Duration) *sink {
	tb.Helper()
	s := mustOpen(tb, path)
	s.timing = timing{Quiet: 10 * time.Millisecond, Patience: time.Second, Poll: poll}
	ctx, stop := context.WithCancel(tb.Context())
	got := &sink{}
	var done sync.WaitGroup
	done.Go(func() {
		if err := s.Run(ctx, got); err != nil {
			tb.Errorf("Run: %v", err)
		}
	})
	tb.Cleanup(func() {
		stop()
		done.Wait()
	})
	eventually(tb, "the first state", func() bool { return got.delivered() == 1 })
	return got
}

func TestBrokenAtStart(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	if _, err := Open(filepath.Join(dir, "none.yaml"), log); err == nil || !strings.Contains(err.Error(), "is missing") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Open(dir, log); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("directory: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	must(t, syscall.Mkfifo(fifo, 0o600))
	if _, err := Open(fifo, log); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("FIFO: %v", err)
	}
	path := filepath.Join(dir, "weft.yaml")
	mustWrite(t, path, withVNI(t, "0"))
	if _, err := Open(path, log); err == nil || !strings.Contains(err.Error(), path+":3: vni") {
		t.Errorf("broken file: %v", err)
	}
	big := filepath.Join(dir, "big.yaml")
	mustWrite(t, big, nil)
	must(t, os.Truncate(big, MaxSize+100))
	if _, err := Open(big, log); err == nil || !strings.Contains(err.Error(), "the limit is") {
		t.Errorf("big file: %v", err)
	}
}

func TestFileWrittenInPlace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weft.yaml")
	mustWrite(t, path, example(t))
	got := start(t, path, time.Hour)
	mustWrite(t, path, withVNI(t, "2"))
	eventually(t, "the new state", func() bool { return got.vni() == 2 })
}

func TestFileReplacedAgainAndAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weft.yaml")
	mustWrite(t, path, example(t))
	got := start(t, path, time.Hour)
	for _, vni := range []string{"2", "3", "4"} {
		replace(t, path, withVNI(t, vni))
		eventually(t, "the state with VNI "+vni, func() bool { return got.vni() == uint32(vni[0]-'0') })
	}
}

func TestBrokenFileKeepsTheStateAndRecovers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weft.yaml")
	mustWrite(t, path, example(t))
	got := start(t, path, time.Hour)
	replace(t, path, withVNI(t, "0"))
	eventually(t, "the fault", func() bool { return strings.Contains(got.broken(), ":3: vni") })
	if got.delivered() != 1 {
		t.Error("a broken file was delivered")
	}
	replace(t, path, withVNI(t, "2"))
	eventually(t, "the new state", func() bool { return got.vni() == 2 && got.broken() == "" })
}

func TestFileMissingForAWhile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weft.yaml")
	mustWrite(t, path, example(t))
	got := start(t, path, time.Hour)
	must(t, os.Remove(path))
	eventually(t, "the fault", func() bool { return strings.Contains(got.broken(), "is missing") })
	mustWrite(t, path, example(t))
	eventually(t, "health", func() bool { return got.broken() == "" })
	if got.delivered() != 1 {
		t.Error("the same content was delivered again")
	}
	mustWrite(t, path, withVNI(t, "3"))
	eventually(t, "the new state", func() bool { return got.vni() == 3 })
}

// As a kubelet does it: weft.yaml → ..data/weft.yaml, ..data → ..1, and ..data
// is renamed over.
func TestConfigMapSwapped(t *testing.T) {
	dir := t.TempDir()
	generation := func(name, vni string) {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		mustWrite(t, filepath.Join(dir, name, "weft.yaml"), withVNI(t, vni))
		must(t, os.Symlink(name, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	generation("..1", "1")
	path := filepath.Join(dir, "weft.yaml")
	must(t, os.Symlink("..data/weft.yaml", path))
	got := start(t, path, time.Hour)
	generation("..2", "2")
	must(t, os.RemoveAll(filepath.Join(dir, "..1")))
	eventually(t, "generation 2", func() bool { return got.vni() == 2 })
	generation("..3", "3")
	must(t, os.RemoveAll(filepath.Join(dir, "..2")))
	eventually(t, "generation 3", func() bool { return got.vni() == 3 && got.broken() == "" })
}

func TestLinkToAnotherDirectory(t *testing.T) {
	there := filepath.Join(t.TempDir(), "there.yaml")
	mustWrite(t, there, example(t))
	path := filepath.Join(t.TempDir(), "weft.yaml")
	must(t, os.Symlink(there, path))
	got := start(t, path, time.Hour)
	replace(t, there, withVNI(t, "2"))
	eventually(t, "the new state", func() bool { return got.vni() == 2 })
}

func TestDirectoryGoneAndBack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	must(t, os.Mkdir(dir, 0o755))
	path := filepath.Join(dir, "weft.yaml")
	mustWrite(t, path, example(t))
	got := start(t, path, 20*time.Millisecond)
	must(t, os.RemoveAll(dir))
	eventually(t, "the fault", func() bool { return strings.Contains(got.broken(), "is missing") })
	must(t, os.Mkdir(dir, 0o755))
	mustWrite(t, path, withVNI(t, "2"))
	eventually(t, "the new state", func() bool { return got.vni() == 2 })
}

// fakeEvents runs a store on events of the test's own, in a bubble.
func fakeEvents(t *testing.T, test func(path string, got *sink, events chan<- struct{})) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(dir, "weft.yaml")
		mustWrite(t, path, example(t))
		s := mustOpen(t, path)
		s.timing = defaultTiming()
		ctx, stop := context.WithCancel(t.Context())
		events := make(chan struct{}, 1)
		got := &sink{}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.run(ctx, got, events)
		}()
		synctest.Wait()
		test(path, got, events)
		stop()
		<-done
	})
}

func TestWriterInPiecesIsReadOnceDone(t *testing.T) {
	fakeEvents(t, func(path string, got *sink, events chan<- struct{}) {
		text := withVNI(t, "2")
		for cut := 10; cut < len(text); cut += len(text) / 8 {
			mustWrite(t, path, text[:cut])
			events <- struct{}{}
			time.Sleep(50 * time.Millisecond)
		}
		mustWrite(t, path, text)
		events <- struct{}{}
		time.Sleep(150 * time.Millisecond)
		synctest.Wait()
		if got.vni() != 2 || slices.ContainsFunc(got.health, func(err error) bool { return err != nil }) {
			t.Errorf("VNI %d, health %v", got.vni(), got.health)
		}
	})
}

func TestEventsWithoutEndDoNotHideAChange(t *testing.T) {
	fakeEvents(t, func(path string, got *sink, events chan<- struct{}) {
		replace(t, path, withVNI(t, "2"))
		for range 45 {
			events <- struct{}{}
			time.Sleep(50 * time.Millisecond)
		}
		synctest.Wait()
		if got.vni() != 2 {
			t.Error("the change was not read within the store's patience")
		}
	})
}

func TestPollFindsWhatNoEventTells(t *testing.T) {
	fakeEvents(t, func(path string, got *sink, _ chan<- struct{}) {
		replace(t, path, withVNI(t, "2"))
		time.Sleep(11 * time.Second)
		synctest.Wait()
		if got.vni() != 2 {
			t.Error("the poll did not find the change")
		}
	})
}

func TestFileTouchedIsNotDeliveredAgain(t *testing.T) {
	fakeEvents(t, func(path string, got *sink, events chan<- struct{}) {
		replace(t, path, append(example(t), "# a comment\n"...))
		events <- struct{}{}
		time.Sleep(time.Second)
		synctest.Wait()
		if got.delivered() != 1 {
			t.Errorf("%d states were delivered", got.delivered())
		}
	})
}
