//go:build linux

package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/imgnbd/imgnbd/internal/test/load"
)

// A sample is one measurement of one server.
type sample struct {
	load.Result
	ServerCPU float64 `json:"server_cpu_s"`
	Memory    float64 `json:"server_mib"` // while it was loaded; 0: not looked at
}

// A row is what one server did in one workload. Figures are medians.
type row struct {
	Server  string   `json:"server"`
	Ours    bool     `json:"ours"`
	Rate    float64  `json:"ops_per_s"`
	MiB     float64  `json:"mib_per_s"`
	P50     float64  `json:"p50_us"`
	P99     float64  `json:"p99_us"`
	CPUop   float64  `json:"server_cpu_us_per_op"`
	CPUGiB  float64  `json:"server_cpu_s_per_gib"`
	Memory  float64  `json:"server_mib,omitempty"`
	Samples []sample `json:"samples"`
}

// A ratio compares the rates of two servers, repeat by repeat.
type ratio struct {
	To     string  `json:"to"`
	Pairs  int     `json:"pairs"`
	Median float64 `json:"median"`
	Least  float64 `json:"least"`
	Most   float64 `json:"most"`
	CPU    float64 `json:"cpu"`              // of the CPU per operation
	Memory float64 `json:"memory,omitempty"` // of the memory
}

// A finding is what was seen of one workload.
type finding struct {
	Workload string `json:"workload"`
	Goal     goal   `json:"goal"`
	Rows     []row  `json:"rows"`
	inBytes  bool
	opening  bool
	// Of the first of our builds: to the peer whose median rate is best, and to
	// the other build if two are compared.
	Peer *ratio `json:"best_peer,omitempty"`
	Base *ratio `json:"base,omitempty"`
}

func median(of []sample, f func(sample) float64) float64 {
	var v []float64
	for _, s := range of {
		v = append(v, f(s))
	}
	return middle(v)
}

func middle(v []float64) float64 {
	slices.Sort(v)
	n := len(v)
	if n == 0 {
		return 0
	}
	return (v[(n-1)/2] + v[n/2]) / 2
}

func rateOf(s sample) float64 { return s.Rate }

func newRow(s server, samples []sample) row {
	return row{
		Server: s.name, Ours: s.ours, Samples: samples,
		Rate:   median(samples, rateOf),
		MiB:    median(samples, func(s sample) float64 { return s.MiB }),
		P50:    median(samples, func(s sample) float64 { return s.P50 }),
		P99:    median(samples, func(s sample) float64 { return s.P99 }),
		CPUop:  median(samples, func(s sample) float64 { return s.ServerCPU * 1e6 / float64(s.Ops) }),
		CPUGiB: median(samples, func(s sample) float64 { return s.ServerCPU * (1 << 30) / max(float64(s.Bytes), 1) }),
		Memory: median(samples, func(s sample) float64 { return s.Memory }),
	}
}

func newFinding(w workload, rows []row) finding {
	f := finding{Workload: w.name, Goal: w.goal, Rows: rows, inBytes: w.inBytes(), opening: w.opening}
	var ours, best, base *row
	for i := range rows {
		switch r := &rows[i]; {
		case r.Ours && ours == nil:
			ours = r
		case r.Ours:
			base = r
		case best == nil || r.Rate > best.Rate:
			best = r
		}
	}
	f.Peer, f.Base = compare(ours, best), compare(ours, base)
	return f
}

func compare(a, b *row) *ratio {
	if a == nil || b == nil {
		return nil
	}
	var v []float64
	for i := range min(len(a.Samples), len(b.Samples)) {
		v = append(v, a.Samples[i].Rate/b.Samples[i].Rate)
	}
	r := &ratio{To: b.Server, Pairs: len(v), Median: middle(v), Least: slices.Min(v), Most: slices.Max(v)}
	if b.CPUop > 0 {
		r.CPU = a.CPUop / b.CPUop
	}
	if b.Memory > 0 {
		r.Memory = a.Memory / b.Memory
	}
	return r
}

// print writes a finding for people: large transfers by their bytes, others by
// their number.
func (f *finding) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s\n", f.Workload)
	rows := slices.SortedStableFunc(slices.Values(f.Rows), func(a, b row) int {
		return cmp.Compare(b.Rate, a.Rate)
	})
	for _, r := range rows {
		rate, cpu, memory := fmt.Sprintf("%9.0f ops/s", r.Rate), fmt.Sprintf("%7.2f us/op", r.CPUop), ""
		if f.inBytes {
			rate, cpu = fmt.Sprintf("%9.0f MiB/s", r.MiB), fmt.Sprintf("%6.3f s/GiB", r.CPUGiB)
		}
		if r.Memory > 0 {
			memory = fmt.Sprintf("   %6.1f MiB", r.Memory)
		}
		fmt.Fprintf(w, "  %-30s %s   cpu %s   p50 %7.0f us   p99 %8.0f us%s\n", r.Server, rate, cpu, r.P50, r.P99, memory)
	}
	for _, s := range f.verdict() {
		fmt.Fprintf(w, "  %s\n", s)
	}
}

// verdict says how ours compares.
func (f *finding) verdict() (lines []string) {
	if f.Peer != nil {
		lines = append(lines, f.Peer.String()+f.Goal.judge(f.Peer.Median))
	}
	if f.Base != nil {
		lines = append(lines, f.Base.String())
	}
	return lines
}

// judge says which goals a ratio reaches.
func (g goal) judge(ratio float64) string {
	s := ""
	for _, of := range []struct {
		name  string
		least float64
	}{{"must", g.Must}, {"parity", g.Parity}, {"stretch", g.Stretch}} {
		switch {
		case of.least == 0:
		case ratio >= of.least:
			s += fmt.Sprintf("; %s %g", of.name, of.least)
		default:
			s += fmt.Sprintf("; SHORT of %s %g", of.name, of.least)
		}
	}
	return s
}

func (r *ratio) String() string {
	s := fmt.Sprintf("%.2f [%.2f-%.2f] of %s, with %.2f of its CPU", r.Median, r.Least, r.Most, r.To, r.CPU)
	if r.Memory > 0 {
		s += fmt.Sprintf(" and %.2f of its memory", r.Memory)
	}
	return s
}

// summary lists the ratios of all workloads.
func summary(w io.Writer, findings []finding) {
	fmt.Fprintf(w, "\n%-42s %s\n", "workload", "rate to the best peer: median [range], CPU per operation; goals")
	for _, f := range findings {
		fmt.Fprintf(w, "%-42s %s\n", f.Workload, strings.Join(f.verdict(), "; "))
	}
}
