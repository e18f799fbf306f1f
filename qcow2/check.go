package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
)

// maxCheckedClusters is QEMU's bound of the clusters of a store.
const maxCheckedClusters = math.MaxInt32

// checkRun is how much of tables that follow each other is read at once.
const checkRun = 1 << 20

// A checker verifies an image as qemu-img does: it counts the references to
// each cluster by walking everything that the header leads to, compares the
// counts with the stored ones, and then looks whether the copied flags agree.
// Findings, their words and their order are qemu-img's.
type checker struct {
	im   *Image
	h    *header // as the store has it
	ctx  context.Context
	opt  image.CheckOptions
	res  image.CheckResult
	size int64 // of the store

	clusters int64  // that are looked at: those of the store, and what refers to the one behind
	refs     *tally // references; later the stored counts

	done, total int64 // tables

	run     []byte // tables that were read at once,
	runAt   int64  // from here
	block   []byte // a refcount block,
	blockNo int64  // this one; -1: none
}

// Check verifies the structure of the image without changing it. It takes one
// byte of memory per cluster. An error means that the check came to no end.
//
// An image that is open for writing is committed first, and requests wait
// until the check is over. Clusters that were freed lately may then be leaks.
func (im *Image) Check(ctx context.Context, opt image.CheckOptions) (image.CheckResult, error) {
	c := &checker{im: im, ctx: ctx, opt: opt, blockNo: -1}
	if im.writer == nil {
		v, err := im.epochs.enter()
		if err != nil {
			return c.res, err
		}
		defer v.leave()
	} else {
		if err := im.epochs.freeze(); err != nil {
			return c.res, err
		}
		defer im.epochs.thaw()
		if err := im.writer.commit.commit(); err != nil {
			return c.res, image.Wrap("check", im.name, err)
		}
	}
	if err := c.check(); err != nil {
		return c.res, image.Wrap("check", im.name, err)
	}
	return c.res, nil
}

func (c *checker) check() error {
	l1, refTable, err := c.references()
	if err != nil {
		return err
	}
	last, err := c.compare(refTable)
	if err != nil {
		return err
	}
	if err := c.checkCopied(l1, refTable); err != nil {
		return err
	}
	c.res.ImageEndOffset = (last + 1) << c.im.geo.clusterBits
	c.progress(c.total - c.done)
	return nil
}

// references counts the references to each cluster.
func (c *checker) references() (l1, refTable []uint64, err error) {
	g := c.im.geo
	h, err := readHeader(c.im.store)
	if err != nil {
		c.res.CheckErrors++
		return nil, nil, err
	}
	c.h = h
	if c.size, err = c.im.store.Size(); err != nil {
		c.res.CheckErrors++
		return nil, nil, err
	}
	c.clusters = g.clusters(c.size)
	if c.clusters > maxCheckedClusters {
		c.res.CheckErrors++
		return nil, nil, fmt.Errorf("%d clusters: %w", c.clusters, syscall.EFBIG)
	}
	c.res.TotalClusters = g.clusters(c.im.info.Size)
	c.refs = newTally(c.clusters + 1)
	c.total = 2*int64(h.l1Size) + int64(h.refTableClusters)<<(g.clusterBits-3)
	for i := range c.im.snapshots {
		c.total += int64(c.im.snapshots[i].l1Size)
	}

	for i := range c.im.snapshots {
		if h.version >= 3 && len(c.im.snapshots[i].extra) < 16 {
			c.corrupt("ERROR snapshot table entry %d is incomplete", i)
		}
	}
	c.count(0, g.clusterSize)
	l1, err = c.countL1(int64(h.l1Offset), int64(h.l1Size), true)
	if err != nil {
		return nil, nil, err
	}
	if err := c.countSnapshots(); err != nil {
		return nil, nil, err
	}
	refTable, err = c.countRest()
	if err != nil {
		return nil, nil, err
	}
	c.countBlocks(refTable)
	return l1, refTable, nil
}

func (c *checker) corrupt(format string, a ...any) {
	c.res.Corruptions++
	c.report(false, format, a...)
}

func (c *checker) report(leak bool, format string, a ...any) {
	if c.opt.Report != nil {
		c.opt.Report(image.Finding{Leak: leak, Text: fmt.Sprintf(format, a...)})
	}
}

func (c *checker) progress(n int64) {
	if c.done += n; c.opt.Progress != nil {
		c.opt.Progress(c.done, c.total)
	}
}

// count adds a reference to all clusters that n bytes at off touch.
func (c *checker) count(off, n int64) {
	g := c.im.geo
	if n <= 0 {
		return
	}
	// The last cluster of a store may not be written out in full.
	if off < 0 || off > math.MaxInt64-n || off+n-c.size >= g.clusterSize {
		c.corrupt("ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x%x size 0x%x", uint64(off), uint64(n))
		return
	}
	last := (off + n - 1) >> g.clusterBits
	if last >= c.clusters {
		c.clusters = last + 1
		c.refs.grow(c.clusters)
	}
	for k := off >> g.clusterBits; k <= last; k++ {
		refs := c.refs.get(k)
		if refs == maxRefcount(g.refcountOrder) {
			c.corrupt("ERROR: overflow cluster offset=0x%x\n"+
				"Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing", k<<g.clusterBits)
			continue
		}
		c.refs.set(k, refs+1)
	}
}

