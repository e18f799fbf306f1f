package qcow2

import (
	"fmt"

	"github.com/imgnbd/imgnbd/image"
)

// WriteAt writes p to the disk.
func (im *Image) WriteAt(p []byte, off int64, flags image.WriteFlags) error {
	return im.change("write", off, int64(len(p)), flags, func(r *request) error {
		return r.write(p, off)
	})
}

// write writes p at off.
func (r *request) write(p []byte, off int64) error {
	start := off
	return r.each(off, int64(len(p)), func(off, _ int64) (int64, obstacle, error) {
		return r.writeSome(p[off-start:], off)
	})
}

// writeSome writes a prefix of p: a run within one slice.
func (w *writer) writeSome(p []byte, off int64) (int64, obstacle, error) {
	s, err := w.mapping.cache.get(w.geo.sliceNo(off), true)
	if err != nil {
		return 0, obstacle{}, err
	}
	host, n, err := w.inPlace(s, off, int64(len(p)))
	if err != nil {
		return 0, obstacle{}, err
	}
	if n == 0 {
		return w.allocate(s, p, off)
	}
	f, err := w.beginWrite(host, n)
	if err != nil {
		return 0, obstacle{}, err
	}
	defer f.end()
	if err := w.data.WriteAt(p[:n], host, 0); err != nil {
		return 0, obstacle{}, fmt.Errorf("data at %#x: %w", host, err)
	}
	return n, obstacle{}, nil
}

// inPlace returns how many of the n bytes at off can be overwritten where they
// are, and where that is: data that nothing else refers to.
func (w *writer) inPlace(s *slice, off, n int64) (host, length int64, err error) {
	end := min(off+n, w.geo.sliceStart(s.no)+w.geo.sliceSpan())
	for at := off; at < end; {
		e, b := s.entry(w.geo.sliceIndex(at), w.geo.entryWords)
		if !e.copied() {
			break
		}
		seg := segment{guest: at, length: min(w.geo.clusterSize-w.geo.within(at), end-at)}
		if err := w.mapping.describe(&seg, e, b); err != nil {
			return 0, 0, fmt.Errorf("%s: %w", w.mapping.place(at), err)
		}
		if at == off {
			host = seg.host
		}
		if seg.kind != segmentData || seg.host != host+length {
			break
		}
		at, length = at+seg.length, length+seg.length
	}
	return host, length, nil
}

// claim takes the entries of s from lo on, up to hi, for a change.
func (w *writer) claim(s *slice, lo, hi int) (*claim, obstacle) {
	if w.changes.busy.Load() >= w.busyLimit {
		return nil, obstacle{kind: needCommit}
	}
	c, wait := s.claim(lo, hi, w.defects.noClaims)
	switch {
	case c != nil:
		return c, obstacle{}
	case wait != nil:
		return nil, obstacle{kind: claimed, claim: wait}
	case w.mapping.cache.peek(s.no) != nil:
		return nil, obstacle{kind: changed} // evicted, and back
	}
	return nil, obstacle{kind: needCommit} // its set is full of changes
}

// allocate writes a prefix of p to clusters that are not in place: it claims
// their entries, finds them room, fills what p does not cover with what was
// there, and links them.
func (w *writer) allocate(s *slice, p []byte, off int64) (n int64, o obstacle, err error) {
	g := w.geo
	lo := g.sliceIndex(off)
	hi := min(1<<g.sliceBits, lo+int(g.clusters(g.within(off)+int64(len(p)))), lo+w.atOnce())
	if g.extended {
		whole := int64(len(p)) >> g.clusterBits
		if g.within(off) != 0 || whole == 0 || w.elsewhere(s, lo, lo+1) == lo {
			return w.allocateSubclusters(s, p, off)
		}
		hi = min(hi, lo+int(whole))
	}
	c, o := w.claim(s, lo, max(w.elsewhere(s, lo, hi), lo+1))
	if c == nil {
		return 0, o, nil
	}
	linked := false
	defer func() {
		if !linked {
			c.abandon()
		}
	}()
	// Until now the entries could change. Those that were put in place are
	// being written to by others, and must not be moved.
	if hi = w.elsewhere(s, lo, c.hi); hi == lo {
		return 0, obstacle{kind: changed}, nil
	}
	if err := w.sound(s, lo, hi); err != nil {
		return 0, obstacle{}, err
	}
	if !w.reserve(hi - lo) {
		return 0, obstacle{kind: needCommit}, nil
	}
	defer w.unreserve(hi - lo)
	if o, err := w.ensureTable(s); o.kind != noObstacle || err != nil {
		return 0, o, err
	}
	r, own, fresh, ok := w.room(s, lo, hi)
	if !ok {
		return 0, obstacle{kind: needClusters}, nil
	}
	n = min(r.n<<g.clusterBits-g.within(off), int64(len(p)))
	if w.defects.linkEarly {
		w.link(c, lo, r)
	}
	at := r.first<<g.clusterBits + g.within(off)
	f, err := w.beginWrite(at, n)
	if err != nil {
		return 0, obstacle{}, err
	}
	err = w.fillAndWrite(p[:n], off, at, g.clusterSize, fresh)
	f.end()
	if err != nil {
		if own {
			w.alloc.give(r)
		}
		return 0, obstacle{}, err
	}
	linked = true
	if !w.defects.linkEarly {
		w.link(c, lo, r)
	}
	s.mu.Lock()
	c.release()
	s.mu.Unlock()
	return n, obstacle{}, nil
}

