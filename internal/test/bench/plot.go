//go:build linux

package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Of a plot, in pixels.
const (
	plotLine  = 18  // height of a workload
	plotNames = 300 // width of their names
	plotUnit  = 70  // width of a factor of two
	plotLow   = -1  // log2 of the ends of the axis
	plotHigh  = 5
)

// plot draws the ratios to the best peers as SVG: a bar from 1 to the median,
// a line for the range, and a mark for the least that the median should be.
func plot(findings []finding) string {
	x := func(ratio float64) float64 {
		l := min(max(math.Log2(ratio), plotLow), plotHigh)
		return plotNames + (l-plotLow)*plotUnit
	}
	var rows []finding
	for _, f := range findings {
		if f.Peer != nil {
			rows = append(rows, f)
		}
	}
	var b strings.Builder
	width, height := plotNames+(plotHigh-plotLow)*plotUnit+50, (len(rows)+2)*plotLine
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	for l := plotLow; l <= plotHigh; l++ {
		at, color := x(math.Exp2(float64(l))), "#ddd"
		if l == 0 {
			color = "#444"
		}
		fmt.Fprintf(&b, `<line x1="%.0[1]f" x2="%.0[1]f" y1="%[2]d" y2="%[3]d" stroke="%[4]s"/>`+"\n", at, plotLine, height-plotLine/2, color)
		fmt.Fprintf(&b, `<text x="%.0f" y="12" text-anchor="middle" fill="#444">%g</text>`+"\n", at, math.Exp2(float64(l)))
	}
	for i, f := range rows {
		r, y := f.Peer, float64(i+1)*plotLine+plotLine/2
		from, to, color := x(1), x(r.Median), "#4a7"
		if r.Median < 1 {
			from, to, color = to, from, "#c65"
		}
		fmt.Fprintf(&b, `<text x="%d" y="%.0f" text-anchor="end">%s</text>`+"\n", plotNames-8, y+4, html.EscapeString(f.Workload))
		fmt.Fprintf(&b, `<rect x="%.0f" y="%.0f" width="%.0f" height="%d" fill="%s"/>`+"\n", from, y-5, max(to-from, 1), 10, color)
		fmt.Fprintf(&b, `<line x1="%.0[1]f" x2="%.0[2]f" y1="%.0[3]f" y2="%.0[3]f" stroke="#222"/>`+"\n", x(r.Least), x(r.Most), y)
		if least := max(f.Goal.Must, f.Goal.Parity); least > 0 {
			fmt.Fprintf(&b, `<line x1="%.0[1]f" x2="%.0[1]f" y1="%.0[2]f" y2="%.0[3]f" stroke="#d33" stroke-width="2"/>`+"\n", x(least), y-8, y+8)
		}
		fmt.Fprintf(&b, `<text x="%.0f" y="%.0f" fill="#444">%.2f</text>`+"\n", x(max(r.Most, 1))+5, y+4, r.Median)
	}
	b.WriteString("</svg>\n")
	return b.String()
}
