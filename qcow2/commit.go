package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

// The committer is the only place that orders writes. It is one goroutine,
// and works in batches of two stages:
//
//	stage A   refcounts, new refcount blocks, new L2 tables: all that nothing
//	          in the store points to yet
//	sync      they, and the data written before the cut, are durable
//	stage B   refcount table entries, L2 entries, L1 entries, the header: the
//	          pointers to them
//	sync      the batch is durable
//
// The sync after stage B of one batch serves stage A of the next. A batch
// holds the entries as they were when it was cut, not as they are when they
// are written (R4).
//
// Committing is asked for with a ticket, one for all who ask before the next
// cut. Nobody holds a lock while waiting for one.
type committer struct {
	store   storage.Store
	data    storage.Store // an external data file, which is synced too; or nil
	g       *geometry
	changes *changes
	alloc   *allocator
	refs    *refcounts
	tables  *tableGuard
	epochs  *epochs
	loans   *loans   // nil: none
	journal *journal // nil: none
	defects *defects

	// Of the committer's goroutine.
	counts []countChange // taken from the allocator, not carried out
	kept   []reference   // dropped by entries that are still to be made durable
	grace  []graceItem   // dropped durably, perhaps still known to requests and replies
	late   []reference   // known to nobody any more, and of a count that could not be read
	unmap  bool          // give the host back the space that requests gave up

	condemned atomic.Bool // the image was found to be corrupt

	mu     sync.Mutex
	next   *ticket // of the next batch
	asked  bool    // somebody holds next
	ending bool
	failed error         // after a failed sync, for good
	wake   chan struct{} // one slot
	done   chan struct{} // closed when the goroutine has ended
}

// A ticket is a request for a commit.
type ticket struct {
	cut  chan struct{} // closed when the batch holds what was changed before the request
	done chan struct{} // closed when that is durable, or err says why not
	err  error
}

func newTicket() *ticket {
	return &ticket{cut: make(chan struct{}), done: make(chan struct{})}
}

// A batch is one commit.
type batch struct {
	ticket     *ticket
	slices     []sliceCut
	tables     []*newTable
	counts     countBatch
	dropped    []reference
	journalEnd uint64
	err        error // of making room for what comes after it
}

// pointers reports whether the batch has a stage B.
func (b *batch) pointers() bool { return len(b.slices) > 0 || !b.counts.empty() }

// A graceItem is a run that nothing refers to any more but requests that
// entered up to an epoch, and replies that were sent from it.
type graceItem struct {
	reference
	epoch uint64
}

// once commits everything, for who has the committer to himself: it does not
// run yet.
func (c *committer) once() error {
	t := newTicket()
	for b := c.turn(nil, t); b != nil; {
		b = c.turn(b, nil)
	}
	return t.err
}

// start begins to commit when asked to.
func (c *committer) start() { go c.run() }

// ask requests a commit and returns without waiting. After a failed sync the
// ticket has failed already.
func (c *committer) ask() *ticket {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed != nil || c.ending {
		t := newTicket()
		t.err = c.failed
		if t.err == nil {
			t.err = errors.New("the image is being closed")
		}
		close(t.cut)
		close(t.done)
		return t
	}
	c.asked = true
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return c.next
}

// commit makes durable all that was changed before the call.
func (c *committer) commit() error {
	t := c.ask()
	<-t.done
	return t.err
}

// stop ends the goroutine after the batch in progress. What is not committed
// then stays in memory.
func (c *committer) stop() {
	c.mu.Lock()
	c.ending = true
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	<-c.done
}

// take returns the next ticket if somebody asked for it.
func (c *committer) take() (t *ticket, ending bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.asked {
		return nil, c.ending
	}
	t = c.next
	c.next, c.asked = newTicket(), false
	return t, false
}

func (c *committer) run() {
	defer close(c.done)
	var last *batch // its stage A is durable, its stage B to be written
	for {
		t, ending := c.take()
		if t == nil && last == nil {
			if ending {
				return
			}
			<-c.wake
			continue
		}
		last = c.turn(last, t)
	}
}

