package connect

import (
	"path/filepath"
	"syscall"
	"testing"
)

// Nothing that has taken the place of a mount point is waited for.
func TestSyncFS(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, filepath.Dir(fifo)} {
		if err := (linux{}).syncFS(path); err != nil {
			t.Error(err)
		}
	}
}
