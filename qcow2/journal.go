package qcow2

import (
	"encoding/binary"
	"hash/crc32"
	"sync/atomic"
	"unsafe"
)

// A journal is what acknowledged requests need to outlive the process: a ring
// of records in memory that does. Each says that an L2 entry changed. Tables
// and counts are not in it; who replays it makes them again.
//
// A record is 32 bytes: a commit word, the guest cluster, the new L2 entry and
// the old one, little-endian. The commit word is the record's number in the
// upper half and a CRC-32C of the other 24 bytes in the lower, and is stored
// last, atomically: a slot with another number or CRC is none, but not the end.
type journal struct {
	ring []byte
	base *atomic.Uint64 // in the same memory: the first record that is needed
	next atomic.Uint64  // number of the next record
	held atomic.Uint64  // slots promised to requests

	appended func(record) // told of each record, in tests
}

const recordSize = 32

// A record is one entry of a journal.
type record struct {
	cluster  uint64 // guest
	now, old l2Entry
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// slots returns how many records the ring has room for.
func (j *journal) slots() uint64 { return uint64(len(j.ring)) / recordSize }

// reserve promises n slots, or returns false if there is no room for them
// before the next commit. Each reserve is followed by an unreserve.
func (j *journal) reserve(n int) bool {
	held := j.held.Add(uint64(n))
	if j.next.Load()-j.base.Load()+held <= j.slots() {
		return true
	}
	j.unreserve(n)
	return false
}

func (j *journal) unreserve(n int) { j.held.Add(-uint64(n)) }

// append adds a record, for which room was reserved. Records of one cluster
// are in order because the slice is locked.
func (j *journal) append(r record) {
	n := j.next.Add(1) - 1
	p := j.slot(n)
	binary.LittleEndian.PutUint64(p[8:], r.cluster)
	binary.LittleEndian.PutUint64(p[16:], uint64(r.now))
	binary.LittleEndian.PutUint64(p[24:], uint64(r.old))
	sum := crc32.Checksum(p[8:], castagnoli)
	(*atomic.Uint64)(unsafe.Pointer(&p[0])).Store(n<<32 | uint64(sum))
	if j.appended != nil {
		j.appended(r)
	}
}

func (j *journal) slot(n uint64) []byte {
	return j.ring[n%j.slots()*recordSize:][:recordSize]
}

// end returns the number that the next record will get.
func (j *journal) end() uint64 { return j.next.Load() }

// discard drops the records below a number: what they say is durable (R13).
func (j *journal) discard(below uint64) { j.base.Store(below) }