// turn writes stage B of one batch and stage A of the next, either of which
// may not be there, and ends them with one sync. It returns the next batch
// unless that is complete.
func (c *committer) turn(last *batch, t *ticket) *batch {
	var errB, errA error
	if last != nil {
		errB = c.stageB(last)
	}
	var next *batch
	if t != nil {
		next = c.cut(t)
		close(t.cut)
		if errA = next.err; errA == nil {
			errA = c.stageA(next)
		}
	}
	err := c.failure()
	if err == nil {
		switch {
		case c.defects.noSyncA && last == nil && next.pointers():
		case c.defects.noSyncB && next == nil:
		default:
			err = c.sync()
		}
	}
	if last != nil {
		errB = first(errB, err)
		c.settle(last, errB)
	}
	if next == nil {
		return nil
	}
	// What stage B of the last batch failed to write may be needed by this one.
	errA = first(errA, err, errB)
	if errA == nil && next.pointers() {
		return next
	}
	c.settle(next, errA)
	return nil
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// cut takes what is changed now into a new batch. Entries are taken before
// counts: what an entry points to was raised earlier.
func (c *committer) cut(t *ticket) *batch {
	b := &batch{ticket: t}
	if c.journal != nil {
		b.journalEnd = c.journal.end()
	}
	b.dropped, c.kept = c.kept, nil
	for _, s := range c.changes.takeSlices() {
		var cut sliceCut
		cut, b.dropped = c.changes.cutSlice(s, b.dropped)
		b.slices = append(b.slices, cut)
		i, _ := c.g.sliceTable(s.no)
		if nt := c.changes.takeTable(i); nt != nil {
			b.tables = append(b.tables, nt)
		}
	}
	slices.SortFunc(b.slices, func(x, y sliceCut) int { return compare(int64(x.no), int64(y.no)) })
	slices.SortFunc(b.tables, func(x, y *newTable) int { return compare(x.l1Index, y.l1Index) })
	if c.defects.lowerEarly {
		for _, r := range b.dropped {
			c.alloc.change(r.hostRun, -1)
		}
	}
	if c.defects.journalEarly && c.journal != nil {
		c.journal.discard(b.journalEnd)
	}
	// Who waits for room may go on as soon as the batch is cut.
	if b.err = c.failure(); b.err == nil {
		b.err = c.makeRoom()
	}
	return b
}

// makeRoom frees what can be freed, and sees to it that there is something to
// hand out.
func (c *committer) makeRoom() error {
	if err := c.reclaim(); err != nil {
		return err
	}
	return c.condemn(c.refs.extend(c.alloc))
}

func compare(x, y int64) int { return int(min(max(x-y, -1), 1)) }

// stageA writes what nothing in the store points to.
func (c *committer) stageA(b *batch) error {
	changes, dry, forgotten := c.alloc.takeChanges()
	c.refs.scanUpTo(forgotten)
	c.counts = append(c.counts, changes...)
	var err error
	if c.counts, err = c.refs.apply(c.counts); err != nil {
		return c.condemn(err)
	}
	if dry {
		if err := c.condemn(c.refs.scan(c.alloc)); err != nil {
			return err
		}
	}
	b.counts = c.refs.cut()
	if !c.defects.countsLate {
		if err := c.refs.writeCounts(); err != nil {
			return err
		}
	}
	if c.defects.refTableEarly {
		if err := c.refs.link(&b.counts, c.sync); err != nil {
			return err
		}
	}
	for _, t := range b.tables {
		if t.exposed {
			continue
		}
		if err := c.writeNewTable(t, b.slices); err != nil {
			return err
		}
		if c.defects.l1Early {
			if err := c.writeL1([]*newTable{t}); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeNewTable writes a table whole: the slices of the batch, and for the
// rest what the table it replaces holds.
func (c *committer) writeNewTable(t *newTable, cuts []sliceCut) error {
	buf := make([]byte, c.g.clusterSize)
	if t.old.host() != 0 {
		if err := readZeroPadded(c.store, buf, t.old.host()); err != nil {
			return fmt.Errorf("L2 table at %#x: %w", t.old.host(), err)
		}
	}
	for _, s := range cuts {
		if i, within := c.g.sliceTable(s.no); i == t.l1Index {
			copy(buf[within:], s.disk)
		}
	}
	if err := c.store.WriteAt(buf, t.host, 0); err != nil {
		return fmt.Errorf("L2 table at %#x: %w", t.host, err)
	}
	return nil
}

// stageB writes the pointers. All they point to is durable.
func (c *committer) stageB(b *batch) error {
	if c.defects.countsLate {
		if err := c.refs.writeCounts(); err != nil {
			return err
		}
	}
	if !c.defects.refTableEarly {
		if err := c.refs.link(&b.counts, c.sync); err != nil {
			return err
		}
	}
	fresh := map[int64]bool{} // tables that stage A wrote whole
	for _, t := range b.tables {
		fresh[t.l1Index] = !t.exposed
	}
	for _, s := range b.slices {
		i, within := c.g.sliceTable(s.no)
		if s.lo >= s.hi || fresh[i] {
			continue
		}
		size := int64(c.g.entryWords) * 8
		buf := s.disk[int64(s.lo)*size : int64(s.hi)*size]
		if c.defects.entriesOfNow {
			buf = make([]byte, len(buf))
			for k := range len(buf) / 8 {
				binary.BigEndian.PutUint64(buf[k*8:], s.ents[s.lo*int(c.g.entryWords)+k].Load())
			}
		}
		table := c.changes.tableHost(i)
		if err := c.store.WriteAt(buf, table+within+int64(s.lo)*size, 0); err != nil {
			return fmt.Errorf("L2 table at %#x: %w", table, err)
		}
	}
	for _, t := range b.tables {
		t.exposed = !c.defects.tablesAnew
	}
	return c.writeL1(b.tables)
}

// writeL1 writes the L1 entries of tables, neighbours at once.
func (c *committer) writeL1(tables []*newTable) error {
	for len(tables) > 0 {
		n := 1
		for n < len(tables) && tables[n].l1Index == tables[0].l1Index+int64(n) {
			n++
		}
		buf := make([]byte, 0, n*8)
		for _, t := range tables[:n] {
			buf = binary.BigEndian.AppendUint64(buf, uint64(t.host)|flagCopied)
		}
		if err := c.store.WriteAt(buf, c.changes.m.l1At+tables[0].l1Index*8, 0); err != nil {
			return fmt.Errorf("L1 table at %#x: %w", c.changes.m.l1At, err)
		}
		tables = tables[n:]
	}
	return nil
}

// settle ends a batch: it is durable, or everything in it is to be written
// again by a later one.
func (c *committer) settle(b *batch, err error) {
	ok := err == nil
	for _, t := range b.tables {
		c.changes.settleTable(t, ok)
	}
	for _, s := range b.slices {
		c.changes.settleSlice(s, ok)
	}
	old := c.refs.settle(&b.counts, ok)
	if ok {
		epoch := c.epochs.number()
		for _, r := range b.dropped {
			c.bury(graceItem{r, epoch})
		}
		for _, t := range b.tables {
			if h := t.old.host(); h != 0 {
				r := hostRun{h >> c.g.clusterBits, 1}
				c.tables.drop(r)
				c.bury(graceItem{reference{hostRun: r, shared: true}, epoch})
			}
		}
		if old.n > 0 {
			c.tables.drop(old)
			c.bury(graceItem{reference{hostRun: old}, epoch})
		}
		if c.journal != nil {
			c.journal.discard(b.journalEnd)
		}
		if c.failure() == nil {
			err = c.reclaim()
		}
	} else {
		c.kept = append(c.kept, b.dropped...)
	}
	b.ticket.err = err
	close(b.ticket.done)
}

// bury notes what may be reused when nobody knows of it any more.
func (c *committer) bury(item graceItem) {
	c.grace = append(c.grace, item)
	c.loans.wait(item.n)
}

// reclaim frees what was dropped durably and nobody can know of any more (R5,
// R6). Of a cluster with one reference the count is lowered by the next batch
// and the cluster can be reused at once: if it is, nothing has to be written.
func (c *committer) reclaim() error {
	if len(c.grace) == 0 {
		return nil
	}
	c.epochs.advance()
	now := c.epochs.number()
	for len(c.grace) > 0 {
		item := &c.grace[0]
		if item.epoch+2 > now && !c.defects.noGrace {
			return nil
		}
		if c.loans.held() {
			return nil
		}
		if item.shared {
			if err := c.lowerShared(item.hostRun, item.unwanted); err != nil {
				return err
			}
		} else if !c.defects.lowerEarly {
			if err := c.free(item.hostRun, item.unwanted); err != nil {
				return err
			}
		} else {
			c.alloc.found(item.hostRun)
		}
		c.loans.wait(-item.n)
		c.grace = c.grace[1:]
	}
	return nil
}

// lowerShared takes one reference from each cluster of r, and frees those that
// had no other. It fails only where the image is corrupt.
func (c *committer) lowerShared(r hostRun, unwanted bool) error {
	for k := r.first; k < r.end(); k++ {
		n, err := c.refs.count(k)
		switch {
		case err != nil && c.refs.postpone(k, err):
			c.late = append(c.late, reference{hostRun{k, 1}, true, unwanted})
			err = nil
		case err != nil:
		case n == 1:
			err = c.free(hostRun{k, 1}, unwanted)
		default:
			_, err = c.refs.add(k, -1)
		}
		if err != nil {
			return c.condemn(err)
		}
	}
	return nil
}

// lowerLate lowers what had to wait and commits that, for who has the committer
// to himself. What still cannot be lowered leaks.
func (c *committer) lowerLate() error {
	if len(c.refs.late) == 0 && len(c.late) == 0 {
		return nil
	}
	unread := c.condemn(c.refs.lowerLate())
	late := c.late
	c.late = nil
	for _, r := range late {
		if err := c.lowerShared(r.hostRun, r.unwanted); err != nil {
			return err
		}
	}
	if err := c.once(); err != nil {
		return err
	}
	if len(c.late) > 0 || c.refs.owes() {
		return fmt.Errorf("clusters that were given up still count as used: %w", first(unread, errUnread))
	}
	return nil
}

// free gives clusters back to the allocator, and to the host the space of those
// that requests gave up. What fell free otherwise is about to be used again.
func (c *committer) free(r hostRun, unwanted bool) error {
	if at, found := c.tables.overlaps(r); found {
		return c.condemn(corrupt("Preventing invalid write on active metadata at offset %#x", at<<c.g.clusterBits))
	}
	if c.unmap && unwanted {
		// Advice: what the host does with it is its own affair.
		_ = c.store.Discard(r.first<<c.g.clusterBits, r.n<<c.g.clusterBits)
	}
	if !c.alloc.release(r) {
		return c.condemn(corrupt("more refers to the clusters at %#x than their refcounts say", r.first<<c.g.clusterBits))
	}
	return nil
}

// sync makes durable what was written. After an error nothing is known of
// what was written since the last sync, and no later one can tell: no
// metadata is written any more, and every commit fails (R15).
func (c *committer) sync() error {
	var dataErr error
	var wg sync.WaitGroup
	if c.data != nil {
		wg.Go(func() { dataErr = c.data.Sync() })
	}
	err := c.store.Sync()
	wg.Wait()
	err = first(err, dataErr)
	if err != nil && !c.defects.forgetFailedSync {
		c.fail(err)
	}
	return err
}

// fail ends all committing.
func (c *committer) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == nil {
		c.failed = err
		if c.journal != nil {
			c.journal.fail()
		}
		if c.asked {
			c.next.err = err
			close(c.next.cut)
			close(c.next.done)
			c.next, c.asked = newTicket(), false
		}
	}
}

// failure returns why nothing can be committed any more, nil if it can.
func (c *committer) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed
}

// condemn marks the image as corrupt if that is what err says: then nothing
// may be written to it before it is repaired.
func (c *committer) condemn(err error) error {
	if !errors.Is(err, image.ErrCorrupt) {
		return err
	}
	c.fail(err)
	c.condemned.Store(true)
	if c.g.version >= 3 {
		if werr := first(setIncompatible(c.store, incompatCorrupt), c.store.Sync()); werr != nil {
			return fmt.Errorf("%w; marking it as such: %w", err, werr)
		}
	}
	return err
}

// refuses returns why nothing may be changed any more, nil if it may.
func (c *committer) refuses() error {
	if c.condemned.Load() {
		return errCondemned
	}
	return nil
}

// setIncompatible sets feature bits in the header, of version 3.
func setIncompatible(s storage.Store, bits incompatible) error {
	var b [8]byte
	if _, err := s.ReadAt(b[:], 72); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(b[:])|uint64(bits))
	if err := s.WriteAt(b[:], 72, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	return nil
}
