package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/imgnbd/imgnbd/image"
)

// count adds a reference to all clusters that n bytes at off touch.
func (c *checker) count(off, n int64, r role) {
	g := c.g
	if n <= 0 {
		return
	}
	// The last cluster of a store may not be written out in full.
	if off < 0 || off > math.MaxInt64-n || off+n-c.size >= g.clusterSize {
		c.corrupt("ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x%x size 0x%x", uint64(off), uint64(n))
		c.outside(off, n)
		return
	}
	last := (off + n - 1) >> g.clusterBits
	if last >= c.clusters {
		c.clusters = last + 1
		c.refs.grow(c.clusters)
	}
	for k := off >> g.clusterBits; k <= last; k++ {
		c.roles.add(k, r)
		refs := c.refs.get(k)
		if refs == maxRefcount(g.refcountOrder) {
			c.corrupt("ERROR: overflow cluster offset=0x%x\n"+
				"Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing", k<<g.clusterBits)
			c.over.add(k, r)
			continue
		}
		c.refs.set(k, refs+1)
	}
}

// outside takes note of a reference that ends past the end, for who looks for
// room.
func (c *checker) outside(off, n int64) {
	if off < 0 || off > math.MaxInt64-n {
		return
	}
	if off+n <= c.growLimit() {
		c.past, c.pastFrom = max(c.past, off+n), min(c.pastFrom, off)
	} else {
		c.beyond = min(c.beyond, off)
	}
	for k := off >> c.g.clusterBits; k < c.clusters && c.roles != nil; k++ {
		c.roles.add(k, roleMixed)
	}
}

// readWords reads a table of n words. What is past the end is zeros, and left out:
// a few bytes can say that there are millions of them.
func (c *checker) readWords(at, n int64) ([]uint64, error) {
	if at >= 0 {
		n = min(n, max(0, (c.size-at+7)/8))
	}
	w := make([]uint64, n)
	buf := make([]byte, min(n*8, checkRun))
	for i := int64(0); i < n; {
		b := buf[:min(int64(len(buf)), (n-i)*8)]
		m, err := c.store.ReadAt(b, at+i*8)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		clear(b[m:])
		for ; len(b) > 0; b = b[8:] {
			w[i] = binary.BigEndian.Uint64(b)
			i++
		}
	}
	return w, nil
}

// table returns L2 table i of an L1 table. It reads those that follow on the
// store as well, if they do in the table.
func (c *checker) table(l1 []uint64, i int) ([]byte, error) {
	size := c.g.clusterSize
	at := l1Entry(l1[i]).host()
	if at < c.runAt || at+size > c.runAt+int64(len(c.run)) || (at-c.runAt)%size != 0 {
		n := size
		for j := i + 1; j < len(l1) && n < checkRun && l1Entry(l1[j]).host() == at+n; j++ {
			n += size
		}
		if int64(cap(c.run)) < n {
			c.run = make([]byte, n)
		}
		c.run, c.runAt = c.run[:n], at
		m, err := c.store.ReadAt(c.run, at)
		if err != nil && !errors.Is(err, io.EOF) {
			c.run = c.run[:0]
			return nil, err
		}
		clear(c.run[m:])
	}
	return c.run[at-c.runAt:][:size], nil
}

// maxSameTable is how often one L1 table may lead to an L2 table before what
// that refers to is not counted once more, and how often that may be the table of
// a snapshot or a bitmap. Once is right; a lie of a million times would keep us
// busy for days.
const maxSameTable = 100

// tables are those of snapshots and bitmaps that begin at one place.
type tables struct {
	count   int
	longest int64 // in entries
}

// walkFrom returns the first entry to be walked of a table of n that a snapshot or
// a bitmap has: where there are too many, each entry is still walked once, so that
// nothing is free that one of them leads to.
func (c *checker) walkFrom(at uint64, n int64) (from int64) {
	t := c.begin[at]
	if t.count >= maxSameTable || c.refs.get(int64(at)>>c.g.clusterBits) > maxSameTable {
		from = min(t.longest, n)
	}
	c.begin[at] = tables{t.count + 1, max(t.longest, n)}
	return from
}

// revisited reports whether a walk has seen an L2 table that was met too often.
func (c *checker) revisited(seen map[int64]bool, host int64) bool {
	k := host >> c.g.clusterBits
	if !c.often[k] {
		return false
	}
	was := seen[k]
	seen[k] = true
	return was
}

