package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The program is locked in memory, and not the image, of which only addresses are mapped.
func TestLockFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to lock so much memory")
	}
	page := os.Getpagesize()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, page), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at, err := unix.MmapPtr(int(f.Fd()), 0, nil, uintptr(2*page), unix.PROT_NONE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.MunmapPtr(at, uintptr(2*page))
	defer unix.Munlockall()
	if err := lockFiles(); err != nil {
		t.Errorf("with an image mapped: %v", err)
	}
}
