//go:build linux

package main

import (
	"fmt"
	"strings"
)

// markdown is the table of docs/performance.md. A ratio that falls short of what
// it has to be is bold.
func markdown(findings []finding) string {
	var b strings.Builder
	b.WriteString("| workload | imgnbd | best peer | which | ratio (range) | at least | CPU | its CPU |\n|---|---|---|---|---|---|---|---|\n")
	for _, f := range findings {
		if f.Peer == nil {
			continue
		}
		var ours, peer row
		for _, r := range f.Rows {
			switch {
			case r.Ours && ours.Server == "":
				ours = r
			case r.Server == f.Peer.To:
				peer = r
			}
		}
		least, ratio := "", fmt.Sprintf("%.2f", f.Peer.Median)
		if g := max(f.Goal.Must, f.Goal.Parity); g > 0 {
			least = fmt.Sprintf("%g", g)
			if f.Peer.Median < g {
				ratio = "**" + ratio + "**"
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s (%.2f–%.2f) | %s | %s | %s |\n", f.Workload, f.rate(&ours), f.rate(&peer), f.Peer.To,
			ratio, f.Peer.Least, f.Peer.Most, least, f.cpu(&ours), f.cpu(&peer))
	}
	return b.String()
}

func (f *finding) rate(r *row) string {
	switch {
	case f.opening:
		return fmt.Sprintf("%.1f ms", r.P50/1000)
	case f.inBytes:
		return fmt.Sprintf("%.0f MiB/s", r.MiB)
	}
	return fmt.Sprintf("%.0f/s", r.Rate)
}

func (f *finding) cpu(r *row) string {
	s := ""
	switch {
	case f.opening: // too short for the clock
	case f.inBytes:
		s = fmt.Sprintf("%.3f s/GiB", r.CPUGiB)
	default:
		s = fmt.Sprintf("%.1f µs", r.CPUop)
	}
	if r.Memory > 0 {
		s = strings.TrimPrefix(fmt.Sprintf("%s, %.1f MiB", s, r.Memory), ", ")
	}
	return s
}
