package qcow2

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// segmentBatch is how many segments a request looks at before it deals with
// them. They lie on its stack.
const segmentBatch = 32

// ReadAt fills p from the disk. One lookup per slice, one read per run of
// data; neighbouring compressed clusters are decoded side by side.
func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := image.CheckRange(d.info.Size, off, int64(len(p))); err != nil {
		return 0, err
	}
	v, err := d.epochs.enter()
	if err != nil {
		return 0, err
	}
	defer v.leave()
	if err := d.read(p, off); err != nil {
		return 0, image.Wrap("read", d.name, fmt.Errorf("%d bytes at %d: %w", len(p), off, err))
	}
	return len(p), nil
}

func (d *disk) read(p []byte, off int64) error {
	var buf [segmentBatch]segment
	for len(p) > 0 {
		segs, err := d.mapping.segments(buf[:0], off, int64(len(p)), true)
		if err != nil {
			return err
		}
		compressed := 0
		for i := range segs {
			s := &segs[i]
			switch s.kind {
			case segmentCompressed:
				compressed++
				continue
			case segmentData:
				err = d.readData(p[s.guest-off:][:s.length], s.host)
			case segmentHole:
				err = d.readBacking(p[s.guest-off:][:s.length], s.guest)
			default:
				clear(p[s.guest-off:][:s.length])
			}
			if err != nil {
				return err
			}
		}
		if compressed > 0 {
			if err := d.readCompressed(p, off, segs, compressed); err != nil {
				return err
			}
		}
		last := &segs[len(segs)-1]
		n := last.guest + last.length - off
		p, off = p[n:], off+n
	}
	return nil
}

// readData fills p from the data store. The last cluster of a store may not be
// written out in full: what is missing is zeros.
func (f *files) readData(p []byte, host int64) error {
	n, err := f.data.ReadAt(p, host)
	switch {
	case n == len(p):
		return nil
	case errors.Is(err, io.EOF):
		if err = reaches(f.data, f.geo.floor(host+int64(len(p))-1)); err == nil {
			clear(p[n:])
			return nil
		}
	}
	return fmt.Errorf("data at %#x: %w", host, err)
}

