package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/storage"
)

const (
	countSectorSize = 512      // bytes; the unit in which counts are cached and written
	maxCountSectors = 2048     // kept while clean
	countRunSize    = 64 << 10 // bytes; the largest write of counts, and the step of a scan
	maxLookAhead    = 64 << 20 // bytes of clusters that can be handed out between two commits
	maxLastUsed     = 64 << 20 // bytes of counts that lastUsed reads: in a sparse file zeros cost nothing
)

// refcounts is the refcount table and a cache of its blocks, in units of a
// sector. It belongs to the committer: it has no lock, and its methods are
// called by one goroutine at a time.
type refcounts struct {
	store   storage.Store
	g       *geometry
	end     int64 // clusters that the store can hold
	tables  *tableGuard
	defects *defects

	tableAt int64           // host offset of the table in the store
	table   []refTableEntry // the table as it will be when what is made is linked
	made    []int64         // ranges whose table entry is not known to be durable
	blank   map[int64]bool  // of those, the ones whose block was never written
	unknown map[int64]bool  // ranges in made, or in a batch that has not ended
	commit  func() error    // commits everything, for cover
	grown   *grownTable     // a larger table that the header does not point to yet
	retry   bool            // a batch failed while there was something to link: see link

	sectors map[int64]*countSector   // by cluster / counts per sector
	dirty   []int64                  // keys of sectors
	late    map[int64]map[int64]bool // clusters to be lowered, by the key of a sector that could not be read

	scanned int64 // clusters below were looked at for free ones
	scanEnd int64
}

// A countSector is a cached sector of a refcount block.
type countSector struct {
	data  [countSectorSize]byte
	dirty bool // is in refcounts.dirty
}

// A grownTable is a refcount table that will replace the present one. Once the
// header may have been written the table is no longer changed until it is
// known to be in force (R10).
type grownTable struct {
	at      hostRun
	old     hostRun
	taken   bool // by a batch
	exposed bool
}

// openRefcounts reads the refcount table. end is how many clusters the store
// can ever hold.
func openRefcounts(store storage.Store, g *geometry, at, clusters, end int64, d *defects) (*refcounts, error) {
	r := &refcounts{store: store, g: g, end: end, defects: d, tableAt: at, sectors: map[int64]*countSector{}, blank: map[int64]bool{}, unknown: map[int64]bool{}, late: map[int64]map[int64]bool{}}
	b := make([]byte, clusters<<g.clusterBits)
	if err := readZeroPadded(store, b, at); err != nil {
		return nil, fmt.Errorf("refcount table at %#x: %w", at, err)
	}
	r.table = make([]refTableEntry, len(b)/8)
	for i := range r.table {
		e := refTableEntry(binary.BigEndian.Uint64(b[i*8:]))
		if e.reserved() != 0 || g.within(e.host()) != 0 {
			return nil, fmt.Errorf("%w: refcount table entry %d is %#x", image.ErrCorrupt, i, uint64(e))
		}
		r.table[i] = e
	}
	return r, nil
}

// readZeroPadded is ReadAt, with zeros past the end of the store.
func readZeroPadded(s storage.Store, p []byte, off int64) error {
	n, err := s.ReadAt(p, off)
	if err == io.EOF {
		clear(p[n:])
		return nil
	}
	return err
}

// perBlock returns the clusters that one refcount block covers.
func (r *refcounts) perBlock() int64  { return 1 << r.g.refBlockBits }
func (r *refcounts) perSector() int64 { return countSectorSize * 8 >> r.g.refcountOrder }

// covered returns the first cluster from c on that has no refcount block.
func (r *refcounts) covered(c int64) int64 {
	for i := c >> r.g.refBlockBits; i < int64(len(r.table)) && r.table[i] != 0; i++ {
		c = (i + 1) << r.g.refBlockBits
	}
	return min(c, r.end)
}

