package qcow2

import (
	"encoding/binary"
	"runtime"
	"sync"
	"sync/atomic"
)

// The writing half of the mapping: claims, changes of entries, and L2 tables
// that do not exist yet. What changes here is true for every request at once;
// the committer brings it to the store.

// A claim is the right to change the mapping of some entries of a slice. Who
// holds it may do I/O; who meets it waits, outside of any epoch (R8).
type claim struct {
	slice  *slice
	lo, hi int           // entries, hi not included
	done   chan struct{} // closed when it is given up
}

// A reference is a use of host clusters that an entry gave up. They are
// lowered, and free if nothing else uses them, once the committer has made
// that durable and no request can know of them any more.
type reference struct {
	hostRun
	shared   bool // the count may be above one
	unwanted bool // zeroed or discarded, not replaced
}

// A change is what a slice has to remember while its entries are changed.
// slice.mu guards it.
type change struct {
	claims  []*claim
	dirty   []uint64    // bitmap of the entries that differ from disk and are in no batch
	ndirty  int         // bits set in dirty
	disk    []byte      // what the store will hold when the batches in flight end; nil while clean
	batches int         // in flight that contain the slice
	dropped []reference // since the last cut
}

func (c *change) idle() bool {
	return len(c.claims) == 0 && c.disk == nil && len(c.dropped) == 0
}

// claim takes entries lo to hi of s. If it cannot, it returns nil: the caller
// leaves its epoch, waits for the channel, if there is one, and looks again.
func (s *slice) claim(lo, hi int, ignoreOthers bool) (*claim, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return nil, nil
	}
	for _, c := range s.claims {
		if lo < c.hi && c.lo < hi && !ignoreOthers {
			return nil, c.done
		}
	}
	c := &claim{s, lo, hi, make(chan struct{})}
	s.claims = append(s.claims, c)
	return c, nil
}

// release gives the claim up. The slice is locked.
func (c *claim) release() {
	s := c.slice
	for i := range s.claims {
		if s.claims[i] == c {
			last := len(s.claims) - 1
			s.claims[i] = s.claims[last]
			s.claims[last] = nil
			s.claims = s.claims[:last]
			break
		}
	}
	close(c.done)
}

// abandon gives the claim up after nothing was changed.
func (c *claim) abandon() {
	c.slice.mu.Lock()
	defer c.slice.mu.Unlock()
	c.release()
}

// A newTable is an L2 table that no L1 entry is known to point to. The
// committer writes it whole, before its L1 entry. Once that may have been
// written the table is changed in place, like any other, even if the batch
// that wrote it failed (R10).
type newTable struct {
	l1Index int64
	host    int64
	old     l1Entry // of the shared table that it replaces; 0: none
	taken   bool    // by a batch in flight
	exposed bool    // the L1 entry may have been written
}

// changes is what is true in memory and not in the store. All methods may be
// called concurrently. Lock order: slice.mu, then tableMu, then allocator.mu;
// mu is a leaf.
type changes struct {
	m       *mapping
	alloc   *allocator
	guard   *tableGuard
	journal *journal // nil: none
	defects *defects

	mu     sync.Mutex
	slices map[*slice]struct{} // with changes that are in no batch

	busy    atomic.Int64 // slices that cannot be evicted: dirty, or in a batch
	crowd   int64        // of them, how many make crowded be called
	crowded func()

	tableMu sync.Mutex
	tables  map[int64]*newTable // by L1 index
}

func newChanges(m *mapping, a *allocator, t *tableGuard, d *defects) *changes {
	return &changes{m: m, alloc: a, guard: t, defects: d, slices: map[*slice]struct{}{}, tables: map[int64]*newTable{}}
}

// list enters a slice in the list that the next cut looks at.
func (c *changes) list(s *slice) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slices[s] = struct{}{}
}

// takeSlices returns the list, and forgets it.
func (c *changes) takeSlices() []*slice {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]*slice, 0, len(c.slices))
	for s := range c.slices {
		list = append(list, s)
	}
	clear(c.slices)
	return list
}