// readCompressed deals with the compressed ones among segs. p begins at guest
// offset off.
func (f *files) readCompressed(p []byte, off int64, segs []segment, count int) error {
	one := func(s *segment) error {
		return f.decoder.readAt(p[s.guest-off:][:s.length], s.entry, f.geo.within(s.guest))
	}
	workers := min(count, runtime.GOMAXPROCS(0))
	if workers == 1 {
		for i := range segs {
			if segs[i].kind == segmentCompressed {
				if err := one(&segs[i]); err != nil {
					return err
				}
			}
		}
		return nil
	}
	var (
		todo = append([]segment(nil), segs...) // the caller's are on its stack
		next atomic.Int32
		wg   sync.WaitGroup
		errs = make([]error, workers)
	)
	for w := range workers {
		wg.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= len(todo) {
					return
				}
				if todo[i].kind == segmentCompressed {
					errs[w] = one(&todo[i])
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// TryReadAt fills p if everything is at hand: tables in the cache, data in the
// host's memory, compressed clusters decoded.
func (d *disk) TryReadAt(p []byte, off int64) error {
	if err := image.CheckRange(d.info.Size, off, int64(len(p))); err != nil {
		return err
	}
	v, err := d.epochs.tryEnter()
	if err != nil {
		return err
	}
	defer v.leave()
	err = d.tryRead(p, off)
	if err != nil && !errors.Is(err, storage.ErrWouldBlock) {
		return image.Wrap("read", d.name, fmt.Errorf("%d bytes at %d: %w", len(p), off, err))
	}
	return err
}

func (d *disk) tryRead(p []byte, off int64) error {
	var buf [segmentBatch]segment
	for len(p) > 0 {
		segs, err := d.mapping.segments(buf[:0], off, int64(len(p)), false)
		if err != nil {
			return err
		}
		for i := range segs {
			s := &segs[i]
			q := p[:s.length]
			switch s.kind {
			case segmentCompressed:
				if !d.decoder.tryReadAt(q, s.entry, d.geo.within(s.guest)) {
					return storage.ErrWouldBlock
				}
			case segmentData:
				err = d.data.TryReadAt(q, s.host)
				if errors.Is(err, io.EOF) {
					return storage.ErrWouldBlock // ReadAt knows what the end means
				}
			case segmentHole:
				err = d.tryReadBacking(q, s.guest)
			default:
				clear(q)
			}
			if err == storage.ErrUnderWay && len(q) < len(p) {
				err = storage.ErrWouldBlock // the rest is not
			}
			if err != nil {
				return err
			}
			p, off = p[s.length:], off+s.length
		}
	}
	return nil
}

// AppendExtents describes the disk with its backing chain. An answer ends with
// the first question that it takes to the backing image or to the data store:
// so each layer asks the next one once, and no chain of them makes it long.
func (d *disk) AppendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	if err := image.CheckRange(d.info.Size, off, n); err != nil {
		return dst, err
	}
	if n == 0 {
		return dst, image.ErrOutOfRange
	}
	v, err := d.epochs.enter()
	if err != nil {
		return dst, err
	}
	defer v.leave()
	start := len(dst)
	dst, err = d.appendExtents(dst, off, n, want)
	if err != nil && len(dst) == start {
		return dst, image.Wrap("map", d.name, fmt.Errorf("%d bytes at %d: %w", n, off, err))
	}
	return dst, nil // what follows is wrong, which is for who asks for it
}

func (d *disk) appendExtents(dst []image.Extent, off, n int64, want image.Want) ([]image.Extent, error) {
	var buf [segmentBatch]segment
	segs, err := d.mapping.segments(buf[:0], off, n, true)
	if err != nil {
		return dst, err
	}
	start := len(dst)
	for i := range segs {
		s := &segs[i]
		end := s.guest + s.length
		for at := s.guest; at < end; {
			from, ask := len(dst), false
			switch s.kind {
			case segmentHole:
				ask = d.backed(at, end-at) > 0
				dst, err = d.appendBacking(dst, at, end-at, want)
			case segmentData:
				ask = want&image.WantZero != 0 && d.preallocated()
				dst, err = d.appendData(dst, s, at, ask)
			default:
				dst = append(dst, image.Extent{
					Offset: at, Length: end - at, Allocated: true,
					Zero: s.kind != segmentCompressed, Data: s.kind == segmentCompressed, Compressed: s.kind == segmentCompressed,
				})
			}
			if err != nil {
				return dst, err
			}
			last := &dst[len(dst)-1]
			at = last.Offset + last.Length
			dst = coalesce(dst, start, from, want)
			if ask {
				return dst[:min(len(dst), start+image.MaxExtents)], nil
			}
		}
	}
	return dst, nil
}

// appendData describes the part of a data segment from guest offset at on. If
// ask is set, the store is asked where it is zeros.
func (d *disk) appendData(dst []image.Extent, s *segment, at int64, ask bool) ([]image.Extent, error) {
	host, n := s.host+at-s.guest, s.guest+s.length-at
	e := image.Extent{Offset: at, Length: n, Data: true, Allocated: true, At: image.Location{Store: d.data, Offset: host}}
	if !d.info.ReadOnly {
		if !d.geo.dataFile && !d.loans.give() {
			e.At = image.Location{} // a cluster that is freed can become another's
		}
		if _, err := below(host+n-1, &d.mapping.dataEnd, d.data); err != nil {
			return dst, err
		}
	}
	if end := d.mapping.dataEnd.Load(); host+n > end {
		// The last cluster of the store is not written out in full.
		if host >= end {
			e.Zero, e.At = true, image.Location{}
			return append(dst, e), nil
		}
		e.Length = end - host
	}
	if !ask {
		return append(dst, e), nil
	}
	var buf [segmentBatch]storage.Extent
	exts, err := d.data.AppendExtents(buf[:0], host, e.Length)
	if err != nil {
		return dst, err
	}
	if len(exts) == 0 { // somebody cut the store short: reading knows what that means
		return append(dst, e), nil
	}
	for _, x := range exts {
		e.Offset, e.Length, e.Zero = at+x.Offset-host, x.Length, x.Hole
		if e.At.Store != nil {
			e.At.Offset = x.Offset
		}
		dst = append(dst, e)
	}
	return dst, nil
}

// preallocated reports whether much of the store is holes, as it is where
// clusters were allocated ahead of data: then it is worth asking whether data
// clusters are zeros.
func (d *disk) preallocated() bool {
	d.holes.Do(func() {
		if d.data != d.store {
			return
		}
		var data, off int64
		var exts []storage.Extent
		for range 1024 { // further it is not worth the time
			var err error
			exts, err = d.store.AppendExtents(exts[:0], off, d.mapping.storeEnd.Load()-off)
			if err != nil || len(exts) == 0 {
				break
			}
			for _, x := range exts {
				if off = x.Offset + x.Length; !x.Hole {
					data += x.Length
				}
			}
			if off == d.mapping.storeEnd.Load() {
				break
			}
		}
		d.holey = off-data > max(data/9, 2*d.geo.clusterSize)
	})
	return d.holey
}

// coalesce clears what was not asked for in the extents from index i on, and
// joins them to those before them, down to index start.
func coalesce(dst []image.Extent, start, i int, want image.Want) []image.Extent {
	out := dst[:i]
	for _, e := range dst[i:] {
		if want&image.WantZero == 0 {
			e.Zero, e.Data = false, false
		}
		if want&image.WantAllocated == 0 {
			e.Allocated, e.Compressed, e.Depth = false, false, 0
		}
		if want&image.WantLocation == 0 {
			e.At = image.Location{}
		}
		if len(out) > start {
			last := &out[len(out)-1]
			next := e
			next.Offset, next.Length = last.Offset, last.Length
			if e.At.Store != nil {
				next.At.Offset -= last.Length
			}
			if next == *last {
				last.Length += e.Length
				continue
			}
		}
		out = append(out, e)
	}
	return out
}
