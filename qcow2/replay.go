package qcow2

import (
	"fmt"
	"hash/crc32"
	"iter"
	"slices"
	"syscall"
)

// identity sums up what of a header never changes while the image is open for
// writing, and does when it is replaced, resized or given snapshots elsewhere.
func (h *header) identity() uint32 {
	b := fmt.Appendf(nil, "%d %d %d %d %d %d %d %q", h.version, h.clusterBits, h.size, h.l1Size, h.l1Offset,
		h.snapshotCount, h.snapshotOffset, h.backing)
	return crc32.Checksum(b, castagnoli)
}

// A takeover brings back what a process that died had acknowledged but not
// committed. The store is as the process left it in the host's memory, and the
// journal says which entries differ from what was true for its clients.
//
// Nothing the journal says is changed until all of it is durable, so a
// takeover that dies too is begun again.
type takeover struct {
	*writer
	final map[uint64]entry          // by guest cluster
	known map[uint64]map[entry]bool // values that an entry had
	used  map[int64]bool            // host clusters that final entries use
	past  map[int64]bool            // other clusters of ours that entries used
}

// replay carries out a takeover. The committer does not run yet.
func (w *writer) replay(records []record) error {
	t := &takeover{writer: w, final: map[uint64]entry{}, known: map[uint64]map[entry]bool{}, used: map[int64]bool{}, past: map[int64]bool{}}
	if err := t.collect(records); err != nil {
		return err
	}
	if !t.geo.dataFile {
		if err := t.foreign(); err != nil {
			return err
		}
	}
	if err := t.room(); err != nil {
		return err
	}
	if err := t.count(); err != nil {
		return err
	}
	t.commit.refs.scanEnd = t.alloc.tail
	return t.link()
}

// collect finds out what the records come to.
func (t *takeover) collect(records []record) error {
	g := t.geo
	host := func(e l2Entry) int64 { return e.host() >> g.clusterBits }
	for _, r := range records {
		if int64(r.cluster) > (t.info.Size-1)>>g.clusterBits {
			return fmt.Errorf("the journal names guest cluster %d, past the end", r.cluster)
		}
		if t.known[r.cluster] == nil {
			t.known[r.cluster] = map[entry]bool{}
		}
		t.known[r.cluster][r.old] = true
		t.known[r.cluster][r.now] = true
		t.final[r.cluster] = r.now
		for _, e := range []l2Entry{r.now.word, r.old.word} {
			if e.copied() && !e.compressed() && e.host() != 0 && !g.dataFile {
				t.past[host(e)] = true
			}
		}
	}
	for c, final := range t.final {
		e := final.word
		if e.compressed() || !e.copied() || e.host() == 0 || g.dataFile {
			continue
		}
		if t.used[host(e)] {
			return fmt.Errorf("the journal gives host cluster %#x to two guest clusters, one of them %d", e.host(), c)
		}
		t.used[host(e)] = true
		delete(t.past, host(e))
	}
	// A cluster that was freed may have become a table since.
	for i := range t.mapping.l1 {
		delete(t.past, l1Entry(t.mapping.l1[i].Load()).host()>>g.clusterBits)
	}
	for _, e := range t.commit.refs.table {
		delete(t.past, e.host()>>g.clusterBits)
	}
	return nil
}

// room moves the allocator's tail over all that the journal names, and sees to
// it that all of it has refcounts. Blocks that are missing are made and linked
// by a commit of their own: the entries that come next rely on them.
func (t *takeover) room() error {
	a, refs, top := t.alloc, t.commit.refs, int64(0)
	for c := range t.named() {
		top = max(top, c+1)
	}
	if top > refs.end {
		return fmt.Errorf("the journal names host cluster %d, past the end of the store", top-1)
	}
	a.tail = max(a.tail, top)
	a.limit = max(a.tail, refs.covered(a.tail))
	a.fresh = max(a.fresh, a.tail)
	refs.scanEnd = 0 // what the journal names looks free until it is counted
	for c := range t.named() {
		if err := t.cover(c); err != nil {
			return err
		}
	}
	if !refs.pending() {
		return nil
	}
	return t.commit.once()
}

