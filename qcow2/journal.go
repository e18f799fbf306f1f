package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/imgnbd/imgnbd/image"
)

// A journal is what acknowledged requests need to outlive the process: a ring
// of records in memory that does. Each says that an L2 entry changed. Tables
// and counts are not in it; who replays it makes them again.
//
// The memory begins with a header of one page, of which slots, base and failed
// change while it is in use:
//
//	 0  magic     8 bytes, written last
//	 8  slots     records that the ring has room for; grows once at most
//	16  base      number of the first record that is needed
//	24  failed    not zero after a failed sync
//	32  identity  CRC-32C of what must not have changed in the image's header
//	40  name      length, then the identity of the store, at most 512 bytes
//	560 seal      what the header of the image has until somebody else writes
//
// A slot is 32 bytes: a commit word, the guest cluster, the new L2 entry and
// the old one. The commit word is the record's number in the upper half and a
// CRC-32C of the other 24 bytes in the lower, and is stored last, atomically:
// a slot with another number or CRC is none, but not the end. All numbers are
// in the machine's byte order, as they never leave it.
type journal struct {
	memory []byte // of which slots tells how much may be touched
	base   *atomic.Uint64
	next   atomic.Uint64 // number of the next record
	held   atomic.Uint64 // slots promised to requests
	slots  atomic.Uint64 // records that the ring has room for

	// Until it has grown the ring is filled once only: so every record is where
	// it would be in the larger one.
	growing sync.Mutex
	young   atomic.Bool  // it may grow
	more    func() error // makes the rest of the memory usable

	stored func(off int, b []byte) // told what is stored in memory, in tests
}

const (
	journalMagic  = 0x326a646e62676d69 // "imgnbdj2"
	journalHeader = 4096
	recordSize    = 32
	minJournal    = journalHeader + 64*recordSize
)

// A record says that an L2 entry changed. The bitmaps of an extended entry are
// in a second slot, which is written first.
type record struct {
	cluster  uint64 // guest
	now, old entry
	extended bool
}

// An entry is an L2 entry with the bitmap that an extended one has.
type entry struct {
	word   l2Entry
	bitmap l2Bitmap
}

// Flags in the word that holds the cluster.
const (
	recordExtended = 1 << 63 // the next slot has the bitmaps
	recordBitmaps  = 1 << 62 // this is that slot
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// An owner is what a journal says of its image.
type owner struct {
	identity uint32    // of the header
	seal     autoclear // 0: version 2, which has none
	name     string    // of the store
}

// openJournal looks at memory that a process may have left, and returns the
// records that are needed. now is what the image is. With more, the memory may
// grow up to its capacity.
func openJournal(memory []byte, more func() error, now owner) (j *journal, records []record, err error) {
	if len(memory) < minJournal || uintptr(unsafe.Pointer(&memory[0]))%8 != 0 {
		return nil, nil, errors.New("the memory for the journal is too small or not aligned")
	}
	slots := slotsIn(len(memory))
	if more != nil {
		memory = memory[:cap(memory)]
	}
	j = &journal{memory: memory, more: more}
	j.base = j.word(16)
	j.slots.Store(slots)
	native := binary.NativeEndian
	switch j.word(0).Load() {
	case journalMagic:
	case 0:
		return j, nil, nil
	default:
		return nil, nil, errors.New("the journal is of another version of this program")
	}
	if slots = native.Uint64(memory[8:]); slots == 0 || slots > slotsIn(len(memory)) {
		return nil, nil, errors.New("the journal is of another size")
	}
	j.slots.Store(slots)
	failed := native.Uint64(memory[24:]) != 0
	base := j.base.Load()
	for n := base; n < base+slots; n++ {
		cluster, now, old, ok := j.load(n)
		if !ok {
			continue
		}
		j.next.Store(n + 1)
		if cluster&recordBitmaps != 0 {
			continue
		}
		r := record{cluster: cluster &^ recordExtended, now: entry{word: l2Entry(now)}, old: entry{word: l2Entry(old)}}
		if cluster&recordExtended != 0 {
			bitmaps, now, old, ok := j.load(n + 1)
			if !ok || bitmaps != r.cluster|recordBitmaps {
				continue
			}
			r.now.bitmap, r.old.bitmap, r.extended = l2Bitmap(now), l2Bitmap(old), true
		}
		records = append(records, r)
	}
	if len(records) == 0 && !failed {
		return j, nil, nil
	}
	nameLen := min(native.Uint64(memory[40:]), 512)
	if native.Uint32(memory[32:]) != now.identity || string(memory[48:][:nameLen]) != now.name[:min(len(now.name), 512)] {
		return nil, nil, &image.Hint{
			Err:    errors.New("the journal is of another image, or the image was changed since"),
			Advice: "the process that kept this journal died with writes in it that no image has yet",
		}
	}
	if failed {
		return nil, nil, &image.Hint{
			Err:    errors.New("a sync of the image failed before the process that wrote to it died"),
			Advice: "what was written since is lost; without the journal the image is as it was last made durable, or later",
		}
	}
	if autoclear(j.word(560).Load()) != now.seal {
		return nil, nil, &image.Hint{
			Err:    errors.New("the image was changed since, or at least opened for writing by another program"),
			Advice: "the process that kept this journal died with writes in it that no image has yet; they cannot be told from what the other program wrote",
		}
	}
	return j, records, nil
}

// seals reports whether the seal of an image is that of the process that used the
// memory last, be there records or not.
func (j *journal) seals(seal autoclear) bool {
	return j.word(0).Load() == journalMagic && autoclear(j.word(560).Load()) == seal
}

// warnOfSeal says that an image has the seal of a journal that is not at hand.
// Whether there is one somewhere nobody can tell: a power cut leaves a seal too.
func warnOfSeal(warn func(string), opt *image.Options, givenUp string) {
	if warn != nil {
		warn(fmt.Sprintf("%s was not closed, and no journal of it is found: if only the process that wrote to it died, writes that it acknowledged may be in a journal in another directory, and are given up %s", opt.Name, givenUp))
	}
}

// start makes the journal empty, and of this image.
func (j *journal) start(o owner) {
	name := o.name[:min(len(o.name), 512)]
	j.next.Store(max(j.next.Load(), j.base.Load(), 1))
	j.young.Store(j.more != nil && j.slots.Load() < slotsIn(len(j.memory)) && j.next.Load() <= j.slots.Load())
	j.store(0, 0) // invalid while it changes
	binary.NativeEndian.PutUint64(j.memory[8:], j.slots.Load())
	binary.NativeEndian.PutUint64(j.memory[32:], uint64(o.identity))
	binary.NativeEndian.PutUint64(j.memory[40:], uint64(len(name)))
	copy(j.memory[48:], name)
	binary.NativeEndian.PutUint64(j.memory[560:], uint64(o.seal))
	j.trace(8, 568-8)
	j.store(24, 0)
	j.discard(j.end())
	j.store(0, journalMagic)
}

// void makes the journal one that says nothing, of no image.
func (j *journal) void() { j.store(0, 0) }

// fail notes that a sync failed, for a successor.
func (j *journal) fail() { j.store(24, 1) }

func (j *journal) word(off int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&j.memory[off]))
}

