package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// Repair, and why it is safe at any moment.
//
//  1. What says too much is mended first: entries, tables that serve as
//     something else as well, the snapshot table. A table is written in place
//     only if nothing but L1 tables refers to it; otherwise a copy is, where
//     nothing refers to, and the reference is changed once the copy is durable.
//  2. When that is durable all references are counted again, and the stored
//     counts are put right, in place, or as a new refcount structure that one
//     write of the header puts into force.
//  3. When that is durable the copied flags are put right.
//  4. When that is durable the dirty and the corrupt bit go, if nothing is wrong.
//
// Guest data is never written, and at no point is a count lower than what is
// durable needs, unless it was before, or the image is marked as dirty: that it
// is before it refers to what the repair made and has no counts yet. Version 2
// has no such mark, and gets the new counts by the same write. A repair that is
// cut off is begun again.

// snapshotExtra is the extra data that version 3 wants of a snapshot, in bytes:
// the size of the VM state, and of the disk.
const snapshotExtra = 16

// repairDirty repairs an image that was not closed properly, as who opens it
// for writing has to, and returns its header. What cannot be repaired keeps
// the image dirty, and is of no harm to who knows the counts, which are right.
func repairDirty(ctx context.Context, s storage.Store, h *header, warn func(string)) (*header, error) {
	c := newChecker(ctx, s, h, image.CheckOptions{Repair: image.RepairAll})
	err := c.check()
	if err == nil && c.res.CheckErrors > 0 {
		err = syscall.EIO
	}
	if err != nil {
		return nil, fmt.Errorf("Could not repair dirty image: %w", err) // QEMU's words
	}
	if warn != nil {
		warn("the image was not closed properly; its reference counts have been rebuilt")
		if c.res.Corruptions > 0 {
			warn(fmt.Sprintf("%d errors in the image could not be repaired", c.res.Corruptions))
		}
	}
	return readHeader(s)
}

// mends reports whether a kind of fault is to be repaired.
func (c *checker) mends(leak bool) bool {
	return c.opt.Repair == image.RepairAll || leak && c.opt.Repair == image.RepairLeaks
}

func (c *checker) fixed(leak bool) {
	if leak {
		c.res.LeaksFixed++
	} else {
		c.res.CorruptionsFixed++
	}
}

// verb is how a finding begins that is repaired where anything is.
func (c *checker) verb(otherwise string) string {
	if c.mends(false) {
		return "Repairing"
	}
	return otherwise
}

// settle repairs all but the copied flags.
func (c *checker) settle() error {
	if c.opt.Repair == image.RepairNothing {
		return c.compare(compareTake)
	}
	if c.mends(false) {
		if err := c.mend(); err != nil {
			return err
		}
		for k := range c.h.refTableSpan() {
			c.broken = c.broken || c.roles.get(k) == roleMixed
		}
	}
	walked := c.res
	if err := c.compare(compareOnly); err != nil {
		return err
	}
	switch {
	case c.broken && !c.mends(false):
		c.report(false, "ERROR need to rebuild refcount structures")
		return syscall.EIO
	case c.broken:
		if err := c.rebuild(walked.CheckErrors); err != nil {
			return err
		}
	case c.res != walked || c.uncounted:
		c.res = walked
		if err := c.compare(compareRight); err != nil {
			return err
		}
	default:
		return nil
	}
	return c.store.Sync()
}

// recount counts the references again, after what it is told was changed.
func (c *checker) recount() error {
	before := c.res
	c.res = image.CheckResult{
		TotalClusters:    before.TotalClusters,
		CorruptionsFixed: before.CorruptionsFixed,
		LeaksFixed:       before.LeaksFixed,
	}
	c.quiet = true
	err := c.walk()
	c.quiet = false
	c.res.CorruptionsFixed += max(0, before.Corruptions-c.res.Corruptions)
	return err
}

// mend mends all that is not a count or a copied flag.
func (c *checker) mend() error {
	for _, steps := range [][]func() (bool, error){
		{c.grow, c.separate}, // what is mended then depends on what is whose
		{c.mendEntries, c.mendSnapshots, c.mendBitmaps},
	} {
		changed := false
		for _, step := range steps {
			did, err := step()
			if err != nil {
				return err
			}
			changed = changed || did
		}
		if !changed {
			continue
		}
		if err := c.store.Sync(); err != nil {
			return err
		}
		if err := c.recount(); err != nil {
			return err
		}
	}
	return nil
}

