package qcow2

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/imgnbd/imgnbd/image"
)

// graceBytes is how much dropped space may wait for the next commit before
// one is asked for.
const graceBytes = 64 << 20

// WriteZeroes makes a range of the disk read as zeros.
func (im *Image) WriteZeroes(off, n int64, flags image.WriteFlags) error {
	return im.change("zero", off, n, flags, func(r *request) error {
		return r.writeZeroes(off, n, flags)
	})
}

// Discard gives up the space of a range of the disk.
func (im *Image) Discard(off, n int64) error {
	return im.change("discard", off, n, 0, func(r *request) error {
		return r.discard(off, n)
	})
}

// writeZeroes makes a range read as zeros. Whole clusters change their entry
// only; what is left at either end is written, unless it reads as zeros.
func (r *request) writeZeroes(off, n int64, flags image.WriteFlags) error {
	end := off + n
	if off+n == r.info.Size {
		end = r.geo.ceil(end) // nothing is behind it
	}
	first, last := r.geo.ceil(off), r.geo.floor(end)
	unmap := flags&image.MayUnmap != 0
	if first >= last || !r.zeroesClusters(unmap) {
		first, last = off+n, off+n
	}
	if r.rawData {
		// The file is the disk: it has to read as zeros too, and then nothing
		// else has to change.
		return r.data.WriteZeroes(off, n, flags&^image.FUA)
	}
	if flags&image.FastOnly != 0 {
		if err := r.fastZero(off, min(first, off+n), last, off+n); err != nil {
			return err
		}
	}
	if err := r.zeroPart(off, first-off); err != nil {
		return err
	}
	if first < last {
		if err := r.zeroClusters(first, last-first, unmap); err != nil {
			return err
		}
	}
	return r.zeroPart(last, off+n-last)
}

// fastZero returns an error unless a range can be zeroed without writing data:
// all but [first, last), which is whole clusters, is zeros already.
func (r *request) fastZero(off, first, last, end int64) error {
	head, err := r.readsZero(off, first-off)
	if err != nil {
		return err
	}
	tail, err := r.readsZero(last, max(end-last, 0))
	if err != nil {
		return err
	}
	if !head || !tail {
		return errors.ErrUnsupported
	}
	return nil
}

// zeroPart zeroes a part of a cluster, or of two. It never zeroes more than
// that, even where the rest is zeros now: somebody may be writing to it (R9).
func (r *request) zeroPart(off, n int64) error {
	for n > 0 {
		m := min(n, r.geo.clusterSize-r.geo.within(off))
		zero, err := r.readsZero(off, m)
		switch {
		case err != nil:
			return err
		case zero && r.defects.growZeroes:
			runtime.Gosched()
			err = r.zeroClusters(r.geo.floor(off), r.geo.clusterSize, true)
		case !zero:
			err = r.write(make([]byte, m), off)
		}
		if err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// zeroesClusters reports whether whole clusters are zeroed without writing data.
// Version 2 has no zero flag: only what has no backing can be made a hole.
func (w *writer) zeroesClusters(unmap bool) bool {
	return w.geo.version >= 3 || w.backing == nil && unmap
}

// zeroClusters zeroes whole clusters. With unmap they give up what they
// occupy.
func (r *request) zeroClusters(off, n int64, unmap bool) error {
	return r.each(off, n, func(off, n int64) (int64, obstacle, error) {
		return r.zeroSlice(off, n, unmap)
	})
}

// discard gives up what whole clusters occupy. They read as zeros then: never
// as what the backing image has.
func (r *request) discard(off, n int64) error {
	if r.rawData {
		return r.data.Discard(off, n)
	}
	end := off + n
	if end == r.info.Size {
		end = r.geo.ceil(end)
	}
	first, last := r.geo.ceil(off), r.geo.floor(end)
	if first >= last || !r.zeroesClusters(true) {
		return nil
	}
	return r.zeroClusters(first, last-first, true)
}

// zeroed returns the entry of a cluster after it was zeroed.
func (w *writer) zeroed(e l2Entry, b l2Bitmap, unmap bool) (l2Entry, l2Bitmap) {
	kind := w.geo.kind(e)
	hole := kind == clusterUnallocated && w.backing == nil
	keep := kind == clusterData && e.copied() && !unmap
	if w.geo.extended {
		switch {
		case hole:
			return e, b
		case keep:
			return e, allZero
		case w.backing == nil:
			return 0, 0
		}
		return 0, allZero
	}
	switch {
	case hole, kind == clusterZeroPlain, kind == clusterZeroAlloc && !unmap:
		return e, b
	case keep:
		return e | flagZero, 0
	case w.backing == nil:
		return 0, 0
	}
	return flagZero, 0
}

// zeroSlice zeroes whole clusters from off on: those within one slice.
func (w *writer) zeroSlice(off, n int64, unmap bool) (int64, obstacle, error) {
	g := w.geo
	no, lo := g.sliceNo(off), g.sliceIndex(off)
	hi := min(1<<g.sliceBits, lo+int(n>>g.clusterBits), lo+w.atOnce())
	did := int64(hi-lo) << g.clusterBits
	if w.backing == nil {
		// An empty disk is zeros already, however large, and is not loaded.
		if s, _, err := w.mapping.slice(no, true); err != nil {
			return 0, obstacle{}, err
		} else if s == nil {
			return did, obstacle{}, nil
		}
	}
	s, err := w.mapping.cache.get(no, true)
	if err != nil {
		return 0, obstacle{}, err
	}
	c, o := w.claim(s, lo, hi)
	if c == nil {
		return 0, o, nil
	}
	// Nobody else changes these entries now.
	if err := w.sound(s, lo, hi); err != nil {
		c.abandon()
		return 0, obstacle{}, err
	}
	differ := false
	for i := lo; i < hi; i++ {
		e, b := s.entry(i, g.entryWords)
		e2, b2 := w.zeroed(e, b, unmap)
		differ = differ || e2 != e || b2 != b
	}
	if !differ {
		c.abandon()
		return did, obstacle{}, nil
	}
	if !w.reserve(hi - lo) {
		c.abandon()
		return 0, obstacle{kind: needCommit}, nil
	}
	defer w.unreserve(hi - lo)
	if o, err := w.ensureTable(s); o.kind != noObstacle || err != nil {
		c.abandon()
		return 0, o, err
	}
	if g.dataFile && unmap {
		// Host and guest offset are one, so the space can be given up only while
		// nobody can write there. What is lost is about to be zeros.
		if err := w.data.Discard(off, did); err != nil {
			c.abandon()
			return 0, obstacle{}, fmt.Errorf("data at %#x: %w", off, err)
		}
	}
	dropped := int64(0)
	s.mu.Lock()
	for i := lo; i < hi; i++ {
		e, b := s.entry(i, g.entryWords)
		e2, b2 := w.zeroed(e, b, unmap)
		if e.host() != e2.host() {
			dropped++
		}
		w.changes.set(s, i, e2, b2)
	}
	c.release()
	s.mu.Unlock()
	if w.freed.Add(dropped)<<g.clusterBits > graceBytes {
		w.freed.Store(0)
		w.commit.ask()
	}
	return did, obstacle{}, nil
}
