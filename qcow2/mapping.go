package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync/atomic"

	"github.com/imgnbd/imgnbd/storage"
)

// A segment says where one run of guest bytes comes from. A run never ends at
// a table or slice for its own sake: neighbours of one kind whose host bytes
// follow each other are one segment.
type segment struct {
	guest, length int64
	kind          segmentKind
	host          int64   // of data: where it lies in the data store
	entry         l2Entry // of a compressed cluster
}

type segmentKind uint8

const (
	segmentHole       segmentKind = iota // unallocated: the backing image has the say
	segmentData                          // as it is, at host
	segmentZero                          // reads as zeros
	segmentZeroAlloc                     // reads as zeros, keeps a host cluster
	segmentCompressed                    // part of one compressed cluster
)

// A mapping turns guest offsets into host offsets, for one L1 table.
type mapping struct {
	geo   *geometry
	l1    []atomic.Uint64 // as the store has it
	l1At  int64           // where in the store
	cache *cache
	bad   l2Entry // bits of which none is set in a valid entry of a data or zero cluster

	store    storage.Store // has the tables and the compressed clusters
	data     storage.Store // has the data; the same, or the external data file
	storeEnd atomic.Int64  // sizes as last seen; they may have grown
	dataEnd  atomic.Int64
}

// newMapping reads the L1 table, whose place and size were checked. budget
// bounds the cache of L2 slices in bytes.
func newMapping(g *geometry, store, data storage.Store, l1At int64, l1Size int, size, budget int64, epochs *epochs) (*mapping, error) {
	m := &mapping{geo: g, l1At: l1At, store: store, data: data}
	m.bad = l2Entry(0x3f000000000001fe | (g.clusterSize - 2))
	if g.version < 3 {
		m.bad |= flagZero
	}
	// The end of the store may lie within the last cluster of a table, no earlier.
	if end := l1At + int64(l1Size)*8; l1Size > 0 {
		if ok, err := below(g.floor(end-1), &m.storeEnd, store); err != nil {
			return nil, err
		} else if !ok {
			return nil, corrupt("L1 table at %#x: its %d entries are past the end (%#x)", l1At, l1Size, m.storeEnd.Load())
		}
	}
	b := make([]byte, l1Size*8)
	if n, err := store.ReadAt(b, l1At); n < len(b) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("L1 table at %#x: %w", l1At, err)
	}
	m.l1 = make([]atomic.Uint64, l1Size)
	for i := range m.l1 {
		m.l1[i].Store(binary.BigEndian.Uint64(b[i*8:]))
	}
	slices := (size + g.sliceSpan() - 1) / g.sliceSpan()
	m.cache = newCache(g, slices, budget, epochs, m.readSlice)
	return m, nil
}

// below reports whether off lies in a store, whose end is looked up again if
// it was not when last seen.
func below(off int64, end *atomic.Int64, s storage.Store) (bool, error) {
	if off >= 0 && off < end.Load() {
		return true, nil
	}
	size, err := s.Size()
	if err != nil {
		return false, err
	}
	end.Store(size)
	return off >= 0 && off < size, nil
}

// reaches returns an error unless a store, whose end was met, has the beginning of
// a cluster: somebody cut it short since that was looked up.
func reaches(s storage.Store, cluster int64) error {
	size, err := s.Size()
	if err == nil && cluster >= size {
		err = corrupt("offset %#x is past the end (%#x)", cluster, size)
	}
	return err
}

