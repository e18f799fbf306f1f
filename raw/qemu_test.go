package raw_test

import (
	"bytes"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/test/qemu"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
)

// What a request does to a file that does not end with a sector, length
// included, is what QEMU does.
func TestTailAsQEMU(t *testing.T) {
	for _, tt := range []struct {
		command string
		do      func(*raw.Disk) error
	}{
		{"write -P 7 900 100", func(d *raw.Disk) error { return d.WriteAt(bytes.Repeat([]byte{7}, 100), 900, 0) }},
		{"write -P 7 1000 24", func(d *raw.Disk) error { return d.WriteAt(bytes.Repeat([]byte{7}, 24), 1000, 0) }},
		{"write -P 7 1010 4", func(d *raw.Disk) error { return d.WriteAt(bytes.Repeat([]byte{7}, 4), 1010, 0) }},
		{"write -P 7 512 512", func(d *raw.Disk) error { return d.WriteAt(bytes.Repeat([]byte{7}, 512), 512, image.FUA) }},
		{"write -z 512 512", func(d *raw.Disk) error { return d.WriteZeroes(512, 512, 0) }},
		{"write -z -u 512 512", func(d *raw.Disk) error { return d.WriteZeroes(512, 512, image.MayUnmap) }},
		{"discard 512 512", func(d *raw.Disk) error { return d.Discard(512, 512) }},
		{"flush", func(d *raw.Disk) error { return d.Flush() }},
	} {
		t.Run(tt.command, func(t *testing.T) {
			content := bytes.Repeat([]byte("tail"), 250)
			dir := t.TempDir()
			ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
			for _, path := range []string{ours, theirs} {
				if err := os.WriteFile(path, content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			qemu.IO(t, "raw", theirs, tt.command)

			s, err := file.Open(t.Context(), &url.URL{Scheme: "file", Path: ours}, writable)
			if err != nil {
				t.Fatal(err)
			}
			d, err := raw.Open(s, image.Options{Name: ours})
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.do(d); err != nil {
				t.Error(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			a, errA := os.ReadFile(ours)
			b, errB := os.ReadFile(theirs)
			if errA != nil || errB != nil {
				t.Fatal(errA, errB)
			}
			if !bytes.Equal(a, b) {
				t.Errorf("%d bytes and QEMU %d, or other ones", len(a), len(b))
			}
		})
	}
}

// The extents are those that qemu-img sees.
func TestMapAsQEMU(t *testing.T) {
	path := qemu.Create(t, "raw", "", "2000k")
	qemu.IO(t, "raw", path, "write -P 1 64k 128k", "write -P 2 1M 4k")
	s, err := file.Open(t.Context(), &url.URL{Scheme: "file", Path: path}, storage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := raw.Open(s, image.Options{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := "["
	for e, err := range image.Extents(d, 0, d.Info().Size, image.WantZero|image.WantAllocated|image.WantLocation) {
		if err != nil {
			t.Fatal(err)
		}
		if len(got) > 1 {
			got += ",\n"
		}
		got += fmt.Sprintf(`{ "start": %d, "length": %d, "depth": %d, "present": %v, "zero": %v, "data": %v, "offset": %d}`,
			e.Offset, e.Length, e.Depth, e.Allocated, e.Zero, e.Data, e.At.Offset)
	}
	got += "]\n"
	if want := qemu.Img(t, "map", "--output=json", "-f", "raw", path); got != want {
		t.Errorf("extents\n%sand QEMU's\n%s", got, want)
	}
}

// What is preallocated takes up space, as it does when qemu-img makes it.
func TestCreatePreallocated(t *testing.T) {
	qemu.Require(t, "qemu-img")
	for _, prealloc := range []string{"off", "falloc", "full"} {
		usage := func(path string) int64 {
			var st syscall.Stat_t
			if err := syscall.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			return st.Blocks * 512
		}
		path := filepath.Join(t.TempDir(), "ours")
		s, err := file.Open(t.Context(), &url.URL{Scheme: "file", Path: path}, storage.Options{Access: storage.WriteGrow, Create: true})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if err := raw.Format().Create(t.Context(), s, image.CreateOptions{Size: 3 << 20, Params: []image.Param{{Key: "preallocation", Value: prealloc}}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
		theirs := qemu.Create(t, "raw", "preallocation="+prealloc, "3M")
		if got, want := usage(path) >= 3<<20, prealloc != "off"; got != want || usage(theirs) >= 3<<20 != want {
			t.Errorf("%s: %d bytes, qemu-img's %d", prealloc, usage(path), usage(theirs))
		}
	}
}