// readWords reads a table of n words. What is past the end is zeros.
func (c *checker) readWords(at, n int64) ([]uint64, error) {
	w := make([]uint64, n)
	buf := make([]byte, min(n*8, checkRun))
	for i := int64(0); i < n; {
		b := buf[:min(int64(len(buf)), (n-i)*8)]
		m, err := c.im.store.ReadAt(b, at+i*8)
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
	size := c.im.geo.clusterSize
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
		m, err := c.im.store.ReadAt(c.run, at)
		if err != nil && !errors.Is(err, io.EOF) {
			c.run = c.run[:0]
			return nil, err
		}
		clear(c.run[m:])
	}
	return c.run[at-c.runAt:][:size], nil
}

// countL1 counts the references of an L1 table and its L2 tables.
func (c *checker) countL1(at, n int64, active bool) ([]uint64, error) {
	if n == 0 {
		return nil, nil
	}
	g := c.im.geo
	c.count(at, n*8)
	l1, err := c.readWords(at, n)
	if err != nil {
		c.res.CheckErrors++
		c.report(false, "ERROR: I/O error in check_refcounts_l1")
		return nil, err
	}
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
		c.count(e.host(), g.clusterSize)
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
	g := c.im.geo
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
					c.corrupt("ERROR offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", host)
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
				c.count(host, g.clusterSize)
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
	g := c.im.geo
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
		return
	}
	c.count(host, n)
	if active {
		c.res.AllocatedClusters++
		c.res.CompressedClusters++
		c.res.FragmentedClusters++ // by nature: they begin and end anywhere
	}
}

// countSnapshots counts the references of the snapshots and their table.
func (c *checker) countSnapshots() error {
	h := c.h
	if n := len(c.im.snapshots); n > 0 && c.im.geo.dataFile {
		c.corrupt("ERROR %d snapshots in image with data file", n)
	}
	var size int64
	for i := range c.im.snapshots {
		sn := &c.im.snapshots[i]
		size = (size+7)&^7 + snapshotFixed + int64(len(sn.extra)+len(sn.ID)+len(sn.Name))
		if sn.l1At&uint64(c.im.geo.clusterSize-1) != 0 {
			c.corrupt("ERROR snapshot %s (%s) l1_offset=%#x: L1 table is not cluster aligned; snapshot table entry corrupted", sn.ID, sn.Name, sn.l1At)
			continue
		}
		if sn.l1Size > maxL1Size/8 {
			c.corrupt("ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted", sn.ID, sn.Name, sn.l1Size)
			continue
		}
		if _, err := c.countL1(int64(sn.l1At), int64(sn.l1Size), false); err != nil {
			return err
		}
	}
	c.count(int64(h.snapshotOffset), size)
	return nil
}

// countRest counts the references of the header to everything else, and
// returns the refcount table.
func (c *checker) countRest() ([]uint64, error) {
	g, h := c.im.geo, c.h
	n := int64(h.refTableClusters) << g.clusterBits
	c.count(int64(h.refTableOffset), n)
	refTable, err := c.readWords(int64(h.refTableOffset), n/8)
	if err != nil {
		c.res.CheckErrors++
		return nil, fmt.Errorf("refcount table at %#x: %w", h.refTableOffset, err)
	}
	if x := h.extension(extCrypto); len(x) == 16 {
		c.count(int64(binary.BigEndian.Uint64(x)), int64(binary.BigEndian.Uint64(x[8:])))
	}
	return refTable, c.countBitmaps()
}

func (c *checker) countBitmaps() error {
	h := c.h
	x, err := h.bitmapsExtension()
	if err != nil || x.count == 0 || h.autoclear&autoclearBitmaps == 0 {
		return err
	}
	c.count(int64(x.offset), int64(x.size))
	for i := range c.im.bitmaps {
		b := &c.im.bitmaps[i]
		c.count(int64(b.tableAt), int64(b.tableSize)*8)
		table, err := c.readWords(int64(b.tableAt), int64(b.tableSize))
		if err != nil {
			c.res.Corruptions++
			return fmt.Errorf("table of bitmap %q at %#x: %w", b.name, b.tableAt, err)
		}
		for _, w := range table {
			switch e := bitmapTableEntry(w); {
			case e.reserved() != 0 || c.im.geo.within(e.host()) != 0:
				c.res.Corruptions++
			case e.host() != 0:
				c.count(e.host(), c.im.geo.clusterSize)
			}
		}
	}
	return nil
}