// table returns where the L2 table of an L1 index lies, 0 if there is none.
func (m *mapping) table(l1Index int64) (int64, error) {
	if l1Index >= int64(len(m.l1)) {
		return 0, nil // a snapshot may have a shorter table than its disk
	}
	e := l1Entry(m.l1[l1Index].Load())
	host := e.host()
	if e.reserved() == 0 && host == 0 {
		return 0, nil
	}
	problem := ""
	if e.reserved() != 0 {
		problem = fmt.Sprintf("reserved bits %#x are set", e.reserved())
	} else if m.geo.within(host) != 0 {
		problem = fmt.Sprintf("L2 table offset %#x is not aligned to %#x", host, m.geo.clusterSize)
	} else if ok, err := below(host, &m.storeEnd, m.store); err != nil {
		return 0, err
	} else if !ok {
		problem = fmt.Sprintf("L2 table offset %#x is past the end (%#x)", host, m.storeEnd.Load())
	}
	if problem != "" {
		return 0, corrupt("L1 table at %#x, entry %d: %s", m.l1At, l1Index, problem)
	}
	return host, nil
}

// readSlice is what the cache fills its slices with.
func (m *mapping) readSlice(no uint64, b []byte, wait bool) error {
	l1Index, within := m.geo.sliceTable(no)
	table, err := m.table(l1Index)
	if err != nil {
		return err
	}
	if table == 0 {
		clear(b)
		return nil
	}
	if !wait {
		if m.store.TryReadAt(b, table+within) != nil {
			return storage.ErrWouldBlock // ReadAt knows what an error means
		}
		return nil
	}
	n, err := m.store.ReadAt(b, table+within)
	if errors.Is(err, io.EOF) { // the end of the last table of an image may not be written out
		clear(b[n:])
		err = reaches(m.store, table)
	}
	if err != nil {
		return fmt.Errorf("L2 table at %#x: %w", table, err)
	}
	return nil
}

// What one call of segments looks at is bounded: by 65,536 slices, of which one
// that has to be loaded counts for 64.
const (
	maxWork  = 1 << 16
	loadWork = 64
)

// segments appends a prefix of the description of [off, off+n), n > 0, at
// least one segment unless it fails. It stops when dst is full, which has room
// for one, when it has looked at much, and before what is wrong. If wait is
// not set it returns ErrWouldBlock rather than wait for a slice. The caller is
// inside an epoch.
func (m *mapping) segments(dst []segment, off, n int64, wait bool) ([]segment, error) {
	g := m.geo
	start, end := len(dst), off+n
	for work := 0; off < end && (work < maxWork || len(dst) == start); {
		no := g.sliceNo(off)
		sliceEnd := min(end, g.sliceStart(no)+g.sliceSpan())
		s, loaded, err := m.slice(no, wait)
		if err != nil {
			return leave(dst, start, err)
		}
		work++
		if loaded {
			work += loadWork
		}
		for off < sliceEnd {
			seg := segment{guest: off, length: sliceEnd - off}
			if s != nil {
				e, b := s.entry(g.sliceIndex(off), g.entryWords)
				seg.length = min(seg.length, g.clusterSize-g.within(off))
				if err := m.describe(&seg, e, b); err != nil {
					return leave(dst, start, fmt.Errorf("%s: %w", m.place(off), err))
				}
			}
			var ok bool
			if dst, ok = join(dst, start, seg); !ok {
				return dst, nil
			}
			off += seg.length
		}
	}
	return dst, nil
}

// leave leaves an error to the next call if there is something to return.
func leave(dst []segment, start int, err error) ([]segment, error) {
	if len(dst) > start {
		err = nil
	}
	return dst, err
}

// slice returns a slice, and whether it had to be loaded. It is nil if nothing
// in it is allocated: a slice of a table that is not there is in the cache
// only when somebody wrote to it.
func (m *mapping) slice(no uint64, wait bool) (s *slice, loaded bool, err error) {
	if s := m.cache.peek(no); s != nil {
		return s, false, nil
	}
	l1Index, _ := m.geo.sliceTable(no)
	table, err := m.table(l1Index)
	if table == 0 || err != nil {
		return nil, false, err
	}
	s, err = m.cache.get(no, wait)
	return s, true, err
}

