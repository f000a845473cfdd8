// Tally reads the JSON of `go test -json`, prints much of what go test would
// print, then what failed and what took long, and ends with one line: N passed,
// N failed, N skipped.
//
//	go test -json ./... | tally -must-run -failed list
//	go test -json ./... | tally -each-somewhere
//
// A test that is skipped where it could have run is a hole nobody sees. With
// -must-run a skip is a failure, unless its reason says that "this kernel" has
// not what it takes. Those tests are for another kernel: with -each-somewhere,
// where packages are named package@kernel, a test that one kernel skipped
// must have passed on another.
//
// -failed names a file for what may be run once more: the tests that failed, a
// line "package name" each, without the tests inside of them. It is empty where
// all is well, and where anything else is wrong.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

func main() {
	var r rules
	failed := flag.String("failed", "", "a `file` to list the failed tests in, if nothing else is wrong")
	flag.BoolVar(&r.mustRun, "must-run", false, `skipped tests are failures, unless their reason is what "this kernel" has not`)
	flag.BoolVar(&r.eachSomewhere, "each-somewhere", false, "a test skipped in package@kernel must have passed at another kernel")
	flag.Parse()
	t := tally{out: os.Stdout}
	if err := t.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "tally:", err)
		os.Exit(1)
	}
	good := t.report(r)
	if *failed != "" {
		if err := os.WriteFile(*failed, t.again(r), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "tally:", err)
			os.Exit(1)
		}
	}
	if !good {
		os.Exit(1)
	}
}

// rules say when a skipped test is a failure.
type rules struct {
	mustRun       bool
	eachSomewhere bool
}

// thisKernel is how a skip's reason says that another kernel can run it.
const thisKernel = "this kernel "

// event is a line of `go test -json`; see `go doc test2json`.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of a build, in place of Package
	Test        string // empty: the event is the package's
	Output      string
	Elapsed     float64 // seconds
	FailedBuild string
}

// test is one test of one package; with an empty name, the package itself.
type test struct{ pkg, name string }

func (t test) String() string { return t.pkg + " " + t.name }

// at splits package@kernel.
func (t test) at() (pkg, kernel string) {
	pkg, kernel, _ = strings.Cut(t.pkg, "@")
	return pkg, kernel
}

type tally struct {
	out     io.Writer
	running map[test]*strings.Builder // what they printed so far
	builds  map[string]*strings.Builder
	passed  []test
	failed  []test
	skipped map[test]string  // with what they printed
	took    map[test]float64 // seconds, of tests that are inside of no other
	// broken is set when a package failed before all of its tests had run, or
	// for another reason than them.
	broken bool
}

