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
	"github.com/imgnbd/imgnbd/storage"
)

// maxCheckedClusters is QEMU's bound of the clusters of a store.
const maxCheckedClusters = math.MaxInt32

// checkRun is how much of tables that follow each other is read at once.
const checkRun = 1 << 20

// A checker verifies an image as qemu-img does: it counts the references to
// each cluster by walking everything that the header leads to, compares the
// counts with the stored ones, and then looks whether the copied flags agree.
// Findings, their words and their order are qemu-img's. How it repairs is in
// repair.go.
type checker struct {
	store     storage.Store
	g         *geometry
	h         *header // as the store has it
	snapshots []snapshot
	bitmaps   []bitmap
	ctx       context.Context
	opt       image.CheckOptions
	res       image.CheckResult
	size      int64 // of the store

	l1       []uint64 // active
	refTable []uint64
	broken   bool              // the refcount structure cannot be mended, only be made anew
	clusters int64             // that are looked at: those of the store, and what refers to the one behind
	refs     *tally            // references; later the stored counts
	last     int64             // the last cluster that has either
	often    map[int64]bool    // clusters with L2 tables that an L1 table leads to all too often
	begin    map[uint64]tables // by host offset

	// Of who repairs.
	roles *roleMap
	over  *roleMap // clusters that have more references than can be counted
	old   *roleMap // before the refcount structure was left out
	anew  bool     // the refcount structure is left out of the walk
	quiet bool     // findings were reported before
	tail  int64    // cluster behind all that was made
	made  *roleMap // what was made,

	uncounted bool // and has no counts yet
	marked    bool // the image is dirty for that alone

	past, pastFrom int64 // references past the end that the store may grow for
	beyond         int64 // where other references past the end begin

	done, total int64 // tables

	run     []byte // tables that were read at once,
	runAt   int64  // from here
	block   []byte // a refcount block,
	blockNo int64  // this one; -1: none
}

func newChecker(ctx context.Context, s storage.Store, h *header, opt image.CheckOptions) *checker {
	return &checker{store: s, g: newGeometry(h), h: h, ctx: ctx, opt: opt, blockNo: -1}
}

// check verifies, or repairs, the image in a store, one that Open would refuse
// too.
func check(ctx context.Context, s storage.Store, opt image.Options, what image.CheckOptions) (image.CheckResult, error) {
	_, err := parseOptions(opt.Params)
	var h *header
	if err == nil {
		h, err = readHeader(s)
	}
	p := forChecking
	if what.Repair == image.RepairAll {
		p = forRepair
	}
	if err == nil {
		err = h.check(p)
	}
	if err == nil && what.Repair != image.RepairNothing && h.autoclear&autoclearSeal != 0 {
		err = unseal(s, h, opt)
	}
	if err != nil {
		return image.CheckResult{}, image.Wrap("open", opt.Name, err)
	}
	c := newChecker(ctx, s, h, what)
	err = c.check()
	return c.res, image.Wrap("check", opt.Name, err)
}

// unseal breaks the seal of an image before it is repaired, so that no journal
// fits afterwards.
func unseal(s storage.Store, h *header, opt image.Options) error {
	warnOfSeal(opt.Warn, &opt, "by the repair")
	if err := setAutoclear(s, ^autoclearSeal, 0); err != nil {
		return err
	}
	h.autoclear &^= autoclearSeal
	return nil
}

// Check verifies the structure of the image without changing it. It takes one
// byte of memory per cluster. An error means that the check came to no end.
//
// An image that is open for writing is committed first, and requests wait
// until the check is over. Clusters that were freed lately may then be leaks.
// An open image is not repaired.
func (im *Image) Check(ctx context.Context, opt image.CheckOptions) (image.CheckResult, error) {
	if opt.Repair != image.RepairNothing {
		return image.CheckResult{}, image.Wrap("check", im.name, errors.ErrUnsupported)
	}
	if im.writer == nil {
		v, err := im.epochs.enter()
		if err != nil {
			return image.CheckResult{}, err
		}
		defer v.leave()
	} else {
		if err := im.epochs.freeze(); err != nil {
			return image.CheckResult{}, err
		}
		defer im.epochs.thaw()
		if err := im.writer.commit.commit(); err != nil {
			return image.CheckResult{}, image.Wrap("check", im.name, err)
		}
	}
	h, err := readHeader(im.store)
	if err != nil {
		return image.CheckResult{CheckErrors: 1}, image.Wrap("check", im.name, err)
	}
	c := newChecker(ctx, im.store, h, opt)
	err = c.check()
	return c.res, image.Wrap("check", im.name, err)
}

func (c *checker) check() error {
	if err := c.load(); err != nil {
		return err
	}
	if err := c.walk(); err != nil {
		return err
	}
	if err := c.settle(); err != nil {
		return err
	}
	if err := c.checkCopied(); err != nil {
		return err
	}
	c.res.ImageEndOffset = (c.last + 1) << c.g.clusterBits
	c.progress(c.total - c.done)
	return c.clean()
}

