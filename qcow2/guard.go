package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/imgnbd/imgnbd/image"
)

// A tableGuard knows the host clusters that hold metadata. An L2 entry that
// points to one is a lie, and what it points to must be neither overwritten
// nor freed; a count that makes one free is a lie too. It may be used
// concurrently, and has takes no lock.
type tableGuard struct {
	fixed   []hostRun  // ascending: what stays where it is while the image is open
	tables  []int64    // ascending: active L2 tables and refcounts when it was opened,
	gone    clusterSet // but for these
	made    clusterSet // the same, made since
	flights flights    // what is being written to
}

// maxGuardedTables bounds the L1 entries of snapshots that are read to guard
// the L2 tables of snapshots: 8 MiB of them. Untrusted images may not have more.
const maxGuardedTables = 1 << 20

// newTableGuard returns an error if two tables lie in one cluster, since
// writing one would destroy the other, or if one lies past the end, where it
// will be in the way of what the image grows by.
func (w *writer) newTableGuard(refs *refcounts, snapshots []snapshot, size int64) (*tableGuard, error) {
	g, h, t := w.geo, w.header, new(tableGuard)
	var err error
	fix := func(off, n int64) {
		if n == 0 {
			return
		}
		if off < 0 || off >= size || g.floor(off+n-1) >= size {
			err = corrupt("the table at %#x is past the end (%#x)", off, size)
			return
		}
		first := off >> g.clusterBits
		t.fixed = append(t.fixed, hostRun{first, (off+n-1)>>g.clusterBits - first + 1})
	}
	fix(0, g.clusterSize)
	fix(int64(h.l1Offset), int64(h.l1Size)*8)
	fix(int64(h.snapshotOffset), snapshotsSize(snapshots))
	if x, err := h.bitmapsExtension(); err == nil && h.autoclear&autoclearBitmaps != 0 {
		fix(int64(x.offset), int64(x.size))
		for i := range w.bitmaps {
			if b := &w.bitmaps[i]; !b.recording() { // those that do are stored elsewhere on closing
				fix(int64(b.tableAt), int64(b.tableSize)*8)
			}
		}
	}
	for i := range snapshots {
		fix(int64(snapshots[i].l1At), int64(snapshots[i].l1Size)*8)
	}
	if err == nil {
		err = t.sortFixed(g)
	}
	if err != nil {
		return nil, err
	}
	own := func(host int64) {
		if c := host >> g.clusterBits; host != 0 {
			if host >= size {
				err = corrupt("the table at %#x is past the end (%#x)", host, size)
			} else if t.isFixed(c) {
				err = overlap(g, c)
			}
			t.tables = append(t.tables, c)
		}
	}
	for c := range g.clusters(int64(len(refs.table)) * 8) {
		own(int64(h.refTableOffset) + c<<g.clusterBits)
	}
	for _, e := range refs.table {
		own(e.host())
	}
	counts := slices.Sorted(slices.Values(t.tables))
	for i := range w.mapping.l1 {
		own(l1Entry(w.mapping.l1[i].Load()).host())
	}
	slices.Sort(t.tables)
	for i := 1; i < len(t.tables) && err == nil; i++ {
		if t.tables[i] == t.tables[i-1] {
			err = overlap(g, t.tables[i])
		}
	}
	if err != nil {
		return nil, err
	}
	return t, w.guardSnapshots(t, snapshots, counts)
}

func overlap(g *geometry, c int64) error {
	return corrupt("two tables lie at %#x", c<<g.clusterBits)
}

// sortFixed sorts what is fixed, and returns an error if any of it overlaps.
func (t *tableGuard) sortFixed(g *geometry) error {
	slices.SortFunc(t.fixed, func(x, y hostRun) int { return compare(x.first, y.first) })
	for i := 1; i < len(t.fixed); i++ {
		if t.fixed[i].first < t.fixed[i-1].end() {
			return overlap(g, t.fixed[i].first)
		}
	}
	return nil
}

