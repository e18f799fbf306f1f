//go:build linux

package main

import (
	"encoding/json"
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/load"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// A short run of every server here: there are figures of each, and neither a
// process nor a file is left.
func TestRun(t *testing.T) {
	qemu.Require(t, "qemu-nbd", "nbdkit", "nbd-server", "qemu-img", "qemu-io", "nbdcopy")
	qemu.Newer(t, "nbdkit")
	dir := t.TempDir()
	out := filepath.Join(dir, "figures.json")
	before := descendants(os.Getpid())
	shm, _ := os.ReadDir("/dev/shm")
	err := run(t.Context(), []string{
		"-imgnbd", "none", "-repeats", "2", "-time", "20ms", "-size", "64", "-disk", dir, "-json", out,
		"-server", "mine=nbdkit -f -U {socket} file {image}",
		"-servers", `^(mine|nbdkit( \(Debian 13\))?|nbd-server|qemu-nbd (threads|io_uring))$`,
		"-run", `^(raw rand read 4k qd32, cold|(sparse )?raw nbdcopy|qcow2 of 1 TiB start to first byte|raw read 1M qd16(, tcp|, structured)?|raw rand write 4k qd32|new raw write 64k qd16|qcow2 (rand read 4k qd1|first rand write 4k qd32|chain of 4 rand read 4k qd32))$`,
	})
	if err != nil {
		t.Fatal(err)
	}
	findings := findingsOf(t, out)
	if len(findings) != 12 {
		t.Errorf("%d workloads, want 12", len(findings))
	}
	for _, f := range findings {
		want := 6
		switch {
		case strings.HasPrefix(f.Workload, "qcow2"):
			want = 2 // both qemu-nbd
		case strings.HasSuffix(f.Workload, "tcp"):
			want = 5 // the server that is given has no command for TCP
		case strings.HasSuffix(f.Workload, "structured"):
			want = 5 // not nbd-server
		}
		if len(f.Rows) != want {
			t.Errorf("%s: %d servers, want %d", f.Workload, len(f.Rows), want)
		}
		for _, r := range f.Rows {
			if r.Rate <= 0 || len(r.Samples) != 2 {
				t.Errorf("%s: %+v", f.Workload, r)
			}
		}
	}
	if after := descendants(os.Getpid()); len(after) != len(before) {
		t.Errorf("processes %v are left, before there were %v", after, before)
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 1 {
		t.Errorf("%v are left", left)
	}
	was := map[string]bool{}
	for _, e := range shm {
		was[e.Name()] = true
	}
	left, _ = os.ReadDir("/dev/shm")
	for _, e := range left {
		if strings.HasPrefix(e.Name(), "bench") && !was[e.Name()] {
			t.Errorf("/dev/shm/%s is left", e.Name())
		}
	}
}

// findingsOf reads what -json has written.
func findingsOf(t *testing.T, name string) (findings []finding) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &findings); err != nil {
		t.Fatal(err)
	}
	return findings
}

// An image that is far away is read at its pace, and its file system ends.
func TestFar(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	qemu.Require(t, "nbdkit", "qemu-img")
	dir := t.TempDir()
	out := filepath.Join(dir, "figures.json")
	before := descendants(os.Getpid())
	err := run(t.Context(), []string{
		"-imgnbd", "none", "-repeats", "1", "-time", "200ms", "-size", "64", "-disk", dir, "-json", out,
		"-servers", "^nbdkit$", "-run", "^raw rand read 4k qd32, far",
	})
	if err != nil {
		t.Fatal(err)
	}
	findings := findingsOf(t, out)
	// nbdkit has 16 threads: even if every other read met what is there, no more can come.
	if most := 2 * 16 / farDelay.Seconds(); len(findings) != 2 || findings[1].Rows[0].Rate > most {
		t.Errorf("%+v; want at most %v a second from far", findings, most)
	}
	if after := descendants(os.Getpid()); len(after) != len(before) {
		t.Errorf("processes %v are left, before there were %v", after, before)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("%v are left", left)
	}
}

// A server that does not start, or that fails requests, is an error.
func TestFailures(t *testing.T) {
	qemu.Require(t, "nbdkit")
	for command, why := range map[string]string{
		"nbdkit -f -U {socket} file {image}.missing":                                  "mine: ended at once",
		"nbdkit -f -U {socket} --filter=error file {image} error=EIO error-rate=100%": "input/output error",
		"nbdkit -f -U {socket} -r file {image}":                                       "read-only",
	} {
		err := run(t.Context(), []string{"-imgnbd", "none", "-servers", "mine", "-repeats", "1", "-time", "20ms", "-size", "64", "-disk", t.TempDir(),
			"-server", "mine=" + command, "-run", "^raw rand 70/30"})
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v; want it to speak of %q", command, err, why)
		}
	}
}