// ensureTable provides for an L2 table of s, unless that takes a commit. One that
// snapshots have too is read before: if it cannot be, the commit that is to copy
// it would fail, with all that others wrote.
func (w *writer) ensureTable(s *slice) (obstacle, error) {
	if host := w.changes.sharedTable(s); host != 0 {
		b := w.buffer()
		defer w.buffers.Put(b)
		if err := readZeroPadded(w.store, *b, host); err != nil {
			return obstacle{}, fmt.Errorf("L2 table at %#x: %w", host, err)
		}
	}
	ok, err := w.changes.ensureTable(s)
	if err != nil || ok {
		return obstacle{}, w.commit.condemn(err)
	}
	return obstacle{kind: needClusters}, nil
}

// elsewhere returns where the run of entries from lo on ends that cannot be
// written in place.
func (w *writer) elsewhere(s *slice, lo, hi int) int {
	for i := lo; i < hi; i++ {
		if e, _ := s.entry(i, w.geo.entryWords); w.geo.kind(e) == clusterData && e.copied() {
			return i
		}
	}
	return hi
}

// room returns host clusters for entries of s from lo on: those they have, in
// which case they are not ours to give back, or new ones.
func (w *writer) room(s *slice, lo, hi int) (r hostRun, own, fresh, ok bool) {
	g := w.geo
	if g.dataFile {
		first := (g.sliceStart(s.no) >> g.clusterBits) + int64(lo)
		return hostRun{first, int64(hi - lo)}, false, false, true
	}
	for i := lo; i < hi; i++ {
		e, _ := s.entry(i, g.entryWords)
		kept := e.copied() && e.host() != 0 && !e.compressed() && e.zero()
		switch {
		case kept && i == lo:
			r = hostRun{e.host() >> g.clusterBits, 1}
		case kept && r.n > 0 && e.host()>>g.clusterBits == r.end():
			r.n++
		case kept || r.n > 0:
			hi = i
		}
	}
	if r.n > 0 {
		return r, false, false, true
	}
	r, fresh, ok = w.alloc.take(int64(hi - lo))
	return r, true, fresh || w.defects.alwaysFresh, ok
}

// allocateSubclusters writes a prefix of p, within one cluster that has
// subclusters, where they are not in place. In a cluster that is ours alone
// those that are in place are left alone: others write to them. A cluster that
// is not ours is copied whole.
func (w *writer) allocateSubclusters(s *slice, p []byte, off int64) (n int64, o obstacle, err error) {
	g := w.geo
	i := g.sliceIndex(off)
	c, o := w.claim(s, i, i+1)
	if c == nil {
		return 0, o, nil
	}
	linked := false
	defer func() {
		if !linked {
			c.abandon()
		}
	}()
	if err := w.sound(s, i, i+1); err != nil {
		return 0, obstacle{}, err
	}
	e, b := s.entry(i, g.entryWords)
	sub := g.subclusterBits()
	n = min(int64(len(p)), g.clusterSize-g.within(off))
	lo, hi := uint(g.within(off)>>sub), uint((g.within(off)+n-1)>>sub)+1
	own := g.kind(e) == clusterData && e.copied()
	if own {
		for k := lo; k < hi; k++ {
			if b.allocated()>>k&1 != 0 {
				hi = k
			}
		}
		if hi == lo {
			return 0, obstacle{kind: changed}, nil
		}
		n = min(n, int64(hi)<<sub-g.within(off))
	}
	if !w.reserve(1) {
		return 0, obstacle{kind: needCommit}, nil
	}
	defer w.unreserve(1)
	if o, err := w.ensureTable(s); o.kind != noObstacle || err != nil {
		return 0, o, err
	}
	unit, fresh := int64(1)<<sub, false
	written := l2Bitmap(1<<hi - 1<<lo)
	now := b&^(written<<32) | written
	if !own {
		if e != 0 { // compressed, or shared
			unit, now = g.clusterSize, allAllocated
		}
		var r hostRun
		var given, ok bool
		if r, given, fresh, ok = w.room(s, i, i+1); !ok {
			return 0, obstacle{kind: needClusters}, nil
		}
		defer func() {
			if !linked && given {
				w.alloc.give(r)
			}
		}()
		e = l2Entry(r.first<<g.clusterBits) | flagCopied
	}
	at := e.host() + g.within(off)
	f, err := w.beginWrite(at, n)
	if err != nil {
		return 0, obstacle{}, err
	}
	err = w.fillAndWrite(p[:n], off, at, unit, fresh)
	f.end()
	if err != nil {
		return 0, obstacle{}, err
	}
	linked = true
	s.mu.Lock()
	defer s.mu.Unlock()
	w.changes.set(s, i, e, now)
	c.release()
	return n, obstacle{}, nil
}

