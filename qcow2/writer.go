package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// A writer is the writing half of a disk. A request changes the mapping in
// memory and is done; the committer brings what changed to the store.
//
// An overwrite of a cluster that is ours alone takes no lock. All others claim
// the entries that they change, do their I/O, and link under the lock of the
// slice. Lock order: cacheSet.mu, slice.mu, changes.tableMu, allocator.mu; all
// others are leaves. No lock is held across I/O.
type writer struct {
	*disk
	alloc   *allocator
	changes *changes
	commit  *committer
	journal *journal // nil: none
	defects *defects

	tables     *tableGuard
	rawData    bool // the external data file reads as the disk
	header     *header
	bitmaps    []bitmap
	recordings []recording  // the bitmaps that record writes
	seal       autoclear    // 0: none
	marking    sync.Mutex   // guards the marking of the image and its bitmaps
	marks      bool         // it has begun
	marked     atomic.Bool  // sealed, and bitmaps that record are marked as in use
	busyLimit  int64        // slices that may be dirty before writers wait
	freed      atomic.Int64 // clusters given up since a commit was last asked for
	buffers    sync.Pool    // of *[]byte, one cluster each
	requests   sync.Pool    // of *request
}

// newWriter makes the writing half of d.
func newWriter(d *disk, h *header, snapshots []snapshot, bitmaps []bitmap, opt *image.Options, hooks *hooks) (*writer, error) {
	defects := &hooks.defects
	g, info := d.geo, d.store.Info()
	size, err := d.store.Size()
	if err != nil {
		return nil, err
	}
	end := int64(1) << (56 - g.clusterBits) // by the format
	if info.FixedSize {
		end = size >> g.clusterBits
	}
	refs, err := openRefcounts(d.store, g, int64(h.refTableOffset), int64(h.refTableClusters), end, defects)
	if err != nil {
		return nil, err
	}
	w := &writer{disk: d, header: h, bitmaps: bitmaps, defects: defects, busyLimit: d.mapping.cache.capacity() * 7 / 8}
	tables, err := w.newTableGuard(refs, snapshots, size)
	if err != nil {
		return nil, err
	}
	w.tables, refs.tables = tables, tables
	tail, fresh := g.clusters(size), int64(math.MaxInt64)
	if info.FixedSize {
		tail = 0 // what the device holds beyond the image is of no account
	}
	if tail, err = refs.lastUsed(max(tail, tables.end())); err != nil {
		return nil, err
	}
	tail = min(tail, end) // whatever is counted behind what the store can hold
	if info.NewReadsZero && !info.FixedSize {
		fresh = tail
	}
	refs.scanEnd = tail
	w.alloc = newAllocator(tail, refs.covered(tail), fresh)
	w.changes = newChanges(d.mapping, w.alloc, tables, defects)
	w.commit = &committer{
		tables: tables,
		store:  d.store, g: g, changes: w.changes, alloc: w.alloc, refs: refs, epochs: d.epochs, defects: defects,
		unmap: opt.Unmap && info.Discard,
		next:  newTicket(), wake: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if !g.dataFile && !info.FixedSize {
		// Where the store cannot grow, clusters that wait might be missed.
		d.loans = &loans{recall: graceBytes >> g.clusterBits}
		w.commit.loans = d.loans
	}
	w.changes.crowded = func() { w.commit.ask() }
	w.changes.crowd = d.mapping.cache.capacity() / 2
	if g.dataFile {
		w.commit.data = d.data
		w.rawData = h.autoclear&autoclearDataFileRaw != 0
	}
	if err := w.loadRecordings(recordingRoom(opt), opt.Warn); err != nil {
		return nil, err
	}
	var journal *journal
	var records []record
	if opt.Journal != nil {
		now := owner{h.identity(), h.autoclear & autoclearSeal, info.ID}
		if journal, records, err = openJournal(opt.Journal, growJournal(opt), now); err != nil {
			return nil, fmt.Errorf("%w: %w", image.ErrJournal, err)
		}
		journal.stored = hooks.stored
	}
	seal := h.autoclear & autoclearSeal
	found := seal != 0 && journal != nil && journal.seals(seal)
	if seal != 0 && !found {
		warnOfSeal(opt.Notice, opt, "with the first change")
	}
	refs.commit = w.commit.once
	if err := w.clearFeatures(); err != nil {
		return nil, err
	}
	if len(records) > 0 {
		if err := w.replay(records); err != nil {
			return nil, fmt.Errorf("%w: %w", image.ErrJournal, err)
		}
	}
	if journal != nil {
		w.seal = newSeal(h)
		journal.start(owner{h.identity(), w.seal, info.ID})
		w.journal, w.changes.journal, w.commit.journal = journal, journal, journal
	}
	if found && setAutoclear(d.store, ^autoclearSeal, 0) == nil {
		// What it was for is done. Where that cannot be written it does no harm, and
		// who changes something is told.
		h.autoclear &^= autoclearSeal
	}
	d.info.ReadOnly, d.info.Discard, d.info.FastZero = false, true, g.version >= 3
	w.commit.start()
	return w, nil
}

// growJournal returns what makes more room in the journal, nil if it has all.
// Without, the image is served all the same.
func growJournal(opt *image.Options) func() error {
	if opt.GrowJournal == nil {
		return nil
	}
	return func() error {
		err := opt.GrowJournal()
		if err != nil && opt.Warn != nil {
			opt.Warn(fmt.Sprintf("the journal of %s cannot grow (%v): writes to new clusters wait for the medium more often", opt.Name, err))
		}
		return err
	}
}

// clearFeatures turns off the autoclear bits that we do not know, as whoever
// opens an image for writing has to, durably. A seal whose journal is not found
// stays until the first change: that may be somewhere else.
func (w *writer) clearFeatures() error {
	known := autoclearBitmaps | autoclearSeal
	if w.geo.dataFile {
		known |= autoclearDataFileRaw
	}
	if w.header.autoclear&^known == 0 {
		return nil
	}
	if err := setAutoclear(w.store, known, 0); err != nil {
		return err
	}
	return w.store.Sync()
}

// newSeal returns a seal that no other process has.
func newSeal(h *header) autoclear {
	if h.version < 3 {
		return 0
	}
	return 1<<63 | autoclear(rand.Uint32())<<32
}

// firstChange is called before anything is changed. It returns when the image
// is sealed and bitmaps that record writes are marked as in use.
func (w *writer) firstChange() error {
	if w.marked.Load() {
		return nil
	}
	w.marking.Lock()
	defer w.marking.Unlock()
	if w.marked.Load() {
		return nil
	}
	w.marks = true
	// A seal is to outlive the process, as the journal does, and not the
	// machine: it needs no sync.
	if w.seal != w.header.autoclear&autoclearSeal {
		if err := setAutoclear(w.store, ^autoclearSeal, w.seal); err != nil {
			return err
		}
	}
	if err := w.markRecordings(); err != nil {
		return err
	}
	w.marked.Store(true)
	return nil
}

// setAutoclear keeps some autoclear bits as they are, and sets the others.
func setAutoclear(s storage.Store, keep, others autoclear) error {
	var b [8]byte
	if _, err := s.ReadAt(b[:], 88); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	v := autoclear(binary.BigEndian.Uint64(b[:]))&keep | others
	binary.BigEndian.PutUint64(b[:], uint64(v))
	if err := s.WriteAt(b[:], 88, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	return nil
}

// change carries out a request that changes [off, off+n).
func (im *Image) change(op string, off, n int64, flags image.WriteFlags, do func(*request) error) error {
	if im.writer == nil {
		return image.ErrReadOnly
	}
	if err := image.CheckRange(im.info.Size, off, n); err != nil {
		return err
	}
	r, _ := im.writer.requests.Get().(*request)
	if r == nil {
		r = &request{writer: im.writer}
	}
	if err := r.enter(); err != nil {
		return err
	}
	defer r.end()
	err := r.commit.refuses()
	if err == nil {
		err = r.firstChange()
	}
	if err == nil {
		r.record(off, n)
		err = do(r)
	}
	if err == nil && flags&image.FUA != 0 {
		err = r.commit.commit()
	}
	if err == nil || err == errors.ErrUnsupported || errors.Is(err, fs.ErrClosed) {
		return err
	}
	return image.Wrap(op, im.name, fmt.Errorf("%d bytes at %d: %w", n, off, err))
}

// Flush makes durable all that was done before.
func (im *Image) Flush() error {
	v, err := im.epochs.enter()
	if err != nil {
		return err
	}
	defer v.leave()
	if im.writer == nil {
		return nil
	}
	return image.Wrap("flush", im.name, im.writer.commit.commit())
}

// Close makes everything durable, stores the bitmaps that recorded writes and
// closes what the image has opened.
func (im *Image) Close() error {
	if im.writer == nil {
		return im.disk.Close()
	}
	if err := im.epochs.close(); err != nil {
		return err
	}
	im.loans.end()
	err := im.writer.close()
	im.mapping.close()
	return image.Wrap("close", im.name, errors.Join(err, im.files.release()))
}

// An obstacle is what a request has to wait for, outside of its epoch.
type obstacle struct {
	kind  obstacleKind
	claim <-chan struct{}
}

type obstacleKind uint8

const (
	noObstacle   obstacleKind = iota
	changed                   // look again
	claimed                   // somebody else's claim
	needClusters              // a commit makes more of them
	needCommit                // a commit makes room in the cache or the journal
)

// A request changes something. It is inside an epoch, but for the time it
// waits.
type request struct {
	*writer
	visit visit
	dry   int   // commits that made no clusters
	steps int64 // of the allocator, at the last of them
}

func (r *request) end() {
	r.leave()
	r.dry = 0
	r.requests.Put(r)
}

func (r *request) leave() {
	if r.visit.inside != nil {
		r.visit.leave()
		r.visit = visit{}
	}
}

func (r *request) enter() (err error) {
	r.visit, err = r.epochs.enter()
	return err
}

// maxDry is how many commits a request waits for clusters before there are
// none. They do not count while others get some, or while it is looked for
// free ones; those freed before the first are there after the second, or the
// third if requests are slow.
const maxDry = 4

// overcome waits until an obstacle is gone.
func (r *request) overcome(o obstacle) error {
	switch o.kind {
	case noObstacle:
		r.dry = 0
		return nil
	case changed:
		return nil
	}
	r.leave()
	switch o.kind {
	case claimed:
		<-o.claim
	case needClusters:
		if now := r.alloc.progress(); now != r.steps {
			r.steps, r.dry = now, 0
		}
		t := r.commit.ask()
		if r.dry++; r.dry == 1 {
			<-t.cut
			break
		}
		if <-t.done; t.err != nil {
			return t.err
		}
		if r.dry > maxDry {
			return syscall.ENOSPC
		}
	case needCommit:
		if err := r.commit.commit(); err != nil {
			return err
		}
	}
	return r.enter()
}

// each calls step until it has dealt with [off, off+n). A call returns how
// many bytes it did, or an obstacle.
func (r *request) each(off, n int64, step func(off, n int64) (int64, obstacle, error)) error {
	for n > 0 {
		did, o, err := step(off, n)
		if err == nil {
			err = r.overcome(o)
		}
		if err != nil {
			return err
		}
		off, n = off+did, n-did
	}
	return nil
}

// atOnce returns how many entries one step may change: those of a slice, unless
// the journal has room for fewer.
func (w *writer) atOnce() int {
	n := 1 << w.geo.sliceBits
	if w.journal != nil {
		n = min(n, int(w.journal.slots.Load()/uint64(w.geo.entryWords)))
	}
	return n
}

// reserve sees to it that n changes can be recorded.
func (w *writer) reserve(n int) bool {
	return w.journal == nil || w.journal.reserve(n*int(w.geo.entryWords))
}

func (w *writer) unreserve(n int) {
	if w.journal != nil {
		w.journal.unreserve(n * int(w.geo.entryWords))
	}
}

// close makes everything durable and ends the committer. Requests are over.
func (w *writer) close() error {
	err := w.commit.commit()
	if err == nil {
		// Nothing is dirty: what has no L1 entry now never came to be needed.
		w.changes.giveUnusedTables()
		err = w.commit.commit() // the counts of what was freed
	}
	w.commit.stop()
	if err != nil {
		if w.journal != nil && w.commit.failure() != nil {
			w.journal.void() // who closes is told, and whoever opens the image next begins anew
		}
		return err
	}
	if w.marks {
		err = w.storeRecordings()
	}
	err = errors.Join(err, w.commit.lowerLate())
	if w.journal != nil {
		w.journal.void() // with or without bitmaps
		if w.marks && w.seal != 0 {
			err = errors.Join(err, setAutoclear(w.store, ^autoclearSeal, 0))
		}
	}
	return err
}
