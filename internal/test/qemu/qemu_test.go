package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fake is a test that a helper may end; TempDir and Cleanup are the real one's.
type fake struct {
	testing.TB
	failed, skipped string
}

func (f *fake) Helper()                        {}
func (f *fake) Fatalf(format string, _ ...any) { f.failed = format; panic(f) }
func (f *fake) Skipf(format string, _ ...any)  { f.skipped = format; panic(f) }

func try(t *testing.T, run func(testing.TB)) (f *fake) {
	f = &fake{TB: t}
	defer func() {
		if r := recover(); r != nil && r != any(f) {
			panic(r)
		}
	}()
	run(f)
	return
}

func TestMissingTool(t *testing.T) {
	t.Setenv("CI", "")
	if f := try(t, func(t testing.TB) { Require(t, "sh", "no-such-tool") }); f.skipped == "" {
		t.Error("without CI a missing tool does not skip")
	}
	t.Setenv("CI", "1")
	if f := try(t, func(t testing.TB) { Require(t, "no-such-tool") }); f.failed == "" {
		t.Error("with CI a missing tool does not fail")
	}
	if f := try(t, func(t testing.TB) { Newer(t, "no-such-tool") }); f.failed == "" {
		t.Error("with CI a missing newer tool does not fail")
	}
}

func TestRun(t *testing.T) {
	if got := Run(t, "sh", "-c", "echo out; echo err >&2"); got != "out\n" {
		t.Errorf("Run = %q", got)
	}
	if r := Try(t, "sh", "-c", "echo out; echo err >&2; exit 3"); r != (Result{"out\n", "err\n", 3}) {
		t.Errorf("Try = %+v", r)
	}
	if f := try(t, func(t testing.TB) { Run(t, "false") }); f.failed == "" {
		t.Error("Run does not notice a failure")
	}
}

func TestStartStops(t *testing.T) {
	cmd, stop := Start(t, "sleep", "1000")
	if err := stop(); err == nil || cmd.ProcessState == nil {
		t.Errorf("stop = %v, want that it was killed", err)
	}
}

// The judges are worth nothing if they accept what is wrong.
func TestJudgesCanFail(t *testing.T) {
	a := Create(t, "qcow2", "cluster_size=4k", "1M")
	b := Create(t, "raw", "", "1M")
	Check(t, a)
	Compare(t, "qcow2", a, "raw", b)

	c := Create(t, "raw", "", "2M")
	if f := try(t, func(t testing.TB) { Compare(t, "qcow2", a, "raw", c) }); f.failed == "" {
		t.Error("Compare does not notice a difference in size")
	}
	IO(t, "qcow2", a, "write -P 7 0 8k")
	if f := try(t, func(t testing.TB) { Compare(t, "qcow2", a, "raw", b) }); f.failed == "" {
		t.Error("Compare does not notice a difference")
	}
	if f := try(t, func(t testing.TB) { IO(t, "qcow2", a, "read -P 8 0 4k") }); f.failed == "" {
		t.Error("IO does not notice a wrong pattern")
	}
	// The L1 table is the fourth cluster; an entry of ones is corruption.
	f, err := os.OpenFile(a, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(strings.Repeat("\xff", 8)), 3*4096); err != nil {
		t.Fatal(err)
	}
	if f := try(t, func(t testing.TB) { CheckLeaks(t, a) }); f.failed == "" {
		t.Error("CheckLeaks does not notice corruption")
	}
}

func TestNewer(t *testing.T) {
	for tool, version := range map[string]string{"qemu-img": " 10.", "qemu-nbd": " 10.", "nbdinfo": " 1.22", "nbdcopy": " 1.22", "nbdkit": " 1.42"} {
		if out := Run(t, Newer(t, tool), "--version"); !strings.Contains(out, version) {
			t.Errorf("%s --version: %s", tool, out)
		}
	}
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	Run(t, Newer(t, "qemu-img"), "create", "-q", "-f", "qcow2", file, "1M")
	Check(t, file)
}
