package imagetest

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/imgnbd/imgnbd/image"
)

// RandomOptions say how Random drives a disk.
type RandomOptions struct {
	Steps   int   // batches of operations; 0 is 300
	Cluster int64 // bytes; the unit near whose borders most requests lie; 0 is 64 KiB
}

// Random does random things to a disk, several of them at once, and holds all
// that it reads against a model. They depend on the seed alone; the order in
// which concurrent ones take effect is the machine's.
//
// If something is wrong it looks for a short history that goes wrong too and
// prints it.
func Random(t *testing.T, target Target, seed uint64, opt RandomOptions) {
	t.Helper()
	if opt.Steps == 0 {
		opt.Steps = 300
	}
	if opt.Cluster == 0 {
		opt.Cluster = 64 << 10
	}
	d, err := open(target.New(t))
	if err != nil {
		t.Fatal(err)
	}
	h := generate(seed, d.size(), opt.Cluster, opt.Steps)
	err = replay(d, h)
	if err == nil {
		return
	}
	t.Errorf("seed %d: %v", seed, err)
	short := shrink(h, func(h history) bool {
		d, err := open(target.New(t))
		return err == nil && replay(d, h) != nil
	}, time.Now().Add(20*time.Second))
	t.Logf("these %d of its %d operations fail too:\n%s", short.ops(), h.ops(), short)
}

// replay runs h and closes d.
func replay(d *disk, h history) (err error) {
	defer func() {
		if d.Device != nil {
			err = errors.Join(err, d.close())
		}
	}()
	for i, b := range h {
		if err := d.batch(b); err != nil {
			return fmt.Errorf("batch %d, %v: %w", i, history{b}, err)
		}
		if i%50 == 49 {
			if err := d.compareAll(); err != nil {
				return fmt.Errorf("after batch %d: %w", i, err)
			}
		}
	}
	if err := d.compareAll(); err != nil {
		return fmt.Errorf("in the end: %w", err)
	}
	if err := d.reopen(); err != nil {
		return err
	}
	if err := d.compareAll(); err != nil {
		return fmt.Errorf("after reopening in the end: %w", err)
	}
	return nil
}

