package program

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// To check an image of 1 TiB with all its tables takes little memory, a byte
// for each cluster and the program itself, and shows how far it is.
func TestCheckLarge(t *testing.T) {
	bin := build(t)
	file := filepath.Join(t.TempDir(), "disk.qcow2")
	qemu.Run(t, bin, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", file, "1T")
	run := func(tool string, args ...string) (stderr string, rss int64) {
		t.Helper()
		var b bytes.Buffer
		cmd := exec.Command(tool, args...)
		cmd.Stderr = &b
		peak := qemu.Measure(t, cmd)
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s: %v\n%s", tool, err, &b)
		}
		rss = peak()
		t.Logf("%s: %v of processor time, %d MiB", filepath.Base(tool), cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime(), rss>>20)
		return b.String(), rss
	}
	stderr, rss := run(bin, "check", "--progress", "-f", "qcow2", file)
	if limit := int64(48 << 20); rss > limit {
		t.Errorf("%d bytes of memory, more than %d", rss, limit)
	}
	if steps := strings.Split(strings.TrimSuffix(stderr, "\n"), "\r"); len(steps) < 100 || !strings.Contains(stderr, "(100.00/100%)") {
		t.Errorf("%d steps of progress, the last of them %q", len(steps), steps[max(len(steps)-2, 0)])
	}
	run(qemu.Require(t, "qemu-img"), "check", "-f", "qcow2", file) // to compare
}
