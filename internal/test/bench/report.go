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
	Samples []sample `json:"samples"`
}

// A ratio compares the rates of two servers, repeat by repeat.
type ratio struct {
	To     string  `json:"to"`
	Median float64 `json:"median"`
	Least  float64 `json:"least"`
	Most   float64 `json:"most"`
	CPU    float64 `json:"cpu"` // of the CPU per operation
}

// A finding is what was seen of one workload.
type finding struct {
	Workload string `json:"workload"`
	Rows     []row  `json:"rows"`
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

func newRow(s server, samples []sample) row {
	return row{
		Server: s.name, Ours: s.ours, Samples: samples,
		Rate:   median(samples, func(s sample) float64 { return s.Rate }),
		MiB:    median(samples, func(s sample) float64 { return s.MiB }),
		P50:    median(samples, func(s sample) float64 { return s.P50 }),
		P99:    median(samples, func(s sample) float64 { return s.P99 }),
		CPUop:  median(samples, func(s sample) float64 { return s.ServerCPU * 1e6 / float64(s.Ops) }),
		CPUGiB: median(samples, func(s sample) float64 { return s.ServerCPU * (1 << 30) / max(float64(s.Bytes), 1) }),
	}
}

func newFinding(w workload, rows []row) finding {
	f := finding{Workload: w.name, Rows: rows}
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
	r := &ratio{To: b.Server, Median: middle(v), Least: slices.Min(v), Most: slices.Max(v)}
	if b.CPUop > 0 {
		r.CPU = a.CPUop / b.CPUop
	}
	return r
}

// print writes a finding for people: large transfers by their bytes, others by
// their number.
func (f *finding) print(w io.Writer, large bool) {
	fmt.Fprintf(w, "\n%s\n", f.Workload)
	rows := slices.SortedStableFunc(slices.Values(f.Rows), func(a, b row) int {
		return cmp.Compare(b.Rate, a.Rate)
	})
	for _, r := range rows {
		rate, cpu := fmt.Sprintf("%9.0f ops/s", r.Rate), fmt.Sprintf("%7.2f us/op", r.CPUop)
		if large {
			rate, cpu = fmt.Sprintf("%9.0f MiB/s", r.MiB), fmt.Sprintf("%6.3f s/GiB", r.CPUGiB)
		}
		fmt.Fprintf(w, "  %-18s %s   cpu %s   p50 %7.0f us   p99 %8.0f us\n", r.Server, rate, cpu, r.P50, r.P99)
	}
	for _, r := range []*ratio{f.Peer, f.Base} {
		if r != nil {
			fmt.Fprintf(w, "  %s\n", r)
		}
	}
}

func (r *ratio) String() string {
	return fmt.Sprintf("%.2f [%.2f-%.2f] of %s, with %.2f of its CPU", r.Median, r.Least, r.Most, r.To, r.CPU)
}

// summary lists the ratios of all workloads.
func summary(w io.Writer, findings []finding) {
	fmt.Fprintf(w, "\n%-36s %s\n", "workload", "rate to the best peer, median [range], and CPU per operation")
	for _, f := range findings {
		var parts []string
		for _, r := range []*ratio{f.Peer, f.Base} {
			if r != nil {
				parts = append(parts, r.String())
			}
		}
		fmt.Fprintf(w, "%-36s %s\n", f.Workload, strings.Join(parts, "; "))
	}
}
