package interop

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/internal/test/qemu"
)

// A qcow2 image takes as much of the host afterwards as it does with qemu-nbd:
// what the guest gave up is given back if --discard=unmap asks for it, and what
// falls free otherwise keeps its space.
func TestSpaceSameAsQEMUNBD(t *testing.T) {
	const size = 8 << 20
	for _, tt := range []struct {
		name    string
		make    func(t *testing.T, file string)
		command string
	}{
		{"compressed, overwritten", compressedImage, "write -P 5 0 8M"},
		{"compressed, zeroed", compressedImage, "write -z 0 8M"},
		{"compressed, unmapped", compressedImage, "write -z -u 0 8M"},
		{"compressed, trimmed", compressedImage, "discard 0 8M"},
		{"preallocated, overwritten", preallocatedImage, "write -P 5 0 8M"},
		{"preallocated, zeroed", preallocatedImage, "write -z 0 8M"},
		{"preallocated, unmapped", preallocatedImage, "write -z -u 0 8M"},
		{"preallocated, trimmed", preallocatedImage, "discard 0 8M"},
		{"of a snapshot, overwritten", snapshotImage, "write -P 5 0 8M"},
		{"of a snapshot, trimmed", snapshotImage, "discard 0 8M"},
	} {
		for _, discard := range []string{"ignore", "unmap"} {
			t.Run(tt.name+", "+discard, func(t *testing.T) {
				dir := t.TempDir()
				was := filepath.Join(dir, "was.qcow2")
				tt.make(t, was)
				taken := func(program string) int64 {
					file := filepath.Join(dir, "now.qcow2")
					// With holes as they are.
					qemu.Run(t, "cp", "--sparse=always", was, file)
					if strings.HasPrefix(tt.name, "preallocated") {
						preallocate(t, file)
					}
					socket, ready := filepath.Join(dir, "s"), filepath.Join(t.TempDir(), "pid")
					cmd, _ := qemu.Start(t, program, "-f", "qcow2", "--discard="+discard, "-k", socket, "--pid-file="+ready, file)
					for end := time.Now().Add(hang); ; time.Sleep(5 * time.Millisecond) {
						if _, err := os.Stat(ready); err == nil {
							break
						} else if time.Now().After(end) {
							t.Fatalf("%s does not become ready", program)
						}
					}
					qemu.Run(t, "qemu-io", "-f", "raw", "-d", "unmap", "-c", tt.command, "-c", "flush", "nbd+unix:///?socket="+socket)
					if err := cmd.Wait(); err != nil { // the last client has left
						t.Fatalf("%s: %v", program, err)
					}
					qemu.Check(t, file)
					f, err := os.Open(file)
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					if err := f.Sync(); err != nil { // delayed allocation
						t.Fatal(err)
					}
					fi, err := f.Stat()
					if err != nil {
						t.Fatal(err)
					}
					return fi.Sys().(*syscall.Stat_t).Blocks * 512
				}
				ours, theirs := taken(imgnbd), taken("qemu-nbd")
				if d := ours - theirs; d > size/16 || d < -size/16 {
					t.Errorf("%d bytes, with qemu-nbd %d", ours, theirs)
				}
			})
		}
	}
}

// compressedImage makes an image whose compressed clusters take half of what
// they hold.
func compressedImage(t *testing.T, file string) {
	b := make([]byte, 8<<20)
	rng := rand.NewChaCha8([32]byte{5})
	for i := 0; i < len(b); i += 64 {
		rng.Read(b[i:][:32])
	}
	raw := file + ".raw"
	if err := os.WriteFile(raw, b, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu.Img(t, "convert", "-c", "-f", "raw", "-O", "qcow2", raw, file)
}

func preallocatedImage(t *testing.T, file string) {
	qemu.Img(t, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", file, "8M")
}

// preallocate gives all of a file its space.
func preallocate(t *testing.T, file string) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil {
		err = syscall.Fallocate(int(f.Fd()), 0, 0, fi.Size())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func snapshotImage(t *testing.T, file string) {
	qemu.Img(t, "create", "-q", "-f", "qcow2", file, "8M")
	qemu.IO(t, "qcow2", file, "write -P 1 0 8M")
	qemu.Img(t, "snapshot", "-c", "s", file)
}