// countBlocks counts the references of the refcount table, each of which has
// to be the only one to its block.
func (c *checker) countBlocks(refTable []uint64) {
	g := c.im.geo
	for i, w := range refTable {
		e := refTableEntry(w)
		cluster := int64(uint64(e.host()) >> g.clusterBits)
		switch {
		case e.reserved() != 0:
			c.corrupt("ERROR refcount table entry %d has reserved bits set", i)
			continue
		case g.within(e.host()) != 0:
			c.corrupt("ERROR refcount block %d is not cluster aligned; refcount table entry corrupted", i)
			continue
		case cluster >= c.clusters:
			c.corrupt("ERROR refcount block %d is outside image", i)
			continue
		case e.host() == 0:
			continue
		}
		c.count(e.host(), g.clusterSize)
		if n := c.refs.get(cluster); n != 1 {
			c.corrupt("ERROR refcount block %d refcount=%d", i, n)
		}
	}
}

// compare compares references with stored counts, and puts the counts in
// their place. It returns the last cluster that has either.
func (c *checker) compare(refTable []uint64) (last int64, err error) {
	g := c.im.geo
	for k := int64(0); k < c.clusters; {
		if err := c.ctx.Err(); err != nil {
			return 0, err
		}
		no := k >> g.refBlockBits
		end := min(c.clusters, (no+1)<<g.refBlockBits)
		block, err := c.refBlock(refTable, no)
		if block == nil && err == nil {
			k = min(end, c.refs.skip(k)) // where there are neither
		}
		for ; k < end; k++ {
			if err != nil {
				c.res.CheckErrors++
				c.report(false, "Can't get refcount for cluster %d: %s", k, reason(err))
				continue
			}
			var stored uint64
			if block != nil {
				stored = refcount(block, k&(1<<g.refBlockBits-1), g.refcountOrder)
			}
			refs := c.refs.get(k)
			if stored > 0 || refs > 0 {
				last = k
			}
			switch {
			case stored == refs:
				continue
			case stored < refs:
				c.corrupt("ERROR cluster %d refcount=%d reference=%d", k, stored, refs)
			default:
				c.res.Leaks++
				c.report(true, "Leaked cluster %d refcount=%d reference=%d", k, stored, refs)
			}
			c.refs.set(k, stored)
		}
	}
	c.progress(int64(len(refTable)))
	return last, nil
}

// refBlock returns a refcount block, nil if there is none.
func (c *checker) refBlock(refTable []uint64, no int64) ([]byte, error) {
	g := c.im.geo
	if no >= int64(len(refTable)) {
		return nil, nil
	}
	host := refTableEntry(refTable[no]).host()
	switch {
	case host == 0:
		return nil, nil
	case g.within(host) != 0 || host < 0:
		return nil, syscall.EIO
	case no == c.blockNo:
		return c.block, nil
	}
	if c.block == nil {
		c.block = make([]byte, g.clusterSize)
	}
	c.blockNo = -1
	n, err := c.im.store.ReadAt(c.block, host)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	clear(c.block[n:])
	c.blockNo = no
	return c.block, nil
}

// reason puts an error into the system's words, as qemu-img does.
func reason(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok && errno == syscall.EIO {
		return "Input/output error"
	}
	return err.Error()
}

// stored returns the stored count of a cluster, and whether it is known. The
// counts of what was looked at are at hand.
func (c *checker) stored(refTable []uint64, cluster int64) (uint64, bool) {
	g := c.im.geo
	no := cluster >> g.refBlockBits
	if no < int64(len(refTable)) {
		if host := refTableEntry(refTable[no]).host(); host < 0 || g.within(host) != 0 {
			return 0, false
		}
	}
	if cluster < c.clusters {
		return c.refs.get(cluster), true
	}
	block, err := c.refBlock(refTable, no)
	if err != nil {
		return 0, false
	}
	if block == nil {
		return 0, true
	}
	return refcount(block, cluster&(1<<g.refBlockBits-1), g.refcountOrder), true
}

// checkCopied looks whether the copied flags say what the counts do.
func (c *checker) checkCopied(l1, refTable []uint64) error {
	g := c.im.geo
	for i, w := range l1 {
		c.progress(1)
		e := l1Entry(w)
		if e.host() == 0 {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, ok := c.stored(refTable, e.host()>>g.clusterBits)
		if !ok {
			continue
		}
		if (n == 1) != e.copied() {
			c.corrupt("ERROR OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d", i, w, n)
		}
		t, err := c.table(l1, i)
		if err != nil {
			c.res.CheckErrors++
			c.report(false, "ERROR: I/O error in check_oflag_copied: %s", reason(err))
			return err
		}
		for j := range len(t) / 8 / int(g.entryWords) {
			e, _ := entryOf(t, j, g.entryWords)
			if kind := g.kind(e); kind != clusterData && kind != clusterZeroAlloc {
				continue
			}
			n, ok := uint64(1), true
			if !g.dataFile {
				n, ok = c.stored(refTable, e.host()>>g.clusterBits)
			}
			if ok && (n == 1) != e.copied() {
				c.corrupt("ERROR OFLAG_COPIED data cluster: l2_entry=%x refcount=%d", uint64(e), n)
			}
		}
	}
	return nil
}
