//go:build linux

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Each kernel boots, is the one that was asked for, sees the disks, and writes
// to the host in /share only.
func TestRun(t *testing.T) {
	for _, kernel := range []string{"6.1", "6.12"} {
		t.Run(kernel, func(t *testing.T) {
			share, disk := t.TempDir(), filepath.Join(t.TempDir(), "a,b")
			if err := os.WriteFile(disk, make([]byte, 1<<20), 0o644); err != nil {
				t.Fatal(err)
			}
			beside := filepath.Join(t.TempDir(), "file")
			out := Run(t, Options{
				Kernel: kernel, Share: share, Disks: []string{disk},
				Env: []string{"WORD=it's", "BESIDE=" + beside},
				Script: `
uname -r
echo "$WORD" >/share/word
echo lost >"$BESIDE" && cat "$BESIDE"
echo here | dd of=/dev/vda conv=fsync status=none
modprobe nbd && cat /sys/block/nbd0/size
`})
			if !strings.HasPrefix(out, kernel+".") || !strings.HasSuffix(out, "\nlost\n0\n") {
				t.Errorf("output: %s", out)
			}
			if b, err := os.ReadFile(filepath.Join(share, "word")); err != nil || string(b) != "it's\n" {
				t.Errorf("/share: %q, %v", b, err)
			}
			if b, err := os.ReadFile(disk); err != nil || !strings.HasPrefix(string(b), "here\n") {
				t.Errorf("/dev/vda: %.5q, %v", b, err)
			}
			if _, err := os.Stat(beside); err == nil {
				t.Error("the guest has written to the host")
			}
		})
	}
}

// A guest that dies before the script began is booted again; one that dies
// later, or each time, is a failure.
func TestRunAgain(t *testing.T) {
	// The machine: ENDS has what happens each time.
	const machine = `#!/bin/bash
own=$(grep -oP 'file:\K.*(?=/console)' <<<"$*")
read -r now <"$ENDS"
sed -i 1d "$ENDS"
echo "end: $now" >"$own/console"
[ $now = dead ] || echo words >"$own/output"
[ $now != done ] || echo 0 >"$own/status"
`
	for _, c := range []struct{ ends, left, output, failure string }{
		{"dead dead done", "", "words\n", ""},
		{"dead killed done", "done\n", "", "guest with Linux 6.1: the guest died: <nil>\nwords\n--- console:\nend: killed\n"},
		{"dead dead dead done", "done\n", "", "guest with Linux 6.1: the guest died: <nil>\n--- console:\nend: dead\n"},
	} {
		t.Run(c.ends, func(t *testing.T) {
			bin := t.TempDir()
			if err := os.WriteFile(filepath.Join(bin, "qemu-system-x86_64"), []byte(machine), 0o755); err != nil {
				t.Fatal(err)
			}
			ends := filepath.Join(bin, "ends")
			if err := os.WriteFile(ends, []byte(strings.ReplaceAll(c.ends, " ", "\n")+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			t.Setenv("ENDS", ends)
			tb := &failing{TB: t}
			if out := Run(tb, Options{Kernel: "6.1"}); out != c.output || tb.failure != c.failure {
				t.Errorf("output %q, failure %q", out, tb.failure)
			}
			if b, err := os.ReadFile(ends); err != nil || string(b) != c.left {
				t.Errorf("left: %q, %v", b, err)
			}
		})
	}
}

// failing takes a failure for a result.
type failing struct {
	testing.TB
	failure string
}

func (f *failing) Fatal(args ...any) { f.failure = fmt.Sprint(args...) }
