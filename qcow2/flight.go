package qcow2

import (
	"math/rand/v2"
	"sync/atomic"
)

// flights knows which host clusters guest data is being written to. An honest
// image never makes a table of one of those: what is in use is not free. One
// that says that it is free lies, and is found out before the table is used.
//
// Why none slips through: who writes says so before it looks whether a table is
// there, and who makes a table says so before it looks who writes. So at least
// one of them sees the other.
//
// It may be used concurrently, and takes no lock.
type flights struct {
	slots [64]flight
	more  atomic.Pointer[flights]
}

// A flight is a write of guest data in progress.
type flight struct {
	run atomic.Uint64 // first cluster << flightBits | clusters; 0: none
	_   [56]byte      // one cache line each
}

// flightBits is what the clusters of one slice are counted in.
const flightBits = 16

// begin notes that clusters are going to be written to. It must be ended.
func (f *flights) begin(r hostRun) *flight {
	run := uint64(r.first)<<flightBits | uint64(r.n)
	for start := rand.IntN(len(f.slots)); ; f = f.next() {
		for i := range f.slots {
			s := &f.slots[(start+i)%len(f.slots)]
			if s.run.Load() == 0 && s.run.CompareAndSwap(0, run) {
				return s
			}
		}
	}
}

// next returns where there are more slots.
func (f *flights) next() *flights {
	if next := f.more.Load(); next != nil {
		return next
	}
	f.more.CompareAndSwap(nil, new(flights))
	return f.more.Load()
}

// end notes that the write is over. A nil flight has nothing to end.
func (f *flight) end() {
	if f != nil {
		f.run.Store(0)
	}
}

// touch returns the first cluster of r that is being written to.
func (f *flights) touch(r hostRun) (cluster int64, found bool) {
	for ; f != nil; f = f.more.Load() {
		for i := range f.slots {
			run := f.slots[i].run.Load()
			first, n := int64(run>>flightBits), int64(run&(1<<flightBits-1))
			if first < r.end() && r.first < first+n {
				return max(first, r.first), true
			}
		}
	}
	return 0, false
}