func (t *tally) read(in io.Reader) error {
	t.running = map[test]*strings.Builder{}
	t.builds = map[string]*strings.Builder{}
	t.skipped = map[test]string{}
	t.took = map[test]float64{}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) == nil && e.Action != "" {
				t.note(e)
			} else {
				fmt.Fprint(t.out, line) // not of the stream: hide nothing
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// note takes one event into the account.
func (t *tally) note(e event) {
	this := test{e.Package, e.Test}
	if ended := e.Action == "pass" || e.Action == "fail"; ended && this.name != "" && !strings.Contains(this.name, "/") {
		t.took[this] = e.Elapsed
	}
	switch e.Action {
	case "build-output":
		grow(t.builds, e.ImportPath, e.Output)
	case "output":
		grow(t.running, this, e.Output)
	case "pass":
		if this.name != "" {
			t.passed = append(t.passed, this)
			delete(t.running, this)
			return
		}
		t.end(this)
		fmt.Fprintf(t.out, "ok  \t%s\t%.2fs\n", this.pkg, e.Elapsed)
	case "skip":
		if this.name != "" {
			t.skipped[this] = t.end(this)
			return
		}
		t.end(this) // no test files
	case "fail":
		if this.name != "" {
			t.failed = append(t.failed, this)
			fmt.Fprint(t.out, t.end(this))
			return
		}
		t.failPackage(this, e.FailedBuild)
	}
}

// grow adds to the text of a key.
func grow[K comparable](texts map[K]*strings.Builder, key K, more string) {
	if texts[key] == nil {
		texts[key] = &strings.Builder{}
	}
	texts[key].WriteString(more)
}

// failPackage shows what a package printed. Where no test of it failed, it is
// the package that did: it was not built, panicked or ran out of time.
func (t *tally) failPackage(pkg test, build string) {
	if text := t.builds[build]; text != nil {
		fmt.Fprint(t.out, text)
	}
	for _, left := range slices.Collect(maps.Keys(t.running)) {
		if left.pkg == pkg.pkg && left.name != "" {
			fmt.Fprint(t.out, t.end(left))
		}
	}
	text := t.end(pkg)
	fmt.Fprint(t.out, text)
	if !slices.ContainsFunc(t.failed, func(f test) bool { return f.pkg == pkg.pkg }) {
		t.failed = append(t.failed, pkg)
	}
	// What a test binary says at its end, if it comes to that.
	if !strings.HasPrefix(text, "FAIL\n") && !strings.Contains(text, "\nFAIL\n") {
		t.broken = true
	}
}

// end forgets a test's output and returns it.
func (t *tally) end(which test) string {
	text := t.running[which]
	delete(t.running, which)
	if text == nil {
		return ""
	}
	return text.String()
}

// report prints the account and tells whether it is good.
func (t *tally) report(r rules) bool {
	good := len(t.failed) == 0
	for _, s := range slices.SortedFunc(maps.Keys(t.skipped), func(a, b test) int {
		return strings.Compare(a.String(), b.String())
	}) {
		verdict := t.judge(s, r)
		if verdict != "" {
			good = false
			verdict = " — " + verdict
		}
		fmt.Fprintf(t.out, "skipped: %s: %s%s\n", s, reason(t.skipped[s]), verdict)
	}
	for _, f := range t.failed {
		fmt.Fprintf(t.out, "failed: %s\n", f)
	}
	for _, one := range t.slowest() {
		fmt.Fprintf(t.out, "slow: %s %.0f s\n", one, t.took[one])
	}
	if len(t.passed)+len(t.failed) == 0 {
		fmt.Fprintln(t.out, "no test ran")
		good = false
	}
	fmt.Fprintf(t.out, "%d passed, %d failed, %d skipped\n", len(t.passed), len(t.failed), len(t.skipped))
	return good
}

// slowest are the ten tests that took longest, of those that took ten seconds.
func (t *tally) slowest() []test {
	all := slices.SortedFunc(maps.Keys(t.took), func(a, b test) int { return cmp.Compare(t.took[b], t.took[a]) })
	all = all[:min(len(all), 10)]
	return slices.DeleteFunc(all, func(one test) bool { return t.took[one] < 10 })
}

// judge says what is wrong with a skip, or nothing.
func (t *tally) judge(s test, r rules) string {
	if r.mustRun && !strings.Contains(t.skipped[s], thisKernel) {
		return "it had to run"
	}
	if r.eachSomewhere && !t.passedElsewhere(s) {
		return "it passed on no kernel"
	}
	return ""
}

// again lists what may be run once more.
func (t *tally) again(r rules) (list []byte) {
	broken := t.broken
	for skipped := range t.skipped {
		broken = broken || t.judge(skipped, r) != ""
	}
	if broken {
		return nil
	}
	for _, f := range t.failed {
		if !strings.Contains(f.name, "/") {
			list = fmt.Appendln(list, f)
		}
	}
	return list
}

func (t *tally) passedElsewhere(s test) bool {
	pkg, kernel := s.at()
	return slices.ContainsFunc(t.passed, func(p test) bool {
		otherPkg, otherKernel := p.at()
		return p.name == s.name && otherPkg == pkg && otherKernel != kernel
	})
}

// reason is what a skipped test gave as reason, without go test's marks and
// the place in the source.
func reason(output string) string {
	var text []string
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") {
			continue
		}
		if place, rest, ok := strings.Cut(line, ": "); ok && strings.Contains(place, ".go:") {
			line = rest
		}
		text = append(text, line)
	}
	if len(text) == 0 {
		return "no reason given"
	}
	return strings.Join(text, " ")
}