// lastUsed returns one more than the last cluster at or above from whose count
// is not zero; from if there is none. If it is not found soon that is the first
// cluster behind which all counts are known to be zero: what is free before it
// the scan finds.
func (r *refcounts) lastUsed(from int64) (int64, error) {
	buf := make([]byte, min(r.g.clusterSize, countRunSize))
	per := int64(len(buf)) * 8 >> r.g.refcountOrder
	room := int64(maxLastUsed)
	for i := int64(len(r.table)) - 1; i >= from>>r.g.refBlockBits; i-- {
		if r.table[i] == 0 {
			continue
		}
		for c := (i+1)<<r.g.refBlockBits - per; c >= i<<r.g.refBlockBits; c -= per {
			if room -= int64(len(buf)); room < 0 {
				return max(c+per, from), nil
			}
			if err := readZeroPadded(r.store, buf, r.position(c)); err != nil {
				return 0, fmt.Errorf("refcount block at %#x: %w", r.table[i].host(), err)
			}
			zeros := zerosBehind(buf)
			for k := per - 1 - int64(zeros)*8>>r.g.refcountOrder; k >= 0; k-- {
				if refcount(buf, k, r.g.refcountOrder) != 0 {
					return max(c+k+1, from), nil
				}
			}
		}
	}
	return from, nil
}

// zerosBehind returns how many bytes at the end of b are zero, in whole words.
func zerosBehind(b []byte) int {
	n := len(b)
	for n >= 8 && binary.NativeEndian.Uint64(b[n-8:]) == 0 {
		n -= 8
	}
	return len(b) - n
}

// position returns the host offset of the byte that holds the count of c.
func (r *refcounts) position(c int64) int64 {
	in := c & (r.perBlock() - 1)
	return r.table[c>>r.g.refBlockBits].host() + in<<r.g.refcountOrder>>3
}

