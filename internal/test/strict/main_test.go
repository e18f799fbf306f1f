package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/journal"
)

func TestReport(t *testing.T) {
	module := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(module, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	write("go.mod", "module example\n\ngo 1.26.0\n")
	skips := write("skips", "# comment\n\nexample.TestAllowed needs a moon\n")
	t.Chdir(module)
	t.Setenv("TMPDIR", t.TempDir()) // whose journals are nobody else's
	dirs := journal.Dirs()
	shm := dirs[len(dirs)-1]
	left := filepath.Join(shm, "strict-test.journal")
	t.Cleanup(func() { os.Remove(left) })

	for _, c := range []struct {
		name, body, want string
		ok               bool
	}{
		{"pass", `func TestA(t *testing.T) {}`, "1 packages, 1 tests: 1 passed, 0 failed, 0 skipped, 0 allowed to skip", true},
		{"fail", `func TestA(t *testing.T) { t.Error("because") }`, "FAILED  example.TestA\n", false},
		{"skip", `func TestA(t *testing.T) { t.Skip("because") }`, "SKIPPED example.TestA\n", false},
		{"allowed", `func TestAllowed(t *testing.T) { t.Skip() }`, "0 skipped, 1 allowed to skip", true},
		{"not compiling", `func TestA(t *testing.T) { no() }`, "undefined: no", false},
		{"panic", `func TestA(t *testing.T) { panic("because") }`, "panic: because", false},
		{"exit", `func TestA(t *testing.T) { os.Exit(0) }`, "FAILED  example", false},
		{"nothing", ``, " 0 tests", false},
		{"a journal", `func TestA(t *testing.T) { os.Mkdir("` + shm + `", 0o700); os.WriteFile("` + left + `", []byte("opened as \"file://"+os.TempDir()+"/x\""), 0o600) }`, "left behind", false},
		{"CI", `func TestA(t *testing.T) { if os.Getenv("CI") == "" { t.Error() } }`, "1 passed", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			write("a_test.go", "package example\n\nimport (\n\t\"os\"\n\t\"testing\"\n)\n\nvar _ = os.Exit\nvar _ testing.TB\n\n"+c.body+"\n")
			var out strings.Builder
			ok, err := run(skips, []string{"."}, &out)
			if err != nil {
				t.Fatal(err)
			}
			if ok != c.ok || !strings.Contains(out.String(), c.want) {
				t.Errorf("ok = %v, want %v and %q in\n%s", ok, c.ok, c.want, &out)
			}
		})
	}
}

func TestRoot(t *testing.T) {
	for _, root := range []bool{false, true} {
		r := newReport(io.Discard, nil)
		r.root = root
		r.add(event{Action: "output", Package: "p", Test: "TestA", Output: "a_test.go:1: block devices need root\n"})
		r.add(event{Action: "skip", Package: "p", Test: "TestA"})
		if ok := r.end(); ok == root {
			t.Errorf("root %v: ok = %v", root, ok)
		}
	}
}

func TestSkipsHaveReasons(t *testing.T) {
	file := filepath.Join(t.TempDir(), "skips")
	if err := os.WriteFile(file, []byte("export.TestA\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readSkips(file); err == nil {
		t.Error("a skip without a reason is accepted")
	}
}