// load reads what the header leads to, but for the tables that are walked.
func (c *checker) load() (err error) {
	h := c.h
	c.res.TotalClusters = c.g.clusters(h.diskSize())
	if c.size, err = c.store.Size(); err != nil {
		c.res.CheckErrors++
		return err
	}
	if err := h.checkTable("snapshot table", h.snapshotOffset, uint64(h.snapshotCount), snapshotFixed, snapshotFixed*maxSnapshots); err != nil {
		c.res.CheckErrors++
		c.report(false, "ERROR %v", err)
		return err
	}
	if c.snapshots, err = readSnapshots(c.store, h); err != nil {
		c.res.CheckErrors++
		c.report(false, "ERROR failed to read the snapshot table: %v", err)
		return err
	}
	if h.autoclear&autoclearBitmaps == 0 {
		return nil
	}
	if c.bitmaps, err = readBitmaps(c.store, h, nil); err == nil {
		return nil
	}
	c.res.Corruptions++
	if c.opt.Repair != image.RepairAll || !errors.Is(err, image.ErrCorrupt) {
		return err
	}
	return c.dropBitmaps(err)
}

// walk counts all references.
func (c *checker) walk() (err error) {
	g, h := c.g, c.h
	if c.size, err = c.store.Size(); err != nil {
		c.res.CheckErrors++
		return err
	}
	c.clusters = g.clusters(c.size)
	if c.clusters > maxCheckedClusters {
		c.res.CheckErrors++
		return fmt.Errorf("%d clusters: %w", c.clusters, syscall.EFBIG)
	}
	c.refs, c.often, c.begin = newTally(c.clusters+1), map[int64]bool{}, map[uint64]tables{}
	if c.opt.Repair != image.RepairNothing {
		c.roles, c.over = newRoleMap(), newRoleMap()
	}
	c.past, c.pastFrom, c.beyond = 0, math.MaxInt64, math.MaxInt64
	c.forget()
	c.total += 2*int64(h.l1Size) + min(int64(h.refTableClusters)<<(g.clusterBits-3), maxRefTableSize/8)
	for i := range c.snapshots {
		c.total += int64(c.snapshots[i].l1Size)
		if h.version >= 3 && len(c.snapshots[i].extra) < snapshotExtra {
			c.corrupt("%s snapshot table entry %d is incomplete", c.verb("ERROR"), i)
		}
	}
	c.count(0, g.clusterSize, roleOther)
	if c.l1, err = c.countL1(int64(h.l1Offset), 0, int64(h.l1Size), true); err != nil {
		return err
	}
	if err := c.countSnapshots(); err != nil {
		return err
	}
	return c.countRest()
}

// forget makes that tables are read again.
func (c *checker) forget() { c.run, c.blockNo = c.run[:0], -1 }

func (c *checker) corrupt(format string, a ...any) {
	c.res.Corruptions++
	c.report(false, format, a...)
}

func (c *checker) report(leak bool, format string, a ...any) {
	if c.opt.Report != nil && !c.quiet {
		c.opt.Report(image.Finding{Leak: leak, Text: fmt.Sprintf(format, a...)})
	}
}

func (c *checker) progress(n int64) {
	if c.done += n; c.opt.Progress != nil {
		c.opt.Progress(c.done, c.total)
	}
}

// A comparison says what is done where a stored count is not the one of the
// references.
type comparison uint8

const (
	compareOnly  comparison = iota // it is reported
	compareTake                    // and the stored count takes the place of the references
	compareRight                   // the count is put right if that is to be repaired, else as above
)

// compare compares references with stored counts.
func (c *checker) compare(how comparison) error {
	g := c.g
	c.last = 0
	var nextRef, nextBlock int64 // where there may be some again
	for k := int64(0); k < c.clusters; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		no := k >> g.refBlockBits
		end := min(c.clusters, (no+1)<<g.refBlockBits)
		block, err := c.refBlock(no)
		if block == nil && err == nil {
			if nextRef <= k {
				nextRef = c.refs.skip(k)
			}
			if nextBlock <= no {
				nextBlock = c.blockAfter(no)
			}
			k = min(c.clusters, nextRef, nextBlock<<g.refBlockBits)
		}
		dirty := false
		for ; k < end; k++ {
			if err != nil {
				c.broken = true
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
				c.last = k
			}
			if stored == refs {
				continue
			}
			if c.made.get(k) != roleNone && stored < refs {
				// The repair's own work is not what was wrong.
				c.uncounted, c.broken = true, c.broken || block == nil
				if how == compareRight {
					setRefcount(block, k&(1<<g.refBlockBits-1), g.refcountOrder, refs)
					dirty = true
				}
				continue
			}
			if how == compareRight && c.mends(stored > refs) {
				c.fixed(stored > refs)
				c.report(stored > refs, "Repairing cluster %d refcount=%d reference=%d", k, stored, refs)
				setRefcount(block, k&(1<<g.refBlockBits-1), g.refcountOrder, refs)
				dirty = true
				continue
			}
			if stored < refs {
				c.corrupt("ERROR cluster %d refcount=%d reference=%d", k, stored, refs)
				// In a block that is there any count can be put right, but
				// qemu-img -r leaks does not go on where one is missing.
				c.broken = c.broken || block == nil || stored == 0 && c.opt.Repair == image.RepairLeaks
			} else {
				c.res.Leaks++
				c.report(true, "Leaked cluster %d refcount=%d reference=%d", k, stored, refs)
			}
			if how != compareOnly && refs > 0 { // a lie may leak all there is
				c.refs.set(k, stored)
			}
		}
		if dirty {
			if err := c.store.WriteAt(block, refTableEntry(c.refTable[no]).host(), 0); err != nil {
				return fmt.Errorf("refcount block %d: %w", no, err)
			}
		}
	}
	c.progress(int64(len(c.refTable)))
	return nil
}

