// Command strict is go test for a machine that has everything: a test that
// skips fails the run, and the last line counts.
//
//	go run ./internal/test/strict [-skips file] [--] [arguments of go test]
//
// Tests see CI=1, so that a missing tool fails where it is missed. What may
// skip nevertheless is listed in a file, a line each: a regular expression for
// package and test, as in "export.TestVsock", then the reason. Without root, a
// test that says it needs root may skip too. A journal that is left behind fails
// the run.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"
)

func main() {
	skips := flag.String("skips", "", "file with the tests that may skip, and why")
	flag.Parse()
	ok, err := run(*skips, flag.Args(), os.Stdout)
	if err != nil {
		fmt.Fprintf(os.Stderr, "strict: %v\n", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func run(skips string, args []string, w io.Writer) (ok bool, err error) {
	var allowed []*regexp.Regexp
	if skips != "" {
		if allowed, err = readSkips(skips); err != nil {
			return false, err
		}
	}
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Env = append(os.Environ(), "CI=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	before := journals()
	if err := cmd.Start(); err != nil {
		return false, err
	}
	r := newReport(w, allowed)
	scanErr := r.read(out)
	waitErr := cmd.Wait()
	for file := range journals() {
		if !before[file] {
			r.failed = append(r.failed, file+" (left behind)")
		}
	}
	ok = r.end()
	// An exit status alone is a failed test, which has been reported.
	var exit *exec.ExitError
	if waitErr != nil && (ok || !errors.As(waitErr, &exit)) {
		return false, fmt.Errorf("go test: %w", waitErr)
	}
	return ok, scanErr
}

func readSkips(file string) ([]*regexp.Regexp, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var allowed []*regexp.Regexp
	for i, line := range strings.Split(string(text), "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		pattern, reason, _ := strings.Cut(line, " ")
		if strings.TrimSpace(reason) == "" {
			return nil, fmt.Errorf("%s:%d: no reason given", file, i+1)
		}
		re, err := regexp.Compile("(^|/)" + pattern + "$")
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, i+1, err)
		}
		allowed = append(allowed, re)
	}
	return allowed, nil
}

// An event is what go test -json prints; see go doc test2json.
type event struct {
	Time       time.Time
	Action     string
	Package    string
	ImportPath string
	Test       string
	Elapsed    float64
	Output     string
}

type name struct{ pkg, test string }

func (n name) String() string {
	if n.test == "" {
		return n.pkg
	}
	return n.pkg + "." + n.test
}

// report gathers events. Output is shown of what did not pass only.
type report struct {
	w                       io.Writer
	root                    bool
	allowed                 []*regexp.Regexp
	output                  map[name][]string
	start                   time.Time
	packages, tests, passed int
	permitted               int
	failed, skipped         []string
}

func newReport(w io.Writer, allowed []*regexp.Regexp) *report {
	return &report{w: w, root: os.Geteuid() == 0, allowed: allowed, output: map[name][]string{}, start: time.Now()}
}

func (r *report) read(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintf(r.w, "%s\n", lines.Bytes()) // not of the test's making
			continue
		}
		r.add(e)
	}
	return lines.Err()
}

func (r *report) add(e event) {
	n := name{e.Package, e.Test}
	switch e.Action {
	case "output":
		r.output[n] = append(r.output[n], e.Output)
	case "build-output":
		fmt.Fprint(r.w, e.Output)
	case "build-fail":
		r.failed = append(r.failed, e.ImportPath+" (does not compile)")
	case "pass", "fail", "skip":
		r.finish(n, e)
		delete(r.output, n)
	}
}

func (r *report) finish(n name, e event) {
	if n.test == "" {
		if e.Action == "skip" {
			return // no test files
		}
		r.packages++
		fmt.Fprintf(r.w, "%-4s %-60s %6.1fs\n", e.Action, n.pkg, e.Elapsed)
		if e.Action == "fail" {
			// A panic or a timeout belongs to no finished test.
			if !slices.ContainsFunc(r.failed, func(f string) bool { return strings.HasPrefix(f, n.pkg+".") }) {
				r.failed = append(r.failed, n.String())
			}
			r.show(n)
		}
		return
	}
	r.tests++
	switch e.Action {
	case "pass":
		r.passed++
	case "fail":
		r.failed = append(r.failed, n.String())
		r.show(n)
	case "skip":
		if slices.ContainsFunc(r.allowed, func(re *regexp.Regexp) bool { return re.MatchString(n.String()) }) ||
			!r.root && slices.ContainsFunc(r.output[n], needsRoot.MatchString) {
			r.permitted++
			return
		}
		r.skipped = append(r.skipped, n.String())
		r.show(n)
	}
}

var needsRoot = regexp.MustCompile(`\bneeds? root\b`)

func (r *report) show(n name) {
	for _, line := range r.output[n] {
		if !strings.HasPrefix(line, "=== ") {
			fmt.Fprint(r.w, "    ", line)
		}
	}
}

// end prints what to read if nothing else is read.
func (r *report) end() bool {
	// A test whose result never came: the binary died in it.
	for n := range r.output {
		if n.test != "" {
			r.failed = append(r.failed, n.String()+" (did not end)")
			r.show(n)
		}
	}
	for _, f := range r.failed {
		fmt.Fprintf(r.w, "FAILED  %s\n", f)
	}
	for _, s := range r.skipped {
		fmt.Fprintf(r.w, "SKIPPED %s\n", s)
	}
	fmt.Fprintf(r.w, "%d packages, %d tests: %d passed, %d failed, %d skipped, %d allowed to skip; %v\n",
		r.packages, r.tests, r.passed, len(r.failed), len(r.skipped), r.permitted, time.Since(r.start).Round(time.Second))
	return len(r.failed) == 0 && len(r.skipped) == 0 && r.tests > 0
}