// guardSnapshots adds the L2 tables of snapshots, which those may share with
// each other and the disk, but not with counts.
func (w *writer) guardSnapshots(t *tableGuard, snapshots []snapshot, counts []int64) error {
	var list []int64
	room := int64(maxGuardedTables)
	for i := range snapshots {
		sn := &snapshots[i]
		if room -= int64(sn.l1Size); room < 0 {
			break // to read them could take hours
		}
		b := make([]byte, int64(sn.l1Size)*8)
		if err := readZeroPadded(w.store, b, int64(sn.l1At)); err != nil {
			return fmt.Errorf("L1 table of snapshot %q at %#x: %w", sn.Name, sn.l1At, err)
		}
		for ; len(b) > 0; b = b[8:] {
			host := l1Entry(binary.BigEndian.Uint64(b)).host()
			if c := host >> w.geo.clusterBits; host != 0 {
				if _, found := slices.BinarySearch(counts, c); found || t.isFixed(c) {
					return overlap(w.geo, c)
				}
				list = append(list, c)
			}
		}
	}
	slices.Sort(list)
	for _, c := range slices.Compact(list) {
		t.fixed = append(t.fixed, hostRun{c, 1})
	}
	return t.sortFixed(w.geo)
}

// snapshotsSize returns how many bytes a snapshot table has.
func snapshotsSize(list []snapshot) (n int64) {
	for i := range list {
		sn := &list[i]
		n = (n+7)&^7 + snapshotFixed + int64(len(sn.extra)+len(sn.ID)+len(sn.Name))
	}
	return n
}

func (t *tableGuard) isFixed(cluster int64) bool {
	i, found := slices.BinarySearchFunc(t.fixed, cluster, func(r hostRun, c int64) int { return compare(r.first, c) })
	return found || i > 0 && cluster < t.fixed[i-1].end()
}

// has reports whether a cluster holds metadata.
func (t *tableGuard) has(cluster int64) bool {
	if t.isFixed(cluster) || t.made.has(cluster) {
		return true
	}
	_, found := slices.BinarySearch(t.tables, cluster)
	return found && !t.gone.has(cluster)
}

// end returns the cluster behind all that hold metadata.
func (t *tableGuard) end() int64 {
	end := t.fixed[len(t.fixed)-1].end()
	if n := len(t.tables); n > 0 {
		end = max(end, t.tables[n-1]+1)
	}
	return end
}

// overlaps returns the first cluster of r that holds metadata.
func (t *tableGuard) overlaps(r hostRun) (cluster int64, found bool) {
	for c := r.first; c < r.end(); c++ {
		if t.has(c) {
			return c, true
		}
	}
	return 0, false
}

// add enters clusters that tables are about to be made in. It returns an error
// if guest data is being written to one: then they must not be used.
func (t *tableGuard) add(g *geometry, r hostRun) error {
	for c := r.first; c < r.end(); c++ {
		t.made.add(c)
	}
	if c, found := t.flights.touch(r); found {
		return corrupt("the cluster at %#x is in use, and free by its refcount", c<<g.clusterBits)
	}
	return nil
}

// drop forgets tables that are given up.
func (t *tableGuard) drop(r hostRun) {
	for c := r.first; c < r.end(); c++ {
		t.made.remove(c)
		if _, found := slices.BinarySearch(t.tables, c); found {
			t.gone.add(c)
		}
	}
}

// guard returns an error if a table lies in the n bytes at host, where an L2
// entry says that data is. Nothing may be written to such an image any more.
func (w *writer) guard(host, n int64) error {
	if w.geo.dataFile {
		return nil
	}
	first := host >> w.geo.clusterBits
	if _, found := w.tables.overlaps(hostRun{first, (host+n-1)>>w.geo.clusterBits - first + 1}); !found {
		return nil
	}
	return w.commit.condemn(corrupt("Preventing invalid write on active metadata at offset %#x", host))
}

// beginWrite is guard for who is going to write guest data to the n bytes at
// host: until the flight is ended no table is made there.
func (w *writer) beginWrite(host, n int64) (*flight, error) {
	if w.geo.dataFile {
		return nil, nil
	}
	first := host >> w.geo.clusterBits
	f := w.tables.flights.begin(hostRun{first, (host+n-1)>>w.geo.clusterBits - first + 1})
	if err := w.guard(host, n); err != nil {
		f.end()
		return nil, err
	}
	return f, nil
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
			host, n := g.compressed(e)
			err = w.guard(host, n)
		} else if e.host() != 0 {
			err = w.guard(e.host(), g.clusterSize)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// errCondemned is what every change gets once an image was found to lie.
var errCondemned = &fault{image.ErrCorrupt, "the image is corrupt, and is not written to before it is repaired (imgnbd check -r all)"}