// join appends a segment, or lengthens the one before it. It reports whether
// there was room. Segments before start are none of ours.
func join(dst []segment, start int, s segment) ([]segment, bool) {
	if len(dst) > start {
		last := &dst[len(dst)-1]
		if last.kind == s.kind && s.kind != segmentCompressed && (s.kind != segmentData || last.host+last.length == s.host) {
			last.length += s.length
			return dst, true
		}
	}
	if len(dst) == cap(dst) {
		return dst, false
	}
	return append(dst, s), true
}

// describe completes a segment that lies in the cluster of the given entry,
// and shortens it where its subclusters differ.
func (m *mapping) describe(s *segment, e l2Entry, b l2Bitmap) error {
	g := m.geo
	kind := g.kind(e)
	switch kind {
	case clusterCompressed:
		host, _ := g.compressed(e)
		if g.dataFile {
			return corrupt("compressed cluster in an image with an external data file")
		}
		if ok, err := below(host, &m.storeEnd, m.store); err != nil {
			return err
		} else if !ok {
			return corrupt("compressed data at %#x is past the end (%#x)", host, m.storeEnd.Load())
		}
		s.kind, s.entry = segmentCompressed, e
		return nil
	case clusterZeroPlain, clusterZeroAlloc, clusterData:
		if e&m.bad != 0 {
			return m.badEntry(e)
		}
		if host := e.host(); host >= m.dataEnd.Load() {
			if ok, err := below(host, &m.dataEnd, m.data); err != nil {
				return err
			} else if !ok && kind != clusterZeroPlain {
				return corrupt("offset %#x is past the end (%#x)", host, m.dataEnd.Load())
			}
		}
	default:
		if e.reserved() != 0 {
			return m.badEntry(e)
		}
	}
	switch {
	case g.extended:
		return m.describeSubclusters(s, kind, e, b)
	case kind == clusterData:
		s.kind, s.host = segmentData, e.host()+g.within(s.guest)
	case kind == clusterZeroPlain:
		s.kind = segmentZero
	case kind == clusterZeroAlloc:
		s.kind = segmentZeroAlloc
	}
	return nil
}

func (m *mapping) badEntry(e l2Entry) error {
	switch {
	case e.reserved() != 0:
		return corrupt("reserved bits %#x are set", e.reserved())
	case m.geo.within(e.host()) != 0:
		return corrupt("offset %#x is not aligned to %#x", e.host(), m.geo.clusterSize)
	}
	return corrupt("zero cluster in an image of version 2")
}

// describeSubclusters completes a segment of a cluster with subclusters.
func (m *mapping) describeSubclusters(s *segment, kind clusterKind, e l2Entry, b l2Bitmap) error {
	g := m.geo
	if b.conflict() || kind != clusterData && b.allocated() != 0 {
		return corrupt("subcluster bitmap %#016x contradicts itself", uint64(b))
	}
	sub := g.subclusterBits()
	within := g.within(s.guest)
	first := uint(within >> sub)
	alloc, zero := b.allocated()>>first, b.zero()>>first
	var run int // subclusters of one kind
	switch {
	case alloc&1 != 0:
		s.kind, s.host = segmentData, e.host()+within
		run = bits.TrailingZeros32(^alloc)
	case zero&1 != 0:
		s.kind = segmentZero
		if kind == clusterData {
			s.kind = segmentZeroAlloc
		}
		run = bits.TrailingZeros32(^zero)
	default:
		run = bits.TrailingZeros32(alloc | zero)
	}
	s.length = min(s.length, int64(first)<<sub+int64(run)<<sub-within)
	return nil
}

// place names the L2 entry of a guest offset.
func (m *mapping) place(off int64) string {
	g := m.geo
	i := g.l1Index(off)
	var table int64
	if i < int64(len(m.l1)) {
		table = l1Entry(m.l1[i].Load()).host()
	}
	return fmt.Sprintf("L2 table at %#x, entry %d", table, off>>g.clusterBits&(1<<g.l2Bits-1))
}

// close gives up the cache. No request may be inside.
func (m *mapping) close() { m.cache.close() }