// growLimit is how far references past the end are believed, in bytes. What
// was cut off a file lies below: twice the file, and the whole disk.
func (c *checker) growLimit() int64 {
	g := c.g
	clusters := min(2*c.clusters+g.clusters(c.h.diskSize()), maxCheckedClusters>>1, maxRefTableSize/8<<g.refBlockBits)
	return clusters << g.clusterBits
}

// grow makes a store whole that was cut off. It reads as zeros there, as what
// was past the end does in QEMU.
func (c *checker) grow() (bool, error) {
	if c.past == 0 || c.store.Info().FixedSize {
		return false, nil
	}
	end := c.g.ceil(c.past)
	switch err := c.store.Truncate(end); {
	case errors.Is(err, syscall.EFBIG):
		c.beyond = min(c.beyond, c.pastFrom)
		return false, nil // more than the host can have; what is there is worth the rest of the repair
	case err != nil:
		return false, err
	}
	c.report(false, "Repairing the end of the file: 0x%x instead of 0x%x", end, c.size)
	c.size = end
	return true, nil
}

// alloc returns n clusters in a row that nothing refers to.
func (c *checker) alloc(n int64) (int64, error) {
	g := c.g
	if c.store.Info().FixedSize {
		return c.allocWithin(n)
	}
	first := max(c.clusters, g.clusters(c.size), c.tail)
	if (first+n)<<g.clusterBits > c.beyond {
		return 0, corrupt("no room: something refers to what lies behind the end, at %#x", c.beyond)
	}
	c.tail = first + n
	c.own(first, n)
	c.size = max(c.size, c.tail<<g.clusterBits) // once it is written
	return first, nil
}

// allocWithin looks for room on a device.
func (c *checker) allocWithin(n int64) (int64, error) {
	run := int64(0)
	for k := c.tail; k < c.size>>c.g.clusterBits; k++ {
		if run++; c.refs.get(k) > 0 || c.roles.get(k) != roleNone || c.old.get(k) != roleNone {
			run = 0
		}
		if run == n {
			c.tail = k + 1
			c.own(k+1-n, n)
			return k + 1 - n, nil
		}
	}
	return 0, syscall.ENOSPC
}

func (c *checker) own(first, n int64) {
	if c.made == nil {
		c.made = newRoleMap()
	}
	for k := first; k < first+n; k++ {
		c.made.add(k, roleOther)
	}
}

// ownTable reports whether an L2 table is nothing else.
func (c *checker) ownTable(host int64) bool {
	return c.g.within(host) == 0 && c.roles.get(host>>c.g.clusterBits) <= roleTable && host+c.g.clusterSize <= c.g.ceil(c.size)
}

// ownWord reports whether the word at a place, of another table that is
// counted, or was just made, is nothing else.
func (c *checker) ownWord(at int64) bool {
	r := c.roles.get(at >> c.g.clusterBits)
	return r == roleOther || r == roleNone
}

// shared reports whether a cluster has more references than its count of n can
// say.
func (c *checker) shared(host int64, n uint64) bool {
	return n == 1 && c.over.get(host>>c.g.clusterBits) != roleNone
}

