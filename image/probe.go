package image

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
)

// probeReach is how far from either end of an image a Format.Probe looks.
const probeReach = 64 << 10

// probe returns the first format that recognises r, nil if none does.
func probe(formats []Format, r io.ReaderAt, size int64) (*Format, error) {
	for i := range formats {
		yes, err := formats[i].Recognises(r, size)
		if err != nil {
			return nil, err
		}
		if yes {
			return &formats[i], nil
		}
	}
	return nil, nil
}

// Recognises asks f.Probe. An error is that of a read: a format that could not
// look has not said no.
func (f *Format) Recognises(r io.ReaderAt, size int64) (bool, error) {
	if f.Probe == nil {
		return false, nil
	}
	v := probedReader{r: r}
	yes := f.Probe(&v, size)
	return yes && v.err == nil, v.err
}

// A probedReader keeps the error that a Probe cannot return.
type probedReader struct {
	r   io.ReaderAt
	err error // the first but io.EOF
}

func (v *probedReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, io.EOF // the store is too small for what lies at its end
	}
	n, err := v.r.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) && v.err == nil {
		v.err = err
	}
	return n, err
}

// ProbeGuard returns d with writes refused, as syscall.EPERM, that would make
// one of formats recognise it. It goes around a raw image whose format was a
// guess: without it, a guest could write a header that names any file of the
// host as its backing image, and read it after the next guess.
//
// Only the ends of the disk are guarded, where formats are recognised; there
// one write at a time is looked at together with what the disk holds, so that
// writing a header in pieces does not help. Writes elsewhere pass untouched.
func ProbeGuard(d Device, formats []Format) Device {
	return &probeGuard{Device: d, formats: formats, size: d.Info().Size}
}

type probeGuard struct {
	Device
	formats []Format
	size    int64
	mu      sync.Mutex // held from looking at a write until it is done
}

// free reports whether no format looks at any byte of a range.
func (g *probeGuard) free(off, n int64) bool {
	return off >= probeReach && off <= g.size-probeReach-n
}

func (g *probeGuard) WriteAt(p []byte, off int64, flags WriteFlags) error {
	n := int64(len(p))
	if g.free(off, n) {
		return g.Device.WriteAt(p, off, flags)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.check(p, off, n); err != nil {
		return err
	}
	return g.Device.WriteAt(p, off, flags)
}

// WriteZeroes is looked at too: a zero can be the last byte of a magic number.
func (g *probeGuard) WriteZeroes(off, n int64, flags WriteFlags) error {
	if g.free(off, n) {
		return g.Device.WriteZeroes(off, n, flags)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.check(nil, off, n); err != nil {
		return err
	}
	return g.Device.WriteZeroes(off, n, flags)
}

// Discard leaves the ends alone, as it may: nobody can tell which of their
// bytes it would turn to zero.
func (g *probeGuard) Discard(off, n int64) error {
	if g.free(off, n) || CheckRange(g.size, off, n) != nil {
		return g.Device.Discard(off, n)
	}
	lo, hi := max(off, probeReach), min(off+n, g.size-probeReach)
	if lo >= hi {
		lo, hi = off, off // still to be refused if closed or read-only
	}
	return g.Device.Discard(lo, hi-lo)
}

// check looks at the disk as it would be with p, or n zeros if p is nil, at off.
func (g *probeGuard) check(p []byte, off, n int64) error {
	if CheckRange(g.size, off, n) != nil || g.Info().ReadOnly {
		return nil // refused below, with its own error
	}
	f, err := probe(g.formats, &pendingWrite{g.Device, g.size, p, off, n}, g.size)
	if err != nil {
		return err
	}
	if f != nil {
		return &Hint{
			Err:    fmt.Errorf("the write would make a %s image of a disk that is raw by a guess: %w", f.Name, syscall.EPERM),
			Advice: "give the format: -f raw",
		}
	}
	return nil
}

// A pendingWrite shows a device as it would be after a write.
type pendingWrite struct {
	d      Device
	size   int64
	p      []byte // nil: zeros
	off, n int64
}

func (v *pendingWrite) ReadAt(p []byte, off int64) (n int, err error) {
	if off >= v.size {
		return 0, io.EOF
	}
	if int64(len(p)) > v.size-off {
		p, err = p[:v.size-off], io.EOF
	}
	if _, e := v.d.ReadAt(p, off); e != nil {
		return 0, e
	}
	lo, hi := max(off, v.off), min(off+int64(len(p)), v.off+v.n)
	if lo < hi {
		if v.p == nil {
			clear(p[lo-off : hi-off])
		} else {
			copy(p[lo-off:hi-off], v.p[lo-v.off:])
		}
	}
	return len(p), err
}
