//go:build linux

package vm

import (
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
