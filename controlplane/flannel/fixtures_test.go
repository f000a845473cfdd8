package flannel

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

// mustRead returns a file of testdata.
func mustRead(tb testing.TB, name string) []byte {
	tb.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// mustCases returns the cases of a file of testdata.
func mustCases[T any](tb testing.TB, name string) []T {
	tb.Helper()
	var cases []T
	if err := json.Unmarshal(mustRead(tb, name), &cases); err != nil {
		tb.Fatal(err)
	}
	if len(cases) == 0 {
		tb.Fatalf("%s has no cases", name)
	}
	return cases
}

// prefix and addr read what flannel has written; "" is the zero value.
func prefix(s string) netip.Prefix {
	if s == "" {
		return netip.Prefix{}
	}
	return netip.MustParsePrefix(s)
}

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

// differences are the cases of a table in which we differ from flannel, each
// with the reason. A case that does not differ must not be in it.
type differences map[string]string

// agree compares the answers for one case.
func (d differences) agree(t *testing.T, name string, flannel, ours bool, err error) bool {
	t.Helper()
	reason, differ := d[name]
	switch {
	case flannel == ours && differ:
		t.Errorf("%s: agrees with flannel, against %q", name, reason)
	case flannel != ours && !differ:
		t.Errorf("%s: flannel accepts it: %v, we: %v (%v)", name, flannel, ours, err)
	}
	return flannel && ours
}

// unused finds entries that name no case.
func (d differences) unused(t *testing.T, names map[string]bool) {
	t.Helper()
	for name := range d {
		if !names[name] {
			t.Errorf("there is no case %q", name)
		}
	}
}