// ensureTable provides for an L2 table that the slice can be written to. It
// reports false if there is no cluster to be had before the next commit, and
// returns an error if the image is found to lie.
func (c *changes) ensureTable(s *slice) (bool, error) {
	i, _ := c.m.geo.sliceTable(s.no)
	old := l1Entry(c.m.l1[i].Load())
	if old.ours() {
		return true, nil
	}
	c.tableMu.Lock()
	defer c.tableMu.Unlock()
	old = l1Entry(c.m.l1[i].Load())
	if old.ours() || c.tables[i] != nil {
		return true, nil
	}
	r, _, ok := c.alloc.take(1)
	if !ok {
		return false, nil
	}
	if err := c.guard.add(c.m.geo, r); err != nil {
		return false, err
	}
	c.tables[i] = &newTable{l1Index: i, host: r.first << c.m.geo.clusterBits, old: old}
	return true, nil
}

// sharedTable returns where the L2 table lies that a new one has to replace
// before the slice can be written to, 0 if there is none or that is provided for.
func (c *changes) sharedTable(s *slice) int64 {
	i, _ := c.m.geo.sliceTable(s.no)
	old := l1Entry(c.m.l1[i].Load())
	if old.ours() || old.host() == 0 {
		return 0
	}
	c.tableMu.Lock()
	defer c.tableMu.Unlock()
	if c.tables[i] != nil {
		return 0
	}
	return old.host()
}

// takeTable returns the new table of an L1 index if no batch has it, nil
// otherwise or if there is none.
func (c *changes) takeTable(l1Index int64) *newTable {
	c.tableMu.Lock()
	defer c.tableMu.Unlock()
	t := c.tables[l1Index]
	if t == nil || t.taken {
		return nil
	}
	t.taken = true
	return t
}

// tableHost returns where the L2 table of an L1 index is, or is going to be.
func (c *changes) tableHost(l1Index int64) int64 {
	c.tableMu.Lock()
	defer c.tableMu.Unlock()
	if t := c.tables[l1Index]; t != nil {
		return t.host
	}
	return l1Entry(c.m.l1[l1Index].Load()).host()
}

// settleTable ends a batch for a table that it had taken.
func (c *changes) settleTable(t *newTable, ok bool) {
	c.tableMu.Lock()
	defer c.tableMu.Unlock()
	if !ok {
		t.taken = false
		return
	}
	c.m.l1[t.l1Index].Store(uint64(t.host) | flagCopied)
	delete(c.tables, t.l1Index)
}

// giveUnusedTables gives back tables that were provided for but never came to
// be needed. Only for closing: nobody may be about to change anything.
func (c *changes) giveUnusedTables() {
	c.tableMu.Lock()
	defer c.tableMu.Unlock()
	for i, t := range c.tables {
		if !t.exposed {
			r := hostRun{t.host >> c.m.geo.clusterBits, 1}
			c.guard.drop(r)
			c.alloc.give(r)
			delete(c.tables, i)
		}
	}
}

// set changes entry i of s, after everything that the entry points to has been
// handed to the store (R1), and drops what it referred to before. The slice is
// locked; the entry is claimed.
func (c *changes) set(s *slice, i int, e l2Entry, b l2Bitmap) {
	g := c.m.geo
	oldEntry, oldBitmap := s.entry(i, g.entryWords)
	if e == oldEntry && b == oldBitmap {
		return
	}
	// On the list before the journal: a cut reads the journal's end first, so
	// that no record below it belongs to a slice that the cut does not see (R12).
	if s.ndirty == 0 && !c.defects.listLate {
		c.list(s)
	}
	rec := record{s.no<<g.sliceBits + uint64(i), entry{e, b}, entry{oldEntry, oldBitmap}, g.extended}
	if c.journal != nil && !c.defects.noJournal && !c.defects.journalLate {
		c.journal.append(rec)
	}
	if s.disk == nil {
		s.disk = c.m.cache.bufs.Get().(*[sliceBytes]byte)[:g.sliceSize()]
		s.dirty = make([]uint64, (len(s.ents)+63)/64)
		for k := range s.ents {
			binary.BigEndian.PutUint64(s.disk[k*8:], s.ents[k].Load())
		}
		if c.busy.Add(1) == c.crowd {
			c.crowded()
		}
	}
	if s.ndirty == 0 && c.defects.listLate {
		for range 100 { // the window is narrow otherwise
			runtime.Gosched()
		}
		c.list(s)
	}
	if s.dirty[i/64]&(1<<(i%64)) == 0 {
		s.dirty[i/64] |= 1 << (i % 64)
		s.ndirty++
	}
	s.setEntry(i, g.entryWords, e, b)
	if c.journal != nil && c.defects.journalLate {
		go func() {
			runtime.Gosched()
			c.journal.append(rec)
		}()
	}
	c.drop(s, oldEntry, e)
}

