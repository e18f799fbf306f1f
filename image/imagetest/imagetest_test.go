package imagetest

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/raw"
	"github.com/imgnbd/imgnbd/storage/storagetest"
)

// memory makes raw disks in memory, with a wrapper around each.
func memory(size int64, wrap func(image.Device) image.Device) Target {
	return Target{New: func(testing.TB) Disk {
		m := storagetest.NewMem(size)
		return Disk{Open: func() (image.Device, error) {
			m = storagetest.MemOf(m.Bytes())
			d, err := raw.Open(m, image.Options{Name: "memory"})
			if err != nil {
				return nil, err
			}
			return wrap(d), nil
		}}
	}}
}

func plain(d image.Device) image.Device { return d }

func TestRaw(t *testing.T) { Run(t, memory(1<<20, plain)) }

func TestRandom(t *testing.T) {
	Random(t, memory(1<<20, plain), 1, RandomOptions{Steps: 200, Cluster: 16 << 10})
}

// Devices that break one rule each.

type (
	xored     struct{ image.Device } // changes bytes, inherits extents
	spills    struct{ image.Device } // writes one byte too many
	rewrites  struct{ image.Device } // reads, modifies and writes whole sectors, unguarded
	ones      struct{ image.Device } // a discarded range reads as 0xff
	stale     struct{ image.Device } // TryReadAt answers zeros
	short     struct{ image.Device } // a long read stops early, silently
	immortal  struct{ image.Device } // works after Close
	gone      struct{ image.Device } // Flush fails after Close as it should, but as something else
	halfFast  struct{ image.Device } // refuses a fast zero having done half of it
	liesZero  struct{ image.Device } // says that all is zero
	overrun   struct{ image.Device } // describes more than was asked for
	overwrite struct{ image.Device } // AppendExtents does not append
	boundless struct{ image.Device } // describes all that was asked for
	lazy      struct {
		last *[]byte
		image.Device
	} // keeps the slice of a write
	elsewhere struct{ image.Device } // gives locations that are off by a sector
	willing   struct{ image.Device } // says read-only and writes
	unbounded struct{ image.Device } // takes any range
)

func (x xored) ReadAt(p []byte, off int64) (int, error) {
	n, err := x.Device.ReadAt(p, off)
	flip(p[:n])
	return n, err
}

func (x xored) TryReadAt([]byte, int64) error { return image.ErrWouldBlock }

func (x xored) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	q := bytes.Clone(p)
	flip(q)
	return x.Device.WriteAt(q, off, flags)
}

// flip leaves zeros alone, so that holes stay true.
func flip(p []byte) {
	for i := range p {
		if p[i] != 0 && p[i] != 0x55 {
			p[i] ^= 0x55
		}
	}
}

func (x spills) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	if err := x.Device.WriteAt(p, off, flags); err != nil || len(p) == 0 {
		return err
	}
	if off+int64(len(p)) < x.Info().Size {
		return x.Device.WriteAt(p[:1], off+int64(len(p)), 0)
	}
	return nil
}

func (x rewrites) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	const unit = 4096
	lo, hi := off&^(unit-1), min((off+int64(len(p))+unit-1)&^(unit-1), x.Info().Size)
	if off < 0 || lo >= hi {
		return x.Device.WriteAt(p, off, flags)
	}
	q := make([]byte, hi-lo)
	if _, err := x.Device.ReadAt(q, lo); err != nil {
		return err
	}
	time.Sleep(time.Microsecond) // which, in a bubble of synctest, others come in
	copy(q[off-lo:], p)
	return x.Device.WriteAt(q, lo, flags)
}

func (x ones) Discard(off, n int64) error {
	if err := x.Device.Discard(off, n); err != nil {
		return err
	}
	return x.Device.WriteAt(bytes.Repeat([]byte{0xff}, int(n)), off, 0)
}

func (x stale) TryReadAt(p []byte, off int64) error {
	clear(p)
	return x.Device.TryReadAt(p[:0], off)
}

func (x short) ReadAt(p []byte, off int64) (int, error) {
	return x.Device.ReadAt(p[:min(len(p), 4096)], off)
}

func (x immortal) Close() error { return x.Flush() }

func (x gone) Flush() error {
	if err := x.Device.Flush(); err != nil {
		return errors.New("gone")
	}
	return nil
}

func (x halfFast) WriteZeroes(off, n int64, flags image.WriteFlags) error {
	if flags&image.FastOnly != 0 && n > 1 {
		if err := x.Device.WriteZeroes(off, n/2, 0); err != nil {
			return err
		}
		return errors.ErrUnsupported
	}
	return x.Device.WriteZeroes(off, n, flags)
}

func (x liesZero) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	i := len(dst)
	dst, err := x.Device.AppendExtents(dst, off, n, want)
	for ; i < len(dst); i++ {
		dst[i].Zero = true
	}
	return dst, err
}