// fillAndWrite writes p, for guest offset off, at host offset at, and around
// it what the first and last unit of it read as now: clusters or subclusters
// that the caller has claimed.
func (w *writer) fillAndWrite(p []byte, off, at, unit int64, fresh bool) error {
	end := off + int64(len(p))
	head, tail := off&(unit-1), -end&(unit-1)
	if w.defects.noFill {
		head, tail = 0, 0
	}
	var err error
	if head > 0 {
		if head, err = w.toFill(off-head, head, fresh); err != nil {
			return err
		}
	}
	if tail > 0 {
		if tail, err = w.toFill(end, tail, fresh); err != nil {
			return err
		}
	}
	// At most three writes: the unit with a head, the middle, that with a tail.
	for len(p) > 0 {
		n, h, t := int64(len(p)), head, tail
		first, last := unit-off&(unit-1), end&(unit-1)
		switch {
		case h > 0 && n > first:
			n, t = first, 0
		case t > 0 && h == 0 && n > first && n > last:
			n, t = n-last, 0
		}
		if h > 0 || t > 0 {
			err = w.writeFilled(p[:n], off, at, h, t)
		} else {
			err = w.data.WriteAt(p[:n], at, 0)
		}
		if err != nil {
			return fmt.Errorf("data at %#x: %w", at, err)
		}
		p, off, at, head = p[n:], off+n, at+n, 0
	}
	return nil
}

// toFill returns n, or 0 if the new cluster reads as the n guest bytes at off
// do already: zeros.
func (w *writer) toFill(off, n int64, fresh bool) (int64, error) {
	if !fresh {
		return n, nil
	}
	zero, err := w.readsZero(off, n)
	if zero {
		n = 0
	}
	return n, err
}

// readsZero reports whether the mapping says that n bytes at off are zeros.
func (w *writer) readsZero(off, n int64) (bool, error) {
	var buf [segmentBatch]segment
	for n > 0 {
		segs, err := w.mapping.segments(buf[:0], off, n, true)
		if err != nil {
			return false, err
		}
		for _, s := range segs {
			switch {
			case s.kind == segmentZero || s.kind == segmentZeroAlloc:
			case s.kind == segmentHole && w.backed(s.guest, s.length) == 0:
			default:
				return false, nil
			}
			off, n = off+s.length, n-s.length
		}
	}
	return true, nil
}

// writeFilled writes p at host offset at, with the head bytes before and the
// tail bytes after it in the guest, all within one cluster.
func (w *writer) writeFilled(p []byte, off, at, head, tail int64) error {
	b := w.buffer()
	defer w.buffers.Put(b)
	n := int64(len(p))
	buf := (*b)[:head+n+tail]
	if err := w.read(buf[:head], off-head); err != nil {
		return err
	}
	if err := w.read(buf[head+n:], off+n); err != nil {
		return err
	}
	copy(buf[head:], p)
	return w.data.WriteAt(buf, at-head, 0)
}

// buffer returns memory for a cluster, to be put back into buffers.
func (w *writer) buffer() *[]byte {
	if b, _ := w.buffers.Get().(*[]byte); b != nil {
		return b
	}
	b := make([]byte, w.geo.clusterSize)
	return &b
}

// link makes entries from lo on point to the clusters of r.
func (w *writer) link(c *claim, lo int, r hostRun) {
	s := c.slice
	s.mu.Lock()
	defer s.mu.Unlock()
	whole := l2Bitmap(0)
	if w.geo.extended {
		whole = allAllocated
	}
	for i := range int(r.n) {
		e := l2Entry((r.first+int64(i))<<w.geo.clusterBits) | flagCopied
		w.changes.set(s, lo+i, e, whole)
	}
}