// separate gives the active tables a place of their own where they have none:
// they are about to be written, now or by the next writer.
func (c *checker) separate() (bool, error) {
	moved := false
	copies := map[int64]int64{} // of L2 tables
	var changed span
	for i, w := range c.l1 {
		host := l1Entry(w).host()
		if host == 0 && w != 0 {
			// To its readers there is no table. Followed, it led to the header.
			c.l1[i] = 0
			changed.add(int64(i)*8, 8)
		}
		if host == 0 || c.g.within(host) != 0 || c.roles.get(host>>c.g.clusterBits) != roleMixed || host >= c.size {
			continue
		}
		if copies[host] == 0 {
			to, err := c.copyOut(host, 1)
			if err != nil {
				return false, err
			}
			copies[host] = to
			c.res.CorruptionsFixed++
			c.report(false, "Repairing L2 table at 0x%x: it is used as something else too, moved to 0x%x", host, to)
		}
		c.l1[i] = w&^hostMask | uint64(copies[host])
		changed.add(int64(i)*8, 8)
	}
	n := c.g.clusters(int64(c.h.l1Size) * 8)
	first := int64(c.h.l1Offset) >> c.g.clusterBits
	for k := first; k < first+n; k++ {
		moved = moved || c.roles.get(k) == roleMixed
	}
	bare := c.h.version < 3 && len(copies) > 0 // no mark would say that their counts are missing
	if moved || bare {
		// The entries are those in memory.
		to, err := c.alloc(n)
		if err != nil {
			return false, err
		}
		at := to << c.g.clusterBits
		b := make([]byte, n<<c.g.clusterBits)
		for i, w := range c.l1 {
			binary.BigEndian.PutUint64(b[i*8:], w)
		}
		if err := c.store.WriteAt(b, at, 0); err != nil {
			return false, err
		}
		if moved {
			c.res.CorruptionsFixed++
			c.report(false, "Repairing L1 table at 0x%x: it is used as something else too, moved to 0x%x", c.h.l1Offset, at)
		}
		if c.h.version < 3 {
			return true, c.switchWithCounts(uint64(at))
		}
		if err := c.mark(); err != nil {
			return false, err
		}
		c.h.l1Offset = uint64(at)
		return true, c.switchHeader(40, 8)
	}
	if changed.empty() {
		return false, nil
	}
	if len(copies) > 0 {
		if err := c.mark(); err != nil {
			return false, err
		}
	}
	if err := c.store.Sync(); err != nil {
		return false, err
	}
	return true, c.writeL1(int64(c.h.l1Offset), c.l1, changed)
}

// switchWithCounts puts a new L1 table into force together with the counts of
// all that it leads to.
func (c *checker) switchWithCounts(l1At uint64) error {
	errors := c.res.CheckErrors
	if err := c.compare(compareOnly); err != nil {
		return err
	}
	c.h.l1Offset = l1At
	return c.rebuild(errors)
}

// mark sets the dirty bit, durably: whoever opens the image for writing before
// what was made has its counts has to repair it first.
func (c *checker) mark() error {
	if c.h.version < 3 || c.h.incompatible&incompatDirty != 0 {
		return nil
	}
	c.marked = true
	c.h.incompatible |= incompatDirty
	return c.switchHeader(72, 8)
}

// copyOut copies n clusters to where there is room.
func (c *checker) copyOut(host, n int64) (int64, error) {
	first, err := c.alloc(n)
	if err != nil {
		return 0, err
	}
	b := make([]byte, n<<c.g.clusterBits)
	if _, err := c.store.ReadAt(b, host); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return first << c.g.clusterBits, c.store.WriteAt(b, first<<c.g.clusterBits, 0)
}

// mendEntries mends the entries of all L1 and L2 tables.
func (c *checker) mendEntries() (bool, error) {
	if c.res.Corruptions == 0 {
		return false, nil
	}
	c.forget()
	changed, err := c.mendL1(int64(c.h.l1Offset), c.l1)
	seen := map[uint64]int64{} // how many entries of the L1 tables of snapshots at a place
	for i := range c.snapshots {
		sn := &c.snapshots[i]
		if err != nil {
			return false, err
		}
		from, n := seen[sn.l1At], int64(sn.l1Size)
		if c.g.within(int64(sn.l1At)) != 0 || n > maxL1Size/8 || n <= from {
			continue
		}
		seen[sn.l1At] = n
		at := int64(sn.l1At) + from*8
		var l1 []uint64
		if l1, err = c.readWords(at, n-from); err != nil {
			return false, err
		}
		var did bool
		did, err = c.mendL1(at, l1)
		changed = changed || did
	}
	return changed, err
}

func (c *checker) mendL1(at int64, l1 []uint64) (bool, error) {
	changed := false
	var wrong span
	seen := map[int64]bool{}
	for i := range l1 {
		e := l1Entry(l1[i])
		if e == 0 {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return false, err
		}
		if r := e.reserved(); r != 0 && c.g.within(e.host()) == 0 && c.ownWord(at+int64(i)*8) {
			l1[i] &^= r
			wrong.add(int64(i)*8, 8)
		}
		if e.host() == 0 || !c.ownTable(e.host()) || c.revisited(seen, e.host()) {
			continue
		}
		t, err := c.table(l1, i)
		if err != nil {
			return false, err
		}
		mended := c.g.mendL2(t)
		if mended.empty() {
			continue
		}
		if err := c.writeTable(e.host(), t, mended); err != nil {
			return false, err
		}
		changed = true
	}
	if wrong.empty() {
		return changed, nil
	}
	return true, c.writeL1(at, l1, wrong)
}