func (x overrun) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	dst, err := x.Device.AppendExtents(dst, off, n, want)
	if err == nil {
		dst[len(dst)-1].Length++
	}
	return dst, err
}

func (x overwrite) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	return x.Device.AppendExtents(dst[:0], off, n, want)
}

func (x boundless) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	for e, err := range image.Extents(x.Device, off, n, want) {
		if err != nil {
			return dst, err
		}
		dst = append(dst, e)
	}
	return dst, nil
}

func (x lazy) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	*x.last = p
	return x.Device.WriteAt(p, off, flags)
}

func (x lazy) Close() error {
	if err := x.Device.WriteAt(*x.last, 0, 0); err != nil {
		return err
	}
	return x.Device.Close()
}

func (x elsewhere) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	i := len(dst)
	dst, err := x.Device.AppendExtents(dst, off, n, want)
	for ; i < len(dst); i++ {
		dst[i].At.Offset ^= 512
	}
	return dst, err
}

func (x willing) Info() image.Info {
	info := x.Device.Info()
	info.ReadOnly = true
	return info
}

func (x unbounded) Discard(off, n int64) error {
	if err := image.CheckRange(x.Info().Size, off, n); err != nil {
		return nil
	}
	return x.Device.Discard(off, n)
}

// The suite has to catch each of them, and by which check is part of the claim.
func TestSuiteCatches(t *testing.T) {
	for _, tt := range []struct {
		name  string
		wrap  func(image.Device) image.Device
		check string
		says  string
	}{
		{"xored", func(d image.Device) image.Device { return xored{d} }, "write", "holds other bytes"},
		{"spills", func(d image.Device) image.Device { return spills{d} }, "write", "byte 0x1 is"},
		{"rewrites", func(d image.Device) image.Device { return rewrites{d} }, "disjoint", "byte"},
		{"ones", func(d image.Device) image.Device { return ones{d} }, "discard", "is 0xff"},
		{"stale", func(d image.Device) image.Device { return stale{d} }, "write", "TryReadAt"},
		{"short", func(d image.Device) image.Device { return short{d} }, "content", "ReadAt"},
		{"immortal", func(d image.Device) image.Device { return immortal{d} }, "closed", "after Close: <nil>"},
		{"gone", func(d image.Device) image.Device { return gone{d} }, "closed", "Flush after Close"},
		{"half fast", func(d image.Device) image.Device { return halfFast{d} }, "fast zeroes", "ReadAt"},
		{"lies zero", func(d image.Device) image.Device { return liesZero{d} }, "write", "said to be zeros"},
		{"overrun", func(d image.Device) image.Device { return overrun{d} }, "extents", "ending by"},
		{"overwrite", func(d image.Device) image.Device { return overwrite{d} }, "extents", "wrong place"},
		{"boundless", func(d image.Device) image.Device { return boundless{d} }, "fragments", "64 are allowed"},
		{"lazy", func(d image.Device) image.Device { return lazy{new([]byte), d} }, "buffers", "ReadAt"},
		{"elsewhere", func(d image.Device) image.Device { return elsewhere{d} }, "write", "holds other bytes"},
		{"willing", func(d image.Device) image.Device { return willing{d} }, "read-only", "on a read-only device"},
		{"unbounded", func(d image.Device) image.Device { return unbounded{d} }, "bounds", "Discard"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, c := range checks {
				if c.name != tt.check {
					continue
				}
				synctest.Test(t, func(t *testing.T) { // so that requests meet
					d, err := open(memory(300_032, tt.wrap).New(t))
					if err != nil {
						t.Fatal(err)
					}
					err = c.verdict(d)
					if err == nil {
						t.Fatalf("check %q finds nothing wrong", c.name)
					}
					if !strings.Contains(err.Error(), tt.says) {
						t.Errorf("check %q says %q, without %q", c.name, err, tt.says)
					}
				})
				return
			}
			t.Fatalf("no check %q", tt.check)
		})
	}
}

// Random operations have to find what goes wrong only when requests share a
// unit of the device, and shrink it to what is needed.
func TestRandomCatches(t *testing.T) { synctest.Test(t, testRandomCatches) }

func testRandomCatches(t *testing.T) {
	target := memory(300_032, func(d image.Device) image.Device { return rewrites{d} })
	fails := func(h history) bool {
		d, err := open(target.New(t))
		if err != nil {
			t.Fatal(err)
		}
		return replay(d, h) != nil
	}
	for seed := range uint64(20) {
		h := generate(seed, 300_032, 16<<10, 60)
		if !fails(h) {
			continue
		}
		short := shrink(h, fails, time.Now().Add(20*time.Second))
		t.Logf("seed %d, %d operations:\n%s", seed, short.ops(), short)
		if short.ops() > h.ops()/4 {
			t.Errorf("%d of %d operations are left", short.ops(), h.ops())
		}
		return
	}
	t.Error("20 random histories found nothing wrong")
}
