package flannel

import (
	"errors"
	"fmt"
	"strconv"
)

// faults collects what is wrong with one thing that is read, so that all of it
// is told at once.
type faults []error

// add notes a fault: what is wrong, its value, what to do.
func (f *faults) add(format string, args ...any) {
	*f = append(*f, fmt.Errorf(format, args...))
}

// err returns the faults as one error, or nil. Past the fiftieth they are
// counted only.
func (f faults) err() error {
	const most = 50
	if len(f) > most {
		more := fmt.Errorf("and %d more faults", len(f)-most)
		f = append(f[:most:most], more)
	}
	return errors.Join(f...)
}

// quote shows a text that comes from outside, its beginning if it is long.
func quote[T ~string | ~[]byte](text T) string {
	const most = 80
	if len(text) > most {
		return strconv.Quote(string(text[:most])) + "…"
	}
	return strconv.Quote(string(text))
}
