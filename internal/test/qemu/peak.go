package qemu

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Measure makes a command that was not started one that is run by GNU time.
// After it has ended, peak tells how many bytes of memory it had at most. Its
// exit status stays. Both are a process group of their own, which is killed
// with the command's context.
//
// The kernel's own figure for a child of ours begins with what we have: it
// survives the exec of a process that shared our memory until then.
func Measure(t testing.TB, cmd *exec.Cmd) (peak func() int64) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "peak")
	tool := Require(t, "time")
	cmd.Args = append([]string{tool, "-q", "-o", file, "-f", "%M", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = tool
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if cmd.Cancel != nil {
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	}
	return func() int64 {
		t.Helper()
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		kib, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err != nil || kib == 0 {
			t.Fatalf("GNU time says %q: %v", text, err)
		}
		return kib << 10
	}
}
