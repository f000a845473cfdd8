package main

import (
	"strings"
	"testing"
)

// stream is `go test -json` of a package with a test of each result.
const stream = `
{"Action":"run","Package":"a","Test":"TestGood"}
{"Action":"output","Package":"a","Test":"TestGood","Output":"=== RUN   TestGood\n"}
{"Action":"pass","Package":"a","Test":"TestGood"}
{"Action":"output","Package":"a","Test":"TestBad","Output":"    a_test.go:7: not so\n"}
{"Action":"fail","Package":"a","Test":"TestBad"}
{"Action":"output","Package":"a","Test":"TestRoot","Output":"    a_test.go:9: needs root\n"}
{"Action":"skip","Package":"a","Test":"TestRoot"}
{"Action":"output","Package":"a","Output":"FAIL\ta\t0.01s\n"}
{"Action":"fail","Package":"a"}
`

func read(t *testing.T, stream string, r rules) (out string, good bool, again string) {
	t.Helper()
	var b strings.Builder
	tally := tally{out: &b}
	if err := tally.read(strings.NewReader(strings.TrimPrefix(stream, "\n"))); err != nil {
		t.Fatal(err)
	}
	good = tally.report(r)
	return b.String(), good, string(tally.again(r))
}

func TestEachResultOnce(t *testing.T) {
	out, good, _ := read(t, stream, rules{})
	want := `    a_test.go:7: not so
FAIL	a	0.01s
skipped: a TestRoot: needs root
failed: a TestBad
1 passed, 1 failed, 1 skipped
`
	if out != want || good {
		t.Errorf("good: %v, output:\n%s\nwant\n%s", good, out, want)
	}
}

func TestVerdicts(t *testing.T) {
	const (
		pass     = `{"Action":"pass","Package":"p@6.1","Test":"TestX"}` + "\n"
		skipHere = `{"Action":"output","Package":"p@6.12","Test":"TestX","Output":"x_test.go:1: needs root\n"}
{"Action":"skip","Package":"p@6.12","Test":"TestX"}` + "\n"
		skipKernel = `{"Action":"output","Package":"p","Test":"TestX","Output":"x_test.go:1: this kernel lacks dummy\n"}
{"Action":"skip","Package":"p","Test":"TestX"}` + "\n"
		slow = `{"Action":"pass","Package":"p","Test":"TestX/inside","Elapsed":30}
{"Action":"pass","Package":"p","Test":"TestX","Elapsed":12.3}` + "\n"
		another  = `{"Action":"pass","Package":"p","Test":"TestY"}` + "\n"
		crashed  = `{"Action":"fail","Package":"q"}` + "\n"
		unbuilt  = `{"ImportPath":"q","Action":"build-output","Output":"undefined: x\n"}` + "\n" + `{"Action":"fail","Package":"q","FailedBuild":"q"}` + "\n"
		nothing  = `{"Action":"skip","Package":"no/test/files"}` + "\n"
		foreign  = "make: not JSON\n"
		mustRun  = true
		anywhere = true
	)
	for _, tt := range []struct {
		situation string
		stream    string
		rules     rules
		good      bool
		says      string
	}{
		{"a test that took long", another + slow, rules{}, true, "slow: p TestX 12 s\n"},
		{"all passed", pass, rules{mustRun, anywhere}, true, "1 passed, 0 failed, 0 skipped"},
		{"a skip without a rule", pass + skipHere, rules{}, true, "1 passed, 0 failed, 1 skipped"},
		{"a skip that had to run", another + skipHere, rules{mustRun: true}, false, "it had to run"},
		{"a skip for lack of the kernel", another + skipKernel, rules{mustRun: true}, true, "this kernel lacks dummy"},
		{"a skip that passed on another kernel", pass + skipHere, rules{eachSomewhere: true}, true, "needs root"},
		{"a skip that passed nowhere", another + skipHere, rules{eachSomewhere: true}, false, "it passed on no kernel"},
		{"a package that crashed", pass + crashed, rules{}, false, "1 passed, 1 failed, 0 skipped"},
		{"a package that is not built", pass + unbuilt, rules{}, false, "undefined: x"},
		{"no test at all", nothing, rules{}, false, "no test ran"},
		{"a line of somebody else", foreign + pass, rules{}, true, "make: not JSON"},
	} {
		t.Run(tt.situation, func(t *testing.T) {
			out, good, _ := read(t, tt.stream, tt.rules)
			if good != tt.good || !strings.Contains(out, tt.says) {
				t.Errorf("good: %v, output:\n%s\nwant %v with %q", good, out, tt.good, tt.says)
			}
		})
	}
}

// What failed may run once more where nothing but tests failed.
func TestAgain(t *testing.T) {
	const (
		inner = `{"Action":"fail","Package":"a","Test":"TestX/inner"}` + "\n"
		outer = `{"Action":"fail","Package":"a","Test":"TestX"}` + "\n"
		told  = `{"Action":"output","Package":"a","Output":"FAIL\n"}` + "\n"
		ended = `{"Action":"output","Package":"a","Output":"FAIL\ta\t0.01s\n"}` + "\n" + `{"Action":"fail","Package":"a"}` + "\n"
		cut   = `{"Action":"output","Package":"a","Test":"TestX","Output":"panic: test timed out\n"}` + "\n"
		skip  = `{"Action":"skip","Package":"b","Test":"TestY"}` + "\n"
		other = `{"Action":"fail","Package":"b"}` + "\n"
	)
	for _, tt := range []struct {
		situation, stream string
		rules             rules
		again             string
	}{
		{"a test failed", inner + outer + told + ended, rules{}, "a TestX\n"},
		{"all passed", strings.ReplaceAll(outer, "fail", "pass"), rules{}, ""},
		{"not all tests came to run", inner + outer + cut + ended, rules{}, ""},
		{"another package is broken", outer + told + ended + other, rules{}, ""},
		{"a skip that had to run", outer + told + ended + skip, rules{mustRun: true}, ""},
		{"a skip that may be", outer + told + ended + skip, rules{}, "a TestX\n"},
	} {
		t.Run(tt.situation, func(t *testing.T) {
			if _, _, again := read(t, tt.stream, tt.rules); again != tt.again {
				t.Errorf("may run once more:\n%s\nwant\n%s", again, tt.again)
			}
		})
	}
}
