//go:build linux

package main

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
)

// writeFacts prints what is measured, and on what.
func (b *bench) writeFacts(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range b.facts {
		fmt.Fprintf(table, "%s\t%s\n", f.name, f.value)
	}
	table.Flush()
}

// writeTable prints what was measured in a setting.
func (b *bench) writeTable(w io.Writer, s setting) {
	fmt.Fprintf(w, "\n%s\n\n", s)
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprint(table, "TEST\tMODE\tMEDIAN\tLOWEST-HIGHEST\tUNIT\t")
	for _, base := range b.options.baselines {
		fmt.Fprintf(table, "TIMES %s (95%%)\t", base)
	}
	fmt.Fprintln(table, "EXPRESS/BASE")
	for _, test := range b.options.tests {
		name := test.name
		for _, m := range b.options.modes {
			rates := b.rates(s, test, m.name)
			fmt.Fprintf(table, "%s\t%s\t%s\t%s-%s\t%s\t", name, m.name, number(median(rates)),
				number(slices.Min(rates)), number(slices.Max(rates)), test.unit)
			for _, base := range b.options.baselines {
				fmt.Fprintf(table, "%s\t", ratioWords(b.ratio(s, test, m.name, base), m.name == base))
			}
			fmt.Fprintln(table, b.pathWords(s, test, m.name))
			name = ""
		}
	}
	table.Flush()
	fmt.Fprintf(w, "\nTimes: geometric mean of the ratios within each round, with the 95 %% interval by Student's t\n"+
		"over their logarithms. Express/base: median shares of the packets on the client's node that took\n"+
		"each path, warm-up included; the others took the kernel's.\n")
	if rates := b.junkRates(s); s.junk != noJunk {
		fmt.Fprintf(w, "Junk: %s to %s datagrams a second were sent.\n", number(slices.Min(rates)), number(slices.Max(rates)))
	}
}

// junkRates are how many datagrams of junk were sent a second, measurement by
// measurement.
func (b *bench) junkRates(at setting) (rates []float64) {
	for _, s := range b.samples {
		if s.setting == at {
			rates = append(rates, s.junk)
		}
	}
	return rates
}

// ratio compares a mode with another one.
func (b *bench) ratio(s setting, test workload, mode, base string) ratio {
	return pairedRatio(b.rates(s, test, mode), b.rates(s, test, base))
}

// rates are a mode's results, by round.
func (b *bench) rates(at setting, test workload, mode string) []float64 {
	var rates []float64
	for _, s := range b.samples {
		if s.setting == at && s.test.name == test.name && s.mode == mode {
			rates = append(rates, s.rate)
		}
	}
	return rates
}

// pathWords tells which shares of a mode's packets took which path.
func (b *bench) pathWords(at setting, test workload, mode string) string {
	var express, base []float64
	for _, s := range b.samples {
		if s.setting == at && s.test.name == test.name && s.mode == mode && s.counted.all() > 0 {
			express = append(express, s.share(s.counted.express))
			base = append(base, s.share(s.counted.base))
		}
	}
	if len(express) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f/%.1f%%", 100*median(express), 100*median(base))
}

// share is what part of a sample's packets some of them are.
func (s sample) share(some uint64) float64 { return float64(some) / float64(s.counted.all()) }

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

// writeFiles writes those that were asked for, with what there is: also when
// the measurement was interrupted.
func (b *bench) writeFiles() error {
	if len(b.samples) == 0 {
		return nil
	}
	var errs []error
	for path, write := range map[string]func(io.Writer) error{b.options.csv: b.writeCSV, b.options.svg: b.writeSVG} {
		if path == "" {
			continue
		}
		var text bytes.Buffer
		err := write(&text)
		errs = append(errs, errors.Join(err, os.WriteFile(path, text.Bytes(), 0o644)))
	}
	return errors.Join(errs...)
}

// writeCSV writes every single result.
func (b *bench) writeCSV(w io.Writer) error {
	rows := [][]string{{"underlay", "cpus", "peers", "to", "junk", "test", "mode", "round", "rate", "unit", "lost", "express", "base"}}
	for _, s := range b.samples {
		express, base := "", ""
		if s.counted.all() > 0 {
			express = strconv.FormatFloat(s.share(s.counted.express), 'f', 4, 64)
			base = strconv.FormatFloat(s.share(s.counted.base), 'f', 4, 64)
		}
		at := s.setting
		rows = append(rows, []string{
			string(at.underlay), strconv.Itoa(at.cpus), strconv.Itoa(at.peers), at.to.String(), at.junk,
			s.test.name, s.mode, strconv.Itoa(s.round),
			strconv.FormatFloat(s.rate, 'f', 3, 64), s.test.unit, strconv.FormatUint(s.lost, 10), express, base,
		})
	}
	return csv.NewWriter(w).WriteAll(rows)
}