func TestRatio(t *testing.T) {
	rates := func(s server, v ...float64) row {
		var samples []sample
		for _, r := range v {
			samples = append(samples, sample{load.Result{Ops: 100, Bytes: 1 << 20, Rate: r}, 2e-4, 0})
		}
		return newRow(s, samples)
	}
	f := newFinding(workload{name: "w"}, []row{
		rates(server{name: "ours", ours: true}, 20, 90, 40),
		rates(server{name: "old", ours: true}, 10, 30, 20),
		rates(server{name: "slow"}, 500, 1, 1), // once fast is not best
		rates(server{name: "best"}, 10, 30, 10),
	})
	if want := (ratio{To: "best", Pairs: 3, Median: 3, Least: 2, Most: 4, CPU: 1}); f.Peer == nil || *f.Peer != want {
		t.Errorf("to the peer %+v, want %+v", f.Peer, want)
	}
	if want := (ratio{To: "old", Pairs: 3, Median: 2, Least: 2, Most: 3, CPU: 1}); f.Base == nil || *f.Base != want {
		t.Errorf("to the other build %+v, want %+v", f.Base, want)
	}
	if r := f.Rows[0]; r.CPUop != 2 {
		t.Errorf("%v us an operation, want 2", r.CPUop)
	}
}

// Who takes part in what.
func TestCan(t *testing.T) {
	for name, want := range map[string]string{
		"raw read 1M qd16":                "imgnbd, qemu-nbd threads, qemu-nbd io_uring, nbdkit, nbd-server",
		"raw read 1M qd16, structured":    "imgnbd, qemu-nbd threads, qemu-nbd io_uring, nbdkit",
		"raw rand read 4k qd32, O_DIRECT": "imgnbd, qemu-nbd threads, qemu-nbd io_uring, qemu-nbd native",
		"qcow2 read 1M qd16, tcp":         "imgnbd, qemu-nbd threads, qemu-nbd io_uring",
	} {
		i := slices.IndexFunc(workloads, func(w workload) bool { return w.name == name })
		if i < 0 {
			t.Errorf("no workload %s", name)
			continue
		}
		var who []string
		for _, s := range append([]server{imgnbd("imgnbd", "A=b C=d imgnbd")}, peers("", "")...) {
			if s.can(workloads[i]) {
				who = append(who, s.name)
			}
		}
		if got := strings.Join(who, ", "); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		c := strings.Join(imgnbd("", "A=b C=d imgnbd").command(workloads[i]), " ")
		if !strings.HasPrefix(c, "env A=b C=d imgnbd -") || strings.HasSuffix(c, "--cache=none {image}") != (workloads[i].place == direct) {
			t.Errorf("%s: %s", name, c)
		}
	}
}

func TestJudge(t *testing.T) {
	g := must(2).stretch(3)
	for ratio, want := range map[float64]string{1.9: "; SHORT of must 2; SHORT of stretch 3", 2: "; must 2; SHORT of stretch 3", 3: "; must 2; stretch 3"} {
		if got := g.judge(ratio); got != want {
			t.Errorf("%v: %q, want %q", ratio, got, want)
		}
	}
	if got := parity().judge(0.95); got != "; parity 0.95" {
		t.Error(got)
	}
	if got := (goal{}).judge(0.1); got != "" {
		t.Error(got)
	}
}

func TestMarkdown(t *testing.T) {
	ours, peer := row{Server: "imgnbd", Ours: true, Rate: 1234, CPUop: 1.25, Memory: 3, P50: 2500}, row{Server: "p", Rate: 1000, CPUop: 2}
	got := markdown([]finding{
		{Workload: "short", Goal: must(2), Rows: []row{ours, peer}, Peer: &ratio{To: "p", Median: 1.234, Least: 1, Most: 2}},
		{Workload: "alone", Rows: []row{ours}},
		{Workload: "start", Rows: []row{ours, peer}, opening: true, Peer: &ratio{To: "p", Median: 3, Least: 1, Most: 4}},
	})
	for _, want := range []string{
		"| short | 1234/s | 1000/s | p | **1.23** (1.00–2.00) | 2 | 1.2 µs, 3.0 MiB | 2.0 µs |\n",
		"| start | 2.5 ms | 0.0 ms | p | 3.00 (1.00–4.00) |  | 3.0 MiB |  |\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "alone") {
		t.Error(got)
	}
}

func TestPlot(t *testing.T) {
	svg := plot([]finding{
		{Workload: "fast & far", Goal: must(2).stretch(4), Peer: &ratio{To: "p", Median: 3, Least: 0.01, Most: 1000}},
		{Workload: "no peer"},
		{Workload: "slow", Peer: &ratio{To: "p", Median: 0.9, Least: 0.8, Most: 0.95}},
	})
	for d := xml.NewDecoder(strings.NewReader(svg)); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
	}
	if !strings.Contains(svg, "fast &amp; far") || strings.Contains(svg, "no peer") || strings.Contains(svg, "%!") || !strings.Contains(svg, "#c65") {
		t.Error(svg)
	}
}

// The quick form is eight workloads on raw images and three that write to
// qcow2; names are told apart.
func TestTable(t *testing.T) {
	quick, names := map[string]int{}, map[string]bool{}
	for _, w := range workloads {
		if w.quick {
			quick[w.kind.format]++
		}
		if g := w.goal; g.Must < 0 || g.Parity > 1 || g.Stretch > 0 && g.Stretch <= max(g.Must, g.Parity) {
			t.Errorf("%s: goals %+v", w.name, g)
		}
		if names[w.name] {
			t.Errorf("%s is there twice", w.name)
		}
		names[w.name] = true
		if strings.HasSuffix(w.name, "tcp") != (w.transport == tcp) {
			t.Errorf("%s goes over %s", w.name, w.transport)
		}
	}
	if quick["raw"] != 8 || quick["qcow2"] != 3 {
		t.Errorf("quick workloads by format: %v", quick)
	}
}