func (j *journal) store(off int, v uint64) {
	j.word(off).Store(v)
	j.trace(off, 8)
}

func (j *journal) trace(off, n int) {
	if j.stored != nil {
		j.stored(off, j.memory[off:off+n])
	}
}

// slotsIn returns how many records so many bytes have room for.
func slotsIn(memory int) uint64 { return uint64(memory-journalHeader) / recordSize }

// reserve promises n slots, or returns false if there is no room for them
// before the next commit. Each reserve is followed by an unreserve.
func (j *journal) reserve(n int) bool {
	if j.promise(uint64(n)) {
		return true
	}
	if !j.young.Load() {
		return false
	}
	j.grow()
	return j.promise(uint64(n))
}

func (j *journal) promise(n uint64) bool {
	held := j.held.Add(n)
	first := uint64(0)
	if !j.young.Load() {
		first = j.base.Load()
	}
	if j.next.Load()-first+held <= j.slots.Load() {
		return true
	}
	j.held.Add(-n)
	return false
}

// grow makes the ring as large as the memory allows. If there is no more of it,
// the ring stays as it is, and is filled again and again.
func (j *journal) grow() {
	j.growing.Lock()
	defer j.growing.Unlock()
	if !j.young.Load() {
		return
	}
	if j.more() == nil {
		most := slotsIn(len(j.memory))
		j.store(8, most)
		j.slots.Store(most)
	}
	j.young.Store(false)
}

func (j *journal) unreserve(n int) { j.held.Add(-uint64(n)) }

// append adds a record, for which room was reserved. Records of one cluster
// are in order because the slice is locked.
func (j *journal) append(r record) {
	if !r.extended {
		j.put(j.next.Add(1)-1, r.cluster, uint64(r.now.word), uint64(r.old.word))
		return
	}
	n := j.next.Add(2) - 2
	j.put(n+1, r.cluster|recordBitmaps, uint64(r.now.bitmap), uint64(r.old.bitmap))
	j.put(n, r.cluster|recordExtended, uint64(r.now.word), uint64(r.old.word))
}

// put fills slot n and then makes it valid.
func (j *journal) put(n, cluster, now, old uint64) {
	p := j.slot(n)
	binary.NativeEndian.PutUint64(p[8:], cluster)
	binary.NativeEndian.PutUint64(p[16:], now)
	binary.NativeEndian.PutUint64(p[24:], old)
	sum := crc32.Checksum(p[8:], castagnoli)
	(*atomic.Uint64)(unsafe.Pointer(&p[0])).Store(n<<32 | uint64(sum))
	j.trace(j.offset(n), recordSize)
}

// load returns what is in slot n, if that is what was put there last.
func (j *journal) load(n uint64) (cluster, now, old uint64, ok bool) {
	p := j.slot(n)
	w := (*atomic.Uint64)(unsafe.Pointer(&p[0])).Load()
	if w>>32 != n&(1<<32-1) || uint32(w) != crc32.Checksum(p[8:], castagnoli) {
		return 0, 0, 0, false
	}
	native := binary.NativeEndian
	return native.Uint64(p[8:]), native.Uint64(p[16:]), native.Uint64(p[24:]), true
}

func (j *journal) slot(n uint64) []byte { return j.memory[j.offset(n):][:recordSize] }

func (j *journal) offset(n uint64) int { return journalHeader + int(n%j.slots.Load())*recordSize }

// end returns the number that the next record will get.
func (j *journal) end() uint64 { return j.next.Load() }

// discard drops the records below a number: what they say is durable (R13).
func (j *journal) discard(below uint64) { j.store(16, below) }
