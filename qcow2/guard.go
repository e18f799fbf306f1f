package qcow2

import (
	"fmt"
	"slices"
	"sync/atomic"
)

// A tableGuard knows the host clusters that held tables when the image was
// opened. An L2 entry that points to one is a lie, and what it points to must
// be neither overwritten nor freed. Tables made later need no guard: they lie
// where nothing was. It may be used concurrently.
type tableGuard struct {
	clusters atomic.Pointer[[]int64] // ascending
}

// newTableGuard returns an error if two tables lie in one cluster: writing one
// would destroy the other.
func newTableGuard(h *header, g *geometry, refs *refcounts, m *mapping) (*tableGuard, error) {
	var list []int64
	add := func(off, n int64) {
		for c := off >> g.clusterBits; n > 0 && c <= (off+n-1)>>g.clusterBits; c++ {
			list = append(list, c)
		}
	}
	add(0, 1)
	add(int64(h.l1Offset), int64(h.l1Size)*8)
	add(int64(h.refTableOffset), int64(len(refs.table))*8)
	for _, e := range refs.table {
		if e != 0 {
			add(e.host(), 1)
		}
	}
	for i := range m.l1 {
		if host := l1Entry(m.l1[i].Load()).host(); host != 0 {
			add(host, 1)
		}
	}
	if h.snapshotCount > 0 {
		add(int64(h.snapshotOffset), 1)
	}
	slices.Sort(list)
	for i := 1; i < len(list); i++ {
		if list[i] == list[i-1] {
			return nil, corrupt("two tables lie at %#x", list[i]<<g.clusterBits)
		}
	}
	t := new(tableGuard)
	t.clusters.Store(&list)
	return t, nil
}

func (t *tableGuard) has(cluster int64) bool {
	_, found := slices.BinarySearch(*t.clusters.Load(), cluster)
	return found
}

// drop forgets tables that are given up. The committer alone calls it.
func (t *tableGuard) drop(r hostRun) {
	list := slices.Clone(*t.clusters.Load())
	list = slices.DeleteFunc(list, func(c int64) bool { return c >= r.first && c < r.end() })
	t.clusters.Store(&list)
}

// guard returns an error if a table lies at host, where an L2 entry says that
// data is. Nothing may be written to such an image any more.
func (w *writer) guard(host int64) error {
	if w.geo.dataFile || !w.tables.has(host>>w.geo.clusterBits) {
		return nil
	}
	return w.commit.condemn(corrupt("Preventing invalid write on active metadata at offset %#x", host))
}

// sound returns an error unless entries lo to hi of s make sense: they are
// about to give up what they refer to.
func (w *writer) sound(s *slice, lo, hi int) error {
	g := w.geo
	for i := lo; i < hi; i++ {
		e, b := s.entry(i, g.entryWords)
		at := g.sliceStart(s.no) + int64(i)<<g.clusterBits
		seg := segment{guest: at, length: g.clusterSize}
		err := w.mapping.describe(&seg, e, b)
		if err != nil {
			return fmt.Errorf("%s: %w", w.mapping.place(at), err)
		}
		if e.compressed() {
			host, _ := g.compressed(e)
			err = w.guard(host)
		} else if e.host() != 0 {
			err = w.guard(e.host())
		}
		if err != nil {
			return err
		}
	}
	return nil
}