// mendL2 mends the entries of an encoded L2 table, and returns what it changed.
func (g *geometry) mendL2(t []byte) (changed span) {
	for i := range len(t) / 8 / int(g.entryWords) {
		e, b := entryOf(t, i, g.entryWords)
		e2, b2 := g.mend(e, b)
		if e2 == e && b2 == b {
			continue
		}
		at := i * 8 * int(g.entryWords)
		binary.BigEndian.PutUint64(t[at:], uint64(e2))
		if g.entryWords == 2 {
			binary.BigEndian.PutUint64(t[at+8:], uint64(b2))
		}
		changed.add(int64(at), 8*int64(g.entryWords))
	}
	return changed
}

// mend returns an L2 entry without what contradicts the format and can be told
// how it was meant, or that no program could read; that becomes zeros. An entry
// whose data is not aligned is left: where its data lies nobody knows.
func (g *geometry) mend(e l2Entry, b l2Bitmap) (l2Entry, l2Bitmap) {
	kind := g.kind(e)
	switch {
	case kind == clusterCompressed && g.dataFile && g.extended:
		return 0, allZero
	case kind == clusterCompressed && g.dataFile:
		return flagZero, 0
	case kind == clusterCompressed:
		return e &^ flagCopied, 0
	}
	e &^= l2Entry(e.reserved())
	if both := l2Bitmap(b.allocated() & b.zero()); both != 0 {
		b &^= both
	}
	if kind == clusterUnallocated && b.allocated() != 0 {
		b = b<<32 | b&allZero
	}
	if g.within(e.host()) != 0 {
		switch {
		case kind == clusterZeroAlloc:
			e = flagZero
		case g.extended && b.allocated() == 0:
			e = 0
		}
	}
	return e, b
}

// mendSnapshots writes a new snapshot table if entries lack what version 3 has.
func (c *checker) mendSnapshots() (bool, error) {
	incomplete := func(sn snapshot) bool { return len(sn.extra) < snapshotExtra }
	if c.h.version < 3 || !slices.ContainsFunc(c.snapshots, incomplete) {
		return false, nil
	}
	whole := slices.Clone(c.snapshots)
	var b []byte
	for i := range whole {
		sn := &whole[i]
		for k := len(sn.extra); k < snapshotExtra; k = len(sn.extra) {
			v := uint64(sn.VMStateSize)
			if k >= 8 {
				v = uint64(sn.Size)
			}
			sn.extra = binary.BigEndian.AppendUint64(sn.extra[:k&^7:k&^7], v)
		}
		b = sn.append(b)
	}
	if len(b) > maxSnapshotTable {
		return false, nil // nobody could read it
	}
	first, err := c.alloc(c.g.clusters(int64(len(b))))
	if err != nil {
		return false, err
	}
	if err := c.store.WriteAt(b, first<<c.g.clusterBits, 0); err != nil {
		return false, err
	}
	if err := c.mark(); err != nil {
		return false, err
	}
	c.snapshots = whole
	c.h.snapshotOffset = uint64(first) << c.g.clusterBits
	return true, c.switchHeader(60, 12)
}

// append appends the entry as it is in the table.
func (sn *snapshot) append(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, make([]byte, -len(b)&7)...)
	b = be.AppendUint64(b, sn.l1At)
	b = be.AppendUint32(b, sn.l1Size)
	b = be.AppendUint16(b, uint16(len(sn.ID)))
	b = be.AppendUint16(b, uint16(len(sn.Name)))
	b = be.AppendUint32(b, uint32(sn.Created.Unix()))
	b = be.AppendUint32(b, uint32(sn.Created.Nanosecond()))
	b = be.AppendUint64(b, uint64(sn.VMClock))
	state := uint32(sn.VMStateSize)
	if sn.VMStateSize>>32 != 0 {
		state = 0 // the extra data has it
	}
	b = be.AppendUint32(b, state)
	b = be.AppendUint32(b, uint32(len(sn.extra)))
	b = append(b, sn.extra...)
	b = append(b, sn.ID...)
	return append(b, sn.Name...)
}

