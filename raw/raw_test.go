package raw_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/image/imagetest"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage"
	"github.com/imgnbd/imgnbd/storage/file"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// onFile makes raw disks in files. What is read from the file afterwards, by
// another way, has to be what the device held.
func onFile(content []byte, opt storage.Options, wrap func(image.Device) image.Device) imagetest.Target {
	return imagetest.Target{New: func(t testing.TB) imagetest.Disk {
		path := filepath.Join(t.TempDir(), "disk.raw")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return imagetest.Disk{
			Content: padded(content),
			Open: func() (image.Device, error) {
				s, err := file.Open(context.Background(), &url.URL{Scheme: "file", Path: path}, opt)
				if err != nil {
					return nil, err
				}
				d, err := raw.Open(s, image.Options{Name: path})
				if err != nil {
					return nil, errors.Join(err, s.Close())
				}
				return wrap(d), nil
			},
			Judge: func(want []byte) error {
				got, err := os.ReadFile(path)
				if err == nil && !bytes.Equal(padded(got), want) {
					err = errors.New("the file holds other bytes")
				}
				return err
			},
		}
	}}
}

func padded(p []byte) []byte {
	return append(slices.Clone(p), make([]byte, -len(p)&511)...)
}

func random(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(p)
	return p
}

func plain(d image.Device) image.Device { return d }

var writable = storage.Options{Access: storage.Write, Share: storage.ShareWrite}

func TestDevice(t *testing.T) {
	for _, tt := range []struct {
		name    string
		content []byte
		opt     storage.Options
	}{
		{"file", make([]byte, 1<<20), writable},
		{"full", random(1 << 20), writable},
		{"tail", random(300_001), writable},
		{"short", random(10), writable},
		{"empty", nil, storage.Options{}},
		{"read-only", random(300_001), storage.Options{}},
	} {
		t.Run(tt.name, func(t *testing.T) { imagetest.Run(t, onFile(tt.content, tt.opt, plain)) })
	}
}

func TestRandom(t *testing.T) {
	for seed := range uint64(3) {
		imagetest.Random(t, onFile(random(700_001), writable, plain), seed, imagetest.RandomOptions{Steps: 150, Cluster: 16 << 10})
	}
}

// The wrappers of package image, around a device that can do everything.
func TestWrappers(t *testing.T) {
	never := []image.Format{{Name: "never", Probe: func(r io.ReaderAt, _ int64) bool {
		var p [4]byte
		r.ReadAt(p[:], 0)
		return string(p[:]) == "\x00\x00\x00\x01" // the suite writes no zeros within data
	}}}
	for name, wrap := range map[string]func(image.Device) image.Device{
		"ReadOnly":           image.ReadOnly,
		"IgnoreDiscard":      image.IgnoreDiscard,
		"DetectZeroes":       func(d image.Device) image.Device { return image.DetectZeroes(d, false) },
		"DetectZeroes unmap": func(d image.Device) image.Device { return image.DetectZeroes(d, true) },
		"WriteThrough":       image.WriteThrough,
		"Unsafe":             image.Unsafe,
		"ProbeGuard":         func(d image.Device) image.Device { return image.ProbeGuard(d, never) },
		"all": func(d image.Device) image.Device {
			return image.WriteThrough(image.DetectZeroes(image.IgnoreDiscard(image.ProbeGuard(d, never)), true))
		},
	} {
		t.Run(name, func(t *testing.T) {
			target := onFile(random(400_000), writable, wrap)
			imagetest.Run(t, target)
			if name != "ReadOnly" {
				imagetest.Random(t, target, 9, imagetest.RandomOptions{Steps: 60, Cluster: 8 << 10})
			}
		})
	}
}

