package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
)

// outputSchema is the version of what -o json prints. A field that is added
// does not change it; one that changes its meaning or goes does.
const outputSchema = 2

// schema is the first field of everything that -o json prints.
type schema struct {
	SchemaVersion int `json:"schemaVersion"`
}

// output is how a command answers: text for people, JSON for programs.
type output struct {
	format string
}

// register adds the flag -o.
func (o *output) register(fs *flag.FlagSet) {
	fs.StringVar(&o.format, "o", "text", "`format` of the answer: text for people, json for programs")
}

// faults lists what is wrong with the flag.
func (o *output) faults() []string {
	return []string{oneOf("-o", o.format, "text", "json")}
}

// json tells that a program reads the answer.
func (o *output) json() bool { return o.format == "json" }

// writeJSON prints v.
func (o *output) writeJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return fmt.Errorf("writing the answer: %w", err)
	}
	return nil
}

// table prints aligned columns. Columns whose name begins with ">" are numbers
// and stand to the right.
type table struct {
	columns []string
	rows    [][]string
}

// row adds a row, one cell a column.
func (t *table) row(cells ...string) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = printable(c)
	}
	t.rows = append(t.rows, row)
}

// write prints the table, each line after indent.
func (t *table) write(w io.Writer, indent string) {
	widths := make([]int, len(t.columns))
	head := make([]string, len(t.columns))
	for i, c := range t.columns {
		head[i] = strings.TrimPrefix(c, ">")
		widths[i] = width(head[i])
	}
	for _, r := range t.rows {
		for i, cell := range r {
			widths[i] = max(widths[i], width(cell))
		}
	}
	for _, r := range append([][]string{head}, t.rows...) {
		var line strings.Builder
		for i, cell := range r {
			space := strings.Repeat(" ", widths[i]-width(cell))
			if strings.HasPrefix(t.columns[i], ">") {
				line.WriteString(space + cell + "  ")
			} else {
				line.WriteString(cell + space + "  ")
			}
		}
		fmt.Fprintln(w, indent+strings.TrimRight(line.String(), " "))
	}
}

// width is how many columns a text takes.
func width(s string) int { return len([]rune(s)) }

// facts prints names and values in two columns.
type facts struct {
	*tabwriter.Writer
}

// newFacts makes facts that are printed by Flush.
func newFacts(w io.Writer) facts { return facts{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)} }

// add prints one fact.
func (f facts) add(name, format string, args ...any) {
	fmt.Fprintf(f, "%s\t%s\n", name, printable(fmt.Sprintf(format, args...)))
}

// addWrapped prints one fact on as many lines as it needs.
func (f facts) addWrapped(name, value string) {
	for _, line := range wrap(value, factWidth) {
		f.add(name, "%s", line)
		name = ""
	}
}

// factWidth is how many columns the value of a fact gets that is wrapped.
const factWidth = 76

// wrap breaks a text between words into lines of at most so many columns. A
// word that is longer has a line of its own.
func wrap(s string, columns int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(s) {
		switch {
		case line == "":
			line = word
		case width(line)+1+width(word) > columns:
			lines, line = append(lines, line), word
		default:
			line += " " + word
		}
	}
	return append(lines, line)
}

// printable takes out what could move a terminal's cursor: some texts come from
// the network.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '·'
	}, s)
}

// count prints a number in at most a few digits: 999, 12.3k, 4.56M.
func count(n uint64) string {
	return scaled(float64(n), 1000, []string{"", "k", "M", "G", "T", "P", "E"})
}

// size prints bytes in binary units.
func size(n uint64) string {
	return scaled(float64(n), 1024, []string{" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"})
}

// scaled prints v with three digits and the unit it needs.
func scaled(v, step float64, units []string) string {
	i := 0
	// What would round up to four digits takes the next unit.
	for v >= step-0.5 && i < len(units)-1 {
		v /= step
		i++
	}
	switch {
	case i == 0:
		return fmt.Sprintf("%.0f%s", v, units[i])
	case v < 9.995:
		return fmt.Sprintf("%.2f%s", v, units[i])
	case v < 99.95:
		return fmt.Sprintf("%.1f%s", v, units[i])
	}
	return fmt.Sprintf("%.0f%s", v, units[i])
}

// share prints a part of a whole in per cent.
func share(part, whole uint64) string {
	if whole == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f%%", 100*float64(part)/float64(whole))
}

// age prints how long ago t was, in its two largest units.
func age(now, t time.Time) string {
	d := now.Sub(t).Round(time.Second)
	if d < 0 {
		d = 0
	}
	day := 24 * time.Hour
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
}

// number prints a count of things with its word.
func number(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
