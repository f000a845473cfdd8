//go:build linux

package dataplane

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"testing"
)

func TestObstaclesAreToldOnceAndWhenTheyGo(t *testing.T) {
	var text bytes.Buffer
	calls := 0
	o := &obstacles{log: slog.New(slog.NewTextHandler(&text, nil)), changed: func() { calls++ }}

	o.set(findsConntrack, "")
	if calls != 0 || text.Len() > 0 {
		t.Errorf("nothing found was told: %s", &text)
	}
	for range 3 {
		o.set(findsConntrack, "conntrack is not there")
	}
	o.set(findsForeign, "one", "two")
	if want := []string{"conntrack is not there", "one", "two"}; !slices.Equal(o.List(), want) {
		t.Errorf("found %q, want %q", o.List(), want)
	}
	o.set(findsConntrack)
	o.set(findsForeign)
	if len(o.List()) > 0 {
		t.Errorf("%q is still there", o.List())
	}
	if calls != 4 {
		t.Errorf("told of %d changes, want 4", calls)
	}
	if n := strings.Count(text.String(), "express is held back"); n != 3 {
		t.Errorf("logged %d times that express is held back, want 3:\n%s", n, &text)
	}
	if n := strings.Count(text.String(), "express is possible again"); n != 1 {
		t.Errorf("logged %d times that express is possible again, want once:\n%s", n, &text)
	}
}