func open(t *testing.T, s storage.Store, params ...image.Param) *raw.Disk {
	t.Helper()
	d, err := raw.Open(s, image.Options{Name: "disk", Params: params})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestTail(t *testing.T) {
	content := random(1000)
	m := storagetest.MemOf(content)
	d := open(t, m)
	if size := d.Info().Size; size != 1024 {
		t.Fatalf("size %d", size)
	}
	// Discarding the last sector leaves the store as long as it is.
	if err := d.Discard(512, 512); err != nil {
		t.Fatal(err)
	}
	if n := len(m.Bytes()); n != 1000 {
		t.Errorf("%d bytes after a discard", n)
	}
	// A write into the tail extends it as far as it reaches.
	if err := d.WriteAt([]byte("tail"), 1010, 0); err != nil {
		t.Fatal(err)
	}
	if n := len(m.Bytes()); n != 1014 {
		t.Errorf("%d bytes after a write that ends at 1014", n)
	}
	// Zeroes do, too, unless they may be a hole.
	if err := d.WriteZeroes(512, 512, image.MayUnmap); err != nil {
		t.Fatal(err)
	}
	if n := len(m.Bytes()); n != 1014 {
		t.Errorf("%d bytes after unmapping the last sector", n)
	}
	if err := d.WriteZeroes(512, 512, 0); err != nil {
		t.Fatal(err)
	}
	if n := len(m.Bytes()); n != 1024 {
		t.Errorf("%d bytes after zeroing the last sector", n)
	}
}

func TestTailExtents(t *testing.T) {
	d := open(t, storagetest.MemOf(random(1000)))
	for want := range image.WantLocation * 2 {
		got, err := d.AppendExtents(nil, 1000, 24, want)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0].Length != 24 || !got[0].Zero || got[0].Data || got[0].At.Store != nil {
			t.Errorf("the tail, asked for %d, is %+v", want, got)
		}
	}
}

// A store that somebody shortens meanwhile is an error, not zeros.
func TestCutShort(t *testing.T) {
	m := storagetest.MemOf(random(4096))
	d := open(t, m)
	if err := m.Truncate(1024); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 4096), 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("reading what was cut off: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 1024), 0); err != nil {
		t.Errorf("reading what is left: %v", err)
	}
	for e, err := range image.Extents(d, 0, 4096, image.WantZero) {
		if err != nil || e.Zero || !e.Data {
			t.Errorf("%+v, %v: nobody would read it", e, err)
		}
	}
}