// blockAfter returns the number of the first refcount block after another.
func (c *checker) blockAfter(no int64) int64 {
	for no++; no < int64(len(c.refTable)) && c.refTable[no] == 0; {
		no++
	}
	if no >= int64(len(c.refTable)) {
		no = c.clusters>>c.g.refBlockBits + 1
	}
	return no
}

// refBlock returns a refcount block, nil if there is none.
func (c *checker) refBlock(no int64) ([]byte, error) {
	g := c.g
	if no >= int64(len(c.refTable)) {
		return nil, nil
	}
	host := refTableEntry(c.refTable[no]).host()
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
	n, err := c.store.ReadAt(c.block, host)
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
// counts of what is referred to are at hand.
func (c *checker) stored(cluster int64) (uint64, bool) {
	g := c.g
	no := cluster >> g.refBlockBits
	if no < int64(len(c.refTable)) {
		if host := refTableEntry(c.refTable[no]).host(); host < 0 || g.within(host) != 0 {
			return 0, false
		}
	}
	if n := c.refs.get(cluster); n > 0 {
		return n, true
	}
	block, err := c.refBlock(no)
	if err != nil {
		return 0, false
	}
	if block == nil {
		return 0, true
	}
	return refcount(block, cluster&(1<<g.refBlockBits-1), g.refcountOrder), true
}

// checkCopied looks whether the copied flags say what the counts do.
func (c *checker) checkCopied() error {
	right := c.rightsCopied()
	var wrong span
	seen := map[int64]bool{}
	for i, w := range c.l1 {
		c.progress(1)
		e := l1Entry(w)
		if e.host() == 0 {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, ok := c.stored(e.host() >> c.g.clusterBits)
		if !ok {
			continue
		}
		if (n == 1) != e.copied() && c.flag(right && c.ownWord(int64(c.h.l1Offset)+int64(i)*8) && !c.shared(e.host(), n), "L2 cluster: l1_index=%d l1_entry=%x refcount=%d", i, w, n) {
			c.l1[i] ^= flagCopied
			wrong.add(int64(i)*8, 8)
		}
		if c.revisited(seen, e.host()) {
			continue
		}
		t, err := c.table(c.l1, i)
		if err != nil {
			c.res.CheckErrors++
			c.report(false, "ERROR: I/O error in check_oflag_copied: %s", reason(err))
			return err
		}
		if err := c.checkCopiedL2(t, e.host(), right && c.ownTable(e.host())); err != nil {
			return err
		}
	}
	return c.writeL1(int64(c.h.l1Offset), c.l1, wrong)
}

func (c *checker) checkCopiedL2(t []byte, at int64, right bool) error {
	g := c.g
	var wrong span
	for i := range len(t) / 8 / int(g.entryWords) {
		e, _ := entryOf(t, i, g.entryWords)
		if kind := g.kind(e); kind != clusterData && kind != clusterZeroAlloc {
			continue
		}
		n, ok := uint64(1), true
		if !g.dataFile {
			n, ok = c.stored(e.host() >> g.clusterBits)
		}
		if !ok || (n == 1) == e.copied() {
			continue
		}
		if c.flag(right && (g.dataFile || !c.shared(e.host(), n)), "data cluster: l2_entry=%x refcount=%d", uint64(e), n) {
			off := int64(i) * 8 * int64(g.entryWords)
			binary.BigEndian.PutUint64(t[off:], uint64(e)^flagCopied)
			wrong.add(off, 8)
		}
	}
	return c.writeTable(at, t, wrong)
}

// flag reports a copied flag that is wrong, and whether it is to be put right.
func (c *checker) flag(right bool, format string, a ...any) bool {
	if right {
		c.res.CorruptionsFixed++
		c.report(false, "Repairing OFLAG_COPIED "+format, a...)
		return true
	}
	c.corrupt("ERROR OFLAG_COPIED "+format, a...)
	return false
}