// setEntry stores entry i. Its readers see both words of one moment.
func (s *slice) setEntry(i int, words uint, e l2Entry, b l2Bitmap) {
	if words == 1 {
		s.ents[i].Store(uint64(e))
		return
	}
	s.seq.Add(1)
	s.ents[2*i].Store(uint64(e))
	s.ents[2*i+1].Store(uint64(b))
	s.seq.Add(1)
}

// drop gives up what the old entry referred to and the new one does not.
func (c *changes) drop(s *slice, old, now l2Entry) {
	g := c.m.geo
	if g.dataFile {
		return // nothing in a data file is counted
	}
	unwanted := now.host() == 0 && !now.compressed()
	if old.compressed() {
		host, n := g.compressed(old)
		first := host >> g.clusterBits
		last := (host + n - 1) >> g.clusterBits
		s.dropped = append(s.dropped, reference{hostRun{first, last - first + 1}, true, unwanted})
		return // neighbours may share a cluster, so these are not merged
	}
	if host := old.host(); host != 0 && (now.compressed() || host != now.host()) {
		ref := reference{hostRun{host >> g.clusterBits, 1}, !old.copied(), unwanted}
		if c.defects.reuseAtOnce {
			c.alloc.give(ref.hostRun)
			return
		}
		if k := len(s.dropped) - 1; k >= 0 && s.dropped[k].shared == ref.shared && s.dropped[k].unwanted == unwanted && s.dropped[k].end() == ref.first {
			s.dropped[k].n++
			return
		}
		s.dropped = append(s.dropped, ref)
	}
}

// A sliceCut is what a batch writes of one slice: entries of disk.
type sliceCut struct {
	*slice
	lo, hi int // entries, hi not included
}

// cutSlice takes the dirty entries of a slice, as they are now, into its disk
// view, and appends what they dropped.
func (c *changes) cutSlice(s *slice, dropped []reference) (sliceCut, []reference) {
	s.mu.Lock()
	defer s.mu.Unlock()
	words := int(c.m.geo.entryWords)
	n := len(s.ents) / words
	cut := sliceCut{s, n, 0}
	for i := range n {
		if s.dirty[i/64]&(1<<(i%64)) == 0 {
			continue
		}
		for k := i * words; k < (i+1)*words; k++ {
			binary.BigEndian.PutUint64(s.disk[k*8:], s.ents[k].Load())
		}
		cut.lo, cut.hi = min(cut.lo, i), i+1
	}
	clear(s.dirty)
	s.ndirty = 0
	s.batches++
	dropped = append(dropped, s.dropped...)
	s.dropped = nil
	return cut, dropped
}

// settleSlice ends a batch for a slice: what it wrote is durable, or dirty
// again.
func (c *changes) settleSlice(cut sliceCut, ok bool) {
	s := cut.slice
	s.mu.Lock()
	defer s.mu.Unlock()
	s.batches--
	if ok {
		if s.ndirty == 0 && s.batches == 0 {
			c.m.cache.bufs.Put((*[sliceBytes]byte)(s.disk[:sliceBytes]))
			s.disk, s.dirty = nil, nil
			c.busy.Add(-1)
		}
		return
	}
	for i := cut.lo; i < cut.hi; i++ {
		if s.dirty[i/64]&(1<<(i%64)) == 0 {
			s.dirty[i/64] |= 1 << (i % 64)
			s.ndirty++
		}
	}
	c.list(s)
}