// countL1 counts the references to an L1 table, and those of its entries from one
// on, and of the L2 tables that they lead to.
func (c *checker) countL1(at, from, n int64, active bool) ([]uint64, error) {
	if n == 0 {
		return nil, nil
	}
	g := c.g
	c.count(at, n*8, roleOther)
	l1, err := c.readWords(at+from*8, n-from)
	if err != nil {
		c.res.CheckErrors++
		c.report(false, "ERROR: I/O error in check_refcounts_l1")
		return nil, err
	}
	again := map[int64]int{} // how often tables were met that were known before
	for i, w := range l1 {
		c.progress(1)
		if w == 0 {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return nil, err
		}
		e := l1Entry(w)
		if e.reserved() != 0 {
			c.corrupt("ERROR found L1 entry with reserved bits set: %x", w)
		}
		known := e.host() >> g.clusterBits
		if c.refs.get(known) > 0 {
			again[known]++
		}
		c.count(e.host(), g.clusterSize, roleTable)
		if again[known] > maxSameTable {
			c.often[known] = true
			continue
		}
		if g.within(e.host()) != 0 {
			c.corrupt("ERROR l2_offset=%x: Table is not cluster aligned; L1 entry corrupted", e.host())
		}
		t, err := c.table(l1, i)
		if err != nil {
			c.res.CheckErrors++
			c.report(false, "ERROR: I/O error in check_refcounts_l2")
			return nil, err
		}
		c.countL2(t, active)
	}
	return l1, nil
}

// countL2 counts the references of an L2 table. The active ones are also what
// the figures about fragments are of.
func (c *checker) countL2(t []byte, active bool) {
	g := c.g
	var next int64 // where the next cluster lies if there is no fragment
	for i := range len(t) / 8 / int(g.entryWords) {
		e, b := entryOf(t, i, g.entryWords)
		if e == 0 && b == 0 {
			continue
		}
		kind := g.kind(e)
		if kind != clusterCompressed && e.reserved() != 0 {
			c.corrupt("ERROR found l2 entry with reserved bits set: %x", uint64(e))
		}
		switch kind {
		case clusterCompressed:
			c.countCompressed(i, e, b, active)
		case clusterZeroAlloc, clusterData:
			host := e.host()
			if g.extended && b.conflict() {
				c.corrupt("ERROR offset=%x: Allocated cluster has corrupted subcluster allocation bitmap", host)
			}
			if g.within(host) != 0 {
				if kind == clusterZeroAlloc || g.extended && b.allocated() == 0 {
					c.corrupt("%s offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", c.verb("ERROR"), host)
				} else {
					c.corrupt("ERROR offset=%x: Data cluster is not properly aligned; L2 entry corrupted.", host)
				}
			}
			if active {
				c.res.AllocatedClusters++
				if next != 0 && host != next {
					c.res.FragmentedClusters++
				}
				next = host + g.clusterSize
			}
			if !g.dataFile {
				c.count(host, g.clusterSize, roleOther)
			}
		case clusterUnallocated:
			if b.allocated() != 0 {
				c.corrupt("ERROR: Unallocated cluster has non-zero subcluster allocation map")
			}
		}
	}
}

// entryOf returns entry i of an encoded L2 table.
func entryOf(t []byte, i int, words uint) (l2Entry, l2Bitmap) {
	if words == 1 {
		return l2Entry(binary.BigEndian.Uint64(t[i*8:])), 0
	}
	return l2Entry(binary.BigEndian.Uint64(t[i*16:])), l2Bitmap(binary.BigEndian.Uint64(t[i*16+8:]))
}

func (c *checker) countCompressed(i int, e l2Entry, b l2Bitmap, active bool) {
	g := c.g
	host, n := g.compressed(e)
	if e.copied() {
		c.corrupt("ERROR: coffset=0x%x: copied flag must never be set for compressed clusters", host)
		e &^= flagCopied
	}
	if g.dataFile {
		c.corrupt("ERROR compressed cluster %d with data file, entry=0x%x", i, uint64(e))
		return
	}
	if b != 0 {
		c.corrupt("ERROR compressed cluster %d with non-zero subcluster allocation bitmap, entry=0x%x", i, uint64(e))
		if c.opt.Repair == image.RepairNothing {
			return // qemu-img then takes the data for a leak, though guests read it
		}
	}
	c.count(host, n, roleOther)
	if active {
		c.res.AllocatedClusters++
		c.res.CompressedClusters++
		c.res.FragmentedClusters++ // by nature: they begin and end anywhere
	}
}