// batch runs the operations of b at once and takes over into the model what
// may have come of them.
func (d *disk) batch(b batch) error {
	if len(b) == 1 && b[0].kind == "reopen" {
		if err := d.reopen(); err != nil {
			return err
		}
		return d.compareAll()
	}
	errs := make([]error, len(b))
	unsupported := make([]bool, len(b))
	var wg sync.WaitGroup
	for i, o := range b {
		wg.Go(func() { errs[i], unsupported[i] = d.do(o, b) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return d.settle(b, unsupported)
}

// do runs one operation of b. unsupported says that it was refused as it may
// be, having changed nothing.
func (d *disk) do(o op, b batch) (err error, unsupported bool) {
	switch o.kind {
	case "read":
		p := make([]byte, o.n)
		if _, err := d.ReadAt(p, o.off); err != nil {
			return fmt.Errorf("%v: %w", o, err), false
		}
		return d.plausible(o, p, b), false
	case "try":
		p := make([]byte, o.n)
		switch err := d.TryReadAt(p, o.off); {
		case errors.Is(err, image.ErrWouldBlock):
			return nil, false
		case err != nil:
			return fmt.Errorf("%v: %w", o, err), false
		}
		return d.plausible(o, p, b), false
	case "write":
		p := make([]byte, o.n)
		if o.id != 0 {
			p = fill(o.id, o.off, o.n)
		}
		err = d.WriteAt(p, o.off, o.flags)
	case "zero":
		err = d.WriteZeroes(o.off, o.n, o.flags)
		if o.flags&image.FastOnly != 0 && errors.Is(err, errors.ErrUnsupported) {
			return nil, true
		}
	case "discard":
		err = d.Discard(o.off, o.n)
	case "flush":
		err = d.Flush()
	case "extents":
		exts, err := tiles(d.Device, o.off, o.n, wantAll)
		if err != nil {
			return err, false
		}
		return d.plausibleExtents(exts, b), false
	}
	if err != nil {
		err = fmt.Errorf("%v: %w", o, err)
	}
	return err, false
}

// values is the set of the values that a byte may have.
type values [4]uint64

func (v *values) add(b byte)      { v[b/64] |= 1 << (b % 64) }
func (v *values) has(b byte) bool { return v[b/64]&(1<<(b%64)) != 0 }

// candidates returns what the byte at off may be while b runs, or, once all of
// b has returned, afterwards. skip are operations that did nothing.
func (d *disk) candidates(off int64, b batch, afterwards bool, skip []bool) (v values) {
	old := true // may still be as before b
	for i, o := range b {
		if off < o.off || off >= o.off+o.n || skip != nil && skip[i] {
			continue
		}
		switch o.kind {
		case "write":
			if o.id == 0 {
				v.add(0)
			} else {
				v.add(fillByte(o.id, off))
			}
			old = false
		case "zero":
			v.add(0)
			old = old && o.flags&image.FastOnly != 0 && skip == nil
		case "discard":
			v.add(0) // or what it was
		}
	}
	if old || !afterwards {
		v.add(d.want[off])
	}
	return v
}

// plausible checks what o read while all of b ran.
func (d *disk) plausible(o op, got []byte, b batch) error {
	for i, c := range got {
		off := o.off + int64(i)
		if c == d.want[off] {
			continue
		}
		if v := d.candidates(off, b, false, nil); !v.has(c) {
			return fmt.Errorf("%v: byte %#x is %#02x, was %#02x, and nobody writes that", o, off, c, d.want[off])
		}
	}
	return nil
}

// plausibleExtents checks what was said to be zeros while all of b ran.
func (d *disk) plausibleExtents(exts []image.Extent, b batch) error {
	for _, e := range exts {
		if !e.Zero && e.Data {
			continue
		}
		for off := e.Offset; off < e.Offset+e.Length; off++ {
			if d.want[off] == 0 {
				continue
			}
			if v := d.candidates(off, b, false, nil); !v.has(0) {
				return fmt.Errorf("extent %+v: byte %#x was %#02x, and nobody zeroes it", e, off, d.want[off])
			}
		}
	}
	return nil
}

// settle reads what b may have changed, checks it and makes it the model's.
func (d *disk) settle(b batch, skip []bool) error {
	lo, hi := d.size(), int64(0)
	for _, o := range b {
		if o.kind != "flush" {
			lo, hi = min(lo, o.off), max(hi, o.off+o.n)
		}
	}
	if lo >= hi {
		return nil
	}
	got := make([]byte, hi-lo)
	if _, err := d.ReadAt(got, lo); err != nil {
		return err
	}
	for i, c := range got {
		off := lo + int64(i)
		if c == d.want[off] && !touched(off, b) {
			continue
		}
		if v := d.candidates(off, b, true, skip); !v.has(c) {
			return fmt.Errorf("afterwards byte %#x is %#02x; it was %#02x", off, c, d.want[off])
		}
		d.want[off] = c
	}
	return d.around(lo, hi-lo)
}

func touched(off int64, b batch) bool {
	for _, o := range b {
		if off >= o.off && off < o.off+o.n && o.mutates() {
			return true
		}
	}
	return false
}

// shrink returns a part of h, as small as it finds in time, of which fails
// still says that it fails.
func shrink(h history, fails func(history) bool, deadline time.Time) history {
	late := func() bool { return time.Now().After(deadline) }
	// Whole batches first, many at a time; then operations one by one.
	for n := max(len(h)/2, 1); ; n /= 2 {
		for at := 0; at < len(h) && !late(); {
			less := append(append(history(nil), h[:at]...), h[min(at+n, len(h)):]...)
			if fails(less) {
				h = less
			} else {
				at += n
			}
		}
		if n <= 1 {
			break
		}
	}
	for i := 0; i < len(h); i++ {
		for j := 0; j < len(h[i]) && len(h[i]) > 1 && !late(); {
			less := append(history(nil), h...)
			less[i] = append(append(batch(nil), h[i][:j]...), h[i][j+1:]...)
			if fails(less) {
				h = less
			} else {
				j++
			}
		}
	}
	return h
}
