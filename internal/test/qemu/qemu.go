// Package qemu runs the tools of other projects for tests: QEMU's, and those
// of libnbd, nbdkit and the rest that judge what this module does.
//
// A test says with [Require] what it needs. On a developer's machine a tool
// that is missing skips the test and is named; where the environment has CI
// set it fails the test, because a judge that is absent has judged nothing.
// All functions call t.Fatal or t.Skip, so they belong on the goroutine of
// the test.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// limit bounds one run of a tool. It is there to end a hang, not to judge
// speed, so it is long.
const limit = 3 * time.Minute

// installer is named where a tool is missing.
const installer = "internal/test/install-judges installs it"

// Require returns the path of tool, and skips or fails the test if it or one
// of the others is missing. A tool is looked for in PATH and in the system's
// sbin folders, where Debian keeps mkfs, losetup and nbd-client.
func Require(t testing.TB, tool string, others ...string) string {
	t.Helper()
	for _, o := range others {
		find(t, o)
	}
	return find(t, tool)
}

func find(t testing.TB, tool string) string {
	t.Helper()
	if path, err := exec.LookPath(tool); err == nil {
		return path
	}
	if !strings.Contains(tool, "/") {
		for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
			if path, err := exec.LookPath(filepath.Join(dir, tool)); err == nil {
				return path
			}
		}
	}
	Missing(t, tool)
	return ""
}

// Missing skips or fails the test for want of something that Require cannot
// look for.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("%s is missing: %s", what, installer)
	}
	t.Skipf("%s is missing: %s", what, installer)
}

// A Result is what a tool left behind.
type Result struct {
	Stdout, Stderr string
	Code           int // exit status, -1 if a signal ended it
}

// Try runs a tool to its end and returns what it did, also if it failed. The
// test fails only if the tool cannot be started or hangs.
func Try(t testing.TB, tool string, args ...string) Result {
	t.Helper()
	path := Require(t, tool)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = environment()
	// A child of the tool that keeps its output open must not keep us.
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s: no end within %v\n%s%s", line(tool, args), limit, &stdout, &stderr)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		t.Fatalf("%s: %v", line(tool, args), err)
	}
	return Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// Run runs a tool, which has to succeed, and returns what it wrote to its
// standard output.
func Run(t testing.TB, tool string, args ...string) string {
	t.Helper()
	r := Try(t, tool, args...)
	if r.Code != 0 {
		t.Fatalf("%s: exit status %d\n%s%s", line(tool, args), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Start starts a tool that serves, and kills it when the test is over. What
// it wrote is shown if the test failed. The caller waits for its readiness in
// the tool's own way (a pid file, a socket that accepts); stop ends it early,
// may be called more than once, and returns what Wait returned.
func Start(t testing.TB, tool string, args ...string) (cmd *exec.Cmd, stop func() error) {
	t.Helper()
	path := Require(t, tool)
	cmd = exec.Command(path, args...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.Env = environment()
	cmd.WaitDelay = 5 * time.Second
	endWithParent(cmd)
	if err := cmd.Start(); err != nil {
		t.Fatalf("%s: %v", line(tool, args), err)
	}
	var stopped bool
	var end error
	stop = func() error {
		if !stopped {
			stopped = true
			cmd.Process.Kill()
			end = cmd.Wait()
		}
		return end
	}
	t.Cleanup(func() {
		stop()
		if t.Failed() && output.Len() > 0 {
			t.Logf("%s:\n%s", line(tool, args), &output)
		}
	})
	return cmd, stop
}

// environment is ours with messages in English, which tests compare.
func environment() []string { return append(os.Environ(), "LC_ALL=C", "LANGUAGE=") }

func line(tool string, args []string) string {
	return strings.Join(append([]string{filepath.Base(tool)}, args...), " ")
}
