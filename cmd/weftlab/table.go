//go:build linux

package main

import (
	"encoding/csv"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"

	"github.com/weft-net/weft/test/lab"
)

// writeTable prints what was measured on an underlay.
func (b *bench) writeTable(w io.Writer, underlay lab.Underlay, cpus int) {
	where := "client and server on one CPU"
	if cpus == 2 {
		where = "client and server on a CPU each"
	}
	fmt.Fprintf(w, "\n%s underlay, %s\n\n", underlay, where)
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "TEST\tMODE\tMEDIAN\tLOWEST-HIGHEST\tUNIT\tTIMES %s (95%%)\tACCELERATED\n", b.options.baseline)
	for _, test := range b.options.tests {
		base := b.rates(underlay, cpus, test, b.options.baseline)
		name := test.name
		for _, m := range b.options.modes {
			rates := b.rates(underlay, cpus, test, m.name)
			fmt.Fprintf(table, "%s\t%s\t%s\t%s-%s\t%s\t%s\t%s\n", name, m.name, number(median(rates)),
				number(slices.Min(rates)), number(slices.Max(rates)), test.unit,
				ratioWords(pairedRatio(rates, base), m.name == b.options.baseline), b.acceleratedWords(underlay, cpus, test, m.name))
			name = ""
		}
	}
	table.Flush()
	fmt.Fprintf(w, "\nTimes: geometric mean of the ratios within each round, with the 95 %% interval by Student's t\n"+
		"over their logarithms. Accelerated: median share of the packets on the client's node.\n")
}

// rates are a mode's results, by round.
func (b *bench) rates(underlay lab.Underlay, cpus int, test workload, mode string) []float64 {
	var rates []float64
	for _, s := range b.samples {
		if s.underlay == underlay && s.cpus == cpus && s.test.name == test.name && s.mode == mode {
			rates = append(rates, s.rate)
		}
	}
	return rates
}

// acceleratedWords tells which share of a mode's packets was accelerated.
func (b *bench) acceleratedWords(underlay lab.Underlay, cpus int, test workload, mode string) string {
	var shares []float64
	for _, s := range b.samples {
		if s.underlay == underlay && s.cpus == cpus && s.test.name == test.name && s.mode == mode && s.accelerated >= 0 {
			shares = append(shares, s.accelerated)
		}
	}
	if len(shares) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100*median(shares))
}

// ratioWords prints a ratio and its bounds.
func ratioWords(r ratio, isBase bool) string {
	switch {
	case isBase:
		return "1"
	case math.IsNaN(r.mean):
		return "-"
	case math.IsNaN(r.low):
		return fmt.Sprintf("%.2f", r.mean)
	}
	return fmt.Sprintf("%.2f (%.2f-%.2f)", r.mean, r.low, r.high)
}

// number prints three digits or more.
func number(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

// writeCSV writes every single result to a file.
func (b *bench) writeCSV(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	rows := [][]string{{"underlay", "cpus", "test", "mode", "round", "rate", "unit", "lost", "accelerated"}}
	for _, s := range b.samples {
		share := ""
		if s.accelerated >= 0 {
			share = strconv.FormatFloat(s.accelerated, 'f', 4, 64)
		}
		rows = append(rows, []string{
			string(s.underlay), strconv.Itoa(s.cpus), s.test.name, s.mode, strconv.Itoa(s.round),
			strconv.FormatFloat(s.rate, 'f', 3, 64), s.test.unit, strconv.FormatUint(s.lost, 10), share,
		})
	}
	if err := csv.NewWriter(f).WriteAll(rows); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return f.Close()
}
