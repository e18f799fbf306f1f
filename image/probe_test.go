package image_test

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// at recognises a format by bytes at an offset, counted from the end if it is
// below zero.
func at(name string, off int64, magic string) image.Format {
	return image.Format{Name: name, Probe: func(r io.ReaderAt, size int64) bool {
		o := off
		if o < 0 {
			o += size
		}
		b := make([]byte, len(magic))
		n, err := r.ReadAt(b, o)
		return n == len(b) && (err == nil || err == io.EOF) && string(b) == magic
	}}
}

var guarded = []image.Format{
	{Name: "raw"},
	at("head", 0, "HEAD"),
	at("zero", 0, "QED\x00"),
	at("inner", 0x40, "\x7f\x10\xda\xbe"),
	at("far", 60000, "FAR!"),
	at("trailer", -512, "conectix"),
}

const guardedSize = 1 << 20

func guard(t testing.TB, content []byte) (image.Device, *storagetest.Mem) {
	t.Helper()
	if content == nil {
		content = bytes.Repeat([]byte("x"), guardedSize)
	}
	m := storagetest.MemOf(content)
	d, err := raw.Open(m, image.Options{Name: "disk"})
	if err != nil {
		t.Fatal(err)
	}
	return image.ProbeGuard(d, guarded), m
}

func TestProbeGuardRefuses(t *testing.T) {
	write := func(off int64, s string) func(image.Device) error {
		return func(d image.Device) error { return d.WriteAt([]byte(s), off, 0) }
	}
	zero := func(off, n int64) func(image.Device) error {
		return func(d image.Device) error { return d.WriteZeroes(off, n, image.MayUnmap) }
	}
	long := func(off int64, magicAt int, s string) func(image.Device) error {
		p := make([]byte, guardedSize-off)
		copy(p[magicAt:], s)
		return write(off, string(p))
	}
	for name, steps := range map[string][]func(image.Device) error{
		"at once":          {write(0, "HEAD")},
		"in a sector":      {write(0, "HEAD"+string(make([]byte, 508)))},
		"all of the disk":  {long(0, 0, "HEAD")},
		"in halves":        {write(0, "HE"), write(2, "AD")},
		"backwards":        {write(3, "D"), write(2, "A"), write(1, "E"), write(0, "H")},
		"by a zero":        {write(0, "QED"), zero(3, 1)},
		"by many zeros":    {write(0, "QED"), zero(3, guardedSize-3)},
		"the rest as data": {write(0, "QED"), long(3, 0, "")},
		"within":           {write(0x40, "\x7f\x10"), write(0x42, "\xda\xbe")},
		"across":           {write(0x30, "0123456789abcdef\x7f\x10\xda\xbe")},
		"far in":           {write(60000, "FAR!")},
		"at the end":       {write(guardedSize-512, "conectix")},
		"up to the end":    {long(1000, guardedSize-1000-512, "conectix")},
		"end in pieces":    {write(guardedSize-510, "nectix"), write(guardedSize-512, "co")},
	} {
		t.Run(name, func(t *testing.T) {
			d, m := guard(t, nil)
			for i, step := range steps {
				before := m.Bytes()
				err := step(d)
				if i < len(steps)-1 {
					if err != nil {
						t.Fatalf("step %d: %v", i, err)
					}
					continue
				}
				if !errors.Is(err, syscall.EPERM) {
					t.Errorf("the last step: %v", err)
				}
				if !bytes.Equal(m.Bytes(), before) {
					t.Error("a refused write changed the disk")
				}
			}
		})
	}
}

// Everything else is written, wherever it lies.
func TestProbeGuardAllows(t *testing.T) {
	d, m := guard(t, nil)
	for _, off := range []int64{0, 1, 100, 511, 512, 59999, 60001, 65535, 65536, 100_000, guardedSize - 65537, guardedSize - 513, guardedSize - 511, guardedSize - 8} {
		for _, s := range []string{"HEAX", "conectix", "\x7f\x10", string(make([]byte, 5000))} {
			if off+int64(len(s)) > guardedSize {
				continue
			}
			if err := d.WriteAt([]byte(s), off, image.FUA); err != nil {
				t.Errorf("%q at %d: %v", s[:2], off, err)
			}
			if got := m.Bytes()[off:][:len(s)]; string(got) != s {
				t.Errorf("%q at %d is not there", s[:2], off)
			}
		}
	}
}

// Pieces that are harmless alone, written at the same time, must not be let
// through together.
func TestProbeGuardConcurrent(t *testing.T) {
	for range 200 {
		d, m := guard(t, nil)
		var wg sync.WaitGroup
		var errs [4]error
		for i, c := range "HEAD" {
			wg.Go(func() { errs[i] = d.WriteAt([]byte(string(c)), int64(i), 0) })
		}
		wg.Wait()
		refused := 0
		for _, err := range errs {
			if errors.Is(err, syscall.EPERM) {
				refused++
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if refused != 1 || bytes.HasPrefix(m.Bytes(), []byte("HEAD")) {
			t.Fatalf("%d of 4 writes refused, and the disk begins %q", refused, m.Bytes()[:4])
		}
	}
}

// A discard may zero any part of its range: the ends are left out.
func TestProbeGuardDiscard(t *testing.T) {
	content := bytes.Repeat([]byte("x"), guardedSize)
	copy(content, "QEDxxxx")
	for _, r := range [][2]int64{{0, guardedSize}, {3, 4093}, {0, 4096}, {guardedSize - 4096, 4096}, {100_000, 8192}} {
		d, m := guard(t, content)
		if err := d.Discard(r[0], r[1]); err != nil {
			t.Fatal(err)
		}
		got := m.Bytes()
		if !bytes.Equal(got[:65536], content[:65536]) || !bytes.Equal(got[guardedSize-65536:], content[guardedSize-65536:]) {
			t.Errorf("Discard(%d+%d) changed an end", r[0], r[1])
		}
		if r[1] > 4096 && m.Allocated() == guardedSize {
			t.Errorf("Discard(%d+%d) gave nothing back", r[0], r[1])
		}
	}
}

// If the disk cannot be looked at, it cannot be said that a write is harmless.
func TestProbeGuardReadError(t *testing.T) {
	m := storagetest.MemOf(bytes.Repeat([]byte("x"), 4096))
	inner, err := raw.Open(m, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := image.ProbeGuard(unreadable{inner}, guarded)
	if err := d.WriteAt([]byte("AD"), 2, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v, not %v", err, syscall.EIO)
	}
	if m.Bytes()[2] != 'x' {
		t.Error("it was written")
	}
}

type unreadable struct{ image.Device }

func (unreadable) ReadAt([]byte, int64) (int, error) { return 0, syscall.EIO }

func BenchmarkProbeGuard(b *testing.B) {
	p := make([]byte, 4096)
	d, _ := guard(b, nil)
	for name, off := range map[string]int64{"head": 4096, "middle": 500_000} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := d.WriteAt(p, off, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
