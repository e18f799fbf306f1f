package qcow2

import (
	"slices"
	"sync"
)

// A hostRun is n consecutive host clusters.
type hostRun struct{ first, n int64 }

func (r hostRun) end() int64 { return r.first + r.n }

// A countChange is a change of the refcounts of a run that is in force in
// memory but not in the store.
type countChange struct {
	hostRun
	delta int64
}

// allocator hands out host clusters. It holds no refcounts: it knows clusters
// that are free, and tells the committer by countChanges what became of them.
//
// Clusters come from free runs, lowest first, then from the tail: what lies
// beyond everything in use. Those past limit have no refcount block yet and
// are not handed out (R11); the committer moves limit ahead of the tail.
//
// All methods may be called concurrently, and none does I/O.
type allocator struct {
	mu      sync.Mutex
	free    []hostRun     // ascending, never adjacent
	tail    int64         // everything from here on is free
	limit   int64         // clusters below have a refcount block
	fresh   int64         // clusters from here on were never written, and read as zeros
	changes []countChange // since the last takeChanges, in order
	forgot  bool          // free runs were dropped for lack of room
	wanted  int64         // clusters that were not found, in a row
	steps   int64         // see progress
}

// maxFreeRuns bounds the memory of the allocator. What is dropped is found
// again by the committer's scan.
const maxFreeRuns = 64 << 10

// newAllocator returns an allocator that appends at tail. Clusters from fresh
// on are known to read as zeros.
func newAllocator(tail, limit, fresh int64) *allocator {
	return &allocator{tail: tail, limit: max(tail, limit), fresh: fresh}
}

// take hands out up to n consecutive clusters, of which it raises the count to
// one. fresh says that they were never written: they read as zeros already.
// ok is false if there is nothing to be had before the next commit.
func (a *allocator) take(n int64) (r hostRun, fresh, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) > 0 {
		f := &a.free[0]
		r = hostRun{f.first, min(n, f.n)}
		f.first += r.n
		f.n -= r.n
		if f.n == 0 {
			a.free = a.free[1:]
		}
	} else {
		r = hostRun{a.tail, min(n, a.limit-a.tail)}
		if r.n <= 0 {
			a.wanted = max(a.wanted, 1)
			return hostRun{}, false, false
		}
		a.tail += r.n
		fresh = r.first >= a.fresh
	}
	if a.wanted == 1 {
		a.wanted = 0
	}
	a.change(r, +1)
	a.steps++
	return r, fresh, true
}

// takeWhole hands out n consecutive clusters. What it does not find the next
// commits look for.
func (a *allocator) takeWhole(n int64) (r hostRun, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := slices.IndexFunc(a.free, func(f hostRun) bool { return f.n >= n })
	switch {
	case i >= 0:
		f := &a.free[i]
		r = hostRun{f.first, n}
		f.first += n
		if f.n -= n; f.n == 0 {
			a.free = slices.Delete(a.free, i, i+1)
		}
	case a.limit-a.tail >= n:
		r = hostRun{a.tail, n}
		a.tail += n
	default:
		a.wanted = n
		return hostRun{}, false
	}
	a.wanted = 0
	a.change(r, +1)
	a.steps++
	return r, true
}

// looked notes that more clusters were looked at, or provided for.
func (a *allocator) looked() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.steps++
}

// progress returns a number that changes as long as there may be more clusters
// to be had: others got some, or the committer has not looked everywhere yet.
func (a *allocator) progress() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.steps
}

// give takes back clusters that take handed out and nothing ever referred to;
// their count falls to zero. They may have been written to.
func (a *allocator) give(r hostRun) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.change(r, -1)
	a.insert(r)
}

// release is give for clusters that nothing refers to any more. It returns
// false, and does nothing, if some are free already: then more referred to them
// than their counts said.
func (a *allocator) release(r hostRun) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := a.search(r.first)
	if i > 0 && a.free[i-1].end() > r.first || i < len(a.free) && a.free[i].first < r.end() || r.end() > a.tail {
		return false
	}
	a.change(r, -1)
	a.insert(r)
	return true
}

// found adds free clusters whose counts are zero already.
func (a *allocator) found(r hostRun) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.insert(r)
}

// change notes a change of counts; neighbours are merged.
func (a *allocator) change(r hostRun, delta int64) {
	if k := len(a.changes); k > 0 {
		if last := &a.changes[k-1]; last.delta == delta && last.end() == r.first {
			last.n += r.n
			return
		}
	}
	a.changes = append(a.changes, countChange{r, delta})
}

// search returns the index of the first free run at or behind a cluster.
func (a *allocator) search(c int64) int {
	i, _ := slices.BinarySearchFunc(a.free, c, func(r hostRun, c int64) int { return compare(r.first, c) })
	return i
}

func (a *allocator) insert(r hostRun) {
	i := a.search(r.first)
	left := i > 0 && a.free[i-1].end() == r.first
	right := i < len(a.free) && r.end() == a.free[i].first
	switch {
	case left && right:
		a.free[i-1].n += r.n + a.free[i].n
		a.free = slices.Delete(a.free, i, i+1)
	case left:
		a.free[i-1].n += r.n
	case right:
		a.free[i].first = r.first
		a.free[i].n += r.n
	case len(a.free) >= maxFreeRuns:
		a.forgot = true
	default:
		a.free = slices.Insert(a.free, i, r)
	}
}

// takeChanges returns the changes of counts since it was last called, and
// whether to look for free clusters below the tail: none is known there, and
// some are being used, or were not found. If so, and free runs were
// forgotten, forgotten is the tail: they lie somewhere below.
func (a *allocator) takeChanges() (changes []countChange, dry bool, forgotten int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	changes, dry = a.changes, len(a.free) == 0 && len(a.changes)+int(a.wanted) > 0
	a.changes = nil
	if dry && a.forgot {
		a.forgot, forgotten = false, a.tail
	}
	return changes, dry, forgotten
}