// sector returns the cached sector with the count of c. What waited for it to be
// read is carried out.
func (r *refcounts) sector(c int64) (*countSector, error) {
	key := c / r.perSector()
	if s := r.sectors[key]; s != nil {
		return s, nil
	}
	blk := c >> r.g.refBlockBits
	if blk >= int64(len(r.table)) || r.table[blk] == 0 {
		return nil, fmt.Errorf("%w: host cluster %#x has no refcount", image.ErrCorrupt, c<<r.g.clusterBits)
	}
	s := new(countSector)
	if !r.blank[blk] {
		if err := readZeroPadded(r.store, s.data[:], r.position(key*r.perSector())); err != nil {
			return nil, fmt.Errorf("refcount block at %#x: %w", r.table[blk].host(), err)
		}
	}
	r.sectors[key] = s
	late := r.late[key]
	delete(r.late, key)
	for c := range late {
		if _, err := r.add(c, -1); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// raise raises the count of c from zero.
func (r *refcounts) raise(c int64) error {
	if late := r.late[c/r.perSector()]; late[c] {
		delete(late, c) // it was not lowered yet
		return nil
	}
	_, err := r.add(c, +1)
	return err
}

// lower lowers the count of c, later if it cannot be read now: until then c is
// a leak at worst, and nobody else has to suffer.
func (r *refcounts) lower(c int64) error {
	if !r.waits(c) {
		_, err := r.add(c, -1)
		if err == nil || !r.postpone(c, err) {
			return err
		}
	}
	r.late[c/r.perSector()][c] = true
	return nil
}

// waits reports whether what lowers the count of c has to wait.
func (r *refcounts) waits(c int64) bool { return r.late[c/r.perSector()] != nil }

// postpone makes what lowers counts of the sector of c wait, if err is that it
// cannot be read, and reports whether it is.
func (r *refcounts) postpone(c int64, err error) bool {
	if errors.Is(err, image.ErrCorrupt) {
		return false
	}
	if !r.waits(c) {
		r.late[c/r.perSector()] = map[int64]bool{}
	}
	return true
}

var errUnread = errors.New("refcounts that could not be read")

// lowerLate tries once more to lower what waits. It returns why some of it
// cannot be lowered now either.
func (r *refcounts) lowerLate() (err error) {
	for key := range r.late {
		_, unread := r.sector(key * r.perSector())
		err = first(err, unread)
	}
	return err
}

// owes reports whether something still waits to be lowered. What was used again
// does not.
func (r *refcounts) owes() bool {
	for _, clusters := range r.late {
		if len(clusters) > 0 {
			return true
		}
	}
	return false
}

// count returns the refcount of host cluster c. It does not try again to read
// what could not be read.
func (r *refcounts) count(c int64) (uint64, error) {
	if r.waits(c) {
		return 0, errUnread
	}
	s, err := r.sector(c)
	if err != nil {
		return 0, err
	}
	return refcount(s.data[:], c%r.perSector(), r.g.refcountOrder), nil
}

// add changes the count of c by one, up from zero or down.
func (r *refcounts) add(c, delta int64) (uint64, error) {
	s, err := r.sector(c)
	if err != nil {
		return 0, err
	}
	i := c % r.perSector()
	n := refcount(s.data[:], i, r.g.refcountOrder)
	if delta > 0 && n != 0 || delta < 0 && n == 0 {
		return n, fmt.Errorf("%w: host cluster %#x has refcount %d, which cannot be", image.ErrCorrupt, c<<r.g.clusterBits, n)
	}
	n += uint64(delta)
	setRefcount(s.data[:], i, r.g.refcountOrder, n)
	r.soil(c, s)
	return n, nil
}

// soil notes that the sector with the count of c has changed.
func (r *refcounts) soil(c int64, s *countSector) {
	if !s.dirty {
		s.dirty = true
		r.dirty = append(r.dirty, c/r.perSector())
	}
}

// apply carries out changes in order. On an error it returns what is left.
func (r *refcounts) apply(changes []countChange) ([]countChange, error) {
	for len(changes) > 0 {
		ch, do := &changes[0], r.raise
		if ch.delta < 0 {
			do = r.lower
		}
		for ch.n > 0 {
			if err := do(ch.first); err != nil {
				return changes, err
			}
			ch.first++
			ch.n--
		}
		changes = changes[1:]
	}
	return nil, nil
}

// lookAhead returns how many clusters should be ready to be handed out.
func (r *refcounts) lookAhead(tail int64) int64 {
	return max(r.perBlock()/2, min(maxLookAhead>>r.g.clusterBits, tail/8))
}

// extend makes refcount blocks, and a larger table if need be, ahead of the
// allocator's tail, and moves limit over what they cover. They lie at the tail
// themselves, and count themselves where nothing covers it yet. Their counts
// are raised as those of all clusters are: to read one can fail, and nothing
// may be half made then.
//
// What they cover can be handed out from now on: a link to it is in the next
// batch at the earliest, which writes entries only after the sync that makes
// this batch's table entries durable (R11).
func (r *refcounts) extend(a *allocator) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.grown != nil && r.grown.exposed {
		return nil
	}
	for a.limit < r.end && a.limit-a.tail < max(r.lookAhead(a.tail), a.wanted) {
		if i := a.limit >> r.g.refBlockBits; i >= int64(len(r.table)) {
			if grew, err := r.growTable(a); !grew || err != nil {
				return err
			}
		} else if made, err := r.makeBlock(a, i); !made || err != nil {
			return err
		}
		a.steps++
	}
	return nil
}

// pending reports whether there is something to link.
func (r *refcounts) pending() bool { return len(r.made) > 0 || r.grown != nil }

// makeBlock makes the refcount block of range i, at the tail. It returns false
// if the block would be counted by another one that may not be linked yet:
// its own link could then outlive the other's.
func (r *refcounts) makeBlock(a *allocator, i int64) (bool, error) {
	if by := a.tail >> r.g.refBlockBits; by != i && r.unknown[by] {
		return false, nil
	}
	return true, r.placeBlock(a, i, a.tail)
}

// placeBlock makes the refcount block of range i in a free cluster that is not
// behind the tail.
func (r *refcounts) placeBlock(a *allocator, i, host int64) error {
	if r.table[i] != 0 {
		a.limit = r.covered(a.limit)
		return nil
	}
	a.tail = max(a.tail, host+1)
	if err := r.tables.add(r.g, hostRun{host, 1}); err != nil {
		return err
	}
	r.table[i] = refTableEntry(host << r.g.clusterBits)
	r.made = append(r.made, i)
	r.blank[i] = true
	r.unknown[i] = true
	a.limit = max(a.limit, r.covered(a.limit))
	a.change(hostRun{host, 1}, +1)
	return nil
}

// growTable doubles the table, in memory, or makes it as large as the tail
// needs, where much lies behind what was counted so far. It returns false where
// the format or the store has no room for more. The caller holds a.mu.
func (r *refcounts) growTable(a *allocator) (bool, error) {
	have := int64(len(r.table)) * 8
	n := r.g.clusters(max(have*2, (a.tail>>r.g.refBlockBits+2)*8))
	blocks := n/(r.perBlock()-1) + 2                                    // that count the table and themselves
	n = max(n, r.g.clusters(((a.tail+n+blocks)>>r.g.refBlockBits+2)*8)) // and fit into it
	if n<<r.g.clusterBits > maxRefTableSize || r.grown != nil || r.end-a.tail < n+blocks {
		return false, nil
	}
	r.grown = &grownTable{old: hostRun{r.tableAt >> r.g.clusterBits, r.g.clusters(have)}}
	r.table = append(r.table, make([]refTableEntry, n<<r.g.clusterBits/8-int64(len(r.table)))...)
	for a.limit-a.tail < n {
		// All these are linked at once, by the header.
		if err := r.placeBlock(a, a.limit>>r.g.refBlockBits, a.tail); err != nil {
			return false, err
		}
	}
	r.grown.at = hostRun{a.tail, n}
	a.tail += n
	a.change(r.grown.at, +1)
	return true, r.tables.add(r.g, r.grown.at)
}

// writeCounts hands to the store, as part of stage A: the counts that changed,
// blocks that are new, and a table that is new.
func (r *refcounts) writeCounts() error {
	for i := range r.blank {
		if err := r.writeBlock(i); err != nil {
			return err
		}
	}
	slices.Sort(r.dirty)
	for len(r.dirty) > 0 {
		n := r.adjacent()
		buf := make([]byte, 0, n*countSectorSize)
		for _, key := range r.dirty[:n] {
			buf = append(buf, r.sectors[key].data[:]...)
		}
		at := r.position(r.dirty[0] * r.perSector())
		if err := r.store.WriteAt(buf, at, 0); err != nil {
			return fmt.Errorf("refcounts at %#x: %w", at, err)
		}
		for _, key := range r.dirty[:n] {
			r.sectors[key].dirty = false
		}
		r.dirty = r.dirty[n:]
	}
	if len(r.sectors) > maxCountSectors {
		for key, s := range r.sectors {
			if !s.dirty && len(r.sectors) > maxCountSectors/2 {
				delete(r.sectors, key)
			}
		}
	}
	if r.grown != nil && !r.grown.exposed {
		at := r.grown.at.first << r.g.clusterBits
		if err := r.store.WriteAt(r.encodeTable(r.grown.at.n), at, 0); err != nil {
			return fmt.Errorf("refcount table at %#x: %w", at, err)
		}
	}
	return nil
}

// adjacent returns how many sectors at the head of dirty one write can take.
func (r *refcounts) adjacent() int {
	perBlock := r.perBlock() / r.perSector()
	n := 1
	for n < len(r.dirty) && n < countRunSize/countSectorSize &&
		r.dirty[n] == r.dirty[0]+int64(n) && r.dirty[n]/perBlock == r.dirty[0]/perBlock {
		n++
	}
	return n
}

func (r *refcounts) writeBlock(i int64) error {
	buf := make([]byte, r.g.clusterSize)
	perBlock := r.perBlock() / r.perSector()
	for k := range perBlock {
		if s := r.sectors[i*perBlock+k]; s != nil {
			copy(buf[k*countSectorSize:], s.data[:])
		}
	}
	at := r.table[i].host()
	if err := r.store.WriteAt(buf, at, 0); err != nil {
		return fmt.Errorf("refcount block at %#x: %w", at, err)
	}
	delete(r.blank, i)
	return nil
}

func (r *refcounts) encodeTable(clusters int64) []byte {
	b := make([]byte, clusters<<r.g.clusterBits)
	for i, e := range r.table {
		binary.BigEndian.PutUint64(b[i*8:], uint64(e))
	}
	return b
}

// A countBatch is what one batch has to link: refcount blocks and a table.
type countBatch struct {
	made  []int64
	grown *grownTable
}

func (b *countBatch) empty() bool { return len(b.made) == 0 && b.grown == nil }

// cut takes what is not linked and in no other batch.
func (r *refcounts) cut() countBatch {
	b := countBatch{made: r.made}
	r.made = nil
	if r.grown != nil && !r.grown.taken {
		r.grown.taken = true
		b.grown = r.grown
	}
	return b
}

// link writes, as part of stage B, the pointers to blocks and table. Clusters
// that they cover may be linked in this very batch if the one that was to link
// them failed; then it syncs before it returns (R11).
func (r *refcounts) link(b *countBatch, sync func() error) error {
	capacity := int64(len(r.table))
	if b.grown != nil {
		capacity = b.grown.old.n << r.g.clusterBits / 8
	}
	for _, i := range b.made {
		if i >= capacity {
			continue // linked by way of the new table
		}
		var w [8]byte
		binary.BigEndian.PutUint64(w[:], uint64(r.table[i]))
		if err := r.store.WriteAt(w[:], r.tableAt+i*8, 0); err != nil {
			return fmt.Errorf("refcount table at %#x: %w", r.tableAt, err)
		}
	}
	if b.grown != nil {
		b.grown.exposed = true
		if err := writeRefTablePosition(r.store, b.grown.at.first<<r.g.clusterBits, b.grown.at.n); err != nil {
			return err
		}
	}
	if r.retry && !b.empty() && !r.defects.noRetrySync {
		if err := sync(); err != nil {
			return err
		}
		r.retry = false
	}
	return nil
}

// settle ends a batch: what it linked is durable, or has to be linked again.
// It returns the clusters of a table that is no longer used.
func (r *refcounts) settle(b *countBatch, ok bool) (old hostRun) {
	if ok {
		if b.grown != nil {
			r.tableAt = b.grown.at.first << r.g.clusterBits
			r.grown = nil
			old = b.grown.old
		}
		for _, i := range b.made {
			delete(r.unknown, i)
		}
		return old
	}
	r.made = append(b.made, r.made...)
	if b.grown != nil {
		b.grown.taken = false
	}
	r.retry = r.retry || r.pending() // also if it failed before it took what is made
	return hostRun{}
}

// scanUpTo makes scan begin again, and look at all below end, if that is not 0.
func (r *refcounts) scanUpTo(end int64) {
	if end > 0 {
		r.scanned, r.scanEnd = 0, end
	}
}

// scan looks for free clusters in the next part of the range that was there
// when the image was opened, or that has clusters the allocator forgot. It may
// only be called while no free cluster is known to the allocator and all
// changes of counts have been applied: then a count of zero below the tail
// means free, and stays so until found.
func (r *refcounts) scan(a *allocator) error {
	for r.scanned < r.scanEnd {
		blk := r.scanned >> r.g.refBlockBits
		if blk >= int64(len(r.table)) {
			r.scanned = r.scanEnd
			return nil
		}
		if r.table[blk] == 0 || r.blank[blk] {
			r.scanned = (blk + 1) << r.g.refBlockBits
			continue
		}
		break
	}
	if r.scanned >= r.scanEnd {
		return nil
	}
	buf := make([]byte, min(r.g.clusterSize, countRunSize))
	per := int64(len(buf)) * 8 >> r.g.refcountOrder
	from := r.scanned &^ (per - 1)
	if err := readZeroPadded(r.store, buf, r.position(from)); err != nil {
		// What is free there stays unknown: whoever got it could not count it.
		r.scanned = min(from+per, r.scanEnd)
		a.looked()
		return nil
	}
	for k := range int64(len(buf)) / countSectorSize {
		if s := r.sectors[from/r.perSector()+k]; s != nil {
			copy(buf[k*countSectorSize:], s.data[:])
		}
	}
	end := min(from+per, r.scanEnd)
	for c := r.scanned; c < end; {
		n := int64(0)
		for c+n < end && refcount(buf, c+n-from, r.g.refcountOrder) == 0 {
			n++
		}
		if n > 0 {
			if at, found := r.tables.overlaps(hostRun{c, n}); found {
				return corrupt("the refcount of the table at %#x is 0", at<<r.g.clusterBits)
			}
			a.found(hostRun{c, n})
		}
		c += n + 1
	}
	r.scanned = end
	a.looked()
	return nil
}

// writeRefTablePosition makes the header point to a refcount table. The
// fields are neighbours within the first sector.
func writeRefTablePosition(s storage.Store, at, clusters int64) error {
	var b [12]byte
	binary.BigEndian.PutUint64(b[:], uint64(at))
	binary.BigEndian.PutUint32(b[8:], uint32(clusters))
	if err := s.WriteAt(b[:], 48, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	return nil
}