// countSnapshots counts the references of the snapshots and their table.
func (c *checker) countSnapshots() error {
	h := c.h
	if n := len(c.snapshots); n > 0 && c.g.dataFile {
		c.corrupt("ERROR %d snapshots in image with data file", n)
	}
	for i := range c.snapshots {
		sn := &c.snapshots[i]
		if sn.l1At&uint64(c.g.clusterSize-1) != 0 {
			c.corrupt("ERROR snapshot %s (%s) l1_offset=%#x: L1 table is not cluster aligned; snapshot table entry corrupted", printable(sn.ID), printable(sn.Name), sn.l1At)
			continue
		}
		if sn.l1Size > maxL1Size/8 {
			c.corrupt("ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted", printable(sn.ID), printable(sn.Name), sn.l1Size)
			continue
		}
		n := int64(sn.l1Size)
		if _, err := c.countL1(int64(sn.l1At), c.walkFrom(sn.l1At, n), n, false); err != nil {
			return err
		}
	}
	c.count(int64(h.snapshotOffset), snapshotsSize(c.snapshots), roleOther)
	return nil
}

// countRest counts the references of the header to everything else.
func (c *checker) countRest() error {
	if !c.anew {
		if err := c.countRefTable(); err != nil {
			return err
		}
	}
	if x := c.h.extension(extCrypto); len(x) == 16 {
		c.count(int64(binary.BigEndian.Uint64(x)), int64(binary.BigEndian.Uint64(x[8:])), roleOther)
	}
	if err := c.countBitmaps(); err != nil {
		return err
	}
	if !c.anew {
		c.countBlocks()
	}
	return nil
}

// countRefTable counts the reference to the refcount table, and reads it.
func (c *checker) countRefTable() (err error) {
	c.refTable, c.broken = nil, false
	if err := c.h.checkRefTable(); err != nil {
		c.broken = true
		c.corrupt("ERROR %v", err)
		return nil
	}
	at, n := int64(c.h.refTableOffset), int64(c.h.refTableClusters)<<c.g.clusterBits
	c.count(at, n, roleOther)
	if c.refTable, err = c.readWords(at, n/8); err != nil {
		c.res.CheckErrors++
		return fmt.Errorf("refcount table at %#x: %w", at, err)
	}
	return nil
}

func (c *checker) countBitmaps() error {
	h := c.h
	x, err := h.bitmapsExtension()
	if err != nil || x.count == 0 || h.autoclear&autoclearBitmaps == 0 {
		return err
	}
	c.count(int64(x.offset), int64(x.size), roleOther)
	for i := range c.bitmaps {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		b := &c.bitmaps[i]
		at, n := int64(b.tableAt), int64(b.tableSize)
		from := c.walkFrom(b.tableAt, n)
		c.count(at, n*8, roleOther)
		table, err := c.readWords(at+from*8, n-from)
		if err != nil {
			c.res.Corruptions++
			return fmt.Errorf("table of bitmap %q at %#x: %w", b.name, b.tableAt, err)
		}
		for _, w := range table {
			switch e := bitmapTableEntry(w); {
			case e.reserved() != 0 || c.g.within(e.host()) != 0:
				c.res.Corruptions++ // without a word, as in qemu-img
			case e.host() != 0:
				c.count(e.host(), c.g.clusterSize, roleOther)
			}
		}
	}
	return nil
}

// countBlocks counts the references of the refcount table, each of which has
// to be the only one to its block.
func (c *checker) countBlocks() {
	g := c.g
	for i, w := range c.refTable {
		e := refTableEntry(w)
		cluster := int64(uint64(e.host()) >> g.clusterBits)
		switch {
		case e.reserved() != 0:
			c.corrupt("ERROR refcount table entry %d has reserved bits set", i)
		case g.within(e.host()) != 0:
			c.corrupt("ERROR refcount block %d is not cluster aligned; refcount table entry corrupted", i)
		case cluster >= c.clusters:
			c.corrupt("ERROR refcount block %d is outside image", i)
		case e.host() == 0:
			continue
		default:
			c.count(e.host(), g.clusterSize, roleOther)
			n := c.refs.get(cluster)
			if n != 1 {
				c.corrupt("ERROR refcount block %d refcount=%d", i, n)
			}
			if n == 1 && c.roles.get(cluster) != roleMixed {
				continue
			}
		}
		c.broken = true
	}
}