// cover sees to it that cluster c, below the tail, has a refcount block. It
// commits where that takes more than one batch.
func (t *takeover) cover(c int64) error {
	a, r := t.alloc, t.commit.refs
	for r.covered(c) == c && c < r.end {
		i := c >> r.g.refBlockBits
		if r.covered(a.tail) == a.tail && a.tail < r.end {
			i = a.tail >> r.g.refBlockBits // first the block that counts the blocks
		}
		var made bool
		var err error
		switch {
		case i >= int64(len(r.table)):
			if made, err = r.growTable(a); err == nil && !made {
				err = syscall.ENOSPC
			}
		case a.tail >= r.end:
			err = t.coverWithin(i)
		default:
			if made, err = r.makeBlock(a, i); err == nil && !made {
				err = r.commit()
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// coverWithin makes the refcount block of range i where the store has no room at
// its end: in the range itself, or where a block that is linked knows of some.
func (t *takeover) coverWithin(i int64) error {
	r := t.commit.refs
	host, unread := t.gap(i, false)
	for by := int64(0); by < int64(len(r.table)) && host < 0; by++ {
		if r.table[by] != 0 && !r.unknown[by] {
			var err error
			host, err = t.gap(by, true)
			unread = first(unread, err)
		}
	}
	if host < 0 {
		return first(unread, syscall.ENOSPC)
	}
	return r.placeBlock(t.alloc, i, host)
}

// gap returns a cluster in the range of a refcount block that nobody uses, -1
// if none is found, with the error if there are counts that cannot be read.
func (t *takeover) gap(block int64, counted bool) (host int64, unread error) {
	r := t.commit.refs
	begin := block << r.g.refBlockBits
	for c := begin; c < min(begin+r.perBlock(), r.end); c++ {
		if t.used[c] || t.past[c] || t.tables.has(c) {
			continue
		}
		if counted {
			n, err := r.count(c)
			if err != nil {
				unread = first(unread, err)
				c |= r.perSector() - 1 // the rest of it is not read either
				continue
			}
			if n != 0 {
				continue
			}
		}
		return c, nil
	}
	return -1, unread
}

// named yields the host clusters that the journal says were ours.
func (t *takeover) named() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for _, m := range []map[int64]bool{t.used, t.past} {
			for c := range m {
				if !yield(c) {
					return
				}
			}
		}
	}
}

// count sees to it that nothing the journal names counts as free.
func (t *takeover) count() error {
	refs := t.commit.refs
	for c := range t.named() {
		n, err := refs.count(c)
		switch {
		case err != nil:
			return err
		case n == 0:
			_, err = refs.add(c, +1)
		case n > 1:
			err = fmt.Errorf("host cluster %d, which the journal names, has refcount %d: the image was changed since", c, n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// link sets the entries as they were last, by the path that any change takes,
// and commits them. What they used in between falls free as if they had just
// given it up (R14).
func (t *takeover) link() error {
	g := t.geo
	clusters := make([]uint64, 0, len(t.final))
	for c := range t.final {
		clusters = append(clusters, c)
	}
	slices.Sort(clusters)
	for _, c := range clusters {
		for dry := 0; ; {
			s, err := t.mapping.cache.get(c>>g.sliceBits, true)
			if err != nil {
				return err
			}
			i := int(c & (1<<g.sliceBits - 1))
			var found entry
			found.word, found.bitmap = s.entry(i, g.entryWords)
			if !t.known[c][found] {
				return fmt.Errorf("the L2 entry of guest cluster %d is %#x, which the journal does not know: the image was changed since", c, uint64(found.word))
			}
			if found == t.final[c] {
				break
			}
			ok, err := t.changes.ensureTable(s)
			if err != nil {
				return err
			}
			s.mu.Lock()
			if !s.dead && ok {
				t.changes.set(s, i, t.final[c].word, t.final[c].bitmap)
				// What was exclusive is in past, or used by another entry now.
				s.dropped = slices.DeleteFunc(s.dropped, func(r reference) bool { return !r.shared })
				s.mu.Unlock()
				break
			}
			s.mu.Unlock()
			if dry == maxDry {
				return fmt.Errorf("there is no room for an L2 table: %w", syscall.ENOSPC)
			}
			before := t.alloc.progress()
			if err := t.commit.once(); err != nil {
				return err
			}
			if dry++; ok || t.alloc.progress() != before {
				dry = 0 // it has not looked everywhere yet
			}
		}
	}
	for c := range t.past {
		r := hostRun{c, 1}
		if t.defects.replayLowers {
			t.alloc.give(r)
			continue
		}
		t.commit.kept = append(t.commit.kept, reference{r, false, true})
	}
	return t.commit.once()
}