// dropBitmaps gives up bitmaps whose directory makes no sense.
func (c *checker) dropBitmaps(reason error) error {
	c.report(false, "Repairing bitmaps: they are given up: %v", reason)
	c.h.autoclear &^= autoclearBitmaps
	if err := c.switchHeader(88, 8); err != nil {
		return err
	}
	c.res.Corruptions--
	c.res.CorruptionsFixed++
	return nil
}

// mendBitmaps makes bits that cannot be found ones: what may be dirty is.
func (c *checker) mendBitmaps() (bool, error) {
	const allOnes = 1
	changed := false
	if c.res.Corruptions == 0 || c.h.autoclear&autoclearBitmaps == 0 {
		return false, nil
	}
	seen := map[uint64]int64{} // how many entries of the tables at a place
	for i := range c.bitmaps {
		b := &c.bitmaps[i]
		from, n := seen[b.tableAt], int64(b.tableSize)
		if n <= from {
			continue
		}
		seen[b.tableAt] = n
		at := int64(b.tableAt) + from*8
		table, err := c.readWords(at, n-from)
		if err != nil {
			return false, err
		}
		for k, w := range table {
			e := bitmapTableEntry(w)
			where := at + int64(k)*8
			if e.reserved() == 0 && c.g.within(e.host()) == 0 || !c.ownWord(where) {
				continue
			}
			c.report(false, "Repairing bitmap %s: entry %d of its table is %x", b.name, from+int64(k), w)
			if err := c.store.WriteAt(binary.BigEndian.AppendUint64(nil, allOnes), where, 0); err != nil {
				return false, err
			}
			changed = true
		}
	}
	return changed, nil
}

// rightsCopied reports whether copied flags are put right: not before the
// counts are.
func (c *checker) rightsCopied() bool {
	r := &c.res
	c.forget()
	return c.mends(false) || c.mends(true) && r.CheckErrors == 0 && r.Corruptions == 0 && r.Leaks == 0
}

// clean clears the bits that say that something is wrong, if nothing is. The
// mark of this repair goes as soon as all counts are right.
func (c *checker) clean() error {
	if c.opt.Repair == image.RepairNothing {
		return nil
	}
	if err := c.store.Sync(); err != nil {
		return err
	}
	wrong := c.h.incompatible & (incompatDirty | incompatCorrupt)
	switch {
	case c.res.Corruptions > 0 && c.marked:
		wrong = incompatDirty
	case c.res.Corruptions > 0:
		wrong = 0
	}
	if wrong == 0 || c.res.CheckErrors > 0 {
		return nil
	}
	c.h.incompatible &^= wrong
	return c.switchHeader(72, 8)
}

// switchHeader puts n bytes of the header at off into force. All that they
// refer to is durable before.
func (c *checker) switchHeader(off, n int) error {
	if err := c.store.Sync(); err != nil {
		return err
	}
	if err := c.store.WriteAt(c.h.encodeFixed()[off:off+n], int64(off), 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	return c.store.Sync()
}

// writeTable writes what was changed of an encoded table.
func (c *checker) writeTable(at int64, t []byte, changed span) error {
	if changed.empty() {
		return nil
	}
	if err := c.store.WriteAt(t[changed.from:changed.to], at+changed.from, 0); err != nil {
		return fmt.Errorf("table at %#x: %w", at, err)
	}
	return nil
}

// writeL1 writes what was changed of an L1 table.
func (c *checker) writeL1(at int64, l1 []uint64, changed span) error {
	if changed.empty() {
		return nil
	}
	b := make([]byte, 0, changed.to-changed.from)
	for _, w := range l1[changed.from/8 : changed.to/8] {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	if err := c.store.WriteAt(b, at+changed.from, 0); err != nil {
		return fmt.Errorf("L1 table at %#x: %w", at, err)
	}
	return nil
}

// A span is a run of bytes that grows to hold all that is added.
type span struct{ from, to int64 }

func (s *span) empty() bool { return s.from == s.to }

func (s *span) add(off, n int64) {
	if s.empty() {
		*s = span{off, off + n}
	}
	s.from, s.to = min(s.from, off), max(s.to, off+n)
}
