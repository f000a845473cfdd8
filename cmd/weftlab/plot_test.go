//go:build linux

package main

import (
	"bytes"
	"encoding/csv"
	"encoding/xml"
	"errors"
	"io"
	"strconv"
	"strings"
	"testing"

	"github.com/weft-net/weft/test/lab"
)

// measuredBench is a bench that has measured two tests in four modes and two
// settings, three times each: base is twice as fast as flanneld in TCP_RR and
// half as fast in TCP_STREAM.
func measuredBench(t *testing.T) *bench {
	t.Helper()
	chosen, err := parseModes("host,flanneld,kernel,base")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := parseTests("TCP_RR,TCP_STREAM")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{
		options: benchOptions{
			modes: chosen, tests: tests, baselines: []string{"flanneld", "host"},
			settings: []setting{{lab.Virtual, 1, 1, target{}, noJunk}, {lab.Wire, 2, 5000, target{proxyNftables, 1000}, noJunk}},
		},
		facts: []fact{{"kernel", "6.18"}, {"CPU", `2 x <Fast> & "Cheap"`}},
	}
	rates := map[string][]float64{
		"host": {300, 9}, "flanneld": {100, 10}, "kernel": {101, 10}, "base": {200, 5},
	}
	counted := map[string]counters{"kernel": {kernel: 50}, "base": {express: 6, base: 2, kernel: 2}}
	for _, s := range b.options.settings {
		for round := 1; round <= 3; round++ {
			for i, test := range tests {
				for _, m := range chosen {
					rate := rates[m.name][i]
					if m.name == "kernel" {
						rate += float64(round) // so that there is an interval
					}
					b.samples = append(b.samples, sample{setting: s, test: test, mode: m.name, round: round, rate: rate, counted: counted[m.name]})
				}
			}
		}
	}
	return b
}

// svgBars reads a drawing: the bars that have a title, with their lengths.
func svgBars(t *testing.T, drawing []byte) map[string][]float64 {
	t.Helper()
	bars := map[string][]float64{}
	var length float64
	inTitle := false
	for d := xml.NewDecoder(bytes.NewReader(drawing)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return bars
		}
		if err != nil {
			t.Fatalf("this is no XML: %v\n%s", err, drawing)
		}
		switch e := token.(type) {
		case xml.StartElement:
			inTitle = e.Name.Local == "title"
			for _, a := range e.Attr {
				if e.Name.Local == "rect" && a.Name.Local == "width" {
					if length, err = strconv.ParseFloat(a.Value, 64); err != nil {
						t.Fatal(err)
					}
				}
			}
		case xml.CharData:
			if inTitle {
				name, _, _ := strings.Cut(string(e), ":")
				bars[name] = append(bars[name], length)
			}
		case xml.EndElement:
			inTitle = false
		}
	}
}

func TestBarsAreAsLongAsTheRatios(t *testing.T) {
	var drawing bytes.Buffer
	if err := measuredBench(t).writeSVG(&drawing); err != nil {
		t.Fatal(err)
	}
	bars := svgBars(t, drawing.Bytes())
	if len(bars) != 2*3 || len(bars["TCP_RR, flanneld"]) != 0 {
		t.Fatalf("bars %v, want two tests in three modes, and none for the baseline", bars)
	}
	for name, lengths := range bars {
		if len(lengths) != 2 || lengths[0] != lengths[1] {
			t.Errorf("%s has bars of %v, want the same in both settings", name, lengths)
		}
	}
	one := bars["TCP_RR, base"][0] / 2
	for name, want := range map[string]float64{"TCP_RR, host": 3, "TCP_STREAM, base": 0.5, "TCP_STREAM, host": 0.9} {
		if got := bars[name][0] / one; got < want-0.01 || got > want+0.01 {
			t.Errorf("%s is %.2f long, want %v", name, got, want)
		}
	}
	for _, words := range []string{
		"Times as fast as flanneld", "2 x &lt;Fast&gt; &amp; &#34;Cheap&#34;",
		"Virtual underlay, pod to pod", "Wire underlay, pod to ClusterIP (nftables, 1000)", "two CPUs, 5000 peers",
		"prefers-color-scheme: dark", `class="interval"`,
	} {
		if !strings.Contains(drawing.String(), words) {
			t.Errorf("the drawing lacks %q", words)
		}
	}
}

func TestSettingsThatWereInterruptedAreNotDrawn(t *testing.T) {
	b := measuredBench(t)
	b.samples = b.samples[:len(b.samples)/2+3] // of the second setting, less than a round
	var drawing bytes.Buffer
	if err := b.writeSVG(&drawing); err != nil {
		t.Fatal(err)
	}
	if bars := svgBars(t, drawing.Bytes())["TCP_RR, base"]; len(bars) != 1 {
		t.Errorf("bars %v, want one: the second setting has no result in all modes", bars)
	}
	b.samples = b.samples[:1]
	if err := b.writeSVG(&drawing); err != nil {
		t.Error(err)
	}
}

func TestTableComparesWithEachBaseline(t *testing.T) {
	b := measuredBench(t)
	var out bytes.Buffer
	b.writeFacts(&out)
	b.writeTable(&out, b.options.settings[0])
	for _, line := range []string{
		"kernel 6.18",
		"virtual underlay, pod to pod, client and server on one CPU",
		"TEST MODE MEDIAN LOWEST-HIGHEST UNIT TIMES flanneld (95%) TIMES host (95%) EXPRESS/BASE",
		"TCP_RR host 300 300-300 transactions/s 3.00 (3.00-3.00) 1 -",
		"flanneld 100 100-100 transactions/s 1 0.33 (0.33-0.33) -",
		"kernel 103 102-104 transactions/s 1.03 (1.01-1.06) 0.34 (0.34-0.35) 0.0/0.0%",
		"base 200 200-200 transactions/s 2.00 (2.00-2.00) 0.67 (0.67-0.67) 60.0/20.0%",
	} {
		if !strings.Contains(strings.Join(strings.Fields(out.String()), " "), line) {
			t.Errorf("the table lacks %q:\n%s", line, out.String())
		}
	}
}

func TestEveryResultIsInTheCSV(t *testing.T) {
	b := measuredBench(t)
	var out bytes.Buffer
	if err := b.writeCSV(&out); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&out).ReadAll()
	if err != nil || len(rows) != 1+len(b.samples) {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	want := "wire 2 5000 nftables:1000 none TCP_STREAM base 3 5.000 Gbit/s 0 0.6000 0.2000"
	if got := strings.Join(rows[len(rows)-1], " "); got != want {
		t.Errorf("the last row is %q, want %q", got, want)
	}
}
