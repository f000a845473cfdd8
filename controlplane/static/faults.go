package static

import (
	"fmt"
	"slices"
	"strings"
)

// maxFaults bounds how many faults one error prints: the same slip in a
// generated file of 100,000 peers is no easier to read 100,000 times.
const maxFaults = 50

// Fault is one thing that is wrong with a file.
type Fault struct {
	// Line is where it is, counted from 1.
	Line int
	// Text names the thing, its value, and what to do.
	Text string
}

// Error holds all faults of a file.
type Error struct {
	Path   string
	Faults []Fault
}

// Error gives one fault a line, in the form path:line: text.
func (e *Error) Error() string {
	var b strings.Builder
	for i, f := range e.Faults {
		if i == maxFaults {
			fmt.Fprintf(&b, "\n%s: and %d more faults", e.Path, len(e.Faults)-i)
			break
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s:%d: %s", e.Path, f.Line, f.Text)
	}
	return b.String()
}

// faults collects what is wrong while a file is read and checked.
type faults struct {
	list []Fault
}

// add notes a fault.
func (f *faults) add(line int, format string, args ...any) {
	f.list = append(f.list, Fault{Line: line, Text: fmt.Sprintf(format, args...)})
}

// err returns the faults in the order of their lines, or nil.
func (f *faults) err(path string) error {
	if len(f.list) == 0 {
		return nil
	}
	slices.SortStableFunc(f.list, func(a, b Fault) int { return a.Line - b.Line })
	return &Error{Path: path, Faults: f.list}
}