func TestWindow(t *testing.T) {
	content := random(5000) // 5120 as a disk
	for _, tt := range []struct {
		offset, size string
		want         int64 // size, -1: an error
	}{
		{"0", "", 5120}, {"512", "", 4608}, {"100", "", 5120}, {"5120", "", 0}, {"5121", "", -1}, {"0x200", "", 4608},
		{"0", "512", 512}, {"0", "5120", 5120}, {"512", "4608", 4608}, {"512", "5120", -1}, {"0", "100", -1}, {"1", "0", 0},
		{"-1", "", -1}, {"x", "", -1}, {"9223372036854775807", "", -1}, {"0", "9223372036854775296", -1},
	} {
		t.Run(tt.offset+"+"+tt.size, func(t *testing.T) {
			params := []image.Param{{Key: "offset", Value: tt.offset}}
			if tt.size != "" {
				params = append(params, image.Param{Key: "size", Value: tt.size})
			}
			m := storagetest.MemOf(content)
			d, err := raw.Open(m, image.Options{Params: params})
			if tt.want < 0 {
				if err == nil {
					t.Fatal("accepted")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := d.Info().Size; got != tt.want {
				t.Fatalf("size %d, not %d", got, tt.want)
			}
		})
	}
	if _, err := raw.Open(storagetest.NewMem(1), image.Options{Params: []image.Param{{Key: "foo", Value: "1"}}}); err == nil {
		t.Error("an unknown option is accepted")
	}
}

func TestWindowIsDevice(t *testing.T) {
	content := random(1 << 20)
	for _, w := range [][2]int{{512, 300_032}, {1000, 65536}, {1<<20 - 1000, -1}} {
		t.Run(fmt.Sprint(w), func(t *testing.T) {
			imagetest.Run(t, imagetest.Target{New: func(testing.TB) imagetest.Disk {
				m := storagetest.MemOf(content)
				params := []image.Param{{Key: "offset", Value: fmt.Sprint(w[0])}}
				end := len(content)
				if w[1] >= 0 {
					params = append(params, image.Param{Key: "size", Value: fmt.Sprint(w[1])})
					end = w[0] + w[1]
				}
				return imagetest.Disk{
					Content: padded(content[w[0]:end]),
					Open: func() (image.Device, error) {
						m = storagetest.MemOf(m.Bytes()[:max(len(content), len(m.Bytes()))])
						// What begins within a sector may end in one that the store has not begun.
						return raw.Open(m, image.Options{Params: params, ReadOnly: w[1] < 0})
					},
					Judge: func([]byte) error {
						// Nothing around the window is touched.
						got := m.Bytes()
						if !bytes.Equal(got[:w[0]], content[:w[0]]) || !bytes.Equal(got[end:len(content)], content[end:]) {
							return errors.New("bytes outside the window changed")
						}
						return nil
					},
				}
			}})
		})
	}
}

func TestCreate(t *testing.T) {
	create := raw.Format().Create
	m := storagetest.MemOf(random(10_000))
	if err := create(t.Context(), m, image.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.Bytes(), make([]byte, 1<<20)) {
		t.Error("a new image is not all zeros")
	}
	// In memory zeros that are not written occupy nothing.
	for prealloc, want := range map[string]int64{"off": 0, "falloc": 0, "full": 1 << 20} {
		m := storagetest.MemOf(random(2 << 20))
		err := create(t.Context(), m, image.CreateOptions{Size: 1<<20 - 100, Params: []image.Param{{Key: "preallocation", Value: prealloc}}})
		if err != nil || !bytes.Equal(m.Bytes(), make([]byte, 1<<20)) || m.Allocated() < want {
			t.Errorf("%s: %v, %d bytes allocated", prealloc, err, m.Allocated())
		}
	}
	for _, p := range []image.Param{{Key: "preallocation", Value: "metadata"}, {Key: "preallocation", Value: "x"}, {Key: "x", Value: "off"}} {
		m := storagetest.MemOf(random(512))
		if err := create(t.Context(), m, image.CreateOptions{Size: 1 << 20, Params: []image.Param{p}}); err == nil || !bytes.Equal(m.Bytes(), random(512)) {
			t.Errorf("%v: %v", p, err)
		}
	}

	// What the file system cannot hold costs nothing.
	m = storagetest.MemOf(random(512))
	small := storagetest.Fault(m, func(op storagetest.Op) *storagetest.Failure {
		if op.Kind == storagetest.OpTruncate && op.Offset > 512 {
			return &storagetest.Failure{Err: syscall.EFBIG}
		}
		return nil
	})
	if err := create(t.Context(), small, image.CreateOptions{Size: 1 << 20}); !errors.Is(err, syscall.EFBIG) || !bytes.Equal(m.Bytes(), random(512)) {
		t.Errorf("larger than the file system has it: %v, %d bytes remain", err, len(m.Bytes()))
	}

	dev := storagetest.NewMem(1<<20, storagetest.FixedSize)
	if err := dev.WriteAt(random(1<<20), 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := create(t.Context(), dev, image.CreateOptions{Size: 1 << 21}); !storage.NoSpace(err) || !bytes.Equal(dev.Bytes(), random(1<<20)) {
		t.Errorf("an image larger than its device: %v", err)
	}
	if err := create(t.Context(), dev, image.CreateOptions{Size: 1 << 19}); err != nil || !bytes.Equal(dev.Bytes()[:512], make([]byte, 512)) {
		t.Errorf("on a larger device: %v", err)
	}
}

func BenchmarkRead4K(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk.raw")
	if err := os.WriteFile(path, random(64<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	s, err := file.Open(b.Context(), &url.URL{Scheme: "file", Path: path}, storage.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	d, err := raw.Open(s, image.Options{})
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 4096)
	for name, read := range map[string]func([]byte, int64) error{
		"store":     func(p []byte, off int64) error { _, err := s.ReadAt(p, off); return err },
		"raw":       func(p []byte, off int64) error { _, err := d.ReadAt(p, off); return err },
		"store try": s.TryReadAt,
		"raw try":   d.TryReadAt,
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			for i := 0; b.Loop(); i++ {
				if err := read(p, int64(i*4096)&(64<<20-1)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
