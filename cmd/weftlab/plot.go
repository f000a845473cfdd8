//go:build linux

package main

import (
	"bytes"
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strings"
)

// The drawing, in its own pixels: panels side by side, one for each setting, and
// in each a group of bars for each test.
const (
	panelWidth = 430
	columns    = 2
	barHeight  = 11
	barGap     = 3
	groupGap   = 9
	lineHeight = 17
	margin     = 12
	nameWidth  = 92 // of a test's name, left of the bars
	wordsWidth = 62 // of a ratio in figures, right of the bars
	titleSpace = 3 * lineHeight
	axisSpace  = 2 * lineHeight
	charWidth  = 6.6 // about, of a small character
)

// colors are the modes', in order: told apart by those who see no red or green
// too, and on light and dark ground.
var colors = []string{"#8c959f", "#0a7ea4", "#d97706", "#8250df", "#2da44e", "#cf3c6f"}

// writeSVG draws the modes' ratios to the first baseline with their intervals.
// The ground is left as it is. Text has a colour for a light and for a dark one,
// and where nobody says which it is, one that can be read on both.
func (b *bench) writeSVG(w io.Writer) error {
	settings := b.measured()
	d := drawing{bench: b, base: b.options.baselines[0]}
	d.modes = slices.DeleteFunc(slices.Clone(b.options.modes), func(m mode) bool { return m.name == d.base })
	d.most = d.highest(settings)

	across := min(columns, len(settings))
	width := max(across*panelWidth, 560)
	head := d.head()
	rows := (len(settings) + columns - 1) / columns
	height := head + rows*d.panelHeight() + margin
	var out bytes.Buffer
	fmt.Fprintf(&out, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label=%s>`+"\n",
		width, height, width, height, quoted(fmt.Sprintf("Rates of %s compared with %s", strings.Join(names(d.modes), ", "), d.base)))
	out.WriteString(`<style>
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #768390; }
.strong { font-weight: 600; }
.small { font-size: 11px; }
.one { stroke: #8c959f; stroke-width: 1.6; }
.grid { stroke: #8c959f; stroke-opacity: 0.35; stroke-width: 1; }
.interval { stroke: #57606a; stroke-width: 1.2; fill: none; }
@media (prefers-color-scheme: light) {
text { fill: #57606a; }
.strong { fill: #24292f; }
.interval { stroke: #24292f; }
}
@media (prefers-color-scheme: dark) {
text { fill: #9da7b3; }
.strong { fill: #e6edf3; }
.interval { stroke: #e6edf3; }
}
</style>
`)
	d.drawHead(&out)
	for i, s := range settings {
		d.drawPanel(&out, s, i%columns*panelWidth, head+i/columns*d.panelHeight())
	}
	out.WriteString("</svg>\n")
	_, err := out.WriteTo(w)
	return err
}

// measured are the settings that were measured to the end of a round.
func (b *bench) measured() (settings []setting) {
	last := b.options.tests[len(b.options.tests)-1]
	for _, s := range b.options.settings {
		done := func(m mode) bool { return len(b.rates(s, last, m.name)) > 0 }
		if !slices.ContainsFunc(b.options.modes, func(m mode) bool { return !done(m) }) {
			settings = append(settings, s)
		}
	}
	return settings
}

// drawing is what all panels share.
type drawing struct {
	*bench
	base  string
	modes []mode
	// most is the ratio at the right end of the bars.
	most float64
}

// highest is the end of the axis: a half that nothing reaches beyond, save for
// what is far out, and cut there.
func (d *drawing) highest(settings []setting) float64 {
	most := 1.0
	for _, s := range settings {
		for _, test := range d.options.tests {
			for _, m := range d.modes {
				r := d.ratio(s, test, m.name, d.base)
				most = max(most, finite(r.mean), min(finite(r.high), 2*finite(r.mean)))
			}
		}
	}
	const farthest = 4
	return min(math.Ceil(most*2)/2, farthest)
}

// finite is v, or nothing where there is none.
func finite(v float64) float64 {
	if math.IsNaN(v) {
		return 0
	}
	return v
}

// head is the height of title, facts and legend.
func (d *drawing) head() int { return margin + (len(d.facts)+4)*lineHeight }

// groupHeight is that of a test's bars.
func (d *drawing) groupHeight() int { return len(d.modes)*(barHeight+barGap) - barGap + groupGap }

// panelHeight is that of a setting.
func (d *drawing) panelHeight() int {
	return titleSpace + len(d.options.tests)*d.groupHeight() + axisSpace
}

// drawHead draws what the panels have in common.
func (d *drawing) drawHead(w io.Writer) {
	y := margin + lineHeight
	text(w, margin, y, "strong", "start", fmt.Sprintf("Times as fast as %s", d.base))
	for _, f := range d.facts {
		y += lineHeight
		text(w, margin, y, "small", "start", f.name)
		text(w, margin+70, y, "small", "start", f.value)
	}
	y += lineHeight * 3 / 2
	x := float64(margin)
	for i, m := range d.modes {
		fmt.Fprintf(w, `<rect x="%.0f" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x, y-barHeight+1, barHeight, barHeight, d.color(i))
		text(w, int(x)+barHeight+5, y, "strong small", "start", m.name)
		x += barHeight + 24 + charWidth*float64(len(m.name))
	}
	text(w, int(x), y, "small", "start", "thin lines: 95 % intervals")
}

// color is that of a mode, the same whatever the baseline is.
func (d *drawing) color(i int) string {
	all := slices.IndexFunc(modes(), func(m mode) bool { return m.name == d.modes[i].name })
	return colors[max(all, 0)%len(colors)]
}

// drawPanel draws a setting.
func (d *drawing) drawPanel(w io.Writer, s setting, left, top int) {
	words := strings.Split(panelTitle(s), "\n")
	for i, line := range words {
		text(w, left+margin, top+(i+1)*lineHeight, "strong", "start", line)
	}
	bars := left + margin + nameWidth
	room := float64(panelWidth - 2*margin - nameWidth - wordsWidth)
	at := func(v float64) float64 { return float64(bars) + room*min(v, d.most)/d.most }
	y := top + titleSpace
	bottom := y + len(d.options.tests)*d.groupHeight() - groupGap + barGap
	for v := 0.0; v <= d.most; v += 0.5 {
		class := "grid"
		if v == 1 {
			class = "one"
		}
		fmt.Fprintf(w, `<path class="%s" d="M%.1f %dV%d"/>`+"\n", class, at(v), y-barGap, bottom)
		text(w, int(at(v)), bottom+lineHeight-3, "small", "middle", strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0"))
	}
	for _, test := range d.options.tests {
		text(w, bars-8, y+(d.groupHeight()-groupGap)/2+4, "small", "end", test.name)
		for i, m := range d.modes {
			r := d.ratio(s, test, m.name, d.base)
			middle := float64(y) + barHeight/2.0
			fmt.Fprintf(w, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"><title>%s</title></rect>`+"\n",
				bars, y, at(finite(r.mean))-float64(bars), barHeight, d.color(i),
				html.EscapeString(fmt.Sprintf("%s, %s: %s", test.name, m.name, ratioWords(r, false))))
			if !math.IsNaN(r.low) {
				fmt.Fprintf(w, `<path class="interval" d="M%.1f %.1fH%.1fM%.1f %.1fv6M%.1f %.1fv6"/>`+"\n",
					at(r.low), middle, at(r.high), at(r.low), middle-3, at(r.high), middle-3)
			}
			text(w, int(at(max(finite(r.mean), finite(r.high))))+5, y+barHeight-1, "small", "start", fmt.Sprintf("%.2f", finite(r.mean)))
			y += barHeight + barGap
		}
		y += groupGap - barGap
	}
}

// panelTitle is a setting in two lines.
func panelTitle(s setting) string {
	first := fmt.Sprintf("%s underlay, pod to pod", s.underlay)
	if s.to.proxy != "" {
		first = fmt.Sprintf("%s underlay, pod to ClusterIP (%s, %d)", s.underlay, s.to.proxy, s.to.services)
	}
	first = strings.ToUpper(first[:1]) + first[1:]
	second := "one CPU"
	if s.cpus == 2 {
		second = "two CPUs"
	}
	if s.peers > 1 {
		second += fmt.Sprintf(", %d peers", s.peers)
	}
	if j, found := findJunk(s.junk); found {
		second += ", junk " + j.about
	}
	return first + "\n" + second
}

// text draws a line of it.
func text(w io.Writer, x, y int, class, anchor, words string) {
	fmt.Fprintf(w, `<text x="%d" y="%d" class="%s" text-anchor="%s">%s</text>`+"\n", x, y, class, anchor, html.EscapeString(words))
}

// quoted is an attribute's value.
func quoted(words string) string { return `"` + html.EscapeString(words) + `"` }

// names are those of modes.
func names(modes []mode) (all []string) {
	for _, m := range modes {
		all = append(all, m.name)
	}
	return all
}
